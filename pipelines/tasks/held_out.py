"""Text that the model has not been trained on: the embedded book, a text file, or a segment store."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines import storage
from pipelines.config import InputError
from pipelines.data.store import STORE, SegmentStore
from pipelines.data.tokenise import Tokenizer

BOOK = Path(__file__).resolve().parents[1] / "books" / "heldout" / "persuasion.txt"

_BLOCK = 2**16  # tokens read at once


class HeldOut(Protocol):
    """Tokenised documents. Survives pickling, so that Ray's workers get it from the driver."""

    name: str  # what people call it
    fingerprint: str  # equal for equal text
    num_tokens: list[int]  # of each document

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop-1 of a document, (N,) int32."""


class TextHeldOut:
    """One document in memory."""

    def __init__(self, name: str, fingerprint: str, tokens: np.ndarray) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.tokens = tokens  # (N,) int32
        self.num_tokens = [len(tokens)]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


class StoreHeldOut:
    """The documents of a segment store, read where they lie."""

    def __init__(self, uri: str) -> None:
        self._store = SegmentStore(uri)
        self.name = self._store.uri.rpartition("/")[2]
        self.fingerprint = self._store.fingerprint
        self.num_tokens = [document.num_tokens for document in self._store.manifest]

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreHeldOut, (self._store.uri,)  # open files stay behind

    @property
    def tokenizer_fingerprint(self) -> str:
        return self._store.tokenizer_fingerprint

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        size = self._store.segment_len
        first = start // size
        tokens = self._store.read(self._store.manifest[document], first, -(-stop // size))
        return tokens[start - first * size : stop - first * size]


def blocks(held_out: HeldOut, document: int, start: int, stop: int) -> Iterator[np.ndarray]:
    """Tokens start .. stop-1 of a document, read a few at a time: (n,) int32 each."""
    for at in range(start, stop, _BLOCK):
        yield held_out.read(document, at, min(at + _BLOCK, stop))


def open_held_out(data: str | None, tokenizer: Tokenizer) -> HeldOut:
    """The documents of a store or a UTF-8 text file; without `data`, the embedded book.

    Raises InputError where they cannot be read, are empty or were tokenised otherwise.
    """
    uri = storage.absolute(data) if data is not None else str(BOOK)
    if storage.is_directory(uri):
        return _open_store(uri, tokenizer)
    if not storage.exists(uri):
        raise InputError(f"--data {data}: there is no such file or directory")
    try:
        content = storage.read_bytes(uri)
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data {data}: not UTF-8 text at byte {error.start}; give a text file or a segment store"
        ) from error
    except OSError as error:
        raise InputError(f"--data {data} cannot be read: {error}") from error
    tokens = tokenizer.encode(text)
    if not len(tokens):
        raise InputError(f"--data {data}: the file is empty")
    return TextHeldOut(uri.rpartition("/")[2], hashlib.sha256(content).hexdigest(), tokens)


def _open_store(uri: str, tokenizer: Tokenizer) -> HeldOut:
    if not storage.exists(storage.join(uri, STORE)):
        raise InputError(
            f"--data {uri}: a directory without {STORE}; give a segment store made by prepare, or a text file"
        )
    held_out = StoreHeldOut(uri)
    if held_out.tokenizer_fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"--data {uri}: tokenised with {held_out.tokenizer_fingerprint[:16]}, the model's tokenizer is "
            f"{tokenizer.fingerprint[:16]}; prepare the text with the model's tokenizer"
        )
    if not held_out.num_tokens:
        raise InputError(f"--data {uri}: the store holds no documents")
    return held_out
