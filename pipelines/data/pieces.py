"""A long text in pieces whose tokens, joined, are those of the whole: cut, tokenised apart, put together again.

A cut is chosen where tokenising a window of the text as one and as two halves gives the same tokens. That is not yet
proof: what stands before the window could reach into it (runs of a pattern that a tokenizer merges in pairs, pieces of
fixed length). So when both pieces are tokenised, the tokens on both sides of the cut must be those of the window;
where they are not, the two pieces become one. For byte-pair encoding two neighbours that stay apart in one text stay
apart in every text, so that this settles it; so its texts may be cut within words too, where there is no other place
and the tokenizer does not count how far a word has come.

A piece is tokenised behind a few characters of what stands before it, whose tokens are taken off again: many
tokenizers mark the beginning of whatever they are given.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

PIECE_CHARS = 2**19  # text tokenised at once: the `tokenizers` library needs about 100 bytes a character
_WINDOW_CHARS = 512  # on each side of a cut
_CONTEXT_CHARS = 16
_SEARCH_CHARS = 2**14  # how far back from a piece's end a cut is looked for
_TRIES = 32
_JOINT_TOKENS = 8  # that must be the same on each side of a cut as in its window


class Encodes(Protocol):
    """The part of a tokenizer that is needed here."""

    cuts_texts: bool  # whether texts may be cut at all: not where tokens are counted off from a text's start

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def cuts_between(self, left: str, right: str) -> bool: ...  # characters of one kind, where their tokens allow it
    def difference(self, text: str, ids: np.ndarray, before: np.ndarray) -> "Difference | None": ...
    def remedy(self) -> str: ...


class Difference(NamedTuple):
    """Where the text that tokens give back begins to differ from the one that they were made of."""

    at: int  # character
    text: str  # a few characters from there on
    back: str


class Piece(NamedTuple):
    """Part of a document's text that can be tokenised apart."""

    text: str
    context: str = ""  # the characters before it; none at the beginning of a document
    first: tuple[int, ...] = ()  # the tokens that it must begin with
    last: tuple[int, ...] = ()  # and those that it must end with


class Encoded(NamedTuple):
    """A piece's tokens."""

    ids: np.ndarray  # (T,) int32
    fits_before: bool  # they begin as they must, so that the piece before is rightly a piece of its own
    fits_after: bool
    difference: Difference | None  # None where decoding gives the text back exactly


class LossyTextError(ValueError):
    """The tokenizer does not give this text back exactly."""

    def __init__(self, difference: Difference, remedy: str) -> None:
        super().__init__(
            f"the tokenizer does not give the text back exactly, from character {difference.at} on: "
            f"{difference.text!r} comes back as {difference.back!r}; {remedy}"
        )


def difference(text: str, back: str) -> Difference | None:
    """Where two texts begin to differ; None where they do not."""
    if text == back:
        return None
    same = (n for n, (x, y) in enumerate(zip(text, back, strict=False)) if x != y)
    at = next(same, min(len(text), len(back)))
    return Difference(at, text[at : at + 8], back[at : at + 8])


# --- cutting ----------------------------------------------------------------------------------------


def cut(tokenizer: Encodes, texts: Iterable[str]) -> Iterator[Piece]:
    """One text that comes in parts, as pieces of about `PIECE_CHARS`; no piece of an empty text.

    A piece grows where no place to cut is found near its wanted end: in runs of one letter, or in words without an
    end, or texts, that the tokenizer does not let be cut.
    """
    buffer, context, wanted = "", "", PIECE_CHARS
    first: tuple[int, ...] = ()
    for text in texts:
        buffer += text
        while tokenizer.cuts_texts and len(buffer) >= wanted + _WINDOW_CHARS:
            joint = _find_joint(tokenizer, buffer, wanted)
            if joint is None:
                wanted += PIECE_CHARS
                continue
            yield Piece(buffer[: joint.at], context, first, joint.last)
            context, first = joint.context, joint.first
            buffer, wanted = buffer[joint.at :], PIECE_CHARS
    if buffer:
        yield Piece(buffer, context, first)


class _Joint(NamedTuple):
    """A place to cut, and what the tokens around it are."""

    at: int
    context: str
    last: tuple[int, ...]  # tokens before it
    first: tuple[int, ...]  # tokens behind it


def _find_joint(tokenizer: Encodes, text: str, end: int) -> _Joint | None:
    """The last place to cut before `end`; None where none of those tried is one."""
    begin = max(1, end - _SEARCH_CHARS)
    tries = 0
    for wants_space in (True, False):  # before white space after a word, else between other kinds of characters
        for at in range(end, begin, -1):
            left, right = _kind(text[at - 1]), _kind(text[at])
            if left == right or left == " " or (right == " ") != wants_space:
                continue
            joint = _joint(tokenizer, text, at)
            if joint is not None:
                return joint
            tries += 1
            if tries % _TRIES == 0:
                break
    return _joint_in_word(tokenizer, text, end)


def _joint_in_word(tokenizer: Encodes, text: str, end: int) -> _Joint | None:
    """The last place to cut before `end`, of few; it has to be one for two windows, which tell of patterns."""
    for at in range(end, max(1, end - _TRIES), -1):
        if not tokenizer.cuts_between(text[at - 1], text[at]):
            continue
        joint = _joint(tokenizer, text, at)
        if joint is not None and _joint(tokenizer, text, at, shorter=1) is not None:
            return joint
    return None


def _kind(char: str) -> str:
    if char.isspace():
        return " "
    return "a" if char.isalpha() else "0" if char.isnumeric() else "."


def _joint(tokenizer: Encodes, text: str, at: int, shorter: int = 0) -> _Joint | None:
    """What a cut at `at` would be; None where the tokens of its window are not those of its halves.

    The window begins `shorter` characters later.
    """
    left, right = text[max(0, at - _WINDOW_CHARS + shorter) : at], text[at : at + _WINDOW_CHARS]
    context = left[-_CONTEXT_CHARS:]
    both, before, head, behind = tokenizer.encode_batch([left + right, left, context, context + right])
    after = behind[len(head) :]
    if not (np.array_equal(behind[: len(head)], head) and np.array_equal(both, np.concatenate([before, after]))):
        return None
    if not len(before) or not len(after):
        return None
    num_last, num_first = (min(_JOINT_TOKENS, -(-len(side) // 4)) for side in (before, after))
    return _Joint(at, context, tuple(before[-num_last:].tolist()), tuple(after[:num_first].tolist()))


# --- tokenising and joining -------------------------------------------------------------------------


def encode(tokenizer: Encodes, pieces: Sequence[Piece]) -> list[Encoded]:
    """The tokens of each piece, each compared with its text."""
    texts = [text for piece in pieces for text in _texts(piece)]
    encodings = iter(tokenizer.encode_batch(texts))
    found = []
    for piece in pieces:
        ids = next(encodings)
        before = next(encodings) if piece.context else ids[:0]
        fits = np.array_equal(ids[: len(before)], before)
        ids = ids[len(before) :]
        fits_before = fits and tuple(ids[: len(piece.first)].tolist()) == piece.first
        fits_after = not piece.last or tuple(ids[-len(piece.last) :].tolist()) == piece.last
        found.append(Encoded(ids, fits_before, fits_after, tokenizer.difference(piece.text, ids, before)))
    return found


def _texts(piece: Piece) -> list[str]:
    return [piece.context + piece.text, piece.context] if piece.context else [piece.text]


class Joining:
    """Puts the pieces of one document together; each comes out when the one behind it is found to fit.

    One that grows is tokenised again only when it has grown by half: in all, that is a few times the text.
    """

    def __init__(self, tokenizer: Encodes) -> None:
        self._tokenizer = tokenizer
        self._held: tuple[Piece, Encoded] | None = None
        self._behind: list[Piece] = []  # what the one that is held is to become one with
        self._num_chars = 0

    def add(self, piece: Piece, encoded: Encoded) -> np.ndarray | None:
        """Tokens that are settled now, if any. LossyTextError where they do not give their text back."""
        if self._held is None:
            self._held = piece, encoded
            return None
        before, tokens = self._held
        if not self._behind and tokens.fits_after and encoded.fits_before:
            self._held = piece, encoded
            return self._settled(before, tokens)
        self._behind.append(piece)
        if 2 * sum(len(each.text) for each in self._behind) >= len(before.text):
            self._unite(before)
        return None

    def _unite(self, before: Piece) -> None:
        """Makes one piece of the one that is held and those behind it."""
        behind, self._behind = self._behind, []
        text = "".join([before.text, *(piece.text for piece in behind)])
        whole = Piece(text, before.context, before.first, behind[-1].last)
        (again,) = encode(self._tokenizer, [whole])
        if not again.fits_before:
            raise RuntimeError("a text was cut where its tokens depend on what is farther away; this is a fault here")
        self._held = whole, again

    def end(self) -> np.ndarray | None:
        """The last tokens; None for an empty text."""
        if self._held is not None and self._behind:
            self._unite(self._held[0])
        held, self._held = self._held, None
        return None if held is None else self._settled(*held)

    def _settled(self, piece: Piece, encoded: Encoded) -> np.ndarray:
        if (found := encoded.difference) is not None:
            raise LossyTextError(found._replace(at=self._num_chars + found.at), self._tokenizer.remedy())
        self._num_chars += len(piece.text)
        return encoded.ids
