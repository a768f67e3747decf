"""A backbone's directory at hand: one in s3:// is brought to this machine's temporary disk while it is read."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.training.settings import TrainConfig

CONFIG = "config.json"  # of a Hugging Face directory


def is_remote(config: TrainConfig) -> bool:
    """Whether the run's backbone has to be brought to where it is read."""
    return config.model.backbone is not None and storage.is_s3(config.model.backbone)


def with_backbone(config: TrainConfig, folder: str) -> TrainConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"backbone": folder})})


@contextlib.contextmanager
def brought(config: TrainConfig) -> Iterator[TrainConfig]:
    """The configuration with its backbone on this machine as long as the block runs, weights and all. InputError."""
    if not is_remote(config):
        yield config
        return
    with storage.local_directory(str(config.model.backbone)) as folder:
        yield with_backbone(config, str(folder))


@contextlib.contextmanager
def described(config: TrainConfig) -> Iterator[TrainConfig]:
    """The same without the weights: enough for the shape of the model. InputError where there is no such directory."""
    if not is_remote(config):
        yield config
        return
    named = str(config.model.backbone)
    if not storage.exists(storage.join(named, CONFIG)):
        raise InputError(f"model.backbone {named!r} holds no {CONFIG}; give a directory saved by Hugging Face")
    with tempfile.TemporaryDirectory(prefix="rmt-") as folder:
        (Path(folder) / CONFIG).write_bytes(storage.read_bytes(storage.join(named, CONFIG)))
        yield with_backbone(config, folder)


def apart(description: rmt_core.ModelConfig) -> rmt_core.ModelConfig:
    """The configuration with what it reads from the backbone's directory, which may then go."""
    return dataclasses.replace(description, backbone=description.to_json()["backbone"])
