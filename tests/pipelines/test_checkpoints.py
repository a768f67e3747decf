"""Checkpoints of a run: the same number of workers goes on to the bit, another one as closely as sums allow."""

import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.config import InputError, build
from pipelines.data.books import BookStore
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Part, Progress
from pipelines.training.identity import check_same, identity_of
from pipelines.training.settings import TrainConfig, model_config
from pipelines.training.worker import Found, Run, set_up, start_run
from pipelines.training.worker import _together as together
from tests.process_group import join, spawn

STAGES, MIDDLE, STEPS = (0, 1, 2, 3), 2, 4
FLOAT32 = {f"zero{stage}": (stage, "float32") for stage in STAGES}
WAYS = FLOAT32 | {"zero3bf16": (3, "bfloat16")}


def settings(zero_stage: int, precision: str = "float32", **changes: Any) -> TrainConfig:
    return build(
        TrainConfig,
        {
            "batch_size": 4,
            "segment_len": 48,
            "model": {"width": 32, "feed_forward_width": 48, "memory": {"kind": "rmt", "num_tokens": 2}},
            "optimizer": {"warmup_steps": 1, "accumulation_steps": 2},
            "curriculum": {"num_segments": [2, 3], "steps": [1, 3]},
            "dataset": {
                "piece_segments": 5,
                "task_fraction": 0.5,
                "tasks": ["recall", {"task": "detect", "background": "noise", "weight": 2}],
            },
            "workers": {"num_workers": 2, "zero_stage": zero_stage, "precision": precision},
        }
        | changes,
    )


def run_of(config: TrainConfig, folder: Path | None) -> Run:
    """A run at its start, or at the checkpoint in `folder`."""
    return start_run(set_up(config), None if folder is None else Found(folder, checkpoints.read_progress(folder)))


def worker(rank: int, world_size: int, root: str, others: tuple[int, ...]) -> None:
    """Runs with `world_size` workers: whole ones, with a checkpoint on the way, and the rest of those of `others`."""
    for way in WAYS:
        config = settings(*WAYS[way])
        folder = Path(root) / way
        run = run_of(config, None)
        for step in range(STEPS):
            if step == MIDDLE:
                run.write(folder / f"middle{world_size}")
            run.advance()
        run.write(folder / f"whole{world_size}")
        for other in others if way in FLOAT32 else {world_size} & set(others):
            rest = run_of(config, folder / f"middle{other}")
            assert rest.step == MIDDLE
            for _ in range(STEPS - MIDDLE):
                rest.advance()
            rest.write(folder / f"rest{other}on{world_size}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every way: runs of one and of two workers, and what became of their middles with one and with two."""
    root = tmp_path_factory.mktemp("runs")
    for world_size, others in ((2, (2,)), (1, (1, 2)), (2, (1,))):
        spawn(worker, world_size, world_size, str(root), others)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def memory(folder: Path) -> dict[int, torch.Tensor]:
    """Lane -> its state, read as a third worker more would."""
    progress = checkpoints.read_progress(folder)
    part = checkpoints.read_part(folder, 0, 3, range(4), progress)
    return dict(enumerate(part.memory.unbind(0)))


def test_a_run_of_this_process_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the long tests show for all stages and numbers of workers, for one worker under ZeRO 2."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():  # as Ray Train sets them
        monkeypatch.setenv(name, value)
    join(0, 1, tmp_path)
    try:
        whole = run_of(settings(2), None)
        for step in range(STEPS):
            if step == MIDDLE:
                whole.write(tmp_path / "middle")
            whole.advance()
        whole.write(tmp_path / "whole")
        rest = run_of(settings(2), tmp_path / "middle")
        while rest.step < STEPS:
            rest.advance()
        rest.write(tmp_path / "rest")
    finally:
        torch.distributed.destroy_process_group()
    check_same_to_the_bit(tmp_path / "rest", tmp_path / "whole", tmp_path / "middle")


def check_same_to_the_bit(rest: Path, whole: Path, middle: Path) -> None:
    """Weights, memories and cursors of two checkpoints of the same step; the run has moved since `middle`."""
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(rest)[name], tensor), name
    assert any(not torch.equal(weights(middle)[name], tensor) for name, tensor in weights(whole).items())
    for lane, state in memory(whole).items():
        assert torch.equal(memory(rest)[lane], state)
    for part in sorted(whole.glob("worker_*.json")):
        assert json.loads(part.read_text()) == json.loads((rest / part.name).read_text())


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_same_number_of_workers_goes_on_to_the_bit(runs: Path, way: str, num_workers: int) -> None:
    folder = runs / way
    rest, whole = folder / f"rest{num_workers}on{num_workers}", folder / f"whole{num_workers}"
    check_same_to_the_bit(rest, whole, folder / f"middle{num_workers}")


@pytest.mark.long
@pytest.mark.parametrize("way", FLOAT32)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_workers_goes_on_the_same_way(runs: Path, way: str, before: int, after: int) -> None:
    """The same rows summed in another order: roundings of float32, which AdamW's division by the root of the second
    moment makes 1e-8 (measured) after two steps. A moment, step counter or weight decay lost would show as 4e-5."""
    folder = runs / way
    rest, whole, middle = folder / f"rest{before}on{after}", folder / f"whole{before}", folder / f"middle{before}"
    moved = 0.0
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(rest)[name], tensor, atol=1e-6, rtol=0)
        moved = max(moved, float((tensor - weights(middle)[name]).abs().max()))
    assert moved > 1e-3
    for lane, state in memory(whole).items():
        torch.testing.assert_close(memory(rest)[lane], state, atol=1e-4, rtol=0)
    cursors: list[dict[str, Any]] = [{}, {}]
    for found, place in zip(cursors, (rest, whole), strict=True):
        for part in place.glob("worker_*.json"):
            found |= json.loads(part.read_text())["cursors"]
    assert cursors[0] == cursors[1]


def test_parts_go_where_their_lanes_go(tmp_path: Path) -> None:
    identity = {"settings": {}, "data": {}, "model": {}}
    numbers = {0: [0, 2, 4], 1: [1, 3]}
    for rank, mine in numbers.items():
        rows = torch.tensor(mine, dtype=torch.float32)[:, None]
        sums = {"sizes": torch.tensor([rank + 1])}
        part = Part({"a": rows}, [[number] for number in mine], sums, checkpoints.random_states(torch.device("cpu")))
        checkpoints.write_part(tmp_path, rank, mine, part, identity)
    progress = Progress(7, 1, 2, identity)
    for rank, mine in ((0, [0, 3]), (1, [1, 4]), (2, [2])):
        part = checkpoints.read_part(tmp_path, rank, 3, mine, progress)
        assert part.memory["a"].flatten().tolist() == mine
        assert part.cursors == [[number] for number in mine]
        assert part.sums["sizes"].tolist() == [0 if rank else 3]
        assert part.random is None
    same = checkpoints.read_part(tmp_path, 1, 2, [1, 3], progress)
    assert same.random is not None
    assert same.sums["sizes"].tolist() == [2]
    blob = bytearray((tmp_path / "worker_00001.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "worker_00001.safetensors").write_bytes(blob)
    with pytest.raises(InputError, match="worker_00001.safetensors: not a state"):
        checkpoints.read_part(tmp_path, 1, 2, [1, 3], progress)


def test_what_kills_have_left_of_conversions_is_deleted_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(command: list[str], **given: Any) -> Any:
        folder = Path(command[command.index("--output_folder") + 1])
        folder.mkdir()
        (folder / "converted").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(checkpoints.subprocess, "run", convert)
    mine = checkpoints.universal_directory(tmp_path / "checkpoint").parent
    for name, age_s in (("old", 25 * 3600), (".old.part", 25 * 3600), ("young", 23 * 3600)):
        (mine / name).mkdir()
        (mine / name / "weights").touch()
        os.utime(mine / name, (time.time() - age_s, time.time() - age_s))
    converted = checkpoints.convert(tmp_path / "checkpoint")
    assert sorted(path.name for path in mine.iterdir()) == sorted(["young", converted.name])
    os.utime(converted, (0, 0))
    assert checkpoints.convert(tmp_path / "checkpoint") == converted
    assert (converted / "converted").exists()


def slow_worker(rank: int) -> None:
    """One of two, of which the first takes longer than steps may."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))

    def prepare() -> str:
        time.sleep(0 if rank else 4)
        return "prepared"

    assert together(prepare, None) == "prepared"


@pytest.mark.long
def test_workers_wait_for_one_that_prepares_longer_than_for_a_step() -> None:
    spawn(slow_worker, 2)


def test_what_changed_is_named() -> None:
    store = BookStore(48)
    config = settings(2)

    def identity(config: TrainConfig, store: BookStore) -> dict[str, Any]:
        return identity_of(config, store, model_config(config, store.load_tokenizer(), store.segment_len))

    old = identity(config, store)
    check_same(old, identity(settings(2, output="elsewhere", report={"log_every": 3}), store), "it")
    check_same(old, identity(settings(2, workers={"num_workers": [1, 4], "max_failures": 9}), store), "it")
    with pytest.raises(InputError, match="it with other settings or data: seed 0 -> 3[.] Give the old ones"):
        check_same(old, identity(settings(2, seed=3), store), "it")
    changed = settings(2, gradient={"mode": "replay"}, optimizer={"learning_rate": 1.0})
    with pytest.raises(InputError, match="gradient.mode full -> replay; .*learning_rate 0.002 -> 1.0"):
        check_same(old, identity(changed, store), "it")
    shorter = BookStore(40)
    with pytest.raises(InputError, match="the data's fingerprint [0-9a-f]{16}... -> .*the data's segment_len 48 -> 40"):
        check_same(old, identity(config, shorter), "it")
    wider = old | {"model": json.loads(json.dumps(old["model"]))}
    wider["model"]["backbone"]["hidden_size"] = 99
    with pytest.raises(InputError, match="the model's backbone.hidden_size 32 -> 99"):
        check_same(old, wider, "it")


def test_a_backbone_is_known_by_its_weights_wherever_it_lies(tmp_path: Path) -> None:
    store = BookStore(48)
    shape = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(shape)

    def identity(place: str) -> dict[str, Any]:
        config = settings(2, model={"backbone": str(tmp_path / place), "train": "memory"})
        return identity_of(config, store, model_config(config, store.load_tokenizer(), store.segment_len))

    backbone.save_pretrained(tmp_path / "one")
    backbone.save_pretrained(tmp_path / "moved")
    check_same(identity("one"), identity("moved"), "it")
    with torch.no_grad():
        backbone.lm_head.weight[3, 3] += 1e-3
    backbone.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="the model's weights [0-9a-f]{16}... -> [0-9a-f]{16}"):
        check_same(identity("one"), identity("other"), "it")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="other' holds no weights"):
        identity("other")
