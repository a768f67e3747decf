"""Every document of an input: where it is, its id and its hash, found by reading the input once.

A catalogue is divided into blocks of consecutive documents. Documents with an id that an earlier one has are sorted out
here, with ids kept on disk: memory does not grow with their number. Each can be read again alone, without what stands
before it in its file; what has changed meanwhile is noticed by its hash.
"""

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipelines import storage
from pipelines.data import read
from pipelines.data.batch_requests import Line, Request, read_line
from pipelines.data.inputs import InputFile
from pipelines.data.read import Document, Fault, Source, UnreadableError
from pipelines.storage import FileEntry

ERROR, SKIPPED = "error", "skipped"
_NO_ROWS = "the file can be read now, but this job has one row for all of it: give it an output of its own"
REPEATED = "an earlier document has this id; the first is kept"

SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("uri", pa.string()),
        ("name", pa.string()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("url", pa.string()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
    ]
)


class Entry(NamedTuple):
    """A document, or what stands in its place."""

    doc_id: str
    uri: str
    name: str  # of the file, relative to what was given as input
    line: int | None = None  # line or row in its file, from 1; None where the file is the document
    offset: int = 0  # of a JSONL line in its file, bytes
    length: int = 0  # of a JSONL line, bytes
    num_bytes: int = 0  # of the text
    sha256: str | None = None  # of the text; None where there is none
    url: str | None = None  # of a batch request
    outcome: str | None = None  # known before it is read: "error" or "skipped"
    reason: str | None = None  # of that outcome

    @property
    def source(self) -> str:
        return self.uri if self.line is None else f"{self.uri}:{self.line}"

    @property
    def is_repeated(self) -> bool:
        """Whether it is a text, but one with an id that an earlier document has."""
        return self.outcome is not None and self.sha256 is not None


def survey(file: FileEntry) -> Iterator[Entry | InputFile]:
    """An entry for everything in a file, then the file as it was read; what cannot be read is an entry, too.

    Raises StorageError where not the file but the store fails.
    """
    source, line = None, None
    try:
        source = Source(file.uri)
        for entry in _entries(file, source):
            line = entry.line
            yield entry
    except storage.StorageError:
        raise
    except Exception as error:  # a parser that breaks on its file must not take the other files with it
        where = "" if line is None else f" (after line or row {line})"
        text = " ".join(str(error).split())
        reason = text if isinstance(error, UnreadableError) else f"cannot be read: {type(error).__name__}: {text}"
        yield _faulty(file, Fault("unreadable", f"{reason}{where}"))
    yield InputFile(*file, sha256=None if source is None else source.sha256())


def _entries(file: FileEntry, source: Source) -> Iterator[Entry]:
    if file.name.lower().endswith(".jsonl"):
        for number, offset, text in read.numbered_lines(source):
            line = read_line(file.name, number, text)
            url = None if line.request is None else line.request.url
            yield _entry(file, line.document, line.custom_id)._replace(offset=offset, length=len(text), url=url)
        return
    for found in read.read_documents(file.uri, file.name, source):
        yield _entry(file, found)


def _entry(file: FileEntry, found: Document | Fault, custom_id: str | None = None) -> Entry:
    if isinstance(found, Fault):
        return _faulty(file, found._replace(document_id=found.document_id or custom_id))
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in found.chunks:
        digest.update(chunk)
        num_bytes += len(chunk)
    entry = Entry(found.document_id, file.uri, file.name, found.line)
    return entry._replace(num_bytes=num_bytes, sha256=digest.hexdigest())


def _faulty(file: FileEntry, fault: Fault) -> Entry:
    place = file.name if fault.line is None else f"{file.name}:{fault.line}"
    doc_id, reason = (_encodable(text) for text in (fault.document_id or place, fault.reason))
    return Entry(doc_id, file.uri, file.name, fault.line, outcome=ERROR, reason=reason)


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def sort_out_repeated(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries; of those with an id that an earlier one has, the same texts are skipped, others are errors."""
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        ids = sqlite3.connect(Path(directory) / "ids.db", isolation_level=None)
        try:
            ids.execute("PRAGMA journal_mode = OFF")
            ids.execute("PRAGMA synchronous = OFF")
            ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, sha256 TEXT) WITHOUT ROWID")
            for entry in entries:
                yield _sorted_out(ids, entry)
        finally:
            ids.close()


def _sorted_out(ids: sqlite3.Connection, entry: Entry) -> Entry:
    if entry.outcome is not None and entry.url is None:
        return entry
    first = ids.execute("SELECT sha256 FROM ids WHERE id = ?", (entry.doc_id,)).fetchone()
    if first is None:
        ids.execute("INSERT INTO ids VALUES (?, ?)", (entry.doc_id, entry.sha256))
        return entry
    if entry.outcome is not None:  # a request that cannot be used, and none of its own: one result line a `custom_id`
        return entry._replace(url=None)
    if first[0] == entry.sha256:
        return entry._replace(outcome=SKIPPED, reason="an earlier document has this id and the same text")
    return entry._replace(outcome=ERROR, reason=REPEATED, url=None)


def look_up_again(entries: Sequence[Entry]) -> list[Entry]:
    """What now stands where each of the entries was found; the entry itself where nothing does.

    Of documents with an id that an earlier one of the same file has, it is said as `sort_out_repeated` does.
    """
    now: dict[tuple[str, int | None], Entry] = {}
    for uri, name in {(entry.uri, entry.name) for entry in entries}:
        of_file = {entry.line: entry for entry in entries if entry.uri == uri}
        surveyed = survey(FileEntry(uri, name, num_bytes=0, mtime_ns=0))
        for found in sort_out_repeated(each for each in surveyed if isinstance(each, Entry)):
            if found.line in of_file:
                now[uri, found.line] = found
        if None in of_file and (uri, None) not in now:  # a file of many that could not be read, and can be now
            now[uri, None] = of_file[None]._replace(reason=_NO_ROWS)
    return [now.get((entry.uri, entry.line), entry) for entry in entries]


# --- tables -----------------------------------------------------------------------------------------


def to_table(entries: Iterable[Entry]) -> pa.Table:
    return pa.Table.from_pylist([entry._asdict() for entry in entries], SCHEMA)


def from_table(table: pa.Table) -> list[Entry]:
    return [Entry(**row) for row in table.to_pylist()]


# --- reading a document again -----------------------------------------------------------------------


class Text(NamedTuple):
    """A document's text, to be read once."""

    chunks: Iterator[bytes]  # UTF-8, not yet checked; raises UnreadableError, also where the text is another by now
    request: Request | None


class Reader:
    """Reads single documents of a catalogue. Parquet rows that are asked for in order are read on, not anew."""

    def __init__(self) -> None:
        self._rows: Iterator[Document | Fault] = iter(())
        self._next_row: tuple[str, int] | None = None  # (file, row from 1) that comes next

    def open(self, entry: Entry) -> Text:
        """The text of an entry that has one."""

        def chunks() -> Iterator[bytes]:
            if isinstance(line.document, Fault):
                raise UnreadableError(line.document.reason)
            yield from _unchanged(line.document.chunks, entry)

        try:
            line = self._find(entry)
        except UnreadableError as error:
            line = Line(Fault("unreadable", str(error)), None, None)
        return Text(chunks(), line.request)

    def _find(self, entry: Entry) -> Line:
        lower = entry.name.lower()
        if entry.line is None:
            return Line(next(read.read_documents(entry.uri, entry.name, Source(entry.uri))), None, None)
        if lower.endswith(".jsonl"):
            return read_line(entry.name, entry.line, _slice(entry.uri, entry.offset, entry.length))
        if self._next_row != (entry.uri, entry.line):
            self._rows = read.parquet_rows(entry.uri, entry.name, entry.line - 1)
        self._next_row = entry.uri, entry.line + 1
        return Line(next(self._rows, Fault("unreadable", "the row is not there any more")), None, None)


def _slice(uri: str, offset: int, length: int) -> bytes:
    files, path = storage.filesystem(uri)

    def get() -> bytes:
        with files.open_input_file(path) as file:
            file.seek(offset)
            return file.read(length)

    data: bytes = read.readable(get)
    return data


def _unchanged(chunks: Iterable[bytes], entry: Entry) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != entry.sha256:
        raise UnreadableError("its content has changed since the job began")
