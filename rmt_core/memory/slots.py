"""Memformer's slots (Wu et al. 2020, arXiv:2010.06891, section 3).

Axes: B rows, T tokens of a segment, S positions that a layer sees, K slots, D width, H heads, d = D / H.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from .base import Block, Dimensions, LearnedRows, Memory, Segment, at_least

START = 0.3  # length of the vectors v at first: well below that of the slots, 1, so that little is forgotten


@dataclass(frozen=True)
class MemformerConfig:
    """Settings of Memformer."""

    num_slots: int = 16  # vectors of the memory; 0 is the plain backbone
    num_heads: int = 4  # of reading and of writing; must divide the backbone's width
    temperature: float = 0.25  # of the writer's attention, in (0, 1]: the lower, the fewer tokens a slot takes from
    forgetting: bool = True  # false: slots are normalised without bias (the paper's ablation)

    def __post_init__(self) -> None:
        at_least(0, self, "num_slots")
        at_least(1, self, "num_heads")
        if not 0 < self.temperature <= 1:
            raise ValueError(f"memory.temperature is {self.temperature}; it must be above 0 and at most 1")


class MemformerMemory(Memory):
    """K slots of length 1 that every layer's tokens read and the last layer's tokens rewrite; the state is (B, K, D).

    Reading is attention from tokens to slots, between a layer's self-attention and its feed-forward part. Writing is
    attention from each slot to itself and the segment's tokens, after the final norm, and then a step towards the
    slot's own learned vector v, which is where it starts and what it becomes when nothing is written.

    Beyond the equations: both attentions normalise the tokens first, and see the slots times sqrt(D), which is as
    large as normed tokens are; the paper's weights times a constant compute the same.
    """

    Config = MemformerConfig
    for_encoder_decoders = True
    layer_local = False  # the first layer of a segment reads what the last layer of the one before has written

    def __init__(self, config: MemformerConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        width, num_heads = dimensions.width, config.num_heads
        if config.num_slots and width % num_heads:
            raise ValueError(f"memory.num_heads is {num_heads}; it must divide the backbone's width, {width}")
        readers = dimensions.num_layers if config.num_slots else 0
        self.readers = nn.ModuleList(SlotReader(width, num_heads, dimensions.embedding_std) for _ in range(readers))
        self.bias = LearnedRows(config.num_slots, width, START / width**0.5)  # v
        self.writer = SlotWriter(width, num_heads, config.temperature) if config.num_slots else None

    def init_state(self, batch_size: int) -> Tensor:
        return F.normalize(self.bias(batch_size), dim=-1)

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        if not self.config.num_slots:
            return block(h), state
        return block(h, between=lambda x: x + self.readers[layer](x, state)), state

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        if self.writer is None or not segment.writes:
            return h, state
        padding = None
        if segment.lengths is not None:
            padding = torch.arange(h.shape[1], device=h.device) >= segment.lengths[:, None]  # (B, S)
        new = self.writer(h, state, padding)
        if self.config.forgetting:
            new = new + self.bias(len(h))
        return h, F.normalize(new, dim=-1)


class SlotReader(nn.Module):
    """What tokens find in the slots, by attention of several heads."""

    def __init__(self, width: int, num_heads: int, std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        # What is found starts out small beside embeddings, which vary by `std`, but never at zero: all learns at once.
        nn.init.normal_(self.out.weight, std=std / width**0.5)

    def forward(self, h: Tensor, slots: Tensor) -> Tensor:
        """h (B, S, D), slots (B, K, D) -> (B, S, D)."""
        slots = slots * slots.shape[-1] ** 0.5
        queries = _heads(self.query(self.norm(h)), self.num_heads)
        keys, values = _heads(self.key(slots), self.num_heads), _heads(self.value(slots), self.num_heads)
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)  # (B, H, S, K)
        return self.out((weights @ values).transpose(1, 2).flatten(2))


class SlotWriter(nn.Module):
    """What slots become by attention to themselves and to tokens; a slot sees no other slot."""

    def __init__(self, width: int, num_heads: int, temperature: float) -> None:
        super().__init__()
        self.num_heads, self.temperature = num_heads, temperature
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, h: Tensor, slots: Tensor, padding: Tensor | None) -> Tensor:
        """h (B, S, D), of which `padding` (B, S) is not there, and slots (B, K, D) -> (B, K, D), not normalised."""
        size = slots.shape[-1] ** 0.5
        h, slots = self.norm(h), slots * size
        queries, own_keys = _heads(self.query(slots), self.num_heads), _heads(self.key(slots), self.num_heads)
        keys, values = _heads(self.key(h), self.num_heads), _heads(self.value(h), self.num_heads)  # (B, H, S, d)
        seen = queries @ keys.mT  # (B, H, K, S)
        if padding is not None:
            seen = seen.masked_fill(padding[:, None, None], float("-inf"))
        own = (queries * own_keys).sum(-1, keepdim=True)  # (B, H, K, 1)
        logits = torch.cat([own, seen], dim=-1) / queries.shape[-1] ** 0.5
        weights = (logits / self.temperature).softmax(-1)
        kept = weights[..., :1] * _heads(slots, self.num_heads)
        return (kept + weights[..., 1:] @ values).transpose(1, 2).flatten(2) / size


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
