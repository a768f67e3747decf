"""The benchmark of training: its ways give the same model, and noise is no verdict. Nothing here looks at a time."""

import json
import math

import numpy as np
import pytest

from pipelines import benchmark
from pipelines.benchmarks import train
from pipelines.benchmarks.measuring import Job
from pipelines.config import build, parse
from pipelines.training.settings import TrainConfig

QUIET = {"bare": [100.0, 101.0], "one": [97.0, 98.0], "two": [180.0, 182.0], "beside": [200.0, 201.0]}


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, True),
        ({"one": [90.0, 91.0], "two": [170.0, 172.0]}, True),
        ({"two": [150.0, 152.0]}, False),
        ({"bare": [90.0, 101.0]}, None),  # equal runs differ: nothing is known
        ({"two": [150.0, 182.0]}, None),
        ({"beside": [150.0, 152.0]}, None),  # no machine to show it on: two loops hinder each other
    ],
)
def test_noise_is_no_verdict(changes: dict[str, list[float]], scaling: bool | None) -> None:
    assert train.judge_rates(QUIET | changes)["verdicts"]["scaling_efficiency"] == scaling


def test_ratios_are_those_of_the_best_rates() -> None:
    found = train.judge_rates(QUIET)
    assert found["whole_runs_slower"] == pytest.approx(101 / 98 - 1)
    assert found["scaling_efficiency"] == pytest.approx(182 / 98 / 2)
    assert found["machine_scaling"] == pytest.approx(201 / 101 / 2)


@pytest.mark.parametrize(
    ("job", "verdict"),
    [(1.02, True), (1.2, False), (1.05, None)],
)
def test_the_overhead_is_the_median_of_pairs_and_judged_by_its_interval(job: float, verdict: bool | None) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, size=48)
    loop = (1 + np.random.default_rng(1).uniform(0, 1, size=48)).tolist()  # the machine is restless
    seconds = {"job": [job * second * (1 + e) for second, e in zip(loop, noise, strict=True)], "loop": loop}
    seconds["job"][:2] = [50.0, 50.0]  # warming up
    found = train.judge_turns(seconds)
    assert found["verdicts"]["overhead"] is verdict
    low, high = found["overhead_interval"]
    assert low < found["overhead"] < high
    assert found["overhead"] == pytest.approx(job - 1, abs=0.01)
    assert high - low < 0.03


def test_the_interval_of_the_median_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = train.judge_turns({"job": generator.exponential(size=24), "loop": np.ones(24)})["overhead_interval"]
        covered += low < math.log(2) - 1 < high
    assert covered >= 940


@pytest.mark.parametrize("given", [train.settings(Job(train.QUICK, "cpu")), train.large(Job(train.QUICK, "cpu"))])
def test_the_command_is_given_the_same_settings_as_the_loop(given: dict[str, object]) -> None:
    words = train._words(given)
    assert parse(TrainConfig, words, prog="train", description="")[0] == build(TrainConfig, given)


@pytest.mark.scenario
def test_train_runs_and_its_ways_give_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["train", "--quick"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found["promises"]["same_model"]
    assert found["promises"]["same_steps"]
    assert found["promises"]["resumed_is_the_same_to_the_bit"]
    assert set(found["memory"]) == {"zero3"}
    assert found["checkpoint"]["checkpoint_bytes"] > found["checkpoint"]["weights_bytes"]
    assert set(found["promises"]) | set(found["inconclusive"]) >= {"overhead", "scaling_efficiency", "memory_zero3"}
    assert "not judged" in printed.err
