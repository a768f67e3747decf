"""The diagonal order of (segment, layer) cells.

The cell of segment s and layer l needs the cells (s, l - 1), for its input, and (s - 1, l), for its state, if the
memory is layer-local. So all cells with equal s + l run together, as one grouped layer: K + L - 1 steps instead of K L
(Sivtsov et al. 2025, arXiv:2506.05229, section 3). Unlike there, batches may have any size and rows any lengths, each
layer keeps its own biases, and the weights are stored once.

Axes: K segments, L layers, G layers of a group, B rows, T tokens of a segment, S positions that a layer sees, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from . import state as states
from .backbone import Placement
from .grouped import equal_layers, stacked, tensors_of
from .memory.base import Block, LayerwiseMemory, Segment
from .state import State

if TYPE_CHECKING:
    from .recurrent import RecurrentModel


class Part(NamedTuple):
    """One segment of a text."""

    tokens: Tensor  # (B, T) int64, of the last segment perhaps fewer
    lengths: Tensor | None  # (B,) real tokens; None where all are


def run_diagonal(model: RecurrentModel, parts: Sequence[Part], state: State) -> tuple[list[Tensor], Tensor, State]:
    """Read consecutive segments: each one's hidden states (B, T, D), the summed auxiliary loss (), and the last state.

    All segments but the last have T tokens. No layer runs on a segment that is not there: steps at both ends are
    narrower. While it runs, one layer of each group holds stand-ins for its tensors: no other thread may use the model.
    """
    memory, backbone = model.memory, model.backbone
    num_layers, text_len = backbone.dimensions.num_layers, parts[0].tokens.shape[1]
    grid = Grid(model, text_len, memory.by_layer(state))
    segments = [Segment(text_len, _lengths(part, text_len), memory.rows_before) for part in parts]
    rows: list[Any] = [None] * num_layers  # the input of each layer's next cell
    hidden: list[Tensor] = []
    aux: list[Tensor] = []
    for step in range(len(parts) + num_layers - 1):
        if step < len(parts):
            tokens = F.pad(parts[step].tokens, (0, text_len - parts[step].tokens.shape[1]))
            rows[0] = grid.place(memory.enter(backbone.embed(tokens), grid.seen_at(0), segments[step]))
        running = range(max(0, step - len(parts) + 1), min(step, num_layers - 1) + 1)
        outputs, losses = grid.step({layer: rows[layer] for layer in running}, [segments[step - i] for i in running])
        aux += losses
        rows = [None, *(outputs.get(layer) for layer in range(num_layers))]
        last = rows.pop()
        if last is not None:
            done = len(hidden)
            text, _ = memory.leave(backbone.norm(last), grid.seen_at(num_layers - 1), segments[done])
            hidden.append(text[:, : parts[done].tokens.shape[1]])
    aux += [len(parts) * penalty for penalty in backbone.penalties()]
    total = torch.stack([loss.sum() for loss in aux]).sum() if aux else hidden[0].new_zeros(())
    return hidden, total, grid.state()


def _lengths(part: Part, text_len: int) -> Tensor | None:
    """A segment's lengths (B,), given also where it is shorter than the others it runs with."""
    size = part.tokens.shape[1]
    if part.lengths is not None or size == text_len:
        return part.lengths
    return torch.full((len(part.tokens),), size, device=part.tokens.device)


class Cell(nn.Module):
    """A decoder layer and what the memories have there as one module, so that its tensors can be exchanged."""

    def __init__(self, layer: int, model: RecurrentModel, block: Block) -> None:
        super().__init__()
        memory, num_layers = model.memory, model.backbone.dimensions.num_layers
        kept = [part.layers[layer] for part in memory.modules() if isinstance(part, LayerwiseMemory)]
        self.parts = nn.ModuleList([model.backbone.layers[layer], *kept])

        def run(h: Tensor, part: State, segment: Segment) -> tuple[Tensor, State]:
            state = memory.from_layers([part] * num_layers)  # of which the memory sees its own layer's
            h, state = memory.around(layer, h, block, state, segment)
            return h, memory.by_layer(state)[layer]

        self.run = run

    def forward(self, h: Tensor, part: State, lengths: Tensor | None, segment: Segment) -> tuple[Any, ...]:
        """h (B, S, D), the layer's state and `lengths` (B,): the output, the new state, auxiliary losses, () each."""
        own = Segment(segment.text_len, lengths, segment.text_start)
        h, new = self.run(h, part, own)
        if lengths is not None:
            new = states.where(lengths > 0, new, part)
        return h, new, tuple(own.aux)


def cells_of(model: RecurrentModel, placement: Placement) -> list[Cell]:
    """One a layer, for rows that stand as `placement` says."""
    blocks = model.backbone.blocks(model.backbone.lm.get_input_embeddings().weight, placement)
    return [Cell(layer, model, block) for layer, block in enumerate(blocks)]


@dataclass
class Group:
    """Layers that differ only in their tensors' values, and their states."""

    layers: list[int]
    cell: Cell  # of the first of them: how each is run
    tensors: dict[str, Tensor]  # (G, ...) by their names in `cell`
    state: State  # of tensors (G, B, ...)

    def step(self, rows: Tensor, running: slice, lengths: Tensor | None, segment: Segment) -> tuple[Tensor, Any]:
        """Run the layers `running` on rows (G, B, S, D), lengths (G, B): outputs and auxiliary losses (G,)."""

        def run(tensors: dict[str, Tensor], h: Tensor, part: State, lengths: Tensor | None) -> Any:
            return functional_call(self.cell, tensors, (h, part, lengths, segment))

        tensors = {name: tensor[running] for name, tensor in self.tensors.items()}
        part = states.tree_map(lambda tensor: tensor[running], self.state)
        dims = (0, 0, 0, None if lengths is None else 0)
        outputs, new, aux = torch.vmap(run, in_dims=dims)(tensors, rows, part, lengths)
        whole = len(rows) == len(self.layers)
        self.state = new if whole else states.tree_map(_replaced(running), self.state, new)
        return outputs, aux


def _replaced(at: slice) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda old, new: torch.cat([old[: at.start], new, old[at.stop :]])


class Grid:
    """The layers in groups, with the states that they have come to."""

    def __init__(self, model: RecurrentModel, text_len: int, parts: Sequence[State]) -> None:
        memory, backbone = model.memory, model.backbone
        self.memory, self.backbone = memory, backbone
        self.num_rows = memory.rows_before + text_len + memory.rows_after  # S
        like = backbone.lm.get_input_embeddings().weight
        positions = torch.arange(self.num_rows + memory.context_len, device=like.device)
        self.placement = Placement(positions[None], grouped=True)
        self.cells = cells_of(model, self.placement)
        kinds = getattr(backbone.lm.config, "layer_types", None) or [None] * len(self.cells)
        self.groups = []
        for layers in equal_layers([cell.parts for cell in self.cells], kinds):
            each = [tensors_of(self.cells[layer]) for layer in layers]
            tensors = {name: stacked([one[name] for one in each]) for name in each[0]}
            state = states.tree_map(lambda *x: torch.stack(x), parts[layers[0]], *(parts[i] for i in layers[1:]))
            self.groups.append(Group(layers, self.cells[layers[0]], tensors, state))

    def place(self, h: Tensor) -> Tensor:
        return self.backbone.place(h, self.placement)

    def step(self, rows: dict[int, Tensor], segments: Sequence[Segment]) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Run some layers, each on its rows (B, S, D) of its segment: their outputs, and auxiliary losses."""
        outputs: dict[int, Tensor] = {}
        aux: list[Tensor] = []
        lengths: dict[int, Tensor] = {}
        if any(segment.lengths is not None for segment in segments):
            full = torch.full(
                (next(iter(rows.values())).shape[0],), segments[0].text_len, device=self.memory.anchor.device
            )
            for layer, segment in zip(rows, segments, strict=True):
                lengths[layer] = full if segment.lengths is None else segment.lengths
        for group in self.groups:
            layers = [layer for layer in group.layers if layer in rows]  # neighbours in the group, as in the model
            if not layers:
                continue
            start = group.layers.index(layers[0])
            out, losses = group.step(
                torch.stack([rows[layer] for layer in layers]),
                slice(start, start + len(layers)),
                torch.stack([lengths[layer] for layer in layers]) if lengths else None,
                segments[0],
            )
            outputs.update(zip(layers, out, strict=True))
            aux += losses
        return outputs, aux

    def part(self, layer: int) -> State:
        """One layer's state as it is now."""
        group = next(group for group in self.groups if layer in group.layers)
        return states.tree_map(lambda tensor: tensor[group.layers.index(layer)], group.state)

    def seen_at(self, layer: int) -> State:
        """A state for `enter`, which may read the first layer's, or `leave`, the last: that layer's everywhere."""
        return self.memory.from_layers([self.part(layer)] * len(self.cells))

    def state(self) -> State:
        return self.memory.from_layers([self.part(layer) for layer in range(len(self.cells))])
