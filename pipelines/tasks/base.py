"""What an evaluation task is: a check before anything runs, and a measurement that gives figures.

Every task compares the model's memory with two ablations of it. All three read the same tokens and carry the same
true state from segment to segment; what differs is the state that a segment is given:

    true       the state that the text so far has left
    zeroed     zeros in every tensor, before the first segment too: the segment alone
    shuffled   the true state of the neighbouring row, which has read as much of another text, or that text to its end

A model without memory can also read with the whole text in context; its figures are those of the true one then.

Axes: B rows, N tokens of a text, T tokens of a segment, D width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import rmt_core
from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks.held_out import HeldOut
from pipelines.tasks.texts import in_blocks
from rmt_core import FullContext, RecurrentModel
from rmt_core.state import State

TRUE, ZEROED, SHUFFLED = MEMORIES = ("true", "zeroed", "shuffled")
QUESTIONS_VERSION = 5  # of what tasks draw and read and how they mark: raised with every change, so that none are mixed
MAX_LENGTH = 2**32  # tokens of a text
DOES_NOT_FIT = "does_not_fit"  # in place of all figures: the bytes that keys and values of full attention need

_AHEAD = 2**12  # tokens of a row that are made at once
_HEAD_FLOATS = 2**24  # logits computed at once: 64 MiB of float32


class Figure(NamedTuple):
    """One number that a task has measured. What does not apply is None."""

    metric: str
    value: float
    memory: str | None = None  # one of MEMORIES
    segment: int | None = None  # index of the first segment that it is about; None: the whole length
    num_segments: int | None = None  # segments from that one on that it is about; None: the one
    num_tokens: int | None = None  # tokens that it is a mean over
    depth: float | None = None  # where facts stand, in [0, 1]
    same_place: bool | None = None  # facts mostly stand where they do at the depth before this one: the text is short
    num_samples: int | None = None  # samples that it is a fraction of, or rows of text that it is a mean over
    num_texts: float | None = None  # texts of the length that were read at this cost
    num_at_once: int | None = None  # runs that could be under way at once, this one among them
    num_read: int | None = None  # tokens of held-out text that were read
    num_held_out: int | None = None  # all that there are
    num_same_text: int | None = None  # of the rows those whose shuffled memory is of the same document, read elsewhere
    low: float | None = None  # ends of the 95 % confidence interval
    high: float | None = None
    chance: float | None = None  # what guessing gives
    needs_memory: bool | None = None  # what is asked for lies in an earlier segment than the answer
    reason: str | None = None  # why nothing was measured
    background: str | None = None  # around facts: prose, noise; None: the task has none


@dataclass(frozen=True)
class Material:
    """What tasks measure with, beside the model."""

    tokenizer: Tokenizer
    held_out: HeldOut
    background: Literal["prose", "noise"] = "prose"
    num_samples: int = 32
    batch_size: int = 8  # rows read at once
    limit_segments: int | None = None  # at most so many segments of held-out text a length
    questions: str | None = None  # URI of a file of questions
    depths: tuple[float, ...] = ()  # where facts stand, from 0 (earliest) to 1 (latest); none: anywhere
    ablations: bool = True  # measure zeroed and shuffled memories too
    seed: int = 0
    compiled: bool = False  # on a CPU: compile the step that reads on where nothing is asked
    on_read: Callable[[int], None] | None = None  # called with so many tokens more that are being read


class Task(Protocol):
    """One thing to measure, at any length."""

    settings: frozenset[str]  # the fields of Material, beside tokenizer, batch_size and ablations, that it reads

    def check(self, length: int, segment_len: int, material: Material) -> None:
        """Raises InputError where the task cannot be measured on texts of `length` tokens."""

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        """The figures at `length` tokens. Rows of a batch never change one another's true or zeroed figures."""


def check_length(task: str, length: int, segment_len: int) -> None:
    """InputError for a text shorter than a segment, which no memory is needed for."""
    if length < segment_len:
        raise InputError(
            f"{task} at length {length}: shorter than the model's segment of {segment_len} tokens; "
            f"use at least {segment_len}"
        )


def memories_for(num_rows: int, material: Material) -> tuple[str, ...]:
    """The ablations that so many rows allow: a single one has no neighbour, so none to be shuffled with."""
    if not material.ablations:
        return (TRUE,)
    return MEMORIES if num_rows >= 2 else (TRUE, ZEROED)


def begin(model: RecurrentModel, num_rows: int, num_tokens: int) -> State:
    """The state before texts of at most so many tokens."""
    if isinstance(model, FullContext):
        return model.init_state(num_rows, num_tokens)
    return model.init_state(num_rows)


def given(memory: str, carried: State) -> State:
    """The state that a segment is given where the text so far has left `carried`."""
    if memory == ZEROED:
        return rmt_core.state.zeroed(carried)
    if memory == SHUFFLED:
        return rmt_core.state.shuffled(carried)
    return carried


def batch_sizes(num: int, batch_size: int) -> list[int]:
    """`num` rows as batches of nearly equal size, at most `batch_size` (at least 2), none of a single row.

    Where only a larger batch avoids a single row (an odd number in pairs) one batch has 3.
    """
    num_batches = max(1, min(-(-num // batch_size), num // 2))
    return [len(part) for part in np.array_split(np.arange(num), num_batches)]


class Part(NamedTuple):
    """One segment of each row of a batch."""

    start: int  # place of its first token in the texts
    tokens: Tensor  # (B, T) int64, padding behind a row's end
    lengths: Tensor | None  # (B,) int64 real tokens; None where all are


def segments(
    rows: Sequence[Iterable[np.ndarray]],
    segment_len: int,
    device: torch.device,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[Part]:
    """Texts of any lengths, given in blocks of any size, segment by segment. A row that has ended has length 0."""
    ahead = segment_len * max(1, _AHEAD // segment_len)  # whole segments, of which many are brought to a device at once
    blocks = [in_blocks(row, ahead) for row in rows]
    start = 0
    while True:
        cut = [next(block, None) for block in blocks]
        sizes = np.array([0 if part is None else len(part) for part in cut])
        if not sizes.any():
            return
        if on_read is not None:
            on_read(int(sizes.sum()))
        padded = np.zeros((len(rows), sizes.max()), dtype=np.int64)
        for row, part in zip(padded, cut, strict=True):
            if part is not None:
                row[: len(part)] = part
        tokens = torch.from_numpy(padded).to(device)
        for at in range(0, tokens.shape[1], segment_len):
            lengths = np.clip(sizes - at, 0, segment_len)
            longest = int(lengths.max())
            ragged = None if lengths.min() == longest else torch.from_numpy(lengths).to(device)
            yield Part(start + at, tokens[:, at : at + longest], ragged)
        start += ahead


def device_of(model: RecurrentModel) -> torch.device:
    return next(model.parameters()).device


def logits_in_pieces(model: RecurrentModel, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of hidden states (N, D), a few at a time: pairs of (which of the N, (n, V) at least float32)."""
    num_rows = max(1, _HEAD_FLOATS // model.backbone.vocab_size)
    for start in range(0, len(hidden), num_rows):
        piece = slice(start, start + num_rows)
        logits = model.backbone.head(hidden[piece])
        yield piece, logits.to(torch.promote_types(logits.dtype, torch.float32))
