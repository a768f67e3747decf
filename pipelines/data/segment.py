"""From files to a segment file: read, tokenise, cut, write. One work unit makes one Parquet file.

A document is tokenised completely before any of it is written, because a fault at its end means that none
of it may stay. Its tokens wait in memory, or in a temporary file when they are many; so memory is bounded
by pieces of the text, not by the document.
"""

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, NamedTuple

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


# Tokenises batches, wherever it does so: gives each, in order, with the tokens of its pieces.
EncodeBatches = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Sequence[Encoded]]]]


def write_unit(unit: Unit, encode_batches: EncodeBatches | None = None) -> UnitResult:
    """Writes the unit's segment file, or none where nothing became a document; OSError where it cannot write.

    The result does not depend on `encode_batches`; without one all happens here.
    """
    tokenizer = tokenizer_of(unit)
    encode_batches = encode_batches or functools.partial(_encode_here, tokenizer)
    with contextlib.ExitStack() as stack:
        part = _Part(unit, tokenizer, stack)
        for batch, encoded in encode_batches(batches(tokenizer, unit.files)):
            part.add(batch, encoded)
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


class _Part:
    """A segment file in the making; the file is begun with the first document."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self.result = UnitResult(unit.number, [], [], [])
        self._unit = unit
        self._tokenizer = tokenizer
        self._stack = stack
        self._writer: PartWriter | None = None
        self._taken: set[str] = set()
        self._document: _Document | None = None

    def add(self, batch: Batch, encoded: Sequence[Encoded]) -> None:
        """The next events of reading, with the tokens of the pieces among them."""
        tokens = iter(encoded)
        for event in batch:
            if isinstance(event, Piece):
                assert self._document is not None
                self._document.add(event, next(tokens))
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

    def _end(self, ended: Ended) -> None:
        """Writes the document whole, or nothing of it."""
        document = self._document
        assert document is not None
        document.end()
        document_id, line = document.begun.document_id, document.begun.line
        if not ended.num_bytes:
            document.fail(Fault("empty", "the document is empty", line, document_id))
        if document.fault is not None:
            self._fail(document.begun.source, document.fault)
            return
        writer = self._open()
        row_offset = writer.num_rows
        for number, tokens in enumerate(cut(document.tokens(), self._unit.segment_len)):
            writer.add(document_id, number, tokens)
        self._close()
        self._taken.add(document_id)
        self.result.documents.append(
            DocumentEntry(
                document_id=document_id,
                source=document.begun.source,
                num_bytes=ended.num_bytes,
                num_tokens=document.num_tokens,
                num_segments=writer.num_rows - row_offset,
                file=part_name(self._unit.number),
                row_offset=row_offset,
                sha256=ended.sha256,
            )
        )

    def _fail(self, source: str, fault: Fault) -> None:
        """Reports a fault, or the one that the document had before."""
        if self._document is not None:
            fault = self._document.fault or fault
            self._close()
        self.result.errors.append(ErrorEntry(source, fault.document_id, fault.line, fault.kind, fault.reason))

    def _close(self) -> None:
        assert self._document is not None
        self._document.close()
        self._document = None

    def _open(self) -> PartWriter:
        if self._writer is None:
            uri = storage.join(self._unit.output, part_name(self._unit.number))
            path = self._stack.enter_context(storage.writing(uri))
            self._writer = self._stack.enter_context(PartWriter(path))
        return self._writer


class _Document:
    """A document that is being tokenised: its tokens so far, or the fault that was found in it."""

    def __init__(self, begun: Begun, tokenizer: Tokenizer) -> None:
        self.begun = begun
        self.fault: Fault | None = None
        self.num_tokens = 0
        self._joining = Joining(tokenizer)
        self._spool: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115  # see close

    def fail(self, fault: Fault) -> None:
        """The first fault stands."""
        self.fault = self.fault or fault

    def add(self, piece: Piece, encoded: Encoded) -> None:
        self._store(lambda: self._joining.add(piece, encoded))

    def end(self) -> None:
        self._store(self._joining.end)

    def _store(self, settle: Callable[[], np.ndarray | None]) -> None:
        if self.fault is not None:
            return
        try:
            ids = settle()
        except LossyTextError as error:
            self.fail(Fault("lossy", str(error), self.begun.line, self.begun.document_id))
            return
        if ids is not None:
            self._spool.write(ids.tobytes())
            self.num_tokens += len(ids)

    def tokens(self) -> Iterator[np.ndarray]:
        """All of them, (T,) int32 a part."""
        self._spool.seek(0)
        while data := self._spool.read(4 * _READ_TOKENS):
            yield np.frombuffer(data, dtype=np.int32)

    def close(self) -> None:
        self._spool.close()


def duplicate(document_id: str, line: int | None) -> Fault:
    """The fault of a document whose id an earlier one has."""
    return Fault("duplicate_id", "an earlier document has this id; the first is kept", line, document_id)


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
