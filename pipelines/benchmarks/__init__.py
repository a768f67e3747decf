"""What `benchmark` measures: the benchmarks by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import core, ingest, memory
from .measuring import Job


class Benchmark(NamedTuple):
    """How one is run, and the sizes for a device, full or quick."""

    run: Callable[[Job], dict[str, Any]]  # gives at least "promises": name -> whether it is kept
    sizes: Callable[[str, bool], Any]


BENCHMARKS = {
    "core": Benchmark(core.core, core.sizes),
    "memory": Benchmark(memory.memory, memory.sizes),
    "ingest": Benchmark(ingest.ingest, ingest.sizes),
}
