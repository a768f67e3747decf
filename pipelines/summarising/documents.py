"""Documents to summarise and what becomes of them: what all strategies share."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import rmt_core


class Keeper(Protocol):
    """Where one document's progress is kept between processes."""

    every: int  # segments between two states

    def load(self) -> bytes | None:
        """What was kept last; None where nothing (whole) is there."""

    def keep(self, data: bytes) -> None:
        """Replaces what was kept before."""


@dataclass(frozen=True)
class Style:
    """How a summary is written."""

    max_new_tokens: int
    sampling: rmt_core.Sampling
    seed: int  # a document's own seed is made of this and its id


class Text(NamedTuple):
    """A document as text."""

    doc_id: str
    chunks: Iterable[bytes]  # UTF-8, not yet checked, cut anywhere; made while they are read, may raise
    style: Style
    keeper: Keeper | None = None


@dataclass(frozen=True)
class Summary:
    """What was written about a document, or why nothing was."""

    doc_id: str
    text: str  # empty where `error` is not
    num_tokens: int  # of the document; of one that failed, those read before
    num_segments: int  # that these fill, the last one perhaps in part
    num_written: int  # tokens of the text
    error: str = ""  # the reason; empty where all went well
    finish_reason: str | None = None  # "stop" or "length"; None where nothing was written
    elapsed_s: float = field(default=0.0, compare=False)  # from the document's opening, beside others


class DocumentError(ValueError):
    """A document that cannot be read; the message is the reason, as people are to see it."""


class Strategy(Protocol):
    """A way to summarise documents, with its model."""

    num_rows: int  # documents that it reads side by side

    def summarise(self, documents: Iterable[Text]) -> Iterator[Summary]:
        """One summary a document, in the documents' order."""


def document_seed(seed: int, doc_id: str) -> int:
    """A document's own seed, 63 bits: the same wherever and beside whatever it is read."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{doc_id}".encode()).digest()[:8], "big") >> 1


def describe(error: Exception) -> str:
    """The reason in one line."""
    if isinstance(error, UnicodeDecodeError):
        return error.reason
    text = " ".join(str(error).split())
    return text if isinstance(error, DocumentError) else f"{type(error).__name__}: {text}".rstrip(": ")
