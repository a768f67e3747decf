"""Whether a run's workers can ever start on the machine that it is alone on."""

from collections.abc import Mapping

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
