"""From files to a segment file: read, tokenise, cut, write. One work unit makes one Parquet file.

A document is tokenised completely before any of it is written, because a fault at its end means that none
of it may stay. Its tokens wait in memory, or in a temporary file when they are many; so memory is bounded
by pieces of the text, not by the document.
"""

import contextlib
import functools
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from pipelines import storage
from pipelines.data.inputs import InputFile
from pipelines.data.read import Document, Fault, Source, UnreadableError, read_documents
from pipelines.data.store import DocumentEntry, ErrorEntry, PartWriter, part_name
from pipelines.data.tokenise import LossyTextError, Tokenizer, encode_chunks, load_tokenizer
from pipelines.storage import FileEntry

_SPOOL_BYTES = 2**24  # tokens of one document that are kept in memory: 4M tokens
_READ_TOKENS = 2**18


class Unit(NamedTuple):
    """Files that become one segment file."""

    number: int
    files: list[FileEntry]
    output: str  # URI of the store, which already holds the tokenizer
    segment_len: int  # tokens
    tokenizer_fingerprint: str


class UnitResult(NamedTuple):
    """What became of a unit, in input order."""

    number: int
    documents: list[DocumentEntry]
    errors: list[ErrorEntry]
    inputs: list[InputFile]


def write_unit(unit: Unit) -> UnitResult:
    """Writes the unit's segment file, or none where nothing became a document; OSError where it cannot write."""
    tokenizer = _tokenizer(unit.output, unit.tokenizer_fingerprint)
    result = UnitResult(unit.number, [], [], [])
    with contextlib.ExitStack() as stack:
        part = _Part(unit, tokenizer, stack)
        for file in unit.files:
            for found in part.add_file(file):
                target: list[Any] = result.documents if isinstance(found, DocumentEntry) else result.errors
                target.append(found)
            result.inputs.append(InputFile(*file, part.sha256))
    return result


@functools.lru_cache(maxsize=2)
def _tokenizer(uri: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(uri)
    if tokenizer.fingerprint != fingerprint:
        raise RuntimeError(f"the tokenizer in {uri} is not the one that this preparation began with")
    return tokenizer


class _Part:
    """A segment file in the making; the file is begun with the first document."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self._unit = unit
        self._tokenizer = tokenizer
        self._stack = stack
        self._writer: PartWriter | None = None
        self._taken: set[str] = set()
        self.sha256: str | None = None  # of the last file that was added

    def add_file(self, file: FileEntry) -> Iterator[DocumentEntry | ErrorEntry]:
        line = document_id = source = None
        try:
            source = Source(file.uri)
            for found in read_documents(file.uri, file.name, source):
                line, document_id = found.line, found.document_id
                entry = self._add(file, found) if isinstance(found, Document) else found
                yield _error(file, entry) if isinstance(entry, Fault) else entry
                document_id = None
        except UnreadableError as error:
            where = f" (after line or row {line})" if line is not None and document_id is None else ""
            yield ErrorEntry(file.uri, document_id, None, "unreadable", f"{error}{where}")
        self.sha256 = None if source is None else source.sha256()

    def _add(self, file: FileEntry, document: Document) -> DocumentEntry | Fault:
        """Writes a document whole, or nothing of it."""
        document_id, line, chunks = document
        if document_id in self._taken:
            return duplicate(document_id, line)
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            try:
                size = _tokenise(self._tokenizer, chunks, spool)
            except UnicodeDecodeError as error:
                return Fault("not_utf8", error.reason, line, document_id)
            except LossyTextError as error:
                return Fault("lossy", str(error), line, document_id)
            if not size.num_bytes:
                return Fault("empty", "the document is empty", line, document_id)
            writer = self._open()
            row_offset = writer.num_rows
            for number, tokens in enumerate(cut(_stored(spool), self._unit.segment_len)):
                writer.add(document_id, number, tokens)
        self._taken.add(document_id)
        num_segments = writer.num_rows - row_offset
        file_name = part_name(self._unit.number)
        return DocumentEntry(
            document_id, file.uri, size.num_bytes, size.num_tokens, num_segments, file_name, row_offset, size.sha256
        )

    def _open(self) -> PartWriter:
        if self._writer is None:
            uri = storage.join(self._unit.output, part_name(self._unit.number))
            path = self._stack.enter_context(storage.writing(uri))
            self._writer = self._stack.enter_context(PartWriter(path))
        return self._writer


def _error(file: FileEntry, fault: Fault) -> ErrorEntry:
    return ErrorEntry(file.uri, fault.document_id, fault.line, fault.kind, fault.reason)


def duplicate(document_id: str, line: int | None) -> Fault:
    """The fault of a document whose id an earlier one has."""
    return Fault("duplicate_id", "an earlier document has this id; the first is kept", line, document_id)


class _Size(NamedTuple):
    num_bytes: int
    num_tokens: int
    sha256: str


def _tokenise(tokenizer: Tokenizer, chunks: Iterable[bytes], spool: IO[bytes]) -> _Size:
    """Writes the tokens of a text to `spool` as int32."""
    digest, num_bytes, num_tokens = hashlib.sha256(), 0, 0

    def measured() -> Iterator[bytes]:
        nonlocal num_bytes
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            yield chunk

    for ids in encode_chunks(tokenizer, measured()):
        spool.write(ids.tobytes())
        num_tokens += len(ids)
    return _Size(num_bytes, num_tokens, digest.hexdigest())


def _stored(spool: IO[bytes]) -> Iterator[np.ndarray]:
    spool.seek(0)
    while data := spool.read(4 * _READ_TOKENS):
        yield np.frombuffer(data, dtype=np.int32)


def cut(parts: Iterable[np.ndarray], segment_len: int) -> Iterator[np.ndarray]:
    """Token arrays, cut anywhere, as segments of exactly `segment_len`; the last may be shorter, never empty."""
    rest: list[np.ndarray] = []
    num_rest = 0
    for part in parts:
        begin = 0
        while num_rest + len(part) - begin >= segment_len:
            end = begin + segment_len - num_rest
            yield np.concatenate([*rest, part[begin:end]]) if rest else part[begin:end]
            begin, rest, num_rest = end, [], 0
        if begin < len(part):
            rest.append(part[begin:])
            num_rest += len(part) - begin
    if rest:
        yield np.concatenate(rest)


def later_duplicates(results: Iterable[UnitResult]) -> dict[int, set[str]]:
    """Unit number -> ids in it that an earlier unit has: the documents to take out again."""
    counts = Counter(document.document_id for result in results for document in result.documents)
    repeated = {document_id for document_id, count in counts.items() if count > 1}
    seen: set[str] = set()
    out: dict[int, set[str]] = {}
    for result in results:
        here = {document.document_id for document in result.documents} & repeated
        if here & seen:
            out[result.number] = here & seen
        seen |= here
    return out
