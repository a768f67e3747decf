"""What a run tells of itself: speeds of what was read in a time, and metrics that survive kills and reach S3."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines import storage
from pipelines.config import build
from pipelines.data.lanes import Window
from pipelines.training import records, worker
from pipelines.training.records import Journal, Sums
from pipelines.training.settings import TrainConfig

# --- sums -------------------------------------------------------------------------------------------


def window(num_tokens: int) -> Window:
    """One row with one segment of ten places."""
    places = np.zeros((1, 1, 10), dtype=np.int64)
    found = dict.fromkeys(Window._fields, np.zeros((1, 1), dtype=np.int64))
    found |= {"tokens": places, "labels": places, "is_answer": places.astype(bool)}
    return Window(**found | {"lengths": np.array([[num_tokens]])})


def test_speed_counts_what_this_process_read_and_the_rest_what_all_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.dist, "all_reduce", lambda tensor: None)
    before = Sums(torch.device("cpu"))
    before.add(window(10), torch.ones(1, 1, 10))
    sums = Sums(torch.device("cpu"))
    sums.restore(before.state())
    sums.add(window(6), torch.ones(1, 1, 10))
    told = sums.metrics(elapsed_s=2.0)
    assert told["tokens_per_s"] == 3.0
    assert told["padding_fraction"] == 1 - 16 / 20
    sums.add(window(8), torch.ones(1, 1, 10))
    assert sums.metrics(elapsed_s=2.0)["tokens_per_s"] == 4.0


class Clocked(worker.Run):
    """A run whose steps take a second and whose checkpoints a hundred."""

    def __init__(self, clock: list[float]) -> None:
        steps = {"curriculum": {"num_segments": [1], "steps": [12]}, "report": {"log_every": 4, "checkpoint_every": 6}}
        self.config = build(TrainConfig, steps)
        self.setup: Any = SimpleNamespace(trackers=())
        self.rank, self.world_size, self.step, self.stage = 1, 2, 0, 0
        self.clock, self.spans = clock, list[float]()

    def advance(self, wishes: Any = ()) -> list[bool]:
        self.step += 1
        self.clock[0] += 1
        return [False, False]

    def save(self, metrics: dict[str, Any]) -> None:
        self.clock[0] += 100

    def _metrics(self, elapsed_s: float) -> dict[str, Any]:
        self.spans.append(elapsed_s)
        return {"answer_loss": None}


def test_the_time_of_a_checkpoint_is_no_part_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    run = Clocked(clock)
    run._loop(None, None)
    assert run.spans == [4.0, 4.0, 4.0]


class Notes:
    """A monitor that keeps its notes; what else it is told is dropped."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.note, self.tell = SimpleNamespace(remote=self.notes.append), SimpleNamespace(remote=lambda metrics: None)


class Diverging(Clocked):
    """The worker that writes, of a run whose loss is no number from its second line on."""

    def __init__(self) -> None:
        super().__init__([0.0])
        self.rank = 0
        self.saved: list[dict[str, Any]] = []

    def save(self, metrics: dict[str, Any]) -> None:
        self.saved.append(metrics)

    def _metrics(self, elapsed_s: float) -> dict[str, Any]:
        loss = 2.0 if self.step == 4 else math.nan
        return {"step": self.step, "loss": loss, "answer_loss": None, "gradient_norm": math.inf, "tokens_per_s": 1.0}


def test_a_run_that_diverges_is_told_of_once_and_its_figures_become_null() -> None:
    run, monitor, written = Diverging(), Notes(), list[dict[str, Any]]()
    journal: Any = SimpleNamespace(write=written.append, flush=lambda: None)
    run._loop(monitor, journal)
    assert [line["loss"] for line in written] == [2.0, None, None]
    assert [line["gradient_norm"] for line in written] == [None] * 3
    assert run.saved[-1]["loss"] is None
    (told,) = (note for note in monitor.notes if "finite" in note)
    assert "at step 8: the run has diverged" in told
    assert "lower optimizer.learning_rate" in told


def test_a_run_in_which_nothing_was_asked_has_not_diverged() -> None:
    assert worker._is_finite(None)
    assert worker._is_finite(3.5)
    assert not worker._is_finite(math.inf)


# --- the journal ------------------------------------------------------------------------------------


def strictly(line: str) -> Any:
    """A line as JSON has it, in which nothing is named NaN or Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_figures_that_are_no_numbers_are_null_also_in_lines_of_before(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "tokens_per_s": 5.5}\n')
    journal = Journal(str(tmp_path), 1)
    journal.write({"step": 2, "loss": math.inf, "loss_by_segment": [1.0, math.nan, None], "stage": 0})
    journal.close()
    assert [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": None, "tokens_per_s": 5.5},
        {"step": 2, "loss": None, "loss_by_segment": [1.0, None, None], "stage": 0},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(board.Tags()["scalars"]) == ["loss_by_segment/00", "train/stage"]


def test_a_line_that_a_kill_cut_off_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n{"ste')
    with caplog.at_level(logging.WARNING):
        journal = Journal(str(tmp_path), 2)
    journal.write({"step": 3})
    journal.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "left out 1 lines" in caplog.text


def test_the_board_goes_on_behind_the_step_it_is_resumed_at(tmp_path: Path) -> None:
    output = str(tmp_path)
    for begins, steps in ((0, [1, 2, 3, 4]), (3, [4, 5])):
        journal = Journal(output, begins)
        for step in steps:
            journal.write({"step": step, "loss": float(begins + step)})
        journal.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 7),
        (5, 8),
    ]


def test_on_s3_lines_go_up_now_and_then_and_all_with_the_board_at_checkpoints(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"{s3_bucket}/journal"
    clock = [1000.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: clock[0])

    def told() -> list[int]:
        lines = storage.read_bytes(f"{output}/metrics.jsonl").decode().splitlines()
        return [json.loads(line)["step"] for line in lines]

    journal = Journal(output, 0)
    journal.write({"step": 1, "loss": 2.0})
    journal.write({"step": 2, "loss": 1.0})
    assert told() == []
    clock[0] += 31
    journal.write({"step": 3, "loss": 1.0})
    assert told() == [1, 2, 3]
    assert storage.list_names(f"{output}/tensorboard") == []
    journal.flush()  # as before a checkpoint
    (events,) = storage.list_names(f"{output}/tensorboard")
    assert events.startswith("events.out.tfevents")
    journal.write({"step": 4})
    assert told() == [1, 2, 3]
    journal.close()
    assert told() == [1, 2, 3, 4]
    Journal(output, 2).close()
    assert told() == [1, 2]
