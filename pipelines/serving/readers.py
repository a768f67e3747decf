"""One request in motion: its tokens, what of them is in the memory, what is written."""

from array import array
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from rmt_core.state import State

from .requests import Done, FinishReason, Progress, Request, RequestError, Usage
from .scheduling import Kind, Shape
from .text import TextStream

_numbers = count()


class Position(NamedTuple):
    """Where a reader stands in a document. Whatever made it, the same tokens give the same position."""

    state: State  # one row, after the closed segments
    open_tokens: tuple[int, ...]  # of the segment that is not full
    hidden: Tensor | None  # (1, D) at the last token; None where tokens are open, which are run again, or none was read
    num_tokens: int  # all tokens of the document
    num_segments: int  # closed
    chain: bytes | None = None  # prefix key after the closed segments; None: not known

    @property
    def num_closed(self) -> int:
        return self.num_tokens - len(self.open_tokens)


class Reader:
    """A request in the engine. What a step computes is put here only when it has succeeded."""

    def __init__(self, request: Request, start: Position, segment_len: int, text: TextStream | None) -> None:
        self.number = next(_numbers)
        self.request = request
        self.segment_len = segment_len
        self.text = text
        self.state, self.chain = start.state, start.chain
        self.tokens = array("q", [*start.open_tokens, *request.tokens])  # all that is not closed at the start
        self.hidden = None if len(self.tokens) else start.hidden  # (1, D) at the last token, where the next is chosen
        self.num_before = start.num_closed  # tokens of the document before these
        self.num_closed = 0  # of `tokens`
        self.num_carried = len(start.open_tokens)  # of `tokens`, those of earlier requests
        self.num_cached = 0  # of the tokens, those in segments that were found in the prefix cache
        self.slot: int | None = None  # where keys and values of the open tokens are
        self.num_in_slot = 0  # open tokens whose keys and values are there
        self.written: list[int] = []
        self.reason: FinishReason | None = None  # once nothing more is to be written
        if not request.max_new_tokens:
            self.reason = "length"
        self.generator = torch.Generator().manual_seed(request.seed)
        self.since = 0  # number of the step after which the next work was ready
        self.left = False  # done, failed or cancelled
        if not self.num_before + len(self.tokens):
            raise RequestError("invalid_request", "there are no tokens; give at least one, or a session that has read")

    @property
    def num_open(self) -> int:
        return len(self.tokens) - self.num_closed

    @property
    def num_tokens(self) -> int:
        return self.num_before + len(self.tokens)

    @property
    def num_segments(self) -> int:
        return (self.num_before + self.num_closed) // self.segment_len

    @property
    def writes(self) -> bool:
        return self.reason is None

    def next_tokens(self) -> "array[int]":
        """The open tokens that the next work takes: of a full segment all, of the last one what there is."""
        return self.tokens[self.num_closed : self.num_closed + self.segment_len]

    def work(self) -> tuple[Kind, Shape] | None:
        """What this needs next; None where the next token can be chosen, or all is done."""
        kind = Kind.WRITE if self.written else Kind.READ
        if self.num_open >= self.segment_len:
            return kind, Shape("close", self.segment_len)
        if not self.writes or self.hidden is not None:
            return None
        if self.num_in_slot and self.num_in_slot == self.num_open - 1:
            return kind, Shape("extend", 1)
        padded = min(_power_of_two(self.num_open), self.segment_len)
        return Kind.WRITE if self.written else Kind.TAIL, Shape("open", padded)

    def close(self, state: State, hidden: Tensor, chain: bytes | None) -> None:
        """A full segment has been read."""
        self.state, self.chain = state, chain
        self.num_closed += self.segment_len
        self.num_in_slot = 0
        self.hidden = None if self.num_open else hidden

    def opened(self, hidden: Tensor) -> None:
        """Keys and values of all open tokens are in the slot."""
        self.num_in_slot = self.num_open
        self.hidden = hidden

    def skip(self, num_tokens: int, state: State, hidden: Tensor, chain: bytes) -> None:
        """Segments of the prompt need not be read: the memory after them is known."""
        self.num_cached += num_tokens
        self.num_closed += num_tokens - self.segment_len
        self.close(state, hidden, chain)

    def put(self, token: int) -> None:
        """A token has been written; it is to be read next."""
        self.written.append(token)
        self.tokens.append(token)
        self.hidden = None
        if len(self.written) == self.request.max_new_tokens:
            self.reason = "length"

    def position(self) -> Position:
        """Where the document stands, once nothing is left to do."""
        hidden = None if self.num_open else self.hidden
        return Position(self.state, tuple(self.next_tokens()), hidden, self.num_tokens, self.num_segments, self.chain)

    def progress(self) -> Progress:
        return Progress(self.num_segments, self.num_before + self.num_closed)

    def done(self) -> Done:
        assert self.reason is not None
        usage = Usage(len(self.request.tokens), len(self.written), max(0, self.num_cached - self.num_carried))
        return Done(self.reason, usage, self.num_tokens, self.num_segments)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def check(request: Request, vocab_size: int) -> None:
    """RequestError where the request makes no sense, whatever the model's state."""
    if request.max_new_tokens < 0:
        raise RequestError("invalid_request", f"max_new_tokens is {request.max_new_tokens}; it must be 0 or more")
    if not -(2**63) <= request.seed < 2**63:
        raise RequestError("invalid_request", f"seed is {request.seed}; it must be from -2^63 to 2^63 - 1")
    if any(not stop for stop in request.stop_strings):
        raise RequestError("invalid_request", "a stop string is empty; it must have at least one character")
    if _outside(request.tokens, vocab_size):
        raise RequestError("invalid_request", f"a token is not one of the model's, 0 to {vocab_size - 1}")


def _outside(tokens: Iterable[int], vocab_size: int) -> bool:
    found = array("q", tokens)
    return bool(found) and not 0 <= min(found) <= max(found) < vocab_size
