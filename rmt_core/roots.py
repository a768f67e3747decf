"""A loss joined with tensors that have a gradient of their own: several roots of one backward pass, as one scalar."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Joined(torch.autograd.Function):
    """The loss, unchanged; backward gives each of the other tensors its gradient, whatever the loss is scaled by."""

    @staticmethod
    def forward(loss: Tensor, num_tensors: int, *tensors_and_gradients: Tensor | None) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, num_tensors, *rest = inputs
        ctx.num_tensors = num_tensors
        ctx.shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in rest[:num_tensors]]
        ctx.gradients = rest[num_tensors:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
            for (shape, dtype, device), gradient in zip(ctx.shapes, ctx.gradients, strict=True)
        ]
        return grad_outputs[0], None, *found, *[None] * ctx.num_tensors


def joined(loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None] | None = None) -> Tensor:
    """`loss` (), whose backward pass starts at `tensors` too, with their `gradients`; None stands for exact zeros.

    The gradients are taken as they are: a factor on the result scales the loss alone. With no gradients at all the
    tensors are only tied in: what they were made from gets a gradient of zero where the loss gives it none. Nothing is
    multiplied with the tensors, so that infinite ones make no NaN. Tensors outside the gradient are left out.
    """
    gradients = [None] * len(tensors) if gradients is None else gradients
    pairs = [(tensor, grad) for tensor, grad in zip(tensors, gradients, strict=True) if tensor.requires_grad]
    if not pairs:
        return loss
    kept, given = zip(*pairs, strict=True)
    result: Tensor = _Joined.apply(loss, len(kept), *kept, *given)
    return result
