"""What files hold, as events in reading order, in batches that are tokenised at once.

A batch is part of one long document, or many short documents: either way about as much text.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pipelines.data.inputs import InputFile
from pipelines.data.pieces import Encodes, Piece, cut
from pipelines.data.read import Document, Fault, Source, UnreadableError, read_documents
from pipelines.data.tokenise import decoded
from pipelines.storage import FileEntry

BATCH_CHARS = 2**20
_BATCH_EVENTS = 2**12  # also bounded where documents are very short


class Begun(NamedTuple):
    """A document begins; its pieces follow."""

    source: str  # URI of the file
    document_id: str
    line: int | None


class Ended(NamedTuple):
    """The document that was begun is complete."""

    num_bytes: int
    sha256: str  # of its UTF-8 text


class Failed(NamedTuple):
    """Something that is no document, or the end of one that turned out to be none."""

    source: str  # URI of the file
    fault: Fault


class Closed(NamedTuple):
    """A file has been read to its end."""

    file: InputFile


Event = Begun | Piece | Ended | Failed | Closed
Batch = list[Event]


def batches(
    tokenizer: Encodes, files: Iterable[FileEntry], callings: Mapping[str, str] | None = None
) -> Iterator[Batch]:
    """All events of the files, in order; each batch but the last of about `BATCH_CHARS` characters.

    `callings`: URI -> what a file gives its documents' ids, where that is not what its name says.
    """
    batch: Batch = []
    num_chars = 0
    for file in files:
        for event in _of_file(tokenizer, file, (callings or {}).get(file.uri)):
            batch.append(event)
            num_chars += len(event.text) if isinstance(event, Piece) else 0
            if num_chars >= BATCH_CHARS or len(batch) >= _BATCH_EVENTS:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


def pieces_of(batch: Sequence[Event]) -> list[Piece]:
    """What of a batch is to be tokenised."""
    return [event for event in batch if isinstance(event, Piece)]


def _of_file(tokenizer: Encodes, file: FileEntry, called: str | None) -> Iterator[Event]:
    line = document_id = source = None
    try:
        source = Source(file.uri)
        for found in read_documents(file.uri, file.name, source, called):
            line, document_id = found.line, found.document_id
            if isinstance(found, Fault):
                yield Failed(file.uri, found)
            else:
                yield from _of_document(tokenizer, file.uri, found)
            document_id = None
    except UnreadableError as error:
        where = f" (after line or row {line})" if line is not None and document_id is None else ""
        yield Failed(file.uri, Fault("unreadable", f"{error}{where}", None, document_id))
    yield Closed(InputFile(*file, None if source is None else source.sha256()))


def _of_document(tokenizer: Encodes, source: str, document: Document) -> Iterator[Event]:
    document_id, line, chunks = document
    digest, num_bytes = hashlib.sha256(), 0

    def measured() -> Iterator[bytes]:
        nonlocal num_bytes
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            yield chunk

    yield Begun(source, document_id, line)
    try:
        yield from cut(tokenizer, decoded(measured()))
    except UnicodeDecodeError as error:
        yield Failed(source, Fault("not_utf8", error.reason, line, document_id))
        return
    yield Ended(num_bytes, digest.hexdigest())
