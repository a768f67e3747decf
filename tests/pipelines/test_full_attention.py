"""Evaluations with the whole text in context: the answers are Hugging Face's, up to where texts no longer fit.

Axes: N tokens of a text.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import rmt_core
from pipelines import evaluate, storage
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, perplexity, questions, report
from pipelines.tasks.base import DOES_NOT_FIT, TRUE, Figure, Material
from pipelines.tasks.held_out import TextHeldOut
from pipelines.tasks.report import Subject
from pipelines.tasks.running import Run, measure
from pipelines.tasks.samples import Answer, Sample, Scorer
from rmt_core import DoesNotFitError, FullContext, RecurrentModel, floats_per_token, full_context
from tests.rmt_core.tiny import tiny_model

BYTES = ByteTokenizer()
SEGMENT = 16
LONG = {"llama": {}, "gpt2": {"n_positions": 256}}


def made(family: str = "llama", **changes: Any) -> RecurrentModel:
    return tiny_model("none", family, segment_len=SEGMENT, vocab_size=257, **LONG[family], **changes)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text takes several."""
    monkeypatch.setattr(full_context, "_STEP_TOKENS", 2 * SEGMENT)


@torch.inference_mode()
def logits_of(model: RecurrentModel, tokens: list[int]) -> torch.Tensor:
    """Hugging Face's, (N, V)."""
    logits: torch.Tensor = model.backbone.lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def greedy(model: RecurrentModel, tokens: list[int], num: int) -> list[int]:
    text = list(tokens)
    for _ in range(num):
        text.append(int(logits_of(model, text)[-1].argmax()))
    return text[len(tokens) :]


def sample(tokens: list[int], at: int, written: list[str]) -> Sample:
    """An answer of the tokens from `at` on, and a scorer that keeps what is written in its place."""

    def mark(text: str) -> float:
        written.append(text)
        return 1.0

    text = np.array(tokens, dtype=np.int32)
    scorer = Scorer("kept", mark)
    return Sample(lambda: iter([text]), len(text), (Answer(at, text[at:], 16),), scorers=(scorer,), max_new_tokens=4)


@pytest.mark.parametrize("family", LONG)
def test_answers_over_several_segments_are_hugging_faces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family)
    prompts = [np.random.default_rng(i).integers(97, 123, size).tolist() for i, size in enumerate((100, 63, 64))]
    right = [greedy(model, prompt, 3) for prompt in prompts]
    right[1][1] = (right[1][1] + 1) % 256  # a wrong answer
    texts = [prompt + answer for prompt, answer in zip(prompts, right, strict=True)]
    chosen, seen = questions._chosen, []

    def watched(model: RecurrentModel, hidden: torch.Tensor, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        seen.extend(model.backbone.head(hidden[rows, places]))
        return chosen(model, hidden, rows, places)

    monkeypatch.setattr(questions, "_chosen", watched)
    written: list[str] = []
    samples = [sample(text, len(prompt), written) for text, prompt in zip(texts, prompts, strict=True)]
    marks = questions.batch_marks(FullContext(model), samples, [TRUE], BYTES)
    assert [one.tolist() for one in marks.right[TRUE]] == [[True], [False], [True]]
    places = sorted((len(prompt) - 1 + i, row) for row, prompt in enumerate(prompts) for i in range(3))
    for logits, (place, row) in zip(seen, places, strict=True):
        wanted = logits_of(model, texts[row])[place]
        assert torch.allclose(logits, wanted, rtol=0, atol=1e-9)
    assert sorted(written) == sorted(BYTES.decode(greedy(model, prompt, 4)) for prompt in prompts)


@pytest.mark.parametrize("limit", ["positions", "bytes"])
def test_a_text_that_fits_is_answered_where_there_is_no_room_to_write_behind_it(limit: str) -> None:
    model = made("gpt2") if limit == "positions" else made()
    max_bytes = None if limit == "positions" else 2 * 255 * floats_per_token(model.backbone) * 8
    prompts = [np.random.default_rng(i).integers(97, 123, size).tolist() for i, size in enumerate((254, 249))]
    texts = [prompt + greedy(model, prompt, 2) for prompt in prompts]
    written: list[str] = []
    samples = [sample(text, len(prompt), written) for text, prompt in zip(texts, prompts, strict=True)]
    full = FullContext(model, max_bytes=max_bytes)
    marks = questions.batch_marks(full, samples, [TRUE], BYTES)
    assert [one.tolist() for one in marks.right[TRUE]] == [[True], [True]]
    assert marks.scores[TRUE] == [{}, {"kept": 1.0}]  # the shorter one has room for the four tokens
    assert written == [BYTES.decode(greedy(model, prompts[1], 4))]
    found = {figure.metric: figure for figure in questions.figures(samples, marks)}
    assert (found["accuracy"].value, found["accuracy"].num_samples) == (1.0, 2)
    assert (found["kept"].num_samples, found["num_unwritten"].value) == (1, 1.0)
    nowhere = questions.figures(samples[:1] * 2, questions.batch_marks(full, samples[:1] * 2, [TRUE], BYTES))
    assert [figure.metric for figure in nowhere] == ["accuracy", "num_unwritten"]
    subject = Subject("tiny", "f" * 64, "full attention", SEGMENT, 0, "a book", "0", 1000, 64, SEGMENT, 256)
    lines = [evaluate._line(Run("qa1", 256, "m", "cpu", 0), figure, subject) for figure in nowhere]
    table = report.markdown(subject, lines)
    assert "| 256 | 2 |" in table.split("### num unwritten")[1]
    assert "no room to write" in table
    with pytest.raises(DoesNotFitError):
        questions.batch_marks(full, [sample(texts[0] + [97, 98], 256, written)] * 2, [TRUE], BYTES)


@pytest.mark.parametrize("family", LONG)
def test_losses_by_segment_are_hugging_faces(family: str) -> None:
    model = made(family)
    texts = np.random.default_rng(0).integers(97, 123, (2, 77))
    held_out = TextHeldOut("letters", "f", np.concatenate(texts))
    rows = [perplexity.Row(0, 0, 77), perplexity.Row(0, 77, 137)]  # the second one ends before
    bounds = perplexity.stretch_bounds(76, SEGMENT)
    losses = perplexity.batch_losses(FullContext(model), rows, held_out=held_out, memories=[TRUE], bounds=bounds)[TRUE]
    for row, text in zip(losses, (texts[0].tolist(), texts[1, :60].tolist()), strict=True):
        nats = F.cross_entropy(logits_of(model, text)[:-1], torch.tensor(text[1:]), reduction="none")
        wanted = [float(part.sum()) for part in nats.split(SEGMENT)]
        wanted += [0.0] * (5 - len(wanted))
        assert row == pytest.approx(wanted, rel=0, abs=1e-9)


@pytest.mark.parametrize("task", ["recall", "qa1", "sorting"])
def test_within_one_segment_it_is_the_model_itself(task: str) -> None:
    length = 600 if task == "qa1" else 120
    model = tiny_model("none", segment_len=length, vocab_size=257, max_position_embeddings=1024)
    material = Material(BYTES, TextHeldOut("letters", "f", np.arange(97, 123)), "noise", num_samples=3, ablations=False)
    figures = TASKS[task].measure(model, length, material)
    assert TASKS[task].measure(FullContext(model), length, material) == figures
    assert {figure.memory for figure in figures} - {None} == {TRUE}


def test_leaving_ablations_out_changes_nothing_else() -> None:
    model = made()
    material = Material(BYTES, TextHeldOut("letters", "f", np.arange(97, 123)), "noise", num_samples=3)
    alone = Material(**{**vars(material), "ablations": False})
    for task in ("recall", "perplexity"):
        length = 90 if task == "recall" else 20
        all_of_them = TASKS[task].measure(model, length, material)
        wanted = [figure for figure in all_of_them if figure.memory in (TRUE, None)]
        assert TASKS[task].measure(model, length, alone) == wanted
        assert len(wanted) < len(all_of_them)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    rmt_core.save(directory, made(), BYTES)
    return directory


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are measured here, one after another."""

    def measured(
        runs: list[Run], material: Material, keep: Callable[[Run, list[Figure]], None]
    ) -> dict[Run, list[Figure]]:
        found = {run: measure(run, material) for run in runs}
        for run, figures in found.items():
            keep(run, figures)
        return found

    monkeypatch.setattr(evaluate, "connect", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(evaluate, "_measure", measured)


def run(capfd: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capfd.readouterr()
    code = evaluate.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_curve_ends_where_texts_no_longer_fit_also_after_an_interruption(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 3 * 200 * floats_per_token(made().backbone) * 8
    words = [
        "--model",
        model,
        "--task",
        "recall",
        "--background",
        "noise",
        "--lengths",
        "96,192,1k",
        "--num-samples",
        3,
    ]
    words += ["--attention", "full", "--memory-limit", limit, "--segment-len", 24]
    found = run(capfd, *words, "--output", tmp_path / "whole")["metrics"]
    assert [(line["length"], line["metric"]) for line in found] == [
        (96, "accuracy"),
        (192, "accuracy"),
        (1024, DOES_NOT_FIT),
    ]
    assert [line["beyond_positions"] for line in found] == [True] * 3
    assert [line["state_floats"] for line in found] == [length * 2 * 2 * 2 * 8 for length in (96, 192, 1024)]
    assert found[-1]["value"] == 3 * 1023 * floats_per_token(made().backbone) * 8
    assert f"{limit:,} are allowed" in found[-1]["reason"]
    written = (tmp_path / "whole" / "results.md").read_text()
    assert "1,024 tokens do not fit: keys and values of 3 x 1,023 tokens need" in written
    assert "made to read 16 tokens at once, its backbone for 64 positions" in written
    costs = [json.loads(line) for line in (tmp_path / "whole" / "costs.jsonl").read_text().splitlines()]
    assert {(line["length"], line["num_texts"]) for line in costs} == {(96, 3), (192, 3)}

    measured = evaluate._measure

    def broken(runs: list[Run], material: Material, keep: Callable[..., None]) -> dict[Run, list[Figure]]:
        measured([run for run in runs if run.length != 192], material, keep)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_measure", broken)
    output = tmp_path / "broken"
    assert evaluate.main([str(word) for word in (*words, "--output", output)]) == 130
    monkeypatch.setattr(evaluate, "_measure", measured)
    assert run(capfd, *words, "--output", output)["metrics"] == found
    other = [str(word) for word in (*words, "--output", output)]
    other[other.index(str(limit))] = "4g"
    assert evaluate.main(other) == 2
    assert "memory_limit" in capfd.readouterr().err


def test_nothing_that_fits_is_a_result_too(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--task", "recall,perplexity", "--lengths", 96, "--limit-segments", 12]
    found = run(capfd, *words, "--attention", "full", "--memory-limit", 1, "--output", tmp_path)["metrics"]
    assert [(line["task"], line["metric"]) for line in found] == [
        ("recall", DOES_NOT_FIT),
        ("perplexity", DOES_NOT_FIT),
    ]
    assert storage.list_names(str(tmp_path)) == [
        "config.json",
        "costs.jsonl",
        "metrics.jsonl",
        "results.md",
        "results.png",
    ]


def test_evaluations_segment_by_segment_are_told_apart_by_nothing_new(model: Path, tmp_path: Path) -> None:
    """What those do not read keeps no two of them apart."""
    config = evaluate.EvaluateConfig(model=str(model), output=str(tmp_path), task=["recall"], lengths=[96])
    *_, identity = evaluate._inspect(config, str(model))
    assert not identity.keys() & {"attention", "ablations", "memory_limit", "segment_len", "compile"}
    full = evaluate.EvaluateConfig(**{**config.model_dump(exclude_unset=True), "attention": "full"})
    subject, material, identity = evaluate._inspect(full, str(model))
    assert identity["attention"] == "full"
    assert identity["memory_limit"] == 4 * 1024**3
    assert not material.ablations
    assert subject.memory == "full attention"
    assert subject.floats_at(1000) == 1000 * floats_per_token(made().backbone)
