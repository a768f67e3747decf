"""Full attention by blocks is the Hugging Face model, whatever the chunks; and what it keeps is less.

Axes: B rows, N tokens, n tokens of a chunk, D width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel, full_attention, full_attention_loss

from .tiny import FAMILIES, RMT, close, gradients, next_labels, stir, tiny_config, tiny_model, tokens_like

LONG = {"llama": {"max_position_embeddings": 512}, "gpt2": {"n_positions": 512}}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def compare(model: RecurrentModel, tokens: Tensor, chunk_len: int, atol: float = 1e-9) -> None:
    """Logits and their gradients, the loss and its gradients."""
    lm = model.backbone.lm
    parameters = list(lm.parameters())
    wanted = lm(input_ids=tokens, use_cache=False).logits
    ours = full_attention(model, tokens, chunk_len=chunk_len).logits
    assert close(ours, wanted, atol=1e-9)
    weight = torch.randn(wanted.shape, dtype=torch.float64) / wanted.numel()
    for a, b in (
        ((ours * weight).sum(), (wanted * weight).sum()),
        (
            full_attention_loss(model, tokens, next_labels(tokens), chunk_len=chunk_len),
            loss_of(lm(input_ids=tokens, use_cache=False).logits, next_labels(tokens)),
        ),
    ):
        assert close(a, b, atol=1e-9)
        for x, y in zip(torch.autograd.grad(a, parameters), torch.autograd.grad(b, parameters), strict=True):
            assert close(x, y, atol=atol)


@pytest.mark.parametrize("family", LONG)
def test_a_long_text_equals_hugging_faces(family: str) -> None:
    compare(tiny_model("none", family, **LONG[family]), tokens_like(2, 512), chunk_len=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_hugging_faces(family: str) -> None:
    atol = 1e-7 if family == "gemma3_text" else 1e-9  # its norms add up their weights' gradients in float32
    compare(tiny_model("none", family), tokens_like(3, 33), chunk_len=8, atol=atol)


@pytest.mark.parametrize("chunk_len", [1, 5, 17, 18, 1000])
def test_chunks_of_any_length_give_the_same(chunk_len: int) -> None:
    compare(tiny_model(), tokens_like(2, 18), chunk_len)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 16,
            "factor": 4.0,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_positions_that_depend_on_the_texts_length_are_those_of_the_whole(scaling: dict[str, Any]) -> None:
    compare(tiny_model(rope_parameters=scaling), tokens_like(1, 40), chunk_len=8)


def test_a_model_with_memory_and_its_backbone_are_read_alike() -> None:
    model, tokens = tiny_model(RMT), tokens_like(2, 30)
    hidden = full_attention(model, tokens, chunk_len=7).hidden
    assert torch.equal(full_attention(model.backbone, tokens, chunk_len=7).hidden, hidden)
    segment = tiny_model("none", segment_len=30)
    assert close(hidden, segment.step(tokens, ())[0].hidden)
    labels = next_labels(tokens)
    assert close(full_attention_loss(model, tokens, labels), segment(tokens, labels))


def test_padding_behind_and_skipped_labels_touch_nothing() -> None:
    model, tokens, lengths = tiny_model(), tokens_like(3, 30), torch.tensor([30, 17, 2])
    labels = next_labels(tokens).masked_fill(torch.arange(30) >= lengths[:, None] - 1, -100)
    full_attention_loss(model, tokens, labels, chunk_len=8).backward()
    together = gradients(model)
    model.zero_grad()
    count = (labels != -100).sum()
    for i, length in enumerate(lengths.tolist()):
        alone = full_attention_loss(model, tokens[i : i + 1, :length], labels[i : i + 1, :length], chunk_len=8)
        (alone * (length - 1) / count).backward()
    assert all(close(together[name], grad) for name, grad in gradients(model).items())
    assert not full_attention_loss(model, tokens, torch.full_like(tokens, -100)).any()


def test_replaced_feed_forward_parts_and_their_penalty_are_in_it() -> None:
    torch.manual_seed(0)
    settings = {"kind": "ultramem", "num_keys": 4, "num_read": 3, "penalty_margin": 0.0, "penalty_weight": 1.0}
    model = rmt_core.build(backbone=tiny_config(), segment_len=30, dtype="float64", feed_forward=settings)
    stir(model)
    tokens = tokens_like(2, 30)
    out, _ = model.step(tokens, ())
    other = full_attention(model, tokens, chunk_len=7)
    assert close(other.hidden, out.hidden)
    assert close(other.aux, out.aux)
    assert out.aux.item() > 0
    assert close(full_attention_loss(model, tokens, next_labels(tokens)), model(tokens, next_labels(tokens)))


def test_dropout_outside_attention_is_the_same_in_both_passes() -> None:
    """The gradient is that of the loss which the forward pass gave: checked along one direction by differences."""
    model = tiny_model("none", "gpt2", resid_pdrop=0.3, embd_pdrop=0.3).train()
    tokens = tokens_like(2, 20)
    parameter = model.backbone.lm.transformer.h[0].mlp.c_fc.weight
    direction = torch.randn_like(parameter)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return full_attention_loss(model, tokens, next_labels(tokens), chunk_len=6)

    (grad,) = torch.autograd.grad(loss(), parameter)
    step = 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * step)
            values.append(loss())
            parameter.sub_(direction, alpha=sign * step)
    assert close((values[0] - values[1]) / (2 * step), (grad * direction).sum(), atol=1e-7)


def test_bfloat16_stays_near_float32() -> None:
    tokens, found = tokens_like(2, 60), []
    model = tiny_model("none", stirred=0.1)
    for dtype in ("float32", "bfloat16"):
        other = rmt_core.build(backbone=model.config.backbone, segment_len=6, dtype=dtype)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            found.append(full_attention(other, tokens, chunk_len=8).hidden)
    assert found[1].dtype == torch.bfloat16
    assert (found[1].float() - found[0]).norm() < 0.02 * found[0].norm()


# Cost


def test_nothing_larger_than_a_chunk_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward parts and heads see a chunk of tokens, and weights of attention are a block."""
    model, tokens, rows, blocks = tiny_model(), tokens_like(2, 50), [], []
    for module in (*(layer.mlp for layer in model.backbone.lm.model.layers), model.backbone.lm.lm_head):
        module.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].numel() // 32))
    exp = Tensor.exp
    monkeypatch.setattr(Tensor, "exp", lambda x: (blocks.append(x.numel()), exp(x))[1])
    full_attention_loss(model, tokens, next_labels(tokens), chunk_len=8).backward()
    assert max(rows) == 2 * 8
    assert max(blocks) == 2 * 4 * 8 * 8


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """The most bytes that were allocated at once, beyond those before, in a forward and backward pass."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run().backward()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_memory_grows_with_the_text_as_hidden_states_do() -> None:
    """Numbers at the peak that a further token adds: 3 hidden states (96), the keys and values of 2 layers (64),
    most of them again as gradients, and angles (16). Of what Hugging Face's model keeps inside its layers, nothing.
    """
    model = tiny_model("none", max_position_embeddings=128, intermediate_size=256)

    def peak(num_tokens: int, blockwise: bool) -> int:
        tokens = tokens_like(1, num_tokens)
        labels = next_labels(tokens)
        model.zero_grad()
        if blockwise:
            return peak_bytes(lambda: full_attention_loss(model, tokens, labels, chunk_len=16))
        return peak_bytes(lambda: loss_of(model.backbone.lm(input_ids=tokens, use_cache=False).logits, labels))

    ours, theirs = ((peak(128, kind) - peak(64, kind)) / 64 / 8 for kind in (True, False))
    assert ours < 300
    assert theirs > 3000


# Borders


@pytest.mark.parametrize(
    ("num_tokens", "chunk_len", "message"),
    [
        (65, 8, "a text of 65 tokens exceeds the backbone's 64 positions; cut it"),
        (0, 8, r"tokens are \(2, 0\); full attention takes"),
        (8, 0, "chunk_len is 0; it must be a whole number of tokens, at least 1"),
        (8, 2.0, "chunk_len is 2.0; it must be"),
    ],
)
def test_texts_and_chunks_that_cannot_be_are_refused(num_tokens: int, chunk_len: Any, message: str) -> None:
    model, tokens = tiny_model(), torch.zeros(2, num_tokens, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        full_attention(model, tokens, chunk_len=chunk_len)
    with pytest.raises(ValueError, match=message):
        full_attention_loss(model, tokens, tokens, chunk_len=chunk_len)


def test_a_sliding_window_bounds_the_text() -> None:
    model = tiny_model("none", "mistral")
    with pytest.raises(ValueError, match="a text of 41 tokens exceeds the backbone's 40 positions"):
        full_attention(model, tokens_like(1, 41))


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens \(1, 8\) and labels \(1, 7\) must be equal"):
        full_attention_loss(tiny_model(), tokens_like(1, 8), tokens_like(1, 7))


def test_dropout_of_attention_weights_is_refused() -> None:
    model = tiny_model("none", "gpt2", attn_pdrop=0.1)
    full_attention(model, tokens_like(1, 8))
    with pytest.raises(ValueError, match="attention weights have dropout 0.1; full attention by blocks has none"):
        full_attention(model.train(), tokens_like(1, 8))
