"""lm-evaluation-harness runs its tasks on a model with memory, offline; without it, the job says so."""

import functools
import importlib.util
import json
import logging
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


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness's thousands of tasks, which take long to list."""
    tasks = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(logging, "raiseExceptions", False)  # libraries log to the closed stderr of the first test


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
    assert writing_of({"num_beams": 1, "max_new_tokens": 5}) == Writing(5)  # greedy


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 4}, "num_beams 4"),
        ({"penalty": 1}, "'penalty'"),
        ({"max_gen_toks": "many"}, "max_gen_toks 'many'"),
        ({"max_gen_toks": 7.5}, "max_gen_toks 7.5"),
        ({"max_gen_toks": None}, "max_gen_toks None"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"until": 5}, "until 5"),
        ({"until": ["a", 5]}, r"until \['a', 5\]"),
        ({"do_sample": "no"}, "do_sample 'no'"),
        ({"do_sample": True, "temperature": "hot"}, "'hot'"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"top_p": "most"}, "'most'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": None}, "top_p"),
    ],
)
def test_a_request_that_cannot_be_written_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        writing_of(settings)


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


ROWS = [{"question": f"Is it {i}?", "answer": i % 3, "choices": '["yes", "no", "perhaps"]'} for i in range(4)]


def task_file(kind: str = "multiple_choice", rest: str = CHOICE, name: str = "mine", data: str = "rows.jsonl") -> str:
    """A task of four questions, in rows.jsonl of the working directory."""
    return TASK.format(name=name, kind=kind, data=data) + rest


WORDS = ["--model", "model", "--include-path", "tasks", "--output", "out"]


def write_tasks(texts: dict[str, str], model: RecurrentModel) -> None:
    """Task files, what they read, and a model, in the working directory."""
    rmt_core.save(Path("model"), model, BYTES)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("tasks").mkdir()
    for name, text in texts.items():
        Path("tasks", f"{name}.yaml").write_text(text, encoding="latin-1")


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why nothing was done; others may warn before it."""
    lines = capsys.readouterr().err.splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    (line,) = (line for line in lines if line.startswith("harness: error: "))
    assert line == lines[-1]
    return line


FAULTY = {
    "missing data": (task_file(data="gone.jsonl"), "FileNotFoundError: Unable to find '"),
    "broken data": (task_file(data="tasks/mine.yaml"), "DatasetGenerationError"),
    "no questions": (task_file(data="empty.jsonl"), "StopIteration"),
    "no data": ("task: mine", "it names no data; give dataset_path"),
    "broken template": (task_file().replace("{{question}}", "{{question"), "TemplateSyntaxError"),
    "undefined field": (task_file().replace("{{question}}", "{{quest}}"), "'quest' is undefined"),
    "unknown setting": (task_file() + "doc_to_txt: a\n", "'doc_to_txt'"),
    "unknown split": (task_file().replace("test_split: test", "test_split: tset"), "'tset'"),
    "unknown kind": (task_file(kind="choice"), "invalid output_type 'choice'"),
    "missing function": (task_file().replace('"{{question}}"', "!function utils.ask"), "'utils'"),
    "a later row": (
        task_file(rest='doc_to_choice: "{{choices if answer < 2 else 0 / 0}}"\n'),
        "cannot render its questions: ZeroDivisionError",
    ),
    "tokens in words": (task_file("generate_until", "generation_kwargs: {max_gen_toks: many}"), "max_gen_toks 'many'"),
    "beams": (task_file("generate_until", "generation_kwargs: {num_beams: 3}"), "num_beams 3"),
    "unknown generation": (task_file("generate_until", "generation_kwargs: {penalty: 3}"), "'penalty'"),
    "temperature in words": (task_file("generate_until", "generation_kwargs: {temperature: hot}"), "'hot'"),
    "code": (task_file() + "unsafe_code: true\n", "runs code that the model has written"),
    "pictures": (task_file() + "doc_to_image: question\n", "pictures"),
    "no metric": (task_file(rest=CHOICE.replace("acc", "bypass")), "bypass"),
    "empty group": ("group: mine\ntask: []\n", "there are no tasks in it"),
    "group of unknown": ("group: mine\ntask: [theirs]\n", "there is no task theirs"),
    "not YAML": ("task: [mine\n", "mine.yaml, which cannot be read: ParserError"),
    "not UTF-8": ("task: mine\ndescription: caf\xe9\n", "mine.yaml, which cannot be read: ReaderError"),
    "no mapping": ("- mine\n", "mine.yaml, which cannot be read: ValueError"),
    "missing include": ("include: gone.yaml\ntask: mine\n", "mine.yaml, which cannot be read: FileNotFoundError"),
    "name of another type": ("task: 2020-01-01\n", "is datetime.date(2020, 1, 1)"),
    "tag of another type": (task_file() + "tag: [5]\n", "mine.yaml: the name of a task, group or tag is 5"),
}


@needs_harness
@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize(("text", "says"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_task_is_told_in_one_line_before_anything_is_measured(
    text: str,
    says: str,
    model: RecurrentModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tasks({"mine": text}, model)
    Path("empty.jsonl").touch()
    monkeypatch.setattr(importlib.import_module("lm_eval"), "simple_evaluate", lambda **_: pytest.fail("measured"))
    assert harness.main([*WORDS, "--tasks", "mine"]) == 2
    line = refusal(capsys)
    assert says in line
    assert "mine" in line
    assert not Path("out").exists()


@needs_harness
@pytest.mark.usefixtures("own_tasks_alone")
def test_a_wildcard_stands_for_the_tasks_that_it_matches(
    model: RecurrentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["mine_a", "mine_b", "other"]
    write_tasks({name: task_file(name=name) for name in names} | {"broken": "task: [mine"}, model)
    assert harness.main([*WORDS, "--tasks", "mine_b,mine_*"]) == 0
    printed, told = capsys.readouterr()
    assert {line["task"] for line in json.loads(printed)["metrics"]} == {"mine_a", "mine_b"}
    assert storage.read_json("out/config.json")["tasks"] == ["mine_b", "mine_a"]
    assert "without the task in tasks/broken.yaml, which cannot be read" in told
    assert harness.main([*WORDS, "--tasks", "mine_b,mine_a"]) == 0  # the same, measured already
    assert harness.main([*WORDS, "--tasks", "none*"]) == 2
    assert "--tasks none*: lm-evaluation-harness has no such task" in refusal(capsys)


@needs_harness
@pytest.mark.usefixtures("own_tasks_alone")
def test_what_the_command_line_asks_of_fine_tasks_in_vain_is_refused(
    model: RecurrentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    group = "group: mine_all\ntask: [mine]\n"
    write_tasks({"mine": task_file(), "all": group, "more": group.replace("all", "more")}, model)
    assert harness.main([*WORDS, "--tasks", "mine", "--num_fewshot", "9"]) == 2
    assert "cannot render its questions: ValueError: Sample larger than population" in refusal(capsys)
    assert harness.main([*WORDS, "--tasks", "mine*"]) == 2
    assert "Duplicate task 'mine': found in both" in refusal(capsys)
    assert not Path("out").exists()


@needs_harness
@pytest.mark.usefixtures("own_tasks_alone")
def test_one_beam_is_greedy(
    model: RecurrentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tasks({"mine": task_file("generate_until", WRITING.replace("{until", "{num_beams: 1, until"))}, model)
    assert harness.main([*WORDS, "--tasks", "mine"]) == 0
    assert [line["metric"] for line in json.loads(capsys.readouterr().out)["metrics"]] == ["exact_match"]


@needs_harness
@pytest.mark.usefixtures("own_tasks_alone")
def test_a_fault_while_measuring_keeps_its_traceback(
    model: RecurrentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tasks({"mine": task_file()}, model)

    def failing(*_: Any) -> None:
        raise ValueError("a fault of the program")

    monkeypatch.setattr("pipelines.tasks.harness.score", failing)
    assert harness.main([*WORDS, "--tasks", "mine"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1] == "ValueError: a fault of the program"
