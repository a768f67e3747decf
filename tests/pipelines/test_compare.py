"""Evaluations side by side: every model is shown, and what they have in common is pooled."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import compare, storage
from pipelines.tasks import comparison
from pipelines.tasks.report import CONFIG, FORMAT, METRICS, Subject


def evaluation(folder: Path, memory: str, values: dict[int, float], seeds: int = 1) -> str:
    """What evaluate leaves of a model whose accuracy with the true memory is this by length."""
    subject = Subject("model", "f" * 64, memory, 24, 256, "a book", "0")
    lines: list[dict[str, Any]] = [{"task": "perplexity", "length": 24, "metric": "loss", "value": 3.0}]
    for seed in range(seeds):
        for length, value in values.items():
            for kind, shown in (("true", value), ("zeroed", 0.0625), ("shuffled", 0.125)):
                about = {"num_samples": 16, "low": 0.0, "high": 1.0, "chance": 0.0625, "seed": seed}
                lines.append(
                    {"task": "detect", "length": length, "metric": "accuracy", "memory": kind, "value": shown, **about}
                )
    folder.mkdir(parents=True)
    storage.write_json(str(folder / CONFIG), {"format": FORMAT, "model": subject._asdict()})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert compare.main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_seeds_of_a_memory_are_shown_each_and_as_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluation(tmp_path / "a" / "seed-0", "rmt", {1024: 1.0, 2**20: 1.0}, seeds=2)
    two = evaluation(tmp_path / "a" / "seed-1", "rmt", {1024: 1.0, 2**20: 0.25}, seeds=2)
    found = run(["--results", one, two, "--output", str(tmp_path / "out"), "--trained-len", "384"], capsys)
    assert found["models"] == {"rmt, 256 floats": ["seed-0", "seed-1"]}
    table = Path(found["table"]).read_text().splitlines()
    assert "| tokens | samples | seed-0 | seed-1 | mean | zeroed | shuffled | chance |" in table
    (row,) = [line for line in table if line.startswith("| 1,048,576 ")]
    cells = [word.strip() for word in row.strip("|").split("|")]
    assert cells[1] == "32"
    assert cells[2].startswith("1.0000 [")
    assert cells[3].startswith("0.2500 [")
    assert cells[4:] == ["0.6250", "0.0625", "0.1250", "0.0625"]
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")


def test_memories_are_told_apart_and_lengths_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluation(tmp_path / "rmt", "rmt", {1024: 1.0})
    two = evaluation(tmp_path / "xl", "xl", {1024: 0.5, 4096: 0.25})
    found = run(["--results", one, two, "--output", str(tmp_path / "out")], capsys)
    assert found["models"] == {"rmt, 256 floats": ["rmt"], "xl, 256 floats": ["xl"]}
    text = Path(found["table"]).read_text()
    assert text.count("### detect: accuracy, memory") == 2


def test_the_plot_shades_what_was_trained_and_shows_every_model(tmp_path: Path) -> None:
    results = [evaluation(tmp_path / f"seed-{i}", "rmt", {512: 1.0, 2048: i / 2}) for i in range(3)]
    read = [comparison.read_evaluation(uri) for uri in results]
    shaded, plain = (comparison.plot(read, trained_len) for trained_len in (384, None))
    assert shaded != plain
    assert comparison.plot(read[:2], 384) != shaded
    assert comparison.plot(read, 384) == shaded


@pytest.mark.parametrize(
    ("results", "says"), [(["nowhere"], "no finished evaluation"), (["one", "one"], "names"), (["no"], "no accuracy")]
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    results: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(tmp_path / "one", "rmt", {1024: 1.0})
    evaluation(tmp_path / "no", "rmt", {})
    paths = [str(tmp_path / name) for name in results]
    assert compare.main(["--results", *paths, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "out").exists()
