"""LaMemo: a cache that is refreshed by looking ahead (Ji et al. 2022, arXiv:2204.07341).

Axes: B rows, T tokens of a segment, S positions that a layer sees, P cached positions, H heads, d = D / H, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from .base import (
    Attention,
    Block,
    Dimensions,
    Heads,
    LayerMemory,
    LayerwiseMemory,
    LearnedRows,
    Segment,
    at_least,
    take,
)


@dataclass(frozen=True)
class LaMemoConfig:
    """Settings of the look-ahead cache."""

    cache_len: int = 128  # positions of the past that attention sees too; 0 is the plain backbone

    def __post_init__(self) -> None:
        at_least(0, self, "cache_len")


class LaMemoLayer(LayerMemory):
    """One layer's part of the cache: how its cached positions have attended so far."""

    def __init__(self, config: LaMemoConfig, dimensions: Dimensions, direction: LearnedRows) -> None:
        super().__init__()
        self.cache_len = config.cache_len
        self.num_heads, self.head_width = dimensions.num_heads, dimensions.head_width
        self.direction = direction  # the same module in all layers

    def init_state(self, batch_size: int) -> State:
        size, exact = self.cache_len, torch.promote_types(self.anchor.dtype, torch.float32)
        count = torch.zeros(batch_size, dtype=torch.long, device=self.anchor.device)
        return {
            "mixed": self.anchor.new_zeros(batch_size, size, self.num_heads, self.head_width),
            "log_weight": self.anchor.new_zeros(batch_size, size, self.num_heads, dtype=exact),
            "filled": count,
            "fresh": count,
        }

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        if not self.cache_len:
            return block(h), state
        if segment.stage == "extend":
            return block(h, attention=self._one_token(state["filled"], segment)), state
        new: dict[str, Tensor] = {}

        def attention(heads: Heads) -> Tensor:
            mixed, new["mixed"], new["log_weight"] = self._attend(heads, state, segment)
            return mixed

        out = block(h, attention=attention)
        if not segment.writes:
            return out, state
        length = _lengths(state["filled"], segment)
        end = (state["filled"] + length).clamp(max=self.cache_len)
        kept = {name: _last(x.to(state[name].dtype), length, end, self.cache_len) for name, x in new.items()}
        return out, {**kept, "filled": end, "fresh": length.clamp(max=self.cache_len)}

    def _own(self, segment: Segment) -> slice:
        """Where the cached positions stand in h."""
        return slice(segment.own_start, segment.own_start + self.cache_len)

    def _attend(self, heads: Heads, state: State, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Causal attention for all but cached positions, which look ahead.

        Gives what all positions mix (B, H, S, d), and of cached positions followed by the text what they mix
        (B, P + T, H, d) and the logarithm of their weights' sum (B, P + T, H), for the state.
        """
        own = self._own(segment)
        mixed = self._causal(heads, state["filled"], segment)
        ahead, log_ahead = self._look_ahead(heads, state["fresh"], segment)
        before = state["log_weight"].transpose(1, 2)  # (B, H, P)
        kept = torch.sigmoid(before - log_ahead)[..., None].to(mixed.dtype)  # share of what was seen before
        cached = (kept * state["mixed"].transpose(1, 2) + (1 - kept) * ahead).to(mixed.dtype)
        mixed = torch.cat([mixed[:, :, : own.start], cached, mixed[:, :, own.stop :]], dim=2)
        with torch.no_grad():
            text = self._log_weights(heads, state["filled"], segment).transpose(1, 2)  # (B, T, H)
            whole = torch.cat([torch.logaddexp(before, log_ahead).transpose(1, 2), text], dim=1)
            return mixed, _cache_and_text(mixed.transpose(1, 2), self.cache_len, segment), whole

    def _causal(self, heads: Heads, filled: Tensor, segment: Segment) -> Tensor:
        """What each position mixes of the valid ones up to itself, (B, H, S, d).

        Cache that is unused stands before the text; for the time of the attention it goes to the end, where a causal
        flag hides it without a mask.
        """
        num_rows = heads.queries.shape[2]
        at, start = torch.arange(num_rows, device=filled.device), segment.own_start
        unused = self.cache_len - filled[:, None]  # (B, 1)
        end = num_rows - unused
        order = torch.where(at < start, at, torch.where(at < end, at + unused, at - end + start))
        back = torch.where(at < start, at, torch.where(at < start + unused, at - start + end, at - unused))
        queries, keys, values = (_arrange(x, order) for x in (heads.queries, heads.keys, heads.values))
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, dropout_p=heads.dropout, scale=heads.scale
        )
        return _arrange(mixed, back)

    def _look_ahead(self, heads: Heads, fresh: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """What cached positions mix of those on their right, (B, H, P, d), and the log of the weights' sum (B, H, P).

        Each sees on its right, up to and including the segment's first token, what it has not seen: of the last
        segment's tokens the first was seen then.
        """
        own, first, size = self._own(segment), segment.text_start, self.cache_len
        keys, values = (
            torch.cat([x[:, :, own], x[:, :, first : first + 1]], dim=2) for x in (heads.keys, heads.values)
        )  # (B, H, P + 1, d)
        at = torch.arange(size + 1, device=fresh.device)
        unseen = (at > at[:size, None]) & (at > size - fresh[:, None, None])  # (B, P, P + 1)
        unseen = unseen | (at == size)
        logits = heads.queries[:, :, own] @ keys.transpose(2, 3) * heads.scale
        logits = logits + self.direction(1)[0, 0][:, None, None].to(logits.dtype)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~unseen[:, None], -torch.inf)
        weights = F.dropout(logits.softmax(-1), heads.dropout).to(values.dtype)
        return weights @ values, logits.logsumexp(-1)

    def _log_weights(self, heads: Heads, filled: Tensor, segment: Segment) -> Tensor:
        """Of the text's positions, the logarithm of their causal weights' sum, (B, H, T)."""
        at, own, first = torch.arange(heads.keys.shape[2], device=filled.device), self._own(segment), segment.text_start
        hidden = (at >= own.start) & (at < own.stop - filled[:, None])  # (B, S), unused cache
        ahead = at > at[first : first + segment.text_len, None]  # (T, S)
        logits = heads.queries[:, :, first : first + segment.text_len] @ heads.keys.transpose(2, 3) * heads.scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.masked_fill((ahead | hidden[:, None])[:, None], -torch.inf).logsumexp(-1)

    def _one_token(self, filled: Tensor, segment: Segment) -> Attention:
        """A decoded token sees the keys that it may, but no unused cache."""
        own = self._own(segment)

        def attention(heads: Heads) -> Tensor:
            assert heads.mask is not None
            at = torch.arange(heads.keys.shape[2], device=filled.device)
            hidden = (at >= own.start) & (at < own.stop - filled[:, None])  # (B, C)
            mask = heads.mask & ~hidden[:, None, None]
            return F.scaled_dot_product_attention(
                heads.queries, heads.keys, heads.values, attn_mask=mask, scale=heads.scale
            )

        return attention


def _cache_and_text(x: Tensor, size: int, segment: Segment) -> Tensor:
    """Of x (B, S, ...) the P cached positions followed by the text, (B, P + T, ...)."""
    own, text = segment.own_start, segment.text_start
    return torch.cat([x[:, own : own + size], x[:, text : text + segment.text_len]], dim=1)


def _lengths(like: Tensor, segment: Segment) -> Tensor:
    return torch.full_like(like, segment.text_len) if segment.lengths is None else segment.lengths


def _last(x: Tensor, length: Tensor, filled: Tensor, size: int) -> Tensor:
    """The last P positions of the cache and `length` (B,) of text, of x (B, P + T, ...); `filled` (B,) are valid."""
    at = torch.arange(size, device=x.device)
    rows = take(x.detach().flatten(2), at + length[:, None]).unflatten(2, x.shape[2:])
    unused = at < size - filled[:, None]
    return rows.masked_fill(unused.view(*unused.shape, *(1,) * (x.dim() - 2)), 0)


def _arrange(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, S, d) with its positions in the order (B, S)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class LaMemoMemory(LayerwiseMemory):
    """Transformer-XL whose cached positions go on attending, to what comes after them.

    The cache stands before the text in every layer. Text attends to it and to itself, causally. A cached position
    attends ahead, to the positions on its right up to and including the segment's first token that it has not seen;
    what it mixes is interpolated with what it has mixed before by the sums of their weights, as if it were one
    attention over all of it (with older queries and keys for its past). Output projection, residual and feed-forward
    follow, and the next layer's text sees the result: at a layer, text attends to rows that the layers below have
    refreshed, and that layer itself has not (as in the released code). Nothing leaks: refreshed rows know of the
    segment its first token alone, and only that and later ones see them.

    The state, all outside the gradient: `rows` (B, P, D), the cached positions' embeddings, from which each segment
    makes their rows anew, and for each of `layers` `mixed` (B, P, H, d), attention outputs before the output
    projection, `log_weight` (B, P, H), the logarithm of the sum of weights behind them, in float32 at least, `filled`
    (B,) valid positions, which stand at the end, zeros before them, and `fresh` (B,), how many are of the last segment.

    Deviations. Positions are the backbone's rotary ones, exact in both directions, where the paper adds sinusoids of
    the distance with a learned vector a direction; of that there is left a learned number a head, one for all layers
    (as there), added to look-ahead logits: it sets how much weight the future has beside the past. A position looks
    ahead over the last segment's length, where the released code takes this one's: the same where segments are
    equally long, and otherwise each token is seen once. Memory tokens of another memory are seen by the text, never
    cached, and not seen looking ahead.
    """

    Config = LaMemoConfig
    needs_relative_positions = True

    def __init__(self, config: LaMemoConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.rows_before = config.cache_len
        self.is_cache = self.computes_attention = config.cache_len > 0
        direction = LearnedRows(1, dimensions.num_heads if config.cache_len else 0, std=0.0)
        self.layers = nn.ModuleList(LaMemoLayer(config, dimensions, direction) for _ in range(dimensions.num_layers))

    def init_state(self, batch_size: int) -> State:
        rows = self.anchor.new_zeros(batch_size, self.rows_before, self.dimensions.width)
        return {"rows": rows, "layers": super().init_state(batch_size)}

    def by_layer(self, state: State) -> Sequence[State]:
        return [{"rows": state["rows"], **part} for part in state["layers"]]

    def from_layers(self, parts: Sequence[State]) -> State:
        own = tuple({name: x for name, x in part.items() if name != "rows"} for part in parts)
        return {"rows": parts[0]["rows"], "layers": own}

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        return x if segment.stage == "extend" else torch.cat([state["rows"], x], dim=1)

    def around(self, layer: int, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        out, layers = super().around(layer, h, block, state["layers"], segment)
        rows = state["rows"]
        if layer == 0 and segment.writes:  # h holds embeddings
            length, filled = _lengths(layers[0]["filled"], segment), layers[0]["filled"]
            whole = _cache_and_text(h, self.rows_before, segment).to(rows.dtype)
            rows = _last(whole, length, filled, self.rows_before)
        return out, {"rows": rows, "layers": layers}

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        return (h if segment.stage == "extend" else h[:, self.rows_before :]), state
