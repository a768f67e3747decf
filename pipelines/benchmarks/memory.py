"""What memories cost, what training them exactly costs, and what running them well saves: the parts of `memory`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import kinds, orders, replay
from .measuring import Job, tell


@dataclass(frozen=True)
class Sizes:
    """How much each part measures."""

    replay: replay.Sizes
    kinds: kinds.Sizes
    orders: orders.Sizes


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes for a device, or tiny ones."""
    return Sizes(replay.sizes(quick), kinds.sizes(quick), orders.sizes(device, quick))


# Each gives its figures, "promises" among them: name -> whether it is kept.
PARTS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "replay": replay.replay,
    "kinds": kinds.kinds,
    "orders": orders.orders,
}


def memory(job: Job) -> dict[str, Any]:
    """All parts, one after the other."""
    figures: dict[str, Any] = {}
    promises: dict[str, bool] = {}
    for name, measure in PARTS.items():
        figures[name] = measure(getattr(job.sizes, name), job.device)
        promises |= figures[name].pop("promises")
        tell("")
    for promise, kept in promises.items():
        tell(f"{promise:>30} {'not judged' if job.quick else 'kept' if kept else 'MISSED'}")
    return {"promises": promises, **figures}
