"""The output of a summary job: what is to be done, what is done, and where a long document was left.

    job.json                  what decides the rows; made when the plan is whole: without it there is no job
    inputs-NAME.json          the files read: size, time and hash
    plan-NAME-00000.parquet   every document, a row group a block, and more such files
    summaries-00000.parquet   the rows of one block, committed as a whole when the block ends
    states/                   progress within documents of blocks that have not ended
    round.json                how often what failed was to be tried again
    summaries.jsonl           all rows, in the order of the input
    dead_letters.jsonl        one line for every error
    batch_output.jsonl        result lines, where the input holds OpenAI Batch requests
    result.json               counts; written last

A plan's name is made of what it holds, and job.json, which names it, is made once: commands that begin one job together
go on with the plan of the first that has one.

A block always holds the same documents and has one file, which appears by a rename: whoever works on a block, how often
and however it ends, there is one row a document. Memory is that of one block.
"""

import contextlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.data import catalogue
from pipelines.data.catalogue import Entry
from pipelines.summarising import rows
from pipelines.summarising.rows import ERROR, SCHEMA

FORMAT = "rmt-summaries-3"
JOB, ROUND, RESULT = "job.json", "round.json", "result.json"
LINES, DEAD_LETTERS, BATCH_OUTPUT = "summaries.jsonl", "dead_letters.jsonl", "batch_output.jsonl"
STATES = "states"
OWN_NAMES = re.compile(
    r"job\.json|inputs-[0-9a-f]{16}\.json|round\.json|result\.json|states|plan-[0-9a-f]{16}-\d{5,}\.parquet"
    r"|summaries-\d{5,}\.parquet"
    r"|summaries\.jsonl|dead_letters\.jsonl|batch_output\.jsonl|SHA256SUMS|\..*\.tmp"
)
_PART = re.compile(r"summaries-(\d{5,})\.parquet")
PLAN = re.compile(r"(?:plan|inputs)-([0-9a-f]{16})(?:-\d{5,}\.parquet|\.json)")
_CUT_OFF = re.compile(r"\.(summaries|plan-[0-9a-f]{16})-\d{5,}\.parquet\.[0-9a-f]+\.tmp")
_PLAN_BLOCKS = 256  # row groups of a plan's file: few enough that its footer is small


class Counts(NamedTuple):
    """Of rows that are there."""

    num_documents: int = 0
    num_ok: int = 0
    num_error: int = 0
    num_skipped: int = 0
    num_tokens: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(table: pa.Table) -> Counts:
    """Of a block's rows; the columns `status` and `num_tokens` are enough."""
    statuses = Counter(table.column("status").to_pylist())
    num_tokens = sum(table.column("num_tokens").to_pylist())
    return Counts(len(table), statuses["ok"], statuses["error"], statuses["skipped"], num_tokens)


class Ledger:
    """The files of one output; `plan` names the plan whose documents are asked for."""

    def __init__(self, output: str, plan: str | None = None) -> None:
        self.output = output
        self.plan = plan

    def _at(self, *names: str) -> str:
        return storage.join(self.output, *names)

    def read(self, name: str) -> Any:
        """The value of a JSON file; None where there is none."""
        return storage.read_json(self._at(name)) if storage.exists(self._at(name)) else None

    def write(self, name: str, value: Any) -> None:
        storage.write_json(self._at(name), value)

    def create_job(self, job: dict[str, Any]) -> bool:
        """Makes the job, whose plan is whole; False where another command has made it."""
        return storage.create_json(self._at(JOB), job)

    # --- the plan

    def write_plan(self, plan: str, entries: Iterable[Entry], block_len: int) -> None:
        """Divides entries into blocks of `block_len` documents (the last perhaps fewer)."""
        blocks = _batched(entries, block_len)
        for number in itertools.count():
            first = next(blocks, None)
            if first is None:
                return
            target = self._at(_plan_name(plan, number))
            with storage.writing(target) as path, pq.ParquetWriter(path, catalogue.SCHEMA) as file:
                for block in itertools.chain([first], itertools.islice(blocks, _PLAN_BLOCKS - 1)):
                    file.write_table(catalogue.to_table(block), row_group_size=block_len)

    def entries(self, block: int) -> list[Entry]:
        """The documents of a block."""
        files, path = storage.filesystem(self._at(_plan_name(self.plan, block // _PLAN_BLOCKS)))
        with files.open_input_file(path) as file:
            return catalogue.from_table(pq.ParquetFile(file).read_row_group(block % _PLAN_BLOCKS))

    def planned(self) -> Iterator[pa.Table]:
        """All documents, some at a time."""
        for number in itertools.count():
            if not storage.exists(uri := self._at(_plan_name(self.plan, number))):
                return
            files, path = storage.filesystem(uri)
            with files.open_input_file(path) as file:
                for batch in pq.ParquetFile(file).iter_batches():
                    yield pa.Table.from_batches([batch])

    # --- rows

    def done(self) -> set[int]:
        """Numbers of the blocks that are committed."""
        found = (_PART.fullmatch(name) for name in storage.list_names(self.output))
        return {int(match[1]) for match in found if match}

    def has(self, block: int) -> bool:
        """Whether a block is committed."""
        return storage.exists(self._at(part_name(block)))

    def commit(self, block: int, values: Sequence[dict[str, Any]]) -> Counts:
        """Puts the rows of a block in the place of what was there, as a whole."""
        table = pa.Table.from_pylist(list(values), SCHEMA)
        with storage.writing(self._at(part_name(block))) as path:
            pq.write_table(table, path)
        return count(table)

    def rows(self, block: int, columns: list[str] | None = None) -> pa.Table:
        data = storage.read_bytes(self._at(part_name(block)))
        return pq.read_table(io.BytesIO(data), columns=columns)

    def count(self, blocks: Iterable[int]) -> Counts:
        """Of all rows of these blocks, of which one at a time is read."""
        total = Counts()
        for block in blocks:
            total = total.plus(count(self.rows(block, ["status", "num_tokens"])))
        return total

    def failed(self, blocks: Iterable[int], attempts: int) -> set[int]:
        """Those of the blocks that hold an error of a document that was tried no more than `attempts` times.

        Ids that come again are not tried again.
        """
        found = set()
        for block in blocks:
            rows = self.rows(block, ["status", "attempt", "error"]).to_pylist()
            if any(
                row["status"] == ERROR and row["attempt"] <= attempts and row["error"] != catalogue.REPEATED
                for row in rows
            ):
                found.add(block)
        return found

    def retried(self) -> dict[str, tuple[str, str | None]]:
        """Id and hash of the documents that were tried more than once, by their source."""
        found = {}
        for block in sorted(self.done()):
            for row in self.rows(block, ["source", "doc_id", "sha256", "attempt"]).to_pylist():
                if row["attempt"] > 1:
                    found[row["source"]] = row["doc_id"], row["sha256"]
        return found

    # --- progress within documents

    def tries(self, block: int) -> dict[str, Any]:
        """What was noted of work on a block that did not end; empty at the first try."""
        found = self.read(f"{STATES}/{_try_name(block)}")
        return found if isinstance(found, dict) else {}

    def note(self, block: int, tries: dict[str, Any]) -> None:
        self.write(f"{STATES}/{_try_name(block)}", tries)

    def keeper(self, key: str, every: int) -> "FileKeeper":
        return FileKeeper(self._at(STATES, key), every)

    def num_states(self) -> int:
        return sum(not name.startswith(("try-", ".")) for name in storage.list_names(self._at(STATES)))

    def forget(self, block: int, keys: Iterable[str]) -> None:
        """Deletes the progress of a block and of its documents, which have their rows."""
        self._forget({_try_name(block), *keys})

    def sweep(self, plan: str) -> None:
        """Deletes what is of no use once all rows are there: progress, parts that were never whole, other plans."""
        self._forget(storage.list_names(self._at(STATES)))
        for name in storage.list_names(self.output):
            found = PLAN.fullmatch(name)
            if _CUT_OFF.fullmatch(name) or (found is not None and found[1] != plan):
                with contextlib.suppress(FileNotFoundError):
                    storage.delete(self._at(name))

    def _forget(self, names: Iterable[str]) -> None:
        there = set(storage.list_names(self._at(STATES)))
        for key in there.intersection(names):
            with contextlib.suppress(FileNotFoundError):  # by another worker on the same block
                storage.delete(self._at(STATES, key))

    # --- the end

    def assemble(self, blocks: Sequence[int]) -> Counts:
        """Writes the JSONL files from committed blocks, in order, and counts them."""
        total, batch = Counts(), False
        with (
            storage.writing(self._at(LINES)) as lines,
            storage.writing(self._at(DEAD_LETTERS)) as dead,
            lines.open("w", encoding="utf-8") as line_file,
            dead.open("w", encoding="utf-8") as dead_file,
        ):
            for block in blocks:
                table = self.rows(block)
                total = total.plus(count(table))
                for row in table.to_pylist():
                    _write_line(line_file, row)
                    batch = batch or row["url"] is not None
                    if row["status"] == ERROR:
                        _write_line(dead_file, rows.dead_letter(row))
        if batch:
            with storage.writing(self._at(BATCH_OUTPUT)) as path, path.open("w", encoding="utf-8") as file:
                for block in blocks:
                    for row in self.rows(block).to_pylist():
                        if row["url"] is not None and row["status"] != rows.SKIPPED:  # one line a `custom_id`
                            _write_line(file, rows.batch_line(row))
        return total


class FileKeeper:
    """One document's progress as a file."""

    def __init__(self, uri: str, every: int) -> None:
        self.every = every
        self._uri = uri

    def load(self) -> bytes | None:
        return storage.read_bytes(self._uri) if storage.exists(self._uri) else None

    def keep(self, data: bytes) -> None:
        storage.write_bytes(self._uri, data)


def part_name(block: int) -> str:
    return f"summaries-{block:05d}.parquet"


def inputs_name(plan: str) -> str:
    return f"inputs-{plan}.json"


def _plan_name(plan: str | None, number: int) -> str:
    assert plan is not None
    return f"plan-{plan}-{number:05d}.parquet"


def _try_name(block: int) -> str:
    return f"try-{block:05d}.json"


def _batched(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    block: list[Entry] = []
    for entry in entries:
        block.append(entry)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _write_line(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
