"""How large the memory's state is, and how far a step moves it.

Axes: B rows.
"""

import torch
from torch import Tensor
from torch import distributed as dist

import rmt_core
from rmt_core.state import State


def relative_change(before: State, after: State) -> Tensor:
    """Norm of the change over the norm before, of each row's floating-point numbers, (B,); inf or NaN from zeros."""
    moved = rmt_core.state.tree_map(lambda a, b: a - b if a.is_floating_point() else a, after, before)
    return rmt_core.state.norm(moved) / rmt_core.state.norm(before)


def state_figures(before: State, after: State, followed: Tensor) -> dict[str, float | None]:
    """`state_norm` and `state_drift`, means over the rows of all workers; every worker calls it.

    The norm is the root mean square of a row's numbers. The drift is the relative change over the last step's window,
    of the rows of this worker that `followed` (B,) bool one text in it: in others the state was begun anew. None where
    there is no state, or no such row.
    """
    norms = rmt_core.state.norm(after)
    total = torch.zeros(4, dtype=torch.float64, device=followed.device)
    if len(norms):
        change = relative_change(before, after).double()
        counted = followed & change.isfinite()
        change = change.where(counted, 0)
        total = torch.stack([norms.double().sum(), total.new_tensor(len(norms)), change.sum(), counted.double().sum()])
    dist.all_reduce(total)
    norm, num_rows, drift, num_followed = total.tolist()
    return {
        "state_norm": norm / num_rows if num_rows else None,
        "state_drift": drift / num_followed if num_followed else None,
    }
