"""The parts of each backbone put together again are the Hugging Face model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rmt_core
from rmt_core.backbone import FAMILIES as SUPPORTED
from rmt_core.backbone import Backbone, Placement
from rmt_core.config import memory_settings
from rmt_core.memory.base import Context, Heads

from .tiny import FAMILIES, MEMORIES, close, next_labels, stir, tiny_config, tiny_model, tokens_like


def test_every_supported_family_is_tested() -> None:
    assert sorted(FAMILIES) == sorted(SUPPORTED)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_hugging_faces(family: str, tied: bool) -> None:
    model = tiny_model("none", family, segment_len=12, tie_word_embeddings=tied)
    lm, tokens = model.backbone.lm, tokens_like(3, 12)
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied

    out, state = model.step(tokens, model.init_state(3))
    wanted = lm(input_ids=tokens, use_cache=False).logits

    assert state == ()
    assert close(out.logits, wanted, atol=1e-9)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    ours = torch.autograd.grad((out.logits * weight).sum(), list(lm.parameters()))
    theirs = torch.autograd.grad((wanted * weight).sum(), list(lm.parameters()))
    assert all(close(a, b, atol=1e-9) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_directory_gives_its_weights(family: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    stir(lm)
    lm.save_pretrained(tmp_path)
    tokens = tokens_like(2, 9)

    model = rmt_core.build(backbone=str(tmp_path), memory="none", segment_len=9, dtype="float64")

    out, _ = model.step(tokens, model.init_state(2))
    assert close(out.logits, lm(input_ids=tokens, use_cache=False).logits, atol=1e-9)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_any_number_of_key_value_heads(heads: tuple[int, int]) -> None:
    model = tiny_model("none", segment_len=8, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    tokens = tokens_like(2, 8)
    out, _ = model.step(tokens, ())
    assert close(out.logits, model.backbone.lm(input_ids=tokens).logits, atol=1e-9)


def test_the_whole_sliding_window_is_used_and_no_more() -> None:
    settings = {"sliding_window": 16}
    tokens = tokens_like(1, 16)
    model = tiny_model("none", "gemma3_text", segment_len=16, **settings)
    out, _ = model.step(tokens, ())
    assert close(out.logits, model.backbone.lm(input_ids=tokens).logits, atol=1e-9)
    with pytest.raises(ValueError, match=r"segment_len 17 .* backbone's 16 positions; use at most 16"):
        tiny_model("none", "gemma3_text", segment_len=17, **settings)


def test_configurations_come_as_objects_dictionaries_and_directories(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for source in (config, config.to_dict(), tmp_path, str(tmp_path)):
        model = rmt_core.build(backbone=source, segment_len=8)
        assert model.backbone.dimensions[:3] == (32, 2, 4)


def test_a_built_model_is_in_evaluation_mode_whatever_its_source(tmp_path: Path) -> None:
    config = tiny_config("gpt2", embd_pdrop=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for source in (config, tmp_path):
        model = rmt_core.build(backbone=source, memory="rmt", segment_len=8)
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["gpt_neox", "bert", "t5", "nonsense"])
def test_an_unsupported_backbone_is_named_with_the_supported_ones(kind: str) -> None:
    listed = ", ".join(sorted(SUPPORTED))
    with pytest.raises(ValueError, match=f"'{kind}' is not supported; supported are {listed}"):
        rmt_core.build(backbone={"model_type": kind}, segment_len=8)


def test_an_unsupported_directory_is_named_too(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'gpt_neox' is not supported; supported are .*llama"):
        rmt_core.build(backbone=tmp_path, segment_len=8)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(ValueError, match=r"'martian' is not supported; supported are .*llama"):
        rmt_core.build(backbone=tmp_path, segment_len=8)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_a_variant_that_attention_would_get_wrong_is_refused(family: str, changes: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rmt_core.build(backbone=tiny_config(family, **changes), segment_len=8)


def test_attention_that_would_need_a_mask_is_refused() -> None:
    lm = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager")
    with pytest.raises(ValueError, match="'eager'; load the model with 'rmt_core'"):
        Backbone(lm)


def naive_attention(heads: Heads) -> Tensor:
    """Causal attention from its equation."""
    logits = heads.queries @ heads.keys.mT * heads.scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ heads.values


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_can_be_computed_by_somebody_else(family: str) -> None:
    """A block gives its projections away, and takes what was made of them as its attention."""
    backbone = tiny_model("none", family, segment_len=12).backbone
    h = torch.randn(3, 9, 32, dtype=torch.float64)
    block = backbone.blocks(h, Placement(torch.arange(14)[None]))[1]
    assert close(block(h, attention=naive_attention), block(h))
    assert not close(block(h, attention=lambda heads: heads.values), block(h))
    if backbone.family.has_relative_positions:
        context = Context(torch.randn(3, 5, 32, dtype=torch.float64), torch.tensor([5, 0, 3]))
        assert close(block(h, context=context, attention=naive_attention), block(h, context=context))


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        rmt_core.build(backbone=tmp_path / "nowhere", segment_len=8)


@pytest.mark.parametrize("settings", [{"hidden_size": 15, "num_attention_heads": 4}, {"hidden_size": "wide"}])
def test_a_configuration_that_is_not_valid_is_refused_in_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    for source in ({"model_type": "llama", **settings}, tmp_path):
        with pytest.raises(ValueError, match="the llama backbone's configuration is not valid: ") as caught:
            rmt_core.build(backbone=source, segment_len=8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"model_type": "llama", "hiden_size": 32}, "'hiden_size'; did you mean hidden_size"),
        ({"model_type": "gpt2", "num_layers": 2}, "'num_layers'; "),
        ({"model_type": "llama", "experts": 2}, "'experts'; it has .*vocab_size"),
    ],
)
def test_a_setting_that_the_family_does_not_have_is_refused(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=f"has no setting {hint}"):
        rmt_core.build(backbone=settings, segment_len=8)
    published = {**tiny_config(settings["model_type"]).to_dict(), **settings}  # with settings of other programs
    assert rmt_core.build(backbone=published, segment_len=8).segment_len == 8


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    for text in ("{", "3", '["llama"]'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="is no model's configuration"):
            rmt_core.build(backbone=tmp_path, segment_len=8)
    for source in (None, 3):
        with pytest.raises(ValueError, match="give a directory saved by Hugging Face, or a configuration"):
            rmt_core.build(backbone=source, segment_len=8)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(tmp_path)
    tiny_config(num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.2\..*"):
        rmt_core.build(backbone=tmp_path, segment_len=8)


def test_memory_tokens_start_at_the_scale_of_embedded_tokens() -> None:
    torch.manual_seed(0)
    for family in ("llama", "gemma3_text"):
        config = tiny_config(family, vocab_size=500)
        model = rmt_core.build(backbone=config, memory={"kind": "rmt", "num_tokens": 16}, segment_len=8)
        embedded = model.backbone.embed(torch.arange(500)[None])
        assert float((model.memory.initial.weight.std() / embedded.std()).detach()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_every_family_takes_every_memory_it_can(memory: Any) -> None:
    kinds = [rmt_core.MEMORIES[settings["kind"]] for settings in memory_settings(memory)]
    for family in FAMILIES:
        if family == "gpt2" and any(kind.needs_relative_positions for kind in kinds):
            with pytest.raises(ValueError, match="a cache needs rotary positions; gpt2 has learned ones"):
                tiny_model(memory, family)
            continue
        model, tokens = tiny_model(memory, family), tokens_like(2, 15)
        model(tokens, next_labels(tokens)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
