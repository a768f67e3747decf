"""The benchmark of summarise runs, and its counting sees what is lost, doubled or other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.benchmarks import summarise

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_lost_doubled_or_other_is_counted() -> None:
    expected = {"a": "one", "b": "two", "c": None, "d": None}
    rows = [
        {"doc_id": "a", "status": "ok", "summary": "one"},
        {"doc_id": "a", "status": "ok", "summary": "uno"},
        {"doc_id": "c", "status": "error", "summary": None},
        {"doc_id": "d", "status": "ok", "summary": "four"},
    ]
    found = summarise.compare(rows, expected)
    assert found == {"num_rows": 4, "num_lost": 1, "num_doubled": 1, "num_wrong_status": 1, "num_other_summaries": 2}


@pytest.mark.scenario
@pytest.mark.ray
def test_it_runs_and_keeps_its_promises_in_small() -> None:
    command = [sys.executable, str(ROOT / "pipelines" / "benchmark.py"), "summarise", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["promises"] == {
        "none_lost": True,
        "none_doubled": True,
        "poison_alone_fails": True,
        "same_summaries": True,
        "committed_stays": True,
    }
    assert (found["num_ok"], found["num_error"]) == (21, 3)
