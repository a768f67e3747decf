"""The benchmark of `prepare` runs, and its ways give the same tokens. Nothing here looks at a time."""

import json
from pathlib import Path

import pytest

from pipelines import benchmark
from pipelines.benchmarks import ingest


def test_a_unit_the_tokenizer_and_datasets_give_the_same_tokens(tmp_path: Path) -> None:
    place = ingest._place(tmp_path, ingest.QUICK.vocab_size)
    found = ingest._on_one_core(place, ingest.QUICK)
    assert found["same_tokens"]
    assert found["num_bytes"] >= ingest.QUICK.num_documents * ingest.QUICK.document_chars
    for name, ratio in (("limit", "of_limit"), ("datasets", "of_datasets")):
        assert found[name]["first_s"] / found[name]["second_s"] == found[ratio]


def test_documents_are_the_books_over_again() -> None:
    assert ingest._text("abc", 4, 7) == "bcabcab"


@pytest.mark.scenario
def test_ingest_runs_and_its_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["ingest", "--quick"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found["promises"]["same_tokens"]
    assert set(found["promises"]) == {"same_tokens", "limit_of_the_tokenizer", "against_datasets", "two_workers"}
    assert "not judged" in printed.err
