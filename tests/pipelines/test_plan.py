"""`train --dry-run` tells what a run will be, and makes nothing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines import train
from pipelines.config import build
from pipelines.data import lanes as data
from pipelines.data.books import BookStore
from pipelines.data.plan import Share
from pipelines.data.tokenise import ByteTokenizer
from pipelines.training import plan as plans
from pipelines.training.plan import _reading
from pipelines.training.reading import make_lanes
from pipelines.training.settings import TrainConfig, num_segments_at, stage_at
from tests.pipelines.test_lanes import FakeStore

SMALL = [
    *["tiny", "--batch-size", "4", "dataset.task_fraction", "0.25", "dataset.piece_segments", "5"],
    *["curriculum.advance_below", "none", "curriculum.num_segments", "2", "3", "curriculum.steps", "20", "28"],
]


def planned(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert train.main([*SMALL, *arguments, "--dry-run", "--output", str(output / "runs" / "new")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert list(output.iterdir()) == []
    found: dict[str, Any] = json.loads(line)
    assert found["batch_size"] == 4  # the resolved configuration stands beside the plan
    return found["plan"]


def test_the_plan_is_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["report.tokens_per_s", "100"], tmp_path, capsys)
    config = build(TrainConfig, {"batch_size": 4, "curriculum": {"num_segments": [2, 3], "steps": [20, 28]}})
    per_lane = sum(num_segments_at(config.curriculum, int(step >= 20), step, 0) for step in range(48))
    store = BookStore(48)
    num_tokens = sum(document.num_tokens for document in store.manifest)
    assert plan["num_steps"] == plan["num_windows"] == 48
    assert plan["num_lanes"] == {"documents": 3, "tasks": 1}
    assert plan["num_documents"] == len(store.manifest)
    assert plan["num_tokens_per_epoch"] == num_tokens
    assert plan["num_segments"] == 4 * per_lane
    assert plan["num_epochs"] == pytest.approx(3 * per_lane / plan["num_segments_per_epoch"])
    assert plan["num_parameters"] == plan["num_trained_parameters"] == 123_713
    assert 0 <= plan["padding_fraction"]["lanes"] < 0.1
    assert plan["device_hours"] == pytest.approx(plan["num_tokens"] / 100 / 3600)
    assert plan["num_nodes_with_storage"] == 1


def test_the_tokens_told_are_those_that_lanes_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned([], tmp_path, capsys)
    values = {
        "batch_size": 4,
        "segment_len": 48,
        "dataset": {"task_fraction": 0.25, "piece_segments": 5},
        "curriculum": {"num_segments": [2, 3], "steps": [20, 28]},
    }
    config, store = build(TrainConfig, values), BookStore(48)
    lanes = data.Lanes(make_lanes(config, store, store.load_tokenizer()), 48)
    read = 0
    for step in range(48):
        window = lanes.window(step, num_segments_at(config.curriculum, int(step >= 20), step, 0))
        read += int(window.lengths.sum())
    assert plan["num_tokens"] == pytest.approx(read, rel=0.02)


def test_of_weighted_stores_the_tokens_told_are_those_that_lanes_read() -> None:
    store = FakeStore([2] * 400 + [200] * 40, [Share(range(400), 1.0), Share(range(400, 440), 3.0)])
    values: dict[str, Any] = {
        "data": ["short", "long"],
        "batch_size": 4,
        "dataset": {"task_fraction": 0.0, "weights": [1.0, 3.0]},
        "curriculum": {"num_segments": [2], "steps": [200], "vary": False},
    }
    for mode in ("stream", "sample"):
        config = build(TrainConfig, values | {"dataset": values["dataset"] | {"mode": mode}})
        lanes = make_lanes(config, store, ByteTokenizer())  # type: ignore[arg-type]
        rows = data.Lanes(lanes, store.segment_len)
        read = sum(int(rows.window(step, 2).lengths.sum()) for step in range(200))
        plan = _reading(config, store, lanes)
        assert plan["num_tokens"] == pytest.approx(read, rel=0.05)
        assert plan["padding_fraction"]["segments"] == pytest.approx(1 - read / (200 * 4 * 2 * 8), abs=0.05)
        epochs = plan["num_epochs_of_stores"]
        assert epochs[1] / epochs[0] == pytest.approx(3 * 400 / 1000)


def test_windows_that_do_not_vary_are_counted_without_being_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    curriculum = {"num_segments": [2, 5, 2], "steps": [3, 4, 5], "vary": False}
    config = build(TrainConfig, {"curriculum": curriculum, "optimizer": {"accumulation_steps": 2}})
    counted = Counter(
        num_segments_at(config.curriculum, stage_at(config.curriculum, window // 2), window, config.seed)
        for window in range(config.num_steps * 2)
    )
    monkeypatch.setattr(plans, "num_segments_at", None)
    assert plans._windows(config) == counted == {2: 16, 5: 8}


def test_many_windows_that_vary_are_taken_at_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    curriculum = {"num_segments": [2, 4], "steps": [1000, 3000], "least_segments": 2}
    config = build(TrainConfig, {"curriculum": curriculum})
    counted = plans._windows(config)
    monkeypatch.setattr(plans, "_COUNTED_WINDOWS", 100)
    taken = plans._windows(config)
    assert taken == {2: 2000, 3: 1000, 4: 1000}
    assert {size: pytest.approx(number, rel=0.1) for size, number in taken.items()} == counted


def test_memory_is_told_for_every_stage_and_falls_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["model.width", "256", "workers.num_workers", "4"], tmp_path, capsys)
    assert [need["zero_stage"] for need in plan["memory_per_worker"]] == [0, 1, 2, 3]
    assert (plan["num_workers"], plan["rows_per_worker"]) == (4, 1)
    zero, one, two, three = (need["optimizer_bytes"] for need in plan["memory_per_worker"])
    assert zero > one == two == three
    assert all(need["device_bytes"] > need["weights_bytes"] for need in plan["memory_per_worker"])


def test_a_part_trained_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["model.train", "memory"], tmp_path, capsys)
    assert plan["num_trained_parameters"] == 4 * 64 + (2 * 64 + 1) * 64 + 64 + 1  # the memory at first, its gate


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.backbone", "nowhere"], "nowhere' is not a directory"),
        (["--data", "nowhere"], "nowhere"),
        (["report.probe_data", "nowhere"], "without report.probe_every"),
        (["model.lora.rank", "4"], "model.lora is set with model.train everything"),
        (["model.memory", "xl", "model.train", "memory"], "memory xl has no parameters"),
        (["report.mlflow", "http://me:secret@host"], "MLFLOW_TRACKING_PASSWORD"),
        (["report.profile", "5:2"], "START:STOP"),
    ],
)
def test_what_cannot_work_is_told_by_the_plan_too(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SMALL, *arguments, "--dry-run", "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if "error" in line]
    assert says in line
    assert list(tmp_path.iterdir()) == []
