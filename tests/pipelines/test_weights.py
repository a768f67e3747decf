"""What is trained, and that the portable model is the trained one with its adapters folded in."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rmt_core
from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.training.settings import LoraSettings, ModelSettings, TrainConfig, model_config
from pipelines.training.weights import (
    choose_trained,
    fresh_model,
    linear_maps,
    load_trained,
    plain_tensors,
    save_backbone,
)
from rmt_core.checkpoint import save_tensors, tensors_of

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},  # biases on q, k and v
    "qwen3": {},
    "gpt2": {},
    "tied": {"tie_word_embeddings": True},
}
ROTARY_MAPS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DEFAULT_MAPS = dict.fromkeys(SHAPES, ROTARY_MAPS) | {"gpt2": {"c_attn", "c_proj", "c_fc"}}


def build(shape: str = "llama", dtype: str = "float64", **settings: Any) -> rmt_core.RecurrentModel:
    """A tiny model; the same weights each time."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if shape == "gpt2":
        backbone = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        kind = {"tied": "llama"}.get(shape, shape)
        backbone = {"model_type": kind, **sizes, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    given = {"memory": {"kind": "rmt", "num_tokens": 3}, "segment_len": 16} | settings
    return rmt_core.build(backbone={**backbone, **SHAPES[shape]}, dtype=dtype, **given)


def adapted(model: rmt_core.RecurrentModel, **settings: Any) -> rmt_core.RecurrentModel:
    """The model with adapters that do something: their second factors are 0 at first."""
    choose_trained(model, ModelSettings(train="lora", lora=LoraSettings(**settings)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(2))


def logits(model: rmt_core.RecurrentModel) -> torch.Tensor:
    with torch.no_grad():
        return rmt_core.run(model.eval(), tokens())[0].logits


@pytest.mark.parametrize("shape", SHAPES)
def test_without_adapters_the_plain_tensors_are_those_that_the_core_saves(shape: str) -> None:
    model = build(shape)
    wanted, found = tensors_of(model), plain_tensors(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_model_gives_the_adapted_models_logits(shape: str, dtype: str, atol: float, tmp_path: Path) -> None:
    before = logits(build(shape, dtype))
    model = adapted(build(shape, dtype), rank=4, alpha=6)
    save_tensors(tmp_path / "model", model.config, plain_tensors(model))
    merged = rmt_core.load(tmp_path / "model")
    assert tensors_of(merged).keys() == tensors_of(build(shape)).keys()
    torch.testing.assert_close(logits(merged), logits(model), atol=atol, rtol=0)
    assert (logits(model) - before).abs().max() > 1e-2  # otherwise the adapters did nothing


def test_a_folded_weight_is_the_weight_and_the_scaled_product_of_the_factors() -> None:
    model = adapted(build(), rank=4, alpha=6, targets=["q_proj"])
    factors = dict(model.named_parameters())
    at = "backbone.lm.model.layers.1.self_attn.q_proj."
    added = factors[at + "lora_B.default.weight"] @ factors[at + "lora_A.default.weight"] * (6 / 4)
    wanted = factors[at + "base_layer.weight"] + added
    torch.testing.assert_close(plain_tensors(model)[at + "weight"], wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_by_default_every_linear_map_of_the_layers_gets_an_adapter(shape: str) -> None:
    assert {name.rpartition(".")[2] for name in linear_maps(build(shape))} == DEFAULT_MAPS[shape]
    model = adapted(build(shape))
    num_maps = 2 * (len(DEFAULT_MAPS[shape]) + (shape == "gpt2"))  # gpt2 has c_proj twice in a layer
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == num_maps


def test_with_adapters_the_memory_and_the_adapters_are_trained_and_nothing_else() -> None:
    model = adapted(build(), targets=["q_proj", "v_proj"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("memory.") or ".lora_" in name for name in trained)
    assert {name for name, _ in model.named_parameters() if name.startswith("memory.")} <= trained
    assert {name.split(".")[6] for name in trained if ".lora_" in name} == {"q_proj", "v_proj"}


def test_with_a_frozen_backbone_the_memory_alone_is_trained() -> None:
    model = build()
    choose_trained(model, ModelSettings(train="memory"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"memory.initial.weight"}


def test_new_feed_forward_parts_are_trained_in_full_and_get_no_adapter() -> None:
    parts = {"kind": "ultramem", "layers": [1]}
    for train in ("memory", "lora"):
        model = build(feed_forward=parts)
        choose_trained(model, ModelSettings(train=train))  # type: ignore[arg-type]
        new = model.backbone.layers[1].mlp
        assert all(parameter.requires_grad for parameter in new.parameters())
        assert not any("lora" in name for name, _ in new.named_parameters())


def test_a_memory_without_parameters_cannot_be_all_that_is_trained() -> None:
    with pytest.raises(InputError, match="memory xl has no parameters; use lora or everything"):
        choose_trained(build(memory="xl"), ModelSettings(train="memory"))


def test_unknown_targets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"targets wq: the backbone's layers have down_proj, gate_proj, k_proj"):
        choose_trained(build(), ModelSettings(train="lora", lora=LoraSettings(targets=["wq"])))


def test_settings_of_adapters_without_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="model.lora is set with model.train everything"):
        ModelSettings(lora=LoraSettings(rank=4))


def test_a_checkpoint_without_frozen_weights_must_hold_exactly_the_others() -> None:
    model, other = adapted(build("tied")), adapted(build("tied"), rank=8)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    kept = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items() if name not in frozen}
    load_trained(kept, model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    with pytest.raises(ValueError, match=r"missing .*lora_A"):
        load_trained({name: tensor for name, tensor in kept.items() if "lora_A" not in name}, other)
    with pytest.raises(ValueError, match=r"unexpected \['more'\]"):
        load_trained(kept | {"more": torch.zeros(1)}, model)


def test_the_backbone_alone_is_a_hugging_face_directory(tmp_path: Path) -> None:
    class NoTokenizer:
        def save_pretrained(self, directory: str) -> None: ...

    model = build("tied", "float32")
    save_backbone(str(tmp_path), model, NoTokenizer())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model.backbone.lm.eval()(tokens()).logits)


def test_a_backbones_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    build("llama", "float32").backbone.lm.save_pretrained(tmp_path)
    settings, described = ModelSettings(backbone=str(tmp_path)), rmt_core.ModelConfig(backbone=str(tmp_path))
    assert fresh_model(described, settings, seed=0).training
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('layers": 2', 'layers": 3'))
    with pytest.raises(InputError, match="do not fit its config.json"):
        fresh_model(described, settings, seed=0)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "tied"])
def test_a_run_begins_with_a_trained_model_memory_and_all(shape: str, tmp_path: Path) -> None:
    trained = build(shape, "float32")
    rmt_core.save(tmp_path, trained)
    settings = build_settings(tmp_path)
    model = fresh_model(described(settings, 16), settings, seed=5)
    assert model.training
    assert tensors_of(model).keys() == tensors_of(trained).keys()
    assert all(torch.equal(tensors_of(model)[name], tensor) for name, tensor in tensors_of(trained).items())
    assert torch.equal(logits(model), logits(trained))
    assert model.config.to_json() == trained.config.to_json()


def test_a_trained_model_goes_on_with_other_segments_noise_and_adapters(tmp_path: Path) -> None:
    trained = build("llama", "float32", memory={"kind": "rmt", "num_tokens": 3})
    rmt_core.save(tmp_path, trained)
    settings = build_settings(tmp_path, memory={"kind": "rmt", "num_tokens": 3, "noise": 0.5}, train="lora")
    model = fresh_model(described(settings, 24), settings, seed=5)
    assert model.segment_len == 24
    assert model.config.memory[0]["noise"] == 0.5
    plain = plain_tensors(model)
    assert all(torch.equal(plain[name], tensor) for name, tensor in tensors_of(trained).items())
    assert {name for name, each in model.named_parameters() if each.requires_grad} > set()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"memory": {"kind": "rmt", "num_tokens": 4}}, r"as memory.*: \(3, 32\) in place of \(4, 32\); leave out"),
        ({"memory": {"kind": "none"}}, r"as memory.*: \(3, 32\) in place of nothing; leave out"),
        ({"feed_forward": {"kind": "ultramem"}}, r"as backbone.*: .* in place of .*; leave out"),
    ],
)
def test_weights_of_another_memory_are_refused(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    rmt_core.save(tmp_path, build("llama", "float32"))
    settings = build_settings(tmp_path, **given)
    with pytest.raises(InputError, match=says):
        fresh_model(described(settings, 16), settings, seed=0)


def test_a_new_model_has_a_memory_and_a_trained_one_its_own(tmp_path: Path) -> None:
    assert ModelSettings().memory == ModelSettings(memory=None).memory == {"kind": "rmt", "num_tokens": 4}
    assert build_settings(tmp_path).memory is None
    with pytest.raises(ValueError, match=r"model\.start and model\.backbone are given"):
        build_settings(tmp_path, backbone=str(tmp_path))


def build_settings(start: Path, **settings: Any) -> ModelSettings:
    return ModelSettings(start=str(start), **settings)


def described(settings: ModelSettings, segment_len: int) -> rmt_core.ModelConfig:
    return model_config(TrainConfig(model=settings), ByteTokenizer(), segment_len)


LOAD_WITHOUT = """
import sys

for name in ("deepspeed", "peft", "ray"):
    sys.modules[name] = None  # as if it were not installed
import torch, rmt_core
model = rmt_core.load(sys.argv[1])
print(len(rmt_core.generate(model, [[1, 2, 3]], 4).tokens[0]))
"""


@pytest.mark.long
def test_the_merged_model_needs_neither_peft_nor_deepspeed(tmp_path: Path) -> None:
    model = adapted(build(dtype="float32"))
    save_tensors(tmp_path / "model", model.config, plain_tensors(model))
    command = [sys.executable, "-c", LOAD_WITHOUT, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"
