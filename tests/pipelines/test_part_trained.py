"""Runs of two workers that train adapters or the memory alone, under every ZeRO stage: checkpoints, probes, figures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import rmt_core
from pipelines.config import build
from pipelines.training import checkpoints, worker
from pipelines.training import engine as engines
from pipelines.training.costs import outline, segment_cost
from pipelines.training.settings import TrainConfig
from rmt_core.checkpoint import tensors_of
from tests.process_group import spawn

pytestmark = pytest.mark.long

STAGES = (0, 1, 2, 3)
PEAK = 1e9


def config_of(stage: int, **report: Any) -> TrainConfig:
    return build(
        TrainConfig,
        {
            "batch_size": 4,
            "segment_len": 48,
            "model": {
                "width": 32,
                "feed_forward_width": 48,
                "memory": {"kind": "rmt", "num_tokens": 2},
                "train": "lora" if stage else "memory",
                "lora": {"rank": 2, "dropout": 0.1 if stage == 3 else 0.0} if stage else {},
            },
            "optimizer": {"learning_rate": 0.02, "warmup_steps": 1},
            "curriculum": {"num_segments": [3], "steps": [10]},
            "dataset": {"task_fraction": 0.25},
            "workers": {"num_workers": 2, "zero_stage": stage},
            "report": report,
        },
    )


def start(config: TrainConfig, folder: Path | None = None) -> worker.Run:
    found = None if folder is None else worker.Found(folder, checkpoints.read_progress(folder))
    return worker.start_run(worker.set_up(config), found)


def advance(run: worker.Run, num_steps: int, to: Path) -> None:
    """Some steps, then the portable model."""
    for _ in range(num_steps):
        run.advance()
    engines.save_portable(to, run.engine, run.setup.description, run.setup.tokenizer)
    dist.barrier()


def two_workers(rank: int, name: str) -> None:
    for stage in STAGES:
        folder = Path(name) / str(stage)
        run = start(config_of(stage))
        advance(run, 0, folder / "first")
        run.advance()
        run.write(folder / "checkpoint")
        advance(run, 2, folder / "straight")
        advance(start(config_of(stage), folder / "checkpoint"), 2, folder / "resumed")
        watched = start(config_of(stage, probe_every=1, probe_segments=3, peak_flops=PEAK))
        advance(watched, 3, folder / "probed")
        metrics = watched._metrics(elapsed_s=2.0)
        if rank == 0:
            (folder / "metrics.json").write_text(json.dumps(metrics))


def one_worker(rank: int, name: str) -> None:
    for stage in (1, 2):
        folder = Path(name) / str(stage)
        advance(start(config_of(stage), folder / "checkpoint"), 2, folder / "alone")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("part")
    spawn(two_workers, 2, str(folder))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_of(rmt_core.load(folder))


def equal(one: Path, other: Path) -> bool:
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_but_the_chosen_part_moves(ran: Path, stage: int) -> None:
    before, after = weights(ran / str(stage) / "first"), weights(ran / str(stage) / "straight")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if stage and "proj.weight" in name}
    assert moved == {"memory.initial.weight"} | adapted


@pytest.mark.parametrize("stage", STAGES)
def test_gone_on_with_equals_uninterrupted_to_the_bit(ran: Path, stage: int) -> None:
    assert equal(ran / str(stage) / "resumed", ran / str(stage) / "straight")


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_what_is_trained_and_no_more(ran: Path, stage: int) -> None:
    engine = ran / str(stage) / "checkpoint" / "deepspeed" / checkpoints.ENGINE_TAG
    paths = list(engine.glob("*model_states.pt"))
    assert paths
    for path in paths:
        saved = torch.load(path, weights_only=False)  # written by this test
        names = [name for name in saved["module"] if torch.is_tensor(saved["module"][name])]
        assert names
        assert all("lora_" in name or ".memory." in name for name in names), names
        assert not saved.get("frozen_param_fragments")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_probes_equals_one_without_to_the_bit(ran: Path, stage: int) -> None:
    assert equal(ran / str(stage) / "probed", ran / str(stage) / "straight")


@pytest.mark.parametrize("stage", STAGES)
def test_figures_of_a_run_are_told(ran: Path, stage: int) -> None:
    metrics = json.loads((ran / str(stage) / "metrics.json").read_text())
    assert 0 < metrics["probe_loss"] < 10
    assert metrics["probe_loss_without_memory"] != metrics["probe_loss"]
    assert metrics["state_norm"] > 0
    assert metrics["state_drift"] > 0
    assert metrics["lane_use_fraction"] == 1
    assert metrics["peak_memory_bytes"] > 2**20
    config = config_of(stage)
    model = rmt_core.load(ran / str(stage) / "first")
    cost = segment_cost(outline(model.config, config.model))
    of_a_token = (cost.forward_flops + cost.backward_flops) / 48
    assert metrics["mfu_fraction"] == pytest.approx(metrics["tokens_per_s"] * of_a_token / (2 * PEAK))


def test_another_number_of_workers_goes_on_with_what_is_trained(ran: Path) -> None:
    spawn(one_worker, 1, str(ran))
    for stage in (1, 2):
        alone, straight = weights(ran / str(stage) / "alone"), weights(ran / str(stage) / "straight")
        for name, tensor in straight.items():
            torch.testing.assert_close(
                alone[name], tensor, atol=1e-5, rtol=0, msg=lambda said, at=name: f"{at}: {said}"
            )
