"""Back-propagation through segments: full, truncated and checkpointed.

Axes: B rows, N tokens of a text.
"""

import torch
from torch import Tensor

from . import state as states
from .recurrent import IGNORED, RecurrentModel, cut

MODES = ("full", "truncated", "checkpoint")


def backward(
    model: RecurrentModel,
    tokens: Tensor,
    labels: Tensor,
    mode: str = "full",
    bptt_segments: int | None = None,
    generator: torch.Generator | None = None,
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """Add the gradient of the mean loss to each parameter's `.grad`; returns that loss, nats per label, detached.

    tokens and labels (B, N) as in `RecurrentModel.forward`. Modes:
    `full` keeps all segments' activations; `checkpoint` gives the same gradient and keeps one segment's, computing each
    forward pass twice; `truncated` goes through windows of `bptt_segments` segments, exactly inside a window and not at
    all across its edge, and keeps one window's activations.
    """
    check_mode(mode, bptt_segments)
    segments = cut(tokens, labels, lengths, model.segment_len)
    count = (labels != IGNORED).sum().clamp(min=1)
    window = bptt_segments if bptt_segments is not None else len(segments)
    state, total = model.init_state(len(tokens)), tokens.new_zeros((), dtype=torch.float64)
    for start in range(0, len(segments), window):
        part = model.unroll(
            segments[start : start + window], state, checkpointed=mode == "checkpoint", generator=generator
        )
        loss = part.loss_sum / count + part.aux * (len(part.nats) / len(segments))
        if loss.requires_grad:
            loss.backward()
        state, total = states.detach(part.state), total + loss.detach()
    return total


def check_mode(mode: str, bptt_segments: int | None) -> None:
    """A ValueError where the mode is unknown, or does not go with `bptt_segments`."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    if (mode == "truncated") != (bptt_segments is not None):
        raise ValueError(f"bptt_segments is {bptt_segments} in mode {mode!r}; give it with 'truncated' and only there")
    if bptt_segments is not None and bptt_segments < 1:
        raise ValueError(f"bptt_segments is {bptt_segments}; it must be at least 1")
