"""A model as a directory: `config.json`, `model.safetensors`, and the tokenizer beside them."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .build import build
from .config import DTYPES, ModelConfig
from .encoder import EncoderConfig, EncoderModel, build_encoder
from .recurrent import RecurrentModel
from .seq2seq import Seq2SeqConfig, Seq2SeqModel, build_seq2seq

AnyConfig = ModelConfig | EncoderConfig | Seq2SeqConfig
AnyModel = RecurrentModel | EncoderModel | Seq2SeqModel
ModelT = TypeVar("ModelT", RecurrentModel, EncoderModel, Seq2SeqModel)
ConfigT = TypeVar("ConfigT")

FORMAT, ENCODER_FORMAT, SEQ2SEQ_FORMAT = "rmt-model-1", "rmt-encoder-1", "rmt-seq2seq-1"
FORMATS: dict[type[AnyConfig], str] = {
    ModelConfig: FORMAT,
    EncoderConfig: ENCODER_FORMAT,
    Seq2SeqConfig: SEQ2SEQ_FORMAT,
}
LOADERS = {FORMAT: "load", ENCODER_FORMAT: "load_encoder", SEQ2SEQ_FORMAT: "load_seq2seq"}
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"


class SavesItself(Protocol):
    """A tokenizer, as Hugging Face's are."""

    def save_pretrained(self, directory: str) -> object: ...


def tensors_of(model: AnyModel) -> dict[str, Tensor]:
    """Every parameter and saved buffer once; of tied ones the first name."""
    kept = model.state_dict().keys()
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def save(directory: str | Path, model: AnyModel, tokenizer: SavesItself | None = None) -> None:
    """Write the model so that the directory appears whole or not at all; an older one there is replaced.

    A model that was converted to another type (`model.to(torch.bfloat16)`) is saved as one of that type. ValueError
    where the directory holds anything but a saved model: that would be lost.
    """
    save_tensors(directory, model.config, tensors_of(model), tokenizer)


def save_tensors(
    directory: str | Path,
    config: AnyConfig,
    tensors: dict[str, Tensor],
    tokenizer: SavesItself | None = None,
) -> None:
    """`save` for parameters gathered by the caller, as a sharded optimiser's are."""
    target = Path(directory).resolve()
    if lost := _would_be_lost(target):
        raise ValueError(
            f"{str(target)!r} holds something else than a saved model, which would be lost: {lost}; give another"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        os.chmod(part, 0o755)
        whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, part / WEIGHTS_FILE, metadata={"format": "pt"})
        content: dict[str, Any] = {"format": FORMATS[type(config)], "model": _as_is(config, tensors).to_json()}
        if tokenizer is not None:
            tokenizer.save_pretrained(str(part))
            if (part / TOKENIZER_FILE).is_file():
                content["tokenizer"] = _hash(part / TOKENIZER_FILE)
        content["files"] = sorted([CONFIG_FILE, *os.listdir(part)])
        (part / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _as_is(config: AnyConfig, tensors: dict[str, Tensor]) -> AnyConfig:
    """The configuration with the type that all numbers have, where the model was converted after it was built."""
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    found = [name for name, dtype in DTYPES.items() if types == {dtype}]
    return dataclasses.replace(config, dtype=found[0]) if found else config


def _would_be_lost(target: Path) -> str:
    """The names of what is there and does not belong to an older model; none where there is none."""
    if not target.exists():
        return ""
    if not target.is_dir():
        return target.name
    found = set(os.listdir(target))
    try:
        saved = json.loads((target / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        saved = None
    if isinstance(saved, dict) and saved.get("format") in LOADERS:
        found -= {WEIGHTS_FILE, CONFIG_FILE, *saved.get("files", ())}
    return ", ".join(sorted(found))


def _replace(part: Path, target: Path) -> None:
    """Move `part` to `target`, whose old content steps aside until the new one stands."""
    if not target.exists():
        os.rename(part, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    os.rename(target, aside / "old")
    try:
        os.rename(part, target)
    except BaseException:
        os.rename(aside / "old", target)  # where this fails too, the older model stays aside
        os.rmdir(aside)
        raise
    shutil.rmtree(aside)


def load(directory: str | Path, device: torch.device | str = "cpu") -> RecurrentModel:
    """The model saved in a directory, in evaluation mode; a ValueError that names what is missing or does not fit."""
    return _load(Path(directory), FORMAT, ModelConfig, build).to(device).eval()


def load_config(directory: str | Path) -> ModelConfig:
    """The configuration of the model saved in a directory, without its weights; ValueError as `load`."""
    folder = Path(directory)
    return _configured(folder, _read_config(folder, FORMAT), ModelConfig)


def load_encoder(directory: str | Path, device: torch.device | str = "cpu") -> EncoderModel:
    """`load` for a directory written from an encoder."""
    return _load(Path(directory), ENCODER_FORMAT, EncoderConfig, build_encoder).to(device).eval()


def load_seq2seq(directory: str | Path, device: torch.device | str = "cpu") -> Seq2SeqModel:
    """`load` for a directory written from an encoder-decoder."""
    return _load(Path(directory), SEQ2SEQ_FORMAT, Seq2SeqConfig, build_seq2seq).to(device).eval()


def _load(folder: Path, kind: str, configure: Callable[..., ConfigT], build: Callable[[ConfigT], ModelT]) -> ModelT:
    saved = _read_config(folder, kind)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS_FILE}; it is not a whole model")
    tokenizer = folder / TOKENIZER_FILE
    if "tokenizer" in saved and not tokenizer.is_file():
        raise ValueError(f"{str(folder)!r} has no {TOKENIZER_FILE}, with which the model was saved; put it back")
    if "tokenizer" in saved and _hash(tokenizer) != saved["tokenizer"]:
        raise ValueError(
            f"{str(tokenizer)!r} is not the tokenizer that the model was saved with; put that one back, or save the "
            "model with this one"
        )
    with torch.random.fork_rng(devices=[]):  # the random weights that are filled draw from nobody's numbers
        model = build(_configured(folder, saved, configure))
    try:
        _fill(model, folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{str(folder / WEIGHTS_FILE)!r} is not a whole safetensors file: {error}") from error
    return model


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    """What `config.json` holds, of a model of this format."""
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} has no {CONFIG_FILE}; give a directory written by rmt_core.save") from None
    except ValueError as error:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r} is not JSON: {error}") from error
    if not isinstance(saved, dict) or saved.get("format") != kind:
        found = saved.get("format") if isinstance(saved, dict) else None
        other = LOADERS.get(str(found))
        hint = "a Hugging Face directory is a backbone, not a model with memory: build one from it"
        raise ValueError(
            f"{str(folder / CONFIG_FILE)!r} has format {found!r}; this version reads {kind!r} "
            f"({f'use rmt_core.{other}' if other else hint})"
        )
    return saved


def _configured(folder: Path, saved: dict[str, Any], configure: Callable[..., ConfigT]) -> ConfigT:
    try:
        return configure(**saved["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r} is no model's configuration: {error}") from error


def _fill(model: AnyModel, file: Path) -> None:
    """Copy the file's tensors into the model's; names, shapes and types must be the same."""
    wanted = tensors_of(model)
    with safe_open(file, framework="pt") as saved, torch.no_grad():
        names = set(saved.keys())
        missing, unexpected = sorted(wanted.keys() - names), sorted(names - wanted.keys())
        if missing or unexpected:
            raise ValueError(f"{str(file)!r} does not fit its config.json: missing {missing}, unexpected {unexpected}")
        for name, tensor in wanted.items():
            value = saved.get_tensor(name)
            if value.shape != tensor.shape:
                raise ValueError(
                    f"{str(file)!r}: {name} has shape {tuple(value.shape)}, the model needs {tuple(tensor.shape)}"
                )
            if value.dtype != tensor.dtype:
                raise ValueError(f"{str(file)!r}: {name} has type {value.dtype}, the model needs {tensor.dtype}")
            tensor.copy_(value)


def fingerprint(model: AnyModel) -> str:
    """A hash of configuration and weights, 64 hexadecimal digits: equal models, equal fingerprints."""
    tensors = tensors_of(model)
    digest = hashlib.sha256(json.dumps(_as_is(model.config, tensors).to_json(), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
