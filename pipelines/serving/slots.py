"""Where open segments are written on: a fixed number of rows on the device, each one reader's or free.

Axes: S slots, R rows of a batch, n tokens of the longest, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmt_core import RecurrentModel
from rmt_core import state as states
from rmt_core.open_segments import OpenSegments
from rmt_core.state import State

from .readers import Reader


class Slots:
    """Keys, values and states of open segments. Slots in use come first, so that a batch of them is no copy.

    A free slot's content is never read for others, and is overwritten when the slot is taken.
    """

    def __init__(self, model: RecurrentModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self.holders: list[Reader] = []  # holder i has slot i
        self.segments = OpenSegments(model, num_slots)
        self.device = model.backbone.lm.get_input_embeddings().weight.device
        self._runs_within = model.memory.runs_within
        self.state = states.tree_map(torch.clone, states.detach(model.init_state(num_slots)))  # edited in place

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self.holders)

    def take(self, reader: Reader) -> None:
        """Give the reader a slot, unless it has one."""
        if reader.slot is None:
            assert self.num_free, "a reader was chosen that needs a slot where none is free"
            reader.slot = len(self.holders)
            self.holders.append(reader)

    def release(self, reader: Reader) -> None:
        """Free the reader's slot, if it has one; the last slot in use moves there."""
        if reader.slot is None:
            return
        last = self.holders.pop()
        if last is not reader:
            assert last.slot is not None
            self.segments.move(last.slot, reader.slot)
            for leaf in states.leaves(self.state):
                leaf[reader.slot] = leaf[last.slot]
            self.holders[reader.slot], last.slot = last, reader.slot
        reader.slot, reader.num_in_slot = None, 0

    def open(self, readers: Sequence[Reader], tokens: Tensor, lengths: Tensor, state: State) -> Tensor:
        """Run the readers' open tokens (R, n), of which `lengths` (R,); rows behind the readers' are padding.

        Gives the hidden states at the last of them, (R, D).
        """
        rows = self._rows_of(readers)
        hidden, within = self.segments.open(rows, tokens, lengths, state)
        self._put(rows, within if self._runs_within else state)
        return hidden

    def extend(self, readers: Sequence[Reader], slots: Sequence[int]) -> tuple[Tensor, State]:
        """Run the last tokens of those readers that are in `slots`, consecutive ones.

        Gives hidden states (R, D), row i of slot i, and states to `keep`. The other slots run some token, to no
        effect: it stands where their own next token will.
        """
        last = {reader.slot: reader.tokens[-1] for reader in readers}
        lengths = [self.holders[slot].num_in_slot if slot < len(self.holders) else 0 for slot in slots]
        return self.segments.extend(
            torch.tensor(slots, device=self.device),
            torch.tensor([last.get(slot, 0) for slot in slots], device=self.device),
            torch.tensor(lengths, device=self.device),
            states.tree_map(lambda leaf: leaf[slots[0] : slots[-1] + 1], self.state),
        )

    def keep(self, readers: Sequence[Reader], state: State) -> None:
        """Commit what `extend` gave for some readers."""
        if self._runs_within and readers:
            rows = self._rows_of(readers)
            self._put(rows, states.select(state, rows))

    def _rows_of(self, readers: Sequence[Reader]) -> Tensor:
        return torch.tensor([reader.slot for reader in readers], device=self.device)

    def _put(self, rows: Tensor, state: State) -> None:
        """The first rows of `state` into the slots `rows`."""
        for leaf, new in zip(states.leaves(self.state), states.leaves(state), strict=True):
            leaf.index_copy_(0, rows, new[: len(rows)])
