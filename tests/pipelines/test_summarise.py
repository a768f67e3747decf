"""The summarise job: rows in input order, bad documents as error rows, output whole, errors in one line."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig

import rmt_core
from pipelines import storage, summarise
from pipelines.config import parse
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving import summariser
from pipelines.serving.batch import BatchEngine, Document, Writing

ROOT = Path(__file__).resolve().parents[2]
SEGMENT_LEN = 32
COLUMNS = ["doc_id", "summary", "num_tokens", "num_segments", "model", "status", "error"]
NEW = ("--max-new-tokens", "12", "--batch-size", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved random model with memory; the byte 0 makes its values not finite."""
    torch.manual_seed(0)
    backbone = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.5,  # so large that what is written depends on what was read
    )
    built = rmt_core.build(backbone=backbone, memory={"kind": "rmt", "num_tokens": 2}, segment_len=SEGMENT_LEN)
    with torch.no_grad():
        built.backbone.lm.get_input_embeddings().weight[0] = float("nan")
    directory = tmp_path_factory.mktemp("models") / "tiny"
    rmt_core.save(directory, built, ByteTokenizer())
    return str(directory)


def text(i: int, num_words: int) -> str:
    return " ".join(np.random.default_rng(i).choice(["book", "tale", "æon", "the", "of"], num_words))


TEXTS = {"a": text(1, 60), "c": text(3, 7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "a.txt").write_text(TEXTS["a"])
    (folder / "b.txt").write_bytes(b"good at first " * 10 + b"\xff\xfe")
    (folder / "c.txt.gz").write_bytes(gzip.compress(TEXTS["c"].encode()))
    (folder / "d.txt").write_text("")
    lines = [{"text": text(i, 5 + 9 * i), "id": f"line-{i}"} for i in range(10)]
    lines[2:2] = [{"title": "no text"}, {"text": "not \0 finite", "id": "poison"}, {"text": "twice", "id": "line-0"}]
    (folder / "e.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot JSON\n")
    pq.write_table(pa.table({"text": [text(20, 30), None], "id": ["row-0", "row-1"]}), folder / "f.parquet")
    (folder / "g.parquet").write_bytes(b"no parquet at all")
    return folder


GOOD = {"a", "c", "row-0", *(f"line-{i}" for i in range(10))}
REASONS = {
    "b": "not UTF-8 at byte 140",
    "d": "the document is empty",
    "e.jsonl:3": "no field `text`",
    "poison": "the model's values are not finite",
    "line-0": "an earlier document has this id; the first is kept",
    "e.jsonl:14": "not JSON",
    "row-1": "`text` is NoneType, not a string",
    "g.parquet": "",
}
ORDER = [
    "a", "b", "c", "d", "line-0", "line-1", "e.jsonl:3", "poison", "line-0", *(f"line-{i}" for i in range(2, 10)),
    "e.jsonl:14", "row-0", "row-1", "g.parquet",
]  # fmt: skip


def run(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any], str]:
    code = summarise.main([str(arg) for arg in args])
    out, err = capfd.readouterr()
    lines = out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, err


def rows_of(output: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(storage.join(str(output), "summaries.jsonl")).splitlines()]


def alone(model: str, doc_id: str, document: str, temperature: float = 0.0) -> str:
    """The summary of a document read with nothing beside it, without Ray."""
    loaded = summariser.load(model)
    writing = Writing(list(b"\n\nSummary: "), 12, rmt_core.Sampling(temperature, 1.0), 0)
    tokens = loaded.tokenizer.encode(document)
    return next(BatchEngine(*loaded[:2], writing, 1).summarise([Document(doc_id, [tokens])])).text


@pytest.fixture(scope="module")
def finished(
    local_ray: None, model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An output made once, with parts of two rows."""
    output = tmp_path_factory.mktemp("out") / "nested" / "summaries"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summarise, "_PART_ROWS", 2)
        arguments = ["--model", model, "--input", str(folder), "--output", str(output), *NEW]
        config, _ = parse(summarise.SummariseConfig, arguments, prog="", description="")
        return output, summarise.summarise(config)


def test_rows_come_in_input_order_and_bad_documents_are_error_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    output, result = finished
    rows = rows_of(output)
    assert [row["doc_id"] for row in rows] == ORDER
    assert all(list(row) == COLUMNS for row in rows)
    good = [row for row in rows if row["status"] == "ok"]
    assert {row["doc_id"] for row in good} == GOOD
    assert all(row["error"] is None and isinstance(row["summary"], str) for row in good)
    bad = [row for row in rows if row["status"] == "error"]
    assert all(row["summary"] is None and row["error"].startswith(REASONS[row["doc_id"]]) for row in bad)
    assert {row["doc_id"] for row in bad} == set(REASONS)
    assert (result["num_ok"], result["num_error"], result["num_documents"]) == (len(good), len(bad), len(rows))
    assert result["num_tokens"] == sum(row["num_tokens"] for row in rows)
    assert result["output"] == str(output)
    assert result["tokens_per_s"] > 0


def test_summaries_are_those_of_each_document_alone(finished: tuple[Path, dict[str, Any]], model: str) -> None:
    rows = {row["doc_id"]: row for row in rows_of(finished[0]) if row["status"] == "ok"}
    for doc_id, document in {**TEXTS, "line-9": text(9, 86), "row-0": text(20, 30)}.items():
        assert rows[doc_id]["summary"] == alone(model, doc_id, document)
        assert rows[doc_id]["num_tokens"] == len(document.encode())
        assert rows[doc_id]["num_segments"] == -(-len(document.encode()) // SEGMENT_LEN)
    assert len({row["summary"] for row in rows.values()}) > len(rows) / 2
    assert {row["model"] for row in rows.values()} == {rmt_core.fingerprint(rmt_core.load(model))}


def test_parquet_holds_the_same_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    output, _ = finished
    parts = sorted(output.glob("summaries-*.parquet"))
    assert len(parts) > 3
    assert pa.concat_tables(map(pq.read_table, parts)).to_pylist() == rows_of(output)
    assert pq.read_schema(parts[0]).equals(summariser.SCHEMA)


def test_again_does_nothing_and_other_settings_are_refused(
    finished: tuple[Path, dict[str, Any]], model: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, result = finished
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    same = ("--model", model, "--input", folder, "--output", output, *NEW)
    code, again, err = run(capfd, *same, "--batch-size", 7, "--num-workers", 3)
    assert (code, again) == (0, result)
    assert "nothing to do" in err
    code, again, err = run(capfd, *same, "--strict")
    assert (code, again) == (2, result)
    assert "documents failed" in err
    for other, named in (
        (("--prompt", "In short:"), 'prompt "\\n\\nSummary: " there, "In short:" asked for'),
        (("--input", folder / "a.txt"), "other input (removed"),
        (("--temperature", "1"), "temperature 0.0 there, 1.0 asked for"),
    ):
        given = (*same[:2], *same[4:], *other) if "--input" in other else (*same, *other)
        code, shown, err = run(capfd, *given)
        assert (code, shown) == (2, {})
        assert named in err
        assert err.startswith("summarise: error:")
        assert err.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_several_workers_give_the_same_sampled_rows(
    local_ray: None, model: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With more workers than cores leave room for, files divided, and the inputs surveyed by Ray."""
    sampled = ("--temperature", "1", "--model", model, "--input", folder / "e.jsonl", *NEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summarise, "_SMALL_BYTES", -1)
        code, result, _ = run(capfd, *sampled, "--num-workers", 2, "--output", tmp_path / "two")
    assert (code, result["num_ok"], result["num_error"]) == (0, 10, 4)
    rows = rows_of(tmp_path / "two")
    assert [row["doc_id"] for row in rows] == ORDER[4:18]
    for i in (0, 4, 9):
        row = next(row for row in rows if row["doc_id"] == f"line-{i}")
        assert row["summary"] == alone(model, f"line-{i}", text(i, 5 + 9 * i), temperature=1.0)


def test_bad_input_is_one_line_and_exit_2(
    model: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.doc").write_text("x")
    (tmp_path / "no-tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "no-tokenizer" / name).write_bytes((Path(model) / name).read_bytes())
    given = {"--model": model, "--input": folder, "--output": tmp_path / "out"}
    for changed, named in (
        ({"--model": tmp_path / "nowhere"}, "no such directory"),
        ({"--model": folder}, "no config.json"),
        ({"--model": tmp_path / "no-tokenizer"}, "tokenizer.json does not exist"),
        ({"--input": tmp_path / "nowhere"}, "nowhere"),
        ({"--input": tmp_path / "*.txt"}, "no input found"),
        ({"--output": tmp_path / "file"}, "is a file"),
        ({"--output": tmp_path / "file" / "out"}, "cannot be used"),
        ({"--output": tmp_path / "full"}, "mine.doc"),
        ({"--output": "/proc/out"}, "cannot be used"),
        ({"--output": folder}, "no input found outside"),
        ({"--top-p": "0"}, "--top-p '0'"),
        ({"--device": "tpu"}, "'cpu' or 'cuda'"),
        ({"--prompt": "\udcff"}, "needs to be UTF-8"),
        ({"--promt": "x"}, "did you mean --prompt?"),
    ):
        args = [word for pair in {**given, **changed}.items() for word in pair]
        code, result, err = run(capfd, *args)
        assert (code, result) == (2, {}), err
        assert named in err
        assert err.startswith("summarise: error: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_configuration(capfd: pytest.CaptureFixture[str]) -> None:
    code, config, _ = run(capfd, "--model", "m", "--input", "a", "b", "--output", "o", "--dry-run")
    assert code == 0
    assert (config["input"], config["prompt"], config["max_new_tokens"]) == (["a", "b"], "\n\nSummary: ", 128)


# --- as a command, with a Ray of its own --------------------------------------------------------------


def start(*args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "pipelines" / "summarise.py"), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=ROOT.parent)


@pytest.mark.s3
@pytest.mark.slow
def test_from_s3_to_s3_as_a_command(s3_bucket: str, model: str) -> None:
    place = f"{s3_bucket}/summarise"
    for path in Path(model).iterdir():
        storage.write_bytes(f"{place}/model/{path.name}", path.read_bytes())
    storage.write_bytes(f"{place}/in/a.txt", TEXTS["a"].encode())
    storage.write_bytes(f"{place}/in/b.jsonl", b'{"text": "b"}\n{}\n')
    args = ("--model", f"{place}/model", "--input", f"{place}/in", f"{place}/gone.txt", "--output", f"{place}/out")
    process = start(*args, *NEW)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("\n") == 1
    result = json.loads(stdout)
    assert (result["num_ok"], result["num_error"], result["output"]) == (2, 2, f"{place}/out")
    rows = rows_of(f"{place}/out")
    assert [(row["doc_id"], row["status"]) for row in rows] == [
        ("a", "ok"), ("b.jsonl:1", "ok"), ("b.jsonl:2", "error"), ("gone.txt", "error"),
    ]  # fmt: skip
    assert rows[0]["summary"] == alone(model, "a", TEXTS["a"])


@pytest.mark.slow
def test_ctrl_c_leaves_no_output(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("many words " * 2_000_000)
    process = start("--model", model, "--input", tmp_path / "a.txt", "--output", tmp_path / "out")
    assert process.stderr is not None
    while "reading about" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(5)  # the worker starts, or reads
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.closing(process.stderr):
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
