"""Shares and maps of attention against Hugging Face's own attention weights.

Axes: B rows, T tokens of a segment, S rows that a layer sees, H heads.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import AttentionMass

from .test_rmt import sees
from .tiny import ARMT, RMT, XL, close, tiny_model, tokens_like
from .tiny_encoder import CLS, SEP, text, tiny_encoder

T, M = 6, 3


def naive_shares(weights: Tensor, is_memory: Tensor) -> list[float]:
    """read, write, process, sequence of one head's weights (S, S)."""
    sums = [0.0] * 4
    for i, given in enumerate(weights.tolist()):
        for j, weight in enumerate(given):
            kind = {(False, True): 0, (True, False): 1, (True, True): 2, (False, False): 3}
            sums[kind[bool(is_memory[i]), bool(is_memory[j])]] += weight
    return [value / sum(sums) for value in sums]


def check(masses: list[AttentionMass], weights: list[Tensor], kinds: list[Tensor]) -> None:
    """Masses against all weights of each row of a batch: for each row (L, H, S, S) and (S,) bool."""
    num_layers, num_heads = weights[0].shape[:2]
    assert [(mass.layer, mass.head) for mass in masses] == [(i, j) for i in range(num_layers) for j in range(num_heads)]
    sizes = torch.tensor([float(len(kind)) for kind in kinds], dtype=torch.float64)
    for mass in masses:
        each = [naive_shares(w[mass.layer, mass.head], kind) for w, kind in zip(weights, kinds, strict=True)]
        wanted = (torch.tensor(each, dtype=torch.float64) * sizes[:, None]).sum(0) / sizes.sum()
        assert close(torch.tensor(mass[2:], dtype=torch.float64), wanted)
        assert abs(sum(mass[2:]) - 1) < 1e-12
    for layer, mean in enumerate(rmt_core.mean_over_heads(masses)):
        of_layer = torch.tensor([mass[2:] for mass in masses if mass.layer == layer], dtype=torch.float64)
        assert (mean.layer, mean.head) == (layer, None)
        assert close(torch.tensor(mean[2:], dtype=torch.float64), of_layer.mean(0))
        assert mean.read_per_text_row == mean.read / (mean.read + mean.sequence)


@pytest.mark.parametrize("memory", [{"kind": "rmt", "num_tokens": M}, {"kind": "memory_transformer", "num_tokens": M}])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_encoders_attention_is_that_of_hugging_face(family: str, memory: dict[str, Any]) -> None:
    model, tokens, lengths = tiny_encoder(memory, family, T), text(3, T), [T, 2, 4]
    lm: Any = model.backbone.lm
    lm.set_attn_implementation("eager")
    words, state = lm.get_input_embeddings(), model.init_state(3)
    rows = model.memory.initial.weight if memory["kind"] == "rmt" else model.memory.rows.weight
    cls, sep = words(torch.tensor([CLS])), words(torch.tensor([SEP]))
    found, kinds = [], []
    for i, length in enumerate(lengths):
        embedded = torch.cat([cls, rows, sep, words(tokens[i, :length]), sep])
        found.append(torch.cat(lm(inputs_embeds=embedded[None], output_attentions=True).attentions).detach())
        kinds.append(torch.tensor([False, *[True] * M, *[False] * (length + 2)]))
        maps = rmt_core.attention_maps(model, tokens[i, :length], state=None if i else model.init_state(1))
        assert close(maps.weights, found[-1])
        assert torch.equal(maps.is_memory, kinds[-1])
    check(rmt_core.attention_mass(model, tokens, state, torch.tensor(lengths)), found, kinds)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_read_tokens": 5, "max_past_memories": 2}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_models_attention_is_that_of_hugging_face(family: str, options: dict[str, Any]) -> None:
    """After a segment, so that the memory is not the first; rows of different lengths."""
    model = tiny_model({**RMT, **options}, family, T)
    _, state = model.step(tokens_like(3, T, seed=4), model.init_state(3))
    tokens, lengths = tokens_like(3, T), [T, 2, 4]
    lm: Any = model.backbone.lm
    found, kinds = [], []
    for i, length in enumerate(lengths):
        part = rmt_core.state.select(state, [i])
        maps = rmt_core.attention_maps(model, tokens[i, :length], part)
        found.append(maps.weights)
        kinds.append(maps.is_memory)
        before, after = model.memory.rows_before, model.memory.rows_after
        assert maps.is_memory.tolist() == [True] * before + [False] * length + [True] * after
        segment = rmt_core.memory.base.Segment(length, None, before)
        embedded = model.memory.enter(model.backbone.embed(tokens[i : i + 1, :length]), part, segment)
        lm.set_attn_implementation("eager")
        mask = sees(before, length, after, bool(options.get("bidirectional")))
        floats = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
        body = lm.transformer if family == "gpt2" else lm.model
        out = body(inputs_embeds=embedded, attention_mask=floats[None, None], output_attentions=True, use_cache=False)
        # Its llama takes the softmax in float32: 1e-8 was measured.
        assert close(maps.weights, torch.cat(out.attentions), atol=1e-6 if family == "llama" else 1e-10)
        lm.set_attn_implementation("rmt_core")
    check(rmt_core.attention_mass(model, tokens, state, torch.tensor(lengths)), found, kinds)


def test_a_bottleneck_has_no_attention_among_the_text() -> None:
    for variant in ("ctrl", "bottleneck"):
        memory = {"kind": "memory_transformer", "num_tokens": M, "variant": variant}
        first, last = rmt_core.mean_over_heads(rmt_core.attention_mass(tiny_encoder(memory, segment_len=T), text(2, T)))
        assert all(abs(sum(mass[2:]) - 1) < 1e-12 for mass in (first, last))
        assert min(first.read, first.write, first.process) > 0
        assert (first.sequence == last.sequence == 0) == (variant == "bottleneck")
        assert (last.write == last.process == 0) == (variant == "ctrl")  # it has no memory rows in its last layer


def test_without_memory_all_attention_is_among_the_text() -> None:
    for model, tokens in ((tiny_model(segment_len=T), tokens_like(2, T)), (tiny_encoder(segment_len=T), text(2, T))):
        assert all(
            abs(mass.sequence - 1) < 1e-12 and mass[2:5] == (0, 0, 0) for mass in rmt_core.attention_mass(model, tokens)
        )


def test_other_rows_after_the_text_are_memory_too() -> None:
    for memory in (ARMT, [RMT, ARMT]):
        model = tiny_model(memory, segment_len=T)
        masses = rmt_core.attention_mass(model, tokens_like(2, T))
        assert all(mass.write > 0 and abs(sum(mass[2:]) - 1) < 1e-12 for mass in masses)


def test_measuring_changes_nothing() -> None:
    model, tokens = tiny_model(RMT, segment_len=T), tokens_like(2, T)
    before, _ = model.step(tokens, model.init_state(2))
    rmt_core.attention_mass(model, tokens)
    after, _ = model.step(tokens, model.init_state(2))
    assert torch.equal(before.hidden, after.hidden)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="memories that are rows among the text's, and this one is not"):
        rmt_core.attention_mass(tiny_model([XL, RMT], segment_len=T), tokens_like(2, T))
    with pytest.raises(ValueError, match="maps are made of one segment of one document"):
        rmt_core.attention_maps(tiny_model(RMT, segment_len=T), tokens_like(2, T))
