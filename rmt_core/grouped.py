"""Equal layers run as one: their tensors stacked along a new first axis, one call for all of them.

Axes: G layers of a group, B rows, H heads, N queries, C keys, d width of a head.
"""

import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_NUMBERS_OF_LAYERS = frozenset({"layer_idx"})  # tells a key-value cache where to write; there is none here


def equal_layers(layers: Sequence[nn.Module], marks: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of the layers, those together that differ in nothing but the values of their tensors.

    Equal are classes, settings (attributes; objects that cannot be compared are equal only to themselves), shapes,
    types and devices of tensors, and `marks`, one a layer.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, (layer, mark) in enumerate(zip(layers, marks, strict=True)):
        groups.setdefault((mark, _signature(layer)), []).append(number)
    return list(groups.values())


def _signature(layer: nn.Module) -> Hashable:
    modules = tuple((name, type(module), module.training, _settings(module)) for name, module in layer.named_modules())
    return modules, tuple((name, x.shape, x.dtype, x.device) for name, x in tensors_of(layer).items())


def _settings(module: nn.Module) -> Hashable:
    """A module's own attributes, without its tensors and its number."""
    left_out = _OF_EVERY_MODULE | _NUMBERS_OF_LAYERS
    return tuple((name, _value(x)) for name, x in sorted(vars(module).items()) if name not in left_out)


def _value(value: Any) -> Hashable:
    if isinstance(value, tuple | list):
        return type(value), tuple(_value(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _value(item)) for key, item in value.items())
    if isinstance(value, functools.partial):
        return value.func, _value(value.args), _value(value.keywords)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Equal layers' tensors of one name as one, (G, ...).

    Where a gradient is wanted, a copy through which it reaches each of them. Otherwise the only storage: at the first
    call each tensor becomes a view of the stack, as which it goes on working (it is edited in place, saved and loaded
    as before; only a pickle of one brings all of the stack along), and later calls find them so. Tensors that are
    already views of something else are copied: an optimiser that keeps parameters in a buffer of its own would
    otherwise write where nobody reads.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return torch.stack(list(tensors))
    found = _evenly_laid(tensors)
    if found is not None:
        return found
    with torch.inference_mode(False), torch.no_grad():  # what is made while generating serves training too
        stack = torch.stack([tensor.detach() for tensor in tensors])
        if all(_owns_storage(tensor) for tensor in tensors):
            for tensor, part in zip(tensors, stack, strict=True):
                tensor.data = part
    return stack


def _evenly_laid(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view over tensors that lie at equal distances in one storage; None if they do not."""
    first = tensors[0].detach()
    storage = first.untyped_storage().data_ptr()
    if any(x.untyped_storage().data_ptr() != storage or x.stride() != first.stride() for x in tensors):
        return None
    offsets = [x.storage_offset() for x in tensors]
    distances = {b - a for a, b in itertools.pairwise(offsets)} or {first.numel()}
    distance = distances.pop()
    if distances or distance < 0:
        return None
    return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()), offsets[0])


def _owns_storage(tensor: Tensor) -> bool:
    own = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == own


def folded_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Causal attention within `torch.vmap`: one call of the fast kernel with the group among the rows.

    queries (B, H, N, d), keys and values (B, H or fewer, C, d), as inside the map; gives (B, H, N, d).
    """
    return _Folded.apply(queries, keys, values, scale)


class _Folded(torch.autograd.Function):
    """Left to itself, `torch.vmap` loops over the group on a CPU."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        raise RuntimeError("attention is folded only within torch.vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: the gradient is that of what `vmap` calls."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], queries: Tensor, keys: Tensor, values: Tensor, scale: float | None
    ) -> tuple[Tensor, int]:
        size: int = info.batch_size
        query, key, value = (
            (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip((queries, keys, values), in_dims, strict=False)
        )
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
        return out.unflatten(0, (size, -1)), 0
