"""The Memory Transformer's variants against their equations, layer by layer.

Axes: T text tokens, M memory rows, S rows of a segment, H heads, D width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import EncoderModel
from rmt_core.state import leaves

from .tiny import close, gradients, tiny_model
from .tiny_encoder import CLS, SEP, documents, text, tiny_encoder

T, M = 6, 3
VARIANTS = ("mem", "ctrl", "bottleneck")


def settings(variant: str, num_tokens: int = M) -> dict[str, Any]:
    return {"kind": "memory_transformer", "variant": variant, "num_tokens": num_tokens}


def norm(x: Tensor, module: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return module.weight * centred / (x.var(-1, correction=0, keepdim=True) + module.eps).sqrt() + module.bias


def naive_layer(layer: Any, rows: Tensor, seen: Tensor) -> Tensor:
    """`LN(A + FF(A))` with `A = LN(X + MH(X, Y, Y))` for X = rows (N, D) and Y = seen (C, D), of a BERT layer."""

    def linear(module: Any, x: Tensor) -> Tensor:
        return x @ module.weight.T + module.bias

    own, heads = layer.attention.self, []
    queries, keys, values = linear(own.query, rows), linear(own.key, seen), linear(own.value, seen)
    size = queries.shape[1] // own.num_attention_heads
    for start in range(0, queries.shape[1], size):
        part = slice(start, start + size)
        heads.append((queries[:, part] @ keys[:, part].T / size**0.5).softmax(-1) @ values[:, part])
    a = norm(linear(layer.attention.output.dense, torch.cat(heads, 1)) + rows, layer.attention.output.LayerNorm)
    inner = F.gelu(linear(layer.intermediate.dense, a))
    return norm(linear(layer.output.dense, inner) + a, layer.output.LayerNorm)


def naive(model: EncoderModel, piece: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (L,) and text rows (T, D) of arXiv:2006.11527, section 3, for one segment (T,)."""
    lm: Any = model.backbone.lm
    words, variant = lm.get_input_embeddings(), model.config.memory[0]["variant"]
    cls, sep = words(torch.tensor([CLS])), words(torch.tensor([SEP]))
    h = lm.bert.embeddings(inputs_embeds=torch.cat([cls, model.memory.rows.weight, sep, words(piece), sep])[None])[0]
    memory, sequence = h[1 : 1 + M], torch.cat([h[:1], h[1 + M :]])
    for i, layer in enumerate(lm.bert.encoder.layer):
        everything = torch.cat([memory, sequence])
        if variant == "mem":
            new = naive_layer(layer, everything, everything)
            memory, sequence = new[:M], new[M:]
        elif variant == "ctrl":
            if i < 1:  # what the last layer makes of memory is read by nobody
                memory = naive_layer(model.memory.layers[i], memory, everything)
            sequence = naive_layer(layer, sequence, everything)
        else:
            memory = naive_layer(model.memory.layers[i], memory, everything)
            sequence = naive_layer(layer, sequence, memory)
    logits = lm.classifier(torch.tanh(lm.bert.pooler.dense(sequence[0])))
    return logits, sequence[2 : 2 + len(piece)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_follow_the_equations(variant: str) -> None:
    """Ragged rows: outputs and gradients of random weights on them."""
    model, tokens, lengths = tiny_encoder(settings(variant), segment_len=T), text(3, T), [T, 2, 4]
    torch.manual_seed(5)
    out, state = model.step(tokens, model.init_state(3), torch.tensor(lengths))
    assert leaves(state) == []
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i, length in enumerate(lengths):
        logits, hidden = naive(model, tokens[i, :length])
        for found, wanted in ((out.logits[i], logits), (out.hidden[i, :length], hidden)):
            assert close(found, wanted)
            weight = torch.randn_like(wanted)
            ours, theirs = ours + (found * weight).sum(), theirs + (wanted * weight).sum()
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b) and bool(b.any()) for a, b in pairs)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_classification_loss_reaches_every_parameter(variant: str, family: str) -> None:
    model = tiny_encoder(settings(variant), family, T)
    model(documents(2 * T + 1, T, 3), [0, 1, 2]).backward()
    assert all(grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_own_weights_begin_as_those_of_the_backbone(family: str) -> None:
    """Then MemCtrl is MemTransformer, and a step of training parts them."""
    config, models = tiny_encoder(family=family).backbone.lm.config, []
    given = {"segment_len": T, "num_labels": 3, "cls_token_id": CLS, "sep_token_id": SEP, "dtype": "float64"}
    for variant in ("mem", "ctrl"):
        torch.manual_seed(0)
        models.append(rmt_core.build_encoder(backbone=config, memory=settings(variant), **given))
    mem, ctrl = models
    ctrl.memory.rows.load_state_dict(mem.memory.rows.state_dict())
    tokens = text(2, T)
    assert close(mem.read(tokens).logits, ctrl.read(tokens).logits)
    assert len(ctrl.memory.layers) == 1
    own, shared = ctrl.memory.layers[0], ctrl.backbone.dimensions.encoder_layers[0]
    assert all(a is not b for a, b in zip(own.parameters(), shared.parameters(), strict=True))


def test_no_segment_is_felt_by_another() -> None:
    for variant in VARIANTS:
        model, tokens = tiny_encoder(settings(variant), segment_len=T), text(1, 2 * T)
        assert torch.equal(model.read(tokens).logits, model.read(tokens[:, T:]).logits)


def test_a_bottleneck_hides_the_text_from_itself() -> None:
    """With memory rows zeroed after each update, nothing of the other tokens is left at a text row."""
    model, tokens = tiny_encoder(settings("bottleneck"), segment_len=T), text(1, T)
    for layer in model.memory.layers:
        layer.output.LayerNorm.weight.data.zero_()
        layer.output.LayerNorm.bias.data.zero_()
    other = tokens.clone()
    other[0, 0] = 2 if tokens[0, 0] > 2 else 3
    out, _ = model.step(tokens, ())
    changed, _ = model.step(other, ())
    assert torch.equal(out.hidden[0, 1:], changed.hidden[0, 1:])
    assert torch.equal(out.logits, changed.logits)


@pytest.mark.parametrize("variant", ["mem", "ctrl"])
def test_without_memory_it_is_the_plain_encoder(variant: str) -> None:
    model, plain, tokens = tiny_encoder(settings(variant, 0), segment_len=T), tiny_encoder(segment_len=T), text(2, T)
    plain.backbone.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.read(tokens).logits, plain.read(tokens).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_saved_and_loaded(variant: str, tmp_path: Any) -> None:
    model = tiny_encoder(settings(variant), segment_len=T)
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load_encoder(tmp_path / "model")
    assert torch.equal(again.read(documents(T, 2)).logits, model.read(documents(T, 2)).logits)


def test_a_causal_backbone_is_refused() -> None:
    message = "needs an encoder .* before the text sees nothing of it and memory after the text is read by nobody"
    with pytest.raises(ValueError, match=message):
        tiny_model(settings("mem"))
    with pytest.raises(ValueError, match=message):
        tiny_model(["rmt", "memory_transformer"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "none"}, r"memory\.variant is 'none'; allowed: mem, ctrl, bottleneck"),
        ({"num_tokens": -1}, r"memory\.num_tokens is -1; it must be at least 0"),
        ({"variant": "bottleneck", "num_tokens": 0}, r"memory\.num_tokens is 0; it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_encoder({"kind": "memory_transformer", **wrong})
