"""How many rows a batch has, so that a row gives the same bits whatever stands beside it.

A matrix product's kernel is chosen by its shape: with other numbers of rows a row may be summed in another order. And
where a vector instruction's width does not divide a batch, its last elements are computed by other instructions than
the rest. Either way a row's last bits differ, which can decide between two tokens. So for each shape of work, numbers
of rows are used only if on this machine, with this model, random rows come out of them with the bits of a reference: on
a CPU a segment's row alone, elsewhere, and for single tokens, the row in a batch of the largest number. Batches are
filled up to such a number. Where a row's bits depend on its place even so, rows of that shape are run one by one.

Found by trial, when a shape is first used: what holds for some random rows is assumed for all, as kernels are chosen by
shapes and not by values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from rmt_core import state as states
from rmt_core.state import State

from .scheduling import Shape

Compute: TypeAlias = Callable[[Sequence[int]], State]  # indices of rows -> tensors, row i of the row at index i
Draw: TypeAlias = Callable[[Shape, int], Compute]  # so many random rows, to be computed in any choice and order


class BatchSizes:
    """Runs batches in such numbers of rows that each row comes out as it does alone."""

    def __init__(self, largest: Mapping[str, int], draw: Draw, *, alone: Sequence[str], num_trials: int) -> None:
        """`num_trials` 0: batches have as many rows as are meant, and rows are equal up to rounding."""
        self.largest = largest  # rows of a batch, by stage
        self.draw = draw
        self.alone = alone  # stages in which the reference is a row alone
        self.num_trials = num_trials
        self._sizes: dict[Shape, list[int]] = {}

    def of(self, shape: Shape) -> list[int]:
        """The numbers of rows that agree, ascending; [1]: rows are run one by one."""
        if shape not in self._sizes:
            self._sizes[shape] = self._find(shape)
        return self._sizes[shape]

    def run(self, shape: Shape, num_rows: int, compute: Compute) -> State:
        """What `compute` gives for rows 0, 1, ...; indices from `num_rows` on, asked for too, are to fill a batch."""
        if not self.num_trials:
            return compute(range(num_rows))
        sizes = self.of(shape)
        size = next((size for size in sizes if size >= num_rows), sizes[-1])
        parts = [compute(range(start, start + size)) for start in range(0, num_rows, size)]
        return parts[0] if len(parts) == 1 else states.stack(parts)

    def _find(self, shape: Shape) -> list[int]:
        largest = self.largest[shape.stage]
        sizes = [*(1 << n for n in range((largest - 1).bit_length())), largest]
        for _ in range(self.num_trials):
            compute = self.draw(shape, largest)
            if shape.stage in self.alone:
                wanted, reference = states.stack([compute([i]) for i in range(largest)]), 1
            else:
                wanted, reference = compute(range(largest)), largest
                moved = [*range(1, largest), 0]
                if not _agree(compute(moved), wanted, moved):
                    return [1]
            sizes = [n for n in sizes if n == reference or _agree(compute(range(n)), wanted, range(n))]
        return sizes


def _agree(found: State, wanted: State, rows: Sequence[int]) -> bool:
    """Whether row i of `found` is row `rows[i]` of `wanted`, bit for bit, for all i."""
    return all(torch.equal(a, b[list(rows)]) for a, b in zip(states.leaves(found), states.leaves(wanted), strict=True))
