"""The benchmark of summarise runs, and its counting sees what is lost, doubled or other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    found = summarise.compare(rows, expected, lambda doc_id, written: written == "uno")
    counts = {"num_lost": 1, "num_doubled": 1, "num_wrong_status": 1, "num_ties": 1, "num_other_summaries": 1}
    assert found == {"num_rows": 4, **counts}


def test_rounding_excuses_only_what_it_can_do() -> None:
    sizes = summarise.QUICK
    model = summarise.build(sizes)
    doc_id, text = summarise.documents(sizes)[0]
    written = summarise.loop(model, [(doc_id, text)], sizes, "cpu")["summaries"][doc_id]
    other = written[:1] + chr(ord(written[1]) ^ 1) + written[2:]
    assert not summarise.is_tie(model, text, written, other)
    assert not summarise.is_tie(model, text, written, None)
    with torch.no_grad():  # both tokens have the same logit now, in every place
        head = model.backbone.lm.get_output_embeddings().weight
        head[ord(other[1])] = head[ord(written[1])]
    assert summarise.is_tie(model, text, written, other)


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
