"""Reading files as streams of documents: .txt, .txt.gz, .jsonl, .parquet.

A text file is one document and is read in chunks, however long. A JSONL line and a Parquet value are held in
memory whole, because their parsers need them so, and then handed on in chunks too. Text stays as it is: no
line ending is translated and no byte order mark removed.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage

CHUNK_BYTES = 2**20
_BATCH_BYTES = 2**24  # Parquet rows read at once, at most, as far as the file's averages tell
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A document whose text is about to be read."""

    document_id: str
    line: int | None  # line or row in its file, from 1; None where the file is the document
    chunks: Iterable[bytes]  # UTF-8, not yet checked, cut anywhere; may raise UnreadableError


class Fault(NamedTuple):
    """Something in a file that is no document."""

    kind: str
    reason: str
    line: int | None = None
    document_id: str | None = None


class UnreadableError(Exception):
    """The source of a document cannot be read (further).

    Not so a StorageError, which goes on its way: where a store does not answer, or lets nobody in, the documents are
    no worse for it, and the job has to be run again.
    """


class Source:
    """A file's bytes in order, hashed on the way. Raises UnreadableError where the file cannot be read."""

    def __init__(self, uri: str) -> None:
        files, path = storage.filesystem(uri)
        self._hash = hashlib.sha256()
        self._stream = readable(lambda: files.open_input_stream(path, compression=None))

    def read(self, size: int = -1) -> bytes:
        data = readable(self._stream.read, CHUNK_BYTES if size < 0 else size)
        self._hash.update(data)
        return data

    def chunks(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK_BYTES):
            yield chunk

    def sha256(self) -> str | None:
        """Of the whole file, whose rest is read for it; None where that fails."""
        try:
            for _ in self.chunks():
                pass
        except UnreadableError:
            return None
        return self._hash.hexdigest()


def readable(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except storage.StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise UnreadableError(" ".join(str(error).split())) from error


def file_sha256(uri: str) -> str | None:
    """Of a file's bytes; None where it cannot be read."""
    try:
        return Source(uri).sha256()
    except UnreadableError:
        return None


SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".parquet")


def read_documents(uri: str, name: str, source: Source, called: str | None = None) -> Iterator[Document | Fault]:
    """The documents of a file, each to be read before the next is asked for.

    `called` (none: what `calling` makes of its name) gives ids where the file has none: itself for a text file,
    `called:line` otherwise. `source` is the opened file. May raise UnreadableError itself, between documents.
    """
    lower = name.lower()
    called = calling(name) if called is None else called
    if lower.endswith(".txt"):
        yield Document(called, None, source.chunks())
    elif lower.endswith(".txt.gz"):
        yield Document(called, None, _gunzip(source))
    elif lower.endswith(".jsonl"):
        yield from _json_lines(called, source)
    else:
        yield from parquet_rows(uri, called)


def calling(name: str) -> str:
    """What a file of this name gives its documents' ids: a text file's without its suffix."""
    lower = name.lower()
    for suffix in (".txt", ".txt.gz"):
        if lower.endswith(suffix):
            return name[: -len(suffix)] or name
    return name


def _gunzip(source: Source) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=source, mode="rb") as file:  # type: ignore[call-overload]  # read() is enough
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except storage.StorageError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise UnreadableError(f"damaged or cut gzip file: {error}") from error


# --- JSONL ------------------------------------------------------------------------------------------


def _json_lines(name: str, source: Source) -> Iterator[Document | Fault]:
    for number, _, line in numbered_lines(source):
        yield _json_document(name, number, line)


def numbered_lines(source: Source) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in the file in bytes, the line without its end) of every line that is not blank."""
    offset = 0
    for number, line in enumerate(_lines(source.chunks()), start=1):
        start, offset = offset, offset + len(line) + 1
        if number == 1 and line.startswith(_BOM):  # of the file, not of a text
            start, line = len(_BOM), line[len(_BOM) :]
        if line.strip():
            yield number, start, line


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pending.append(first)
        for line in rest:
            yield b"".join(pending)
            pending = [line]
    if last := b"".join(pending):
        yield last


def _json_document(name: str, number: int, line: bytes) -> Document | Fault:
    value = json_object(line, number)
    return value if isinstance(value, Fault) else text_document(value, name, number)


def json_object(line: bytes, number: int) -> dict[str, Any] | Fault:
    """The JSON object that a line holds."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Fault("not_utf8", f"not UTF-8 at byte {error.start} of the line ({error.reason})", number)
    except (ValueError, RecursionError) as error:
        return Fault("not_json", f"not JSON: {error}", number)
    if not isinstance(value, dict):
        return Fault("not_json", f"not a JSON object but {type(value).__name__}", number)
    return value


def text_document(value: dict[str, Any], name: str, number: int) -> Document | Fault:
    """The document that a JSON object holds in `text`, with an optional `id`."""
    found = document(value.get("text", ""), value.get("id"), f"{name}:{number}", number)
    if "text" not in value and isinstance(found, Document):
        return Fault("no_text", "no field `text`", number, found.document_id)
    return found


# --- Parquet ----------------------------------------------------------------------------------------

_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


def parquet_rows(uri: str, name: str, start: int = 0) -> Iterator[Document | Fault]:
    """The documents of a Parquet file from row `start` (counted from 0) on; row groups before it are not read."""
    files, path = storage.filesystem(uri)
    file = readable(lambda: pq.ParquetFile(files.open_input_file(path), buffer_size=CHUNK_BYTES))
    schema = file.schema_arrow
    if "text" not in schema.names:
        yield Fault("no_text", f"no column `text`, only {', '.join(schema.names) or 'none'}")
        return
    if repeated := [column for column in ("text", "id") if schema.names.count(column) > 1]:
        yield Fault("unreadable", f"several columns `{repeated[0]}`")
        return
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in _TEXT_TYPES:
        yield Fault("no_text", f"column `text` holds {kind}, not strings")
        return
    columns = [column for column in ("text", "id") if column in schema.names]
    groups, number = _groups_from(file, start)
    batches = file.iter_batches(batch_size=_batch_rows(file), columns=columns, row_groups=groups)
    while (batch := readable(next, batches, None)) is not None:
        texts = batch.column("text")
        texts = texts.dictionary_decode() if isinstance(texts, pa.DictionaryArray) else texts
        large = texts.type in (pa.large_string(), pa.large_binary())
        texts = texts.cast(pa.large_binary() if large else pa.binary())  # unchecked bytes: ours to check
        ids = batch.column("id") if "id" in columns else None
        for row in range(batch.num_rows):
            number += 1
            if number > start:
                document_id = None if ids is None else _readable_id(ids[row])
                yield document(texts[row].as_py(), document_id, f"{name}:{number}", number)


def _groups_from(file: pq.ParquetFile, start: int) -> tuple[list[int], int]:
    """(the row groups from the one that holds row `start` on, the rows before them)."""
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    first, before = 0, 0
    while first < len(sizes) and before + sizes[first] <= start:
        before += sizes[first]
        first += 1
    return list(range(first, len(sizes))), before


def _readable_id(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""  # refused as any other value that is no id


def _batch_rows(file: pq.ParquetFile) -> int:
    """Rows to read at once, so that a batch stays near `_BATCH_BYTES` (one row where a single one is longer)."""
    metadata = file.metadata
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    return int(min(1024, max(1, _BATCH_BYTES // max(1.0, row_bytes))))


# --- a document from a parsed value -----------------------------------------------------------------


def document(text: Any, given_id: Any, default_id: str, number: int) -> Document | Fault:
    """A document of a parsed text and id, both unchecked; `number` is its line or row."""
    if given_id is None:
        document_id = default_id
    elif isinstance(given_id, str) and given_id:
        document_id = given_id
    elif isinstance(given_id, int) and not isinstance(given_id, bool):
        document_id = str(given_id)
    else:
        return Fault("bad_id", f"`id` is {given_id!r:.80}, needs a string or a whole number", number)
    try:
        document_id.encode()
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        return Fault("not_utf8", f"half of a surrogate pair at character {error.start}", number)
    if not isinstance(text, str | bytes):
        return Fault("no_text", f"`text` is {type(text).__name__}, not a string", number, document_id)
    return Document(document_id, number, _slices(text))


def _slices(text: str | bytes) -> Iterator[bytes]:
    for start in range(0, len(text), CHUNK_BYTES):
        part = text[start : start + CHUNK_BYTES]
        yield part.encode() if isinstance(part, str) else part
