"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881, section 3; 2023, arXiv:2304.11062).

Axes: B rows, T tokens of a segment, M memory tokens, S = M + T + M, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..state import State
from .base import Dimensions, LearnedRows, Memory, Segment, append_rows, at_least, split_rows


@dataclass(frozen=True)
class RMTConfig:
    """Settings of the Recurrent Memory Transformer."""

    num_tokens: int = 8  # memory tokens, 2 x num_tokens positions of each segment; 0 is the plain backbone

    def __post_init__(self) -> None:
        at_least(0, self, "num_tokens")


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
        text = append_rows(x, state, segment.lengths) if segment.writes else x
        return torch.cat([state, text], dim=1)  # (B, S, D)

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        m = self.rows_before
        if segment.stage == "extend":
            return h, state
        if not segment.writes:
            return h[:, m:], state
        return split_rows(h[:, m:], m, segment.lengths)
