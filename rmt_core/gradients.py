"""Back-propagation through segments: full, truncated, checkpointed and replayed.

Axes: B rows, N tokens of a text.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import state as states
from .random_state import RandomState, devices_of
from .recurrent import IGNORED, Batch, RecurrentModel, SegmentModel, Unrolled, check_bptt, cut
from .state import State

MODES = ("full", "truncated", "checkpoint", "replay")

Backward: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Any]  # roots and their gradients
Loss: TypeAlias = Callable[[Unrolled], Tensor]  # a part's share of the loss, (); shares of consecutive parts add up


def backward(
    model: RecurrentModel,
    tokens: Tensor,
    labels: Tensor,
    mode: str = "full",
    bptt_segments: int | None = None,
    generator: torch.Generator | None = None,
    *,
    lengths: Tensor | None = None,
    exact_depth: bool = False,
) -> Tensor:
    """Add the gradient of the mean loss to each parameter's `.grad`; returns that loss, nats per label, detached.

    tokens and labels (B, N) as in `RecurrentModel.forward`; the modes are those of `backward_segments`.
    """
    segments = cut(tokens, labels, lengths, model.segment_len)
    state = model.init_state(len(tokens))
    result = backward_segments(model, segments, state, mode, bptt_segments, generator, exact_depth=exact_depth)
    return result.loss.to(torch.float64)


def backward_segments(
    model: SegmentModel[Batch],
    segments: Sequence[Batch],
    state: State,
    mode: str = "full",
    bptt_segments: int | None = None,
    generator: torch.Generator | None = None,
    *,
    exact_depth: bool = False,
    loss: Loss | None = None,
) -> Unrolled:
    """Add the gradient of the loss over consecutive segments to each `.grad`; returns its parts, all detached.

    Modes: `full` keeps all segments' activations. `checkpoint` and `replay` give the same gradient and keep one
    segment's, computing each forward pass twice: `checkpoint` in one backward pass, `replay` in one a segment.
    `truncated` goes through windows of `bptt_segments` segments, exactly inside a window and not at all across its
    edge, and keeps one window's activations. With `exact_depth` each segment's loss has a window of its own instead,
    which ends with that segment and starts from the true state: every loss goes back through exactly `bptt_segments`
    segments, its own included, at as many times the cost.

    The gradient goes on into `state` where that has one. `loss` makes a part of the loss from consecutive segments'
    `Unrolled`; by default parts add up to `Unrolled.loss` over all. Whatever is computed again draws the same random
    numbers, and afterwards the random states, `generator`'s too, are as if each segment had been run once.
    """
    check_mode(mode, bptt_segments, exact_depth)
    if not segments:
        raise ValueError("there are no segments to go back through; give at least one")
    share = _shares(segments) if loss is None else loss
    if mode == "replay":
        return replay(model, segments, state, loss=share, generator=generator)
    if bptt_segments is not None and exact_depth:
        return _exact_depth(model, segments, state, bptt_segments, share, generator)
    window = bptt_segments if bptt_segments is not None else len(segments)
    parts = []
    for start in range(0, len(segments), window):
        part = model.unroll(
            segments[start : start + window], state, checkpointed=mode == "checkpoint", generator=generator
        )
        _go_back(share(part))
        parts.append(part.values())
        state = states.detach(part.state)
    return _together(parts, state)


def check_mode(mode: str, bptt_segments: int | None, exact_depth: bool = False) -> None:
    """A ValueError where the mode is unknown, or does not go with the other two."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    if (mode == "truncated") != (bptt_segments is not None):
        raise ValueError(f"bptt_segments is {bptt_segments} in mode {mode!r}; give it with 'truncated' and only there")
    check_bptt(bptt_segments)
    if exact_depth and mode != "truncated":
        raise ValueError(f"exact_depth is set in mode {mode!r}; give it with 'truncated' and only there")


def replay(
    model: SegmentModel[Batch],
    segments: Sequence[Batch],
    state: State,
    *,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    unroll: Callable[[Sequence[Batch], State], Unrolled] | None = None,
    backward: Backward = torch.autograd.backward,
) -> Unrolled:
    """Memory replay back-propagation (Memformer, arXiv:2010.06891, Algorithm 1), with a loss on any segments.

    Runs all segments but the last without gradient, keeping the states between them and where the random numbers
    stood. Then, from the last to the first, computes a segment again from its state as leaves, and goes back once from
    its loss and the state after it, whose gradient the segment behind it left. The first starts from `state` itself, so
    the gradient goes on into a learned initial state. Deviations from the paper: one backward pass a segment with
    several roots instead of two, so that gradient hooks fire once; the last segment is run once.

    `loss` gives what to go back from, for one segment; by default the segments' sum is `Unrolled.loss`. Where a wrapper
    shards or synchronises gradients, `unroll` computes a segment's loss through the wrapper (`model.unroll` by
    default) and `backward` is called with the roots, the loss first, and their gradients, None being the loss's;
    `rmt_core.joined` makes one scalar of them. A scale on the loss must then be the same for all segments, and must not
    touch the other roots' gradients, which have it already.
    """
    if not segments:
        raise ValueError("there are no segments to replay; give at least one")
    share = _shares(segments) if loss is None else loss
    compute = partial(model.unroll, generator=generator) if unroll is None else unroll
    devices = devices_of(model)
    before, drawn = [state], [RandomState(devices, generator)]
    with torch.no_grad():
        for segment in segments[:-1]:
            before.append(model.state_after(segment, before[-1], generator))
            drawn.append(RandomState(devices, generator))
    last: State = None
    gradients: list[Tensor | None] = []
    parts: list[Unrolled] = []
    for i in reversed(range(len(segments))):
        given = _as_leaves(before.pop()) if i else state
        held = states.leaves(given)  # now, as wrappers replace what a dictionary holds by views of it
        with drawn[i].again() if parts else nullcontext():
            part = compute(segments[i : i + 1], given)
        after = states.leaves(part.state)
        if not parts:
            last, gradients = states.detach(part.state), [None] * len(after)
        _go_back(share(part), after, gradients, backward)
        gradients = [leaf.grad for leaf in held] if i else []
        parts.append(part.values())
    return _together(parts[::-1], last)


def _exact_depth(
    model: SegmentModel[Batch],
    segments: Sequence[Batch],
    state: State,
    depth: int,
    share: Loss,
    generator: torch.Generator | None,
) -> Unrolled:
    """Each segment's loss back through `depth` segments, which are run again from the state before them."""
    devices = devices_of(model)
    first = states.tree_map(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), state)
    before: deque[tuple[State, RandomState]] = deque(maxlen=depth)
    current, parts = first, []
    for i, segment in enumerate(segments):
        before.append((current, RandomState(devices, generator)))
        carried, drawn = before[0]
        drawn.put_back()
        for earlier in segments[i + 1 - len(before) : i]:
            carried = model.state_after(earlier, carried, generator)
        part = model.unroll([segment], carried, generator=generator)
        _go_back(share(part))
        parts.append(part.values())
        current = states.detach(part.state)
    # Windows that began at the given state left their gradients at `first`: what made that state is gone through once.
    _go_back(None, states.leaves(state), [leaf.grad for leaf in states.leaves(first)])
    return _together(parts, current)


def _go_back(
    loss: Tensor | None,
    tensors: Sequence[Tensor] = (),
    gradients: Sequence[Tensor | None] = (),
    backward: Backward = torch.autograd.backward,
) -> None:
    """One backward pass from the loss and from those tensors that have a gradient."""
    roots: list[tuple[Tensor, Tensor | None]] = [] if loss is None or not loss.requires_grad else [(loss, None)]
    pairs = zip(tensors, gradients, strict=True)
    roots += [(tensor, grad) for tensor, grad in pairs if grad is not None and tensor.requires_grad]
    if roots:
        backward([root for root, _ in roots], [grad for _, grad in roots])


def _as_leaves(state: State) -> State:
    """The same values as new leaves of autograd; whole numbers have no gradient."""
    return states.tree_map(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), state)


def _shares(segments: Sequence[Any]) -> Loss:
    """The loss of which parts add up to `Unrolled.loss` over all segments."""
    weight = torch.stack([_weight(segment) for segment in segments]).sum()
    weight = weight.where(weight > 0, 1)
    return lambda part: part.loss_sum / weight + part.aux * (len(part.nats) / len(segments))


def _weight(segment: Any) -> Tensor:
    asked = segment.labels != IGNORED
    return asked.sum() if segment.weights is None else (segment.weights * asked).sum()


def _together(parts: Sequence[Unrolled], state: State) -> Unrolled:
    """The values of consecutive parts as one, with the state after the last."""
    nats = tuple(each for part in parts for each in part.nats)
    aux = torch.stack([part.aux * len(part.nats) for part in parts]).sum() / len(nats)
    loss_sum = torch.stack([part.loss_sum for part in parts]).sum()
    return Unrolled(loss_sum, torch.stack([part.weight for part in parts]).sum(), aux, nats, state)
