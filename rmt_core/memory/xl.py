"""Transformer-XL cache (Dai et al. 2019, arXiv:1901.02860, section 3.2).

Axes: B rows, T text rows of a segment, S positions that a layer sees, P cached positions, D width, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..state import State
from .base import Block, Context, Dimensions, Memory, Segment, put, take


@dataclass(frozen=True)
class XLConfig:
    """Settings of the Transformer-XL cache."""

    cache_len: int = 128  # positions of the past that attention sees besides the segment

    def __post_init__(self) -> None:
        if self.cache_len < 1:
            raise ValueError(f"memory.cache_len is {self.cache_len}; it must be at least 1")


class XLMemory(Memory):
    """Each layer attends also to its own inputs at the last P text positions, outside the gradient.

    The state is `{"rows": L x (B, P, D), "filled": (B,)}`: pre-allocated, valid rows at the front, the oldest first,
    zeros behind them. Keys and values are recomputed from the rows, at rotary positions that run on from the cache into
    the segment; with P at least as long as the history this is full attention. Memory tokens of another memory are
    seen by attention but never cached.
    """

    Config = XLConfig
    needs_relative_positions = True

    def __init__(self, config: XLConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.context_len = config.cache_len
        # Without parameters of its own this is how the memory knows its device and type; never saved.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def init_state(self, batch_size: int) -> State:
        assert isinstance(self.anchor, Tensor)
        shape = (batch_size, self.config.cache_len, self.dimensions.width)
        rows = tuple(self.anchor.new_zeros(shape) for _ in range(self.dimensions.num_layers))
        return {"rows": rows, "filled": torch.zeros(batch_size, dtype=torch.long, device=self.anchor.device)}

    def context_filled(self, state: State) -> Tensor | int:
        filled: Tensor = state["filled"]
        return filled

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        if segment.stage == "extend":  # the open segment's keys and values hold the cache's already
            return block(h), state
        cached, filled = state["rows"][layer], state["filled"]
        out = block(h, context=Context(cached, filled))
        if not segment.writes:
            return out, state
        rows = put(state["rows"], layer, self._shift(cached, filled, h.detach(), segment))
        if layer == self.dimensions.num_layers - 1:
            filled = (filled + self._num_text(h, segment)).clamp(max=self.config.cache_len)
        return out, {"rows": rows, "filled": filled}

    def _num_text(self, h: Tensor, segment: Segment) -> Tensor:
        """Real text rows of each row of the batch, (B,)."""
        if segment.lengths is not None:
            return segment.lengths
        return torch.full((h.shape[0],), segment.text_len, dtype=torch.long, device=h.device)

    def _shift(self, cached: Tensor, filled: Tensor, h: Tensor, segment: Segment) -> Tensor:
        """The last P valid rows of the cache followed by the text of h (B, S, D): (B, P, D)."""
        size = self.config.cache_len
        text = h[:, segment.text_start : segment.text_start + segment.text_len]
        end = filled + self._num_text(h, segment)  # (B,) valid rows of cache and text together
        at = torch.arange(size, device=h.device) + (end - size).clamp(min=0)[:, None]  # (B, P)
        index = torch.where(at < filled[:, None], at, at - filled[:, None] + size)
        rows = take(torch.cat([cached, text], dim=1), index.clamp(max=size + text.shape[1] - 1))
        return rows.masked_fill((at >= end[:, None])[..., None], 0)
