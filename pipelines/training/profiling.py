"""A trace of some steps by the torch profiler, one file a worker."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipelines import storage
from pipelines.training.settings import Span


class Profiler:
    """Records the steps of a span into `profile/worker_00000.json.gz` of the run's directory.

    The files are Chrome traces: chrome://tracing, Perfetto and TensorBoard's profiler plugin open them. A run that goes
    on from within the span records the rest of it.
    """

    def __init__(self, span: Span, output: str, rank: int) -> None:
        self.span = span
        self.uri = storage.join(output, "profile", f"worker_{rank:05d}.json.gz")
        self.running: profile | None = None

    def before_step(self, step: int) -> None:
        """To be called before each optimiser step, counted from 0."""
        if self.running is None and self.span.start <= step < self.span.stop:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.running = profile(activities=activities, record_shapes=True, profile_memory=True)
            self.running.start()

    def after_step(self, step: int) -> None:
        """To be called after each optimiser step, with the same number."""
        if self.running is not None and step + 1 >= self.span.stop:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if the span has begun; a run that stops within it calls this."""
        if self.running is None:
            return
        self.running.stop()
        with tempfile.TemporaryDirectory(prefix="rmt-") as folder:
            path = Path(folder) / "trace.json.gz"  # by its name the profiler packs it
            self.running.export_chrome_trace(str(path))
            storage.write_bytes(self.uri, path.read_bytes())
        self.running = None
