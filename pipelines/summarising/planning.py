"""Planning a summary job: every document of the input in a block, in order.

Small inputs are looked through in this process, others by Ray, a file a task. Between the two passes that dividing them
needs, the catalogue lies on this machine's temporary disk.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipelines.config import fingerprint
from pipelines.data import catalogue
from pipelines.data.catalogue import Entry
from pipelines.data.inputs import InputFile
from pipelines.data.read import file_sha256
from pipelines.storage import FileEntry
from pipelines.summarising.ledger import Ledger

_SMALL_BYTES = 2**26  # inputs that are looked through here, sooner than Ray could begin
_TABLE_ROWS = 4096
_BATCHES_A_BLOCK = 4  # fewer: rows of a batch are idle at more ends; more: more is redone after a kill
_BLOCKS_A_HAND = 4  # at least, where there are enough documents: workers then end together
_BLOCK_BYTES = 4 * 2**20  # of text; a block of long documents is one batch
_FILE = pa.field("file", pa.string())


class Wishes(NamedTuple):
    """What shapes a plan."""

    limit: int | None  # documents, the first
    block_len: int | None  # documents of a block; None: found here
    batch_size: int
    num_hands: int  # workers of all shards together


class Numbers(NamedTuple):
    """Of a plan."""

    num_documents: int
    num_blocks: int
    block_len: int
    num_bytes: int  # of text


class Plan(NamedTuple):
    """A plan that was written."""

    name: str
    numbers: Numbers
    files: list[InputFile]  # as they were read


def make_plan(ledger: Ledger, files: Sequence[FileEntry], wishes: Wishes) -> Plan:
    """Writes the plan's blocks."""
    read: list[InputFile] = []
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        path = Path(directory) / "catalogue.parquet"
        num_documents = num_bytes = 0
        with pq.ParquetWriter(path, catalogue.SCHEMA) as writer:
            for table in _tables(catalogue.sort_out_repeated(_entries(files, read))):
                table = table.slice(0, None if wishes.limit is None else wishes.limit - num_documents)
                writer.write_table(table)
                num_documents += len(table)
                num_bytes += sum(table.column("num_bytes").to_pylist())
        block_len = wishes.block_len or _block_len(num_documents, num_bytes, wishes)
        name = fingerprint([file_sha256(str(path)), block_len, [file._asdict() for file in read]])[:16]
        ledger.write_plan(name, _written(path), block_len)
    return Plan(name, Numbers(num_documents, math.ceil(num_documents / block_len), block_len, num_bytes), read)


def _block_len(num_documents: int, num_bytes: int, wishes: Wishes) -> int:
    """Documents of a block."""
    share = math.ceil(num_documents / wishes.num_hands)
    by_bytes = int(_BLOCK_BYTES * num_documents / max(1, num_bytes))
    most = min(_BATCHES_A_BLOCK * wishes.batch_size, math.ceil(share / _BLOCKS_A_HAND), by_bytes)
    return max(1, most, min(wishes.batch_size, share))


def _tables(entries: Iterator[Entry]) -> Iterator[pa.Table]:
    rows: list[Entry] = []
    for entry in entries:
        rows.append(entry)
        if len(rows) == _TABLE_ROWS:
            yield catalogue.to_table(rows)
            rows = []
    yield catalogue.to_table(rows)


def _written(path: Path) -> Iterator[Entry]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_TABLE_ROWS):
            yield from catalogue.from_table(pa.Table.from_batches([batch]))


def _entries(files: Sequence[FileEntry], read: list[InputFile]) -> Iterator[Entry]:
    """All entries, in order; `read` gets the files."""
    if sum(file.num_bytes for file in files) <= _SMALL_BYTES:
        for file in files:
            for found in catalogue.survey(file):
                if isinstance(found, Entry):
                    yield found
                else:
                    read.append(found)
        return
    for table in _surveyed_by_ray(files):
        for row in table.to_pylist():
            text = row.pop("file")
            if text is None:
                yield Entry(**row)
            else:
                read.append(InputFile(*json.loads(text)))


def _surveyed_by_ray(files: Sequence[FileEntry]) -> Iterator[pa.Table]:
    """Tables of entries with a column `file`, which is set in a row of its own at the end of each file."""
    rows = [{"file": json.dumps(file)} for file in files]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 256)).map_batches(
        _survey, batch_size=1, batch_format="pyarrow"
    )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _survey(batch: pa.Table) -> Iterator[pa.Table]:
    schema = catalogue.SCHEMA.append(_FILE)
    for text in batch.column("file").to_pylist():
        rows: list[dict[str, Any]] = []
        for found in catalogue.survey(FileEntry(*json.loads(text))):
            rows.append(found._asdict() if isinstance(found, Entry) else {"file": json.dumps(found)})
            if len(rows) == _TABLE_ROWS:
                yield pa.Table.from_pylist(rows, schema)
                rows = []
        yield pa.Table.from_pylist(rows, schema)
