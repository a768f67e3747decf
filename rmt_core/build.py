"""A configuration made into a model."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import torch

from .backbone import FAMILIES, Backbone, load_lm
from .backbone_config import config_from
from .config import DTYPES, FEED_FORWARDS, ModelConfig
from .memory import MEMORIES
from .memory.base import Dimensions, Memory
from .memory.composed import ComposedMemory
from .recurrent import RecurrentModel

ConfigT = TypeVar("ConfigT", bound=Any)


def build(config: ModelConfig | None = None, **settings: Any) -> RecurrentModel:
    """The model of a configuration, or of its fields as keywords: `build(backbone=..., memory="rmt", segment_len=512)`.

    Weights come from the backbone's directory, or are random (seed them with `torch.manual_seed`). The model is in
    evaluation mode: call `train()` for dropout. Raises ValueError where the parts do not fit each other.
    """
    config = configured(ModelConfig, config, settings)
    dtype = DTYPES[config.dtype]
    backbone = Backbone(load_lm(config.backbone, dtype))
    if config.feed_forward is not None:
        replace_feed_forwards(backbone, config.feed_forward, dtype)
    memory = build_memory(config.memory, backbone.dimensions).to(dtype)
    return RecurrentModel(backbone, memory, on_its_own(config, FAMILIES)).eval()


def configured(kind: type[ConfigT], config: ConfigT | None, settings: dict[str, Any]) -> ConfigT:
    """The configuration that was given, or one of keywords."""
    if config is None:
        return kind(**settings)
    if settings:
        raise ValueError(f"give a configuration or keywords, not both: {', '.join(settings)}")
    if not isinstance(config, kind):
        given = type(config).__name__
        raise ValueError(f"the configuration is a {given}; give a {kind.__name__}, or its fields as keywords")
    return config


def on_its_own(config: ConfigT, families: Collection[str]) -> ConfigT:
    """The configuration without need of the backbone's directory or of an object that the caller may change."""
    return dataclasses.replace(config, backbone=config_from(config.backbone, families))


def build_memory(memory: Sequence[dict[str, Any]], dimensions: Dimensions) -> Memory:
    """The memory of checked settings, or the composition of several."""
    members = []
    for settings in memory:
        kind = MEMORIES[settings["kind"]]
        members.append(kind(_own_config(kind.Config, settings), dimensions))
    if len(members) == 1:
        return members[0]
    names = [settings["kind"] for settings in memory]
    for what in ("is_cache", "computes_attention"):
        both = [repr(name) for name, member in zip(names, members, strict=True) if getattr(member, what)]
        if len(both) > 1:
            does = "has attention see earlier segments' inputs" if what == "is_cache" else "computes attention itself"
            raise ValueError(f"memories {' and '.join(both)} cannot be combined: each {does}; use one of them")
    return ComposedMemory(members, dimensions)


def replace_feed_forwards(backbone: Backbone, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Put what the settings name in the place of some layers' feed-forward parts."""
    kind = FEED_FORWARDS[settings["kind"]]
    config = _own_config(kind.Config, settings)
    num_layers = backbone.dimensions.num_layers
    layers = range(num_layers) if config.layers is None else config.layers
    if any(layer >= num_layers for layer in layers):
        raise ValueError(f"feed_forward.layers is {list(layers)}; the backbone has layers 0 to {num_layers - 1}")
    for layer in layers:
        part = kind(config, backbone.dimensions.width, backbone.lm.config.initializer_range)
        backbone.replace_feed_forward(layer, part.to(dtype))


def _own_config(config: type[Any], settings: dict[str, Any]) -> Any:
    """The configuration of a kind from settings that name the kind too."""
    return config(**{field.name: settings[field.name] for field in dataclasses.fields(config)})
