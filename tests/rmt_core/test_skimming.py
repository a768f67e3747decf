"""Reading on for the state alone. What is recorded on a GPU is compared in test_gpu.py."""

from typing import Any

import pytest
import torch

import rmt_core

from .tiny import MEMORIES, same_states, tiny_model, tokens_like

B, T = 3, 6


@pytest.mark.parametrize("memory", [MEMORIES[name] for name in ("none", "rmt", "xl+rmt", "armt", "infinity")])
def test_the_state_is_that_of_steps(memory: Any) -> None:
    model = tiny_model(memory, segment_len=T)
    skimmer = rmt_core.Skimmer(model, patience=1)
    state = wanted = model.init_state(B)
    for i, part in enumerate(tokens_like(B, 5 * T).split(T, 1)):
        lengths = torch.tensor([T, 2, 0]) if i == 3 else None
        state = skimmer.after(part, state, lengths)
        wanted = model.step(part, wanted, lengths)[1]
        assert same_states(state, wanted)
    assert not any(leaf.requires_grad for leaf in rmt_core.state.leaves(state))


def test_shapes_that_take_turns_are_prepared_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def compiled(function: Any, **_: Any) -> Any:
        made.append(torch.Size())
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    model = tiny_model(MEMORIES["rmt"], segment_len=T)
    skimmer = rmt_core.Skimmer(model, patience=3, compiled=True)
    kept = {rows: model.init_state(rows) for rows in (B, 1)}
    for i in range(12):
        assert len(made) == max(0, min(i - 6, 2))
        rows = (B, 1)[i % 2]
        tokens = tokens_like(rows, T, seed=i)
        wanted = model.step(tokens, kept[rows])[1]
        kept[rows] = skimmer.after(tokens, kept[rows])
        assert same_states(kept[rows], wanted)
    assert len(made) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["rmt", "armt", "xl+rmt"])
def test_compiled_steps_leave_the_same_state(name: str) -> None:
    model = tiny_model(MEMORIES[name], segment_len=T)
    skimmer = rmt_core.Skimmer(model, patience=2, compiled=True)
    before = model.init_state(B)
    for i, part in enumerate(tokens_like(B, 8 * T).split(T, 1)):
        lengths = torch.tensor([T, 2, 0]) if i == 5 else None
        state = skimmer.after(part, before, lengths)
        before = model.step(part, before, lengths)[1]
        for leaf, other in zip(rmt_core.state.leaves(state), rmt_core.state.leaves(before), strict=True):
            assert (leaf - other).abs().max() <= 1e-5 * other.abs().max()  # norms compute in float32, in any type
    assert skimmer._made
    torch.compiler.reset()
