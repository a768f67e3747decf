"""What a run tells of itself: speeds of what was read in a time, and metrics that survive kills and reach S3."""

import json
import logging
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


# --- the journal ------------------------------------------------------------------------------------


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
