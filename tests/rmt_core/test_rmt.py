"""The Recurrent Memory Transformer against its equations, with the Hugging Face model as the backbone.

Axes: B rows, N tokens of a text, M memory tokens, D width.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel

from .tiny import FAMILIES, close, tiny_model, tokens_like

T = 6


class Read(NamedTuple):
    """What the naive reference finds for one text."""

    hidden: Tensor  # (N, D)
    memory: Tensor  # (M, D) after the last segment


def naive_rmt(model: RecurrentModel, text: Tensor) -> Read:
    """arXiv:2207.06881, section 3, for one text (N,): `[M; E(x); M]` through the plain model, segment after segment."""
    lm: Any = model.backbone.lm
    body = lm.transformer if lm.config.model_type == "gpt2" else lm.model
    memory = model.memory.initial.weight
    m, hidden = len(memory), []
    for segment in text.split(T):
        embedded = lm.get_input_embeddings()(segment)
        rows = torch.cat([memory, embedded, memory])
        h = body(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0]
        hidden.append(h[m : m + len(segment)])
        memory = h[len(h) - m :]
    return Read(torch.cat(hidden), memory)


def compare(model: RecurrentModel, tokens: Tensor, lengths: list[int] | None) -> None:
    """Outputs, state and the gradient of random weights on all of them."""
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens, lengths=None if lengths is None else torch.tensor(lengths))
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i, length in enumerate([tokens.shape[1]] * len(tokens) if lengths is None else lengths):
        wanted = naive_rmt(model, tokens[i, :length])
        assert close(out.hidden[i, :length], wanted.hidden)
        assert close(state[i], wanted.memory)
        on_hidden, on_memory = torch.randn_like(wanted.hidden), torch.randn_like(wanted.memory)
        ours = ours + (out.hidden[i, :length] * on_hidden).sum() + (state[i] * on_memory).sum()
        theirs = theirs + (wanted.hidden * on_hidden).sum() + (wanted.memory * on_memory).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    # Gemma's norms sum the gradient of their weights in float32, here in another order: 2e-7 was measured.
    tolerance = 1e-6 if model.backbone.lm.config.model_type == "gemma3_text" else 1e-11
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=tolerance * (1 + float(b.abs().max()))) for a, b in pairs)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_segments_follow_the_equations(family: str, num_tokens: int) -> None:
    compare(tiny_model({"kind": "rmt", "num_tokens": num_tokens}, family, T), tokens_like(2, 3 * T), None)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_short_last_segment_follows_the_equations(family: str) -> None:
    compare(tiny_model({"kind": "rmt", "num_tokens": 3}, family, T), tokens_like(2, 2 * T + 2), None)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("num_tokens", [1, 4, 8])
def test_ragged_rows_follow_the_equations(family: str, num_tokens: int) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": num_tokens}, family, T)
    compare(model, tokens_like(5, 3 * T), [3 * T, 2 * T + 1, 2 * T, T - 1, 1])


def test_the_state_starts_as_the_learned_tokens() -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3})
    state = model.init_state(4)
    assert torch.equal(state, model.memory.initial.weight.expand(4, -1, -1))
    rows = model.memory.initial.weight
    assert not close(rows[0], rows[1])


@pytest.mark.parametrize("num_tokens", [-1, 2.0, True, "3"])
def test_a_number_of_memory_tokens_that_is_none_is_refused(num_tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"memory\.num_tokens is .*; it must be"):
        tiny_model({"kind": "rmt", "num_tokens": num_tokens})
