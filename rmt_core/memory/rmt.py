"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881, section 3; 2023, arXiv:2304.11062).

With `gate` it keeps of its memory what gates leave (Hutchins et al. 2022, arXiv:2203.07852). With `max_past_memories`
it is RMT-R, which also attends to its own past memories (a baseline in arXiv:2407.04841).

Axes: B rows, T tokens of a segment, M memory tokens, R rows read, P past memories, S = R + T + M, H heads, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from .base import Block, Dimensions, Heads, LearnedRows, Memory, Segment, append_rows, at_least, split_rows, take


@dataclass(frozen=True)
class RMTConfig:
    """Settings of the Recurrent Memory Transformer."""

    num_tokens: int = 8  # memory tokens, which are written and carried; 0 is the plain backbone
    num_read_tokens: int | None = None  # rows read before the text; None: as many as `num_tokens`
    bidirectional: bool = False  # rows of one memory block see each other both ways
    max_past_memories: int = 0  # past memories kept to retrieve from, the newest ones (RMT-R); 0: no retrieval
    noise: float = 0.0  # in training only: standard deviation of what is added to the memory, of its root mean square
    gate: str | None = None  # between the old memory and what is written, one of GATES; None: no old one stays
    write_cost: float = 0.0  # nats in the auxiliary loss for a segment whose gate writes the whole memory
    write_floor: float = 0.0  # in training only: the least probability with which a binary gate writes
    write_threshold: float | None = None  # in evaluation only: a binary gate writes where it is surer; None: 0.5

    def __post_init__(self) -> None:
        at_least(0, self, "num_tokens", "max_past_memories", "noise", "write_cost")
        read = self.num_read_tokens
        if read is not None and (type(read) is not int or read < 1):
            raise ValueError(f"memory.num_read_tokens is {read!r}; it must be a whole number, at least 1, or None")
        if self.gate is not None and self.gate not in GATES:
            raise ValueError(f"memory.gate is {self.gate!r}; it must be one of {', '.join(GATES)}, or None")
        if self.write_cost and self.gate is None:
            raise ValueError(f"memory.write_cost is {self.write_cost}; it must be 0 where there is no gate")
        if not 0 <= self.write_floor < 1:
            raise ValueError(f"memory.write_floor is {self.write_floor}; it must be at least 0 and below 1")
        if self.write_floor and self.gate != "binary":
            raise ValueError(f"memory.write_floor is {self.write_floor}; it must be 0 where the gate is not binary")
        threshold = self.write_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"memory.write_threshold is {threshold}; it must be above 0 and below 1, or None")
        if threshold is not None and self.gate != "binary":
            raise ValueError(f"memory.write_threshold is {threshold}; it must be None where the gate is not binary")
        if not self.num_tokens and (read is not None or self.max_past_memories or self.gate):
            raise ValueError("memory.num_tokens is 0; it must be at least 1 where rows are read, retrieved or gated")


class RMTMemory(Memory):
    """M tokens read before the segment and written after it; the state is the written ones, (B, M, D).

    The same vectors stand in both places. By default everything is causal, as in the released decoder. With
    `bidirectional`, as in the paper's figure 6d, read rows see all read rows and write rows see everything; in a
    composition other memories' rows beside them belong to these blocks. In a short segment the write tokens follow the
    row's last real token, so that what comes after them, padding, is seen by nobody.

    Where fewer rows are read than written, the last R written ones are read: in the causal write block they are those
    that see the others. Where more are read, learned rows, the same for each segment, follow the M carried ones.

    RMT-R (`max_past_memories` > 0) reads as many rows again, after the first ones: what these find in the current
    memory and the P newest of those before it. The state is then `{"memory": (B, M, D), "past": (B, P, M, D),
    "count": (B,)}`, the oldest past memory first, zeros behind the `count` valid ones. Published code keeps all of
    them; nothing is detached.

    With `noise`, a segment in training reads and continues its memory with Gaussian noise on it, drawn as dropout is.
    What is held only loosely is lost then, so that the model learns to restore its memory in every segment; without,
    nothing in training tells whether small errors grow or shrink over more segments than it reaches. Not in published
    RMTs.

    With `gate` the written rows do not replace the memory, which a gate keeps in part, without noise: gates of
    Block-Recurrent Transformers number by number, a binary one token by token. With `write_cost` the auxiliary loss
    holds the share of the memory that is written, so many times, which teaches a gate to write only where that is of
    use. Not in published RMTs either.

    On an encoder (arXiv:2304.11062, section 2) the memory stands once, before the text, and what comes out of its rows
    is the new state; the options above are for causal backbones.
    """

    Config = RMTConfig
    has_rows_only = True
    for_encoders = True
    layer_local = False  # the first layer of a segment needs the last layer of the one before

    def __init__(self, config: RMTConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        width, std = dimensions.width, dimensions.embedding_std
        num_read = config.num_tokens if config.num_read_tokens is None else config.num_read_tokens
        retrieves = config.max_past_memories > 0
        self.stands_once = dimensions.encoder_layers is not None
        self.computes_attention = config.bidirectional
        if self.stands_once and config != RMTConfig(config.num_tokens):
            raise ValueError("on an encoder memory 'rmt' has one block, read and written: it takes num_tokens only")
        self.rows_before = num_read * (2 if retrieves else 1)
        self.rows_after = 0 if self.stands_once else config.num_tokens
        self.num_carried = min(num_read, config.num_tokens)  # written rows that are read
        num_extra = num_read - self.num_carried
        self.initial = LearnedRows(config.num_tokens, width, std)
        self.extra = LearnedRows(num_extra, width, std) if num_extra else None
        self.retrieval = Retrieval(width) if retrieves else None
        self.gate = _gate(config, width)

    def init_state(self, batch_size: int) -> State:
        memory: Tensor = self.initial(batch_size)
        if self.retrieval is None:
            return memory
        past = memory.new_zeros(batch_size, self.config.max_past_memories, *memory.shape[1:])
        return {"memory": memory, "past": past, "count": torch.zeros(batch_size, dtype=torch.long, device=past.device)}

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        if segment.stage == "extend":
            return x
        memory = self._disturbed(state if self.retrieval is None else state["memory"])
        read = memory[:, memory.shape[1] - self.num_carried :]
        if self.extra is not None:
            read = torch.cat([read, self.extra(len(read))], dim=1)
        if self.retrieval is not None:
            read = torch.cat([read, self.retrieval(read, memory, state["past"], state["count"])], dim=1)
        writes = segment.writes and not self.stands_once
        text = append_rows(x, memory, segment.lengths) if writes else x
        return torch.cat([read, text], dim=1)  # (B, S, D)

    def _disturbed(self, memory: Tensor) -> Tensor:
        """The memory (B, M, D), with noise in training."""
        if not (self.training and self.config.noise):
            return memory
        scale = memory.detach().square().mean(-1, keepdim=True).sqrt()
        return memory + self.config.noise * scale * torch.randn_like(memory)

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        if not self.config.bidirectional or segment.stage == "extend":  # a decoded token is no memory row
            return block(h), state
        num_after = h.shape[1] - segment.text_start - segment.text_len
        return block(h, attention=lambda heads: open_blocks(heads, segment, num_after)), state

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        if segment.stage == "extend":
            return h, state
        read, h = h[:, : self.rows_before], h[:, self.rows_before :]
        if self.stands_once:
            return h, read
        if not segment.writes:
            return h, state
        text, written = split_rows(h, self.rows_after, segment.lengths)
        if self.gate is not None:
            written, share = self.gate(state if self.retrieval is None else state["memory"], written)
            if self.config.write_cost:
                segment.aux.append(self.config.write_cost * _of_texts(share, segment).mean())
        return text, written if self.retrieval is None else {"memory": written, **_remember(state)}


def _of_texts(share: Tensor, segment: Segment) -> Tensor:
    """The share (B,), 0 in rows without text, which write nothing: a row costs the same in every batch."""
    return share if segment.lengths is None else share * (segment.lengths > 0)


class FixedGate(nn.Module):
    """`c g + (W_z h + b_z) (1 - g)` with `g = sigmoid(b_g)`, the same for all rows and segments.

    The old memory `c` and the written rows `h`, both (B, M, D), give the new memory number by number (equations 2 and 3
    of Block-Recurrent Transformers, Hutchins et al. 2022, arXiv:2203.07852, section 3.2). All gates give the new memory
    and the share of it that is written, (B,).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = _linear(width)
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, memory: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        value = self.value(written).to(memory.dtype)  # under autocast it may be narrower
        kept = torch.sigmoid(self.bias).to(memory.dtype)
        return torch.lerp(value, memory, kept), (1 - kept.mean()).expand(len(memory))


class LSTMGate(nn.Module):
    """`c f + z i`, which writes and forgets little at first (the same, equations 4 to 7).

    `z = tanh(W_z h + b_z)`, `i = sigmoid(W_i h + b_i - 1)`, `f = sigmoid(W_f h + b_f + 1)`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.into, self.forget = (_linear(width) for _ in range(3))

    def forward(self, memory: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        i, f = torch.sigmoid(self.into(written) - 1), torch.sigmoid(self.forget(written) + 1)
        return memory * f + torch.tanh(self.value(written)) * i, i.mean((1, 2))


class BinaryGate(nn.Module):
    """`u h + (1 - u) c` with `u` 0 or 1 for each memory token: one that is not written stays as it is, to the bit.

    The binary state update of Skip RNN (Campos et al. 2018, arXiv:1708.06834), there one for the whole state, here
    decided by what would be written and what stands there: `p = sigmoid(w gelu(W [h, c] + b) + a + 2)`, so that it
    writes nearly always at first. In evaluation `u = [p > threshold]`: 0.5 is for texts in which what is worth writing
    is as frequent as in training, and more for longer ones, where it is rarer and false alarms are what is lost by. In
    training `u` is drawn, 1 with probability `p + floor (1 - p)`, so that only a sure gate is a good one, and has the
    gradient of `p` (straight through, Bengio et al. 2013, arXiv:1308.3432). One random number decides for all tokens of
    a row: drawn apart, unsure tokens would stand in for one another, of which none is written in evaluation. The floor
    makes memories be written where the gate would not: a model learns to keep what it holds through that too, should a
    gate err.
    """

    def __init__(self, width: int, floor: float, threshold: float | None) -> None:
        super().__init__()
        threshold = 0.5 if threshold is None else threshold
        self.hidden = nn.Linear(2 * width, width)
        self.update = _linear(width, 1)
        self.floor = floor
        self.least_logit = math.log(threshold / (1 - threshold))  # in half precision probabilities near 1 are all 1

    def logit(self, memory: Tensor, written: Tensor) -> Tensor:
        """Of the probability of writing, (B, M, 1)."""
        seen = F.gelu(self.hidden(torch.cat([written, memory], dim=-1)))
        return self.update(seen).to(memory.dtype) + 2

    def forward(self, memory: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        logit = self.logit(memory, written)
        p = torch.sigmoid(logit)
        writes = p + self.floor * (1 - p) > torch.rand_like(p[:, :1]) if self.training else logit > self.least_logit
        new = torch.where(writes, written, memory)
        return new + (p - p.detach()) * (written - memory).detach(), p.mean((1, 2))


GATES = ("fixed", "lstm", "binary")


def _gate(config: RMTConfig, width: int) -> FixedGate | LSTMGate | BinaryGate | None:
    if config.gate == "fixed":
        return FixedGate(width)
    if config.gate == "lstm":
        return LSTMGate(width)
    return BinaryGate(width, config.write_floor, config.write_threshold) if config.gate == "binary" else None


def _linear(width: int, num_gates: int | None = None) -> nn.Linear:
    """Small weights, so that gates begin near their offsets, as published."""
    made = nn.Linear(width, width if num_gates is None else num_gates)
    nn.init.normal_(made.weight, std=(0.1 / width) ** 0.5)
    nn.init.zeros_(made.bias)
    return made


class Retrieval(nn.Module):
    """Attention of rows to past memories: one head, then a feed-forward layer, each with its residual.

    `R = W_o softmax(Q K^T / sqrt(D)) V + M`, `R + MLP(LN(R))` with `Q = W_q LN(M)` and keys and values of the
    normalised memories; the feed-forward layer is four times as wide as the rows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, rows: Tensor, memory: Tensor, past: Tensor, count: Tensor) -> Tensor:
        """What rows (B, R, D) find in the memory (B, M, D) and the `count` (B,) first of past (B, P, M, D)."""
        m = memory.shape[1]
        seen = self.norm(torch.cat([memory, past.flatten(1, 2)], dim=1))  # (B, M + P * M, D)
        valid = torch.arange(seen.shape[1], device=seen.device) < ((count + 1) * m)[:, None]
        scores = self.query(self.norm(rows)) @ self.key(seen).transpose(1, 2) * seen.shape[-1] ** -0.5
        weights = scores.masked_fill(~valid[:, None], float("-inf")).softmax(-1)  # (B, R, M + P * M)
        found = self.output(weights @ self.value(seen)) + rows
        return found + self.mlp(self.mlp_norm(found))


def _remember(state: State) -> State:
    """The past with the memory that has just been read at its end; the oldest one goes where there is no room."""
    memory, past, count = state["memory"], state["past"], state["count"]
    size = past.shape[1]
    at = torch.arange(size, device=past.device).expand(len(past), -1)
    index = torch.where(at < count[:, None], at, size)  # the new one stands at `size`
    index = torch.where(count[:, None] == size, at + 1, index)
    both = torch.cat([past, memory[:, None]], dim=1).flatten(2)  # (B, P + 1, M * D)
    new = (count + 1).clamp(max=size)
    kept = take(both, index).masked_fill((at >= new[:, None])[..., None], 0)
    return {"past": kept.unflatten(2, memory.shape[1:]), "count": new}


def open_blocks(heads: Heads, segment: Segment, num_after: int) -> Tensor:
    """Causal attention in which the rows before the text see each other, and so do the `num_after` rows behind it.

    It takes one causal call for all rows and one further call a block, each over the rows up to the block's end. These
    need no mask, but where blocks end at different places in the rows of a batch: there a row's keys are masked,
    (B, 1, 1, C). Rows of a cache stand before all and are seen by all.
    """
    out = F.scaled_dot_product_attention(
        heads.queries, heads.keys, heads.values, dropout_p=heads.dropout, is_causal=True, scale=heads.scale
    )
    first = 0 if heads.context_filled is None else heads.context_filled
    text_len = segment.text_len if segment.lengths is None else segment.lengths
    out = _open(heads, out, first, segment.text_start)
    return _open(heads, out, first + segment.text_start + text_len, num_after)


def _open(heads: Heads, out: Tensor, first: int | Tensor, num_rows: int) -> Tensor:
    """`out` (B, H, N, D / H) where `num_rows` rows from `first`, () or (B,), on see all rows up to the last of them."""
    if num_rows < 2:  # a row alone sees them under the causal flag
        return out
    queries, keys, values = heads.queries, heads.keys, heads.values
    if isinstance(first, int):
        end = first + num_rows
        rows = F.scaled_dot_product_attention(
            queries[:, :, first:end],
            keys[:, :, :end],
            values[:, :, :end],
            dropout_p=heads.dropout,
            scale=heads.scale,
        )
        return torch.cat([out[:, :, :first], rows, out[:, :, end:]], dim=2)
    at = first[:, None] + torch.arange(num_rows, device=out.device)  # (B, n)
    index = at[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    seen = torch.arange(keys.shape[2], device=out.device) < (first + num_rows)[:, None]
    rows = F.scaled_dot_product_attention(
        queries.gather(2, index),
        keys,
        values,
        attn_mask=seen[:, None, None],
        dropout_p=heads.dropout,
        scale=heads.scale,
    )
    return out.scatter(2, index, rows)
