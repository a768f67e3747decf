"""The Transformer-XL cache, alone and with memory tokens, against its equations written out with dense masks.

Axes: N tokens of a text, S positions of a segment, P cached positions, C = P + S, H heads, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.state import leaves

from .tiny import RMT, Embeddings, close, tiny_model, tokens_like

T = 6


class Read(NamedTuple):
    """What the naive reference finds for one text."""

    hidden: Tensor  # (N, D)
    cache: list[Tensor]  # L x (filled, D)
    memory: Tensor | None  # (M, D)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """Normalised in float32, as transformers does in every type."""
    single = x.float()
    single = single * (single.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return norm.weight * single.double()


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... of x (H, C, d); the angles in float32, as transformers has them in every type."""
    half = x.shape[-1] // 2
    frequency = 1 / 10000.0 ** (torch.arange(half).float() / half)
    angle = torch.arange(x.shape[1]).float()[:, None] * frequency  # (C, d / 2)
    cos, sin, a, b = angle.cos().double(), angle.sin().double(), x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def naive_layer(
    layer: Any, h: Tensor, cached: Tensor, num_heads: int, between: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """One llama layer on h (S, D), whose attention also sees `cached` (P, D), mapped by `between` after attention."""
    attention, size = layer.self_attn, len(h)
    normed = rms_norm(torch.cat([cached, h]), layer.input_layernorm)  # (C, D)

    def heads(projection: Any) -> Tensor:
        x = (normed @ projection.weight.T).unflatten(-1, (-1, h.shape[1] // num_heads)).transpose(0, 1)
        return x.repeat_interleave(num_heads // len(x), dim=0)  # (H, C, d)

    queries, keys, values = rotate(heads(attention.q_proj)), rotate(heads(attention.k_proj)), heads(attention.v_proj)
    scores = queries[:, -size:] @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5  # (H, S, C)
    hidden_keys = torch.ones(size, len(normed), dtype=torch.bool).triu(len(cached) + 1)
    mixed = scores.masked_fill(hidden_keys, float("-inf")).softmax(-1) @ values
    h = h + mixed.transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
    h = h if between is None else between(h)
    x, mlp = rms_norm(h, layer.post_attention_layernorm), layer.mlp
    gated = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    return h + gated @ mlp.down_proj.weight.T


def naive_xl(model: RecurrentModel, text: Tensor, cache_len: int, memory: Tensor | None = None) -> Read:
    """arXiv:1901.02860, section 3.2, for one text (N,); with `memory` (M, D) arXiv:2207.06881, section 4."""
    body: Any = model.backbone.lm.model
    layers, num_heads = body.layers, body.config.num_attention_heads
    m = 0 if memory is None else len(memory)
    cache, hidden = [torch.zeros(0, body.config.hidden_size, dtype=torch.float64) for _ in layers], []
    for segment in text.split(T):
        h = body.embed_tokens(segment)
        if memory is not None:
            h = torch.cat([memory, h, memory])
        for i, layer in enumerate(layers):
            cached = cache[i]
            seen = torch.cat([cached, h[m : m + len(segment)].detach()])
            cache[i] = seen[max(0, len(seen) - cache_len) :]
            h = naive_layer(layer, h, cached, num_heads)
        h = rms_norm(h, body.norm)
        hidden.append(h[m : m + len(segment)])
        if memory is not None:
            memory = h[-m:]
    return Read(torch.cat(hidden), cache, memory)


def compare(model: RecurrentModel, cache_len: int, tokens: Tensor, lengths: list[int], kinds: str) -> None:
    """Outputs, caches, memories, and the gradient of random weights on outputs and memories."""
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens, lengths=torch.tensor(lengths))
    parts = dict(zip(kinds.split("+"), state if "+" in kinds else (state,), strict=True))
    members = dict(zip(kinds.split("+"), getattr(model.memory, "members", [model.memory]), strict=True))
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i, length in enumerate(lengths):
        initial = members["rmt"].initial.weight if "rmt" in members else None
        wanted = naive_xl(model, tokens[i, :length], cache_len, initial)
        filled = int(parts["xl"][0]["filled"][i])
        assert close(out.hidden[i, :length], wanted.hidden)
        assert filled == min(length, cache_len)
        for layer, cached in zip(parts["xl"], wanted.cache, strict=True):
            assert int(layer["filled"][i]) == filled
            assert close(layer["rows"][i, :filled], cached)
            assert not layer["rows"][i, filled:].any()
        weight = torch.randn_like(wanted.hidden)
        ours, theirs = ours + (out.hidden[i, :length] * weight).sum(), theirs + (wanted.hidden * weight).sum()
        if wanted.memory is not None:
            assert close(parts["rmt"][i], wanted.memory)
            weight = torch.randn_like(wanted.memory)
            ours, theirs = ours + (parts["rmt"][i] * weight).sum(), theirs + (wanted.memory * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=1e-11 * (1 + float(b.abs().max()))) for a, b in pairs)


@pytest.mark.parametrize("cache_len", [0, 1, 4, T, 9, 40])
@pytest.mark.parametrize("kinds", ["xl", "xl+rmt", "rmt+xl"])
def test_ragged_rows_follow_the_equations(kinds: str, cache_len: int) -> None:
    settings = {"rmt": RMT, "xl": {"kind": "xl", "cache_len": cache_len}}
    model = tiny_model([settings[kind] for kind in kinds.split("+")], segment_len=T)
    compare(model, cache_len, tokens_like(5, 4 * T), [4 * T, 3 * T + 1, 2 * T, T - 1, 1], kinds)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text"])
def test_a_cache_as_long_as_the_history_is_full_attention(family: str) -> None:
    tokens = tokens_like(2, 4 * T - 1)
    model = tiny_model({"kind": "xl", "cache_len": 4 * T}, family, T)
    out, _ = rmt_core.run(model, tokens)
    assert close(out.logits, model.backbone.lm(input_ids=tokens, use_cache=False).logits, atol=1e-9)


def test_ragged_rows_with_a_long_cache_are_full_attention() -> None:
    tokens, lengths = tokens_like(4, 4 * T), [4 * T, 2 * T + 1, T, 2]
    model = tiny_model({"kind": "xl", "cache_len": 4 * T}, segment_len=T)
    state = model.init_state(4)
    for i in range(4):  # shorter rows read their text in pieces of other sizes: 3, 3, ... tokens
        sizes = torch.tensor([T, 3, 3, 1])
        starts = sizes * i
        given = (torch.tensor(lengths) - starts).clamp(min=0).minimum(sizes)
        at = (starts[:, None] + torch.arange(T)).clamp(max=4 * T - 1)
        out, state = model.step(tokens.gather(1, at), state, lengths=given)
        for row in range(4):
            stop = int(starts[row] + given[row])
            if given[row]:
                whole = model.backbone.lm.model(input_ids=tokens[row : row + 1, :stop]).last_hidden_state
                assert close(out.hidden[row, : given[row]], whole[0, starts[row] :], atol=1e-9)


def test_no_gradient_enters_the_cache() -> None:
    model = tiny_model({"kind": "xl", "cache_len": 2 * T}, segment_len=T)
    with Embeddings(model) as embedded:
        out, state = rmt_core.run(model, tokens_like(2, 3 * T))
        assert not any(rows.requires_grad for rows in leaves(state))
        out.hidden[:, 2 * T :].sum().backward()
        first, second, third = embedded.gradients()
        assert not first.any()
        assert not second.any()
        assert third.abs().amax(-1).all()


def test_the_cache_holds_text_rows_only() -> None:
    """With memory tokens too, as many positions are valid as there were tokens."""
    model = tiny_model([{"kind": "xl", "cache_len": 20}, RMT], segment_len=T)
    _, (cache, _) = rmt_core.run(model, tokens_like(2, 2 * T), lengths=torch.tensor([2 * T, T + 1]))
    embedded = model.backbone.embed(tokens_like(2, 2 * T))
    assert [layer["filled"].tolist() for layer in cache] == [[2 * T, T + 1]] * 2
    assert close(cache[0]["rows"][0, : 2 * T], embedded[0])
    assert close(cache[0]["rows"][1, : T + 1], embedded[1, : T + 1])


@pytest.mark.parametrize("cache_len", [-4, 1.5, False])
def test_a_cache_length_that_is_none_is_refused(cache_len: Any) -> None:
    with pytest.raises(ValueError, match=r"memory\.cache_len is .*; it must be"):
        tiny_model({"kind": "xl", "cache_len": cache_len})
