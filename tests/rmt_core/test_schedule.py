"""The diagonal order gives what the sequential one gives, with one copy of the weights; `auto` only chooses.

Axes: B rows, N tokens of a text, T tokens of a segment, L layers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel, schedule
from rmt_core.config import memory_settings
from rmt_core.diagonal import Grid, Group
from rmt_core.schedule import Costs
from rmt_core.state import State, detach, leaves, tree_map

from .tiny import (
    ARMT,
    MEMORIES,
    XL,
    close,
    close_states,
    gradients,
    same_states,
    stir,
    tiny_config,
    tiny_model,
    tokens_like,
)

T, L = 4, 3
LOCAL = {
    name: memory
    for name, memory in MEMORIES.items()
    if all(rmt_core.MEMORIES[settings["kind"]].layer_local for settings in memory_settings(memory))
}
LOCAL["armt-some"] = {**ARMT, "layers": (0, 2)}
REFUSED = {name: memory for name, memory in MEMORIES.items() if name not in LOCAL}
# (rows, tokens, lengths): more and fewer segments than layers, one, a short last one, ragged rows, an empty row
TEXTS: list[tuple[int, int, list[int] | None]] = [
    (1, 5 * T + 1, None),
    (3, 2 * T, None),
    (3, 4 * T + 2, [4 * T + 2, 2 * T + 1, 0]),
    (1, T - 1, None),
]


def deep_model(memory: Any, family: str = "llama", **changes: Any) -> RecurrentModel:
    """Three layers; weights that are stirred less, so that sums over segments stay small and rounding with them."""
    layers = {"n_layer": L} if family == "gpt2" else {"num_hidden_layers": L}
    return tiny_model(memory, family, segment_len=T, stirred=0.1, **{**layers, **changes})


def weighted(x: Tensor) -> Tensor:
    """A sum that tells every entry apart."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)).sum()


def read(
    model: RecurrentModel, text: tuple[int, int, list[int] | None], order: str, state: State = None
) -> tuple[Tensor, State, Tensor, dict[str, Tensor]]:
    """Hidden states at real tokens, the last state, the auxiliary loss, and gradients of a sum over all of them."""
    num_rows, size, given = text
    lengths = None if given is None else torch.tensor(given)
    out, new = rmt_core.run(model, tokens_like(num_rows, size), state, lengths, order)
    real = torch.arange(size) < (torch.full((num_rows,), size) if lengths is None else lengths)[:, None]
    assert out.hidden.shape == (num_rows, size, 32)
    model.zero_grad()
    learned = [leaf for leaf in leaves(new) if leaf.requires_grad]
    (weighted(out.hidden[real]) + sum(map(weighted, learned)) + out.aux).backward()
    return out.hidden[real].detach(), detach(new), out.aux.detach(), gradients(model)


def same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """To 1e-9, of the largest entry where that is above 1: the sums are over hundreds of terms."""
    scale = max(1.0, *(float(grad.abs().max()) for grad in wanted.values() if grad.numel()))
    return all(close(found[name], grad, 1e-9 * scale) for name, grad in wanted.items())


# The results


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("name", LOCAL)
def test_diagonal_equals_sequential(name: str, family: str) -> None:
    if family == "gpt2" and deep_model(LOCAL[name]).memory.needs_relative_positions:
        pytest.skip("a cache needs rotary positions")
    model = deep_model(LOCAL[name], family)
    for text in TEXTS if family == "llama" else TEXTS[2:3]:
        hidden, state, aux, grads = read(model, text, "diagonal")
        wanted_hidden, wanted_state, wanted_aux, wanted_grads = read(model, text, "sequential")
        assert close(hidden, wanted_hidden, 1e-9), text
        assert close_states(state, wanted_state, 1e-9), text
        assert close(aux, wanted_aux, 1e-9)
        assert same_gradients(grads, wanted_grads), text


@pytest.mark.parametrize("name", LOCAL)
def test_without_gradient_too_and_from_a_given_state(name: str) -> None:
    model = deep_model(LOCAL[name])
    with torch.no_grad():
        _, state = rmt_core.run(model, tokens_like(3, 3 * T, seed=5), order="diagonal")
        kept = tree_map(Tensor.clone, state)
        for num_rows, size, given in TEXTS[1:3]:
            lengths, tokens = None if given is None else torch.tensor(given), tokens_like(num_rows, size)
            out, new = rmt_core.run(model, tokens, state, lengths, "diagonal")
            wanted, wanted_new = rmt_core.run(model, tokens, state, lengths)
            assert close_states(new, wanted_new, 1e-9)
            real = torch.arange(size) < torch.tensor(given or [size] * num_rows)[:, None]
            assert close(out.hidden[real], wanted.hidden[real], 1e-9)
            assert bool(out.hidden.isfinite().all())
    assert same_states(state, kept)


def test_the_gradient_reaches_the_given_state() -> None:
    model = deep_model([XL, ARMT])
    _, state = rmt_core.run(model, tokens_like(2, 2 * T))
    found = []
    for order in ("diagonal", "sequential"):
        given = tree_map(lambda x: x.detach().requires_grad_(x.is_floating_point()), state)
        out, _ = rmt_core.run(model, tokens_like(2, 2 * T, seed=2), given, order=order)
        learned = [leaf for leaf in leaves(given) if leaf.requires_grad]
        found.append(torch.autograd.grad(weighted(out.hidden), learned))
    assert all(close(a, b, 1e-9) and bool(b.any()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("family", "memory", "groups"),
    [
        ("gemma3_text", ARMT, [[0, 2], [1]]),
        ("smollm3", XL, [[0, 2], [1]]),
        ("llama", {**ARMT, "layers": (1, 2)}, [[0], [1, 2]]),
        ("gpt2", "none", [[0], [1], [2]]),
    ],
)
def test_only_equal_layers_are_grouped(family: str, memory: Any, groups: list[list[int]]) -> None:
    """Windows, missing rotary positions, layers without memory and scales by the layer's number divide the layers."""
    settings: dict[str, dict[str, Any]] = {
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "smollm3": {"no_rope_layers": [1, 0, 1]},
        "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    }
    model = deep_model(memory, family, **settings.get(family, {}))
    grid = Grid(model, T, model.memory.by_layer(model.init_state(1)))
    assert [group.layers for group in grid.groups] == groups
    for text in TEXTS[1:3]:
        hidden, state, _, grads = read(model, text, "diagonal")
        wanted_hidden, wanted_state, _, wanted_grads = read(model, text, "sequential")
        assert close(hidden, wanted_hidden, 1e-9)
        assert close_states(state, wanted_state, 1e-9)
        # Gemma's norms sum the gradient of their weights in float32, here in another order: 1e-6 was measured.
        assert family == "gemma3_text" or same_gradients(grads, wanted_grads)


def test_replaced_feed_forward_parts_run_and_their_penalties_count_in_each_segment() -> None:
    sizes = {"num_keys": 8, "num_read": 4, "key_width": 8, "value_width": 8}
    settings = {"kind": "ultramem", "layers": [1, 2], "penalty_margin": 0.0, **sizes}
    config = tiny_config(num_hidden_layers=L)
    model = rmt_core.build(backbone=config, memory=ARMT, segment_len=T, dtype="float64", feed_forward=settings)
    stir(model, by=0.1)
    hidden, state, aux, grads = read(model, TEXTS[2], "diagonal")
    wanted_hidden, wanted_state, wanted_aux, wanted_grads = read(model, TEXTS[2], "sequential")
    assert close(hidden, wanted_hidden, 1e-9)
    assert close_states(state, wanted_state, 1e-9)
    assert close(aux, wanted_aux, 1e-9)
    assert aux > 0
    assert same_gradients(grads, wanted_grads)


@pytest.mark.parametrize("num_segments", [1, 2, 3, 7])
def test_each_cell_runs_once_and_diagonals_are_full(num_segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = Group.step
    monkeypatch.setattr(Group, "step", lambda self, rows, *rest: (widths.append(len(rows)), step(self, rows, *rest))[1])
    rmt_core.run(deep_model(ARMT), tokens_like(2, num_segments * T), order="diagonal")
    assert len(widths) == num_segments + L - 1
    assert sum(widths) == num_segments * L
    assert max(widths) == min(num_segments, L)


# The weights


def storage_bytes(model: RecurrentModel) -> int:
    """Of all tensors' storages, each once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_without_gradient_there_is_one_copy_of_the_weights(tmp_path: Path) -> None:
    model, tokens = deep_model([XL, ARMT]), tokens_like(2, 4 * T)
    wanted, values, size = rmt_core.run(model, tokens)[0].hidden, model.state_dict(), storage_bytes(model)
    values = {name: tensor.clone() for name, tensor in values.items()}
    parameters = list(map(id, model.parameters()))
    with torch.inference_mode():
        rmt_core.run(model, tokens, order="diagonal")
    assert storage_bytes(model) == size
    groups = grid_without_gradient(model).groups
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert all(x.untyped_storage().data_ptr() in own for group in groups for x in group.tensors.values() if x.numel())

    assert list(map(id, model.parameters())) == parameters
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(rmt_core.run(model, tokens)[0].hidden, wanted)
    rmt_core.save(tmp_path / "model", model)
    assert torch.equal(rmt_core.run(rmt_core.load(tmp_path / "model"), tokens)[0].hidden, wanted)


def grid_without_gradient(model: RecurrentModel) -> Grid:
    with torch.no_grad():
        return Grid(model, T, model.memory.by_layer(model.init_state(1)))


@torch.no_grad()
def both(model: RecurrentModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return rmt_core.run(model, tokens)[0].hidden, rmt_core.run(model, tokens, order="diagonal")[0].hidden


def test_weights_that_change_are_seen() -> None:
    model, tokens = deep_model(ARMT), tokens_like(2, 4 * T)
    first, _ = both(model, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    second, found = both(model, tokens)
    assert close(found, second)
    assert not close(second, first)

    model.load_state_dict(deep_model(ARMT).state_dict())
    third, found = both(model, tokens)
    assert torch.equal(third, first)
    assert close(found, first)

    model.to(torch.float32)
    fourth, found = both(model, tokens)
    assert close(found, fourth, 1e-4)
    assert storage_bytes(model) == storage_bytes(deep_model(ARMT).to(torch.float32))


def test_training_goes_on_after_a_diagonal_reading() -> None:
    """What was stacked while nothing was to be learned can be learned."""
    model, text = deep_model(ARMT), TEXTS[2]
    with torch.inference_mode():
        rmt_core.run(model, tokens_like(2, 3 * T), order="diagonal")
    fresh = read(deep_model(ARMT), text, "sequential")[3]
    assert same_gradients(read(model, text, "sequential")[3], fresh)
    assert same_gradients(read(model, text, "diagonal")[3], fresh)


@pytest.mark.parametrize("padding", [0, 1])
def test_parameters_in_a_buffer_of_an_optimiser_stay_there(padding: int) -> None:
    """Layers lie in it at equal distances, or with paddings of different length between."""
    model, tokens = deep_model(ARMT), tokens_like(2, 4 * T)
    parts = [(x, x.numel() + padding * i * i) for i, x in enumerate(model.parameters())]
    flat = torch.zeros(sum(size for _, size in parts), dtype=torch.float64)
    for (parameter, _), place in zip(parts, flat.split([size for _, size in parts]), strict=True):
        place[: parameter.numel()] = parameter.detach().flatten()
        parameter.data = place[: parameter.numel()].view_as(parameter)
    both(model, tokens)
    flat.mul_(1.01)  # as such an optimiser steps
    wanted, found = both(model, tokens)
    assert all(x.untyped_storage().data_ptr() == flat.data_ptr() for x in model.parameters())
    assert close(found, wanted)


# The choice


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="order is 'wavefront'; allowed: 'sequential', 'diagonal', 'auto'"):
        rmt_core.run(deep_model("none"), tokens_like(1, T), order="wavefront")


@pytest.mark.parametrize("name", REFUSED)
def test_memories_that_are_not_layer_local_are_refused_by_name(name: str) -> None:
    model, tokens = deep_model(REFUSED[name]), tokens_like(2, 3 * T)
    guilty = [kind for kind in ("rmt", "memformer") if kind in name]
    with pytest.raises(ValueError, match="order 'diagonal' is not possible") as refusal:
        rmt_core.run(model, tokens, order="diagonal")
    assert all(repr(kind) in str(refusal.value) for kind in guilty)
    assert "'xl'" not in str(refusal.value)
    assert torch.equal(rmt_core.run(model, tokens, order="auto")[0].hidden, rmt_core.run(model, tokens)[0].hidden)


def test_random_choices_are_refused() -> None:
    tokens = tokens_like(2, 3 * T)
    with pytest.raises(ValueError, match="draw other numbers from the generator"):
        rmt_core.run(deep_model(XL), tokens, order="diagonal", generator=torch.Generator())
    for family, settings in (("llama", {"attention_dropout": 0.5}), ("gpt2", {"resid_pdrop": 0.5})):
        model = deep_model("none", family, **settings)
        rmt_core.run(model, tokens, order="diagonal")
        model.train()
        with pytest.raises(ValueError, match="drop out otherwise"):
            rmt_core.run(model, tokens, order="diagonal")
        found = []
        for order in ("auto", "sequential"):
            torch.manual_seed(0)
            found.append(rmt_core.run(model, tokens, order=order)[0].hidden)
        assert torch.equal(*found)


@pytest.mark.parametrize("learns", [True, False])
def test_auto_measures_once_and_changes_nothing(learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Costs] = []
    costs = schedule._Trial.costs
    monkeypatch.setattr(schedule._Trial, "costs", lambda self: made.append(costs(self)) or made[-1])
    model, tokens = deep_model([XL, ARMT]), tokens_like(2, 3 * T)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = read(model, (2, 3 * T, None), "sequential")
    random, called = torch.get_rng_state(), []
    for parameter in model.parameters():
        parameter.register_hook(called.append)
    with torch.set_grad_enabled(learns):
        for _ in range(2):
            out, state = rmt_core.run(model, tokens, order="auto")
    assert len(made) == 1
    assert not called
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(grad, wanted[3][name]) for name, grad in gradients(model).items())
    assert close(out.hidden.flatten(0, 1), wanted[0], 1e-9)
    assert close_states(state, wanted[1], 1e-9)
    rmt_core.run(model, tokens[:1], order="auto")
    assert len(made) == 2


def test_auto_takes_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = deep_model(ARMT), []
    run_diagonal = rmt_core.recurrent.run_diagonal
    monkeypatch.setattr(rmt_core.recurrent, "run_diagonal", lambda *given: taken.append(1) or run_diagonal(*given))
    for wide, stacking, diagonal in ((1.5, 0, True), (2.95, 0, False), (1.5, 100, False)):
        monkeypatch.setattr(schedule, "_costs", lambda *_, w=wide, s=stacking: Costs(1.0, 1.0, w, L, s))
        rmt_core.run(model, tokens_like(1, 9 * T), order="auto")
        assert bool(taken) is diagonal  # 2.95 is faster too, by less than the margin
        taken.clear()
    rmt_core.run(model, tokens_like(1, T), order="auto")
    assert not taken


def test_costs_are_summed_over_all_diagonals() -> None:
    costs = Costs(cell=1.0, narrow=1.0, wide=4.0, width=4, stacking=0.5)  # a diagonal costs its width
    for num_segments, num_layers in ((4, 4), (9, 4), (4, 9)):
        assert costs.sequential(num_segments, num_layers) == num_segments * num_layers
        assert costs.diagonal(num_segments, num_layers) == pytest.approx(num_segments * num_layers + 0.5)
    flat = Costs(cell=1.0, narrow=2.0, wide=2.0, width=4, stacking=0.0)
    assert flat.diagonal(9, 4) == pytest.approx(2.0 * (9 + 4 - 1))
