"""A memory that no table has, with all that makes computing again hard.

Axes: B rows, T tokens of a segment, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmt_core import RecurrentModel
from rmt_core.memory.base import Dimensions, LearnedRows, Memory, Segment
from rmt_core.state import State

from .tiny import tiny_model


class SamplingMemory(Memory):
    """Draws noise; its state holds whole numbers and a detached part too; one parameter only writes the state."""

    def __init__(self, config: None, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.initial = LearnedRows(1, dimensions.width, 1.0)
        self.reader = nn.Linear(dimensions.width, dimensions.width)
        self.writer = nn.Linear(dimensions.width, dimensions.width)

    def init_state(self, batch_size: int) -> State:
        rows = F.normalize(self.initial(batch_size), dim=-1)  # keeps tensors for its backward pass
        seen = torch.zeros(batch_size, dtype=torch.long)
        return {"rows": rows, "seen": seen, "last": self.anchor.new_zeros(batch_size, 1, self.dimensions.width)}

    def _noise(self, like: Tensor, segment: Segment) -> Tensor:
        if segment.generator is None:
            return torch.zeros_like(like)
        return torch.randn(like.shape, generator=segment.generator, dtype=like.dtype)

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        rows = state["rows"]
        seen = state["seen"][:, None, None].to(x.dtype)
        return x + self.reader(rows + self._noise(rows, segment)) + state["last"] + 0.1 * seen

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        real = segment.text(h)[..., None].to(h.dtype)  # (B, T, 1)
        mean = (h * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        rows = torch.tanh(self.writer(mean) + state["rows"] + self._noise(mean, segment))
        segment.aux.append(rows.square().mean())
        return h, {"rows": rows, "seen": state["seen"] + 1, "last": mean.detach()}


def sampling_model(family: str = "llama", segment_len: int = 4, **changes: Any) -> RecurrentModel:
    """A tiny model with a `SamplingMemory`."""
    plain = tiny_model(family=family, segment_len=segment_len, **changes)
    torch.manual_seed(2)
    return RecurrentModel(plain.backbone, SamplingMemory(None, plain.backbone.dimensions).double(), plain.config)
