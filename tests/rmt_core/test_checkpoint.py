"""Models as directories: equal after the round trip, whole or not there at all, strict when read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rmt_core
from rmt_core import RecurrentModel

from .tiny import FAMILIES, MEMORIES, RMT, same_states, tiny_model, tokens_like


class Tokenizer:
    """Writes one file, or fails half-way."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")
        if self.fails:
            raise OSError("disk full")


def read(model: RecurrentModel) -> tuple[torch.Tensor, Any]:
    out, state = rmt_core.run(model, tokens_like(2, 15))
    return out.logits, state


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_a_loaded_model_equals_the_saved_one(memory: Any, tmp_path: Path) -> None:
    model = tiny_model(memory)
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load(tmp_path / "model")
    logits, state = read(model)
    other, other_state = read(again)
    assert torch.equal(logits, other)
    assert same_states(state, other_state)
    assert rmt_core.fingerprint(again) == rmt_core.fingerprint(model)
    assert not any(module.training for module in again.modules())


def test_the_configuration_is_read_without_weights(tmp_path: Path) -> None:
    model = tiny_model(RMT)
    rmt_core.save(tmp_path / "model", model)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert rmt_core.load_config(tmp_path / "model").to_json() == model.config.to_json()
    with pytest.raises(ValueError, match="has no config.json; give a directory written by rmt_core.save"):
        rmt_core.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "rmt-model-1", "model": {"width": 3}}')
    with pytest.raises(ValueError, match="is no model's configuration"):
        rmt_core.load_config(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_saved_and_loaded(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(RMT, family, tie_word_embeddings=tied)
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load(tmp_path / "model")
    lm = again.backbone.lm
    assert torch.equal(read(model)[0], read(again)[0])
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert ("backbone.lm.lm_head.weight" in names) == (not tied)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_is_kept(dtype: str, tmp_path: Path) -> None:
    config = tiny_model(RMT).config
    model = rmt_core.build(backbone=config.backbone, memory=RMT, segment_len=6, dtype=dtype)
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {getattr(torch, dtype)}
    assert rmt_core.fingerprint(again) == rmt_core.fingerprint(model)


def test_a_model_from_a_directory_no_longer_needs_it(tmp_path: Path) -> None:
    source, target = tmp_path / "backbone", tmp_path / "model"
    tiny_model().backbone.lm.save_pretrained(source)
    model = rmt_core.build(backbone=source, memory=RMT, segment_len=6, dtype="float64")
    for file in source.iterdir():
        file.unlink()
    rmt_core.save(target, model)
    wanted = read(model)[0]
    assert torch.equal(read(rmt_core.load(target))[0], wanted)
    assert str(tmp_path) not in (target / "config.json").read_text()


def test_the_tokenizer_lies_beside_the_model(tmp_path: Path) -> None:
    rmt_core.save(str(tmp_path / "deep" / "model"), tiny_model(), Tokenizer())
    files = sorted(path.name for path in (tmp_path / "deep" / "model").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_another_tokenizer_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    rmt_core.save(tmp_path / "model", tiny_model(), Tokenizer())
    rmt_core.load(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="is not the tokenizer that the model was saved with"):
        rmt_core.load(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json, with which the model was saved; put it back"):
        rmt_core.load(tmp_path / "model")
    rmt_core.save(tmp_path / "older", tiny_model())  # without one, any does
    (tmp_path / "older" / "tokenizer.json").write_text("{}")
    rmt_core.load(tmp_path / "older")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        rmt_core.save(tmp_path / "model", tiny_model(), Tokenizer(fails=True))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_older_model(tmp_path: Path) -> None:
    old = tiny_model(RMT)
    rmt_core.save(tmp_path / "model", old, Tokenizer())
    with pytest.raises(OSError, match="disk full"):
        rmt_core.save(tmp_path / "model", tiny_model(RMT, seed=1), Tokenizer(fails=True))
    assert rmt_core.fingerprint(rmt_core.load(tmp_path / "model")) == rmt_core.fingerprint(old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_replaces_an_older_model_as_a_whole(tmp_path: Path) -> None:
    rmt_core.save(tmp_path / "model", tiny_model(MEMORIES["xl"]), Tokenizer())
    new = tiny_model(RMT, seed=1)
    rmt_core.save(tmp_path / "model", new)
    assert rmt_core.fingerprint(rmt_core.load(tmp_path / "model")) == rmt_core.fingerprint(new)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_never_deletes_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rmt_core.save(tmp_path / "empty", tiny_model())
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "backbone", tmp_path / "file"):
        with pytest.raises(ValueError, match="would be lost"):
            rmt_core.save(target, tiny_model())
    assert (tmp_path / "backbone" / "config.json").read_text() == '{"model_type": "llama"}'
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "empty", "file"]


def test_a_save_over_a_model_deletes_nothing_that_is_not_its(tmp_path: Path) -> None:
    target = tmp_path / "model"
    rmt_core.save(target, tiny_model(), Tokenizer())
    (target / "results.json").write_text("mine")
    (target / "plots").mkdir()
    with pytest.raises(ValueError, match="would be lost: plots, results.json; give another"):
        rmt_core.save(target, tiny_model(RMT))
    assert (target / "results.json").read_text() == "mine"


def test_a_link_to_a_model_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model", target_is_directory=True)
    for seed in (0, 1):
        new = tiny_model(RMT, seed=seed)
        rmt_core.save(tmp_path / "link", new)
        assert rmt_core.fingerprint(rmt_core.load(tmp_path / "disk" / "model")) == rmt_core.fingerprint(new)
    assert (tmp_path / "link").is_symlink()


def test_where_the_new_model_cannot_take_its_place_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tiny_model(RMT)
    rmt_core.save(tmp_path / "model", old)
    rename, target = os.rename, tmp_path / "model"

    def failing(source: Path, to: Path) -> None:
        if Path(to) == target and Path(source).name != "old":
            raise OSError("no longer allowed")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no longer allowed"):
        rmt_core.save(target, tiny_model(RMT, seed=1))
    assert rmt_core.fingerprint(rmt_core.load(target)) == rmt_core.fingerprint(old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_older_model_that_cannot_come_back_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_model(RMT)
    rmt_core.save(tmp_path / "model", old)
    rename, target = os.rename, tmp_path / "model"

    def failing(source: Path, to: Path) -> None:
        if Path(to) == target:
            raise OSError("no longer allowed")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no longer allowed"):
        rmt_core.save(target, tiny_model(RMT, seed=1))
    (aside,) = tmp_path.glob(".model.old.*/old")
    assert rmt_core.fingerprint(rmt_core.load(aside)) == rmt_core.fingerprint(old)


def test_a_converted_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = tiny_model(RMT).to(torch.bfloat16)
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert rmt_core.fingerprint(again) == rmt_core.fingerprint(model)


def test_loading_draws_from_nobodys_random_numbers(tmp_path: Path) -> None:
    rmt_core.save(tmp_path / "model", tiny_model(RMT))
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    rmt_core.load(tmp_path / "model")
    assert torch.equal(torch.rand(4), wanted)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rmt_core.save(tmp_path / name, tiny_model(RMT))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# Reading is strict


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


INITIAL = "memory.initial.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit_weights(lambda tensors: tensors.pop(INITIAL)), rf"missing \['{INITIAL}'\], unexpected \[\]"),
        (
            edit_weights(lambda tensors: tensors.update(extra=torch.ones(1))),
            r"missing \[\], unexpected \['extra'\]",
        ),
        (
            edit_weights(lambda tensors: tensors.update({INITIAL: torch.ones(4, 32, dtype=torch.float64)})),
            rf"{INITIAL} has shape \(4, 32\), the model needs \(3, 32\)",
        ),
        (
            edit_weights(lambda tensors: tensors.update({INITIAL: torch.ones(3, 32)})),
            rf"{INITIAL} has type torch.float32, the model needs torch.float64",
        ),
        (lambda directory: (directory / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"x" * 100), r"model\.safetensors.* not"),
        (lambda directory: (directory / "config.json").unlink(), r"has no config\.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "is not JSON"),
        (lambda directory: (directory / "config.json").write_text("[]"), "has format None; this version reads"),
        (edit_config(format="rmt-model-0"), "has format 'rmt-model-0'; this version reads 'rmt-model-1'"),
        (edit_config(model={"segment_len": 3}), r"config\.json"),
        (edit_config(model=None), r"config\.json"),
    ],
)
def test_a_spoilt_directory_is_refused_by_what_is_wrong(
    spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    rmt_core.save(tmp_path / "model", tiny_model(RMT))
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        rmt_core.load(tmp_path / "model")


def test_a_backbone_is_no_model(tmp_path: Path) -> None:
    tiny_model().backbone.lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a Hugging Face directory is a backbone, not a model with memory"):
        rmt_core.load(tmp_path)


def test_a_cut_weights_file_is_refused(tmp_path: Path) -> None:
    rmt_core.save(tmp_path / "model", tiny_model(RMT))
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        rmt_core.load(tmp_path / "model")


def test_fingerprints_tell_models_apart() -> None:
    model = tiny_model(RMT)
    found = {rmt_core.fingerprint(model), rmt_core.fingerprint(tiny_model(RMT, seed=1))}
    found |= {rmt_core.fingerprint(tiny_model(RMT, segment_len=7)), rmt_core.fingerprint(tiny_model("none"))}
    assert len(found) == 4
    assert rmt_core.fingerprint(tiny_model(RMT)) == rmt_core.fingerprint(model)
    with torch.no_grad():
        model.memory.initial.weight[0, 0] += 1e-9
    assert rmt_core.fingerprint(model) not in found
