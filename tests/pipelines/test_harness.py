"""lm-evaluation-harness runs its tasks on a model with memory, offline; without it, the job says so."""

import importlib.util
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rmt_core
from pipelines import harness, storage
from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks.continuations import Asked, Writing, score, write
from pipelines.tasks.harness import as_harness_model, writing_of
from rmt_core import RecurrentModel, Sampling
from tests.rmt_core.tiny import MEMORIES, tiny_model

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BYTES = ByteTokenizer()
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: run make test-harness"
)

LONG = (
    "It was a dark and stormy night, " * 20 + "again."
)  # far beyond the model's segment, and its backbone's positions

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metadata: {{version: 1.0}}
"""
CHOICE = 'doc_to_choice: ["yes", "no", "perhaps"]\nmetric_list: [{metric: acc}]\n'
WRITING = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 7}\nmetric_list: [{metric: exact_match}]\n'
ROLLING = "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n"


@pytest.fixture(scope="module")
def model() -> RecurrentModel:
    return tiny_model(MEMORIES["rmt"], segment_len=6, vocab_size=BYTES.vocab_size)


def asking(*arguments: Any) -> SimpleNamespace:
    """A request as the harness makes it."""
    return SimpleNamespace(args=arguments)


def test_without_the_harness_the_job_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name))
    assert harness.main(["--model", "nowhere", "--tasks", "arc", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lm_eval" in line
    assert "pip install" in line
    assert not (tmp_path / "out").exists()


def test_how_a_request_wants_its_text() -> None:
    assert writing_of({}) == Writing(256)
    assert writing_of({"until": "\n", "max_gen_toks": 5, "temperature": 1.0}) == Writing(5, ("\n",))
    drawn = {"until": ["a", "b"], "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert writing_of(drawn) == Writing(256, ("a", "b"), Sampling(0.5, 0.9))
    with pytest.raises(InputError, match="num_beams"):
        writing_of({"num_beams": 4})


def test_a_metric_that_is_no_number_is_null_and_loses_no_other(tmp_path: Path) -> None:
    figures = {"alias": "a", "acc,none": 0.5, "ppl,none": math.nan, "ppl_stderr,none": math.inf, "bits,none": -math.inf}
    rest = {name: {"a": 1} for name in ("versions", "n-shot", "n-samples", "higher_is_better")}
    storage.write_json(str(tmp_path / "results.json"), harness.kept({"results": {"a": figures}, **rest, "other": 1}))
    found = storage.read_json(str(tmp_path / "results.json"))
    assert found["results"]["a"] == {**figures, "ppl,none": None, "ppl_stderr,none": None, "bits,none": None}
    assert found["n-shot"] == {"a": 1}
    printed = {line["metric"]: line["value"] for line in harness._metrics(found["results"])}
    assert printed == {"acc": 0.5, "ppl": None, "bits": None}


@needs_harness
def test_requests_are_answered_in_one_stream_as_each_alone(model: RecurrentModel) -> None:
    adapter = as_harness_model(model, BYTES, batch_size=3)
    pairs = [(LONG, " yes"), (LONG, " no"), ("", "It was"), ("a ", "b"), (LONG[:7], "x" * 40)]
    together = adapter.loglikelihood([asking(*pair) for pair in pairs])
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = adapter.loglikelihood([asking(*pair)])
        assert found[0] == pytest.approx(alone[0], abs=1e-9)
        assert found[1] == alone[1]
    whole = score(model, [Asked(list(LONG.encode()), list(b" yes"))])[0]
    assert together[0][0] == pytest.approx(whole.log_likelihood, abs=1e-9)
    rolling = adapter.loglikelihood_rolling([asking(LONG), asking("ab")])
    for text, found in zip((LONG, "ab"), rolling, strict=True):
        assert found == pytest.approx(score(model, [Asked([256], list(text.encode()))])[0].log_likelihood, abs=1e-9)
    settings = {"until": ["\n"], "max_gen_toks": 9}
    requests = [asking(LONG, settings), asking("ab", {"max_gen_toks": 3}), asking(LONG[:50], settings)]
    assert adapter.generate_until(requests) == [
        write(model, BYTES, [list(LONG.encode())], Writing(9, ("\n",)))[0],
        write(model, BYTES, [list(b"ab")], Writing(3))[0],
        write(model, BYTES, [list(LONG[:50].encode())], Writing(9, ("\n",)))[0],
    ]


@needs_harness
@pytest.mark.long
def test_tasks_in_files_run_offline(model: RecurrentModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{LONG}Is it {i}?", "answer": i % 3} for i in range(4)]
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "mine_choice": ("multiple_choice", CHOICE),
        "mine_writing": ("generate_until", WRITING),
        "mine_rolling": ("loglikelihood_rolling", ROLLING),
    }
    for name, (kind, rest) in kinds.items():
        text = TASK.format(name=name, kind=kind, data=data) + rest
        if kind == "loglikelihood_rolling":
            text = text.replace('"{{question}}"', '""').replace('"{{answer}}"', '"{{question}}"')
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    rmt_core.save(tmp_path / "model", model, BYTES)
    words = ["--model", str(tmp_path / "model"), "--include-path", str(tmp_path / "tasks")]
    words += ["--tasks", ",".join(kinds), "--output", str(tmp_path / "out")]
    assert harness.main(words) == 0
    printed = capsys.readouterr().out
    found = {(line["task"], line["metric"]): line["value"] for line in json.loads(printed)["metrics"]}
    texts = [list(row["question"].encode()) for row in rows]
    scores = [
        [
            score(model, [Asked(text, list(f" {choice}".encode()))])[0].log_likelihood
            for choice in ("yes", "no", "perhaps")
        ]
        for text in texts
    ]
    right = [max(range(3), key=one.__getitem__) == row["answer"] for one, row in zip(scores, rows, strict=True)]
    assert found["mine_choice", "acc"] == pytest.approx(sum(right) / 4)
    nats = sum(score(model, [Asked([256], text)])[0].log_likelihood for text in texts)
    bits = -nats / sum(map(len, texts)) / 0.6931471805599453
    assert found["mine_rolling", "bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert ("mine_writing", "exact_match") in found
    assert harness.main(words) == 0  # measured already
    assert json.loads(capsys.readouterr().out)["metrics"] == json.loads(printed)["metrics"]
    with (tmp_path / "tasks" / "mine_choice.yaml").open("a") as file:
        file.write("# other questions\n")
    assert harness.main(words) == 2
    assert "holds something else" in capsys.readouterr().err


@needs_harness
@pytest.mark.long
def test_the_readmes_command_runs(
    model: RecurrentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = (line for line in README.splitlines() if line.startswith("python pipelines/harness.py "))
    (tmp_path / "my-tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"question": "Is it?", "answer": 0}\n')
    task = TASK.format(name="mine", kind="multiple_choice", data=tmp_path / "rows.jsonl") + CHOICE
    (tmp_path / "my-tasks" / "mine.yaml").write_text(task)
    rmt_core.save(tmp_path / "runs" / "first" / "model", model, BYTES)
    monkeypatch.chdir(tmp_path)
    assert harness.main(shlex.split(line)[2:]) == 0
    assert {found["task"] for found in json.loads(capsys.readouterr().out)["metrics"]} == {"mine"}
    assert (tmp_path / "runs" / "first-harness").is_dir()


@needs_harness
@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "says"),
    [(["--tasks", "no_such_task_at_all"], "no such task"), (["--include-path", "nowhere"], "no such folder")],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    change: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "nowhere", "--output", str(tmp_path / "out")]
    words += change if change[0] == "--tasks" else ["--tasks", "arc_easy", *change]
    assert harness.main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("harness: error: ")
    assert says in line
