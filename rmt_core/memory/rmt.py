"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881, section 3; 2023, arXiv:2304.11062).

Axes: B rows, T tokens of a segment, M memory tokens, S = M + T + M, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..state import State
from .base import Dimensions, LearnedRows, Memory, Segment, take


@dataclass(frozen=True)
class RMTConfig:
    """Settings of the Recurrent Memory Transformer."""

    num_tokens: int = 8  # memory tokens; they take 2 x num_tokens positions of each segment

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"memory.num_tokens is {self.num_tokens}; it must be at least 1")


class RMTMemory(Memory):
    """M tokens read before the segment and written after it; the state is the written ones, (B, M, D).

    The same vectors stand in both places. Everything is causal, as in the released decoder (the paper opens both
    blocks to themselves). In a short segment the write tokens follow the row's last real token, so that what comes
    after them, padding, is seen by nobody.
    """

    Config = RMTConfig
    layer_local = False  # the first layer of a segment needs the last layer of the one before

    def __init__(self, config: RMTConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.rows_before = self.rows_after = config.num_tokens
        self.initial = LearnedRows(config.num_tokens, dimensions.width, dimensions.embedding_std)

    def init_state(self, batch_size: int) -> Tensor:
        rows: Tensor = self.initial(batch_size)
        return rows

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        if segment.stage == "extend":
            return x
        if not segment.writes:
            return torch.cat([state, x], dim=1)
        rows = torch.cat([state, x, state], dim=1)  # (B, S, D)
        if segment.lengths is None:
            return rows
        return take(rows, self._write_early(segment.lengths, x.shape[1]))

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        m = self.rows_before
        if segment.stage == "extend":
            return h, state
        if not segment.writes:
            return h[:, m:], state
        if segment.lengths is None:
            return h[:, m:-m], h[:, -m:]
        written = segment.lengths[:, None] + torch.arange(m, 2 * m, device=h.device)  # (B, M)
        return h[:, m:-m], take(h, written)

    def _write_early(self, lengths: Tensor, num_text: int) -> Tensor:
        """Index (B, S) that moves the write tokens to just after `lengths` (B,) real rows, padding to the end."""
        m = self.rows_before
        at = torch.arange(num_text + 2 * m, device=lengths.device).expand(len(lengths), -1)  # (B, S)
        text_end = lengths[:, None] + m
        padding = num_text - lengths[:, None]
        moved = torch.where(at < text_end + m, at + padding, at - m)
        return torch.where(at < text_end, at, moved)
