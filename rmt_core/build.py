"""A configuration made into a model."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from .backbone import Backbone, load_lm
from .config import DTYPES, FEED_FORWARDS, ModelConfig
from .memory import MEMORIES
from .memory.base import Dimensions, Memory
from .memory.composed import ComposedMemory
from .recurrent import RecurrentModel


def build(config: ModelConfig | None = None, **settings: Any) -> RecurrentModel:
    """The model of a configuration, or of its fields as keywords: `build(backbone=..., memory="rmt", segment_len=512)`.

    Weights come from the backbone's directory, or are random (seed them with `torch.manual_seed`). The model is in
    evaluation mode: call `train()` for dropout. Raises ValueError where the parts do not fit each other.
    """
    if config is None:
        config = ModelConfig(**settings)
    elif settings:
        raise ValueError(f"give a configuration or keywords, not both: {', '.join(settings)}")
    dtype = DTYPES[config.dtype]
    backbone = Backbone(load_lm(config.backbone, dtype))
    if config.feed_forward is not None:
        replace_feed_forwards(backbone, config.feed_forward, dtype)
    memory = build_memory(config.memory, backbone.dimensions).to(dtype)
    return RecurrentModel(backbone, memory, config).eval()


def build_memory(memory: Iterable[dict[str, Any]], dimensions: Dimensions) -> Memory:
    """The memory of checked settings, or the composition of several."""
    members = []
    for settings in memory:
        kind = MEMORIES[settings["kind"]]
        members.append(kind(_own_config(kind.Config, settings), dimensions))
    return members[0] if len(members) == 1 else ComposedMemory(members, dimensions)


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
