"""Transformer-XL cache (Dai et al. 2019, arXiv:1901.02860, section 3.2).

Axes: B rows, S positions that a layer sees, P cached positions, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..state import State
from .base import Block, Context, Dimensions, LayerMemory, LayerwiseMemory, Segment, at_least, take


@dataclass(frozen=True)
class XLConfig:
    """Settings of the Transformer-XL cache."""

    cache_len: int = 128  # positions of the past that attention sees too; 0 is the plain backbone

    def __post_init__(self) -> None:
        at_least(0, self, "cache_len")


class XLLayer(LayerMemory):
    """One layer's cache."""

    def __init__(self, config: XLConfig, width: int) -> None:
        super().__init__()
        self.cache_len, self.width = config.cache_len, width

    def init_state(self, batch_size: int) -> State:
        rows = self.anchor.new_zeros(batch_size, self.cache_len, self.width)
        return {"rows": rows, "filled": torch.zeros(batch_size, dtype=torch.long, device=rows.device)}

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        if segment.stage == "extend":  # the open segment's keys and values hold the cache's already
            return block(h), state
        out = block(h, context=Context(state["rows"], state["filled"]))
        return out, self._shift(state["rows"], state["filled"], h.detach(), segment) if segment.writes else state

    def _shift(self, cached: Tensor, filled: Tensor, h: Tensor, segment: Segment) -> State:
        """The last P valid rows of the cache (B, P, D) followed by the text of h (B, S, D)."""
        size = self.cache_len
        text = h[:, segment.text_start : segment.text_start + segment.text_len]
        end = filled + (segment.text_len if segment.lengths is None else segment.lengths)  # (B,) valid rows of both
        at = torch.arange(size, device=h.device) + (end - size).clamp(min=0)[:, None]  # (B, P)
        index = torch.where(at < filled[:, None], at, at - filled[:, None] + size)
        rows = take(torch.cat([cached, text], dim=1), index.clamp(max=size + text.shape[1] - 1))
        return {"rows": rows.masked_fill((at >= end[:, None])[..., None], 0), "filled": end.clamp(max=size)}


class XLMemory(LayerwiseMemory):
    """Each layer attends also to its own inputs at the last P text positions, outside the gradient.

    A layer's state is `{"rows": (B, P, D), "filled": (B,)}`: pre-allocated, valid rows at the front, the oldest first,
    zeros behind them. Keys and values are recomputed from the rows, at rotary positions that run on from the cache into
    the segment; with P at least as long as the history this is full attention. Memory tokens of another memory are
    seen by attention but never cached.
    """

    Config = XLConfig
    needs_relative_positions = True

    def __init__(self, config: XLConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.context_len = config.cache_len
        self.is_cache = config.cache_len > 0
        self.layers = nn.ModuleList(XLLayer(config, dimensions.width) for _ in range(dimensions.num_layers))

    def context_filled(self, state: State) -> Tensor | int:
        filled: Tensor = state[0]["filled"]
        return filled
