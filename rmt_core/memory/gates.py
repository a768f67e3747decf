"""Gates between an old memory and what a segment wrote (Block-Recurrent Transformers, arXiv:2203.07852, section 3.2).

Each takes the old memory `c` and the written rows `h`, both (B, M, D), and gives the new memory, number by number.

Axes: B rows, M memory rows, D width.
"""

import torch
from torch import Tensor, nn


class FixedGate(nn.Module):
    """`c g + (W_z h + b_z) (1 - g)` with `g = sigmoid(b_g)`, the same for all rows and segments (equations 2 and 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = _linear(width)
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, memory: Tensor, written: Tensor) -> Tensor:
        return torch.lerp(self.value(written), memory, torch.sigmoid(self.bias))


class LSTMGate(nn.Module):
    """`c f + z i`, which writes and forgets little at first (equations 4 to 7).

    `z = tanh(W_z h + b_z)`, `i = sigmoid(W_i h + b_i - 1)`, `f = sigmoid(W_f h + b_f + 1)`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.into, self.forget = (_linear(width) for _ in range(3))

    def forward(self, memory: Tensor, written: Tensor) -> Tensor:
        i, f = torch.sigmoid(self.into(written) - 1), torch.sigmoid(self.forget(written) + 1)
        return memory * f + torch.tanh(self.value(written)) * i


GATES: dict[str, type[FixedGate | LSTMGate]] = {"fixed": FixedGate, "lstm": LSTMGate}


def _linear(width: int) -> nn.Linear:
    """Small weights, so that gates begin near their offsets, as published."""
    made = nn.Linear(width, width)
    nn.init.normal_(made.weight, std=(0.1 / width) ** 0.5)
    nn.init.zeros_(made.bias)
    return made
