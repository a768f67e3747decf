"""Associative Recurrent Memory Transformer, ARMT (Rodkin et al. 2024, arXiv:2407.04841, section 2, equations 1-4).

Axes: B rows, T tokens of a segment, M memory tokens, S positions that a layer sees (T + M), F key features, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from .base import (
    Block,
    Dimensions,
    LayerMemory,
    LayerwiseMemory,
    LearnedRows,
    Segment,
    append_rows,
    at_least,
    split_rows,
)

EPSILON = 1e-5  # in every denominator, as released: a reading of the empty memory is 0 / EPSILON, exactly 0
NUM_ROLLS = 3  # nu of DPFP


@dataclass(frozen=True)
class ARMTConfig:
    """Settings of the Associative Recurrent Memory Transformer."""

    num_tokens: int = 10  # memory tokens after the text, which write; 0 is the plain backbone
    key_width: int = 64  # d_mem: queries and keys before their features, of which there are 6 times as many
    layers: tuple[int, ...] | None = None  # numbers of the layers that have a memory, from 0; None is all
    unit_features: bool = True  # queries' and keys' features have length 1, as in later releases; False: as published

    def __post_init__(self) -> None:
        at_least(0, self, "num_tokens")
        at_least(1, self, "key_width")
        if self.layers is None:
            return
        given: Any = self.layers
        numbers = {i for i in given if type(i) is int and i >= 0} if isinstance(given, tuple) else ()
        if not numbers or len(numbers) < len(given):
            raise ValueError(f"memory.layers is {self.layers!r}; it must be null for all, or different layers from 0")


def features(x: Tensor) -> Tensor:
    """DPFP-3 (Schlag et al. 2021, arXiv:2102.11174, section 5.3): (..., d) -> (..., 6 d), none of them negative."""
    parts = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([parts * parts.roll(i, dims=-1) for i in range(1, NUM_ROLLS + 1)], dim=-1)


def recall(state: State, queries: Tensor) -> Tensor:
    """What the memory holds at queries (B, S, F): (B, S, D), in their type (equation 3)."""
    values, norm = state["values"].to(queries.dtype), state["norm"].to(queries.dtype)
    return (queries @ values) / (queries @ norm[..., None] + EPSILON)


def associate(state: State, keys: Tensor, values: Tensor, strengths: Tensor) -> State:
    """The memory with values (B, M, D) put at keys (B, M, F) in place of what it held there (equations 1, 2 and 4).

    `strengths` (B, M, 1) in [0, 1] say how much of the old is replaced. All M are written at once, over the memory as
    it was before. gamma lets a key into the norm only as far as it is new; no gradient goes through it.
    """
    known = keys @ state["norm"][..., None]  # (B, M, 1)
    replaced = (keys @ state["values"]) / (known + EPSILON)
    gamma = (1 - known / (keys.square().sum(-1, keepdim=True) + EPSILON)).clamp(0, 1).detach()
    return {
        "values": state["values"] + keys.mT @ (strengths * (values - replaced)),
        "norm": state["norm"] + (gamma * keys).sum(1),
    }


class ARMTLayer(LayerMemory):
    """One layer's associations."""

    def __init__(self, config: ARMTConfig, width: int) -> None:
        super().__init__()
        self.num_tokens, self.width, self.num_features = config.num_tokens, width, 2 * NUM_ROLLS * config.key_width
        self.unit_features = config.unit_features
        self.query = nn.Linear(width, config.key_width, bias=False)
        self.key = nn.Linear(width, config.key_width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.strength = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.value.weight)

    def init_state(self, batch_size: int) -> State:
        dtype = torch.promote_types(self.anchor.dtype, torch.float32)  # many small additions are lost in half precision
        values = self.anchor.new_zeros(batch_size, self.num_features, self.width, dtype=dtype)
        return {"values": values, "norm": values.new_zeros(values.shape[:2])}

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        h = block(h + recall(state, self._features(self.query(h))))
        return h, self._write(state, segment.tail(h, self.num_tokens)) if segment.writes else state

    def _write(self, state: State, rows: Tensor) -> State:
        """The state after the outputs (B, M, D) of the memory tokens."""
        dtype = state["norm"].dtype
        keys, values = self._features(self.key(rows).to(dtype)), self.value(rows).to(dtype)
        return associate(state, keys, values, self.strength(rows).to(dtype).sigmoid())

    def _features(self, x: Tensor) -> Tensor:
        found = features(x)
        return F.normalize(found, dim=-1) if self.unit_features else found


class ARMTMemory(LayerwiseMemory):
    """Each layer has a key-value memory: read at every position before the layer, written after it by M tokens.

    The M tokens are learned, stand behind the text and are the same in every segment: all that is carried is in the
    layers. A layer's state is `{"values": A (B, F, D), "norm": z (B, F)}`, empty at first and kept in float32 or
    better; that of a layer without memory is (). Values start at 0, so that the model starts as its backbone.

    Features of length 1 (`unit_features`) are not in the paper; the authors' later code has them. Without, features are
    products of two numbers of a row: of small rows they are less than `EPSILON`, so that readings are damped and
    what is replaced is not what was held, and of large rows states can grow without bound.

    While a segment is open the memory is read, without memory tokens.

    Composed with a cache, `["armt", "xl"]` caches rows with their reading in them, `["xl", "armt"]` without.
    """

    Config = ARMTConfig
    has_rows_only = True

    def __init__(self, config: ARMTConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        num_layers = dimensions.num_layers
        chosen = range(num_layers) if config.layers is None else config.layers
        if any(i >= num_layers for i in chosen):
            raise ValueError(f"memory.layers is {list(chosen)}; the backbone has layers 0 to {num_layers - 1}")
        self.rows_after = config.num_tokens
        self.tokens = LearnedRows(config.num_tokens, dimensions.width, dimensions.embedding_std)
        self.layers = nn.ModuleList(
            ARMTLayer(config, dimensions.width) if config.num_tokens and i in chosen else LayerMemory()
            for i in range(num_layers)
        )

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        return append_rows(x, self.tokens(len(x)), segment.lengths) if segment.writes else x

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        return split_rows(h, self.rows_after, segment.lengths)[0] if segment.writes else h, state
