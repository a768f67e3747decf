"""The directory of a run: what an earlier start left there, its whole checkpoints, and the model it ends with."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.data.tokenise import load_tokenizer
from pipelines.training import checkpoints
from pipelines.training.identity import Identity, check_same
from pipelines.training.settings import TrainConfig
from pipelines.training.weights import save_backbone

log = logging.getLogger(__name__)

CONFIG = "config.json"  # the driver writes it before workers start
FINISHED = "run.json"  # written last: a run without it has not reached its end
_BACKBONE = "backbone"
REGISTRY = "checkpoint_manager_snapshot.json"  # Ray Train's list of whole checkpoints; what is not on it is a left-over


def earlier(config: TrainConfig, identity: Identity) -> dict[str, Any] | None:
    """The result of a finished run with the same settings; refuses what would mix runs."""
    if storage.exists(config.output) and not storage.is_directory(config.output):
        raise InputError(f"{config.output} is a file; --output needs a directory")
    names = storage.list_names(config.output) if storage.exists(config.output) else []
    registered = registered_checkpoints(config.output)
    if config.resume == "never" and names:
        raise InputError(f"{config.output} holds a run already and resume is never; give another --output")
    if config.resume not in ("auto", "never"):
        if not registered and FINISHED not in names:
            _check_origin(config, identity)
        elif storage.read_json(storage.join(config.output, CONFIG))["resume"] != config.resume:
            raise InputError(f"{config.output} holds a run already; give another --output to start from a checkpoint")
    if FINISHED in names:
        finished = storage.read_json(storage.join(config.output, FINISHED))
        check_same(finished["identity"], identity, f"{config.output} holds a finished run")
        return dict(finished["result"])
    if registered:
        if not storage.exists(storage.join(config.output, registered[-1], checkpoints.PROGRESS)):
            raise InputError(f"{config.output} holds a run of an earlier version; give another --output")
        check_same(last_progress(config.output).identity, identity, f"{config.output} holds a run")
        log.info("going on with the run in %s from step %d", config.output, last_progress(config.output).step)
    return None


def _check_origin(config: TrainConfig, identity: Identity) -> None:
    """Refuses a checkpoint that this run cannot begin with."""
    if not storage.exists(storage.join(config.resume, checkpoints.PROGRESS)):
        raise InputError(f"resume {config.resume!r} is no checkpoint; give a checkpoint_* directory of a run")
    other = storage.read_json(storage.join(config.resume, checkpoints.PROGRESS))
    check_same(other["identity"], identity, f"{config.resume} is of a run")
    if other["step"] >= config.num_steps:
        raise InputError(f"{config.resume} is of the last step, {other['step']}: nothing is left to do from there")


def remove_unfinished(output: str) -> None:
    """Deletes what is named as a checkpoint and is none; nobody may be writing it."""
    registered = registered_checkpoints(output)
    for name in storage.list_names(output):
        if name.startswith("checkpoint_") and name not in registered and not name.endswith(".json"):
            log.info("removing %s, which was not finished when a worker or the run was stopped", name)
            files, path = storage.filesystem(storage.join(output, name))
            files.delete_dir(path)


def registered_checkpoints(output: str) -> list[str]:
    """Names of the run's whole checkpoints, the oldest first: what Ray Train has registered."""
    registry = storage.join(output, REGISTRY)
    if not storage.exists(registry):
        return []
    try:
        results = storage.read_json(registry)["checkpoint_results"]
    except ValueError as error:
        raise InputError(
            f"{registry} is not whole, as after a kill in the moment that it was written; go on from a checkpoint "
            f"with --resume {output}/checkpoint_... and another --output"
        ) from error
    return [result["checkpoint_dir_name"] for result in results]


def last_progress(output: str) -> checkpoints.Progress:
    """Of the run's last checkpoint; there is one."""
    last = registered_checkpoints(output)[-1]
    return checkpoints.Progress(**storage.read_json(storage.join(output, last, checkpoints.PROGRESS)))


def publish(config: TrainConfig) -> str:
    """Copy the last checkpoint's portable model to the run's `model`; its path."""
    target = storage.join(config.output, "model")
    with storage.local_directory(
        storage.join(config.output, registered_checkpoints(config.output)[-1], "model")
    ) as folder:
        storage.upload_directory(folder, target, marker="config.json")
        if config.report.backbone:
            with tempfile.TemporaryDirectory(prefix="rmt-") as name:
                save_backbone(name, rmt_core.load(folder), load_tokenizer(str(folder)))
                storage.upload_directory(Path(name), storage.join(config.output, _BACKBONE), marker="config.json")
    return target


def has_backbone(output: str) -> bool:
    """Whether the run's backbone has been written alone."""
    return storage.exists(storage.join(output, _BACKBONE, "config.json"))
