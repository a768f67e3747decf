"""The benchmark of training: its ways give the same model, and noise is no verdict. Nothing here looks at a time."""

import json

import pytest

from pipelines import benchmark
from pipelines.benchmarks import train
from pipelines.benchmarks.measuring import Job
from pipelines.config import build, parse
from pipelines.training.settings import TrainConfig

QUIET = {"bare": [100.0, 101.0], "one": [97.0, 98.0], "two": [180.0, 182.0], "beside": [200.0, 201.0]}


@pytest.mark.parametrize(
    ("changes", "overhead", "scaling"),
    [
        ({}, True, True),
        ({"one": [90.0, 91.0], "two": [170.0, 172.0]}, False, True),  # a tenth slower than the loop
        ({"two": [150.0, 152.0]}, True, False),
        ({"bare": [90.0, 101.0]}, None, None),  # equal runs differ: nothing is known
        ({"two": [150.0, 182.0]}, True, None),
        ({"beside": [150.0, 152.0]}, True, None),  # no machine to show it on: two loops hinder each other
    ],
)
def test_noise_is_no_verdict(changes: dict[str, list[float]], overhead: bool | None, scaling: bool | None) -> None:
    found = train.judge_rates(QUIET | changes)["verdicts"]
    assert (found["overhead"], found["scaling_efficiency"]) == (overhead, scaling)


def test_ratios_are_those_of_the_best_rates() -> None:
    found = train.judge_rates(QUIET)
    assert found["overhead"] == pytest.approx(101 / 98 - 1)
    assert found["scaling_efficiency"] == pytest.approx(182 / 98 / 2)
    assert found["machine_scaling"] == pytest.approx(201 / 101 / 2)


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
    assert found["promises"]["resumed_is_the_same_to_the_bit"]
    assert set(found["memory"]) == {"zero3"}
    assert found["checkpoint"]["checkpoint_bytes"] > found["checkpoint"]["weights_bytes"]
    assert set(found["promises"]) | set(found["inconclusive"]) >= {"overhead", "scaling_efficiency", "memory_zero3"}
    assert "not judged" in printed.err
