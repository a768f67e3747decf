"""Recipes: by name, from a file of one's own, and with several seeds."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

import rmt_core
from pipelines import train
from pipelines.config import build
from pipelines.data.tokenise import ByteTokenizer
from pipelines.recipes import LASTING, RECIPES, find_recipe
from pipelines.training.settings import TrainConfig
from tests.rmt_core.tiny import RMT, tiny_model

MINE = """
batch_size: 4
segment_len: 32
dataset:
  task_fraction: 0.5
  tasks:
    - detect
    - {task: reason, weight: 2, background: noise, depths: [0, 0.5]}
curriculum: {num_segments: [3, 4], steps: [1, 2], least_segments: 2}
optimizer:
  learning_rate: 1e-3
"""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_configuration(name: str) -> None:
    assert build(TrainConfig, find_recipe(name)).num_steps > 0


@pytest.mark.parametrize("words", [[], ["tiny"]])
def test_a_recipe_needs_no_settings(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_fit", lambda config: {"loss": float(config.seed)})
    monkeypatch.setattr(train, "publish", lambda config: "model")
    monkeypatch.setattr(train, "_connected", contextlib.nullcontext)
    monkeypatch.setattr(train, "check_storage", lambda *_: 1)
    assert train.main(words) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == 0


def test_documents_are_followed_whole_but_where_a_recipe_says_otherwise() -> None:
    pieces = {name: build(TrainConfig, recipe).dataset.piece_segments for name, recipe in RECIPES.items()}
    assert pieces == dict.fromkeys(RECIPES) | {"tiny": 64}
    assert build(TrainConfig, {}).dataset.piece_segments is None


def test_a_recipe_in_a_file_is_the_same_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    words = [
        *["tiny", "--batch-size", "4", "--segment-len", "32", "dataset.task_fraction", "0.5"],
        *["dataset.piece_segments", "none", "optimizer.beta2", "0.95", "curriculum.aux_from", "0"],
        *["model.memory", '{"kind": "rmt", "num_tokens": 4}'],
        *["dataset.task_answer_weight", "30", "curriculum.advance_below", "none", "optimizer.learning_rate", "0.001"],
        *["curriculum.num_segments", "3", "4", "curriculum.steps", "1", "2", "curriculum.least_segments", "2"],
        *["dataset.tasks", "detect", '{"task": "reason", "weight": 2, "background": "noise", "depths": [0, 0.5]}'],
    ]
    found = []
    for given in ([str(tmp_path / "mine.yaml")], words):
        assert train.main([*given, "--dry-run", "--output", str(tmp_path / "run")]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert [task["task"] for task in found[0]["dataset"]["tasks"]] == ["detect", "reason"]
    assert found[0]["plan"]["num_lanes"] == {"documents": 2, "tasks": 2}


@pytest.mark.parametrize("start", [["--model.start", "{}"], ["model.start={}"], ["--model.start={}"]])
@pytest.mark.parametrize("recipe", [[], ["detect"]])
def test_a_trained_model_keeps_its_memory_in_a_named_recipe(
    recipe: list[str], start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ByteTokenizer()
    trained = tiny_model(RMT, segment_len=24, vocab_size=tokenizer.vocab_size)
    rmt_core.save(tmp_path / "model", trained, tokenizer)
    words = [*recipe, *(word.format(tmp_path / "model") for word in start)]
    words += ["--dry-run", "--output", str(tmp_path / "run")]
    assert train.main(words) == 0
    kept = json.loads(capsys.readouterr().out)
    assert kept["model"]["memory"] is None
    (tmp_path / "mine.yaml").write_text(MINE + "model: {memory: {kind: rmt, num_tokens: 3, noise: 0.25}}\n")
    if not recipe:  # in a file of one's own a memory is meant for what it is given with
        assert train.main([str(tmp_path / "mine.yaml"), *words]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["memory"]["noise"] == 0.25
    noisy = RMT | {"noise": 0.5}
    assert train.main([*words, "--model.memory", json.dumps(noisy)]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["memory"] == noisy


@pytest.mark.parametrize("start", [["--model.start", "none"], ["model.start=null"]])
def test_where_no_trained_model_is_given_a_named_recipe_has_its_memory(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["detect", *start, "--dry-run", "--output", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["memory"] == LASTING


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("dataset: {tasks: recal}", "did you mean recall?"),
        ("modle: {width: 3}", "unknown setting modle"),
        ("model: 3", "model"),
        ("seed: 2020-01-01", "holds more than text"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yml").write_text(text)
    assert train.main([str(tmp_path / "mine.yml"), "model.width", "8", "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "run").exists()


def test_seeds_are_runs_of_their_own_beside_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run is that of the same command with its seed and folder; one that is finished is not run again."""
    ran: list[TrainConfig] = []

    def fit(config: TrainConfig) -> dict[str, Any]:
        ran.append(config)
        return {"loss": float(config.seed)}

    monkeypatch.setattr(train, "_fit", fit)
    monkeypatch.setattr(train, "publish", lambda config: f"{config.output}/model")
    monkeypatch.setattr(train, "_connected", contextlib.nullcontext)
    monkeypatch.setattr(train, "check_storage", lambda *_: 1)
    words = ["tiny", "--seed", "5", "--output", str(tmp_path / "runs")]
    assert train.main([*words, "--seeds", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(config.seed, config.output, config.seeds) for config in ran] == [
        (5, str(tmp_path / "runs" / "seed-5"), 1),
        (6, str(tmp_path / "runs" / "seed-6"), 1),
    ]
    assert found["output"] == str(tmp_path / "runs")
    assert found["checkpoint"] == found["runs"][0]["checkpoint"] == str(tmp_path / "runs" / "seed-5" / "model")
    assert [(run["seed"], run["loss"]) for run in found["runs"]] == [(5, 5.0), (6, 6.0)]
    assert train.main([*words, "--seeds", "3"]) == 0
    assert [config.seed for config in ran] == [5, 6, 7]
    capsys.readouterr()
    assert train.main(["tiny", "--seed", "6", "--output", str(tmp_path / "runs" / "seed-6")]) == 0  # the same run
    assert len(ran) == 3
