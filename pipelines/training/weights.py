"""What of a model is trained: everything, its memory alone, or adapters on its backbone and its memory.

Adapters are peft's; they live in this package only. What leaves it is a plain model with the adapters folded in.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rmt_core
from pipelines.config import InputError
from pipelines.training.settings import LoraSettings, ModelSettings
from rmt_core.backbone import FeedForward

Gathering: TypeAlias = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]

_ADAPTER = "default"  # peft's own name for the one adapter of a map
_BASE = "base_layer"  # under which peft keeps the map that it stands around


def fresh_model(description: rmt_core.ModelConfig, settings: ModelSettings, seed: int) -> rmt_core.RecurrentModel:
    """The model as a run begins with it, equal on every worker. InputError where a directory's weights do not fit."""
    torch.manual_seed(seed)
    try:
        model = rmt_core.build(description).train()
        if settings.start is not None:
            _begin_with(model, settings.start)
    except ValueError as error:
        raise InputError(str(error)) from error
    choose_trained(model, settings)
    return model


def _begin_with(model: rmt_core.RecurrentModel, directory: str) -> None:
    """Copies a trained model's weights, all of them. ValueError."""
    trained = rmt_core.load(directory)
    check_start(directory, trained, model)
    model.load_state_dict(trained.state_dict())


def check_start(directory: str, trained: rmt_core.RecurrentModel, model: rmt_core.RecurrentModel) -> None:
    """ValueError that names a weight of one model that the other has otherwise; models without weights will do."""
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (trained, model)]
    unlike = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if unlike:
        first = " in place of ".join(str(one.get(unlike[0], "nothing")) for one in shapes)
        raise ValueError(
            f"model.start {directory}: its weights are not those of this model, as {unlike[0]}: {first}; leave out "
            "model.memory and model.feed_forward, or give such as it was trained with"
        )


def choose_trained(model: rmt_core.RecurrentModel, settings: ModelSettings) -> None:
    """Freeze what the run does not train, and put adapters where it trains those. InputError where nothing is left.

    The memory, and feed-forward parts that were replaced, are new: they are trained in every case.
    """
    if settings.train == "everything":
        return
    model.backbone.lm.requires_grad_(False)
    if settings.train == "lora":
        _adapt(model, settings.lora)
    for part in _new_feed_forwards(model):
        part.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        kinds = " + ".join(memory["kind"] for memory in model.config.memory)
        raise InputError(
            f"model.train memory leaves nothing to train: memory {kinds} has no parameters; use lora or everything"
        )


def _new_feed_forwards(model: rmt_core.RecurrentModel) -> list[FeedForward]:
    return [module for module in model.backbone.layers.modules() if isinstance(module, FeedForward)]


def linear_maps(model: rmt_core.RecurrentModel) -> dict[str, nn.Module]:
    """Name within the Hugging Face model -> linear map, of all in the decoder layers but those of new parts."""
    new = {id(module) for part in _new_feed_forwards(model) for module in part.modules()}
    inside = {id(module) for module in model.backbone.layers.modules()} - new
    return {
        name: module
        for name, module in model.backbone.lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside
    }


def _adapt(model: rmt_core.RecurrentModel, settings: LoraSettings) -> None:
    """Low-rank adapters beside the maps that the settings name, by default all; only the adapters are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    maps = linear_maps(model)
    known = sorted({name.rpartition(".")[2] for name in maps})
    if unknown := sorted(set(settings.targets or known) - set(known)):
        raise InputError(f"model.lora.targets {', '.join(unknown)}: the backbone's layers have {', '.join(known)}")
    chosen = {name: module for name, module in maps.items() if name.rpartition(".")[2] in (settings.targets or known)}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # peft divides by the rank: any number will do
        lora_dropout=settings.dropout,
        target_modules=list(chosen),
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in chosen.values()),
    )
    inject_adapter_in_model(config, model.backbone.lm, _ADAPTER)


# --- the plain model --------------------------------------------------------------------------------


def _at_hand(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """For parameters that are not sharded."""
    return nullcontext()


def plain_tensors(
    model: rmt_core.RecurrentModel, *, gathered: Gathering = _at_hand, keep: bool = True
) -> dict[str, Tensor]:
    """What `rmt_core.save` would write of the model with its adapters folded in: copies on the CPU, by plain names.

    `gathered` makes the parameters that it is given whole while its block runs; it is entered for one module after
    another, on every worker in the same order, so that no more than one module's parameters are whole at a time.
    Workers that do not `keep` get nothing. A folded weight is rounded once to the type of the weight.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    saved = set(model.state_dict().keys())
    adapters: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in adapters):
            continue
        prefix = f"{name}." if name else ""
        is_adapter = hasattr(module, _BASE) and hasattr(module, "get_delta_weight")
        if is_adapter:
            adapters.append(prefix)
        own = [each for each in module.parameters(recurse=is_adapter) if id(each) not in seen]
        seen.update(map(id, own))
        with gathered(own) if own else nullcontext():
            if keep:
                kept = {id(each) for each in own}
                tensors = _folded(module) if is_adapter else _own_tensors(module, prefix, kept, saved)
                found.update({prefix + key: tensor.detach().cpu().clone() for key, tensor in tensors.items()})
    return found


def _own_tensors(module: nn.Module, prefix: str, kept: set[int], saved: set[str]) -> dict[str, Tensor]:
    """A module's own parameters and saved buffers."""
    parameters = {key: value for key, value in module.named_parameters(recurse=False) if id(value) in kept}
    buffers = {key: value for key, value in module.named_buffers(recurse=False) if prefix + key in saved}
    return {**parameters, **buffers}


def _folded(module: Any) -> dict[str, Tensor]:
    """The tensors of the map that an adapter stands around, with what the adapter adds to the weight."""
    tensors = {key: value.detach() for key, value in getattr(module, _BASE).named_parameters()}
    weight = tensors["weight"]
    wide = torch.promote_types(weight.dtype, torch.float32)
    added = module.get_delta_weight(_ADAPTER).detach().to(wide)
    return tensors | {"weight": (weight.to(wide) + added).to(weight.dtype)}


# --- checkpoints ------------------------------------------------------------------------------------


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """DeepSpeed's `custom_load_fn` for checkpoints without frozen parameters: `src` holds all else of `dst`, exactly.

    Frozen parameters keep the values that the model was built with. Raises ValueError where names differ.
    """
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    own = dst.state_dict(keep_vars=True)
    wanted = own.keys() - frozen
    if wanted != src.keys():
        raise ValueError(
            f"the checkpoint does not fit the model: missing {sorted(wanted - src.keys())}, "
            f"unexpected {sorted(src.keys() - wanted)}"
        )
    with torch.no_grad():
        for name, value in src.items():
            own[name].copy_(value)


def save_backbone(directory: str, model: rmt_core.RecurrentModel, tokenizer: Any) -> None:
    """Write the backbone without its memory as a Hugging Face directory. InputError where it has parts of ours."""
    if model.config.feed_forward is not None:
        raise InputError("report.backbone: a backbone with replaced feed-forward parts is no Hugging Face model")
    model.backbone.lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
