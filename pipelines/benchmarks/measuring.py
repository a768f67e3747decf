"""Times and what they are taken of.

Axes: B rows, N tokens of a text.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig

import rmt_core
from rmt_core import RecurrentModel

VOCAB = 1024
RMT: dict[str, Any] = {"kind": "rmt", "num_tokens": 16}


class Job(NamedTuple):
    """What one benchmark is asked to do."""

    sizes: Any  # of the benchmark
    device: str
    quick: bool = False  # tiny sizes, of which no promise is judged


def prepare(device: str) -> None:
    """One thread, so that a ratio compares work and not parallelism."""
    if device == "cpu":
        torch.set_num_threads(1)


def tell(line: str) -> None:
    """A line of the table."""
    print(line, file=sys.stderr, flush=True)


def build(width: int, num_layers: int, segment_len: int, memory: Any, device: str) -> RecurrentModel:
    """A llama with random weights in float32 and heads of 64 (or 8) dimensions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // (64 if width >= 128 else 8),
        intermediate_size=width * 8 // 3,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
    )
    return rmt_core.build(backbone=config, memory=memory, segment_len=segment_len).to(device)


def random_tokens(num_rows: int, num_tokens: int, device: str) -> Tensor:
    """(B, N), always the same."""
    return torch.randint(VOCAB, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0)).to(device)


def seconds(work: Callable[[], object], device: str) -> float:
    """What `work` takes: of a CPU's one thread its own time, so that others on the machine do not count; else all."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Compared(NamedTuple):
    """Seconds of two pieces of work that took turns."""

    first_s: float  # the least
    second_s: float
    ratio: float  # of the least times, first to second: what else the machine does only adds to a time
    ratio_of_medians: float
    ratio_quartiles: list[float]  # the first and the third, of the ratios of neighbours

    def lowest(self) -> float:
        """The smaller of both ratios: a busy machine shifts the least times or the medians by several hundredths, even
        of equal work, and a first piece that is truly slower is so in both."""
        return min(self.ratio, self.ratio_of_medians)

    def highest(self) -> float:
        """The larger of both ratios, for the same reason: a second piece that is truly slower is so in both."""
        return max(self.ratio, self.ratio_of_medians)


def compare(first: Callable[[], object], second: Callable[[], object], repeats: int, device: str) -> Compared:
    """Both in turn `repeats` times (at least 2), now the one before, now the other; once before, untimed."""
    first(), second()
    taken = take_turns({"first": first, "second": second}, repeats, device)
    return compared(taken["first"], taken["second"])


def take_turns(works: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each piece of work in each of `repeats` rounds; every other round goes through them backwards."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats):
        for name in list(works)[:: 1 if i % 2 else -1]:
            taken[name].append(seconds(works[name], device))
    return taken


def compared(first: Sequence[float], second: Sequence[float]) -> Compared:
    """Seconds of two pieces of work in the same rounds, at least 2."""
    quartiles = statistics.quantiles([a / b for a, b in zip(first, second, strict=True)], n=4)
    medians = statistics.median(first) / statistics.median(second)
    return Compared(min(first), min(second), min(first) / min(second), medians, [quartiles[0], quartiles[2]])
