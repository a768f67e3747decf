"""What a run costs: wall clock, and the most memory that the process, or the GPU, held meanwhile."""

import time
from pathlib import Path

import torch

from pipelines.tasks.base import Figure

SECONDS, PEAK_BYTES = COSTS = ("seconds", "peak_bytes")

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Meter:
    """Measures from when it is made. A process keeps its high-water mark over all it does, so the mark is set anew."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.knows_peak = True
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.knows_peak = _reset_mark()
        self.began = time.perf_counter()

    def figures(self) -> list[Figure]:
        """Seconds, and bytes where the system tells them."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        found = [Figure(SECONDS, time.perf_counter() - self.began)]
        return [*found, Figure(PEAK_BYTES, float(self._peak_bytes()))] if self.knows_peak else found

    def _peak_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def _reset_mark() -> bool:
    """Whether this process's high-water mark could be set to what it holds now (proc(5), clear_refs)."""
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or a container that hides it: another run's peak is no figure of this one
        return False
    return True
