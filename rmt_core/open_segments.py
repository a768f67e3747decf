"""Segments that are still being written: their keys and values are kept, so that a further token costs one row.

Axes: R rows of a call, n tokens of the longest of them, C positions with keys and values, H heads, D width.
"""

import torch
from torch import Tensor

from .backbone import Placement
from .memory.base import Segment
from .recurrent import RecurrentModel
from .state import State


class OpenSegments:
    """Keys and values of the open segments of `num_rows` rows, each at its own place in its own segment.

    Nothing else is kept here: the caller has the rows' tokens and states. A row is begun by `open`, which overwrites
    all that it held, and goes on by `extend`. Neither writes the memory; closing a segment is the model's `step`.
    """

    def __init__(self, model: RecurrentModel, num_rows: int) -> None:
        memory = model.memory
        capacity = memory.context_len + memory.rows_before + model.segment_len
        self.model = model
        self.kept = KeyValues(model.backbone.dimensions.num_layers, num_rows, capacity)

    def open(self, rows: Tensor, tokens: Tensor, lengths: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the first tokens (R, n) of rows, of which each has `lengths` (R,), at least one.

        Gives hidden states at the last of them (R, D), and the state as it runs within the segment. Of the R rows
        those kept are the first ones, in the places `rows` (at most R,); what follows only fills the batch.
        """
        memory, size = self.model.memory, tokens.shape[1]
        self.kept.turn_to(rows, None)
        segment = Segment(size, lengths, memory.rows_before, stage="open")
        reach = torch.arange(size + memory.rows_before + memory.context_len, device=tokens.device)
        hidden, within = self.model.read(tokens, state, segment, Placement(reach[None], kv=self.kept))
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1], within

    def extend(self, rows: Tensor, tokens: Tensor, lengths: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one more token (R,) of each row, which has `lengths` (R,) before it: as `open`, hidden states and state.

        Of memories that run within a segment, `state` is the one that the call before gave. Rows that are the first
        ones, in order, are computed in place; others are gathered. Repeating a call is harmless.
        """
        memory, kept = self.model.memory, self.kept
        at = lengths + memory.rows_before + memory.context_filled(state)
        kept.turn_to(rows, at)
        seen = torch.arange(kept.capacity, device=rows.device) <= at[:, None]  # (R, C)
        hidden, within = self.model.read(
            tokens[:, None],
            state,
            Segment(1, None, 0, kept_start=memory.rows_before, stage="extend"),
            Placement(at[:, None], mask=seen[:, None, None], kv=kept),
        )
        return hidden[:, 0], within

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes row `source`."""
        for buffer in self.kept.buffers():
            buffer[target] = buffer[source]


class KeyValues:
    """Keys and values of rows' positions, in the form that transformers' attention updates.

    A call is for the rows that were turned to: with `at` (R,) where a decoded token stands, None while a segment is
    opened.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self._rows = torch.zeros(0, dtype=torch.long)
        self._at: Tensor | None = None
        self._are_first = False

    def turn_to(self, rows: Tensor, at: Tensor | None) -> None:
        self._rows, self._at = rows, at
        self._are_first = torch.equal(rows, torch.arange(len(rows), device=rows.device))

    def buffers(self) -> list[Tensor]:
        """All that is kept, (rows, H, C, D / H) each; none before the first call."""
        return [buffer for buffer in (*self.keys, *self.values) if buffer is not None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keep keys and values (R, H, n, D / H); gives those that attention should see."""
        return self._keep(self.keys, keys, layer_idx), self._keep(self.values, values, layer_idx)

    def _keep(self, kept: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        buffer = kept[layer]
        if buffer is None:
            buffer = new.new_zeros(self.num_rows, new.shape[1], self.capacity, new.shape[3])
            kept[layer] = buffer
        if self._at is None:
            buffer[self._rows, :, : new.shape[2]] = new[: len(self._rows)]
            buffer[self._rows, :, new.shape[2] :] = 0  # hidden by a mask, which does not hide what is not finite
            return new
        buffer[self._rows, :, self._at] = new[:, :, 0]
        return buffer[: len(self._rows)] if self._are_first else buffer[self._rows]
