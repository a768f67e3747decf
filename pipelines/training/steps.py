"""Optimiser steps: the gradient of some windows through DeepSpeed, reduced over the workers exactly once.

Axes: R rows of a worker, K segments of a window, T tokens of a segment.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

import rmt_core
from pipelines.data.lanes import Window
from pipelines.training.engine import segments_of
from pipelines.training.settings import TrainConfig
from rmt_core import SegmentBatch, Unrolled
from rmt_core.random_state import RandomState, devices_of
from rmt_core.recurrent import SegmentModel
from rmt_core.state import State


class Agreed(NamedTuple):
    """What all workers know before a step."""

    weight: float  # of the labels of all windows and workers
    wishes: list[bool]  # that rank 0 had


class Stepped(NamedTuple):
    """What one optimiser step gave."""

    nats: list[Tensor]  # of each window: (R, K, T) of each label, detached; 0 where nothing is asked
    state: State  # after the last window, detached


class _Work(NamedTuple):
    """One window on the way back."""

    segments: Sequence[SegmentBatch]
    state: State  # before it
    share: Callable[[Unrolled], Tensor]  # of a part in the loss
    backward: Callable[[Tensor], Any]
    generator: torch.Generator  # of memories that sample


def agree(windows: Sequence[Window], wishes: Sequence[bool], device: torch.device) -> Agreed:
    """Adds up over the workers what a step needs to know, in one small reduction; wishes are rank 0's.

    RuntimeError where workers have windows of different numbers of segments: under ZeRO-3 they would wait for each
    other for ever.
    """
    weight = sum(float(window.weights[window.labels != rmt_core.IGNORED].sum(dtype=np.float64)) for window in windows)
    course = float(sum((i + 1) * window.tokens.shape[1] for i, window in enumerate(windows)))
    mine = [float(wish) for wish in wishes] if dist.get_rank() == 0 else [0.0] * len(wishes)
    sums = torch.tensor([weight, course, course**2, *mine], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    total, courses, squares, *heard = sums.tolist()
    if courses**2 != squares * dist.get_world_size():
        raise RuntimeError(f"workers have windows of different numbers of segments (here {course:.0f} in all)")
    return Agreed(total, [wish > 0 for wish in heard])


class Stepper:
    """The optimiser steps of a DeepSpeed engine around `engine.WindowLoss`, in the configured gradient mode."""

    def __init__(self, engine: Any, config: TrainConfig) -> None:
        self.engine = engine
        self.gradient = config.gradient
        self.batch_size = config.batch_size
        self.seed = config.seed
        self._wrapped = _Wrapped(engine)

    def step(
        self, windows: Sequence[Window], state: State, weight: float, *, step: int, rate: float, with_aux: bool = True
    ) -> Stepped:
        """Optimiser step number `step` over windows that each row reads one after another, at a learning rate.

        Every worker calls it with windows of as many segments. `weight` is that of all workers' labels in all windows:
        workers' shares of the loss then add up to the mean of one large batch, whatever each worker has of it.
        Auxiliary losses are part of it with `with_aux`.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        segments = [segments_of(window, self.engine.device) for window in windows]
        nats = []
        with reduced_once(self.engine, sum(map(self._num_passes, segments))) as backward:
            for i, window in enumerate(segments):
                number = step * len(windows) + i
                # Memories that sample draw the same on every worker.
                generator = torch.Generator().manual_seed(seed_of(self.seed, number))
                share = self._share(window, weight, len(windows), with_aux)
                result = self._go_back(_Work(window, state, share, backward, generator))
                nats.append(torch.stack(result.nats, dim=1))
                state = rmt_core.state.detach(result.state)
        self.engine.step()
        return Stepped(nats, state)

    def _num_passes(self, segments: Sequence[SegmentBatch]) -> int:
        """Backward passes of a window."""
        return len(segments) if self.gradient.mode == "replay" or self.gradient.exact_depth else 1

    def _share(
        self, window: Sequence[SegmentBatch], weight: float, num_windows: int, with_aux: bool
    ) -> Callable[[Unrolled], Tensor]:
        """A part's share of the loss, times the number of workers, over whom DeepSpeed takes the mean."""
        num_workers = dist.get_world_size()
        of_labels = num_workers / max(weight, 1e-30)
        of_segment = num_workers * len(window[0].tokens) / (self.batch_size * num_windows * len(window)) * with_aux
        return lambda part: part.loss_sum * of_labels + part.aux * (of_segment * len(part.nats))

    def _go_back(self, work: _Work) -> Unrolled:
        """The gradient of one window."""
        if self.gradient.mode == "replay":
            return self._replayed(work)
        if self.gradient.exact_depth:
            return self._exact_depth(work)
        result: Unrolled = self.engine(work.segments, work.state, work.generator)
        work.backward(work.share(result))
        return result

    def _replayed(self, work: _Work) -> Unrolled:
        """`rmt_core.replay` through the engine: its backward passes start from one scalar."""

        def joined(roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
            has_loss = gradients[0] is None
            loss = roots[0] if has_loss else roots[0].new_zeros((), dtype=torch.float32)
            work.backward(rmt_core.joined(loss, roots[has_loss:], gradients[has_loss:]))

        return rmt_core.replay(
            self._wrapped,
            work.segments,
            work.state,
            loss=work.share,
            generator=work.generator,
            unroll=lambda part, given: self.engine(part, given, work.generator),
            backward=joined,
        )

    def _exact_depth(self, work: _Work) -> Unrolled:
        """Each segment's loss back through the `bptt_segments` that end with it, run again from before them."""
        segments, state, generator = work.segments, work.state, work.generator
        devices = devices_of(self.engine)
        before: deque[tuple[State, RandomState]] = deque(maxlen=self.gradient.bptt_segments)
        parts: list[Unrolled] = []
        for i in range(len(segments)):
            before.append((state, RandomState(devices, generator)))
            earlier, drawn = before[0]
            drawn.put_back()
            part: Unrolled = self.engine(segments[i + 1 - len(before) : i + 1], earlier, generator, len(before) - 1)
            work.backward(work.share(part))
            parts.append(part)
            state = rmt_core.state.detach(part.state)
        return parts[-1]._replace(nats=tuple(nats for part in parts for nats in part.nats))


class _Wrapped(SegmentModel[SegmentBatch]):
    """The model as `rmt_core.replay` reads ahead with it: each segment a forward pass of the engine."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def state_after(self, segment: SegmentBatch, state: State, generator: torch.Generator | None = None) -> State:
        return self.engine([segment], state, generator, 1)


@contextlib.contextmanager
def reduced_once(engine: Any, num_passes: int) -> Iterator[Callable[[Tensor], Any]]:
    """Gives the backward pass of a loss (), to be called `num_passes` times: gradients are reduced once for all.

    ZeRO 1 to 3 keep this worker's whole gradient until the last pass. Without ZeRO, and in DeepSpeed's own optimiser
    for bfloat16, which cannot put off a reduction, the engine is told which pass is the last.
    """
    if num_passes == 1:
        yield engine.backward
        return
    with contextlib.ExitStack() as stack:
        backward = engine.backward
        try:
            stack.enter_context(engine.coalesce_grad_reduction())
        except NotImplementedError:
            backward = _CountingDown(engine, num_passes)
        yield backward


class _CountingDown:
    """Backward passes of which DeepSpeed reduces gradients after the last alone."""

    def __init__(self, engine: Any, num_passes: int) -> None:
        self.engine, self.left = engine, num_passes

    def __call__(self, loss: Tensor) -> None:
        self.left -= 1
        self.engine.set_gradient_accumulation_boundary(self.left == 0)
        self.engine.backward(loss)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
