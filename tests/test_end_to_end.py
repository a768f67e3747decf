"""The whole path as a user walks it: the demo's stages, each a command, from a directory that is not the project's.

The demo runs once, with few steps and a private Ray a stage, under the environment that a user has: Ray's
authentication is not switched off. Its commands, as it shows them, are then given again from a third directory.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

import rmt_core
from pipelines.data.store import SegmentStore
from pipelines.demo import main

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "prepare": {"output", "num_documents", "num_segments", "num_tokens", "num_errors"},
    "train": {"output", "checkpoint", "num_steps", "loss"},
    "evaluate": {"output", "metrics"},
    "summarise": {"output", "num_ok", "num_error"},
}
MEMORIES = {"true", "zeroed", "shuffled"}

pytestmark = [pytest.mark.slow, pytest.mark.ray]


class Demo(NamedTuple):
    folder: Path  # what --output named
    result: dict[str, Any]
    told: str  # on stderr


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run([sys.executable, str(ROOT / "pipelines" / "demo.py"), "--fast", "--output", "all of it"], folder)
    assert done.returncode == 0, done.stderr[-6000:]
    (line,) = done.stdout.splitlines()
    return Demo(folder / "all of it", json.loads(line), done.stderr)


def commands(demo: Demo) -> Iterator[list[str]]:
    """The stages' commands, as the demo shows them."""
    for line in demo.told.splitlines():
        if line.strip().startswith("$ "):
            yield shlex.split(line.strip()[2:])


def test_the_result_has_its_frozen_keys(demo: Demo) -> None:
    assert set(demo.result) >= STAGES["summarise"] | {"tokens_per_s", "peak_memory_bytes"}
    assert demo.result["num_ok"] == 1
    assert demo.result["num_error"] == 0
    assert demo.result["tokens_per_s"] > 0
    assert demo.result["peak_memory_bytes"] > 2**20


def test_every_stage_is_announced_with_its_output(demo: Demo) -> None:
    for number, job in enumerate(STAGES, 1):
        assert f"[{number}/4] {job}: " in demo.told
        assert f"{job} done in " in demo.told
    for name in ("store", "train", "evaluate", "summaries"):
        assert f"output in {demo.folder / name}" in demo.told
    assert "Token authentication" not in demo.told  # Ray's remark on a token that is of no concern to the user


def test_the_tables_show_every_memory_and_chance(demo: Demo) -> None:
    table = demo.told[demo.told.index("loss by segment index") :]
    for memory in MEMORIES:
        assert sum(line.split()[:1] == [memory] for line in table.splitlines()) == 2
    assert "guessing gives 0.0625; 8 samples a length" in table
    assert "these figures mean nothing" in table


def test_prepare_leaves_every_byte_of_the_books(demo: Demo) -> None:
    store = SegmentStore(str(demo.folder / "store"))
    tokenizer = store.load_tokenizer()
    books = {path.stem: path.read_bytes() for path in (ROOT / "pipelines" / "books" / "train").glob("*.txt")}
    assert {document.document_id for document in store.manifest} == set(books)
    for document in store.manifest:
        assert tokenizer.decode_bytes(store.read(document, 0, document.num_segments)) == books[document.document_id]


def test_training_leaves_metrics_and_a_model_that_loads(demo: Demo) -> None:
    lines = (demo.folder / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    settings = json.loads((demo.folder / "train" / "config.json").read_text())
    assert settings["dataset"]["task_fraction"] == 0.75
    model = rmt_core.load(demo.folder / "train" / "model")
    assert model.segment_len == SegmentStore(str(demo.folder / "store")).segment_len


def test_evaluation_leaves_figures_for_every_memory_a_table_and_a_plot(demo: Demo) -> None:
    folder = demo.folder / "evaluate"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(line["task"], line["memory"]) for line in lines} == {
        (task, memory) for task in ("perplexity", "recall") for memory in MEMORIES
    }
    assert (folder / "results.md").read_text().startswith("# Evaluation of model")
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_summaries_are_rows_that_name_the_model(demo: Demo) -> None:
    folder = demo.folder / "summaries"
    (line,) = (folder / "summaries.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row == pq.read_table(folder / "summaries-00000.parquet").to_pylist()[0]
    assert row["status"] == "ok"
    assert row["error"] is None
    assert row["num_tokens"] == 4096
    assert row["model"] == rmt_core.fingerprint(rmt_core.load(demo.folder / "train" / "model"))
    assert row["summary"]


@pytest.mark.parametrize("job", STAGES)
def test_the_same_command_elsewhere_does_nothing_and_prints_the_same(
    job: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the installed program does it, with paths relative to where it is given."""
    (words,) = (words for words in commands(demo) if words[:2] == ["python", f"pipelines/{job}.py"])
    output = words[words.index("--output") + 1]
    before = {path: path.stat().st_mtime_ns for path in Path(output).rglob("*")}
    relative = [os.path.relpath(word, tmp_path) if word.startswith("/") else word for word in words[2:]]
    monkeypatch.chdir(tmp_path)
    assert EntryPoint(job, f"pipelines.{job}:main", "console_scripts").load()(relative) == 0
    out, err = capfd.readouterr()
    assert "nothing to do" in err
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) >= STAGES[job]
    assert result["output"] == output
    assert {path: path.stat().st_mtime_ns for path in Path(output).rglob("*")} == before


def test_an_installed_program_does_it_too(demo: Demo, tmp_path: Path) -> None:
    (words,) = (words for words in commands(demo) if words[:2] == ["python", "pipelines/prepare.py"])
    done = run([str(Path(sys.executable).parent / "rmt-prepare"), *words[2:]], tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert json.loads(done.stdout)["output"] == str(demo.folder / "store")


@pytest.mark.long
def test_a_failing_stage_ends_the_demo_with_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path)])
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "prepare: error: " in err
    assert "prepare ended with exit code 2" in err
    assert "[2/4]" not in err
