"""B'MOJO, alone and with memory tokens, against its equations written out token by token.

Axes: N tokens of a text, T tokens of a segment, S positions of a layer, M memory rows, w window, E eidetic tokens,
H heads, D width, G groups of the state space, n size of its state, p = D / G.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.generation import _Decoder
from rmt_core.memory.eidetic import CHUNK, scan
from rmt_core.state import leaves

from .tiny import BMOJO, FULL_BMOJO, RMT, Embeddings, close, tiny_config, tiny_model, tokens_like

T = 6


def unit(x: Tensor) -> Tensor:
    """Of root mean square 1 along the last axis."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotate(x: Tensor, places: Sequence[int]) -> Tensor:
    """Rotary positions of x (H, C, d); the angles in float32, as transformers has them in every type."""
    half = x.shape[-1] // 2
    frequency = 1 / 10000.0 ** (torch.arange(half).float() / half)
    angle = torch.tensor(places).float()[:, None] * frequency  # (C, d / 2)
    cos, sin, a, b = angle.cos().double(), angle.sin().double(), x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())


def with_exact_norms(model: RecurrentModel) -> RecurrentModel:
    """Transformers norms in float32 in every type, where what differs in the last bit of a float64 may come out as much
    as 1e-7 apart; here it must not."""
    for module in model.backbone.lm.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm, norm=module)
    return model


class NaiveLayer:
    """One layer's memory of one text."""

    def __init__(self, model: RecurrentModel, i: int, memory: Any, num_heads: int) -> None:
        self.layer: Any = model.backbone.lm.model.layers[i]
        self.space, self.window, self.num_eidetic = memory.space, memory.window, memory.num_eidetic
        self.num_heads, self.num_groups = num_heads, memory.num_groups
        self.inputs: list[Tensor] = []  # of all tokens, (D,) each
        self.fading: list[Tensor] = []
        self.innovations: list[Tensor] = []
        self.eidetic: list[tuple[float, int]] = []  # innovation and token
        self.state = torch.zeros(self.num_groups, memory.state_size, memory.width // self.num_groups).double()
        self.num_left = 0  # tokens that have left the window

    def fade(self, row: Tensor, is_token: bool) -> tuple[Tensor, Tensor]:
        """A row's fading one (D,) and its innovation; only tokens enter the state."""
        x = unit(row)
        v, k, q, step = (x @ self.space.inputs.weight.T).split(self.space.sizes)
        v, known = v.unflatten(0, (self.num_groups, -1)), torch.zeros_like(self.state[:, 0])
        step, new = F.softplus(step + self.space.step), []
        for g in range(self.num_groups):
            decayed = torch.exp(-step[g] * self.space.rate[g].exp()) * self.state[g]
            known[g] = (k @ decayed).detach()
            new.append(decayed + step[g] * k[:, None] * v[g])
        explained = [(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)) ** 2 for a, b in zip(known, v, strict=True)]
        if is_token:
            self.state = torch.stack(new)
        read = unit(torch.stack([q @ s for s in self.state]).flatten())
        return self.space.skip * x + self.space.output.weight @ read, 1 - torch.stack(explained).mean()

    def read(self, h: Tensor, m: int, num_text: int) -> Tensor:
        """h (S, D), of which the first m and those behind the text are memory rows -> what the layer makes of it."""
        start, inputs, fading = len(self.inputs), list(self.inputs), list(self.fading)
        for t, row in enumerate(h[m:]):
            y, innovation = self.fade(row, t < num_text)
            inputs, fading = [*inputs, row], [*fading, y]
            if t < num_text:
                self.innovations.append(innovation.detach())
        mixed = []
        for s in range(len(h)):
            rows, at = list(h[: min(s + 1, m)]), list(range(min(s + 1, m)))
            if s >= m:
                token = start + s - m
                recent = range(max(0, token - self.window + 1), token + 1)
                before = range(max(0, token - 2 * self.window + 1), max(0, token - self.window + 1))
                kept = [index for _, index in self.eidetic]
                rows += [inputs[i] for i in recent] + [fading[i] for i in before] + [self.inputs[i] for i in kept]
                at += [m + i - start for i in (*recent, *before)] + [m - 2 * self.window] * len(kept)
            mixed.append(self.attend(h[s], s, torch.stack(rows), at))
        self.inputs = [row.detach() for row in inputs[: start + num_text]]
        self.fading = fading[: start + num_text]
        self.renew()
        attention, mlp = self.layer.self_attn, self.layer.mlp
        h = h + torch.stack(mixed) @ attention.o_proj.weight.T
        x = rms_norm(h, self.layer.post_attention_layernorm)
        return h + (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T

    def attend(self, row: Tensor, place: int, rows: Tensor, places: Sequence[int]) -> Tensor:
        """One softmax of a row (D,) over rows (C, D), (H d,)."""
        attention = self.layer.self_attn

        def heads(x: Tensor, projection: Any) -> Tensor:
            x = rms_norm(x, self.layer.input_layernorm) @ projection.weight.T
            x = x.unflatten(-1, (-1, rows.shape[1] // self.num_heads)).transpose(0, 1)
            return x.repeat_interleave(self.num_heads // len(x), dim=0)  # (H, C, d)

        q, k = rotate(heads(row[None], attention.q_proj), [place]), rotate(heads(rows, attention.k_proj), places)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ heads(rows, attention.v_proj)).flatten()

    def renew(self) -> None:
        """A token that leaves the window takes the place of the best predicted one, if it was predicted worse."""
        while self.num_left < len(self.inputs) - (self.window - 1):
            entry = (float(self.innovations[self.num_left]), self.num_left)
            if self.num_eidetic and len(self.eidetic) < self.num_eidetic:
                self.eidetic.append(entry)
            elif self.num_eidetic and entry[0] > min(self.eidetic)[0]:
                self.eidetic.remove(min(self.eidetic))
                self.eidetic.append(entry)
            self.num_left += 1


class Naive:
    """A reader of one text."""

    def __init__(self, model: RecurrentModel, bmojo: Any, memory: Tensor | None) -> None:
        self.body: Any = model.backbone.lm.model
        num_heads = self.body.config.num_attention_heads
        self.layers = [NaiveLayer(model, i, layer, num_heads) for i, layer in enumerate(bmojo.layers)]
        self.memory = memory

    def read(self, segment: Tensor) -> Tensor:
        m = 0 if self.memory is None else len(self.memory)
        h = self.body.embed_tokens(segment)
        if self.memory is not None:
            h = torch.cat([self.memory, h, self.memory])
        for layer in self.layers:
            h = layer.read(h, m, len(segment))
        h = rms_norm(h, self.body.norm)
        if self.memory is not None:
            self.memory = h[-m:]
        return h[m : m + len(segment)]


def check_state(layer: Any, i: int, naive: NaiveLayer) -> None:
    """Row i of a layer's state."""
    num_read, w = len(naive.inputs), naive.window
    assert int(layer["filled"][i]) == min(num_read, 2 * w - 1)
    for name, rows, size in (("recent", naive.inputs, w - 1), ("fading", naive.fading, 2 * w - 1)):
        used = min(num_read, size)
        assert not layer[name][i, : size - used].any()
        assert used == 0 or close(layer[name][i, size - used :], torch.stack(rows[num_read - used :]))
    assert close(layer["space"][i], naive.state)
    if naive.num_eidetic:
        kept = sorted(naive.eidetic, reverse=True)
        for found, (_, token) in zip(layer["eidetic"][i], kept, strict=False):
            assert close(found, naive.inputs[token])
        wanted = torch.tensor([innovation for innovation, _ in kept], dtype=torch.float64)
        assert close(layer["eidetic_innovations"][i], F.pad(wanted, (0, naive.num_eidetic - len(kept))))


def compare(model: RecurrentModel, tokens: Tensor, steps: Sequence[Sequence[int]]) -> None:
    """Outputs, states, and gradients through all steps, where row i reads steps[k][i] tokens in step k."""
    members = list(getattr(model.memory, "members", [model.memory]))
    rmt = members[1] if len(members) > 1 else None
    readers = [Naive(model, members[0], None if rmt is None else rmt.initial.weight) for _ in tokens]
    state, done, ours, theirs = model.init_state(len(tokens)), [0] * len(tokens), torch.zeros(()), torch.zeros(())
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
    for i, reader in enumerate(readers):
        for layer, naive in zip(state if rmt is None else state[0], reader.layers, strict=True):
            check_state(layer, i, naive)
        if rmt is not None:
            assert close(state[1][i], reader.memory)
            weight = torch.randn_like(reader.memory)
            ours, theirs = ours + (state[1][i] * weight).sum(), theirs + (reader.memory * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=1e-10 * (1 + float(b.abs().max()))) for a, b in pairs)


@pytest.mark.parametrize(
    ("window", "num_eidetic", "with_rmt"),
    [(1, 0, False), (2, 3, True), (4, 3, False), (T, 2, False), (9, 40, False)],
)
def test_ragged_rows_follow_the_equations(window: int, num_eidetic: int, with_rmt: bool) -> None:
    settings = {**BMOJO, "window": window, "num_eidetic": num_eidetic}
    model = with_exact_norms(tiny_model([settings, RMT] if with_rmt else settings, segment_len=T))
    compare(model, tokens_like(3, 3 * T), [[T, T, 1], [T, 2, 0], [T, 5, 0]])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text"])
def test_where_the_text_is_cut_changes_nothing(family: str) -> None:
    """The eidetic memory apart, which is renewed at segments' ends."""
    tokens, outputs = tokens_like(2, 24), []
    for size in (24, 9, 5):
        out, _ = rmt_core.run(tiny_model({**BMOJO, "window": 5}, family, size), tokens)
        outputs.append(out.hidden)
    assert close(outputs[0], outputs[1], atol=1e-4)  # other positions, whose angles are in float32
    assert close(outputs[0], outputs[2], atol=1e-4)


@pytest.mark.parametrize("memory", [BMOJO, [FULL_BMOJO, RMT]])
@torch.inference_mode()
def test_every_decoded_token_sees_what_a_reader_sees(memory: Any) -> None:
    """At every length: the open segment's states run on, and eidetic tokens stand where they stood."""
    model, tokens = tiny_model(memory, segment_len=T), tokens_like(2, 4 * T)
    decoder = _Decoder(model, rmt_core.open_session(model, 2)).read(tokens[:, : 2 * T + 1])
    for length in range(2 * T + 1, 4 * T):
        out, _ = rmt_core.run(model, tokens[:, :length])
        assert close(decoder.hidden, out.hidden[:, -1])
        decoder.append(tokens[:, length], torch.ones(2, dtype=torch.bool))


def test_at_first_fading_rows_are_tokens() -> None:
    """Untrained it is attention over twice the window: over a text of that length, the plain model's."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=1.0)  # far above the norms' epsilon
    model = rmt_core.build(backbone=config, memory={**BMOJO, "window": 9}, segment_len=T, dtype="float64")
    tokens = tokens_like(2, 18)
    out, _ = rmt_core.run(model, tokens)
    assert close(out.logits, model.backbone.lm(input_ids=tokens, use_cache=False).logits, atol=1e-4)


def test_the_state_space_reaches_further_than_the_windows() -> None:
    """Two layers of windows see 2 (2w - 1) tokens back; the first token is felt beyond."""
    model, tokens = tiny_model({**BMOJO, "window": 2}, segment_len=T), tokens_like(1, 4 * T)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 23
    moved = (rmt_core.run(model, tokens)[0].hidden - rmt_core.run(model, other)[0].hidden).abs().amax(-1)
    assert (moved > 1e-7).all()


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
@pytest.mark.parametrize("own", [True, False])
def test_the_scan_is_the_recurrence(length: int, own: bool) -> None:
    draw = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    log_decay, keys, values = random(2, 3, length), random(2, length, 4), random(2, 3, length, 5)
    queries, state = random(2, length, 4), random(2, 3, 4, 5)
    inputs = [log_decay, keys, values, queries, state]
    reads, current = [], state
    for t in range(length):
        decayed = (-log_decay[:, :, t].abs()).exp()[..., None, None] * current
        current = decayed + keys[:, None, t, :, None] * values[:, :, t, None]
        reads.append(torch.einsum("bn,bgnp->bgp", queries[:, t], current if own else decayed))
    found, last = scan(-log_decay.abs(), keys, values, queries, state, own)
    assert close(found, torch.stack(reads, dim=2))
    assert close(last, current)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum() + last.sum(), inputs)
    theirs = torch.autograd.grad((torch.stack(reads, dim=2) * weight).sum() + current.sum(), inputs)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_worst_predicted_tokens_are_kept() -> None:
    """Among many equal tokens the few others, each once: they are what the state does not hold."""
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=1)
    model = rmt_core.build(backbone=config, memory={**FULL_BMOJO, "num_eidetic": 4}, segment_len=T, dtype="float64")
    tokens = torch.full((1, 8 * T), 5)
    tokens[0, [9, 20, 31]] = torch.tensor([1, 2, 3])
    _, (state,) = rmt_core.run(model, tokens)
    embedded = model.backbone.embed(torch.tensor([1, 2, 3]))
    found = [bool((row == state["eidetic"][0]).all(-1).any()) for row in embedded]
    assert found == [True] * 3


def test_gradients_cross_segments_through_the_fading_path_alone() -> None:
    model = tiny_model({**FULL_BMOJO, "window": T}, segment_len=T)
    with Embeddings(model) as embedded:
        out, state = rmt_core.run(model, tokens_like(2, 4 * T))
        for layer in state:
            assert [name for name, leaf in layer.items() if leaf.requires_grad] == ["fading", "space"]
        out.hidden[:, 3 * T :].sum().backward()
        assert all(grad.any() for grad in embedded.gradients())
    assert all(p.grad is not None and p.grad.any() for p in model.memory.parameters())


def test_the_window_is_what_bounds_the_state() -> None:
    """The same from the first segment to the last, whatever the segment's length."""
    for size in (T, 20):
        state = tiny_model(FULL_BMOJO, segment_len=size).init_state(1)
        rows = (4 - 1) + (2 * 4 - 1) + 3  # recent, fading, eidetic
        assert sum(leaf.numel() for leaf in leaves(state[0])) == 32 * (rows + 3) + (4 - 1) + 3 + 1


@pytest.mark.parametrize("setting", [{"window": -1}, {"state_size": 0}, {"num_eidetic": -2}, {"window": 1.5}])
def test_a_setting_that_is_none_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"memory\.{next(iter(setting))} is .*; it must be"):
        tiny_model({**BMOJO, **setting})
