"""What a memory is: four hooks around a backbone, and the state that it carries between segments.

Axes: B rows, T tokens of a segment, S positions that a layer sees (T plus memory), P positions of context, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..state import State


class Dimensions(NamedTuple):
    """What a memory needs to know of the backbone to size its parameters."""

    width: int
    num_layers: int
    num_heads: int
    embedding_std: float  # of the token embeddings: the scale of memory tokens
    has_relative_positions: bool  # rotary: cached positions keep their meaning in a later segment


@dataclass(frozen=True)
class Segment:
    """One step's facts, the same for every hook.

    `stage` is "close" for a whole segment, which reads and writes the memory. While a segment is still being decoded
    the memory is only read: "open" for the tokens so far, "extend" for one more token after them.
    """

    text_len: int  # T, the longest row's tokens; of shorter rows the rest is padding
    lengths: Tensor | None = None  # (B,) tokens of each row; None where all have text_len
    text_start: int = 0  # rows that memories have put before the text
    stage: str = "close"
    generator: torch.Generator | None = None  # for memories that sample
    aux: list[Tensor] = field(default_factory=list)  # auxiliary losses, () each, added by the hooks of this step

    @property
    def writes(self) -> bool:
        return self.stage == "close"

    def enclosed(self, num_rows: int) -> "Segment":
        """The segment as an outer memory's `enter` and `leave` see it: with inner memories' rows in the text."""
        lengths = None if self.lengths is None else self.lengths + num_rows
        return replace(self, text_len=self.text_len + num_rows, lengths=lengths)


class Context(NamedTuple):
    """Rows that attention sees before the segment's own: a cache."""

    rows: Tensor  # (B, P, D) inputs of the layer, the oldest first; valid rows at the front
    filled: Tensor  # (B,) int64, how many of the P rows are valid


class Block(Protocol):
    """One decoder layer: h (B, S, D) -> (B, S, D), attention then feed-forward, each with its residual.

    `context` lets attention see further rows before the segment; `between` maps h after attention, before the
    feed-forward part.
    """

    def __call__(
        self, h: Tensor, *, context: Context | None = None, between: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor: ...


class Memory(nn.Module):
    """The memoryless model; a memory overrides only the hooks at which it acts.

    A memory holds parameters, never the state: each hook takes the state and returns a new one, so that a segment can
    be replayed, checkpointed, moved or batched with others.
    """

    Config: ClassVar[type[Any]]  # a frozen dataclass of the memory's settings, checked in its __post_init__
    layer_local: ClassVar[bool] = True  # layer l of a segment needs only layer l of the segment before
    needs_relative_positions: ClassVar[bool] = False

    rows_before: int = 0  # rows that `enter` puts before the text
    rows_after: int = 0  # rows that `enter` puts after the text when the segment closes
    context_len: int = 0  # positions that attention sees besides the segment

    def __init__(self, config: Any, dimensions: Dimensions) -> None:
        super().__init__()
        self.config = config
        self.dimensions = dimensions

    def init_state(self, batch_size: int) -> State:
        """The state before the first segment."""
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

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        """Hidden states after the final norm (B, S, D) -> those of the tokens (B, T, D)."""
        return h, state


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


def put(states: tuple[State, ...], layer: int, state: State) -> tuple[State, ...]:
    """`states`, one a layer, with that of `layer` replaced."""
    return (*states[:layer], state, *states[layer + 1 :])
