"""The profiler records the steps that it is told to, and no others."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import InputError, parse
from pipelines.training.profiling import Profiler
from pipelines.training.settings import Span, TrainConfig


def run(profiler: Profiler, steps: range) -> None:
    for step in steps:
        profiler.before_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2) + 1
        profiler.after_step(step)


def recorded(output: Path, rank: int = 0) -> list[str]:
    """The numbered steps in a worker's trace."""
    trace: dict[str, Any] = json.loads(gzip.decompress((output / f"profile/worker_{rank:05d}.json.gz").read_bytes()))
    return sorted(event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("step "))


def test_a_span_of_steps_is_recorded(tmp_path: Path) -> None:
    run(Profiler(Span(2, 4), str(tmp_path), rank=3), range(6))
    assert recorded(tmp_path, 3) == ["step 2", "step 3"]
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_a_run_that_ends_within_the_span_keeps_what_there_is(tmp_path: Path) -> None:
    profiler = Profiler(Span(1, 9), str(tmp_path), rank=0)
    run(profiler, range(3))
    profiler.close()
    assert recorded(tmp_path) == ["step 1", "step 2"]


def test_a_run_behind_the_span_records_nothing(tmp_path: Path) -> None:
    profiler = Profiler(Span(1, 3), str(tmp_path), rank=0)
    run(profiler, range(3, 5))
    profiler.close()
    assert not list(tmp_path.iterdir())


def parsed(text: str) -> Any:
    config, _ = parse(TrainConfig, ["report.profile", text], prog="train", description="")
    return config.report.profile


def test_a_span_is_written_with_a_colon() -> None:
    assert parsed("10:15") == (10, 15)
    assert parsed("none") is None
    for wrong in ("10", "5:5", "a:b", "1:2:3"):
        with pytest.raises(InputError, match="START:STOP"):
            parsed(wrong)
