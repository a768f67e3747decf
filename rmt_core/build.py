"""A configuration made into a model."""

import dataclasses
from typing import Any

from .backbone import Backbone, load_lm
from .config import DTYPES, ModelConfig
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
    memory = build_memory(config, backbone.dimensions).to(dtype)
    return RecurrentModel(backbone, memory, config).eval()


def build_memory(config: ModelConfig, dimensions: Dimensions) -> Memory:
    """The memory, or the composition of several."""
    members = []
    for settings in config.memory:
        kind = MEMORIES[settings["kind"]]
        fields = {field.name: settings[field.name] for field in dataclasses.fields(kind.Config)}
        members.append(kind(kind.Config(**fields), dimensions))
    return members[0] if len(members) == 1 else ComposedMemory(members, dimensions)
