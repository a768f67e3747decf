"""What `benchmark` measures: the benchmarks by name."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from . import core, ingest, memory, summarise
from .measuring import Job


class Benchmark(NamedTuple):
    """How one is run, and the sizes for a device, full or quick."""

    run: Callable[[Job], dict[str, Any]]  # gives at least "promises": name -> whether it is kept
    sizes: Callable[[str, bool], Any]


def _named(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is called: what needs the whole distribution."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"pipelines.benchmarks.{module}"), function)(*arguments)

    return call


BENCHMARKS = {
    "core": Benchmark(core.core, core.sizes),
    "memory": Benchmark(memory.memory, memory.sizes),
    "ingest": Benchmark(ingest.ingest, ingest.sizes),
    "summarise": Benchmark(summarise.summarise, summarise.sizes),
    "train": Benchmark(_named("train", "train"), _named("train", "sizes")),
    "serve": Benchmark(_named("serving", "serve"), _named("serving", "sizes")),
    "serve_http": Benchmark(_named("serving_http", "serve_http"), _named("serving_http", "sizes")),
}
