"""Quality of summaries: the usual files are read, ROUGE is that of the best reference, intervals hold the mean."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import summary_quality
from pipelines.config import InputError
from pipelines.tasks import rouge
from pipelines.tasks.rouge import Pair

TEXT = "The fox ran. The hen sat still! Did it see him? Nobody knows."


def test_the_usual_files_are_read(tmp_path: Path) -> None:
    squality = {"id": "s", "document": "A story.", "questions": [{"question": "plot?", "references": ["one", "two"]}]}
    turns = [{"speaker": "A", "content": "Hi."}, {"speaker": "B", "content": "Bye."}]
    qmsum = {"meeting_transcripts": turns, "general_query_list": [{"query": "Summarize", "answer": "They met."}]}
    plain = {"id": 7, "text": "A text.", "references": ["short"]}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, (squality, qmsum, plain))))
    assert summary_quality.read_pairs(str(tmp_path / "in.jsonl")) == [
        Pair("s", "A story.", ["one", "two"]),
        Pair("in:2", "A: Hi.\nB: Bye.", ["They met."]),
        Pair("7", "A text.", ["short"]),
    ]
    (tmp_path / "bad.jsonl").write_text('{"text": "no references"}\n')
    with pytest.raises(InputError, match="line 1 is no document with references"):
        summary_quality.read_pairs(str(tmp_path / "bad.jsonl"))


def overlap(a: str, b: str) -> float:
    """ROUGE-1 F1 of words that need no stemming."""
    first, second = a.lower().split(), b.lower().split()
    common = sum(min(first.count(word), second.count(word)) for word in set(first))
    return 2 * common / (len(first) + len(second))


def test_a_score_is_that_of_the_best_reference_and_0_without_summary() -> None:
    pair = Pair("a", TEXT, ["fox hen farm", "wolf farm"])
    found = rouge.scores([pair, pair._replace(doc_id="b")], {"a": "fox and wolf and farm"})
    best = max(overlap("fox and wolf and farm", reference) for reference in pair.references)
    assert found[0, 0] == pytest.approx(best)
    assert found[1].tolist() == [0, 0, 0]
    assert rouge.scores([pair], {"a": "wolf farm"})[0].tolist() == [1, 1, 1]


def test_baselines_are_as_long_as_asked_and_come_from_the_text() -> None:
    pair = Pair("a", TEXT, ["five words stand in here", "three words here"])
    assert rouge.reference_words(pair) == 4
    assert rouge.lead(pair, 4) == "The fox ran. The"
    assert rouge.random_sentences(pair, 0, seed=0) == ""
    drawn = {rouge.random_sentences(pair, 4, seed) for seed in range(30)}
    sentences = ["The fox ran.", "The hen sat still!", "Did it see him?", "Nobody knows."]
    for text in drawn:
        places = [TEXT.index(sentence) for sentence in sentences if sentence in text]
        assert places == sorted(places)
        assert text == " ".join(sentence for sentence in sentences if sentence in text)
        assert len(text.split()) >= 4
    assert len(drawn) > 5


def test_the_interval_holds_the_mean_and_narrows_with_documents() -> None:
    values = np.random.default_rng(0).random(400)
    few, many = rouge.mean(values[:20]), rouge.mean(values)
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert rouge.mean(np.full(9, 0.5)) == (0.5, 0.5, 0.5)


def test_a_table_is_written_from_finished_summaries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [{"id": str(n), "text": TEXT, "references": ["The fox ran away."]} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rows = [{"doc_id": str(n), "summary": "The fox ran away.", "status": "ok", "model": "m"} for n in range(2)]
    rows.append({"doc_id": "2", "summary": None, "status": "error", "model": "m"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summaries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out")]
    code = summary_quality.main([*given, "--summaries", f"mine={tmp_path / 'mine'}"])
    printed: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert code == 0
    assert printed["means"]["mine"]["rouge2"] == pytest.approx(2 / 3)  # what failed counts as 0
    table = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["lead", "random sentences", "mine"]
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["systems"]["mine"]["num_summaries"] == 2
    for wrong in ("mine", "mine=", f"mine={tmp_path}"):
        assert summary_quality.main([*given, "--summaries", wrong]) == 2


def test_summaries_of_other_documents_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [{"id": str(n), "text": TEXT, "references": ["The fox ran away."]} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "documents.jsonl").write_text(json.dumps({"id": "0", "text": TEXT}) + "\n")
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out"), "--model", str(tmp_path)]
    assert summary_quality.main(given) == 2
    assert "holds summaries of other documents" in capfd.readouterr().err


def test_texts_to_train_on_are_documents_with_prompt_and_reference(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = {"id": "s", "text": TEXT, "references": ["one", "two"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out"), "--training-texts"]
    assert summary_quality.main(given) == 0
    assert json.loads(capfd.readouterr().out)["num_texts"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert lines == [
        {"id": "s/0", "text": f"{TEXT}\n\nSummary: one"},
        {"id": "s/1", "text": f"{TEXT}\n\nSummary: two"},
    ]
