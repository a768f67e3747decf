"""Several memories at once: `["xl", "rmt"]` is Transformer-XL with memory tokens (arXiv:2207.06881, section 4).

Axes: B rows, T tokens of a segment, S positions that a layer sees, D width.
"""

from __future__ import annotations  # torch.compile cannot evaluate those of functions made while it traces

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..state import State
from .base import Attention, Block, Context, Dimensions, Memory, Segment


class ComposedMemory(Memory):
    """Memories one around the other, the first innermost at the ends and outermost around each layer.

    The state is the tuple of the members' states.
    """

    def __init__(self, members: Sequence[Memory], dimensions: Dimensions) -> None:
        super().__init__(None, dimensions)
        self.members = nn.ModuleList(members)
        self.layer_local = all(member.layer_local for member in members)  # type: ignore[misc]
        self.needs_relative_positions = any(member.needs_relative_positions for member in members)  # type: ignore[misc]
        self.has_rows_only = all(member.has_rows_only for member in members)  # type: ignore[misc]
        self.for_encoder_decoders = all(member.for_encoder_decoders for member in members)  # type: ignore[misc]
        self.runs_within = any(member.runs_within for member in members)  # type: ignore[misc]
        self.rows_before = sum(member.rows_before for member in members)
        self.rows_after = sum(member.rows_after for member in members)
        self.context_len = sum(member.context_len for member in members)

    def _memories(self) -> list[Memory]:
        return [member for member in self.members if isinstance(member, Memory)]

    def _segments(self, segment: Segment) -> list[Segment]:
        """What each member's `enter` and `leave` see: the members before it belong to the text."""
        inner, seen = 0, []
        for member in self._memories():
            seen.append(segment.enclosed(inner))
            if segment.stage != "extend":
                inner += member.rows_before + (member.rows_after if segment.writes else 0)
        return seen

    def init_state(self, batch_size: int) -> State:
        return tuple(member.init_state(batch_size) for member in self._memories())

    def by_layer(self, state: State) -> Sequence[State]:
        parts = [member.by_layer(part) for member, part in zip(self._memories(), state, strict=True)]
        return list(zip(*parts, strict=True))

    def from_layers(self, parts: Sequence[State]) -> State:
        return tuple(member.from_layers([part[i] for part in parts]) for i, member in enumerate(self._memories()))

    def context_filled(self, state: State) -> Tensor | int:
        filled: Tensor | int = 0
        for member, part in zip(self._memories(), state, strict=True):
            filled = filled + member.context_filled(part)
        return filled

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        for member, part, seen in zip(self._memories(), state, self._segments(segment), strict=True):
            x = member.enter(x, part, seen)
        return x

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        members, parts = self._memories(), list(state)
        inner = [sum(member.rows_after for member in members[:i]) for i in range(len(members))]
        starts = [sum(member.rows_before for member in members[i + 1 :]) for i in range(len(members))]

        def nested(i: int) -> Block:
            """The layer as member i - 1 sees it: run by member i and those after it."""
            if i == len(members):
                return block

            def run(
                h: Tensor,
                *,
                context: Context | None = None,
                between: Callable[[Tensor], Tensor] | None = None,
                attention: Attention | None = None,
            ) -> Tensor:
                within = _with(nested(i + 1), context, between, attention)
                seen = replace(segment, rows_between=inner[i], own_start=starts[i])
                out, parts[i] = members[i].around(layer, h, within, parts[i], seen)
                return out

            return run

        return nested(0)(h), tuple(parts)

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        parts = list(state)
        outside_in = reversed(list(enumerate(zip(self._memories(), self._segments(segment), strict=True))))
        for i, (member, seen) in outside_in:
            h, parts[i] = member.leave(h, parts[i], seen)
        return h, tuple(parts)


def _with(
    block: Block,
    outer_context: Context | None,
    outer_between: Callable[[Tensor], Tensor] | None,
    outer_attention: Attention | None,
) -> Block:
    """`block` with what an outer member asks of it added to what its caller asks."""
    if outer_context is None and outer_between is None and outer_attention is None:
        return block

    def joined(
        h: Tensor,
        *,
        context: Context | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
        attention: Attention | None = None,
    ) -> Tensor:
        maps = [m for m in (between, outer_between) if m is not None]

        def both(x: Tensor) -> Tensor:
            for m in maps:
                x = m(x)
            return x

        return block(
            h,
            context=context or outer_context,  # no composition has two
            between=both if maps else None,
            attention=attention or outer_attention,
        )

    return joined
