"""The summarise job: every document has one row whatever is killed, in input order, and errors are one line."""

import contextlib
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
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
from pipelines.config import InputError, parse
from pipelines.data.tokenise import ByteTokenizer
from pipelines.summarising import planning, rows
from pipelines.summarising.crew import Crew
from pipelines.summarising.documents import DocumentError, Style, document_seed
from pipelines.summarising.ledger import Counts, Ledger
from pipelines.summarising.strategies import Settings
from pipelines.summarising.worker import BlockWorker, Work
from tests.pipelines import tiny_instruct

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
        built.backbone.lm.get_output_embeddings().weight[0] = 0  # so that it never writes that byte
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


PLAIN = Style(12, rmt_core.Sampling(), 0)


def alone(model: str, doc_id: str, document: str, style: Style = PLAIN) -> str:
    """The summary of a document by the core's own session, with nothing beside it."""
    loaded = rmt_core.load(model)
    session = rmt_core.read(loaded, rmt_core.open_session(loaded, 1), torch.tensor([list(document.encode())]))
    seeds = [document_seed(style.seed, doc_id)]
    written = rmt_core.generate(
        loaded, [list(b"\n\nSummary: ")], style.max_new_tokens, session=session,
        sampling=style.sampling, stop_tokens=[256], seeds=seeds,
    )  # fmt: skip
    return ByteTokenizer().decode(written.tokens[0])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are made one after the other in this process, without Ray."""

    def run_here(settings: Settings, work: Work, crew: Crew) -> Counts:
        worker, made = BlockWorker(settings, work), Counts()
        for block in crew.blocks:
            made = made.plus(worker.run(block, committed=block in crew.committed))
        return made

    monkeypatch.setattr(summarise, "connect", contextlib.nullcontext)
    monkeypatch.setattr(summarise, "run_blocks", run_here)


@pytest.fixture(scope="module")
def finished(
    local_ray: None, model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An output made once, with blocks of five documents."""
    output = tmp_path_factory.mktemp("out") / "nested" / "summaries"
    arguments = ["--model", model, "--input", str(folder), "--output", str(output), *NEW, "--block-size", "5"]
    config, _ = parse(summarise.SummariseConfig, arguments, prog="", description="")
    return output, summarise.summarise(config)


def test_rows_come_in_input_order_and_bad_documents_are_error_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    output, result = finished
    rows = rows_of(output)
    assert [row["doc_id"] for row in rows] == ORDER
    assert all(list(row)[: len(COLUMNS)] == COLUMNS for row in rows)
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
    assert [len(pq.read_table(part)) for part in parts] == [5, 5, 5, 5, 1]
    assert pa.concat_tables(map(pq.read_table, parts)).to_pylist() == rows_of(output)
    assert pq.read_schema(parts[0]).equals(rows.SCHEMA)


def test_rows_tell_where_they_come_from(finished: tuple[Path, dict[str, Any]], model: str, folder: Path) -> None:
    output, _ = finished
    found = {row["doc_id"]: row for row in rows_of(output) if row["status"] == "ok"}
    assert found["a"]["source"] == str(folder / "a.txt")
    assert found["line-1"]["source"] == f"{folder / 'e.jsonl'}:2"
    assert found["a"]["sha256"] == hashlib.sha256(TEXTS["a"].encode()).hexdigest()
    assert {(row["strategy"], row["attempt"], row["url"]) for row in found.values()} == {("memory", 1, None)}
    settings = storage.read_json(str(output / "job.json"))["config_fingerprint"]
    assert {row["settings"] for row in found.values()} == {settings}
    assert all(row["elapsed_s"] > 0 and 0 < row["num_written"] <= 12 for row in found.values())
    reasons = {(row["num_written"] == 12, row["finish_reason"]) for row in found.values()}
    assert reasons <= {(True, "length"), (True, "stop"), (False, "stop")}


def test_dead_letters_are_the_errors(finished: tuple[Path, dict[str, Any]]) -> None:
    output, result = finished
    lines = [json.loads(line) for line in (output / "dead_letters.jsonl").read_text().splitlines()]
    bad = [row for row in rows_of(output) if row["status"] == "error"]
    assert [(line["doc_id"], line["error"], line["source"]) for line in lines] == [
        (row["doc_id"], row["error"], row["source"]) for row in bad
    ]
    assert len(lines) == result["num_error"]


def test_status_counts_what_is_there(finished: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]) -> None:
    output, result = finished
    code, found, _ = run(capfd, "status", "--output", output)
    assert code == 0
    assert found["complete"]
    assert {name: found[name] for name in ("num_ok", "num_error", "num_skipped", "num_documents", "num_pending")} == {
        name: result[name] for name in ("num_ok", "num_error", "num_skipped", "num_documents", "num_pending")
    }
    assert (found["num_blocks"], found["num_blocks_done"], found["num_stored_states"]) == (5, 5, 0)
    code, _, err = run(capfd, "status", "--output", output.parent)
    assert (code, err.count("\n")) == (2, 1)


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


@pytest.mark.scenario
def test_several_workers_give_the_same_sampled_rows(
    local_ray: None, model: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With more workers than cores leave room for, files divided, and the inputs surveyed by Ray."""
    sampled = ("--temperature", "1", "--model", model, "--input", folder / "e.jsonl", *NEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_SMALL_BYTES", -1)
        code, result, _ = run(capfd, *sampled, "--num-workers", 2, "--output", tmp_path / "two")
    assert (code, result["num_ok"], result["num_error"]) == (0, 10, 4)
    rows = rows_of(tmp_path / "two")
    assert [row["doc_id"] for row in rows] == ORDER[4:18]
    for i in (0, 4, 9):
        row = next(row for row in rows if row["doc_id"] == f"line-{i}")
        assert row["summary"] == alone(model, f"line-{i}", text(i, 5 + 9 * i), Style(12, rmt_core.Sampling(1.0), 0))


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
        ({"--model": tmp_path / "no-tokenizer"}, "has no tokenizer.json, with which the model was saved"),
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
        ({"--shard": "2/2"}, "i from 0 to n - 1"),
        ({"--strategy": "rolling"}, "is a model with memory: use --strategy memory"),
        ({"--segment-len": "64"}, "has its own segments"),
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
    assert (config["input"], config["prompt"], config["max_new_tokens"]) == (["a", "b"], None, 128)


def write_lines(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_files_of_one_name_in_two_inputs_are_two_documents(
    in_process: None, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for place in "xy":
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.txt").write_text(f"book {place}")
        (tmp_path / place / "2.jsonl").write_text(json.dumps({"text": f"tale {place}"}))
    given = ("--model", model, "--input", tmp_path / "x", tmp_path / "y", "--output", tmp_path / "out", *NEW)
    code, result, _ = run(capfd, *given)
    assert (code, result["num_ok"], result["num_error"]) == (0, 4, 0)
    assert [row["doc_id"] for row in rows_of(tmp_path / "out")] == ["x/1", "x/2.jsonl:1", "y/1", "y/2.jsonl:1"]
    code, again, err = run(capfd, *given)
    assert (code, again, "nothing to do" in err) == (0, result, True)


def test_a_limit_takes_the_first_and_shards_share_an_output(
    in_process: None, model: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": text(i, 9), "id": str(i)} for i in range(30)])
    given = ("--model", model, "--input", lines, "--output", tmp_path / "out", *NEW, "--limit", 11)
    _, first, _ = run(capfd, *given, "--shard", "0/2")
    assert first["num_ok"] + first["num_pending"] == 11
    assert 0 < first["num_ok"] < 11
    assert [row["doc_id"] for row in rows_of(tmp_path / "out")] == [str(n) for n in (0, 1, 2, 6, 7, 8)]
    code, second, _ = run(capfd, *given, "--shard", "1/2")
    assert (code, second["num_ok"], second["num_pending"]) == (0, 11, 0)
    assert [row["doc_id"] for row in rows_of(tmp_path / "out")] == [str(n) for n in range(11)]
    code, again, err = run(capfd, *given)
    assert (code, again) == (0, second)
    assert "nothing to do" in err
    code, _, err = run(capfd, *given[:-1], 12)
    assert (code, "limit 11 there, 12 asked for" in err) == (2, True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_commands_that_begin_a_job_together_go_on_with_one_plan(
    in_process: None,
    model: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": text(i, 9), "id": str(i)} for i in range(30)])
    output = tmp_path / "out" if kind == "directory" else f"{request.getfixturevalue('s3_bucket')}/together"
    given = ["--model", model, "--input", lines, "--output", output, "--max-new-tokens", 2]
    plan = planning.make_plan
    other: list[int] = []

    def slow(*args: Any) -> planning.Plan:
        """While this command has planned, and before it says so, another one does all of its work."""
        made = plan(*args)
        monkeypatch.setattr(summarise, "make_plan", plan)
        words = [*given, "--shard", "1/2", "--batch-size", 2, "--num-workers", 3]
        other.append(summarise.main([str(word) for word in words]))
        return made

    monkeypatch.setattr(summarise, "make_plan", slow)
    code, result, err = run(capfd, *given, "--shard", "0/2", "--batch-size", 7)
    assert (code, *other) == (0, 0), err
    assert (result["num_ok"], result["num_pending"]) == (30, 0)
    assert [row["doc_id"] for row in rows_of(output)] == [str(i) for i in range(30)]
    assert len([name for name in storage.list_names(str(output)) if name.startswith("plan-")]) == 1


def test_a_job_that_another_command_has_begun_meanwhile_otherwise_is_refused(
    in_process: None,
    model: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": text(i, 9), "id": str(i)} for i in range(3)])
    given = ["--model", model, "--input", lines, "--output", tmp_path / "out", "--max-new-tokens"]
    plan = planning.make_plan

    def slow(*args: Any) -> planning.Plan:
        made = plan(*args)
        monkeypatch.setattr(summarise, "make_plan", plan)
        assert summarise.main([str(word) for word in (*given, 2)]) == 0
        return made

    monkeypatch.setattr(summarise, "make_plan", slow)
    code, _, err = run(capfd, *given, 3)
    assert (code, "holds other summaries" in err) == (2, True)
    assert len(rows_of(tmp_path / "out")) == 3


def test_what_failed_is_tried_again_when_asked_and_nothing_else_is(
    in_process: None, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values: list[dict[str, Any]] = [{"text": text(i, 9), "id": str(i)} for i in range(6)]
    lines = write_lines(tmp_path / "in.jsonl", [*values[:3], {"id": "bad"}, *values[3:], {"text": "a\0", "id": "nan"}])
    given = ("--model", model, "--input", lines, "--output", tmp_path / "out", *NEW, "--block-size", 2)
    _, result, _ = run(capfd, *given)
    assert (result["num_ok"], result["num_error"]) == (6, 2)
    before = rows_of(tmp_path / "out")
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    code, _, err = run(capfd, *given[:6], "--retry-failed", *NEW)
    assert code == 0, err
    assert [row["attempt"] for row in rows_of(tmp_path / "out")] == [1, 1, 1, 2, 1, 1, 1, 2]
    write_lines(lines, [*values[:3], {"text": text(9, 9), "id": "bad"}, *values[3:], {"text": "a\0", "id": "nan"}])
    code, _, err = run(capfd, *given)
    assert (code, "changed in.jsonl" in err) == (2, True)
    code, result, _ = run(capfd, *given, "--retry-failed")
    assert (code, result["num_ok"], result["num_error"]) == (0, 7, 1)
    after = rows_of(tmp_path / "out")
    assert [row for row in after if row["doc_id"] not in ("bad", "nan")] == [
        row for row in before if row["doc_id"] not in ("bad", "nan")
    ]
    assert after[3]["summary"] == alone(model, "bad", text(9, 9))
    assert (after[3]["attempt"], after[7]["attempt"]) == (3, 3)
    code, again, err = run(capfd, *given)
    assert (code, again, "nothing to do" in err) == (0, result, True)
    same = {name for name, time in parts.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time}
    (plan,) = (name for name in parts if name.startswith("plan-"))
    assert same == {plan, "summaries-00000.parquet", "summaries-00002.parquet"}


def test_batch_requests_get_result_lines(
    in_process: None, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = "/v1/chat/completions"
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": TEXTS["a"]}]},
        {"messages": [{"role": "user", "content": TEXTS["a"]}], "max_tokens": 3},
        {"messages": [{"role": "user", "content": TEXTS["a"]}], "temperature": 1.0, "seed": 5},
        {"messages": [{"role": "user", "content": TEXTS["a"]}], "tools": [{}]},
        {"messages": [{"role": "user", "content": "a\0"}]},
    ]
    requests = [{"custom_id": f"r{n}", "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    lines = write_lines(tmp_path / "in.jsonl", [*requests, requests[0], {"text": "no request"}])
    _, result, _ = run(capfd, "--model", model, "--input", lines, "--output", tmp_path / "out", *NEW)
    assert (result["num_ok"], result["num_error"], result["num_skipped"]) == (4, 2, 1)
    found = [json.loads(line) for line in (tmp_path / "out" / "batch_output.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in found] == ["r0", "r1", "r2", "r3", "r4"]
    whole = found[0]["response"]["body"]
    assert whole["choices"][0]["message"]["content"] == alone(model, "r0", TEXTS["a"])
    assert whole["usage"]["prompt_tokens"] == len(TEXTS["a"].encode())
    short = found[1]["response"]["body"]["choices"][0]
    assert short["message"]["content"] == alone(model, "r1", TEXTS["a"], Style(3, rmt_core.Sampling(), 0))
    assert short["finish_reason"] == "length"
    drawn = found[2]["response"]["body"]["choices"][0]["message"]["content"]
    assert drawn == alone(model, "r2", TEXTS["a"], Style(12, rmt_core.Sampling(1.0), 5))
    assert drawn != whole["choices"][0]["message"]["content"]
    assert [line["response"] for line in found[3:]] == [None, None]
    assert "`body.tools`" in found[3]["error"]["message"]
    statuses = [row["status"] for row in rows_of(tmp_path / "out")]
    assert statuses == ["ok", "ok", "ok", "error", "error", "skipped", "ok"]


def test_instruct_models_summarise_too(in_process: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tiny_instruct.save(tmp_path / "model")
    lines = write_lines(tmp_path / "in.jsonl", [{"text": text(i, 60), "id": str(i)} for i in range(3)])
    for strategy in ("rolling", "map_reduce"):
        given = ("--model", directory, "--input", lines, "--strategy", strategy, "--segment-len", 64)
        code, result, err = run(capfd, *given, "--output", tmp_path / strategy, *NEW)
        assert (code, result["num_ok"]) == (0, 3), err
        found = rows_of(tmp_path / strategy)
        assert {row["strategy"] for row in found} == {strategy}
        assert [row["num_tokens"] for row in found] == [len(text(i, 60).encode()) for i in range(3)]
        assert all(row["num_segments"] > 3 for row in found)
        assert [row["num_segments"] for row in found] != [0] * 3
        called = summarise.Summariser(directory, strategy=strategy, max_new_tokens=12)
        (short,) = called(text(0, 3))
        assert list(short) == ["summary_text"]
        assert short == summarise.Summariser(directory, max_new_tokens=12)(text(0, 3))[0]  # one piece: one prompt
    code, result, err = run(capfd, *given[:4], "--segment-len", 64, "--output", tmp_path / "rolling", *NEW)
    assert (code, result["num_ok"], "nothing to do" in err) == (0, 3, True)  # what such a model is used with by itself


def test_called_it_gives_the_summaries_of_texts(model: str) -> None:
    summarise_texts = summarise.Summariser(model, max_new_tokens=12)
    assert summarise_texts(TEXTS["a"]) == [{"summary_text": alone(model, "0", TEXTS["a"])}]
    both = summarise_texts([TEXTS["a"], TEXTS["c"]])
    assert [found["summary_text"] for found in both] == [alone(model, "", TEXTS[name]) for name in ("a", "c")]
    assert summarise_texts([]) == []
    with pytest.raises(DocumentError, match="text 1: the document is empty"):
        summarise_texts(["full", ""])
    with pytest.raises(DocumentError, match="text 0: half of a surrogate pair at character 1"):
        summarise_texts("a\ud800")
    for wrong in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="is 0; it must be at least 1"):
            summarise.Summariser(model, **wrong)


def test_a_plan_takes_no_more_memory_for_more_documents(tmp_path: Path) -> None:
    """Of this process, by Python's own count; the fixed part is a table of entries."""
    peaks = []
    for count in (5_000, 15_000):
        lines = write_lines(tmp_path / f"{count}.jsonl", [{"text": "x" * 400, "id": str(n)} for n in range(count)])
        files = storage.expand([str(lines)], (".jsonl",))
        ledger = Ledger(str(tmp_path / str(count)))
        tracemalloc.start()
        plan = planning.make_plan(ledger, files, planning.Wishes(None, None, 8, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert plan.numbers.num_documents == count
        assert len(Ledger(ledger.output, plan.name).entries(plan.numbers.num_blocks - 1)) > 0
    assert peaks[1] < 1.1 * peaks[0]


# --- as a command, with a Ray of its own --------------------------------------------------------------


def start(*args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "pipelines" / "summarise.py"), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=ROOT.parent)


@pytest.mark.s3
@pytest.mark.long
def test_from_s3_to_s3_as_a_command(s3_bucket: str, model: str) -> None:
    place = f"{s3_bucket}/summarise"
    for path in Path(model).iterdir():
        storage.write_bytes(f"{place}/model/{path.name}", path.read_bytes())
    storage.write_bytes(f"{place}/in/a.txt", TEXTS["a"].encode())
    storage.write_bytes(f"{place}/in/b.jsonl", b'{"text": "b"}\n{}\n')
    for name in (f"plan-{'0' * 16}-00000.parquet", "SHA256SUMS"):  # of a plan that was cut off
        storage.write_bytes(f"{place}/out/{name}", b"")
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


def processes_below(pid: int) -> Iterator[tuple[int, str]]:
    """(process id, command line) of everything that a process has started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            with contextlib.suppress(OSError):
                yield child, Path(f"/proc/{child}/cmdline").read_text()


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for(process: "subprocess.Popen[str]", true: Callable[[], object]) -> None:
    """Until it is true, while the process runs."""

    def ended() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return bool(true())

    wait_until(ended)


@pytest.mark.scenario
@pytest.mark.ray
def test_killed_anywhere_the_same_command_completes_it(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An actor, then the job, by SIGKILL; then Ctrl-C; among the documents poison, a repeated one and a book."""
    values: list[dict[str, Any]] = [{"text": text(i, 600), "id": str(i)} for i in range(24)]
    values[5] = {"text": "poison \0 " * 30, "id": "5"}
    values[9] = values[8]
    lines = write_lines(tmp_path / "in.jsonl", values)
    book = text(99, 12_000)
    (tmp_path / "z.txt").write_text(book)
    output = tmp_path / "out"
    given = ("--model", model, "--input", lines, tmp_path / "z.txt", "--output", output, *NEW)
    given = (*given, "--block-size", 4, "--state-every", 16)

    def parts() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in output.glob("summaries-*.parquet")}

    process = start(*given)
    wait_for(process, lambda: len(parts()) >= 1)
    (actor,) = [pid for pid, words in processes_below(process.pid) if "MapWorker" in words]
    os.kill(actor, signal.SIGKILL)
    before = parts()
    wait_for(process, lambda: len(parts()) > len(before) + 1)
    below = [actor for actor, _ in processes_below(process.pid)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not any(is_running(pid) for pid in below))  # Ray ends without its driver
    killed = parts()
    assert before.items() <= killed.items()
    code, found, _ = run(capfd, "status", "--output", output)
    assert (code, found["complete"], found["num_blocks_done"]) == (0, False, len(killed))

    process = start(*given)
    wait_for(process, lambda: len(parts()) > len(killed))
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert killed.items() <= parts().items()

    process = start(*given)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    assert [result[name] for name in ("num_ok", "num_error", "num_skipped", "num_pending")] == [23, 1, 1, 0]
    assert killed.items() <= parts().items()  # what was committed was not made again
    rows = rows_of(output)
    assert [row["doc_id"] for row in rows] == [*(str(8 if n == 9 else n) for n in range(24)), "z"]
    assert [row["status"] for row in rows].index("error") == 5
    assert rows[9]["status"] == "skipped"
    assert rows[24]["summary"] == alone(model, "z", book)
    assert rows[23]["summary"] == alone(model, "23", text(23, 600))
    assert not any((output / "states").iterdir())
    assert not any(path.name.startswith(".") for path in output.iterdir())
