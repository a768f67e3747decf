"""Whether a run's workers can ever start on the machine that it is alone on, and how many have room in a cluster."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import InputError
from pipelines.training.settings import WorkerSettings


def check_room(workers: WorkerSettings, there: Mapping[str, float]) -> None:
    """InputError where the fewest workers need more cores or GPUs than there are: Ray would wait for them for ever."""
    least = workers.num_workers[0]
    cores, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if workers.use_gpu and gpus < least:
        raise InputError(
            f"workers.num_workers {least} with a GPU each, but this machine has {gpus:g}; set workers.use_gpu no, "
            "fewer workers, or RAY_ADDRESS to a cluster that has them"
        )
    if least * workers.cpus > cores:
        raise InputError(
            f"workers.num_workers {least} x workers.cpus {workers.cpus:g} exceeds the {cores:g} cores of this machine; "
            f"set workers.cpus to at most {cores / least:g}, fewer workers, or RAY_ADDRESS to a cluster that has them"
        )


def room_for(
    needs: Mapping[str, float], nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float], labels: Mapping[str, str]
) -> int:
    """How many workers that need so much have room, at most: by what nodes with these labels have and what is free.

    `nodes` are as `ray.nodes()` tells them, `free` is summed over all.
    """
    there = [
        node["Resources"] for node in nodes if node["Alive"] and labels.items() <= (node.get("Labels") or {}).items()
    ]
    return min(sum(_times(needs, resources) for resources in there), _times(needs, free))


def _times(needs: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return int(min(resources.get(name, 0.0) / amount for name, amount in needs.items()) + 1e-6)
