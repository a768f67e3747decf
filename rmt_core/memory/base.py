"""What a memory is: four hooks around a backbone, and the state that it carries between segments.

Axes: B rows, T tokens of a segment, S positions that a layer sees (T plus memory), P positions of context, M rows of
memory, D width, H heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..state import State


class Dimensions(NamedTuple):
    """What a memory needs to know of the backbone to size its parameters."""

    width: int
    num_layers: int
    num_heads: int
    head_width: int  # of the attention's heads: width / num_heads, where the family does not choose another
    embedding_std: float  # of the token embeddings: the scale of memory tokens
    has_relative_positions: bool  # rotary: cached positions keep their meaning in a later segment
    encoder_layers: nn.ModuleList | None = None  # of an encoder; None: the backbone is causal


@dataclass(frozen=True)
class Segment:
    """One step's facts, the same for every hook.

    `stage` is "close" for a whole segment, which reads and writes the memory. While a segment is still being decoded
    the memory is only read: "open" for the tokens so far, "extend" for one more token after them. What the hooks give
    back as the state is then dropped, unless the memory `runs_within`: then "open" gives the state as it runs within
    the segment, which the next "extend" is given and continues.
    """

    text_len: int  # T, the longest row's tokens; of shorter rows the rest is padding
    lengths: Tensor | None = None  # (B,) tokens of each row; None where all have text_len
    text_start: int = 0  # rows that memories have put before the text
    rows_between: int = 0  # in `around`: inner memories' rows between the text and this memory's own rows after it
    own_start: int = 0  # in `around`: of those, where the memory's own begin
    kept_start: int = 0  # as "extend": rows of memories before the text among the keys that are kept
    stage: str = "close"
    generator: torch.Generator | None = None  # for memories that sample
    aux: list[Tensor] = field(default_factory=list)  # auxiliary losses, () each, added by the hooks of this step

    @property
    def writes(self) -> bool:
        return self.stage == "close"

    def text(self, h: Tensor) -> Tensor:
        """Which rows of h (B, S, D) are real tokens, (B, S) bool: neither memories' rows nor padding."""
        at = torch.arange(h.shape[1], device=h.device).expand(h.shape[0], -1)
        lengths = self.text_len if self.lengths is None else self.lengths[:, None]
        return (at >= self.text_start) & (at < self.text_start + lengths)

    def tail(self, h: Tensor, num_rows: int) -> Tensor:
        """The memory's own M rows after the text, (B, M, D) of h (B, S, D); only where it put them: when it writes."""
        start = self.text_start + self.rows_between
        if self.lengths is None:
            return h[:, start + self.text_len : start + self.text_len + num_rows]
        return take(h, (self.lengths + start)[:, None] + torch.arange(num_rows, device=h.device))

    def enclosed(self, num_rows: int) -> "Segment":
        """The segment as an outer memory's `enter` and `leave` see it: with inner memories' rows in the text."""
        lengths = None if self.lengths is None else self.lengths + num_rows
        return replace(self, text_len=self.text_len + num_rows, lengths=lengths)


class Context(NamedTuple):
    """Rows that attention sees before the segment's own: a cache."""

    rows: Tensor  # (B, P, D) inputs of the layer, the oldest first; valid rows at the front
    filled: Tensor  # (B,) int64, how many of the P rows are valid


Projection: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Heads(NamedTuple):
    """What attention is computed from: the layer's projections, rotated where the family has rotary positions."""

    queries: Tensor  # (B, H, N, D / H)
    keys: Tensor  # (B, H, C, D / H), as many heads as queries
    values: Tensor  # (B, H, C, D / H)
    scale: float  # of the logits
    dropout: float  # of the weights; 0 outside training
    mask: Tensor | None  # (B, 1, 1, C), true where a row sees a key; None: causal, in an encoder all
    context_filled: Tensor | None = None  # (B,) rows of a context that stand before the segment's; None without one
    project: Projection | None = None  # a decoder's: of further inputs (B, N, D) at positions (1 or B, N) keys, values


Attention: TypeAlias = Callable[[Heads], Tensor]  # -> (B, H, N, D / H)


class Block(Protocol):
    """One decoder layer: h (B, S, D) -> (B, S, D), attention then feed-forward, each with its residual.

    `context` lets attention see further rows before the segment; `between` maps h after attention, before the
    feed-forward part; `attention` stands in for causal attention, and sees the context's rows too.
    """

    def __call__(
        self,
        h: Tensor,
        *,
        context: Context | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
        attention: Attention | None = None,
    ) -> Tensor: ...


class EncoderBlock(Protocol):
    """One encoder layer: of h (B, S, D) it gives the rows at `rows` (N,) int64, (B, N, D); None: all.

    They attend to the rows of h at `seen` (C,) int64 (None: all) where these are no padding. `layer` is a module of the
    same kind as the backbone's layer, whose weights stand in for it; `attention` stands in for attention.
    """

    def __call__(
        self,
        h: Tensor,
        *,
        rows: Tensor | None = None,
        seen: Tensor | None = None,
        layer: nn.Module | None = None,
        attention: Attention | None = None,
    ) -> Tensor: ...


class Memory(nn.Module):
    """The memoryless model; a memory overrides only the hooks at which it acts.

    A memory holds parameters, never the state: each hook takes the state and returns a new one, so that a segment can
    be replayed, checkpointed, moved or batched with others.
    """

    Config: ClassVar[type[Any]]  # a frozen dataclass of the memory's settings, checked in its __post_init__
    layer_local: ClassVar[bool] = True  # layer l of a segment needs only layer l of the segment before; `enter` may
    # read the first layer's state and `leave` the last one's, and neither changes it
    needs_relative_positions: ClassVar[bool] = False
    has_rows_only: ClassVar[bool] = False  # attention sees its rows and the text's, and averages nothing else
    for_encoder_decoders: ClassVar[bool] = False  # works in a bidirectional encoder too, by `around` and `leave`
    for_encoders: ClassVar[bool] = False  # works on an encoder too, by `enter`, `encode` and `leave`
    runs_within: ClassVar[bool] = (
        False  # a token's reading depends on the open segment's tokens before it (see `Segment`)
    )

    is_cache: bool = False  # attention sees inputs of earlier segments by it: one of a composition may
    computes_attention: bool = False  # in the place of the backbone's own: one of a composition may
    rows_before: int = 0  # rows that `enter` puts before the text
    rows_after: int = 0  # rows that `enter` puts after the text when the segment closes
    context_len: int = 0  # positions that attention sees besides the segment

    def __init__(self, config: Any, dimensions: Dimensions) -> None:
        super().__init__()
        self.config = config
        self.dimensions = dimensions
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    anchor: Tensor  # empty: the device and type of states that no parameter gives

    def init_state(self, batch_size: int) -> State:
        """The state before the first segment."""
        return ()

    def by_layer(self, state: State) -> Sequence[State]:
        """The parts of a layer-local memory's state, one a layer; here of a memory that keeps nothing."""
        assert state == (), f"{type(self).__name__} must say which layer has which part of its state"
        return [()] * self.dimensions.num_layers

    def from_layers(self, parts: Sequence[State]) -> State:
        """The state whose `by_layer` is `parts`."""
        return ()

    def context_filled(self, state: State) -> Tensor | int:
        """How many context positions are valid: (B,) int64, or 0 for a memory that has none."""
        return 0

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        """Embeddings (B, T, D) -> what layer 0 sees (B, S, D)."""
        return x

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        """Run decoder layer `layer` on h (B, S, D)."""
        return block(h), state

    def encode(self, layer: int, h: Tensor, block: EncoderBlock, segment: Segment) -> Tensor:
        """Run encoder layer `layer` on h (B, S, D): a row of the encoder's own, the memory's, the text's."""
        return block(h)

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        """Hidden states after the final norm (B, S, D) -> those of the tokens (B, T, D)."""
        return h, state


def at_least(minimum: float, settings: Any, *names: str, of: str = "memory") -> None:
    """A ValueError where a setting, of a memory or of what `of` names, is below `minimum` or endless."""
    for name in names:
        if not minimum <= getattr(settings, name) < math.inf:
            raise ValueError(f"{of}.{name} is {getattr(settings, name)}; it must be at least {minimum}")


class LayerMemory(nn.Module):
    """What a layer-local memory does at one layer: its parameters and the shape of that layer's state."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def init_state(self, batch_size: int) -> State:
        """The layer's state before the first segment."""
        return ()

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        """Run the layer on h (B, S, D); its state goes in and comes out."""
        return block(h), state


class LayerwiseMemory(Memory):
    """A layer-local memory: one `LayerMemory` a layer in `layers`; the state is the tuple of theirs.

    Nothing passes between layers but h, and nothing between segments but a layer's own state, so that cells of
    different segments and layers can run together.
    """

    layers: nn.ModuleList

    def init_state(self, batch_size: int) -> State:
        return tuple(self._layer(i).init_state(batch_size) for i in range(len(self.layers)))

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        h, new = self.layers[layer](h, block, state[layer], segment)
        return h, (*state[:layer], new, *state[layer + 1 :])

    def by_layer(self, state: State) -> Sequence[State]:
        return state

    def from_layers(self, parts: Sequence[State]) -> State:
        return tuple(parts)

    def _layer(self, layer: int) -> LayerMemory:
        module = self.layers[layer]
        assert isinstance(module, LayerMemory)
        return module


class LearnedRows(nn.Module):
    """Rows (M, D) that are learned, given to each row of a batch.

    They are a module of their own, and called, because optimisers that shard parameters gather them at a module's call.
    """

    def __init__(self, num_rows: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width) * std)

    def forward(self, batch_size: int) -> Tensor:
        """(B, M, D)."""
        return self.weight.expand(batch_size, -1, -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, D) at index (B, S): (B, S, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def weave(context: Context, h: Tensor) -> tuple[Tensor, Tensor]:
    """Context and segment as one causal sequence, (B, P + S, D), and where the segment's rows stand in it, (B, S).

    A row is `[valid context | segment | unused context]`: what is unused comes last, where a causal flag hides it, so
    that caches filled to different lengths need no mask. The context's own outputs are dropped by the caller.
    """
    num_context, num_rows = context.rows.shape[1], h.shape[1]
    filled = context.filled[:, None]
    at = torch.arange(num_context + num_rows, device=h.device)
    index = torch.where(at < filled, at, torch.where(at < filled + num_rows, at - filled + num_context, at - num_rows))
    own = filled + torch.arange(num_rows, device=h.device)
    return take(torch.cat([context.rows, h], dim=1), index), own


def append_rows(x: Tensor, tail: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, D) followed by tail (B, M, D): (B, T + M, D).

    In a row that is shorter than T the tail follows its `lengths` (B,) real rows and padding comes last, so that under
    a causal flag nobody sees padding.
    """
    rows = torch.cat([x, tail], dim=1)
    if lengths is None:
        return rows
    num_text, num_tail = x.shape[1], tail.shape[1]
    at = torch.arange(num_text + num_tail, device=x.device).expand(len(lengths), -1)
    length = lengths[:, None]
    moved = torch.where(at < length + num_tail, at + num_text - length, at - num_tail)
    return take(rows, torch.where(at < length, at, moved))


def split_rows(h: Tensor, num_tail: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `append_rows` put together: (B, T, D), without meaning at padding, and the tail (B, M, D)."""
    num_text = h.shape[1] - num_tail
    if lengths is None:
        return h[:, :num_text], h[:, num_text:]
    return h[:, :num_text], take(h, lengths[:, None] + torch.arange(num_tail, device=h.device))
