"""The benchmark runs and says what it measured. Nothing here looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines import benchmark
from pipelines.benchmarks.measuring import compare

ROOT = Path(__file__).resolve().parents[2]

# Stands in for a machine with `rmt_core`'s needs alone: importing any of these fails.
BARE = """
import sys
for name in ("ray", "deepspeed", "pydantic", "pyarrow", "s3fs", "matplotlib"):
    sys.modules[name] = None
sys.argv[1:] = ["core", "--quick"]
import runpy
runpy.run_path("pipelines/benchmark.py", run_name="__main__")
"""


@pytest.mark.slow
def test_core_runs_on_a_bare_machine_and_its_last_line_is_json() -> None:
    script = subprocess.run(
        [sys.executable, "-c", BARE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    (line,) = script.stdout.splitlines()
    found = json.loads(line)
    assert found["benchmark"] == "core"
    assert found["quick"]
    assert found["masked_attention_calls"] == 0
    assert found["masks"]["calls"] == 4 * 3 * 2  # memories x steps x layers
    assert found["promises"]["same_outputs"]
    for name in ("step_ratio", "exponent", "resident_mb_per_100k_tokens"):
        assert isinstance(found[name], float)
        assert isinstance(found["promises"][name], bool)
    assert [step["segment_len"] for step in found["steps"]] == [32, 32]
    assert len(found["streams"]) == 2
    assert "not judged" in script.stderr


def test_a_dry_run_prints_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["core", "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sizes"]["stream_lengths"] == [4096 * 2**i for i in range(7)]
    assert not told["quick"]


@pytest.mark.slow
def test_memory_compares_the_orders(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert benchmark.main(["memory", "--quick"]) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
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
    assert found["orders"]["least_auto_ratio"] == min(case["auto"]["ratio"] for case in cases)


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
    assert benchmark.exponent(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert benchmark.exponent(lengths, [0.2 * n for n in lengths]) == pytest.approx(1)
