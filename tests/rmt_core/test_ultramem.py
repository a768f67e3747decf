"""UltraMem as the feed-forward part of chosen layers, against its equations over the whole grid of keys.

Axes: X tokens, D width, n keys of a side, r rank, m values read, h cores, E expansion, N values, v value width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import ModelConfig, RecurrentModel
from rmt_core.generation import open_session, read
from rmt_core.ultramem import UltraMem, UltraMemConfig, dominant

from .tiny import (
    ARMT,
    FAMILIES,
    RMT,
    close,
    close_states,
    gradients,
    next_labels,
    stir,
    tiny_config,
    tiny_model,
    tokens_like,
)

SETTINGS = {"num_keys": 6, "key_width": 8, "num_read": 4, "expansion": 4, "value_width": 6, "penalty_margin": 0.05}


def ultramem(seed: int = 0, **changes: Any) -> UltraMem:
    torch.manual_seed(seed)
    part = UltraMem(UltraMemConfig(**{**SETTINGS, **changes}), 16, 0.1).double()
    stir(part, seed)
    return part


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def naive(part: UltraMem, x: Tensor) -> Tensor:
    """One token x (D,) at a time: every place of the grid scored, every place's own value written out."""
    c, n = part.config, part.config.num_keys
    cores = part.core.weight
    core = cores.sum(0)

    def side(scores: Any) -> Tensor:
        """(r, n)."""
        query = layer_norm(scores.query.weight @ x, scores.query_norm)
        keys = [[layer_norm(key, scores.key_norm) @ query for key in rank] for rank in scores.keys]
        return torch.stack([torch.stack(rank) for rank in keys])

    rows, columns = side(part.rows), side(part.columns)
    u, _, t = torch.linalg.svd(core.detach())
    left, right = u[:, 0], t[0]
    if left.sum() < 0:
        left, right = -left, -right
    best_rows = (left @ rows).argsort(descending=True)[: c.num_read].tolist()
    best_columns = (right @ columns).argsort(descending=True)[: c.num_read].tolist()
    grid = {(i, j): rows[:, i] @ core @ columns[:, j] for i in range(n) for j in range(n)}
    allowed = [place for place in grid if place[0] in best_rows and place[1] in best_columns]
    chosen = sorted(allowed, key=lambda place: grid[place].item(), reverse=True)[: c.num_read]

    projections = part.project.weight.unflatten(1, (c.expansion, c.value_width)).unbind(1)  # E x (D, v)
    virtual = torch.cat([torch.eye(part.num_values).double() @ part.values.weight @ p.T for p in projections])
    assert virtual.shape == (n * n, 16)  # a value of its own for every place
    out = torch.zeros(16, dtype=torch.float64)
    for i, j in chosen:
        if c.num_cores == 1:
            out = out + grid[i, j] * virtual[part.shuffle[i * n + j]]
        else:
            block, value = divmod(int(part.shuffle[i * n + j]), part.num_values)
            groups = part.values.weight[value].chunk(c.num_cores)
            scores = [rows[:, i] @ one @ columns[:, j] for one in cores]
            mixed = torch.cat([score * group for score, group in zip(scores, groups, strict=True)])
            out = out + projections[block] @ mixed
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 1},
        {"rank": 3},
        {"num_cores": 3},
        {"expansion": 1},
        {"expansion": 9, "num_cores": 2},
        {"num_read": 20},  # more than there are rows: no row is left out
        {"num_read": 1},
    ],
    ids=str,
)
def test_outputs_and_gradients_follow_the_equations(changes: dict[str, Any]) -> None:
    part = ultramem(**changes)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    ours = part(x)
    theirs = torch.stack([torch.stack([naive(part, token) for token in row]) for row in x])
    assert close(ours, theirs, atol=1e-9)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    inputs = [x, *part.parameters()]
    pairs = zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    )
    for a, b in pairs:
        assert close(a, b, atol=1e-10 * (1 + float(b.abs().max())))
        assert a.any()


def test_with_all_rows_and_columns_the_best_of_the_whole_grid_are_found() -> None:
    part = ultramem(num_read=6)
    x = torch.randn(7, 16, dtype=torch.float64)
    scores, places = part.search(x)
    rows, columns = part.rows(x), part.columns(x)
    grid = torch.einsum("xai,ab,xbj->xij", rows, part.core.weight[0], columns).flatten(1)
    wanted = grid.topk(6)
    assert close(scores.squeeze(1).sort(descending=True).values, wanted.values)
    assert torch.equal(places.sort().values, wanted.indices.sort().values)


def test_the_first_stage_sees_the_first_singular_pair_only() -> None:
    """Rows and columns chosen are the best of u S_row and t S_col, whatever the rest of the core says."""
    part = ultramem(num_read=2)
    x = torch.randn(9, 16, dtype=torch.float64)
    _, places = part.search(x)
    left, right = dominant(part.core.weight.sum(0))
    rows = torch.einsum("a,xai->xi", left, part.rows(x)).topk(2).indices
    columns = torch.einsum("b,xbj->xj", right, part.columns(x)).topk(2).indices
    for token in range(9):
        assert set((places[token] // 6).tolist()) <= set(rows[token].tolist())
        assert set((places[token] % 6).tolist()) <= set(columns[token].tolist())


def test_the_penalty_holds_the_cores_other_singular_values_down() -> None:
    part = ultramem(rank=3, num_cores=2, penalty_weight=0.5, penalty_margin=0.05)
    core = part.core.weight.sum(0)
    others = torch.linalg.eigvalsh(core.T @ core).sqrt().flip(0)[1:]
    assert close(part.penalty(), 0.5 / 2 * (others - 0.05).clamp(min=0).square().sum())
    optimiser = torch.optim.SGD(part.parameters(), lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        part.penalty().backward()
        optimiser.step()
    assert float(torch.linalg.svdvals(part.core.weight.sum(0))[1].detach()) < 0.06
    assert not ultramem(rank=1).penalty().any()


@pytest.mark.parametrize("layers", [[0], [1], None])
def test_the_penalty_is_part_of_the_loss(layers: list[int] | None) -> None:
    model = with_ultramem(layers=layers, penalty_weight=2.0)
    tokens = tokens_like(2, 15)
    labels = next_labels(tokens)
    wanted = torch.stack(model.backbone.penalties()).sum()
    assert len(model.backbone.penalties()) == (2 if layers is None else 1)
    assert wanted.item() > 0
    out, _ = model.step(tokens[:, :6], model.init_state(2))
    assert close(out.aux, wanted)
    logits = rmt_core.run(model, tokens)[0].logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert close(model(tokens, labels), nats + wanted)


# In a model


def with_ultramem(memory: Any = RMT, family: str = "llama", seed: int = 0, **changes: Any) -> RecurrentModel:
    torch.manual_seed(seed)
    settings = {"kind": "ultramem", "layers": [1], **SETTINGS, **changes}
    model = rmt_core.build(
        backbone=tiny_config(family), memory=memory, segment_len=6, dtype="float64", feed_forward=settings
    )
    stir(model, seed)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_it_and_learns_all_of_it(family: str) -> None:
    model, tokens = with_ultramem("none", family), tokens_like(4, 6)
    out, _ = model.step(tokens, ())
    lm = model.backbone.lm
    assert isinstance(model.backbone.family.layers(lm)[1].mlp, UltraMem)
    assert not isinstance(model.backbone.family.layers(lm)[0].mlp, UltraMem)
    assert close(out.logits, lm(input_ids=tokens, use_cache=False).logits, atol=1e-9)
    rmt_core.backward(model, tokens, next_labels(tokens))
    assert all(grad.any() for grad in gradients(model).values())


def test_modes_of_training_and_decoding_stay_exact() -> None:
    model, tokens = with_ultramem(penalty_weight=1.0), tokens_like(2, 15)
    found = []
    for mode in ("full", "checkpoint", "replay"):
        model.zero_grad()
        rmt_core.backward(model, tokens, next_labels(tokens), mode=mode)
        found.append(gradients(model))
    assert all(close(found[0][name], other[name]) for other in found[1:] for name in other)
    whole = read(model, open_session(model, 2), tokens)
    single = open_session(model, 2)
    for at in range(15):
        single = read(model, single, tokens[:, at : at + 1])
    assert close(single.hidden, whole.hidden)


def test_a_step_compiles_whole() -> None:
    model, tokens = with_ultramem(layers=None), tokens_like(2, 6)
    out, state = model.step(tokens, model.init_state(2))
    other, other_state = torch.compile(model.step, backend="eager", fullgraph=True)(tokens, model.init_state(2))
    assert close(other.hidden, out.hidden)
    assert close(other.aux, out.aux)
    assert close(other_state, state)
    torch.compiler.reset()


@pytest.mark.parametrize("layers", [[1], None])
def test_layers_together_equal_one_after_the_other(layers: list[int] | None) -> None:
    model, tokens = with_ultramem(ARMT, layers=layers, penalty_weight=1.0), tokens_like(2, 27)
    out, state = rmt_core.run(model, tokens)
    other, other_state = rmt_core.run(model, tokens, order="diagonal")
    assert close(other.hidden, out.hidden)
    assert close(other.aux, out.aux)
    assert close_states(other_state, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_saved_loaded_and_told_apart(dtype: str, tmp_path: Path) -> None:
    settings = {"kind": "ultramem", "layers": [1], **SETTINGS}
    model = rmt_core.build(backbone=tiny_config(), memory=RMT, segment_len=6, dtype=dtype, feed_forward=settings)
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load(tmp_path / "model")
    assert again.config.to_json() == model.config.to_json()
    assert rmt_core.fingerprint(again) == rmt_core.fingerprint(model)
    tokens = tokens_like(2, 15)
    assert torch.equal(rmt_core.run(again, tokens)[0].logits, rmt_core.run(model, tokens)[0].logits)
    assert rmt_core.fingerprint(with_ultramem()) == rmt_core.fingerprint(with_ultramem())
    found = {rmt_core.fingerprint(with_ultramem(**changes)) for changes in ({}, {"layers": [0]}, {"num_read": 3})}
    assert len(found | {rmt_core.fingerprint(tiny_model(RMT))}) == 4


def test_settings_are_written_out() -> None:
    config = ModelConfig(backbone=tiny_config(), feed_forward={"kind": "ultramem", "layers": [0]})
    assert config.feed_forward["num_keys"] == UltraMemConfig().num_keys
    assert ModelConfig(**config.to_json()).feed_forward == config.feed_forward
    assert ModelConfig(backbone=tiny_config()).to_json()["feed_forward"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("ultramen", "feed_forward kind is 'ultramen'; did you mean 'ultramem'"),
        (["ultramem"], "feed_forward is .*; give a kind, or a dictionary with 'kind'"),
        ({"layers": [0]}, "feed_forward kind is None; allowed: ultramem"),
        ({"layer": [0]}, "feed_forward 'ultramem' has no setting 'layer'; did you mean 'layers'"),
        ({"layers": [2]}, r"feed_forward.layers is \[2\]; the backbone has layers 0 to 1"),
        ({"layers": [1, 1]}, r"feed_forward.layers is \(1, 1\); it must be null for all, or different layers from 0"),
        ({"layers": []}, r"feed_forward.layers is \(\); it must be"),
        ({"layers": [-1]}, r"feed_forward.layers is \(-1,\); it must be"),
        ({"layers": 1}, "feed_forward.layers is 1; it must be"),
        ({"layers": ["a"]}, "feed_forward.layers is .*; it must be"),
        ({"num_keys": 0}, "feed_forward.num_keys is 0; it must be at least 1"),
        ({"num_keys": 2.5}, "feed_forward.num_keys is 2.5; it must be a whole number"),
        ({"rank": 0}, "feed_forward.rank is 0; it must be at least 1"),
        ({"num_keys": 2, "num_read": 5}, "feed_forward.num_read is 5; 2 keys a side have 4 places"),
        ({"num_keys": 6, "expansion": 5}, "feed_forward.expansion is 5; it must divide 36 places"),
        ({"value_width": 6, "num_cores": 4}, "feed_forward.num_cores is 4; it must divide value_width 6"),
        ({"penalty_weight": -0.1}, "feed_forward.penalty_weight is -0.1; it must be at least 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings: Any, message: str) -> None:
    named = isinstance(settings, dict) and message.find("kind is None") < 0
    with pytest.raises(ValueError, match=message):
        rmt_core.build(
            backbone=tiny_config(),
            segment_len=6,
            feed_forward={"kind": "ultramem", **settings} if named else settings,
        )
