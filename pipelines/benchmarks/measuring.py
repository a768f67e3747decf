"""Times and what they are taken of.

Axes: B rows, N tokens of a text.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

VOCAB = 1024


def prepare(device: str) -> None:
    """One thread, so that a ratio compares work and not parallelism."""
    if device == "cpu":
        torch.set_num_threads(1)


def tell(line: str) -> None:
    """A line of the table."""
    print(line, file=sys.stderr, flush=True)


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


def compare(first: Callable[[], object], second: Callable[[], object], repeats: int, device: str) -> Compared:
    """Both in turn `repeats` times (at least 2), now the one before, now the other; once before, untimed."""
    first(), second()
    pairs = []
    for i in range(repeats):
        if i % 2:
            pairs.append((seconds(first, device), seconds(second, device)))
        else:
            pairs.append((seconds(second, device), seconds(first, device))[::-1])
    first_s, second_s = (min(side) for side in zip(*pairs, strict=True))
    middle_s = [statistics.median(side) for side in zip(*pairs, strict=True)]
    quartiles = statistics.quantiles([a / b for a, b in pairs], n=4)
    return Compared(first_s, second_s, first_s / second_s, middle_s[0] / middle_s[1], [quartiles[0], quartiles[2]])
