"""Full attention over long texts without a memory: the exact baseline, computed block by block.

Liu and Abbeel 2023, arXiv:2305.19370, section 3 (blockwise parallel execution); the online softmax and its backward
pass are those of arXiv:2205.14135, algorithms 1 and 4.

Axes: B rows, N tokens, n tokens of a query chunk, c of a key chunk, H heads, G heads of keys and values, R = H / G,
D width, d of a head, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone, Placement
from .memory.base import Heads
from .recurrent import IGNORED, Output, RecurrentModel


def full_attention(model: RecurrentModel | Backbone, tokens: Tensor, *, chunk_len: int = 512) -> Output:
    """The backbone over whole texts, tokens (B, N) int64, each token seeing all before it.

    Hidden states and gradients are those of the Hugging Face model. For each chunk of `chunk_len` tokens in turn a
    layer computes attention by an online softmax over the chunks of keys, then its projection, residual, norm and
    feed-forward part; of this only the chunk's input, keys and values are kept, and the backward pass computes the
    chunk again. So what grows with N is (D + 2 G d) numbers a token and layer. Time is that of N x N attention.

    Shorter rows are padded behind: in a causal model nothing real sees it. A model's memory plays no part. Raises
    ValueError for texts longer than the positions that the backbone was made for, and for dropout of attention weights.
    """
    backbone = model if isinstance(model, Backbone) else model.backbone
    _check(backbone, tokens, chunk_len)
    hidden = torch.cat([backbone.norm(chunk) for chunk in _layers(backbone, tokens, chunk_len)], dim=1)
    return Output(hidden, _penalty(backbone, hidden), backbone.head)


def full_attention_loss(
    model: RecurrentModel | Backbone, tokens: Tensor, labels: Tensor, *, chunk_len: int = 512
) -> Tensor:
    """Mean nats per label, (), as `RecurrentModel.forward` has it: labels (B, N) are the next token, -100 is skipped.

    As `full_attention`; logits too are computed chunk by chunk, and again in the backward pass.
    """
    if tokens.shape != labels.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)} must be equal (rows, tokens)")
    backbone = model if isinstance(model, Backbone) else model.backbone
    _check(backbone, tokens, chunk_len)

    def nats(h: Tensor, answers: Tensor) -> Tensor:
        asked = answers != IGNORED
        logits = backbone.head(backbone.norm(h)[asked])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, answers[asked], reduction="sum")

    chunks = _layers(backbone, tokens, chunk_len)
    parts = [_again(nats, h, part) for h, part in zip(chunks, labels.split(chunk_len, 1), strict=True)]
    count = (labels != IGNORED).sum().clamp(min=1)
    return torch.stack(parts).sum() / count + _penalty(backbone, chunks[0])


def _check(backbone: Backbone, tokens: Tensor, chunk_len: int) -> None:
    if type(chunk_len) is not int or chunk_len < 1:
        raise ValueError(f"chunk_len is {chunk_len!r}; it must be a whole number of tokens, at least 1")
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; full attention takes (rows, at least 1 token)")
    if tokens.shape[1] > backbone.max_positions:
        raise ValueError(
            f"a text of {tokens.shape[1]} tokens exceeds the backbone's {backbone.max_positions} positions; "
            "cut it, or read it segment by segment with a memory"
        )


def _penalty(backbone: Backbone, like: Tensor) -> Tensor:
    losses = backbone.penalties()
    return torch.stack(losses).sum() if losses else like.new_zeros(())


def _again(function: Any, *inputs: Any) -> Any:
    """The function's result; what it keeps for the backward pass is computed again there."""
    return checkpoint(function, *inputs, use_reentrant=False)


def _layers(backbone: Backbone, tokens: Tensor, chunk_len: int) -> list[Tensor]:
    """What the last layer gives for each chunk, (B, n, D) each, before the final norm."""
    placement = Placement(torch.arange(tokens.shape[1], device=tokens.device)[None])
    h = backbone.place(backbone.embed(tokens), placement)
    chunks = list(h.split(chunk_len, 1))
    blocks = backbone.blocks_from(h, placement, range(0, tokens.shape[1], chunk_len))
    for layer in range(backbone.dimensions.num_layers):
        seen: tuple[Tensor, ...] = ()  # keys and values of the chunks so far, in turn
        for i in range(len(chunks)):
            chunks[i], *own = _again(_Chunk(backbone, blocks[i][layer]), chunks[i], *seen)
            seen = (*seen, *own)
    return chunks


class _Chunk:
    """One layer on one chunk of queries."""

    def __init__(self, backbone: Backbone, block: Any) -> None:
        config: Any = backbone.lm.config
        self.block = block
        self.groups = config.num_attention_heads // getattr(config, backbone.family.kv_heads_name)  # R

    def __call__(self, h: Tensor, *seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, n, D), keys and values (B, G, c, d) of earlier chunks: the output, the chunk's own keys and values."""
        own: list[Tensor] = []

        def attend(heads: Heads) -> Tensor:
            if heads.dropout:
                raise ValueError(
                    f"attention weights have dropout {heads.dropout}; full attention by blocks has none: "
                    "set it to 0 in the backbone's configuration, or call eval()"
                )
            own.extend((heads.keys[:, :: self.groups], heads.values[:, :: self.groups]))
            queries = heads.queries.unflatten(1, (-1, self.groups))  # (B, G, R, n, d)
            mixed: Tensor = _OnlineSoftmax.apply(queries, heads.scale, *seen, *own)
            return mixed.flatten(1, 2)

        out = self.block(h, attention=attend)
        return out, own[0], own[1]


class _OnlineSoftmax(torch.autograd.Function):
    """Causal attention of a chunk of queries to the chunks of keys up to its own, one at a time.

    queries (B, G, R, n, d); then keys and values (B, G, c, d) of each chunk in turn, the last at the queries' own
    positions. Sums are kept in at least float32. Neither pass holds more than one block of weights, (B, G, R, n, c).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, scale: float, *seen: Tensor) -> Tensor:
        exact = torch.promote_types(queries.dtype, torch.float32)
        highest = queries.new_full((*queries.shape[:-1], 1), -torch.inf, dtype=exact)
        total = torch.zeros_like(highest)
        mixed = torch.zeros_like(queries, dtype=exact)
        for i in range(0, len(seen), 2):
            logits = _logits(queries, scale, seen[i], i == len(seen) - 2)
            higher = torch.maximum(highest, logits.amax(-1, keepdim=True))
            weights, kept = (logits - higher).exp(), (highest - higher).exp()
            total = total * kept + weights.sum(-1, keepdim=True)
            mixed = mixed * kept + weights.to(queries.dtype) @ seen[i + 1][:, :, None]
            highest = higher
        mixed = (mixed / total).to(queries.dtype)
        ctx.scale = scale
        ctx.save_for_backward(queries, mixed, highest + total.log(), *seen)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, mixed, log_sum, *seen = ctx.saved_tensors
        shared = (gradient * mixed).sum(-1, keepdim=True, dtype=log_sum.dtype)
        of_queries = torch.zeros_like(queries, dtype=log_sum.dtype)
        of_seen: list[Tensor] = []
        for i in range(0, len(seen), 2):
            keys, values = seen[i][:, :, None], seen[i + 1][:, :, None]
            weights = (_logits(queries, ctx.scale, seen[i], i == len(seen) - 2) - log_sum).exp()
            of_logits = (weights * (gradient @ values.mT - shared) * ctx.scale).to(queries.dtype)
            of_queries += of_logits @ keys
            of_seen.append((of_logits.mT @ queries).sum(2))
            of_seen.append((weights.to(queries.dtype).mT @ gradient).sum(2))
        return of_queries.to(queries.dtype), None, *of_seen


def _logits(queries: Tensor, scale: float, keys: Tensor, is_own: bool) -> Tensor:
    """(B, G, R, n, c) in at least float32; of a chunk's own keys those ahead of a query are hidden."""
    logits = queries @ keys[:, :, None].mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if not is_own:
        return logits
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill(ahead, -torch.inf)
