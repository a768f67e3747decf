"""What one segment costs, found by running the model on tensors that have shapes and no numbers.

Nothing is loaded and nothing is computed, so that a model of any size is measured in seconds on a laptop, whatever its
family and memory: the operations are those that training runs.

Axes: R rows, T tokens of a segment, D width, V vocabulary.
"""

import copy
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rmt_core
from pipelines.training.live_bytes import LiveBytes
from pipelines.training.settings import ModelSettings
from pipelines.training.weights import choose_trained
from rmt_core.backbone import FAMILIES
from rmt_core.backbone_config import config_from


class SegmentCost(NamedTuple):
    """What a segment of R rows costs."""

    forward_flops: (
        int  # a multiplication and an addition count as two; matrix products only, attention as if not causal
    )
    backward_flops: int  # gradients of what is trained and of what leads there; nothing computed twice is counted twice
    kept_bytes: int  # what the forward pass keeps for the backward pass
    passing_bytes: int  # what more is alive at the worst moment of the two passes; of parameters' gradients one
    state_bytes: int  # the memory's state


class ModelSize(NamedTuple):
    """How many numbers a model has."""

    num_parameters: int
    num_trained: int
    largest_layer: int  # parameters of the largest part that is used at once: a layer, the embedding


def outline(description: rmt_core.ModelConfig, settings: ModelSettings) -> rmt_core.RecurrentModel:
    """The model as it is trained, with shapes but without weights. ValueError or InputError where parts do not fit."""
    config = dataclasses.replace(description, backbone=copy.deepcopy(config_from(description.backbone, FAMILIES)))
    with torch.device("meta"):
        model = rmt_core.build(config)
        choose_trained(model, settings)
    return model


def model_size(model: rmt_core.RecurrentModel) -> ModelSize:
    """Counts, of tied parameters once."""
    parameters = list(model.parameters())
    parts: Sequence[nn.Module] = [*model.backbone.layers, model.backbone.lm.get_input_embeddings()]
    return ModelSize(
        sum(each.numel() for each in parameters),
        sum(each.numel() for each in parameters if each.requires_grad),
        max(sum(each.numel() for each in part.parameters()) for part in parts),
    )


def segment_cost(model: rmt_core.RecurrentModel, num_rows: int = 1) -> SegmentCost:
    """The cost of a full segment in the middle of a document, for a model of any device, which is left as it is."""
    _forget_constants()
    try:
        with FakeTensorMode():
            return _cost(_without_numbers(model).train(), num_rows)
    finally:
        _forget_constants()  # those without numbers


def _forget_constants() -> None:
    """Empties what the core's functions keep of earlier calls."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rmt_core."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _cost(stand_in: rmt_core.RecurrentModel, num_rows: int) -> SegmentCost:
    """Within a FakeTensorMode."""
    for parameter in stand_in.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    kept = _Kept(stand_in)
    tokens = torch.zeros(num_rows, stand_in.segment_len, dtype=torch.long)
    state = rmt_core.state.tree_map(_leaf, stand_in.init_state(num_rows))
    stand_in.step(tokens, state)  # what is made once and kept is no cost of a segment
    with LiveBytes() as live:
        with _counting() as forward, saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            out, after = stand_in.step(tokens, state)
            loss = _loss(out, tokens)
            leaves = [leaf for leaf in rmt_core.state.leaves(after) if leaf.is_floating_point()]
            loss = loss + sum(leaf.sum() for leaf in leaves)
        del out, after, leaves
        with _counting() as backward:
            loss.backward()
    return SegmentCost(
        forward.get_total_flops(),
        backward.get_total_flops(),
        kept.num_bytes,
        max(0, live.peak_bytes - kept.num_bytes),
        sum(map(_num_bytes, rmt_core.state.leaves(state))),
    )


def _loss(out: rmt_core.Output, labels: Tensor) -> Tensor:
    """As `Output.loss` where every label is asked for, which needs no numbers to be looked at."""
    hidden = out.hidden.flatten(0, 1)[labels.new_zeros(labels.numel())]  # (R * T, D)
    logits = out.head(hidden)  # (R * T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten()) + out.aux


def _drop_gradient(parameter: Tensor) -> None:
    """What is kept of gradients is counted by ZeRO stage, not here."""
    parameter.grad = None


def _num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _without_numbers(model: rmt_core.RecurrentModel) -> rmt_core.RecurrentModel:
    """A copy whose tensors have shapes alone; within a FakeTensorMode."""
    made: dict[int, Any] = {}
    for tensor in _tensors(model):
        fresh: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        made[id(tensor)] = fresh
    return copy.deepcopy(model, made)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _leaf(tensor: Tensor) -> Tensor:
    """As a later segment gets its state: with a gradient to be given back."""
    return torch.empty_like(tensor).requires_grad_(tensor.is_floating_point())


class _Kept:
    """Counts the bytes of what autograd keeps, each storage once, the model's own tensors not."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors(model)}
        self.num_bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self.seen:
            self.seen.add(reference)
            self.num_bytes += storage.nbytes()
        return tensor


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Scores and weighted sums, of shapes (R, H, S, D / H); fewer heads of keys and values count as those of queries.

    torch's own function takes these only from 2.13 on.
    """
    rows, heads, num_queries, width = query
    return 2 * rows * heads * num_queries * key[2] * (width + value[3])


def _counting() -> FlopCounterMode:
    """A counter that knows the attention of CPUs too, which stands in for that of any device."""
    aten = torch.ops.aten

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **settings: Any) -> int:
        return _attention_flops(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
        return 2 * _attention_flops(query, key, value)  # the scores computed again are left out

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
