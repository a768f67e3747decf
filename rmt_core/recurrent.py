"""A backbone run over a long text one segment at a time, carrying a memory.

Axes: B rows, N tokens of a text, T tokens of a segment, K segments, S positions that a layer sees, D width,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from . import state as states
from .backbone import Backbone, Placement
from .config import ModelConfig
from .diagonal import Part, run_diagonal
from .memory.base import Memory, Segment
from .random_state import GeneratorState
from .roots import joined
from .schedule import choose
from .state import State

IGNORED = -100  # a label that is not asked for


class Output:
    """What a step gives: `hidden` (B, T, D) after the final norm, `aux` () auxiliary loss, `logits` (B, T, V).

    Logits are computed when they are asked for and not before. At padding, values are finite and without meaning.
    """

    def __init__(self, hidden: Tensor, aux: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        self.hidden = hidden
        self.aux = aux
        self.head = head

    @property
    def logits(self) -> Tensor:
        return self.head(self.hidden)

    def loss(self, labels: Tensor, weights: Tensor | None = None) -> "SegmentLoss":
        """The loss of labels (B, T), weighted by `weights` (B, T); the head is applied only where a label asks."""
        asked = labels != IGNORED
        logits = self.head(self.hidden[asked])  # (labels, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels[asked], reduction="none")
        weights = asked.to(losses.dtype) if weights is None else weights.to(losses.dtype) * asked
        nats = losses.detach().new_zeros(asked.shape).masked_scatter(asked, losses.detach())
        return SegmentLoss((losses * weights[asked]).sum(), weights.sum(), self.aux, nats)


class SegmentBatch(NamedTuple):
    """One segment of each row with what it should predict."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the next token, -100 where nothing is asked
    lengths: Tensor | None = None  # (B,) real tokens; None where all rows are full
    reset: Tensor | None = None  # (B,) bool: a document begins here
    weights: Tensor | None = None  # (B, T) of the labels in the loss; None where all weigh 1


class Unrolled(NamedTuple):
    """The loss over several segments."""

    loss_sum: Tensor  # () nats times weight, summed over the labels; with a gradient
    weight: Tensor  # () summed weights of the labels
    aux: Tensor  # () mean over segments of the auxiliary loss; with a gradient
    nats: tuple[Tensor, ...]  # K x (B, T) of each label, detached; 0 where nothing is asked
    state: State  # after the last segment

    @property
    def loss(self) -> Tensor:
        """Weighted mean nats per label plus the auxiliary loss, (); where nothing is asked, only the latter."""
        return self.loss_sum / self.weight.where(self.weight > 0, 1) + self.aux

    def values(self) -> "Unrolled":
        """Outside the gradient and without the state, which may be large."""
        return self._replace(loss_sum=self.loss_sum.detach(), aux=self.aux.detach(), state=())


class SegmentLoss(NamedTuple):
    """`Unrolled` for one segment."""

    loss_sum: Tensor
    weight: Tensor
    aux: Tensor
    nats: Tensor


Batch = TypeVar("Batch")  # one segment of each row, with what is asked of it


class SegmentModel(nn.Module, Generic[Batch]):
    """What reads segment by segment, carrying the state of a memory: the loop over segments."""

    memory: Memory

    @property
    def segment_len(self) -> int:
        """Tokens of a segment at most."""
        raise NotImplementedError

    def init_state(self, batch_size: int) -> State:
        """The state before a document's first segment, for `batch_size` rows."""
        return self.memory.init_state(batch_size)

    def unroll(
        self,
        segments: Sequence[Batch],
        state: State,
        *,
        bptt_segments: int | None = None,
        checkpointed: bool = False,
        generator: torch.Generator | None = None,
    ) -> Unrolled:
        """The loss over consecutive segments, carrying the state.

        The gradient crosses no edge between windows of `bptt_segments` segments; None lets it cross all. With
        `checkpointed`, a segment's activations are computed again in the backward pass instead of kept, from the same
        random numbers.

        The loss is tied to the last state. So parameters that only write the state, which no loss here has felt when
        there is one segment, get a gradient of zero instead of none: what trains under data parallelism waits for
        every parameter's gradient.
        """
        if not segments:
            raise ValueError("unroll needs at least one segment")
        check_bptt(bptt_segments)
        parts: list[SegmentLoss] = []
        for i, segment in enumerate(segments):
            if bptt_segments is not None and i and i % bptt_segments == 0:
                state = states.detach(state)
            if checkpointed:
                contexts = noop_context_fn if generator is None else partial(_drawn_again, generator)
                part, state = checkpoint(
                    self._segment_loss, segment, state, generator, use_reentrant=False, context_fn=contexts
                )
            else:
                part, state = self._segment_loss(segment, state, generator)
            parts.append(part)
        sums, weights, aux, nats = zip(*parts, strict=True)
        loss_sum = joined(torch.stack(sums).sum(), states.leaves(state))
        return Unrolled(loss_sum, torch.stack(weights).sum(), torch.stack(aux).mean(), nats, state)

    def state_after(self, segment: Batch, state: State, generator: torch.Generator | None = None) -> State:
        """What `unroll` gives as the state after one segment, from as many random numbers."""
        return self._segment_loss(segment, state, generator)[1]

    def _segment_loss(
        self, segment: Batch, state: State, generator: torch.Generator | None
    ) -> tuple[SegmentLoss, State]:
        """The loss of one segment and the state after it."""
        raise NotImplementedError


def _drawn_again(generator: torch.Generator) -> tuple[nullcontext[None], GeneratorState]:
    """What a checkpointed segment runs in, at first and again: torch keeps the global random state alone."""
    return nullcontext(), GeneratorState(generator)


class RecurrentModel(SegmentModel[SegmentBatch]):
    """A causal LM with a memory. Parameters only: the state comes in and goes out."""

    sees_segments_alone: ClassVar[bool] = True  # earlier ones through the memory's state and nothing else

    def __init__(self, backbone: Backbone, memory: Memory, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory
        self.config = config
        self._check_fit()

    def _check_fit(self) -> None:
        memory, backbone = self.memory, self.backbone
        if memory.needs_relative_positions and not backbone.family.has_relative_positions:
            name = backbone.lm.config.model_type
            raise ValueError(f"a cache needs rotary positions; {name} has learned ones: use another memory or backbone")
        extra = memory.rows_before + memory.rows_after + memory.context_len
        steady = backbone.steady_positions
        if steady is not None and self.config.segment_len + extra > steady:
            raise ValueError(
                f"segment_len {self.config.segment_len} + {extra} memory positions exceeds {steady}, from where on the "
                "backbone's longrope places all tokens otherwise; use smaller segments"
            )
        room = backbone.max_positions - extra
        if self.config.segment_len > room:
            raise ValueError(
                f"segment_len {self.config.segment_len} + {extra} memory positions exceeds the backbone's "
                f"{backbone.max_positions} positions; use "
                + (f"at most {room}" if room > 0 else "a smaller memory, which leaves no room for text")
            )

    @property
    def segment_len(self) -> int:
        return self.config.segment_len

    @property
    def step_len(self) -> int:
        """Tokens that a step takes at most."""
        return self.segment_len

    def step(
        self,
        tokens: Tensor,
        state: State,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        active: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Output, State]:
        """Read one segment of each row: tokens (B, T) int64, T <= segment_len.

        `lengths` (B,): real tokens of each row; what follows is padding and touches nothing. A row of length 0 keeps
        its state. `reset` (B,) bool: the row starts anew before this segment. `active` (B,) bool: an inactive row
        keeps its state, whatever else is said of it. `generator` is for memories that sample.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.segment_len:
            raise ValueError(f"tokens are {tuple(tokens.shape)}; a step takes (rows, 1 to {self.segment_len} tokens)")
        check_rows(tokens, state, lengths)
        given = state
        if reset is not None:
            state = states.where(reset, self.init_state(len(tokens)), given)
        segment = Segment(tokens.shape[1], lengths, self.memory.rows_before, generator=generator)
        hidden, new = self.read(tokens, state, segment)
        if lengths is not None:
            new = states.where(lengths > 0, new, state)
        if active is not None:
            new = states.where(active, new, given)
        losses = [*segment.aux, *self.backbone.penalties()]
        aux = torch.stack(losses).sum() if losses else hidden.new_zeros(())
        return Output(hidden, aux, self.backbone.head), new

    def read(
        self, tokens: Tensor, state: State, segment: Segment, placement: Placement | None = None
    ) -> tuple[Tensor, State]:
        """All hooks and layers over tokens (B, T): hidden states (B, T, D) and the state after them."""
        backbone, memory = self.backbone, self.memory
        h = memory.enter(backbone.embed(tokens), state, segment)  # (B, S, D)
        if placement is None:
            placement = Placement(torch.arange(h.shape[1] + memory.context_len, device=h.device)[None])
        h = backbone.place(h, placement)
        for layer, block in enumerate(backbone.blocks(h, placement)):
            h, state = memory.around(layer, h, block, state, segment)
        return memory.leave(backbone.norm(h), state, segment)

    def state_after(self, segment: SegmentBatch, state: State, generator: torch.Generator | None = None) -> State:
        return self._step(segment, state, generator)[1]  # the head draws no random numbers

    def _segment_loss(
        self, segment: SegmentBatch, state: State, generator: torch.Generator | None
    ) -> tuple[SegmentLoss, State]:
        """The loss of one segment and the state after it; the head only where a label asks for it."""
        out, state = self._step(segment, state, generator)
        return out.loss(segment.labels, segment.weights), state

    def _step(self, segment: SegmentBatch, state: State, generator: torch.Generator | None) -> tuple[Output, State]:
        return self.step(segment.tokens, state, segment.lengths, segment.reset, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        state: State = None,
        lengths: Tensor | None = None,
        *,
        bptt_segments: int | None = None,
        checkpointed: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean nats per label over whole texts: tokens, labels (B, N) int64, lengths (B,) real tokens.

        Labels are the next token, -100 is skipped; the last token of a segment predicts the first of the next.
        """
        state = self.init_state(len(tokens)) if state is None else state
        segments = cut(tokens, labels, lengths, self.segment_len)
        return self.unroll(
            segments, state, bptt_segments=bptt_segments, checkpointed=checkpointed, generator=generator
        ).loss


def check_bptt(bptt_segments: int | None) -> None:
    """A ValueError where a window of so many segments is none."""
    if bptt_segments is not None and (type(bptt_segments) is not int or bptt_segments < 1):
        raise ValueError(f"bptt_segments is {bptt_segments!r}; it must be a whole number, at least 1, or None")


def check_rows(tokens: Tensor, state: State, lengths: Tensor | None) -> None:
    """A ValueError where a state or lengths do not belong to tokens (B, T).

    Values of lengths are looked at on CPUs alone: elsewhere that would wait for the device.
    """
    num_rows, size = tokens.shape
    if others := {len(leaf) for leaf in states.leaves(state)} - {num_rows}:
        raise ValueError(f"the state is of {others.pop()} rows, the tokens are of {num_rows}")
    if lengths is None:
        return
    if lengths.shape != (num_rows,):
        raise ValueError(f"lengths are {tuple(lengths.shape)}; give one for each of {num_rows} rows")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = [length for length in lengths.tolist() if not 0 <= length <= size]
        if wrong:
            raise ValueError(f"a length is {wrong[0]}; it must be 0 to {size}, as many tokens as rows have here")


def cut(tokens: Tensor, labels: Tensor, lengths: Tensor | None, segment_len: int) -> list[SegmentBatch]:
    """Texts (B, N) as segments of `segment_len`; the last may be shorter. Labels at padding are not asked for."""
    if tokens.shape != labels.shape or tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)} must be equal (rows, tokens)")
    if lengths is not None:
        at = torch.arange(tokens.shape[1], device=labels.device)
        labels = labels.masked_fill(at >= lengths.to(labels.device)[:, None], IGNORED)
    starts = range(0, tokens.shape[1], segment_len)
    return [
        SegmentBatch(part, answers, _part_lengths(lengths, start, part.shape[1]))
        for start, part, answers in zip(starts, tokens.split(segment_len, 1), labels.split(segment_len, 1), strict=True)
    ]


def _part_lengths(lengths: Tensor | None, start: int, size: int) -> Tensor | None:
    return None if lengths is None else (lengths - start).clamp(0, size)


def run(
    model: RecurrentModel,
    tokens: Tensor,
    state: State = None,
    lengths: Tensor | None = None,
    order: str = "sequential",
    *,
    generator: torch.Generator | None = None,
) -> tuple[Output, State]:
    """Read whole texts: tokens (B, N) int64, lengths (B,) real tokens. Output over all N tokens, and the last state.

    The output's auxiliary loss is the mean over segments, as in `forward`.

    `order` is the order of the (segment, layer) cells. "sequential" goes segment by segment. "diagonal" runs cells of
    different segments and layers together, which fills a device that one cell leaves idle; the results are the same up
    to rounding. It needs a memory that is local to layers, and no random choices (neither dropout nor a generator):
    otherwise a ValueError says why. "auto" takes the faster of the two, measured once, and the sequential one where
    the other is impossible. `generator` is for memories that sample.

    Memory grows with N only by the hidden states that are given back; to read without end, call `step`.
    """
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; run takes (rows, at least 1 token)")
    size = model.segment_len
    parts = [
        Part(part, _part_lengths(lengths, i * size, part.shape[1])) for i, part in enumerate(tokens.split(size, 1))
    ]
    state = model.init_state(len(tokens)) if state is None else state
    if choose(model, order, parts, generator) == "diagonal":
        hidden, aux, state = run_diagonal(model, parts, state)
    else:
        hidden, aux, state = _run_sequential(model, parts, state, generator)
    return Output(torch.cat(hidden, dim=1), aux / len(parts), model.backbone.head), state


def _run_sequential(
    model: RecurrentModel, parts: Sequence[Part], state: State, generator: torch.Generator | None
) -> tuple[list[Tensor], Tensor, State]:
    hidden, aux = [], []
    for part in parts:
        out, state = model.step(part.tokens, state, part.lengths, generator=generator)
        hidden.append(out.hidden)
        aux.append(out.aux)
    return hidden, torch.stack(aux).sum(), state
