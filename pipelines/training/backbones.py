"""What a run begins with at hand, a backbone or a trained model: from s3:// to this machine's disk while it is read."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.training.settings import TrainConfig

CONFIG = "config.json"  # of such a directory


def is_remote(config: TrainConfig) -> bool:
    """Whether the run's directory has to be brought to where it is read."""
    return config.model.directory is not None and storage.is_s3(config.model.directory)


def with_directory(config: TrainConfig, folder: str) -> TrainConfig:
    name = config.model.directory_field.removeprefix("model.")
    return config.model_copy(update={"model": config.model.model_copy(update={name: folder})})


@contextlib.contextmanager
def brought(config: TrainConfig) -> Iterator[TrainConfig]:
    """The configuration with its directory on this machine as long as the block runs, weights and all. InputError."""
    if not is_remote(config):
        yield config
        return
    with storage.local_directory(str(config.model.directory)) as folder:
        yield with_directory(config, str(folder))


@contextlib.contextmanager
def described(config: TrainConfig) -> Iterator[TrainConfig]:
    """The same without the weights: enough for the shape of the model. InputError where there is no such directory."""
    if not is_remote(config):
        yield config
        return
    named = str(config.model.directory)
    if not storage.exists(storage.join(named, CONFIG)):
        saved_by = "Hugging Face" if config.model.start is None else "training"
        raise InputError(
            f"{config.model.directory_field} {named!r} holds no {CONFIG}; give a directory saved by {saved_by}"
        )
    with tempfile.TemporaryDirectory(prefix="rmt-") as folder:
        (Path(folder) / CONFIG).write_bytes(storage.read_bytes(storage.join(named, CONFIG)))
        yield with_directory(config, folder)


def apart(description: rmt_core.ModelConfig) -> rmt_core.ModelConfig:
    """The configuration with what it reads from a backbone's directory, which may then go."""
    return dataclasses.replace(description, backbone=description.to_json()["backbone"])
