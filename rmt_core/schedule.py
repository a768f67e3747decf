"""In which order the (segment, layer) cells of a text run, and which order is the faster one.

Axes: K segments, L layers, B rows, T tokens of a segment, S positions that a layer sees, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import state as states
from .diagonal import Grid, Part, cells_of
from .grouped import tensors_of
from .memory.base import Segment

if TYPE_CHECKING:
    from .recurrent import RecurrentModel

ORDERS = ("sequential", "diagonal", "auto")
MARGIN = 0.9  # the diagonal order must be predicted to take less than this much of the sequential one's time: times err
MIN_ROUNDS, MAX_ROUNDS = 3, 20  # of measuring, after one to warm up
ENOUGH_S = 0.5  # of measuring, after which no round beyond the fewest is begun
HOPELESS = 1.3  # times as slow after a round: no more are measured


class Costs(NamedTuple):
    """Seconds that parts of the two orders take."""

    cell: float  # one layer of one segment, by itself
    narrow: float  # a diagonal step of one cell
    wide: float  # a diagonal step of `width` cells
    width: int
    stacking: float  # of the parameters, once a call; 0 without a gradient

    def sequential(self, num_segments: int, num_layers: int) -> float:
        return num_segments * num_layers * self.cell

    def diagonal(self, num_segments: int, num_layers: int) -> float:
        """Steps between the two measured widths are taken to cost what lies on the line between them."""
        slope = (self.wide - self.narrow) / (self.width - 1)
        widths = [min(i, num_segments + num_layers - i, self.width) for i in range(1, num_segments + num_layers)]
        return self.stacking + sum(self.narrow + slope * (width - 1) for width in widths)


def choose(model: RecurrentModel, order: str, parts: Sequence[Part], generator: torch.Generator | None = None) -> str:
    """The order, "sequential" or "diagonal", for reading the segments `parts`.

    A ValueError where the order is unknown, or "diagonal" and this model's cells cannot run so. "auto" takes the
    diagonal order where that is possible and measured to be faster. It measures once for a model, number of rows,
    segment length, device and type, gradient or none, and number of cells that can run together, on made-up rows.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; allowed: {', '.join(map(repr, ORDERS))}")
    if order == "sequential":
        return order
    reason = refusal(model, generator)
    if order == "diagonal":
        if reason is not None:
            raise ValueError(f"order 'diagonal' is not possible: {reason}; use 'sequential' or 'auto'")
        return order
    num_layers = model.backbone.dimensions.num_layers
    if reason is not None or min(len(parts), num_layers) < 2:
        return "sequential"
    costs = _costs(model, len(parts[0].tokens), parts[0].tokens.shape[1], min(len(parts), num_layers))
    faster = costs.diagonal(len(parts), num_layers) < MARGIN * costs.sequential(len(parts), num_layers)
    return "diagonal" if faster else "sequential"


def refusal(model: RecurrentModel, generator: torch.Generator | None = None) -> str | None:
    """Why the cells of this model cannot run in diagonal order; None if they can."""
    memory = model.memory
    if not model.sees_segments_alone:
        return "full attention's keys and values are no memory's state"
    if not memory.layer_local:
        members = getattr(memory, "members", [memory])
        kinds = [settings["kind"] for settings in model.config.memory]
        guilty = [repr(kind) for kind, member in zip(kinds, members, strict=True) if not member.layer_local]
        return f"memory {', '.join(guilty)} passes from a segment's last layer to the next one's first"
    if generator is not None:
        return "cells that run together would draw other numbers from the generator than one after the other"
    if _draws_dropout(model):
        return "cells that run together would drop out otherwise than one after the other; call eval()"
    if any(parameter.numel() == 0 and hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "the parameters are spread over processes (ZeRO stage 3)"
    return None


def _draws_dropout(model: nn.Module) -> bool:
    """Whether any part drops out; attention of most families has the probability as an attribute."""
    return any(
        part.training and (part.p > 0 if isinstance(part, nn.Dropout) else getattr(part, "attention_dropout", 0) > 0)
        for part in model.modules()
    )


_MEASURED: WeakKeyDictionary[nn.Module, dict[Hashable, Costs]] = WeakKeyDictionary()


def _costs(model: RecurrentModel, num_rows: int, text_len: int, width: int) -> Costs:
    """What was measured before for these sizes, or is now."""
    like = model.backbone.lm.get_input_embeddings().weight
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    known = _MEASURED.setdefault(model, {})
    key = (num_rows, text_len, width, like.device, like.dtype, learns)
    if key not in known:
        known[key] = _Trial(model, num_rows, text_len, width, learns).costs()
    return known[key]


class _Trial:
    """Both orders over made-up rows: no random numbers, nothing added to gradients, the model's states untouched."""

    def __init__(self, model: RecurrentModel, num_rows: int, text_len: int, width: int, learns: bool) -> None:
        self.width, self.learns = width, learns
        self.parts = model.memory.by_layer(states.detach(model.init_state(num_rows)))
        self.grid = Grid(model, text_len, self.parts)
        self.alone = cells_of(model, self.grid.placement._replace(grouped=False))
        for group in self.grid.groups:
            group.tensors = {name: _leaf(tensor) for name, tensor in group.tensors.items()}
        weight = model.backbone.lm.get_input_embeddings().weight
        self.h = weight.detach().new_ones(num_rows, self.grid.num_rows, weight.shape[1])
        self.segment = Segment(text_len, None, model.memory.rows_before)

    def costs(self) -> Costs:
        """The least times of interleaved rounds: what else the machine does only adds to them."""
        cells, narrow, wide = [], [], []
        start = time.perf_counter()
        for i in range(MAX_ROUNDS + 1):
            cells.append(self._seconds(self._one_by_one) / self.width)
            wide.append(self._seconds(lambda: self._together(self.width)))
            narrow.append(self._seconds(lambda: self._together(1)))
            if i >= MIN_ROUNDS and time.perf_counter() - start > ENOUGH_S:
                break
            if i and min(wide[1:]) > HOPELESS * min(cells[1:]) * self.width:
                break
        stacking = min(self._seconds(self._stack) for _ in range(2)) if self.learns else 0.0
        return Costs(min(cells[1:]), min(narrow[1:]), min(wide[1:]), self.width, stacking)

    def _seconds(self, work: Callable[[], None]) -> float:
        """What `work` takes: of a CPU's one thread its own time, so that nobody else's work counts; else all of it."""
        if self.h.is_cuda:
            torch.cuda.synchronize(self.h.device)
        clock = time.thread_time if self.h.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        work()
        if self.h.is_cuda:
            torch.cuda.synchronize(self.h.device)
        return clock() - start

    def _one_by_one(self) -> None:
        """The first `width` layers, each by itself."""
        for cell, part in zip(self.alone[: self.width], self.parts, strict=False):
            if not self.learns:
                cell(self.h, part, None, self.segment)
                continue
            h, own = _leaf(self.h, True), {name: _leaf(tensor) for name, tensor in tensors_of(cell).items()}
            out, new, aux = functional_call(cell, own, (h, part, None, self.segment))
            _back([out, *states.leaves(new), *aux], [h, *own.values()])

    def _together(self, count: int) -> None:
        """The first `count` layers as one diagonal step."""
        kept = [group.state for group in self.grid.groups]
        rows = {layer: _leaf(self.h, self.learns) for layer in range(count)}
        outputs, aux = self.grid.step(rows, [self.segment] * count)
        if self.learns:
            tensors = [tensor for group in self.grid.groups for tensor in group.tensors.values()]
            new = [leaf for group in self.grid.groups for leaf in states.leaves(group.state)]
            _back([*outputs.values(), *new, *aux], [*rows.values(), *tensors])
        for group, state in zip(self.grid.groups, kept, strict=True):
            group.state = state

    def _stack(self) -> None:
        """What a call with a gradient does once: each layer's parameters into stacks, the stacks' gradients back."""
        for group in self.grid.groups:
            each = [tensors_of(self.alone[layer]) for layer in group.layers]
            for name in each[0]:
                own = [_leaf(one[name]) for one in each]
                _back([torch.stack(own)], own)


def _leaf(tensor: Tensor, learns: bool | None = None) -> Tensor:
    """The same values as a leaf of its own, so that no gradient and no hook reaches the tensor itself."""
    return tensor.detach().requires_grad_(tensor.requires_grad if learns is None else learns)


def _back(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Compute the gradient of the outputs' sum, and drop it."""
    roots, leaves = ([tensor for tensor in part if tensor.requires_grad] for part in (outputs, inputs))
    if roots and leaves:
        torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots], allow_unused=True)
