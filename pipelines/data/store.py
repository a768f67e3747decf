"""The segment store: tokenised documents, cut into segments, as Parquet files beside a manifest.

    segments-00000.parquet ...   document_id, segment, tokens; a document whole and in order in one file
    manifest.parquet             one row a document, in input order
    errors.jsonl                 one line for everything that did not become a document
    tokenizer.json, tokenizer_config.json
    inputs.json                  the files read: size, time and hash
    store.json                   settings, counts and fingerprints; written last: without it there is no store

A file of numbers k is missing where nothing of its input became a document. Row groups hold at most about
`ROW_GROUP_TOKENS` tokens, so that reading a few segments costs little however long the document is. Those read last
are kept, so that many who read one file by turns read each of them once. Pages carry checksums, which are verified when
they are read.
"""

import contextlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import InputError, fingerprint
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.stores.faults import shown
from pipelines.stores.transfer import beside

FORMAT = 1
STORE, PARTIAL, MANIFEST, ERRORS, INPUTS = (
    "store.json",
    "store.partial.json",
    "manifest.parquet",
    "errors.jsonl",
    "inputs.json",
)
ROW_GROUP_TOKENS = 2**18  # 1 MiB of int32
_IDENTITY = (  # what a store is, wherever it lies
    "format",
    "segment_len",
    "tokenizer_fingerprint",
    "input_fingerprint",
    "num_documents",
    "num_segments",
    "num_tokens",
)
_ROW_GROUP_ROWS = 2**14  # also bounded where segments are very short
_OPEN_FILES = 64
_KEPT_BYTES = 2**27  # of a store's row groups, in memory: about 128
_REMEDY = "copy the store again, or delete it and prepare it again"

SEGMENTS_SCHEMA = pa.schema([("document_id", pa.string()), ("segment", pa.int32()), ("tokens", pa.list_(pa.int32()))])
MANIFEST_SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("source", pa.string()),
        ("num_bytes", pa.int64()),
        ("num_tokens", pa.int64()),
        ("num_segments", pa.int64()),
        ("file", pa.string()),
        ("row_offset", pa.int64()),
        ("sha256", pa.string()),
    ]
)


class DocumentEntry(NamedTuple):
    """A document's row of the manifest."""

    document_id: str
    source: str  # URI of the file that it was read from
    num_bytes: int  # of its UTF-8 text
    num_tokens: int
    num_segments: int
    file: str  # name of the segment file that holds it
    row_offset: int  # the row of its first segment in that file
    sha256: str  # of its UTF-8 text, 64 hex digits

    @property
    def rows(self) -> range:
        """Its segments in the file."""
        return range(self.row_offset, self.row_offset + self.num_segments)


class ErrorEntry(NamedTuple):
    """Something that did not become a document: a line of errors.jsonl."""

    source: str  # URI of the file
    document_id: str | None  # None where reading did not come so far
    line: int | None  # line of a JSONL file or row of a Parquet file, from 1; None for whole files
    kind: str  # a word to count by: empty, not_utf8, not_json, no_text, bad_id, duplicate_id, unreadable, lossy
    reason: str


def part_name(number: int) -> str:
    """The segment file that work unit `number` writes."""
    return f"segments-{number:05d}.parquet"


# --- writing ----------------------------------------------------------------------------------------


class PartWriter:
    """Writes segments to one Parquet file in row groups of bounded size; closes with `with`."""

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self._writer = pq.ParquetWriter(
            path, SEGMENTS_SCHEMA, compression="zstd", compression_level=1, write_page_checksum=True
        )
        self._ids: list[str] = []
        self._numbers: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._num_tokens = 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes the rest; again, it does nothing."""
        self._flush()
        self._writer.close()

    def add(self, document_id: str, segment: int, tokens: np.ndarray) -> None:
        """`tokens`: (T,) int32."""
        self._ids.append(document_id)
        self._numbers.append(segment)
        self._tokens.append(tokens)
        self._num_tokens += len(tokens)
        self.num_rows += 1
        if self._num_tokens >= ROW_GROUP_TOKENS or len(self._ids) >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._ids:
            return
        offsets = np.zeros(len(self._tokens) + 1, dtype=np.int32)
        np.cumsum([len(tokens) for tokens in self._tokens], out=offsets[1:])
        tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._tokens), pa.int32()))
        columns = [pa.array(self._ids, pa.string()), pa.array(self._numbers, pa.int32()), tokens]
        self._writer.write_table(pa.table(columns, schema=SEGMENTS_SCHEMA))
        self._ids, self._numbers, self._tokens, self._num_tokens = [], [], [], 0


def without_documents(uri: str, documents: Sequence[DocumentEntry], drop: set[str]) -> list[DocumentEntry]:
    """Rewrites a segment file without the documents in `drop`; its entries, moved to their new rows.

    `documents` are all that the file holds, in order. A file that becomes empty is deleted.
    """
    kept = [document for document in documents if document.document_id not in drop]
    if not kept:
        storage.delete(uri)
        return []
    dropped = [document.rows for document in documents if document.document_id in drop]
    with storage.local_file(uri) as old, storage.writing(uri) as new:
        _copy_without(old, new, dropped)
    return moved_up(kept)


def drop_rows(path: Path, name: str, drop: Iterable[range]) -> None:
    """Takes rows out of a segment file that is to have the name: it becomes the bytes of one that never had them."""
    new = beside(path.with_name(name), "tmp")
    try:
        _copy_without(path, new, drop)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _copy_without(old: Path, new: Path, drop: Iterable[range]) -> None:
    file = pq.ParquetFile(old, page_checksum_verification=True)
    is_kept = np.ones(file.metadata.num_rows, dtype=bool)
    for rows in drop:
        is_kept[rows.start : rows.stop] = False
    with PartWriter(new) as writer:
        for row, (document_id, number, tokens) in enumerate(_rows(file)):
            if is_kept[row]:
                writer.add(document_id, number, tokens)


def moved_up(documents: Sequence[DocumentEntry]) -> list[DocumentEntry]:
    """The entries of all the documents that a segment file holds, in order, with rows from its first on."""
    starts = np.cumsum([0, *(document.num_segments for document in documents)]).tolist()
    return [document._replace(row_offset=start) for document, start in zip(documents, starts[:-1], strict=True)]


def _rows(file: pq.ParquetFile) -> Iterator[tuple[str, int, np.ndarray]]:
    for group in range(file.num_row_groups):
        table = file.read_row_group(group).combine_chunks()
        tokens, offsets = _flat(table)
        ids, numbers = table["document_id"].to_pylist(), table["segment"].to_pylist()
        for row, (document_id, number) in enumerate(zip(ids, numbers, strict=True)):
            yield document_id, number, tokens[offsets[row] : offsets[row + 1]]


def write_manifest(uri: str, documents: Sequence[DocumentEntry]) -> None:
    columns = list(zip(*documents, strict=True)) or [()] * len(MANIFEST_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, MANIFEST_SCHEMA, strict=True)]
    with storage.writing(storage.join(uri, MANIFEST)) as path:
        table = pa.table(arrays, schema=MANIFEST_SCHEMA)
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def write_errors(uri: str, errors: Iterable[ErrorEntry]) -> None:
    with storage.writing(storage.join(uri, ERRORS)) as path, path.open("w", encoding="utf-8") as file:
        for error in errors:
            file.write(json.dumps(error._asdict()) + "\n")


# --- reading ----------------------------------------------------------------------------------------


def read_store_json(uri: str) -> dict[str, Any] | None:
    """The content of store.json; None where there is no finished store. InputError where it is not one."""
    file = storage.join(uri, STORE)
    if not storage.exists(file):
        return None
    try:
        content = storage.read_json(file)
        number = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a segment store's: {error}") from error
    if number != FORMAT:
        raise InputError(f"{uri} is a store of format {number}, this program reads {FORMAT}; prepare it again")
    check_keys(uri, content, _IDENTITY)
    return content


def check_keys(uri: str, content: Mapping[str, Any], keys: Iterable[str]) -> None:
    """InputError where store.json does not say all of this."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise InputError(f"{storage.join(uri, STORE)} is damaged: it does not say {', '.join(missing)}; {_REMEDY}")


def unusable(file: str, error: Exception) -> str:
    """What is wrong with a store's file that cannot be read, and what to do about it."""
    if isinstance(error, FileNotFoundError):
        return f"{file} is missing; {_REMEDY}"
    return f"{file} is damaged ({shown(error)}); {_REMEDY}"


def _read_manifest(uri: str) -> list[DocumentEntry]:
    """InputError where it is not there, or not as it was written."""
    file = storage.join(uri, MANIFEST)
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(file)), page_checksum_verification=True)
        columns = [table[name].to_pylist() for name in DocumentEntry._fields]
    except storage.StorageError:
        raise
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(unusable(file, error)) from error
    return [DocumentEntry(*row) for row in zip(*columns, strict=True)]


def _check_parts(uri: str, documents: Iterable[DocumentEntry]) -> None:
    """InputError where segment files of the manifest are not there."""
    sizes = storage.list_sizes(uri)
    missing = [name for name in dict.fromkeys(document.file for document in documents) if not sizes.get(name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{uri} is incomplete: {missing[0]}{more} should be there, and not empty; {_REMEDY}")


class SegmentStore:
    """A finished store, read segment by segment. Use one object from one thread.

    InputError where there is none, or a file of it is missing.
    """

    shares = ()  # one store: every document as often as any other

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        content = read_store_json(self.uri)
        if content is None:
            raise InputError(f"{uri} is not a finished segment store (no {STORE}); make it with prepare")
        self.settings: Mapping[str, Any] = content
        self.segment_len: int = content["segment_len"]
        self.tokenizer_fingerprint: str = content["tokenizer_fingerprint"]
        self.fingerprint: str = fingerprint({key: content[key] for key in _IDENTITY})
        self.manifest = _read_manifest(self.uri)
        _check_parts(self.uri, self.manifest)
        self._parts: OrderedDict[str, _Part] = OrderedDict()
        self._groups = _Groups()

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was made with; InputError where another one lies there."""
        tokenizer = load_tokenizer(self.uri)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise InputError(
                f"{self.uri} was made with tokenizer {self.tokenizer_fingerprint[:16]} but holds "
                f"{tokenizer.fingerprint[:16]}; prepare it again"
            )
        return tokenizer

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray:
        """The tokens of segments start .. stop-1 of a document, joined: (T,) int32, a copy.

        All of these segments must exist (IndexError); DamagedError where their file is not as it was written. Reads
        the row groups that hold them, unless they are among the `_KEPT_BYTES` that were read last.
        """
        if not 0 <= start <= stop <= document.num_segments:
            raise IndexError(f"segments {start}..{stop} of {document.document_id!r}, which has {document.num_segments}")
        part = self._parts.pop(document.file, None)
        if part is None:
            part = _Part(storage.join(self.uri, document.file), self._groups)
        self._parts[document.file] = part
        if len(self._parts) > _OPEN_FILES:
            self._parts.popitem(last=False)[1].close()
        return part.rows(document.row_offset + start, document.row_offset + stop)


class _Group(NamedTuple):
    """A row group in memory."""

    tokens: np.ndarray  # (T,) int32, of all its rows
    offsets: np.ndarray  # (rows + 1,) int32, where each row begins and the last one ends

    @property
    def num_bytes(self) -> int:
        return self.tokens.nbytes + self.offsets.nbytes


class _Groups:
    """The row groups of a store's files that were asked for last, `_KEPT_BYTES` of them; always one."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[str, int], _Group] = OrderedDict()

    def get(self, uri: str, number: int, read: Callable[[int], _Group]) -> _Group:
        """A file's row group, read where it is not kept."""
        found = self._kept.pop((uri, number), None)
        if found is None:
            found = read(number)
            self.num_bytes += found.num_bytes
        self._kept[uri, number] = found
        while self.num_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return found


class _Part:
    """An open segment file."""

    def __init__(self, uri: str, groups: _Groups) -> None:
        self._uri = uri
        self._groups = groups
        files, path = storage.filesystem(uri)
        with _damage(uri):
            self._source = files.open_input_file(path)
            self._file = pq.ParquetFile(self._source, page_checksum_verification=True)
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def close(self) -> None:
        self._file.close()
        self._source.close()

    def rows(self, start: int, stop: int) -> np.ndarray:
        if stop > self._starts[-1]:
            raise storage.DamagedError(
                f"{self._uri} is of another store: it holds {self._starts[-1]} segments, not {stop} or more; {_REMEDY}"
            )
        pieces = []
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            group = self._groups.get(self._uri, number, self._read)
            first = int(self._starts[number])
            end = min(stop, int(self._starts[number + 1]))
            pieces.append(group.tokens[group.offsets[start - first] : group.offsets[end - first]])
            start = end
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)

    def _read(self, number: int) -> _Group:
        with _damage(self._uri):
            return _Group(*_flat(self._file.read_row_group(number, columns=["tokens"]).combine_chunks()))


@contextlib.contextmanager
def _damage(uri: str) -> Iterator[None]:
    """Turns what keeps a segment file from being read into a DamagedError that names it; a store's fault stays one."""
    try:
        yield
    except storage.StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise storage.DamagedError(unusable(uri, error)) from error


def _flat(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(all tokens joined, int32; where each row begins and the last one ends)."""
    tokens = table["tokens"].combine_chunks()
    tokens = tokens.chunk(0) if isinstance(tokens, pa.ChunkedArray) else tokens
    offsets = tokens.offsets.to_numpy()
    return tokens.values.to_numpy(zero_copy_only=False), offsets
