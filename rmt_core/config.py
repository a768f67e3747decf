"""What a model is made of, as a value that survives JSON."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import torch
from transformers import PretrainedConfig

from .memory import MEMORIES
from .ultramem import UltraMem

BackboneSource: TypeAlias = str | Path | dict[str, Any] | PretrainedConfig
FEED_FORWARDS: dict[str, type[UltraMem]] = {"ultramem": UltraMem}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A backbone, its memory and the segments they read."""

    backbone: BackboneSource
    """A directory saved by Hugging Face (its weights are taken), or a configuration (random weights): a transformers
    config object or its dictionary with `model_type`."""

    memory: Any = "none"
    """A kind ("rmt"), a dictionary of a kind and its settings ({"kind": "rmt", "num_tokens": 8}), or a list of such."""

    segment_len: int = 512
    """Tokens of a segment, without memory tokens."""

    dtype: str = "float32"
    """Type of the parameters: float32, bfloat16, float16 or float64."""

    feed_forward: Any = None
    """None for the backbone's own feed-forward parts, or what replaces those of some layers: a kind ("ultramem") or a
    dictionary of a kind and its settings ({"kind": "ultramem", "layers": [2, 4]})."""

    def __post_init__(self) -> None:
        if type(self.segment_len) is not int or self.segment_len < 1:
            raise ValueError(f"segment_len is {self.segment_len!r}; it must be a whole number of tokens, at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        object.__setattr__(self, "memory", memory_settings(self.memory))
        object.__setattr__(self, "feed_forward", feed_forward_settings(self.feed_forward))

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values; a backbone directory becomes the configuration found in it."""
        from .backbone import FAMILIES
        from .backbone_config import config_from

        backbone = config_from(self.backbone, FAMILIES).to_dict()
        return {
            "backbone": {key: value for key, value in backbone.items() if key not in NOT_KEPT},
            "memory": memory_to_json(self.memory),
            "segment_len": self.segment_len,
            "dtype": self.dtype,
            "feed_forward": None if self.feed_forward is None else _plain(self.feed_forward),
        }


# Of no meaning to the model, or naming the place it came from.
NOT_KEPT = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "id2label", "label2id")


def memory_to_json(memory: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings of each memory as JSON values."""
    return [_plain(settings) for settings in memory]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with lists for tuples, which JSON has not."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def memory_settings(memory: Any) -> tuple[dict[str, Any], ...]:
    """The memories as dictionaries with all settings written out, defaults included; checked."""
    if isinstance(memory, str | Mapping):
        memory = [memory]
    known = isinstance(memory, Sequence) and all(isinstance(item, str | Mapping) for item in memory)
    if not known or not memory:
        raise ValueError(f"memory is {memory!r}; give a kind, a dictionary with 'kind', or a list of such")
    found = tuple(_one(item, "memory", MEMORIES) for item in memory)
    kinds = [item["kind"] for item in found]
    if len(set(kinds)) < len(kinds) or (len(kinds) > 1 and "none" in kinds):
        raise ValueError(f"memories {kinds} cannot be combined; name each kind once, and 'none' alone")
    return found


def feed_forward_settings(feed_forward: Any) -> dict[str, Any] | None:
    """What replaces feed-forward parts, with all settings written out, defaults included; checked."""
    if feed_forward is None:
        return None
    if not isinstance(feed_forward, str | Mapping):
        raise ValueError(f"feed_forward is {feed_forward!r}; give a kind, or a dictionary with 'kind'")
    return _one(feed_forward, "feed_forward", FEED_FORWARDS)


def _one(item: Any, part: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """One kind of a part of the model and its settings."""
    settings = {"kind": item} if isinstance(item, str) else dict(item)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"{part} kind is {kind!r}; {_hint(kind, kinds, 'allowed: ')}")
    fields = {field.name: field for field in dataclasses.fields(kinds[kind].Config)}
    for name, value in settings.items():
        if name not in fields:
            raise ValueError(f"{part} {kind!r} has no setting {name!r}; {_hint(name, fields, 'it has ')}")
        what, types = _KNOWN_TYPES.get(fields[name].type, ("", ()))
        if what and (isinstance(value, bool) != (types is bool) or not isinstance(value, types)):
            raise ValueError(f"{part}.{name} is {value!r}; it must be {what}")
        if isinstance(value, list):  # JSON has no tuples
            settings[name] = tuple(value)
    return {"kind": kind, **dataclasses.asdict(kinds[kind].Config(**settings))}


# Types of settings that are checked here; a kind's own configuration checks the others, and all ranges.
_KNOWN_TYPES: dict[Any, tuple[str, Any]] = {
    int: ("a whole number", int),
    float: ("a number", (int, float)),
    float | None: ("a number, or None", (int, float, NoneType)),
    bool: ("true or false", bool),
    str: ("a word", str),
}


def _hint(name: object, known: Iterable[str], lead: str) -> str:
    """The known name nearest to a wrong one, or `lead` and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1) if isinstance(name, str) else []
    return f"did you mean {near[0]!r}?" if near else lead + (", ".join(names) or "none")
