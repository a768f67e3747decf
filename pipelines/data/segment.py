"""From files to a segment file: read, tokenise, cut, write. One work unit makes one Parquet file.

A fault at a document's end means that none of it may stay. So its tokens wait in memory until it is whole; those of a
long one are written meanwhile, and where it turns out to be faulty the file is made anew without them. Memory is
bounded by pieces of the text, not by the document.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines import storage
from pipelines.data import store
from pipelines.data.batches import Batch, Begun, Closed, Ended, Failed, batches, pieces_of
from pipelines.data.inputs import InputFile
from pipelines.data.pieces import Encoded, Joining, LossyTextError, Piece, encode
from pipelines.data.read import Fault
from pipelines.data.store import DocumentEntry, ErrorEntry, PartWriter, part_name
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.storage import FileEntry

_HELD_TOKENS = 2**21  # of one document, in memory


class Unit(NamedTuple):
    """Files that become one segment file."""

    number: int
    files: list[FileEntry]
    output: str  # URI of the store, which already holds the tokenizer
    segment_len: int  # tokens
    tokenizer_fingerprint: str
    callings: dict[str, str] | None = None  # URI -> what gives its documents' ids, where that is not the file's name


class UnitResult(NamedTuple):
    """What became of a unit, in input order."""

    number: int
    documents: list[DocumentEntry]
    errors: list[ErrorEntry]
    inputs: list[InputFile]


# Tokenises batches, wherever it does so: gives each, in order, with the tokens of its pieces.
EncodeBatches = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Sequence[Encoded]]]]


def write_unit(unit: Unit, encode_batches: EncodeBatches | None = None) -> UnitResult:
    """Writes the unit's segment file, or none where nothing became a document; OSError where it cannot write.

    The result does not depend on `encode_batches`; without one all happens here.
    """
    tokenizer = tokenizer_of(unit)
    encode_batches = encode_batches or functools.partial(_encode_here, tokenizer)
    with contextlib.suppress(_NoDocumentError), contextlib.ExitStack() as stack:
        part = _Part(unit, tokenizer, stack)
        for batch, encoded in encode_batches(batches(tokenizer, unit.files, unit.callings)):
            part.add(batch, encoded)
        part.close()
    return part.result


def _encode_here(tokenizer: Tokenizer, found: Iterable[Batch]) -> Iterator[tuple[Batch, Sequence[Encoded]]]:
    for batch in found:
        yield batch, encode(tokenizer, pieces_of(batch))


def tokenizer_of(unit: Unit) -> Tokenizer:
    """The tokenizer in the unit's store; RuntimeError where it is not the one that the preparation began with."""
    return _tokenizer(unit.output, unit.tokenizer_fingerprint)


@functools.lru_cache(maxsize=2)
def _tokenizer(uri: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(uri)
    if tokenizer.fingerprint != fingerprint:
        raise RuntimeError(f"the tokenizer in {uri} is not the one that this preparation began with")
    return tokenizer


class _NoDocumentError(Exception):
    """What was written for a unit is all of documents that turned out to be none: no file may appear."""


class _Part:
    """A segment file in the making; the file is begun with the first document."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self.result = UnitResult(unit.number, [], [], [])
        self._unit = unit
        self._tokenizer = tokenizer
        self._stack = stack
        self._path: Path | None = None
        self._writer: PartWriter | None = None
        self._faulty: list[range] = []  # rows of documents that turned out to be none
        self._taken: set[str] = set()
        self._document: _Document | None = None

    def add(self, batch: Batch, encoded: Sequence[Encoded]) -> None:
        """The next events of reading, with the tokens of the pieces among them."""
        tokens = iter(encoded)
        for event in batch:
            if isinstance(event, Piece):
                assert self._document is not None
                self._document.add(event, next(tokens))
                if self._document.num_held >= _HELD_TOKENS:
                    self._write(self._document, whole=False)
            elif isinstance(event, Begun):
                self._document = _Document(event, self._tokenizer)
                if event.document_id in self._taken:
                    self._document.fail(duplicate(event.document_id, event.line))
            elif isinstance(event, Ended):
                self._end(event)
            elif isinstance(event, Failed):
                self._fail(event.source, event.fault)
            elif isinstance(event, Closed):
                self.result.inputs.append(event.file)

    def close(self) -> None:
        """The file as it is to be; _NoDocumentError where it would hold nothing."""
        if self._writer is None:
            return
        if not self.result.documents:
            raise _NoDocumentError
        if not self._faulty:
            return
        assert self._path is not None
        self._writer.close()
        store.drop_rows(self._path, part_name(self._unit.number), self._faulty)
        self.result.documents[:] = store.moved_up(self.result.documents)

    def _write(self, document: "_Document", *, whole: bool) -> None:
        """Writes what there is of a document in full segments, and the last one where it is `whole`."""
        if document.fault is None:
            document.write(self._open(), self._unit.segment_len, whole=whole)

    def _end(self, ended: Ended) -> None:
        """The document becomes one of the store's, or a fault."""
        document = self._document
        assert document is not None
        document.end()
        document_id, line = document.begun.document_id, document.begun.line
        if not ended.num_bytes:
            document.fail(Fault("empty", "the document is empty", line, document_id))
        if document.fault is not None:
            self._fail(document.begun.source, document.fault)
            return
        self._write(document, whole=True)
        self._document = None
        self._taken.add(document_id)
        self.result.documents.append(
            DocumentEntry(
                document_id=document_id,
                source=document.begun.source,
                num_bytes=ended.num_bytes,
                num_tokens=document.num_tokens,
                num_segments=len(document.rows),
                file=part_name(self._unit.number),
                row_offset=document.rows.start,
                sha256=ended.sha256,
            )
        )

    def _fail(self, source: str, fault: Fault) -> None:
        """Reports a fault, or the one that the document had before."""
        if self._document is not None:
            fault = self._document.fault or fault
            if self._document.rows:
                self._faulty.append(self._document.rows)
            self._document = None
        self.result.errors.append(ErrorEntry(source, fault.document_id, fault.line, fault.kind, fault.reason))

    def _open(self) -> PartWriter:
        if self._writer is None:
            uri = storage.join(self._unit.output, part_name(self._unit.number))
            self._path = self._stack.enter_context(storage.writing(uri))
            self._writer = self._stack.enter_context(PartWriter(self._path))
        return self._writer


class _Document:
    """A document that is being tokenised: its tokens so far, or the fault that was found in it."""

    def __init__(self, begun: Begun, tokenizer: Tokenizer) -> None:
        self.begun = begun
        self.fault: Fault | None = None
        self.num_tokens = 0
        self.num_held = 0  # of them, that are not written
        self.rows = range(0)  # those that were written
        self._held: list[np.ndarray] = []
        self._joining = Joining(tokenizer)

    def fail(self, fault: Fault) -> None:
        """The first fault stands."""
        self.fault = self.fault or fault

    def add(self, piece: Piece, encoded: Encoded) -> None:
        self._hold(lambda: self._joining.add(piece, encoded))

    def end(self) -> None:
        self._hold(self._joining.end)

    def _hold(self, settle: Callable[[], np.ndarray | None]) -> None:
        if self.fault is not None:
            return
        try:
            ids = settle()
        except LossyTextError as error:
            self.fail(Fault("lossy", str(error), self.begun.line, self.begun.document_id))
            return
        if ids is not None:
            self._held.append(ids)
            self.num_held += len(ids)
            self.num_tokens += len(ids)

    def write(self, writer: PartWriter, segment_len: int, *, whole: bool) -> None:
        """Writes what is held in segments; all but the last are full, and where it is not `whole` that one waits."""
        begin = writer.num_rows - len(self.rows)
        tokens = np.concatenate(self._held)
        end = len(tokens) if whole else len(tokens) // segment_len * segment_len
        for start in range(0, end, segment_len):
            writer.add(
                self.begun.document_id, len(self.rows) + start // segment_len, tokens[start : start + segment_len]
            )
        self.rows = range(begin, writer.num_rows)
        self._held, self.num_held = [tokens[end:].copy()], len(tokens) - end


def duplicate(document_id: str, line: int | None) -> Fault:
    """The fault of a document whose id an earlier one has."""
    return Fault("duplicate_id", "an earlier document has this id; the first is kept", line, document_id)


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


def without_documents(output: str, result: UnitResult, ids: set[str]) -> UnitResult:
    """Takes documents out of a unit's segment file and reports them as duplicates."""
    late = [document for document in result.documents if document.document_id in ids]
    faults = [duplicate(document.document_id, None) for document in late]
    errors = [
        ErrorEntry(document.source, fault.document_id, fault.line, fault.kind, fault.reason)
        for document, fault in zip(late, faults, strict=True)
    ]
    part = storage.join(output, part_name(result.number))
    kept = store.without_documents(part, result.documents, ids)
    return result._replace(documents=kept, errors=result.errors + errors)
