"""The benchmark runs and says what it measured. Nothing here looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rmt_core
from pipelines import benchmark
from pipelines.benchmarks import core, kinds, measuring, peer, replay
from pipelines.benchmarks.measuring import compare

ROOT = Path(__file__).resolve().parents[2]

# Stands in for a machine with `rmt_core`'s needs alone: importing any of these fails.
BARE = """
import sys
for name in ("ray", "deepspeed", "pydantic", "pyarrow", "s3fs", "matplotlib"):
    sys.modules[name] = None
import runpy
runpy.run_path("pipelines/benchmark.py", run_name="__main__")
"""


def run_bare(name: str) -> dict[str, Any]:
    """The JSON object that a quick run prints."""
    script = subprocess.run(
        [sys.executable, "-c", BARE, name, "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    (line,) = script.stdout.splitlines()
    found = json.loads(line)
    assert found["benchmark"] == name
    assert found["quick"]
    assert "not judged" in script.stderr
    return found


@pytest.mark.scenario
def test_core_runs_on_a_bare_machine_and_its_last_line_is_json() -> None:
    found = run_bare("core")
    assert found["masked_attention_calls"] == 0
    assert found["masks"]["calls"] == 4 * 3 * 2  # memories x steps x layers
    assert found["promises"]["same_outputs"]
    for name in ("step_ratio", "exponent", "resident_mb_per_100k_tokens"):
        assert isinstance(found[name], float)
        assert isinstance(found["promises"][name], bool)
    assert [step["segment_len"] for step in found["steps"]] == [32, 32]
    assert len(found["streams"]) == 2


@pytest.mark.scenario
def test_memory_runs_on_a_bare_machine_and_its_last_line_is_json() -> None:
    found = run_bare("memory")
    assert found["promises"]["replay_equals_full"]
    for row in found["replay"]["measured"]:
        assert row["rmt_core"]["max_difference"] < 1e-4
        assert row["rmt_core"]["kept_bytes"]["replay"] < row["rmt_core"]["kept_bytes"]["full"]
    kinds, caches = found["kinds"]["kinds"], found["kinds"]["caches"]
    assert found["promises"]["same_outputs"]
    assert set(kinds) | set(found["kinds"]["skipped"]) == set(rmt_core.MEMORIES)
    assert kinds["none"]["bytes"] == 0
    assert kinds["rmt"]["bytes"] == 16 * 32 * 4  # memory tokens x width x float32
    assert [cache["bytes"] for cache in caches] == [2 * 2 * n * 32 * 4 for n in (64, 128)]  # keys, values x layers
    check_orders(found)


@pytest.mark.slow
def test_serve_runs_and_its_equalities_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["serve", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["promises"]["batched_tokens_are_those_alone"]
    assert found["promises"]["known_prefix_same_output"]
    assert found["storing"]["rmt"]["state_bytes"] == 16 * 96 * 4  # memory tokens x width x float32
    assert found["storing"]["rmt"]["cache_bytes"] == 2 * 2 * 32 * 32_768 * 4  # keys, values x layers x width of a head
    assert found["storing"]["rmt"]["store_overhead_fraction"] < 1  # one record: no further copies
    assert found["prefix"]["num_tokens"] == 69
    for name in ("to_alone", "to_hugging_face"):
        assert found["batching"][name]["ratio"] > 0


def test_a_missing_peer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "PACKAGE", "no_such_package")
    model, reason = peer.build_peer(replay.QUICK, 4, "cpu")
    assert model is None
    assert reason.startswith("the package no-such-package cannot be imported")


def test_kept_bytes_are_those_that_autograd_holds_at_once() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with replay.Kept(layer) as kept:
        layer(x).exp().sum().backward()  # keeps x and the exponentials, not the weights
        assert (kept.now, kept.peak) == (0, 2 * x.nbytes)
        layer(x).exp().sum().backward()
        assert kept.peak == 2 * x.nbytes
        both = layer(x).exp().sum() + layer(x).exp().sum()
        assert kept.now == 3 * x.nbytes  # x once
        del both
        assert kept.now == 0


def test_a_cache_of_keys_and_values_gives_the_plain_models_outputs() -> None:
    model = measuring.build(32, 2, 8, "none", "cpu")
    assert kinds._cache_difference(model, measuring.random_tokens(1, 8, "cpu")) < 1e-5


def test_a_ratio_is_judged_by_the_better_of_its_measures() -> None:
    times = measuring.compared([1.0, 3.0, 3.0], [1.0, 2.0, 4.0])  # of least times 1.0, of medians 1.5
    assert (times.lowest(), times.highest()) == (1.0, 1.5)


@pytest.mark.parametrize(
    ("full_s", "replay_s", "kept"),
    [
        ((1, 4), (1.3, 5.2), [True, True]),
        ((1, 4), (1.4, 5.2), [False, True]),
        ((1, 6), (1.3, 6.1), [True, False]),  # slowed by its own size: replay may not take longer
        ((1, 6), (1.3, 5.9), [True, True]),
    ],
)
def test_replay_may_take_longer_only_where_full_is_not_slowed(
    full_s: tuple[float, float], replay_s: tuple[float, float], kept: list[bool]
) -> None:
    rows = [
        {"time": measuring.compared([b, b], [a, a])._asdict(), "max_difference": 0.0}
        for a, b in zip(full_s, replay_s, strict=True)
    ]
    found = replay._promises((4, 16), rows, growth=0.004)
    assert found["replay_growth"]
    assert [found["replay_time_4_segments"], found["replay_time_16_segments"]] == kept


def test_a_dry_run_prints_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["core", "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sizes"]["stream_lengths"] == [4096 * 2**i for i in range(7)]
    assert not told["quick"]


def check_orders(found: dict[str, Any]) -> None:
    assert found["promises"]["orders_agree"]
    assert isinstance(found["promises"]["auto_never_slower"], bool)
    cases = found["orders"]["cases"]
    assert [case["learns"] for case in cases] == [False, True]
    for case in cases:
        assert case["max_difference"] < 1e-5
        assert case["chosen"] in ("sequential", "diagonal")
        for order in ("diagonal", "auto"):
            assert case[order]["ratio"] == case[order]["first_s"] / case[order]["second_s"]
            low, high = case[order]["ratio_quartiles"]
            assert 0 < low <= high
    ratios = [max(case["auto"][name] for name in ("ratio", "ratio_of_medians")) for case in cases]
    assert found["orders"]["least_auto_ratio"] == min(ratios)


def test_comparisons_take_turns() -> None:
    turns: list[str] = []
    compare(lambda: turns.append("a"), lambda: turns.append("b"), 3, "cpu")
    assert turns == list("abbaabba")


def test_an_unknown_name_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["cor"])
    assert stopped.value.code == 2
    assert "core" in capsys.readouterr().err


def test_the_exponent_is_that_of_a_power_law() -> None:
    lengths = [2**i for i in range(4, 9)]
    assert core.exponent(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert core.exponent(lengths, [0.2 * n for n in lengths]) == pytest.approx(1)


@pytest.mark.long
def test_serve_http_runs_and_gives_the_librarys_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["serve_http", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["promises"]["texts_are_those_alone"]
    assert found["sessions_to_alone"]["ratio"] > 0
