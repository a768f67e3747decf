"""The directory of a run: what an earlier start left there, its whole checkpoints, and the model it ends with."""

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rmt_core
from pipelines import storage
from pipelines.claim import CLAIM
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
_CHECKPOINT = re.compile(r"checkpoint_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}")  # as Ray Train names them, by time
_SECTIONS = {"output", "curriculum", "workers"}  # of a run's configuration, unlike any other


def earlier(config: TrainConfig, identity: Identity) -> dict[str, Any] | None:
    """The result of a finished run with the same settings; refuses what would mix runs."""
    if storage.exists(config.output) and not storage.is_directory(config.output):
        raise InputError(f"{config.output} is a file; --output needs a directory")
    names = storage.list_names(config.output) if storage.exists(config.output) else []
    _check_ours(config.output, names)
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


def _check_ours(output: str, names: list[str]) -> None:
    """Refuses a directory that holds something else: a run would write over it. Hidden files are nobody's."""
    others = [name for name in names if not name.startswith(".") and name != CLAIM]
    if not others or REGISTRY in names or (CONFIG in names and _is_configuration(storage.join(output, CONFIG))):
        return
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    raise InputError(f"{output} holds {others[0]}{more} and no training run; give an --output that is new or empty")


def _is_configuration(uri: str) -> bool:
    """Whether a file is the configuration of a run."""
    try:
        found = storage.read_json(uri)
    except (ValueError, IsADirectoryError):
        return False
    return isinstance(found, dict) and found.keys() >= _SECTIONS


def _check_origin(config: TrainConfig, identity: Identity) -> None:
    """Refuses a checkpoint that this run cannot begin with."""
    if not storage.exists(storage.join(config.resume, checkpoints.PROGRESS)):
        raise InputError(f"resume {config.resume!r} is no checkpoint; give a checkpoint_* directory of a run")
    other = storage.read_json(storage.join(config.resume, checkpoints.PROGRESS))
    check_same(other["identity"], identity, f"{config.resume} is of a run")
    if other["step"] >= config.num_steps:
        raise InputError(f"{config.resume} is of the last step, {other['step']}: nothing is left to do from there")


def remove_unfinished(output: str, newest: str | None = None) -> None:
    """Deletes what is named as a checkpoint and is none; nobody may be writing it.

    Nothing where the checkpoint `newest` is not on the list, of which a network disk then shows an old one.
    """
    registered = registered_checkpoints(output)
    if newest is not None and newest not in registered:
        return
    for name in storage.list_names(output):
        if _CHECKPOINT.fullmatch(name) and name not in registered:
            log.info("removing %s, which was not finished when a worker or the run was stopped", name)
            files, path = storage.filesystem(storage.join(output, name))
            with storage.disk_faults(output):
                files.delete_dir(path)


def registered_checkpoints(output: str) -> list[str]:
    """Names of the run's whole checkpoints, the oldest first: what Ray Train has registered.

    Where its list is cut off, those of which every worker's part is there.
    """
    registry = storage.join(output, REGISTRY)
    if not storage.exists(registry):
        return []
    try:
        results = storage.read_json(registry)["checkpoint_results"]
    except ValueError:
        return [name for name, _ in _complete_checkpoints(output)]
    return [result["checkpoint_dir_name"] for result in results]


def _complete_checkpoints(output: str) -> list[tuple[str, checkpoints.Progress]]:
    """Names of directories that hold every worker's part of a checkpoint, by their steps."""
    found = []
    for name in filter(_CHECKPOINT.fullmatch, storage.list_names(output)):
        files = storage.list_names(storage.join(output, name))
        if checkpoints.PROGRESS not in files:
            continue
        try:
            progress = _progress_of(output, name)
        except (ValueError, TypeError):  # cut off too
            continue
        if set(checkpoints.seals(progress)) <= set(files):
            found.append((name, progress))
    return sorted(found, key=lambda each: (each[1].step, each[0]))


def mend_registry(output: str) -> None:
    """Writes Ray Train's list of checkpoints anew where it is cut off; nobody may be writing it.

    Ray writes it in place: a kill or a full disk in that moment leaves a part. InputError where no checkpoint is whole.
    """
    registry = storage.join(output, REGISTRY)
    if not storage.exists(registry) or _is_json(registry):
        return
    whole = [(name, progress.step) for name, progress in _complete_checkpoints(output) if _is_whole(output, name)]
    if not whole:
        raise InputError(
            f"{registry} is cut off, as by a kill while it was written, and no checkpoint beside it is whole; give "
            "another --output to begin anew"
        )
    storage.write_json(registry, _registry_of(whole))
    log.warning(
        "%s was cut off, as by a kill while it was written; it lists again what is whole: checkpoints of steps %s",
        registry,
        ", ".join(str(step) for _, step in whole),
    )


def _is_json(uri: str) -> bool:
    try:
        storage.read_json(uri)
    except ValueError:
        return False
    return True


def _is_whole(output: str, name: str) -> bool:
    """Whether a checkpoint matches its checksums; reads all of it."""
    where = storage.join(output, name)
    try:
        with storage.local_directory(where) as folder:
            storage.check_sums(folder, where)
    except storage.DamagedError as error:
        log.warning("%s", error)
        return False
    return True


def _registry_of(whole: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """What Ray Train would have written of checkpoints by (name, step), the oldest first."""
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {"step": step}} for name, step in whole]
    return {
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _progress_of(output: str, name: str) -> checkpoints.Progress:
    return checkpoints.Progress(**storage.read_json(storage.join(output, name, checkpoints.PROGRESS)))


def last_progress(output: str) -> checkpoints.Progress:
    """Of the run's last checkpoint; there is one."""
    return _progress_of(output, registered_checkpoints(output)[-1])


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
