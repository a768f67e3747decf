"""The evaluate job as a command: what it writes, what it refuses, and its report."""

import contextlib
import io
import itertools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
import pytest
import ray
import torch
from matplotlib.axes import Axes

import rmt_core
from pipelines import evaluate, storage
from pipelines.config import InputError
from pipelines.data import store
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, base, questions, report, report_plot
from pipelines.tasks.base import MEMORIES, Figure, Material
from pipelines.tasks.cost import COSTS, Meter
from pipelines.tasks.held_out import BOOK, StoreHeldOut, TextHeldOut, open_held_out
from pipelines.tasks.intervals import wilson_interval
from pipelines.tasks.perplexity import stretch_bounds
from pipelines.tasks.report import Subject
from pipelines.tasks.running import Run, _num_texts, check_compiler, load
from pipelines.tasks.samples import Answer, Sample
from pipelines.tasks.subject import subject_of
from tests.rmt_core.tiny import RMT, tiny_model

BYTES = ByteTokenizer()
NAMES = ["config.json", "costs.jsonl", "metrics.jsonl", "results.md", "results.png"]  # of what it writes
HERE = Material(BYTES, TextHeldOut("letters", "f", np.arange(97, 123)))
PROSE = BOOK.read_text()[5000:7000]


class Command(NamedTuple):
    code: int
    out: list[str]  # lines of stdout
    err: list[str]

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert len(self.out) == 1
        return json.loads(self.out[0])


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Command]:
    def run(*argv: object) -> Command:
        capfd.readouterr()
        code = evaluate.main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        return Command(code, out.splitlines(), err.splitlines())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    rmt_core.save(directory, tiny_model(RMT, segment_len=16, vocab_size=257), BYTES)
    return directory


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(PROSE)
    return file


def keep_nothing(run: Run, figures: list[Figure]) -> None:
    """What is measured is looked at and not written."""


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_the_tasks_measure_and_does_it_once(
    local_ray: None, run: Callable[..., Command], model: Path, prose: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "out"
    settings = ["--data", prose, "--num-samples", 4, "--batch-size", 3, "--seed", 7]
    words = ["--model", model, "--task", "perplexity,recall", "--lengths", "64,0.1k", "--output", output, *settings]
    assert run(*words).code == 2  # 0.1k is no count
    words[5] = "64,100"
    result = run(*words).result

    lines = lines_of(output)
    loaded, _ = load(str(model))
    material = Material(BYTES, open_held_out(str(prose), BYTES), num_samples=4, batch_size=3, seed=7)
    wanted = [
        {"task": task, "length": length, **{k: v for k, v in figure._asdict().items() if v is not None}}
        for task in ("perplexity", "recall")
        for length in (64, 100)
        for figure in TASKS[task].measure(loaded, length, material)
    ]
    costs = [json.loads(line) for line in (output / "costs.jsonl").read_text().splitlines()]
    assert [(line["task"], line["length"], line["metric"]) for line in costs] == [
        (task, length, metric) for task in ("perplexity", "recall") for length in (64, 100) for metric in COSTS
    ]
    assert all(line["value"] > 0 for line in costs)
    num_at_once = min(4, int(ray.cluster_resources()["CPU"]))
    assert [line["num_at_once"] for line in costs] == [num_at_once] * len(costs)
    assert "| tokens | runs at once | value |" in (output / "results.md").read_text()
    for line, want in zip(lines, wanted, strict=True):
        assert line["state_floats"] == 3 * 32
        assert line["num_parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
        assert line["segment_len"] == 16
        assert line["seed"] == 7
        assert {key: line[key] for key in want} == {**want, "value": pytest.approx(want["value"], abs=1e-9)}
    assert {line["memory"] for line in lines} == set(MEMORIES)
    assert {line["task"]: line.get("background") for line in lines} == {"perplexity": None, "recall": "prose"}
    assert result["output"] == str(output)
    assert result["metrics"] == [line for line in lines if "segment" not in line]

    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "costs.jsonl",
        "metrics.jsonl",
        "results.md",
        "results.png",
    ]
    config = json.loads((output / "config.json").read_text())
    assert config["config"]["lengths"] == [64, 100]
    table = (output / "results.md").read_text()
    told = ["--task perplexity,recall", "--lengths 64,100", f"--data {prose}", "--seed 7", "--output DIR"]
    assert all(word in table.splitlines()[-1] for word in told)
    assert config["made_by"]["torch"] == torch.__version__
    if (Path(__file__).resolve().parents[2] / ".git").exists():
        assert f"commit {config['made_by']['commit']}" in table
    assert matplotlib.image.imread(output / "results.png").shape[1] > 1000
    times = [path.stat().st_mtime_ns for path in output.iterdir()]
    again = run(*words)
    assert again.result == result
    assert "nothing to do" in "\n".join(again.err)
    assert [path.stat().st_mtime_ns for path in output.iterdir()] == times

    turned = [{"perplexity,recall": "recall,perplexity", "64,100": "100,64"}.get(str(word), word) for word in words]
    assert run(*turned).result == result
    table, plot = (output / "results.md").read_bytes(), (output / "results.png").read_bytes()
    (output / "results.md").unlink()
    (output / "results.png").unlink()
    again = run(*words)
    assert again.result == result
    assert "nothing to do" not in "\n".join(again.err)
    assert (output / "results.md").read_bytes() == table
    assert (output / "results.png").read_bytes() == plot
    for name in ("metrics.jsonl", "costs.jsonl"):
        (output / name).rename(tmp_path / name)
        lost = run(*words)
        assert lost.code == 2
        assert f"is a finished evaluation without {name}; put it back" in lost.err[-1]
        (tmp_path / name).rename(output / name)

    other = run(*words[:-1], 8)
    assert other.code == 2
    assert "seed 7 there, 8 asked for" in other.err[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "QUESTIONS_VERSION", 1)
        other = run(*words)
    assert other.code == 2
    assert f"questions_version {base.QUESTIONS_VERSION} there, 1 asked for" in other.err[-1]
    assert lines_of(output) == lines


def test_an_interrupted_run_is_done_again(
    local_ray: None, run: Callable[..., Command], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.partial.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("half a li")
    storage.seal(tmp_path)
    words = ["--task", "recall", "--background", "noise", "--lengths", 64, "--num-samples", 1, "--output", tmp_path]
    result = run("--model", model, *words).result
    found = result["metrics"]
    assert [line["memory"] for line in found] == ["true", "zeroed"]  # one sample has no neighbour
    assert lines_of(tmp_path) == result["metrics"]
    assert storage.list_names(str(tmp_path)) == NAMES


def test_finished_runs_are_kept_and_only_the_rest_is_measured(
    local_ray: None, run: Callable[..., Command], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--task", "recall,sorting", "--background", "noise", "--lengths", "96,128", "--num-samples", 3]
    words += ["--seed", 4, "--seeds", 2, "--model", model]
    wanted = run(*words, "--output", tmp_path / "whole").result["metrics"]
    measure, asked = evaluate._measure, []

    def broken(runs: list[Run], material: Material, keep: Callable[..., None]) -> dict[Run, list[Figure]]:
        measure(runs[:3], material, keep)
        raise KeyboardInterrupt

    def watched(runs: list[Run], material: Material, keep: Callable[..., None]) -> dict[Run, list[Figure]]:
        asked.extend(runs)
        return measure(runs, material, keep)

    output = tmp_path / "broken"
    monkeypatch.setattr(evaluate, "_measure", broken)
    assert run(*words, "--output", output).code == 130
    assert len([name for name in storage.list_names(str(output)) if name.startswith("run-")]) == 3
    other = run(*words, "--batch-size", 2, "--output", output)
    assert other.code == 2
    assert "unfinished evaluation made otherwise: batch_size 8 there, 2 asked for; go on" in other.err[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "QUESTIONS_VERSION", 1)
        assert run(*words, "--output", output).code == 2
    monkeypatch.setattr(evaluate, "_measure", watched)
    turned = [{"recall,sorting": "sorting,recall", "96,128": "128,96"}.get(str(word), word) for word in words]
    found = run(*turned, "--output", output).result["metrics"]
    assert sorted(found, key=wanted.index) == wanted
    assert len(asked) == 5
    assert {(line["task"], line["length"], line["seed"]) for line in wanted} == {
        (task, length, seed) for task in ("recall", "sorting") for length in (96, 128) for seed in (4, 5)
    }
    assert storage.list_names(str(output)) == NAMES


@pytest.mark.s3
def test_models_are_read_from_s3_and_results_written_there(
    local_ray: None, s3_bucket: str, run: Callable[..., Command], model: Path, prose: Path
) -> None:
    storage.upload_directory(model, f"{s3_bucket}/models/tiny")
    storage.write_bytes(f"{s3_bucket}/prose.txt", prose.read_bytes())
    loaded, _ = load(f"{s3_bucket}/models/tiny")
    assert rmt_core.fingerprint(loaded) == rmt_core.fingerprint(load(str(model))[0])
    words = ["--task", "perplexity", "--lengths", 500, "--output", f"{s3_bucket}/results"]
    words += ["--model", model, "--data", f"{s3_bucket}/prose.txt"]
    result = run(*words).result
    lines = storage.read_bytes(f"{s3_bucket}/results/metrics.jsonl").decode().splitlines()
    assert [item for item in map(json.loads, lines) if "segment" not in item] == result["metrics"]
    assert storage.list_names(result["output"]) == NAMES
    assert "nothing to do" in "\n".join(run(*words).err)
    with pytest.raises(InputError, match="nothing: there is no such directory"):
        load(f"{s3_bucket}/models/nothing")


def test_tasks_that_do_not_read_a_setting_are_named(
    local_ray: None, run: Callable[..., Command], model: Path, tmp_path: Path
) -> None:
    words = ["--model", model, "--task", "recall,capacity_1", "--depths", "0,1", "--lengths", 128, "--num-samples", 2]
    assert "--depths is not read by capacity_1" in "\n".join(run(*words, "--output", tmp_path / "out").err)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--task perplexity --lengths 8", ["length 8", "segment of 16", "at least 16"]),
        ("--task perplexity --lengths 4k", ["length 4096", "longer", "at most 2000"]),
        ("--task perplexity --lengths 64 --limit-segments 2", ["--limit-segments 2", "at least 4"]),
        ("--task recall --lengths 32", ["recall at length 32", "are enough"]),
        ("--task perplexty", ["--task", "did you mean perplexity?"]),
        ("--task zzz", ["'zzz'", "known are perplexity, recall"]),
        ("--lengths 4x", ["--lengths", "4x", "whole number"]),
        ("--lengths ,", ["--lengths needs at least 1 value"]),
        ("--lengths 0", ["--lengths", "0", "greater than or equal to 1"]),
        ("--lengths 99999999999999999999", ["--lengths", "99999999999999999999", "less than or equal to 4294967296"]),
        ("--lengths 64,64", ["64", "more than once"]),
        ("--batch-size 1", ["--batch-size", "1", "greater than or equal to 2"]),
        ("--device tpu", ["--device", "tpu", "cpu"]),
        ("--task perplexity --num-samples 3", ["--num-samples", "not read by perplexity"]),
        ("--task recall --background noise", ["--data", "not read by recall"]),
        ("--task perplexity --seeds 2", ["--seeds", "not read by perplexity"]),
        ("--task memorise --depths 0.5", ["--depths", "not read by memorise"]),
        ("--task recall --depths 0.5,1.5", ["1.5", "from 0 (earliest) to 1"]),
        ("--task recall --depths 0,1 --num-samples 1", ["2 depths for 1 samples"]),
        ("--task qa3 --lengths 100", ["qa3 at length 100", "need more tokens", "are enough"]),
        ("--task perplexity --compile yes", ["--compile", "not read by perplexity"]),
        ("--data {root}/nothing.txt", ["nothing.txt", "no such file"]),
        ("--data {root}/empty.txt", ["empty.txt", "empty"]),
        ("--data {root}/latin1.txt", ["latin1.txt", "not UTF-8", "byte 3"]),
        ("--data {root}", ["without store.json", "segment store"]),
        ("--model {root}/nothing", ["nothing", "no such directory"]),
        ("--model {root}", ["--model", "config.json"]),
        ("--model {root}/bare", ["tokenizer", "does not exist"]),
        ("--model {root}/small", ["257 ids", "vocabulary 100"]),
        ("--output {model}", ["not empty", "model.safetensors"]),
        ("--attention full", ["--attention full", "for models of memory none"]),
        ("--attention full --compile yes", ["--compile", "for --device cpu and --attention segments"]),
        ("--attention full --ablations no", ["--ablations", "not read with --attention full"]),
        ("--memory-limit 4g", ["--memory-limit", "not read with --attention segments"]),
        ("--segment-len 24", ["--segment-len", "not read with --attention segments"]),
        ("--output {root}/empty.txt", ["is a file"]),
        ("--lenghts 64", ["--lenghts", "did you mean --lengths?"]),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_ray_starts(
    words: str,
    says: list[str],
    run: Callable[..., Command],
    wrong: Path,
    model: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "connect", lambda *_: pytest.fail("Ray was started"))
    defaults = {"--model": model, "--output": tmp_path / "out", "--data": prose, "--lengths": 64}
    given = [word.format(root=wrong, model=model) for word in words.split()]
    kept = [word for name, value in defaults.items() if name not in given for word in (name, value)]
    command = run(*kept, *given)
    assert command.code == 2
    assert command.out == []
    assert len(command.err) == 1
    assert command.err[0].startswith("evaluate: error: ")
    assert all(word in command.err[0] for word in says), command.err[0]
    assert not (tmp_path / "out").exists()


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(InputError, match="--compile needs a C.. compiler"):
        check_compiler()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that cannot be used."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty.txt").write_text("")
    (root / "latin1.txt").write_bytes("Caf\u00e9".encode("latin1"))
    rmt_core.save(root / "bare", tiny_model(segment_len=16, vocab_size=257))
    rmt_core.save(root / "small", tiny_model(segment_len=16, vocab_size=100), BYTES)
    return root


def test_a_gpu_that_is_not_there_is_refused(
    local_ray: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(evaluate, "connect", lambda _: contextlib.nullcontext())
    output = tmp_path / "figures"
    config = evaluate.EvaluateConfig(model=str(model), output=str(output), task=["recall"], lengths=[64], device="cuda")
    with pytest.raises(InputError, match="no GPU"):
        evaluate.evaluate(config)
    assert not output.exists()


def test_a_fault_of_the_input_seen_by_a_worker_is_reported_as_such(local_ray: None, tmp_path: Path) -> None:
    run = Run("recall", 64, str(tmp_path / "gone"), "cpu", 0)
    with pytest.raises(InputError, match="gone: there is no such directory") as error:
        evaluate._measure([run], HERE, keep_nothing)
    assert "\n" not in str(error.value)


def test_as_many_runs_are_under_way_as_there_are_devices_for() -> None:
    assert [evaluate._at_once(*pair) for pair in ((4, 2.0), (1, 16.0), (5, 0.0))] == [2, 1, 1]


def test_a_peak_is_that_of_the_run_and_not_of_those_before() -> None:
    large = np.ones(2**26, dtype=np.uint8)
    del large
    small = {figure.metric: figure.value for figure in Meter("cpu").figures()}
    busy = Meter("cpu")
    again = np.ones(2**26, dtype=np.uint8)
    found = {figure.metric: figure.value for figure in busy.figures()}
    assert set(found) == set(COSTS)
    assert found["peak_bytes"] - small["peak_bytes"] > 0.9 * again.nbytes
    assert 0 <= small["seconds"] < found["seconds"]


# --- held-out text ----------------------------------------------------------------------------------


def make_store(directory: Path, texts: list[bytes], segment_len: int) -> None:
    documents, row = [], 0
    directory.mkdir()
    with store.PartWriter(directory / store.part_name(0)) as writer:
        for name, text in enumerate(texts):
            tokens = np.frombuffer(text, dtype=np.uint8).astype(np.int32)
            pieces = [tokens[i : i + segment_len] for i in range(0, len(tokens), segment_len)]
            for number, piece in enumerate(pieces):
                writer.add(str(name), number, piece)
            size = len(tokens)
            documents.append(store.DocumentEntry(str(name), "", size, size, len(pieces), store.part_name(0), row, ""))
            row += len(pieces)
    store.write_manifest(str(directory), documents)
    content = {"format": store.FORMAT, "segment_len": segment_len, "tokenizer_fingerprint": BYTES.fingerprint}
    counts = {"num_documents": len(texts), "num_segments": row, "num_tokens": 0, "input_fingerprint": "i"}
    storage.write_json(str(directory / store.STORE), {**content, **counts})


def test_a_store_is_read_at_any_place_also_by_another_process(tmp_path: Path) -> None:
    texts = [bytes(range(100)), bytes(range(100, 137))]
    make_store(tmp_path / "store", texts, segment_len=7)
    held_out = open_held_out(str(tmp_path / "store"), BYTES)
    assert held_out.num_tokens == [100, 37]
    for copy in (held_out, pickle.loads(pickle.dumps(held_out))):
        for document, start, stop in ((0, 0, 100), (0, 6, 8), (0, 13, 13), (0, 98, 100), (1, 0, 37), (1, 14, 30)):
            assert bytes(copy.read(document, start, stop).astype(np.uint8)) == texts[document][start:stop]


def test_rows_of_a_store_never_cross_documents(tmp_path: Path) -> None:
    make_store(tmp_path / "store", [b"a" * 50, b"b" * 70, b"c" * 20], segment_len=32)
    held_out = open_held_out(str(tmp_path / "store"), BYTES)
    model = tiny_model(RMT, segment_len=16, vocab_size=257)
    figures = TASKS["perplexity"].measure(model, 25, Material(BYTES, held_out))
    assert figures[0].num_tokens == (2 + 2) * 24 + 19 + 19  # of the second one's end, of the short third one
    assert (figures[0].num_read, figures[0].num_held_out) == (140, 140)
    with pytest.raises(InputError, match="at most 70"):
        TASKS["perplexity"].check(71, 16, Material(BYTES, held_out))


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store", [b"text"], segment_len=8)
    other = ByteTokenizer()
    other.fingerprint = "0" * 64
    with pytest.raises(InputError, match="prepare the text with the model's tokenizer"):
        open_held_out(str(tmp_path / "store"), other)
    assert isinstance(open_held_out(str(tmp_path / "store"), BYTES), StoreHeldOut)


# --- the report -------------------------------------------------------------------------------------

SUBJECT = Subject("tiny", "f" * 64, "rmt (num_tokens 8)", 64, 512, "a book", "0")


def line(task: str, length: int, figure: Figure) -> dict[str, Any]:
    return evaluate._line(Run(task, length, "m", "cpu", 0), figure, SUBJECT)


def accuracy(length: int, memory: str, value: float, **more: Any) -> dict[str, Any]:
    figure = Figure(
        "accuracy", value, memory, num_samples=10, low=value / 2, high=(1 + value) / 2, chance=0.0625, **more
    )
    return line("recall", length, figure)


def curve(length: int, memory: str, values: list[float]) -> list[dict[str, Any]]:
    figures = [Figure("loss_by_segment", value, memory, i, num_tokens=64) for i, value in enumerate(values)]
    return [line("perplexity", length, figure) for figure in figures]


def test_the_table_has_a_row_a_length_and_says_what_is_missing() -> None:
    lines = [accuracy(4096, memory, 0.5, needs_memory=True) for memory in MEMORIES]
    lines += [accuracy(64, memory, 0.25, needs_memory=False) for memory in MEMORIES[:2]]
    written = report.markdown(SUBJECT, lines)
    assert "| 4,096 | 10 | 0.0625 | 0.5000 [0.2500, 0.7500] | 0.5000" in written
    assert "| 64* | 10 | 0.0625 | 0.2500 [0.1250, 0.6250] | 0.2500 [0.1250, 0.6250] | - |" in written
    assert "no memory is needed there" in written
    assert "no neighbour" in written
    assert "no neighbour" not in report.markdown(SUBJECT, lines[:3])


def test_the_report_tells_what_stands_around_facts_and_held_out_text_where_it_is_read() -> None:
    def told(*lines: dict[str, Any]) -> str:
        return next(one for one in report.markdown(SUBJECT, lines).splitlines() if "Seed" in one)

    noise, prose = (accuracy(64, "true", 0.5, background=name) for name in ("noise", "prose"))
    held_out = f"Held-out text: {SUBJECT.held_out}. "
    assert told(noise) == f"Background: noise (random letters). Seed {SUBJECT.seed}."
    assert told(prose) == f"Background: prose (of the held-out text). {held_out}Seed {SUBJECT.seed}."
    own = line("sorting", 64, Figure("accuracy", 0.5, "true", num_samples=4, low=0, high=1))
    assert told(own) == f"Seed {SUBJECT.seed}."
    assert told(*curve(64, "true", [1.0]), noise).endswith(f"letters). {held_out}Seed {SUBJECT.seed}.")
    assert "## recall in noise\n" in report.markdown(SUBJECT, [noise, own])
    assert "## sorting\n" in report.markdown(SUBJECT, [noise, own])


def test_the_table_averages_a_curve_over_doubling_stretches() -> None:
    lines = curve(448, "true", [1.0, 2.0, 3.0, 5.0, 1.0, 2.0, 6.0]) + curve(448, "zeroed", [7.0] * 7)
    rows = [row for row in report.markdown(SUBJECT, lines).splitlines() if row.startswith(("| 0", "| 1", "| 2", "| 4"))]
    assert rows == [
        "| 0 | 1.0000 | 7.0000 | - |",
        "| 1 | 2.0000 | 7.0000 | - |",
        "| 2-3 | 4.0000 | 7.0000 | - |",
        "| 4-6 | 3.0000 | 7.0000 | - |",
    ]


def test_segments_that_are_told_together_are_the_same_curve() -> None:
    num, values = 1000, np.random.default_rng(0).normal(4, 1, 1000)
    one_by_one = curve(64 * num, "true", values.tolist())
    starts = (stretch_bounds(64 * num, 64) // 64).tolist()
    figures = [
        Figure("loss_by_segment", float(values[a:b].mean()), "true", a, b - a, 64 * (b - a))
        for a, b in itertools.pairwise(starts)
    ]
    together = [line("perplexity", 64 * num, figure) for figure in figures]
    assert len(together) == 128 + 3 * 64 - 3  # the last one of a doubling is cut by the end: 1000 = 512 + 61 x 8
    assert report.markdown(SUBJECT, together) == report.markdown(SUBJECT, one_by_one)
    found = [report.curve_of(lines, 64 * num, "true") for lines in (one_by_one, together)]
    assert [len(one) for one in found] == [num, num]
    for a, b in report.stretches(num):
        assert report.mean_loss(found[0][a:b]) == pytest.approx(report.mean_loss(found[1][a:b]), abs=1e-12)
    drawn = [list(one.means(8)) for one in found]
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=0, atol=1e-12)
    assert drawn[0][:2] == [pytest.approx((3.5, values[:8].mean())), pytest.approx((11.5, values[8:16].mean()))]
    assert list(found[1].means(1))[-1] == pytest.approx((995.5, values[992:].mean()))


def test_the_table_tells_how_much_was_read_and_by_how_many_rows() -> None:
    model, held_out = tiny_model(RMT, segment_len=16, vocab_size=257), TextHeldOut("letters", "f", np.arange(97))
    figures = TASKS["perplexity"].measure(model, 32, Material(BYTES, held_out))
    written = report.markdown(SUBJECT, [line("perplexity", 32, figure) for figure in figures])
    assert "Texts of 32 tokens: 96 of the 97 tokens of the held-out text were read, in 3 rows." in written
    assert "All shuffled memories are of another stretch of the same document." in written
    figures = TASKS["perplexity"].measure(model, 35, Material(BYTES, held_out))
    written = report.markdown(SUBJECT, [line("perplexity", 35, figure) for figure in figures])
    assert "Texts of 35 tokens: 97 of the 97 tokens" in written
    rows = [row.split(" | ")[:2] for row in written.splitlines() if row.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    assert rows == [["| 0", "3"], ["| 1", "3"], ["| 2", "2"]]
    assert _num_texts(figures, 35) == pytest.approx(97 / 35)


def test_a_value_that_is_no_number_is_null_and_stands_in_the_report() -> None:
    lines = [line("perplexity", 64, Figure("loss", float("nan"), memory, num_tokens=63)) for memory in MEMORIES]
    lines += curve(64, "true", [float("inf")])
    assert [item["value"] for item in lines] == [None] * 4
    assert "| 64 | nan | nan | nan |" in report.markdown(SUBJECT, lines)
    report_plot.plot(SUBJECT, lines)


@pytest.mark.parametrize("kinds", ["curves", "answers", "both"])
def test_the_plot_has_a_panel_for_each_thing_measured(kinds: str) -> None:
    curves = [item for memory in MEMORIES for item in curve(64 * 1000, memory, [1.0 + i % 7 for i in range(1000)])]
    answers = [accuracy(64, memory, 0.5) for memory in MEMORIES]
    lines = {"curves": curves, "answers": answers, "both": curves + answers}[kinds]
    image = matplotlib.image.imread(io.BytesIO(report_plot.plot(SUBJECT, lines)))
    assert image.shape[:2] == (600, 768 * (2 if kinds == "both" else 1))


def test_the_plot_tells_where_no_memory_is_needed_and_chance_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Axes] = []
    monkeypatch.setattr(Axes, "legend", lambda panel, **_: drawn.append(panel))
    for needed in (False, True):
        lines = [accuracy(64, memory, 0.5, needs_memory=needed) for memory in MEMORIES]
        lines += [{**accuracy(256, memory, 0.5, needs_memory=True), "chance": 0.25} for memory in MEMORIES]
        report_plot.plot(SUBJECT, lines)
    told = [panel.get_legend_handles_labels()[1] for panel in drawn]
    assert [("hollow: no memory is needed" in labels) for labels in told] == [True, False]
    assert all("chance (0.0625 to 0.25)" in labels for labels in told)
    empty = [line for line in drawn[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert sorted(round(float(x) / 64, 2) for line in empty for x in line.get_xdata()) == [0.97, 1.0, 1.03]


def test_where_there_is_no_telling_what_chance_gives_none_is_shown() -> None:
    def right(*num_choices: float) -> list[Figure]:
        answers = tuple(Answer(i + 1, np.zeros(1, np.int32), num) for i, num in enumerate(num_choices))
        marks = {memory: [np.ones(len(answers), dtype=bool)] * 2 for memory in MEMORIES}
        scores: dict[str, list[dict[str, float]]] = {memory: [{}] * 2 for memory in MEMORIES}
        finite = {memory: [False] * 2 for memory in MEMORIES}
        return questions.figures([Sample(lambda: iter(()), 9, answers)] * 2, questions.Marks(marks, scores, finite))

    assert {figure.chance for figure in right(4, 2) if figure.metric == "accuracy"} == {0.375}
    lines = [line("file", 64, figure) for figure in right(4, float("inf"))]
    assert not any("chance" in item for item in lines)
    assert "chance" not in report.markdown(SUBJECT, lines)
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "axhline", lambda self, *_, label, **__: found.append(label))
        report_plot.plot(SUBJECT, lines)
        report_plot.plot(SUBJECT, [accuracy(64, memory, 0.5) for memory in MEMORIES])
    assert found == ["chance (0.0625)"]


def test_a_count_is_the_same_line_after_an_interruption_and_whole_in_the_table(tmp_path: Path) -> None:
    run, output, identity = Run("file", 64, "m", "cpu", 0), str(tmp_path), {"task": ["file"]}
    figures = [Figure("accuracy", 0.5, "true", num_samples=4, low=0, high=1), Figure("num_longer", 3)]
    (tmp_path / evaluate.PARTIAL).write_text(json.dumps(identity))
    evaluate._keep(output, run, figures)
    [kept] = evaluate._kept(output, identity, [run]).values()
    lines = [json.dumps([evaluate._line(run, figure, SUBJECT) for figure in found]) for found in (figures, kept)]
    assert lines[0] == lines[1]
    assert "| 64 | 3 |" in report.markdown(SUBJECT, json.loads(lines[1]))


def test_seeds_are_pooled_with_the_interval_of_all_their_samples() -> None:
    lines = [
        {**accuracy(64, memory, value), "seed": seed} for memory in MEMORIES for seed, value in ((0, 0.2), (1, 0.7))
    ]
    written = report.markdown(SUBJECT, lines)
    low, high = wilson_interval(9, 20)
    cell = f"0.4500 [{low:.4f}, {high:.4f}]"
    assert f"| 64 | 20 | 0.0625 | {cell} | {cell} | {cell} |" in written


def test_counts_of_samples_are_summed_over_the_seeds_that_have_some() -> None:
    lines = [{**accuracy(64, memory, 0.2), "seed": seed} for memory in MEMORIES for seed in range(3)]
    for metric, nums in (("num_not_finite", (3, 2)), ("num_unwritten", (1, 4))):
        for seed, num in zip((0, 2), nums, strict=True):
            figure = Figure(metric, num, "true" if metric == "num_not_finite" else None)
            lines.append({**line("recall", 64, figure), "seed": seed})
    written = report.markdown(SUBJECT, lines)
    assert "| 64 | 30 | 0.0625 | 0.2000 [" in written
    assert "### num not finite\n\n| tokens | true |\n| ---: | ---: |\n| 64 | 5 |" in written
    assert "### num unwritten\n\n| tokens | value |\n| ---: | ---: |\n| 64 | 5 |" in written


def test_depths_have_a_table_and_a_heat_map(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [accuracy(length, memory, 0.5) for length in (64, 128) for memory in MEMORIES]
    for length in (64, 128):
        for depth in (0.0, 0.5, 1.0):
            num = 5 if depth == 0 else 4
            figure = Figure("accuracy_at_depth", depth, "true", depth=depth, num_samples=num, low=0, high=1)
            lines.append(line("recall", length, figure))
    written = report.markdown(SUBJECT, lines)
    assert "| tokens | samples a depth | depth 0 | depth 0.5 | depth 1 |" in written
    assert "| 128 | 4 to 5 | 0.0000 [0, 1] | 0.5000 [0, 1] | 1.0000 [0, 1] |" in written
    assert "†" not in written
    image = matplotlib.image.imread(io.BytesIO(report_plot.plot(SUBJECT, lines)))
    assert image.shape[:2] == (600, 768 * 2)
    cells, labels = [], []
    monkeypatch.setattr(Axes, "text", lambda _, x, y, text, **__: cells.append(text))
    monkeypatch.setattr(Axes, "set_xlabel", lambda _, text: labels.append(text.removeprefix("text length (tokens)")))
    lines[-2] |= {"same_place": True}
    written = report.markdown(SUBJECT, [{**one, "seed": seed} for seed in (1, 0) for one in lines])
    report_plot.plot(SUBJECT, lines)
    assert report_plot.SAME_PLACE in labels
    assert [text for text in cells if "†" in text] == ["0.50†"]
    assert re.search(r"\| 128 \| 8 to 10 \| 0.0000 \[.+\] \| 0.5000 \[.+\]† \| 1.0000 \[[^†]+\] \|", written)
    assert "† Facts stand where they do at the depth before" in written


def test_an_oracle_stands_beside_the_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line("sorting", 64, Figure("accuracy", 0.5, memory, num_samples=4, low=0, high=1, chance=0.05))
             for memory in MEMORIES]  # fmt: skip
    lines.append(line("sorting", 64, Figure("oracle", 0.375, num_samples=4, low=0.25, high=0.5)))
    written = report.markdown(SUBJECT, lines)
    assert "| 64 | 4 | 0.3750 [0.2500, 0.5000] |" in written
    assert "last quarter, and at every place the true symbols before it" in written
    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda _, *points, **looks: drawn.update({looks["label"]: points}))
    report_plot.plot(SUBJECT, lines)
    assert drawn[report_plot.ORACLE_KNOWS] == ([64], [0.375])


def test_a_memory_is_told_with_what_is_off_unless_it_is_so_by_default() -> None:
    def told(**settings: Any) -> str:
        return subject_of("one", tiny_model(settings), HERE.held_out, range(1)).memory

    assert told(kind="rmt", num_tokens=3) == "rmt (num_tokens 3)"
    assert told(kind="rmt", num_tokens=0) == "rmt (num_tokens 0)"
    assert "forgetting True" in told(kind="memformer", num_heads=2)
    assert "forgetting False" in told(kind="memformer", num_heads=2, forgetting=False)
