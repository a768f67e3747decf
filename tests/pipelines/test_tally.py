"""How far long runs are: what workers tell is what they have read, and what the log says of it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

import rmt_core
from pipelines import evaluate
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import tally
from pipelines.tasks.base import Material
from pipelines.tasks.held_out import TextHeldOut
from pipelines.tasks.running import Full, Run, measure
from pipelines.tasks.tally import Tally, Teller
from tests.rmt_core.tiny import RMT, tiny_model

BYTES = ByteTokenizer()
MATERIAL = Material(BYTES, TextHeldOut("letters", "f", np.arange(97, 123).repeat(40)), num_samples=5, batch_size=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the teller takes for the time."""
    now = [0.0]
    monkeypatch.setattr(tally, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def model_of(memory: dict[str, object], tmp_path: Path) -> str:
    rmt_core.save(tmp_path / "model", tiny_model(memory, segment_len=16, vocab_size=257), BYTES)
    return str(tmp_path / "model")


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_read_is_told_from_time_to_time_and_in_all(clock: list[float]) -> None:
    told: list[int] = []
    teller = Teller(told.append)
    for seconds in (1.0, 4.0, 5.5, 9.0, 10.5, 60.0):
        clock[0] = seconds
        teller(100)
    assert told == [300, 500, 600]


@pytest.mark.parametrize("task", ["recall", "copy", "perplexity"])
@pytest.mark.parametrize("attention", ["segments", "full"])
def test_a_run_tells_how_many_tokens_it_reads(
    task: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "_TELL_S", 0.0)
    told = Tally()
    handle = SimpleNamespace(tell=SimpleNamespace(remote=told.tell))
    full = Full(2**30) if attention == "full" else None
    run = Run(task, 100, model_of({"kind": "none"} if full else RMT, tmp_path), "cpu", 3, full)
    material = replace(MATERIAL, ablations=full is None)
    figures = measure(run, material, handle)
    num_texts = 11 if task == "perplexity" else MATERIAL.num_samples
    num_read = 26 * 40 - num_texts if task == "perplexity" else num_texts * 99  # behind the last token nothing is asked
    assert told.told() == {run: num_read}
    kept = [one for one in figures if one.metric not in ("seconds", "peak_bytes")]
    assert kept == [one for one in measure(run, material) if one.metric not in ("seconds", "peak_bytes")]


def test_the_log_says_how_far_the_runs_are_that_have_begun() -> None:
    runs = [Run("recall", 1000, "m", "cpu", seed) for seed in range(3)]
    novels = Run("perplexity", 64, "m", "cpu", 0)
    told = {runs[0]: 4999, runs[1]: 2500, novels: 1234567}
    assert list(evaluate._how_far(told, {runs[0]}, MATERIAL)) == [
        "recall at 1000 (seed 1) 50% read",
        "perplexity at 64 (seed 0) 1,234,567 tokens read",
    ]


def test_a_tally_that_dies_begins_anew(local_ray: None) -> None:
    handle, run = evaluate._start_tally(), Run("recall", 64, "m", "cpu", 0)
    ray.get(handle.tell.remote(run, 5))
    assert ray.get(handle.told.remote()) == {run: 5}
    ray.kill(handle, no_restart=False)
    wait_for(lambda: ray.get(handle.told.remote()) == {})
    ray.get(handle.tell.remote(run, 7))
    assert ray.get(handle.told.remote()) == {run: 7}


def test_a_worker_tells_the_driver(local_ray: None, tmp_path: Path) -> None:
    remote = evaluate._start_tally()
    run = Run("recall", 64, model_of(RMT, tmp_path), "cpu", 0)

    def read(run: Run, material: Material, there: object) -> None:
        tally._TELL_S = 0.0  # of this worker
        measure(run, material, there)

    ray.get(ray.remote(read).remote(run, replace(MATERIAL, num_samples=2), remote))
    wait_for(lambda: ray.get(remote.told.remote()) == {run: 2 * 63})
