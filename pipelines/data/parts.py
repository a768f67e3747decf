"""Dividing input files among workers: each gets whole documents, in order, about as much text as the others.

A file of many documents is divided by lines or rows. A worker that gets its end reads, but does not tokenise, what
stands before: parsing is cheap beside a model.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.data.inputs import InputFile
from pipelines.data.read import Document, Fault, Source, UnreadableError, read_documents
from pipelines.storage import FileEntry

_GZIP_FACTOR = 3  # text compresses to about a third


class FilePart(NamedTuple):
    """Lines or rows `start` to `stop` - 1 of a file, counted from 0; of a file that is one document, all of it."""

    uri: str
    name: str
    start: int
    stop: int | None  # None: to the end


class Surveyed(NamedTuple):
    """A file and how many lines or rows it has: 1 where it is one document or cannot be read."""

    file: InputFile
    num_records: int


def survey(file: FileEntry) -> Surveyed:
    """Reads a file once, in chunks, for its checksum and its number of lines."""
    count, last, sha256 = 0, b"\n", None
    try:
        source = Source(file.uri)
        for chunk in source.chunks():
            count += chunk.count(b"\n")
            last = chunk[-1:]
        sha256 = source.sha256()
    except UnreadableError:  # reported when the file is read for its documents
        count = 0
    if file.name.lower().endswith(".parquet"):
        count = _num_rows(file.uri)
    elif file.name.lower().endswith(".jsonl"):
        count += last != b"\n"
    else:
        count = 1
    return Surveyed(InputFile(*file, sha256), max(1, count))


def _num_rows(uri: str) -> int:
    files, path = storage.filesystem(uri)
    try:
        with files.open_input_file(path) as stream:
            return pq.ParquetFile(stream).metadata.num_rows
    except (OSError, pa.ArrowException):
        return 1


def plan(files: Sequence[Surveyed], num_units: int, min_records: int) -> list[list[FilePart]]:
    """Up to `num_units` lists of parts: all files in order, about equal in bytes, at least `min_records` in each.

    The last may have fewer.
    """
    weights = [_weight(file) for file in files]
    target = sum(weights) / num_units
    units: list[list[FilePart]] = [[]]
    num_records, weight = 0, 0.0  # of the last unit
    for (file, count), file_weight in zip(files, weights, strict=True):
        each = file_weight / count
        start = 0
        while start < count:
            if units[-1] and weight >= target and num_records >= min_records:
                units.append([])
                num_records, weight = 0, 0.0
            wanted = max(1, min_records - num_records, -int(-(target - weight) // each))
            stop = min(count, start + wanted)
            units[-1].append(FilePart(file.uri, file.name, start, None if stop == count else stop))
            num_records, weight = num_records + stop - start, weight + each * (stop - start)
            start = stop
    return [unit for unit in units if unit]


def _weight(surveyed: Surveyed) -> float:
    file = surveyed.file
    factor = _GZIP_FACTOR if file.name.lower().endswith(".gz") else 1
    return float(max(file.num_bytes, surveyed.num_records, 1) * factor)


def read_part(part: FilePart) -> Iterator[Document | Fault]:
    """The documents of a part and what in it is none; a file that cannot be read (further) ends with such a fault.

    Further documents may be asked for before the earlier ones are read: those of a JSONL or Parquet file hold their
    text in memory.
    """
    line = None
    try:
        for found in read_documents(part.uri, part.name, Source(part.uri)):
            line = found.line
            at = 0 if line is None else line - 1
            if part.stop is not None and at >= part.stop:
                return
            if at >= part.start:
                yield found
    except UnreadableError as error:
        where = "" if line is None else f" (after line or row {line})"
        yield Fault("unreadable", f"{error}{where}")
