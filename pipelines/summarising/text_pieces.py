"""A text cut into pieces that fit a model: together they are the text, none longer than it may be."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from pipelines.data.tokenise import decoded

_CHARS_A_TOKEN = 8  # more than most texts have: one look at so many characters usually does
_KEPT_FRACTION = 0.75  # of a piece, at least, when it is cut where a paragraph or a sentence ends
_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"[.!?][\"'”’)\]]*\s+"), re.compile(r"\s+"))  # the best first


class Encoder(Protocol):
    """Text to token ids, none of which has a special meaning."""

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, the character at which each begins)."""


class Piece(NamedTuple):
    text: str
    ids: list[int]


class Pieces:
    """Takes pieces off a text that comes in chunks of UTF-8; holds little more than one piece of it."""

    def __init__(self, encoder: Encoder, chunks: Iterable[bytes]) -> None:
        self._encoder = encoder
        self._texts: Iterator[str] = decoded(chunks)
        self._buffer = ""
        self._ended = False

    def take(self, most: int) -> Piece | None:
        """The next piece, of up to `most` tokens; None at the end. Raises what the chunks raise."""
        wanted = most * _CHARS_A_TOKEN
        while True:
            self._fill(wanted + 1)
            ids, starts = self._encoder.encode(self._buffer[:wanted])
            if len(ids) > most:
                return self._cut(starts[most], most)
            if self._ended and len(self._buffer) <= wanted:
                text, self._buffer = self._buffer, ""
                return Piece(text, ids) if text else None
            wanted *= 2

    @property
    def ended(self) -> bool:
        """Whether nothing is left. Raises what the chunks raise."""
        self._fill(1)
        return not self._buffer

    def _fill(self, wanted: int) -> None:
        parts, have = [self._buffer], len(self._buffer)
        while have < wanted and not self._ended:
            part = next(self._texts, None)
            if part is None:
                self._ended = True
            else:
                parts.append(part)
                have += len(part)
        self._buffer = "".join(parts)

    def _cut(self, end: int, most: int) -> Piece:
        """A piece that ends before the character `end`, or earlier where that would be too long by itself."""
        end = self._good_end(end)
        while len(ids := self._encoder.encode(self._buffer[:end])[0]) > most and end > 1:
            end = max(1, end - (len(ids) - most))
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return Piece(text, ids)

    def _good_end(self, end: int) -> int:
        for pattern in _ENDS:
            ends = [match.end() for match in pattern.finditer(self._buffer, int(end * _KEPT_FRACTION), end)]
            if ends:
                return ends[-1]
        return max(1, end)
