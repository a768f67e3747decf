"""The look-ahead cache, alone and with memory tokens, against its equations written out position by position.

Axes: N tokens of a text, T of a segment, S positions of a layer, P cached positions, H heads, d = D / H, D width.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.state import leaves

from .test_xl import rms_norm, rotate
from .tiny import LAMEMO, RMT, XL, Embeddings, close, close_states, tiny_model, tokens_like

T = 6


class Cached:
    """A token in a layer's cache: what it has mixed, of which tokens, with which sum of weights."""

    def __init__(self, place: int, seen: set[int], mixed: Tensor, total: Tensor) -> None:
        self.place, self.seen = place, seen  # in the text
        self.mixed, self.total = mixed.detach(), total.detach()  # (H, d), (H,)


class Naive:
    """A reader of one text; memory tokens stand before the cache, or between it and the text (`cache_first`)."""

    cache_first = False

    def __init__(self, model: RecurrentModel, cache_len: int, memory: Tensor | None, bias: Tensor) -> None:
        self.body: Any = model.backbone.lm.model
        self.num_heads = self.body.config.num_attention_heads
        self.cache_len, self.memory, self.bias = cache_len, memory, bias
        self.embedded: list[Tensor] = []  # of the cached tokens, (D,) each
        self.cache: list[list[Cached]] = [[] for _ in self.body.layers]
        self.num_read = 0

    def heads(self, x: Tensor, projection: Any) -> Tensor:
        """(H, S, d), not rotated."""
        x = (x @ projection.weight.T).unflatten(-1, (-1, x.shape[1] // self.num_heads)).transpose(0, 1)
        return x.repeat_interleave(self.num_heads // len(x), dim=0)

    def read(self, segment: Tensor) -> Tensor:
        """Hidden states (T, D) of a segment (T,)."""
        m = 0 if self.memory is None else len(self.memory)
        num_cached, num_text = len(self.embedded), len(segment)
        rows = [torch.stack(self.embedded)] if self.embedded else []
        text = self.body.embed_tokens(segment)
        tokens = range(m + num_cached, m + num_cached + num_text)
        cached = range(num_cached) if self.cache_first else range(m, m + num_cached)
        if self.memory is not None:
            rows = [*rows, self.memory] if self.cache_first else [self.memory, *rows]
        h = torch.cat([*rows, text] if self.memory is None else [*rows, text, self.memory])
        for i, layer in enumerate(self.body.layers):
            h = self.layer(i, layer, h, cached, tokens)
        self.embedded = [*self.embedded, *text.detach()][-self.cache_len :]
        self.num_read += num_text
        h = rms_norm(h, self.body.norm)
        if self.memory is not None:
            self.memory = h[-m:]
        return h[tokens.start : tokens.stop]

    def layer(self, i: int, layer: Any, h: Tensor, cached: range, text: range) -> Tensor:
        attention, x = layer.self_attn, rms_norm(h, layer.input_layernorm)
        unused = torch.zeros(self.num_heads, self.cache_len - len(cached), h.shape[1] // self.num_heads)

        def at_places(x: Tensor) -> Tensor:
            """Rotated; positions of unused cache are left out before the cache."""
            spread = torch.cat([x[:, : cached.start], unused.double(), x[:, cached.start :]], dim=1)
            turned = rotate(spread)
            return torch.cat([turned[:, : cached.start], turned[:, cached.start + unused.shape[1] :]], dim=1)

        q = at_places(self.heads(x, attention.q_proj))
        k = at_places(self.heads(x, attention.k_proj))
        v = self.heads(x, attention.v_proj)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (H, S, S)
        start = self.num_read - len(cached)
        places = dict(zip([*cached, *text], range(start, self.num_read + len(text)), strict=True))  # in the text
        mixed, entries = [], []
        for s in range(h.shape[0]):
            if s in cached:
                entry = self.cache[i][s - cached.start]
                keys = [o for o in places if places[o] > places[s] and o <= text.start and places[o] not in entry.seen]
                weights = (logits[:, s, keys] + self.bias[:, None]).exp()  # (H, keys)
                old = entry.total.exp()
                total = old + weights.sum(1)
                mixed.append((old[:, None] * entry.mixed + (weights[:, :, None] * v[:, keys]).sum(1)) / total[:, None])
                seen = entry.seen | {places[o] for o in keys}
            else:
                keys = list(range(s + 1))
                weights = logits[:, s, keys].exp()
                total = weights.sum(1)
                mixed.append((weights[:, :, None] * v[:, keys]).sum(1) / total[:, None])
                seen = {places[o] for o in keys if o in places}
            if s in places:
                entries.append(Cached(places[s], seen, mixed[-1], total.log()))
        self.cache[i] = entries[-self.cache_len :]
        h = h + torch.stack(mixed).flatten(1) @ attention.o_proj.weight.T
        x, mlp = rms_norm(h, layer.post_attention_layernorm), layer.mlp
        return h + (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def compare(model: RecurrentModel, cache_len: int, tokens: Tensor, steps: Sequence[Sequence[int]]) -> None:
    """Outputs, states, and gradients, where row i reads steps[k][i] tokens in step k."""
    members = list(getattr(model.memory, "members", [model.memory]))
    rmt = next((member for member in members if not hasattr(member, "layers")), None)
    bias = next(member for member in members if hasattr(member, "layers")).layers[0].direction.weight[0]
    state, done = model.init_state(len(tokens)), [0] * len(tokens)
    readers = [Naive(model, cache_len, None if rmt is None else rmt.initial.weight, bias) for _ in tokens]
    for reader in readers:
        reader.cache_first = members[0] is rmt
    ours, theirs = torch.zeros(()), torch.zeros(())
    torch.manual_seed(5)
    for sizes in steps:
        parts = [tokens[i, at : at + size] for i, (at, size) in enumerate(zip(done, sizes, strict=True))]
        out, state = model.step(torch.nn.utils.rnn.pad_sequence(parts, True), state, lengths=torch.tensor(sizes))
        done = [at + size for at, size in zip(done, sizes, strict=True)]
        for i, part in enumerate(parts):
            if len(part):
                wanted = readers[i].read(part)
                assert close(out.hidden[i, : len(part)], wanted)
                weight = torch.randn_like(wanted)
                ours = ours + (out.hidden[i, : len(part)] * weight).sum()
                theirs = theirs + (wanted * weight).sum()
    cache = state if rmt is None else state[1 - members.index(rmt)]
    for i, reader in enumerate(readers):
        filled = min(done[i], cache_len)
        check_cache(cache, i, reader, filled)
        assert {e.place for e in reader.cache[0]} == set(range(done[i] - filled, done[i]))
        if rmt is not None:
            memory = state[members.index(rmt)][i]
            assert close(memory, reader.memory)
            weight = torch.randn_like(memory)
            ours, theirs = ours + (memory * weight).sum(), theirs + (reader.memory * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=1e-11 * (1 + float(b.abs().max()))) for a, b in pairs)


def check_cache(cache: Any, i: int, reader: Naive, filled: int) -> None:
    """Row i of the state of the cache."""
    size = cache["rows"].shape[1]
    assert close(cache["rows"][i, size - filled :], torch.stack(reader.embedded))
    assert not cache["rows"][i, : size - filled].any()
    for layer, entries in zip(cache["layers"], reader.cache, strict=True):
        unused = size - filled
        assert int(layer["filled"][i]) == filled == len(entries)
        assert close(layer["mixed"][i, unused:], torch.stack([entry.mixed for entry in entries]))
        assert close(layer["log_weight"][i, unused:], torch.stack([entry.total for entry in entries]))
        assert not any(layer[name][i, :unused].any() for name in ("mixed", "log_weight"))


@pytest.mark.parametrize(
    ("kinds", "cache_len"),
    [("lamemo", 1), ("lamemo", 4), ("lamemo", T), ("lamemo", 40), ("lamemo+rmt", 9), ("rmt+lamemo", 9)],
)
def test_ragged_rows_follow_the_equations(kinds: str, cache_len: int) -> None:
    """Segments of any sizes, so that what the last one was decides what a position has not seen."""
    settings = {"rmt": RMT, "lamemo": {"kind": "lamemo", "cache_len": cache_len}}
    model = tiny_model([settings[kind] for kind in kinds.split("+")], segment_len=T, max_position_embeddings=80)
    compare(model, cache_len, tokens_like(4, 4 * T), [[T, T, 3, 1], [T, 2, 1, 0], [T, T, T, 0], [T, 1, 4, 0]])


def test_a_cached_position_never_knows_more_than_the_first_token() -> None:
    """The leak that is one position away: what is kept of older tokens depends on the segment's first one alone."""
    model, tokens = tiny_model({"kind": "lamemo", "cache_len": 3 * T}, segment_len=T), tokens_like(1, 3 * T)
    _, before = rmt_core.run(model, tokens[:, : 2 * T])
    _, state = model.step(tokens[:, 2 * T :], before)
    for j in range(T):
        other = tokens[:, 2 * T :].clone()
        other[0, j] = (other[0, j] + 1) % 23
        _, moved = model.step(other, before)
        for layer, moved_layer in zip(state["layers"], moved["layers"], strict=True):
            for name in ("mixed", "log_weight"):
                same = close(layer[name][:, : 2 * T], moved_layer[name][:, : 2 * T], atol=1e-12)
                assert same == (j > 0)


def test_the_cache_is_refreshed() -> None:
    """A token's prediction depends on how the cached tokens were read again: it is not Transformer-XL."""
    tokens = tokens_like(2, 3 * T)
    model, plain = tiny_model(LAMEMO, segment_len=T), tiny_model(XL, segment_len=T)
    ours, theirs = (rmt_core.run(m, tokens)[0].hidden for m in (model, plain))
    assert close(ours[:, :T], theirs[:, :T], atol=1e-5)  # other positions, whose angles are in float32
    assert ((ours[:, T:] - theirs[:, T:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text"])
def test_an_empty_cache_changes_nothing(family: str) -> None:
    tokens, lengths = tokens_like(2, T), torch.tensor([T, 3])
    whole = tiny_model("none", family, T).backbone.lm(input_ids=tokens, use_cache=False).logits
    off = tiny_model({"kind": "lamemo", "cache_len": 0}, family, T)
    assert close(off.step(tokens, off.init_state(2), lengths)[0].logits[0], whole[0])
    empty = tiny_model(LAMEMO, family, T)
    logits = empty.step(tokens, empty.init_state(2), lengths)[0].logits
    assert close(logits[0], whole[0], atol=1e-4)  # other positions, whose angles are in float32
    assert close(logits[1, :3], whole[1, :3], atol=1e-4)


def test_without_a_cache_there_is_nothing_to_carry_or_learn() -> None:
    model = tiny_model({"kind": "lamemo", "cache_len": 0}, segment_len=T)
    state = model.init_state(2)
    assert not sum(leaf.numel() for leaf in leaves(state) if leaf.is_floating_point())
    assert not sum(p.numel() for p in model.memory.parameters())
    assert close_states(model.step(tokens_like(2, T), state)[1], state)


def test_no_gradient_is_carried() -> None:
    model = tiny_model({"kind": "lamemo", "cache_len": 2 * T}, segment_len=T)
    with Embeddings(model) as embedded:
        out, state = rmt_core.run(model, tokens_like(2, 3 * T))
        assert not any(leaf.requires_grad for leaf in leaves(state))
        out.hidden[:, 2 * T :].sum().backward()
        first, second, third = embedded.gradients()
        assert not first.any()
        assert not second.any()
        assert third.abs().amax(-1).all()
    assert all(p.grad is not None and p.grad.any() for p in model.memory.parameters())


@pytest.mark.parametrize("cache_len", [-4, False])
def test_a_cache_length_that_is_none_is_refused(cache_len: Any) -> None:
    with pytest.raises(ValueError, match=r"memory\.cache_len is .*; it must be"):
        tiny_model({"kind": "lamemo", "cache_len": cache_len})
