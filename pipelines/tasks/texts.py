"""Texts that are made while they are read, so that memory stays flat at any length.

A stream gives a text's tokens in blocks, (n,) int32 each, and the same ones whenever it is opened.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.tasks.held_out import HeldOut

Stream = Callable[[], Iterator[np.ndarray]]
Background = Callable[[int, np.random.Generator], Stream]  # (num tokens, generator) -> a text of so many tokens

NOISE = "abcdefghijklmnopqrstuvwxyz "

_BLOCK = 2**16  # tokens made at once
_LONGEST_KNOWN, _MOST_KNOWN = 200, 2**16  # characters, and texts, of which the tokens are remembered


class Encodes(Protocol):
    """The part of a tokenizer that a task needs."""

    def encode(self, text: str) -> np.ndarray: ...
    def encode_inside(self, text: str) -> np.ndarray: ...


class Remembered:
    """A tokenizer that encodes each short text once: tasks are made of few sentences, which come again and again."""

    def __init__(self, tokenizer: Encodes) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}

    def encode(self, text: str) -> np.ndarray:
        return self._tokenizer.encode(text)

    def encode_inside(self, text: str) -> np.ndarray:
        """(T,) int32, not to be written to."""
        if text in self._known:
            return self._known[text]
        tokens = self._tokenizer.encode_inside(text).astype(np.int32)
        tokens.flags.writeable = False
        if len(text) <= _LONGEST_KNOWN and len(self._known) < _MOST_KNOWN:
            self._known[text] = tokens
        return tokens


class Insert(NamedTuple):
    """Tokens that stand in a background."""

    at: int  # tokens of the background before it
    tokens: np.ndarray


def prose(held_out: HeldOut) -> Background:
    """Excerpts of documents, one after another, from random places; behind the last comes the first again."""
    total = sum(held_out.num_tokens)
    if not total:
        raise ValueError("prose needs a text of at least one token")

    def draw(num: int, generator: np.random.Generator) -> Stream:
        return partial(_prose, held_out, int(generator.integers(total)), num)

    return draw


def _prose(held_out: HeldOut, start: int, num: int) -> Iterator[np.ndarray]:
    ends = np.cumsum(held_out.num_tokens)
    document = int(np.searchsorted(ends, start, side="right"))
    at = start - (int(ends[document - 1]) if document else 0)
    while num:
        size = min(num, _BLOCK, held_out.num_tokens[document] - at)
        if size:
            yield held_out.read(document, at, at + size).astype(np.int32)
        num, at = num - size, at + size
        if at == held_out.num_tokens[document]:
            document, at = (document + 1) % len(ends), 0


def noise(tokenizer: Encodes) -> Background:
    """Lower-case letters and spaces, each equally likely."""
    alphabet = np.unique(np.concatenate([tokenizer.encode_inside(letter) for letter in NOISE])).astype(np.int32)

    def draw(num: int, generator: np.random.Generator) -> Stream:
        return partial(_noise, alphabet, int(generator.integers(2**62)), num)

    return draw


def _noise(alphabet: np.ndarray, seed: int, num: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for start in range(0, num, _BLOCK):
        yield generator.choice(alphabet, min(_BLOCK, num - start))


def filled(blocks: Stream, num: int, filler: np.ndarray) -> Iterator[np.ndarray]:
    """As many whole blocks as fit into `num` tokens, and filler (n,) over and over for the rest."""
    left = num
    for block in blocks():
        if len(block) > left:
            break
        yield block
        left -= len(block)
    for start in range(0, left, _BLOCK):
        yield np.resize(filler, min(_BLOCK, left - start)).astype(np.int32)


def joined(
    background: Stream,
    inserts: Iterable[Insert],
    tail: np.ndarray,
    *,
    between_blocks: bool = False,
    ends: Sequence[int] = (),
    latest: int | None = None,
) -> Stream:
    """The background with inserts in it, those for one place in the order given, and `tail` behind all.

    `between_blocks` cuts no block of the background: an insert then stands before or behind the block in which its
    place is, whichever is nearer. With `ends`, tokens that end a sentence, it stands at the nearest start of a sentence
    in its block, or just at its place where there is none. Neither brings it behind place `latest`.
    """
    ordered = sorted(inserts, key=lambda insert: insert.at)
    return partial(_joined, background, ordered, tail, between_blocks, ends, latest)


def _joined(
    background: Stream,
    inserts: Sequence[Insert],
    tail: np.ndarray,
    between_blocks: bool,
    ends: Sequence[int],
    latest: int | None,
) -> Iterator[np.ndarray]:
    waiting, read = deque(inserts), 0
    is_start: bool | None = None  # a text without sentences has no start of one
    for block in background():
        done, places = 0, np.zeros(0, dtype=np.int64)
        if waiting and waiting[0].at < read + len(block):
            places = np.array([0, len(block)]) if between_blocks else _sentence_starts(block, ends, is_start)
            places = places if latest is None else places[places <= latest - read]
        while waiting and waiting[0].at < read + len(block):
            insert = waiting.popleft()
            at = insert.at - read
            cut = int(places[np.abs(places - at).argmin()]) if len(places) else at
            yield block[done:cut]
            yield insert.tokens
            done = cut
        yield block[done:]
        read += len(block)
        is_start = bool(len(block)) and int(block[-1]) in ends
    for insert in waiting:  # at the end
        yield insert.tokens
    yield tail


def _sentence_starts(tokens: np.ndarray, ends: Sequence[int], is_start: bool | None) -> np.ndarray:
    """Places in tokens (n,) behind those that end a sentence, and the first one if `is_start`, or, where that is None,
    if there are others.
    """
    found = np.flatnonzero(np.isin(tokens, ends)) + 1
    return np.concatenate([[0], found]) if is_start or (is_start is None and len(found)) else found


def cut(blocks: Iterable[np.ndarray], num: int) -> Iterator[np.ndarray]:
    """The first `num` tokens, or all where there are fewer."""
    for block in blocks:
        if num:
            yield block[:num]
        num -= min(num, len(block))


def in_blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same tokens in blocks of `size`, the last one shorter where they do not divide."""
    kept: list[np.ndarray] = []
    num_kept = 0
    for part in parts:
        rest = part
        while num_kept + len(rest) >= size:
            cut = size - num_kept
            yield np.concatenate([*kept, rest[:cut]])
            kept, num_kept, rest = [], 0, rest[cut:]
        if len(rest):
            kept.append(rest)
            num_kept += len(rest)
    if kept:
        yield np.concatenate(kept)


def whole(stream: Stream) -> np.ndarray:
    """All tokens at once, (N,) int32."""
    parts = list(stream())
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, dtype=np.int32)
