"""What a worker watches its run with, beside the losses: probe, profiler, figures of the memory and of the speed.

Axes: R rows of a worker, K segments of a window.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

import rmt_core
from pipelines.data.lanes import Window
from pipelines.training.costs import outline, segment_cost
from pipelines.training.peaks import device_peak
from pipelines.training.probe import Probe, Texts
from pipelines.training.profiling import Profiler
from pipelines.training.records import Metrics, peak_memory_bytes
from pipelines.training.settings import TrainConfig
from pipelines.training.states import state_figures
from rmt_core import SegmentBatch
from rmt_core.state import State


class Instruments:
    """All workers have them, and call them at the same steps."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Any,
        description: rmt_core.ModelConfig,
        numbers: Sequence[int],
        texts: Texts | None,
    ) -> None:
        """`numbers` are those of this worker's lanes, which are the rows of `texts` that it probes."""
        self.engine, self.every, self.seed = engine, config.report.probe_every, config.seed
        self.probe = None if texts is None else Probe(texts, numbers, engine.device)
        self.probed: Metrics = {}
        self.moved: tuple[Sequence[Window], State, State] | None = None  # the last step's windows, state before, after
        span = config.report.profile
        self.profiler = None if span is None else Profiler(span, config.output, dist.get_rank())
        self.peak_flops = config.report.peak_flops or device_peak(engine.device, config.workers.precision)
        self.flops_per_token = 0.0
        if self.peak_flops is not None and dist.get_rank() == 0:
            cost = segment_cost(outline(description, config.model))
            self.flops_per_token = (cost.forward_flops + cost.backward_flops) / description.segment_len

    def before_step(self, step: int) -> None:
        """To be called before optimiser step `step`, counted from 0."""
        if self.profiler is not None:
            self.profiler.before_step(step)

    def after_step(self, step: int, windows: Sequence[Window], before: State, after: State) -> None:
        """To be called after it, with the windows that it read, the state that it found and the one that it left."""
        self.moved = windows, before, after
        if self.profiler is not None:
            self.profiler.after_step(step)
        if self.probe is not None and self.every is not None and (step + 1) % self.every == 0:
            self.probed = self.probe.losses(self.engine.module, self._forward, after)

    def _forward(self, segments: list[SegmentBatch], state: State) -> Tensor:
        """Nats of labels (R, K, T). A memory that samples draws the same in every probe."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack(self.engine.module(segments, state, generator).nats, dim=1)

    def figures(self, tokens_per_s: float) -> Metrics:
        """Of the last step, and of a probe since they were last asked for; every worker calls it."""
        assert self.moved is not None, "figures are of a step"
        windows, before, after = self.moved
        follows = [~window.reset.any(axis=1) & (window.lengths > 0).any(axis=1) for window in windows]  # (R,) each
        followed = torch.from_numpy(np.logical_and.reduce(follows)).to(self.engine.device)
        held = torch.tensor(
            float(peak_memory_bytes(self.engine.device)), dtype=torch.float64, device=self.engine.device
        )
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        found = state_figures(before, after, followed) | {"peak_memory_bytes": int(held)} | self.probed
        self.probed = {}
        if self.peak_flops is not None:
            used = tokens_per_s * self.flops_per_token
            found["mfu_fraction"] = used / (self.peak_flops * dist.get_world_size())
        return found

    def close(self) -> None:
        if self.profiler is not None:
            self.profiler.close()
