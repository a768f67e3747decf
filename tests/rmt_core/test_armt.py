"""The associative memory, against its equations written out for one text with plain loops, and what it recalls.

Axes: N tokens of a text, M memory tokens, F key features, D width.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.memory.associative import associate, features, recall
from rmt_core.state import State, leaves

from .test_xl import naive_layer, rms_norm
from .tiny import ARMT, RMT, close, gradients, next_labels, same_states, tiny_config, tiny_model, tokens_like

T = 6
M = ARMT["num_tokens"]
COMPOSITIONS: dict[str, Any] = {"armt": ARMT, "rmt+armt": [RMT, ARMT], "armt+rmt": [ARMT, RMT]}
AS_PUBLISHED: dict[str, Any] = {"unit_features": False}


class Read(NamedTuple):
    """What the naive reference finds for one text."""

    hidden: Tensor  # (N, D)
    memory: list[tuple[Tensor, Tensor]]  # L x (A (F, D), z (F,))


def naive_features(x: Tensor) -> Tensor:
    """DPFP-3 of one vector (d,), entry by entry: feature (j, i) is u_i times the j-th entry before it."""
    u = [max_of(v) for v in x] + [max_of(-v) for v in x]
    return torch.stack([u[i] * u[(i - j) % len(u)] for j in (1, 2, 3) for i in range(len(u))])


def features_of(layer: Any, x: Tensor) -> Tensor:
    found = naive_features(x)
    return found / (found @ found).sqrt() if layer.unit_features else found


def max_of(x: Tensor) -> Tensor:
    return x if x > 0 else 0 * x


def naive_write(layer: Any, rows: Tensor, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 1, 2 and 4, one memory token after another, each against the memory before all of them."""
    new_a, new_z = a, z
    for mu in rows:
        k, v = features_of(layer, layer.key.weight @ mu), layer.value.weight @ mu
        beta = 1 / (1 + torch.exp(-(layer.strength.weight @ mu)))
        old = sum((k[f] * a[f] for f in range(len(k))), torch.zeros_like(v)) / (k @ z + 1e-5)
        gamma = min(1.0, max(0.0, float((1 - k @ z / (k @ k + 1e-5)).detach())))
        new_a = new_a + beta * torch.outer(k, v - old)
        new_z = new_z + gamma * k
    return new_a, new_z


def naive_armt(model: RecurrentModel, memory: Any, text: Tensor, kinds: str) -> Read:
    """One text (N,) through a llama whose layers read and write their memories."""
    body: Any = model.backbone.lm.model
    num_heads, width = body.config.num_attention_heads, body.config.hidden_size
    empty = (torch.zeros(48, width, dtype=torch.float64), torch.zeros(48, dtype=torch.float64))
    kept, hidden = [empty for _ in body.layers], []
    m = RMT["num_tokens"] if "+" in kinds else 0
    carried = torch.zeros(0, width)
    if m:
        members: Any = model.memory.members
        carried = members[kinds.split("+").index("rmt")].initial.weight
    for segment in text.split(T):
        rows, own = [carried, body.embed_tokens(segment)], memory.tokens.weight
        rows += [carried, own] if kinds == "rmt+armt" else [own, carried]
        h = torch.cat([part for part in rows if len(part)])
        start = m + len(segment) + (m if kinds == "rmt+armt" else 0)
        for i, (layer, associations) in enumerate(zip(body.layers, memory.layers, strict=True)):
            a, z = kept[i]
            queries = [features_of(associations, associations.query.weight @ row) for row in h]
            h = h + torch.stack([(q @ a) / (q @ z + 1e-5) for q in queries])
            h = naive_layer(layer, h, torch.zeros(0, width, dtype=torch.float64), num_heads)
            kept[i] = naive_write(associations, h[start : start + M], a, z)
        h = rms_norm(h, body.norm)
        hidden.append(h[m : m + len(segment)])
        if m:
            carried = h[-m:] if kinds == "armt+rmt" else h[m + len(segment) : start]
    return Read(torch.cat(hidden), kept)


@pytest.mark.parametrize("kinds", [*COMPOSITIONS, "as published"])
def test_ragged_rows_follow_the_equations(kinds: str) -> None:
    """Outputs, states, and the gradient of random weights on both."""
    given = COMPOSITIONS.get(kinds, {**ARMT, **AS_PUBLISHED})
    kinds = kinds if kinds in COMPOSITIONS else "armt"
    model = tiny_model(given, segment_len=T)
    members: Any = [model.memory] if kinds == "armt" else model.memory.members
    at = kinds.split("+").index("armt")
    tokens, lengths = tokens_like(4, 3 * T), [3 * T, 2 * T + 1, T - 1, 1]
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens, lengths=torch.tensor(lengths))
    state = state if kinds == "armt" else state[at]
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i, length in enumerate(lengths):
        wanted = naive_armt(model, members[at], tokens[i, :length], kinds)
        pairs = [(out.hidden[i, :length], wanted.hidden)]
        for layer, (a, z) in zip(state, wanted.memory, strict=True):
            pairs += [(layer["values"][i], a), (layer["norm"][i], z)]
        for found, right in pairs:
            scale = 1 + float(right.detach().abs().max())
            assert close(found, right, atol=1e-11 * scale)
            weight = torch.randn_like(right) / scale
            ours, theirs = ours + (found * weight).sum(), theirs + (right * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    pairs = list(zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True))
    assert all(bool(a.any()) for a, _ in pairs)
    assert all(close(a, b, atol=1e-10 * (1 + float(b.abs().max()))) for a, b in pairs)


# What an association is


def empty(num_features: int, width: int, dtype: torch.dtype = torch.float64) -> State:
    return {
        "values": torch.zeros(1, num_features, width, dtype=dtype),
        "norm": torch.zeros(1, num_features, dtype=dtype),
    }


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ALL = torch.ones(1, 1, 1, dtype=torch.float64)


def test_the_empty_memory_reads_exactly_zero() -> None:
    assert not recall(empty(12, 5), features(draw(1, 4, 2))).any()
    assert not recall(empty(12, 5), torch.zeros(1, 1, 12, dtype=torch.float64)).any()


@pytest.mark.parametrize("at_once", [True, False])
def test_recall_of_orthogonal_keys_is_exact(at_once: bool) -> None:
    """Up to epsilon over the key's squared length."""
    keys, values = 1e4 * torch.eye(8, dtype=torch.float64)[None], draw(1, 8, 5)
    state = empty(8, 5)
    for part in [slice(0, 8)] if at_once else [slice(i, i + 1) for i in range(8)]:
        state = associate(state, keys[:, part], values[:, part], ALL)
    assert close(recall(state, keys), values, atol=1e-12)


def test_writing_a_key_again_overwrites_it_and_nothing_else() -> None:
    """However often: gamma keeps the norm as it was, so that neither readings nor norm drift."""
    keys = 1e4 * features(torch.eye(6, dtype=torch.float64) + 1)[None, :2]
    keys[:, 1] -= keys[:, 0] * (keys[:, 0] @ keys[:, 1].mT) / keys[:, 0].square().sum()  # orthogonal
    state = associate(empty(36, 5), keys, draw(1, 2, 5), ALL)
    kept, norm = recall(state, keys)[:, 1], state["norm"]
    for i in range(200):
        value = draw(1, 1, 5, seed=i)
        state = associate(state, keys[:, :1], value, ALL)
        assert close(recall(state, keys[:, :1]), value, atol=1e-9)
    assert close(recall(state, keys)[:, 1], kept, atol=1e-9)
    assert close(state["norm"] / norm.max(), norm / norm.max())


def test_half_a_strength_goes_half_the_way() -> None:
    key = 1e4 * torch.eye(8, dtype=torch.float64)[None, :1]
    first, second = draw(1, 1, 5), draw(1, 1, 5, seed=4)
    state = associate(associate(empty(8, 5), key, first, ALL), key, second, ALL / 2)
    assert close(recall(state, key), (first + second) / 2, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_state_stays_finite_over_200_segments(dtype: str) -> None:
    """With new text all the time; in half precision too the state is kept in float32."""
    torch.manual_seed(0)
    model = rmt_core.build(backbone=tiny_config(initializer_range=0.3), memory=ARMT, segment_len=T, dtype=dtype)
    layers: Any = model.memory.layers
    with torch.no_grad():
        for layer in layers:
            layer.value.weight.copy_(torch.nn.init.orthogonal_(torch.empty(32, 32), gain=0.5))
        out, state = rmt_core.run(model, tokens_like(1, 200 * T))
    assert {leaf.dtype for leaf in leaves(state)} == {torch.float32}
    assert all(bool(leaf.isfinite().all()) and bool(leaf.any()) for leaf in [out.hidden, *leaves(state)])
    assert max(float(leaf.abs().max()) for leaf in leaves(state)) < 1e5  # measured: 310 and 1700 after 400 segments


# Beginnings


def test_a_new_model_is_its_backbone_and_learns_to_remember() -> None:
    """Values start at zero, but not their gradient."""
    torch.manual_seed(0)
    model = rmt_core.build(backbone=tiny_config(), memory=ARMT, segment_len=T, dtype="float64")
    plain = rmt_core.build(backbone=tiny_config(), memory="none", segment_len=T, dtype="float64")
    plain.backbone.load_state_dict(model.backbone.state_dict())
    tokens = tokens_like(2, 3 * T)
    assert close(rmt_core.run(model, tokens)[0].hidden, rmt_core.run(plain, tokens)[0].hidden)
    rmt_core.backward(model, tokens, next_labels(tokens))
    grads = gradients(model)
    assert all(bool(grads[f"memory.layers.{i}.value.weight"].any()) for i in range(2))


@pytest.mark.parametrize("changes", [{"num_tokens": 0}, {"num_tokens": 0, "layers": [1]}])
def test_without_tokens_it_is_the_backbone(changes: dict[str, Any]) -> None:
    model, plain = tiny_model({**ARMT, **changes}, segment_len=T), tiny_model(segment_len=T)
    plain.backbone.load_state_dict(model.backbone.state_dict())
    tokens = tokens_like(2, 3 * T)
    out, state = rmt_core.run(model, tokens)
    assert torch.equal(out.hidden, rmt_core.run(plain, tokens)[0].hidden)
    assert state == ((), ())


def test_only_chosen_layers_have_a_memory() -> None:
    model, tokens = tiny_model({**ARMT, "layers": [1]}, segment_len=T), tokens_like(2, T)
    _, state = model.step(tokens, model.init_state(2))
    assert state[0] == ()
    assert state[1]["values"].any()
    assert {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("memory.layers")} == {"1"}
    everywhere = tiny_model({**ARMT, "layers": [1, 0]}, segment_len=T)
    _, wanted = tiny_model(ARMT, segment_len=T).step(tokens, everywhere.init_state(2))
    assert same_states(everywhere.step(tokens, everywhere.init_state(2))[1], wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": -1}, "memory.num_tokens is -1; it must be at least 0"),
        ({"key_width": 0}, "memory.key_width is 0; it must be at least 1"),
        ({"layers": []}, r"memory.layers is \(\); it must be null for all, or different layers from 0"),
        ({"layers": [0, 0]}, r"memory.layers is \(0, 0\); it must be"),
        ({"layers": [-1]}, r"memory.layers is \(-1,\); it must be"),
        ({"layers": 1}, r"memory.layers is 1; it must be"),
        ({"layers": [2]}, r"memory.layers is \[2\]; the backbone has layers 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model({**ARMT, **changes}, segment_len=T)
