"""Full attention piece by piece is the Hugging Face model over the whole text.

Axes: B rows, N tokens of a text.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import DoesNotFitError, FullContext, floats_per_token

from .tiny import FAMILIES, RMT, close, tiny_model, tokens_like


def logits_of(model: FullContext, tokens: Tensor, sizes: list[int], room: int | None = None) -> Tensor:
    """Read in pieces of these sizes."""
    state = model.init_state(len(tokens), room or tokens.shape[1])
    found = []
    for part in tokens.split(sizes, 1):
        out, state = model.step(part, state)
        found.append(out.logits)
    assert state.num_read == tokens.shape[1]
    return torch.cat(found, 1)


def full(family: str = "llama", **changes: Any) -> FullContext:
    return FullContext(tiny_model("none", family, **changes))


@torch.inference_mode()
def whole(model: FullContext, tokens: Tensor) -> Tensor:
    logits: Tensor = model.backbone.lm(input_ids=tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_pieces_of_any_size_give_hugging_faces_logits(family: str) -> None:
    model, tokens = full(family), tokens_like(3, 33)
    wanted = whole(model, tokens)
    for sizes in ([33], [7, 1, 20, 5], [1] * 33):
        assert close(logits_of(model, tokens, sizes), wanted, atol=1e-9)
    assert close(logits_of(model, tokens, [20, 13], room=40), wanted, atol=1e-9)


@torch.inference_mode()
def test_rotary_positions_run_on_beyond_those_that_the_backbone_was_made_for() -> None:
    model, tokens = full(), tokens_like(2, 150)
    assert close(logits_of(model, tokens, [60, 60, 30]), whole(model, tokens), atol=1e-9)


@torch.inference_mode()
def test_positions_that_depend_on_the_texts_length_are_those_of_the_whole() -> None:
    model, tokens = full(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), tokens_like(1, 90)
    assert close(logits_of(model, tokens, [60, 30]), whole(model, tokens), atol=1e-9)


@torch.inference_mode()
def test_one_segment_is_read_as_without_memory() -> None:
    model, tokens = tiny_model(), tokens_like(2, 6)
    reader = FullContext(model)
    assert close(reader.step(tokens, reader.init_state(2, 6))[0].hidden, model.step(tokens, ())[0].hidden)


@torch.inference_mode()
def test_padding_behind_a_row_changes_nothing() -> None:
    model, tokens = full(), tokens_like(2, 20)
    state = model.init_state(2, 20)
    _, state = model.step(tokens[:, :8], state)
    out, _ = model.step(tokens[:, 8:], state, torch.tensor([12, 5]))
    assert close(out.logits[1, :5], whole(model, tokens[1:, :13])[0, 8:], atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.inference_mode()
def test_it_writes_what_the_whole_text_makes_likeliest_and_leaves_the_state_as_it_was(family: str) -> None:
    model, tokens = full(family), tokens_like(3, 20)
    state = model.init_state(3, 26)
    out, state = model.step(tokens, state)
    before = [part[:, :, :20].clone() for part in (*state.keys, *state.values)]
    for row, length in ((0, 20), (1, 9), (2, 1)):
        text = tokens[row : row + 1, :length]
        for _ in range(6):
            text = torch.cat([text, whole(model, text)[:, -1:].argmax(-1)], 1)
        wanted = text[0, length:].tolist()
        read = length, out.hidden[row, length - 1]
        assert model.write(state, row, read, 6) == wanted
        stop = wanted[3]
        assert model.write(state, row, read, 6, [stop]) == wanted[: wanted.index(stop)]
    after = [part[:, :, :20] for part in (*state.keys, *state.values)]
    assert all(torch.equal(part, was) for part, was in zip(after, before, strict=True))


def test_steps_take_whole_segments() -> None:
    model = tiny_model(segment_len=6)
    assert FullContext(model).step_len == 510
    assert FullContext(model, segment_len=600).step_len == 600
    assert FullContext(model, segment_len=600).segment_len == 600
    assert model.step_len == 6


def test_what_does_not_fit_is_told_with_its_bytes() -> None:
    model = tiny_model()
    num_bytes = 2 * 100 * floats_per_token(model.backbone) * 8
    state = FullContext(model, max_bytes=num_bytes).init_state(2, 100)
    assert sum(part.nbytes for part in (*state.keys, *state.values)) == num_bytes
    needs = rf"2 x 100 tokens need {num_bytes:,} bytes; {num_bytes - 1:,} are allowed"
    with pytest.raises(DoesNotFitError, match=needs) as error:
        FullContext(model, max_bytes=num_bytes - 1).init_state(2, 100)
    assert error.value.num_bytes == num_bytes
    with pytest.raises(DoesNotFitError, match="need .* bytes: "):
        FullContext(model).init_state(2, 2**50)


@pytest.mark.parametrize(("family", "most"), [("gpt2", 64), ("mistral", 40), ("gemma3_text", 40)])
def test_learned_positions_and_windows_end_a_text(family: str, most: int) -> None:
    model = full(family)
    assert model.init_state(1, most).keys[0].shape[2] == most
    with pytest.raises(DoesNotFitError, match=f"{most + 1} tokens exceed the backbone's {most} positions"):
        model.init_state(1, most + 1)


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="memory none"):
        FullContext(tiny_model(RMT))
    model = full()
    state = model.init_state(1, 5)
    with pytest.raises(ValueError, match="6 tokens exceed the 5"):
        model.step(tokens_like(1, 6), state)
    with pytest.raises(ValueError, match="neither reset nor active"):
        model.step(torch.zeros(1, 1, dtype=torch.long), state, reset=torch.tensor([True]))
    assert model.init_state(1).keys[0].shape == (1, 2, 64, 8)
    with pytest.raises(ValueError, match="order 'diagonal' is not possible: full attention's keys and values"):
        rmt_core.run(model, tokens_like(1, 8), order="diagonal")
    with pytest.raises(ValueError, match="full attention has no sessions; write with FullContext.write"):
        rmt_core.generate(model, [[1, 2]], 1)


def test_logits_may_be_asked_for_later() -> None:
    model = full()
    out, _ = model.step(tokens_like(1, 4), model.init_state(1, 4))
    assert out.logits.requires_grad
    assert not out.hidden.requires_grad
