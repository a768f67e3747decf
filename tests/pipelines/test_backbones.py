"""A backbone in a bucket: brought to the machine while it is read, known by its contents, and not needed afterwards."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rmt_core
from pipelines import storage, train
from pipelines.config import InputError, build
from pipelines.data.tokenise import ByteTokenizer
from pipelines.training import worker
from pipelines.training.backbones import apart, brought
from pipelines.training.settings import TrainConfig, model_config
from pipelines.training.weights import fresh_model
from tests.process_group import spawn


def config(backbone: str | None, **changes: Any) -> TrainConfig:
    settings = {
        "batch_size": 2,
        "segment_len": 48,
        "model": {"backbone": backbone, "memory": {"kind": "rmt", "num_tokens": 2}},
        "dataset": {"piece_segments": 5},
        "curriculum": {"num_segments": [1], "steps": [2]},
    }
    return build(TrainConfig, settings | changes)


@pytest.fixture(scope="module")
def places(s3_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same small Llama on disk and in a bucket."""
    folder = tmp_path_factory.mktemp("backbone")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    storage.upload_directory(folder, f"{s3_bucket}/backbone")
    return str(folder), f"{s3_bucket}/backbone"


def test_the_run_is_the_same_wherever_its_backbone_lies(places: tuple[str, str]) -> None:
    here, there = places
    assert train.check(config(there)) == train.check(config(here))


def test_a_run_that_begins_with_a_trained_model_is_known_by_its_weights(s3_bucket: str, tmp_path: Path) -> None:
    def saved(seed: int) -> str:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        backbone = {"model_type": "llama", "vocab_size": 257, **sizes}
        memory = {"kind": "rmt", "num_tokens": 2}
        model = rmt_core.build(backbone=backbone, memory=memory, segment_len=24)
        rmt_core.save(tmp_path / str(seed), model, ByteTokenizer())
        return str(tmp_path / str(seed))

    def identity(place: str) -> Any:
        return train.check(config(None, model={"start": place}))

    one, other = saved(0), saved(1)
    storage.upload_directory(Path(one), f"{s3_bucket}/trained")
    found = identity(one)
    assert found["model"]["memory"] == rmt_core.load_config(one).to_json()["memory"]
    assert found["model"]["segment_len"] == 48
    assert identity(f"{s3_bucket}/trained") == found
    assert identity(other) != found
    with brought(config(None, model={"start": f"{s3_bucket}/trained"})) as at_hand:
        setup_model = fresh_model(model_config(at_hand, ByteTokenizer(), 48), at_hand.model, seed=3)
    wanted = rmt_core.load(one)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in setup_model.state_dict().items())
    with pytest.raises(InputError, match=r"start s3:.*trained: .* as memory.initial.weight: \(2, 16\) in pl"):
        train.check(config(None, model={"start": f"{s3_bucket}/trained", "memory": {"kind": "rmt", "num_tokens": 3}}))
    with pytest.raises(InputError, match="model.start '.*nothing' holds no config.json; give a directory saved by tr"):
        identity(f"{s3_bucket}/nothing")
    with pytest.raises(
        InputError, match="model.start: .*has no config.json; give a directory written by rmt_core.save"
    ):
        identity(str(tmp_path / "nothing"))
    (tmp_path / "0" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.start .* holds no weights"):
        identity(one)


def test_a_description_apart_from_its_directory_says_the_same(places: tuple[str, str]) -> None:
    description = model_config(config(places[0]), ByteTokenizer(), 48)
    assert apart(description).to_json() == description.to_json()


def test_a_bucket_without_a_backbone_is_named(s3_bucket: str) -> None:
    with pytest.raises(InputError, match="nothing' holds no config.json"):
        train.check(config(f"{s3_bucket}/nothing"))


def test_a_plan_brings_no_weights(places: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "local_directory", None)
    planned = train.plan(config(places[1], output=str(tmp_path / "run")))
    assert planned["num_nodes_with_storage"] == 1


def train_what_was_brought(rank: int, given: dict[str, Any], weights: str, tmp_path: Path) -> None:
    """A process of its own: DeepSpeed knows one process group in all."""
    os.environ["NODE_RANK"] = str(rank)
    with brought(config(None, model=given)) as at_hand:
        folder = Path(str(at_hand.model.directory))
        assert worker._shared(at_hand) == at_hand
        setup = worker.set_up(at_hand)
    assert not folder.exists()
    run = worker.start_run(setup, None)
    before = setup.model.backbone.lm.get_input_embeddings().weight.clone()
    run.advance()
    run.write(tmp_path / "saved")
    run.lanes.close()
    assert torch.equal(before, torch.load(weights, weights_only=True))


@pytest.mark.long
@pytest.mark.parametrize("field", ["backbone", "start"])
def test_a_worker_trains_and_saves_when_what_was_brought_is_gone(
    field: str, places: tuple[str, str], s3_bucket: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"backbone": places[1], "memory": {"kind": "rmt", "num_tokens": 2}}
    model = rmt_core.build(backbone=places[0], memory=given["memory"], segment_len=24)
    if field == "start":
        given = {"start": f"{s3_bucket}/begun"}
        model.backbone.lm.get_input_embeddings().weight.data += 1
        rmt_core.save(tmp_path / "begun", model, ByteTokenizer())
        storage.upload_directory(tmp_path / "begun", given["start"])
    begun = model.backbone.lm.get_input_embeddings().weight.detach()
    torch.save(begun, tmp_path / "weights.pt")
    spawn(train_what_was_brought, 1, given, str(tmp_path / "weights.pt"), tmp_path)
    saved = rmt_core.load(tmp_path / "saved" / "model")
    assert not torch.equal(saved.backbone.lm.get_input_embeddings().weight, begun)
    assert saved.segment_len == 48


def test_workers_of_a_machine_read_what_its_first_one_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with two workers each; the first of each has brought it."""
    told = [("0", "0", "/tmp/a"), ("0", "1", "s3://b/m"), ("1", "0", "/tmp/b"), ("1", "1", "s3://b/m")]
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 4)

    def gather(places: list[Any], mine: Any) -> None:
        assert mine in told
        places[:] = told

    monkeypatch.setattr(worker.dist, "all_gather_object", gather)
    for node, rank, place in told:
        monkeypatch.setitem(os.environ, "NODE_RANK", node)
        monkeypatch.setitem(os.environ, "LOCAL_RANK", rank)
        wanted = "/tmp/a" if node == "0" else "/tmp/b"
        assert worker._shared(config(place)).model.backbone == wanted
