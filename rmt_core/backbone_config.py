"""The configuration of a Hugging Face model: where it comes from, and whether it is one that can be used."""

import copy
import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

# Older names that are still understood, and `head_dim`, which models follow whose families do not name it.
_KNOWN_TO_ALL = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "head_dim")
_WRITTEN = {"transformers_version", "return_dict"}  # one of them is in every config.json and every `to_dict()`


def supported(kind: Any, families: Collection[str]) -> str:
    """The name of a family, or a ValueError with the list of those there are."""
    if kind not in families:
        raise ValueError(f"backbone {kind!r} is not supported; supported are {', '.join(sorted(families))}")
    return kind


def config_from(source: str | Path | dict[str, Any] | PretrainedConfig, families: Collection[str]) -> PretrainedConfig:
    """A backbone's configuration, of a Hugging Face directory, a dictionary with `model_type` or a copy; ValueError."""
    if isinstance(source, PretrainedConfig):
        return copy.deepcopy(source)
    if not isinstance(source, str | Path | dict):
        raise ValueError(f"backbone is {source!r}; give a directory saved by Hugging Face, or a configuration")
    settings = dict(source) if isinstance(source, dict) else _saved_settings(Path(source) / "config.json")
    kind = supported(settings.pop("model_type", None), families)
    if isinstance(source, dict):
        _refuse_unknown(kind, settings)
    try:
        if isinstance(source, dict):
            return AutoConfig.for_model(kind, **settings)
        return AutoConfig.from_pretrained(str(source), local_files_only=True)
    except Exception as error:  # transformers has kinds of its own for values that it refuses
        raise ValueError(f"the {kind} backbone's configuration is not valid: {' '.join(str(error).split())}") from error


def _refuse_unknown(kind: str, settings: dict[str, Any]) -> None:
    """A ValueError for a setting that the family does not have: transformers would keep it and change nothing.

    What transformers has written itself passes: models are published with settings that it does not know.
    """
    if _WRITTEN & settings.keys():
        return
    family = CONFIG_MAPPING[kind]
    known = {*family().to_dict(), *family.attribute_map, *_KNOWN_TO_ALL}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"the {kind} backbone has no setting {name!r}; {hint}")


def _saved_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"backbone {str(file.parent)!r} has no {file.name}; give a directory saved by Hugging Face")
    try:
        return dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no model's configuration: {error}") from error
