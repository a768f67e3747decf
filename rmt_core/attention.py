"""Where attention goes between memory rows and text rows: as shares, and as maps.

The shares are those of arXiv:2006.11527, section 4: read (text to memory), write (memory to text), process (memory to
memory) and sequence (text to text). They are found by giving the same attention other values, which say of what kind a
key is: any average of values tells so much of its weights, and no map is made.

Axes: B rows, T tokens of a segment, S rows that a layer sees, N rows that are computed, C rows that are seen, G groups
of rows, L layers, H heads, D width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder import EncoderModel
from .encoder_backbone import attend
from .memory.base import Attention, Block, Context, EncoderBlock, Heads, Memory, Segment
from .recurrent import RecurrentModel
from .state import State

PADDING, TEXT, MEMORY = 0, 1, 2  # kinds of rows


class AttentionMass(NamedTuple):
    """Shares of all attention of a head, or of a layer's heads together; they sum to 1."""

    layer: int
    head: int | None  # None: the mean of the layer's heads
    read: float  # text rows to memory rows
    write: float  # memory rows to text rows
    process: float  # memory rows to memory rows
    sequence: float  # text rows to text rows

    @property
    def read_per_text_row(self) -> float:
        """The share of a text row's own attention that goes to memory."""
        return self.read / (self.read + self.sequence)


class AttentionMaps(NamedTuple):
    """The attention of one segment."""

    weights: Tensor  # (L, H, S, S): what the row of the third axis gives to that of the fourth
    is_memory: Tensor  # (S,) bool: which rows are memory


@torch.no_grad()
def attention_mass(
    model: RecurrentModel | EncoderModel, tokens: Tensor, state: State = None, lengths: Tensor | None = None
) -> list[AttentionMass]:
    """The shares of each head of each layer, over all rows of one segment: tokens (B, T), as for `model.step`.

    `state` is the memory before the segment (None: that before the first); `lengths` (B,) are at least 1. [CLS] and
    [SEP] of an encoder count as text. Put the model in evaluation mode first. A ValueError where attention sees more
    than rows of memory and text, such as a cache.
    """
    kinds, layers = _watch(model, tokens, state, lengths, lambda kinds: F.one_hot(kinds, 3))
    found = []
    for layer, shares in enumerate(layers):  # (B, H, S, 3)
        given = F.one_hot(kinds, 3).to(shares.dtype)[:, None].transpose(2, 3) @ shares  # (B, H, kind of query, of key)
        mass = given.sum(0)
        total = mass[:, TEXT:, TEXT:].sum((1, 2))
        for head, part in enumerate((mass / total[:, None, None]).tolist()):
            found.append(
                AttentionMass(
                    layer, head, part[TEXT][MEMORY], part[MEMORY][TEXT], part[MEMORY][MEMORY], part[TEXT][TEXT]
                )
            )
    return found


def mean_over_heads(masses: Sequence[AttentionMass]) -> list[AttentionMass]:
    """One line a layer."""
    found = []
    for layer in dict.fromkeys(mass.layer for mass in masses):
        heads = [mass[2:] for mass in masses if mass.layer == layer]
        found.append(AttentionMass(layer, None, *(sum(column) / len(heads) for column in zip(*heads, strict=True))))
    return found


@torch.no_grad()
def attention_maps(model: RecurrentModel | EncoderModel, tokens: Tensor, state: State = None) -> AttentionMaps:
    """All weights for one segment of one document: tokens (T,); L x H x S x S numbers. See `attention_mass`."""
    if tokens.dim() != 1:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; maps are made of one segment of one document, (tokens,)")

    def each_row(kinds: Tensor) -> Tensor:
        return torch.eye(kinds.shape[1], device=kinds.device)[None]

    kinds, layers = _watch(model, tokens[None], state, None, each_row)
    return AttentionMaps(torch.cat(layers), kinds[0] == MEMORY)


def _watch(
    model: RecurrentModel | EncoderModel,
    tokens: Tensor,
    state: State,
    lengths: Tensor | None,
    groups_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The kinds of the rows (B, S), and for each layer what each row gives to each group, (B, H, S, G)."""
    if not model.memory.has_rows_only:
        raise ValueError("attention is measured for memories that are rows among the text's, and this one is not")
    watched = _Watched(model.memory, groups_of)
    state = model.init_state(len(tokens)) if state is None else state
    if isinstance(model, EncoderModel):
        EncoderModel(model.backbone, watched, model.config).step(tokens, state, lengths)
    else:
        RecurrentModel(model.backbone, watched, model.config).step(tokens, state, lengths)
    assert watched.kinds is not None
    return watched.kinds, watched.found


class _Watched(Memory):
    """A memory that keeps what its layers' attention gives to groups of rows."""

    def __init__(self, memory: Memory, groups_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__(memory.config, memory.dimensions)
        self.memory = memory
        self.rows_before, self.rows_after = memory.rows_before, memory.rows_after
        self.groups_of = groups_of  # kinds of rows (B, S) -> which group a row is of, (B or 1, S, G)
        self.kinds: Tensor | None = None
        self.found: list[Tensor] = []

    def init_state(self, batch_size: int) -> State:
        return self.memory.init_state(batch_size)

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        return self.memory.enter(x, state, segment)

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        num_after = h.shape[1] - segment.text_start - segment.text_len
        end = segment.text_start + (segment.text_len if segment.lengths is None else segment.lengths[:, None])
        at = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
        self._begin((at < segment.text_start) | ((at >= end) & (at < end + num_after)), segment.text(h))

        def run(
            h: Tensor,
            *,
            context: Context | None = None,
            between: Callable[[Tensor], Tensor] | None = None,
            attention: Attention | None = None,
        ) -> Tensor:
            watching = self._watching(attention or _causal, None, None)
            return block(h, context=context, between=between, attention=watching)

        return self.memory.around(layer, h, run, state, segment)

    def encode(self, layer: int, h: Tensor, block: EncoderBlock, segment: Segment) -> Tensor:
        at = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
        self._begin((at >= 1) & (at < segment.text_start), (at == 0) | segment.text(h))

        def run(
            h: Tensor,
            *,
            rows: Tensor | None = None,
            seen: Tensor | None = None,
            layer: nn.Module | None = None,
            attention: Attention | None = None,
        ) -> Tensor:
            watching = self._watching(attention or attend, rows, seen)
            return block(h, rows=rows, seen=seen, layer=layer, attention=watching)

        return self.memory.encode(layer, h, run, segment)

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        return self.memory.leave(h, state, segment)

    def _begin(self, is_memory: Tensor, is_text: Tensor) -> None:
        """A layer begins, of rows of these kinds (B, S)."""
        self.kinds = torch.where(is_memory, MEMORY, torch.where(is_text, TEXT, PADDING))
        self.found.append(is_memory.new_zeros(0))

    def _watching(self, inner: Attention, rows: Tensor | None, seen: Tensor | None) -> Attention:
        """`inner` for the rows at `rows` (N,), which see those at `seen` (C,); None: all."""
        kinds = self.kinds
        assert kinds is not None

        def watched(heads: Heads) -> Tensor:
            groups = self.groups_of(kinds).to(heads.values.dtype)
            shares = _shares(inner, heads, groups if seen is None else groups[:, seen])
            if not self.found[-1].numel():
                self.found[-1] = shares.new_zeros(len(kinds), shares.shape[1], kinds.shape[1], shares.shape[3])
            at = torch.arange(kinds.shape[1], device=kinds.device) if rows is None else rows
            self.found[-1] = self.found[-1].index_copy(2, at, shares)
            return inner(heads)

        return watched


def _causal(heads: Heads) -> Tensor:
    return F.scaled_dot_product_attention(
        heads.queries, heads.keys, heads.values, dropout_p=heads.dropout, is_causal=True, scale=heads.scale
    )


def _shares(attention: Attention, heads: Heads, groups: Tensor) -> Tensor:
    """What rows give to groups of keys, (B, H, N, G): `attention` of membership (B or 1, C, G) instead of values."""
    width, found = heads.values.shape[-1], []
    for part in groups.split(width, dim=-1):
        values = torch.zeros_like(heads.values)
        values[..., : part.shape[-1]] = part[:, None]
        found.append(attention(heads._replace(values=values, dropout=0.0))[..., : part.shape[-1]])
    return torch.cat(found, dim=-1)
