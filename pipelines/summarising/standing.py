"""What stands in an output already: the job that is there, and what it lacks."""

import json
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs

from pipelines import storage
from pipelines.config import InputError
from pipelines.data import inputs
from pipelines.data.inputs import InputFile
from pipelines.data.read import file_sha256
from pipelines.storage import FileEntry
from pipelines.summarising import ledger as ledgers
from pipelines.summarising.ledger import Ledger

log = logging.getLogger(__name__)


class Todo(NamedTuple):
    """What this command has to do."""

    blocks: list[int]  # to be made, in order
    committed: set[int]  # that have rows
    mine: range  # the blocks of this shard
    round: int  # of retries; 0: none was asked for
    result: dict[str, Any] | None  # of a run before, where it counts all rows that there are


def job_there(
    ledger: Ledger, decisive: dict[str, Any], files: Sequence[FileEntry], *, retry: bool
) -> dict[str, Any] | None:
    """The job that is there already, None where there is none; InputError where there is something else."""
    output = ledger.output
    try:
        if storage.exists(output) and not storage.is_directory(output):
            raise InputError(f"{output} is a file; --output needs a directory")
        names = storage.list_names(output)
        foreign = [name for name in names if not ledgers.OWN_NAMES.fullmatch(name)]
        if ledgers.JOB not in names:
            # A plan that was cut off leaves these; any other name belongs to something else.
            foreign += [
                name
                for name in names
                if not (ledgers.PLAN.fullmatch(name) or re.fullmatch(r"SHA256SUMS|\..*\.tmp", name))
            ]
        if foreign:
            raise InputError(f"{output} is not empty (it holds {foreign[0]}); give another --output")
        if ledgers.JOB not in names:
            _check_writable(output)
            return None
        job = ledger.read(ledgers.JOB)
        there = job.get("decisive", {}) if isinstance(job, dict) else {}
        if there.get("format") != ledgers.FORMAT:
            raise InputError(f"{output} holds a {ledgers.JOB} that is not of summaries; give another --output")
        read_then = ledgers.inputs_name(job["plan"])
        before = [InputFile(**entry) for entry in ledger.read(read_then)]
    except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"output {output} cannot be used: {error}") from error
    differences = [
        f"{name} {_short(there.get(name))} there, {_short(value)} asked for"
        for name, value in decisive.items()
        if there.get(name) != value
    ]
    if (difference := inputs.difference(before, files)) is not None:
        if retry and difference.startswith("changed"):  # so that what failed can be mended
            log.warning("input %s: what failed is read again, documents that are done stay as they are", difference)
            now = [_as_it_is(*pair) for pair in zip(before, files, strict=True)]
            ledger.write(read_then, [file._asdict() for file in now])
        else:
            differences.append(f"other input ({difference})")
    if differences:
        raise InputError(f"{output} holds other summaries: {'; '.join(differences)}; give another --output")
    return job


def _as_it_is(old: InputFile, new: FileEntry) -> InputFile:
    return old if inputs.is_same(old, new) else InputFile(*new, sha256=file_sha256(new.uri))


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else json.dumps(value)


def _check_writable(output: str) -> None:
    """Raises OSError now rather than after hours, where the output cannot be made."""
    if storage.is_s3(output):
        files, path = storage.filesystem(output)
        bucket = path.split("/")[0]
        if files.get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
            raise OSError(f"there is no bucket {bucket}")
        return
    parent = next(parent for parent in (Path(output), *Path(output).parents) if parent.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".rmt-", suffix=".tmp"):
        pass


def whats_left(ledger: Ledger, job: dict[str, Any], shard: tuple[int, int], *, retry: bool) -> Todo:
    """What is left for a shard (number, of how many); begins a round of retries where one is asked for.

    One that was interrupted is gone on with instead.
    """
    result, begun = ledger.read(ledgers.RESULT), ledger.read(ledgers.ROUND)
    finished = -1 if result is None else result["round"]
    current = 0 if begun is None else begun["round"]
    committed = ledger.done()
    if retry and (begun is None or finished >= current) and ledger.failed(committed, current + 1):
        current += 1
        ledger.write(ledgers.ROUND, {"round": current})
    number, num_shards = shard
    mine = range(number, job["num_blocks"], num_shards)
    again = ledger.failed(committed.intersection(mine), current) if current > max(0, finished) else set()
    counts_all = result is not None and result["num_blocks_done"] == len(committed) and finished == current
    blocks = [block for block in mine if block not in committed or block in again]
    return Todo(blocks, committed, mine, current, result if counts_all else None)
