"""Evaluations side by side: every model is shown, and only what was asked the same is pooled."""

import hashlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from pipelines import compare, storage
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, capacity, comparison, comparison_plot, comparison_table, curves, intervals, texts
from pipelines.tasks.questions import QuestionTask
from pipelines.tasks.report import CONFIG, FORMAT, METRICS, Subject
from pipelines.tasks.samples import Scene, Wanted

ASKED = {"tokenizer": "bytes", "background": "noise", "num_samples": 16, "depths": [], "seed": 0, "seeds": 1}
RMT_FLOATS = "rmt, 256 floats, 1,000 parameters, segments of 24 tokens"


def answers(values: dict[int, float], task: str = "detect", metric: str = "accuracy") -> list[dict[str, Any]]:
    """Figures of a model whose answers with the true memory are right as often as this, by length."""
    return [
        {"task": task, "length": length, "metric": metric, "memory": kind, "value": shown, "num_samples": 16,
         "low": 0.0, "high": 1.0, "chance": 0.0625}
        for length, value in values.items()
        for kind, shown in (("true", value), ("zeroed", 0.0625), ("shuffled", 0.125))
    ]  # fmt: skip


def losses(length: int, values: list[float]) -> list[dict[str, Any]]:
    """The loss of each segment with the true memory."""
    about = {"task": "perplexity", "length": length, "metric": "loss_by_segment", "memory": "true", "num_tokens": 24}
    return [{**about, "segment": index, "value": value} for index, value in enumerate(values)]


def evaluation(folder: Path, lines: list[dict[str, Any]], asked: dict[str, Any] | None = None, **about: Any) -> str:
    """What evaluate leaves of a model of its own: these lines and a loss."""
    fingerprint = hashlib.sha256(str(folder).encode()).hexdigest()
    subject = Subject("model", fingerprint, "rmt", 24, 256, "a book", "0", 1000)._replace(**about)
    loss = {"task": "perplexity", "length": 24, "metric": "loss", "memory": "true", "value": 3.0, "seed": 0}
    folder.mkdir(parents=True)
    content = {"format": FORMAT, "model": subject._asdict(), "identity": {**ASKED, **(asked or {})}}
    storage.write_json(str(folder / CONFIG), content)
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in [loss, *lines]))
    return str(folder)


def costs(values: dict[int, float], task: str = "detect") -> list[dict[str, Any]]:
    """Of 8 texts, by length: seconds of all, and as many megabytes."""
    line = {"task": task, "num_texts": 8, "seed": 0}
    return [
        {**line, "length": length, "metric": metric, "value": value * by}
        for length, value in values.items()
        for metric, by in (("seconds", 1.0), ("peak_bytes", 1e6))
    ]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert compare.main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def row(found: dict[str, Any], title: str, start: str) -> list[str]:
    """The cells of the line that starts so in the table with this title."""
    table = Path(found["table"]).read_text().split(f"### {title}")[1].split("###")[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} ")]
    return [word.strip() for word in line.strip("|").split("|")]


def test_seeds_of_a_memory_are_shown_each_and_as_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [{**line, "seed": seed} for line in answers({1024: 1.0, 2**20: 1.0}) for seed in (0, 1)]
    one = evaluation(tmp_path / "a" / "seed-0", twice)
    fallen = [{**line, "seed": seed} for line in answers({1024: 1.0, 2**20: 0.25}) for seed in (0, 1)]
    two = evaluation(tmp_path / "a" / "seed-1", fallen)
    found = run(["--results", one, two, "--output", str(tmp_path / "out"), "--trained-len", "384"], capsys)
    assert found["models"] == {RMT_FLOATS: ["seed-0", "seed-1"]}
    heads = "| tokens | samples | seed-0 | seed-1 | mean | zeroed | shuffled | chance |"
    assert heads in Path(found["table"]).read_text().splitlines()
    cells = row(found, "detect in noise: accuracy, memory rmt", "1,048,576")
    assert cells[1] == "32"
    assert cells[2].startswith("1.0000 [")
    assert cells[3].startswith("0.2500 [")
    assert cells[4:] == ["0.6250", "0.0625", "0.1250", "0.0625"]
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")


def test_one_model_in_several_directories_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_model = {"fingerprint": "f" * 64}
    few = evaluation(tmp_path / "few", answers({64: 1.0}, "capacity_1") + costs({64: 8.0}, "capacity_1"), **one_model)
    lines = [*answers({64: 1.0}, "capacity_8"), *answers({256: 0.5}, "capacity_1"), *costs({256: 16.0}, "capacity_1")]
    many = evaluation(tmp_path / "many", lines, {"batch_size": 4}, **one_model)
    sorted_ = evaluation(tmp_path / "sorting", answers({64: 0.5}, "sorting"), {"background": "prose"}, **one_model)
    found = run(["--results", few, many, sorted_, "--output", str(tmp_path / "out")], capsys)
    assert found["models"] == {RMT_FLOATS: ["few + many + sorting"]}
    held = capacity.facts_held(comparison.read_groups([few, many], "accuracy"))
    assert [one.in_words for one in held if one.length == 64] == [">= 8 [0, >= 8]"]
    beside = {"table": found["cost_table"]}
    assert row(beside, "capacity 1 in noise: time a text", "64") == ["64", "1.0000"]
    assert row(beside, "capacity 1 in noise: time a text", "256") == ["256", "2.0000"]
    assert (
        f"batch_size is not told in {tmp_path.name}/few and 4 in {tmp_path.name}/many"
        in Path(found["cost_table"]).read_text()
    )
    named = run(["--results", f"mine={few},{many}", "--output", str(tmp_path / "out")], capsys)
    assert named["models"] == {"mine": ["few + many"]}


@pytest.mark.parametrize(
    ("asked", "about"),
    [({"num_samples": 8}, {}), ({"seed": 1}, {}), ({}, {"memory": "full attention"}), ({}, {"segment_len": 48})],
)
def test_one_model_asked_or_read_otherwise_stays_apart(
    asked: dict[str, Any], about: dict[str, Any], tmp_path: Path
) -> None:
    one = evaluation(tmp_path / "one", answers({64: 1.0}), fingerprint="f" * 64)
    other = evaluation(tmp_path / "other", answers({64: 1.0}), asked, fingerprint="f" * 64, **about)
    groups = comparison.read_groups([one, other], "accuracy")
    assert [one.name for group in groups for one in group.evaluations] == ["one", "other"]


@pytest.mark.parametrize(
    ("about", "asked"),
    [
        ({"memory": "xl"}, {}),
        ({"state_floats": 512}, {}),
        ({"num_parameters": 1001}, {}),
        ({"num_parameters": None}, {}),
        ({"segment_len": 48}, {}),
        ({}, {"background": "prose"}),
        ({}, {"questions_version": 2}),
        ({}, {"num_samples": 8}),
        ({}, {"depths": [0.0, 1.0]}),
        ({}, {"seed": 1}),
    ],
)
def test_what_is_unlike_is_no_seed_of_one_another(
    about: dict[str, Any], asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path / "a" / "seed-0", answers({1024: 1.0}))
    two = evaluation(tmp_path / "a" / "seed-1", answers({1024: 0.5, 4096: 0.25}), asked, **about)
    found = run(["--results", one, two, "--output", str(tmp_path / "out")], capsys)
    assert sorted(found["models"].values()) == [["seed-0"], ["seed-1"]]
    text = Path(found["table"]).read_text()
    assert len(re.findall(r"### detect in \w+: accuracy, memory", text)) == 2
    assert re.findall(r"Not the same questions\*\*: (\w+) is", text) == [*asked, *({"segment_len"} & set(about))]
    task = "detect in noise and prose" if "background" in asked else "detect in noise"
    assert row(found, f"{task}: accuracy, true memory", "4,096") == ["4,096", "-", "0.2500"]


def test_settings_are_unlike_however_late_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    depths = [i / 10 for i in range(11)]
    asked = [{"depths": depths[:5], "tokenizer": "a" * 64}, {"depths": depths, "tokenizer": "a" * 63 + "b"}]
    one, two = (evaluation(tmp_path / name, answers({64: 0.5}), told) for name, told in zip("ab", asked, strict=True))
    found = run(["--results", f"a={one}", f"b={two}", "--output", str(tmp_path / "out")], capsys)
    assert found["differences"] == []
    text = Path(found["table"]).read_text()
    assert f"depths is 0.0,0.1,0.2,0.3,0.4 in {tmp_path.name}/a and {','.join(map(str, depths))} in" in text
    assert f"tokenizer is {'a' * 16} in {tmp_path.name}/a and {'a' * 16} in" in text


@pytest.mark.parametrize("task", TASKS)
def test_segments_count_where_they_decide_what_is_asked(task: str, tmp_path: Path) -> None:
    groups = []
    for segment_len in (24, 900):
        uri = evaluation(tmp_path / str(segment_len), answers({1024: 1.0}, task), segment_len=segment_len)
        groups += comparison.read_groups([uri], "accuracy")
    asked = comparison.differences_of_questions([one for group in groups for one in group.evaluations])
    maker = TASKS[task]
    if not isinstance(maker, QuestionTask):
        assert not asked
        return
    scene = Scene(ByteTokenizer(), texts.noise(ByteTokenizer()))
    drawn = []
    for segment_len in (24, 900):
        samples = [maker.make(scene, Wanted(1500, segment_len), np.random.default_rng(seed)) for seed in range(3)]
        drawn.append([texts.whole(sample.stream).tolist() for sample in samples])
    assert (drawn[0] != drawn[1]) == bool(asked)


def test_segments_count_where_so_many_of_them_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def differences(asked: dict[str, Any]) -> Any:
        folder = tmp_path / str(asked["limit_segments"])
        one, two = (evaluation(folder / str(size), [], asked, segment_len=size) for size in (24, 48))
        words = ["--results", f"a={one}", f"b={two}", "--metric", "loss", "--output", str(folder / "out")]
        return run(words, capsys)["differences"]

    assert len(differences({"limit_segments": None})) == 1
    assert differences({"limit_segments": 8}) == []


def test_no_label_and_no_curve_is_given_to_two_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for k in (1, 2) for line in answers({1024: 1.0}, f"capacity_{k}")]
    uris = [evaluation(tmp_path / str(i), lines, state_floats=256 * i) for i in range(4)]
    groups = comparison.read_groups([f"rmt={uris[0]}", uris[1]], "accuracy")
    assert [group.label for group in groups] == ["rmt", "other rmt"]
    assert {held.curve for held in capacity.facts_held(groups)} == {"rmt", "other rmt"}
    groups = comparison.read_groups([f"rmt 1={uris[0]}", *uris[1:]], "accuracy")
    assert [group.label for group in groups] == ["rmt 1", "rmt, 256 floats", "rmt, 512 floats", "rmt, 768 floats"]
    assert [group.kind for group in groups] == ["rmt 1", "rmt", "rmt", "rmt"]
    run(["--results", f"rmt={uris[0]}", uris[1], "--output", str(tmp_path / "out")], capsys)
    assert "| tokens | rmt | other rmt |" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ({"memory": "rmt (num_tokens 8)", "state_floats": 512}, {}, ["rmt, num tokens 4", "rmt, num tokens 8"]),
        ({"state_floats": 512}, {}, ["rmt, 256 floats", "rmt, 512 floats"]),
        ({"num_parameters": 2000}, {}, ["rmt, 2,000 parameters", "rmt, 1,000 parameters"]),
        ({"segment_len": 48}, {}, ["rmt, segments of 48 tokens", "rmt, segments of 24 tokens"]),
        ({"memory": "rmt (num_tokens 4, noisy True)"}, {}, ["rmt, noisy", "rmt, no noisy"]),
        ({"memory": "rmt (num_tokens 8)"}, {"num_samples": 8}, ["rmt 1", "rmt 2"]),
        (
            {"memory": "infinity (num_basis 4, basis_widths (0.01, 0.05))"},
            {"memory": "infinity (num_basis 8, basis_widths (0.01, 0.05))"},
            ["infinity, num basis 4", "infinity, num basis 8"],
        ),
        ({}, {"background": "prose"}, ["rmt, background noise", "rmt, background prose"]),
        ({"state_floats": 512, "num_parameters": 2000}, {}, ["rmt 1", "rmt 2"]),
        ({"memory": f"rmt (num_tokens {10**20})"}, {}, ["rmt 1", "rmt 2"]),
        (
            {"memory": "rmt (num_tokens 8) with xl (num_tokens 2)"},
            {"memory": "rmt (num_tokens 8) with xl (num_tokens 4)"},
            ["rmt with xl, xl num tokens 2", "rmt with xl, xl num tokens 4"],
        ),
    ],
)
def test_groups_of_one_kind_are_named_by_what_tells_them_apart(
    first: dict[str, Any], second: dict[str, Any], labels: list[str], tmp_path: Path
) -> None:
    about = {"memory": "rmt (num_tokens 4)"}
    read_otherwise = {name: second[name] for name in second if name in Subject._fields}
    asked = {name: second[name] for name in second if name not in Subject._fields}
    one = evaluation(tmp_path / "one", answers({64: 1.0}), **{**about, **first})
    two = evaluation(tmp_path / "two", answers({64: 1.0}), asked, **{**about, **read_otherwise})
    groups = comparison.read_groups([one, two], "accuracy")
    assert [group.label for group in groups] == labels


def test_groups_of_one_kind_stand_by_the_size_of_their_state(tmp_path: Path) -> None:
    sizes = {"large": 1024, "xl": 256, "middle": 512, "small": 0}
    uris = [
        evaluation(tmp_path / name, answers({64: 1.0}), state_floats=size, memory="xl" if name == "xl" else "rmt")
        for name, size in sizes.items()
    ]
    groups = comparison.read_groups(uris, "accuracy")
    assert [one.name for group in groups for one in group.evaluations] == ["small", "middle", "large", "xl"]


def test_questions_that_a_task_does_not_read_keep_no_seeds_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path / "one", [], {"num_samples": 8, "held_out": "a" * 64})
    two = evaluation(tmp_path / "two", [], {"num_samples": 9, "held_out": "a" * 64})
    other = evaluation(tmp_path / "other", [], {"held_out": "b" * 64})
    found = run(["--results", one, two, other, "--metric", "loss", "--output", str(tmp_path / "out")], capsys)
    assert sorted(found["models"].values()) == [["one", "two"], ["other"]]


def test_what_only_one_was_asked_beside_keeps_no_seeds_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A further task reads settings that the task of both does not."""
    file = answers({256: 0.5}, "file")
    one = evaluation(tmp_path / "one", [*answers({256: 0.75}), *file], {"questions": "c" * 64})
    two = evaluation(tmp_path / "two", [*answers({256: 0.5}), *answers({64: 1.0}, "recall")])
    assert run(["--results", one, two, "--output", str(tmp_path / "out")], capsys)["models"] == {
        RMT_FLOATS: ["one", "two"]
    }
    found = run(["--results", f"a={one}", f"b={two}", "--output", str(tmp_path / "out")], capsys)
    assert [(gap["panel"], gap["mean"]) for gap in found["differences"]] == [("detect", 0.25)]
    assert "Not the same questions" not in Path(found["table"]).read_text()


def test_a_mark_without_an_interval_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the mean of ROUGE over a file is."""
    lines = [
        {"task": "file", "length": 256, "metric": metric, "memory": kind, "value": value, "num_samples": 4, **about}
        for metric, value, about in (("rouge_1", 0.5, {"low": 0.2, "high": 0.8}), ("rouge_mean", 0.25, {}))
        for kind in ("true", "zeroed", "shuffled")
    ]
    one, output = evaluation(tmp_path / "one", lines), str(tmp_path / "out")
    found = run(["--results", one, "--metric", "rouge_mean", "--output", output], capsys)
    assert row(found, "file: rouge mean, memory rmt", "256")[:3] == ["256", "4", "0.2500"]


def test_two_groups_are_named_and_their_paired_difference_has_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [evaluation(tmp_path / f"a-{i}", answers({64: value})) for i, value in enumerate((0.9, 0.8, 1.0))]
    second = [evaluation(tmp_path / f"b-{i}", answers({64: value})) for i, value in enumerate((0.5, 0.6, 0.4))]
    words = ["--results", "noise=" + ",".join(first), "base=" + ",".join(second), "--output", str(tmp_path / "out")]
    found = run(words, capsys)
    assert found["models"] == {"noise": ["a-0", "a-1", "a-2"], "base": ["b-0", "b-1", "b-2"]}
    (difference,) = found["differences"]
    half = 4.303 * 0.2 / math.sqrt(3)  # of 0.4, 0.2 and 0.6
    assert [difference[name] for name in ("mean", "low", "high")] == pytest.approx([0.4, 0.4 - half, 0.4 + half])
    shown = row(found, "detect in noise: accuracy of noise minus base", "64")
    assert shown == ["64", "0.4000", f"[{0.4 - half:.4f}, {0.4 + half:.4f}]", "3"]
    words[1:3] = ["noise=" + ",".join(first), "base=" + ",".join(second[:2])]
    fewer = run(words, capsys)
    assert fewer["differences"] == []
    assert "3 models of noise and 2 of base are no pairs" in Path(fewer["table"]).read_text()


def test_the_t_interval_is_that_of_the_tables() -> None:
    assert intervals.t_interval([0.25]) == (0.25, None, None)
    mean, low, high = intervals.t_interval([1.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 12.706, 2 + 12.706), rel=1e-4)
    many = [float(i % 2) for i in range(100)]
    assert intervals.t_interval(many)[2] == pytest.approx(0.5 + 2.042 * 0.5025 / 10, abs=1e-3)


def test_any_metric_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = [{"task": "detect", "length": 64, "metric": "seconds", "value": value, "seed": i}
             for i, value in enumerate((1.0, 3.0))]  # fmt: skip
    lines = [*answers({64: 0.5}, metric="strict"), *answers({64: 0.75}), *costs, *losses(96, [4.0, 3.0, 2.0, 1.0])]
    one = evaluation(tmp_path / "one", lines)
    words = ["--results", one, "--output", str(tmp_path / "out"), "--metric"]
    assert row(run([*words, "strict"], capsys), "detect in noise: strict", "64")[2].startswith("0.5000")
    assert row(run([*words, "loss"], capsys), "perplexity: loss", "24")[:2] == ["24", "3.0000"]
    assert row(run([*words, "seconds"], capsys), "detect in noise: seconds", "64") == ["64", "2.0000", "2.0000"]
    by_segment = run([*words, "loss_by_segment", "--trained-len", "48"], capsys)
    assert row(by_segment, "texts of 96 tokens: loss by segment", "1")[1] == "3.0000"
    assert row(by_segment, "texts of 96 tokens: loss by segment", "2-3")[1] == "1.5000"


def test_the_plot_shades_what_was_trained_and_shows_every_model(tmp_path: Path) -> None:
    results = [evaluation(tmp_path / f"seed-{i}", answers({512: 1.0, 2048: i / 2})) for i in range(3)]
    groups = comparison.read_groups(results, "accuracy")
    shaded, plain = (comparison_plot.plot(groups, "accuracy", trained_len) for trained_len in (384, None))
    assert shaded != plain
    assert comparison_plot.plot(comparison.read_groups(results[:2], "accuracy"), "accuracy", 384) != shaded
    assert comparison_plot.plot(groups, "accuracy", 384) == shaded


def test_chance_follows_the_lengths_and_is_one_line_of_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = answers({64: 1.0, 256: 0.5})
    falling = [{**line, "chance": 1 / line["length"]} for line in answers({64: 1.0, 256: 0.5}, "fwe")]
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plot, "png", lambda drawing: drawn.append(drawing) or b"")
    for told in (lines, [*lines, *falling]):
        uri = evaluation(tmp_path / str(len(told)), told)
        comparison_plot.plot(comparison.read_groups([uri], "accuracy"), "accuracy", None)
    legends = [[text.get_text() for text in one.legends[0].get_texts()] for one in drawn]
    assert [[name for name in names if "chance" in name] for names in legends] == [
        ["chance (0.0625)"],
        ["chance (detect: 0.0625; fwe: 0.00391 to 0.0156)"],
    ]
    follows = [line for line in drawn[1].axes[1].get_lines() if "chance" in str(line.get_label())]
    assert [list(line.get_xydata()[:, 1]) for line in follows] == [[1 / 64, 1 / 256]]


def test_an_oracle_stands_beside_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {64: 0.5, 128: 0.25}
    told = [{"task": "sorting", "length": at, "metric": "oracle", "value": value} for at, value in known.items()]
    lines = [*answers({64: 1.0, 128: 0.75}, "sorting"), *answers({64: 1.0}), *told]
    uris = [evaluation(tmp_path / name, lines, memory=name) for name in ("rmt", "xl")]
    groups = comparison.read_groups(uris, "accuracy")
    text = comparison_table.markdown(groups, "accuracy")
    assert "| zeroed | shuffled | chance | oracle |" in text
    assert "| 0.7500 | 0.0625 | 0.1250 | 0.0625 | 0.2500 |" in text
    assert text.count("| oracle |") == 2  # in the tables of sorting alone
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plot, "png", lambda drawing: drawn.append(drawing) or b"")
    comparison_plot.plot(groups, "accuracy", None)
    curves = [[one.get_xydata().tolist() for one in panel.get_lines() if "oracle" in str(one.get_label())]
              for panel in drawn[0].axes]  # fmt: skip
    assert curves == [[[[64, 0.5], [128, 0.25]]], []]


def test_titles_tell_what_stands_around_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for task in ("capacity_1", "sorting") for line in answers({64: 1.0}, task)]
    uris = [evaluation(tmp_path / told, lines, {"background": told}) for told in ("noise", "prose")]
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plot, "png", lambda drawing: drawn.append(drawing) or b"")
    monkeypatch.setattr(capacity, "png", lambda drawing: drawn.append(drawing) or b"")
    for results in (uris[:1], uris):
        groups = comparison.read_groups(results, "accuracy")
        comparison_plot.plot(groups, "accuracy", None)
        capacity.plot(groups)
    assert [panel.get_title().splitlines()[0] for drawing in drawn for panel in drawing.axes] == [
        "capacity_1 in noise: accuracy by length",
        "sorting: accuracy by length",
        "facts held in noise, texts of 64 tokens, by 16 samples each:",
        "capacity_1 in noise and prose: accuracy by length",
        "sorting: accuracy by length",
        "facts held in noise and prose, texts of 64 tokens, by 16 samples each:",
    ]


def test_where_no_memory_is_needed_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{**line, "needs_memory": line["length"] > 24} for line in answers({24: 1.0, 256: 0.5}, "capacity_1")]
    uris = [evaluation(tmp_path / name, lines, memory=name) for name in ("rmt", "xl")]
    groups = comparison.read_groups(uris, "accuracy")
    text = comparison_table.markdown(groups, "accuracy")
    assert "| 24 | 1.0000* | 1.0000* |" in text
    assert "| 256 | 0.5000 | 0.5000 |" in text
    assert "| 24* | 16 |" in text
    assert text.count("no memory is needed there") == 1
    assert "| rmt | 256 | 16 | >= 1 [0, >= 1]* | 0 [0, >= 1] (mean 0.0000) |" in capacity.markdown(groups)
    needed = [{**line, "needs_memory": True} for line in lines]
    other = comparison.read_groups([evaluation(tmp_path / "needed", needed)], "accuracy")
    assert "no memory" not in comparison_table.markdown(other, "accuracy")
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plot, "png", lambda drawing: drawn.append(drawing) or b"")
    monkeypatch.setattr(capacity, "png", lambda drawing: drawn.append(drawing) or b"")
    for one in (groups, other):
        comparison_plot.plot(one, "accuracy", None)
        capacity.plot(one)
    hollow = [
        [float(x) for line in panel.get_lines() if line.get_markerfacecolor() == "white" for x in line.get_xdata()]
        for drawing in drawn
        for panel in drawing.axes
    ]
    assert hollow == [[24, 24], [256, 256], [], [], [], []]


def test_no_two_of_many_curves_look_alike() -> None:
    looks = [curves.style(number) for number in range(55)]
    assert len({(one["marker"], str(one["linestyle"])) for one in looks}) == 55
    assert len({one["marker"] for one in looks[:11]}) == 11


def test_a_place_0_is_left_of_the_others_on_a_logarithmic_axis() -> None:
    _, [panel] = curves.grid(1, (4, 3))
    panel.plot([0, 256, 512], [0, 1, 2])
    curves.log_axis(panel, [0, 256, 512], ["0", "256", "512"], "state")
    at = [panel.transData.transform((place, 0))[0] for place in (0, 256, 512)]
    inside = panel.get_window_extent()
    assert inside.x0 < at[0] < at[1] < at[2] < inside.x1


def test_names_that_would_touch_on_an_axis_are_slanted_or_left_out() -> None:
    def shown(places: list[int]) -> list[tuple[str, float]]:
        _, [panel] = curves.grid(1, (6, 4))
        curves.log_axis(panel, places, [f"{place:,}" for place in places], "state")
        return [(name.get_text(), name.get_rotation()) for name in panel.get_xticklabels()]

    assert shown([256, 1024, 4096]) == [("256", 0), ("1,024", 0), ("4,096", 0)]
    assert shown([256, 1024, 1280, 4096]) == [("256", 45), ("1,024", 45), ("1,280", 45), ("4,096", 45)]
    assert [name for name, _ in shown([256, 1024, 1025, 4095, 4096])] == ["256", "1,024", "", "", "4,096"]


def test_names_of_curves_are_kept_apart_and_beside_the_panel() -> None:
    assert curves.spread([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    assert curves.spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    for heights in ([0.0] * 5, [1.0] * 5, [0.0, 0.02, 0.5, 0.52, 1.0, 1.0], [0.4, 0.45, 0.5, 0.7]):
        apart = curves.spread(heights, 0.1)
        assert min(b - a for a, b in itertools.pairwise(apart)) > 0.1 - 1e-9
        assert min(apart) >= 0
        assert max(apart) <= 1


def test_costs_stand_beside_accuracy_to_where_texts_no_longer_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memories = [
        evaluation(tmp_path / f"rmt-{i}", [*answers({1024: 1.0, 4096: 1.0}), *costs({1024: 8.0 + i, 4096: 32.0})])
        for i in (0, 2)
    ]
    end = {"task": "detect", "length": 4096, "metric": "does_not_fit", "value": 1e9, "reason": "too long", "seed": 0}
    lines = [*answers({1024: 0.5}), end, *({**line, "num_at_once": 2} for line in costs({1024: 80.0}))]
    about = {"memory": "full attention", "state_floats": 0, "floats_per_token": 64}
    full = evaluation(tmp_path / "full", lines, {"attention": "full"}, **about)
    found = run(["--results", *memories, full, "--output", str(tmp_path / "out"), "--trained-len", "384"], capsys)
    assert "full attention, 64 floats a token, 1,000 parameters, segments of 24 tokens" in found["models"]
    assert row(found, "detect in noise: accuracy, true memory", "4,096") == ["4,096", "1.0000", "does not fit"]
    beside = {"table": found["cost_table"]}
    assert row(beside, "detect in noise: time a text", "1,024") == ["1,024", "1.1250", "10.0000"]
    assert row(beside, "detect in noise: time a text", "4,096") == ["4,096", "4.0000", "does not fit"]
    assert row(beside, "detect in noise: peak memory", "1,024") == ["1,024", "9,000,000", "80,000,000"]
    assert row(beside, "detect in noise: carried", "1,024") == ["1,024", "256.0000", "65,536"]
    text = Path(found["cost_table"]).read_text()
    assert "ablations is measured too in" in text
    assert "runs at once is not told in" in text
    assert "three passes in place of one" in text
    assert Path(found["cost_plot"]).read_bytes().startswith(b"\x89PNG")


def test_where_nothing_fits_there_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = {"task": "detect", "length": 4096, "metric": "does_not_fit", "value": 1e9, "reason": "too long", "seed": 0}
    full = evaluation(tmp_path / "full", [end], floats_per_token=64)
    (tmp_path / "full" / METRICS).write_text(json.dumps(end) + "\n")
    assert compare.main(["--results", full, "--output", str(tmp_path / "out")]) == 2
    assert "no text fits" in capsys.readouterr().err


def test_a_model_that_diverged_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [evaluation(tmp_path / str(i), answers({24: value})) for i, value in enumerate((0.5, 0.75, 0.25, 0.5))]
    line = json.loads((tmp_path / "0" / METRICS).read_text().splitlines()[0])
    (tmp_path / "0" / METRICS).write_text(json.dumps({**line, "value": None}) + "\n")
    groups = [f"a={models[0]},{models[1]}", f"b={models[2]},{models[3]}"]
    found = run(["--results", *groups, "--metric", "loss", "--output", str(tmp_path / "out")], capsys)
    assert [one["mean"] for one in found["differences"]] == [None]
    assert row(found, "perplexity: loss, memory a", "24")[1:3] == ["nan", "3.0000"]


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (["{root}/nowhere"], "no finished evaluation"),
        (["{root}/one", "{root}/one"], "names"),
        (["a={root}/one", "{root}/one"], "names"),
        (["a={root}/one", "a={root}/more"], "give each group once"),
        (["a="], "give each group once, with its directories"),
        (["=one"], "give each group once, with its directories"),
        (["{root}/lost"], "lost is an evaluation without metrics.jsonl"),
        (["{root}/one", "{root}/copy"], "/{name}/one and {root}/copy are of one model, with detect at 1,024 in both"),
        (["a={root}/one,{root}/copy"], "/{name}/one and {root}/copy are of one model, with detect at 1,024 in both"),
        (["a={root}/one,{root}/more"], "num_samples is 16 in {name}/one and 8 in {name}/more"),
        (["{root}/no"], "has no accuracy; it has loss"),
        (["{root}/one", "--metric", "accuracy_at_depth"], "heat map"),
        (["{root}/damaged"], "damaged evaluation"),
        (["{root}/one", "{root}/long", "--metric", "loss_by_segment"], "segments of 24 and 48 tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    results: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(tmp_path / "one", [*answers({1024: 1.0}), *losses(48, [1.0, 2.0])])
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    evaluation(tmp_path / "more", answers({1024: 1.0}), {"num_samples": 8})
    evaluation(tmp_path / "no", [])
    evaluation(tmp_path / "long", losses(96, [1.0, 2.0]), segment_len=48)
    evaluation(tmp_path / "damaged", [])
    (tmp_path / "damaged" / METRICS).write_text('{"task": ')
    Path(evaluation(tmp_path / "lost", []), METRICS).unlink()
    words = [word.format(root=tmp_path) for word in results]
    assert compare.main(["--results", *words, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says.format(name=tmp_path.name, root=tmp_path) in line
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluation(tmp_path / "one", answers({1024: 1.0}))
    assert compare.main(["--results", one, "--output", one]) == 2
    assert "holds a run of another command" in capsys.readouterr().err
    assert len(list((tmp_path / "one").iterdir())) == 2


def facts_held(
    folder: Path, values: dict[int, float], *, floats: int = 256, task: str = "capacity", **ends: float
) -> str:
    """The evaluation of a model that has so many answers right of so many facts."""
    lines = [{**line, **ends} for k, value in values.items() for line in answers({1024: value}, f"{task}_{k}")]
    return evaluation(folder, lines, state_floats=floats, memory=f"rmt (num_tokens {floats // 64})")


def test_facts_held_are_the_most_that_are_right_at_95_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = facts_held(tmp_path / "d", {1: 0.0}, floats=0)
    small = [
        facts_held(tmp_path / "a", {1: 1.0, 2: 0.96, 4: 0.94}, high=0.94),
        facts_held(tmp_path / "b", {1: 0.5, 2: 0.5}),
    ]
    large = facts_held(tmp_path / "c", {1: 1.0, 2: 0.96, 4: 0.95, 8: 0.5}, floats=512)
    found = run(["--results", *small, large, "--output", str(tmp_path / "out")], capsys)
    lines = Path(found["capacity_table"]).read_text().splitlines()
    assert "| memory | state floats | samples | 1,024 tokens |" in lines
    assert "| rmt | 256 | 16 | 2 [0, 0], 0 [0, >= 2] (mean 1.0000) |" in lines
    assert "| rmt | 512 | 16 | 4 [0, >= 8] (mean 4.0000) |" in lines
    assert Path(found["capacity_plot"]).read_bytes().startswith(b"\x89PNG")
    with_none = run(["--results", nothing, *small, "--output", str(tmp_path / "none")], capsys)
    assert "| rmt | 0 | 16 | 0 [0, >= 1] (mean 0.0000) |" in Path(with_none["capacity_table"]).read_text()
    named = run(["--results", "all=" + ",".join([*small, large]), "--output", str(tmp_path / "out")], capsys)
    assert "| all | 512 | 16 | 4 [0, >= 8] (mean 4.0000) |" in Path(named["capacity_table"]).read_text()
    plain = evaluation(tmp_path / "plain", answers({1024: 1.0}))
    assert "capacity_table" not in run(["--results", plain, "--output", str(tmp_path / "plain-out")], capsys)


def test_that_samples_are_too_few_for_a_lower_end_is_told(tmp_path: Path) -> None:
    groups = [
        comparison.read_groups([facts_held(tmp_path / str(num), {1: 1.0}, num_samples=num)], "accuracy")
        for num in (72, 73)
    ]
    few, enough = map(capacity.markdown, groups)
    assert "With fewer than 73 samples that is nothing by the lower ends" in few
    assert "fewer than" not in enough
    assert intervals.wilson_interval(72, 72).low < capacity.HELD_AT <= intervals.wilson_interval(73, 73).low


def test_intervals_of_equal_sizes_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [
        facts_held(tmp_path / f"{name}-{size}", {1: 1.0, 2: 0.5}, floats=size) for size in (512, 256) for name in "abc"
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(capacity, "png", lambda drawing: drawn.append(drawing) or b"")
    named = [f"{name}={uris[i]},{uris[i + 3]}" for i, name in enumerate("ab")]
    groups = comparison.read_groups([*named, uris[2]], "accuracy")
    capacity.plot(groups)
    lines = [one for one in drawn[0].axes[0].collections if isinstance(one, LineCollection)]
    at = [float(one.get_transform().transform(one.get_segments()[0][0])[0]) for one in lines]
    assert len({round(x) for x in at}) == len(at) == 5
    rows = [line.split(" | ")[:2] for line in capacity.markdown(groups).splitlines() if "[" in line and "|" in line]
    assert rows == [["| a", "256"], ["| a", "512"], ["| b", "256"], ["| b", "512"], ["| rmt", "512"]]


def test_pairs_held_are_a_table_and_a_panel_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_held(tmp_path / "a", {1: 1.0, 2: 0.5})
    pairs = [facts_held(tmp_path / name, {4: 1.0, 8: 0.5}, task="pairs") for name in "bc"]
    found = run(["--results", facts, *pairs, "--output", str(tmp_path / "out")], capsys)
    first, second = Path(found["capacity_table"]).read_text().split("### pairs held in noise\n")
    assert first.startswith("### facts held in noise\n")
    assert "| rmt | 256 | 16 | 1 [0, >= 2] (mean 1.0000) |" in first
    assert "| rmt | 256 | 16 | 4 [< 4, >= 8], 4 [< 4, >= 8] (mean 4.0000) |" in second
    held = capacity.facts_held(comparison.read_groups([facts, *pairs], "accuracy"))
    assert [(one.what, one.num_facts) for one in held] == [("facts", 1), ("pairs", 4), ("pairs", 4)]
    lines = [
        *answers({64: 0.5, 128: 1.0}, "capacity_2"),
        *answers({64: 1.0}, "pairs_8"),
        *answers({128: 0.5}, "pairs_4"),
        *answers({64: 1.0}, "latest_4"),
    ]
    both = capacity.facts_held(comparison.read_groups([evaluation(tmp_path / "d", lines)], "accuracy"))
    assert [(*one[1:3], one.num_facts) for one in both] == [
        ("facts", 64, 0),
        ("facts", 128, 2),
        ("pairs", 64, 8),
        ("pairs", 128, 0),
        ("pairs told anew", 64, 4),
    ]


def test_facts_held_are_a_bound_where_more_or_fewer_were_not_asked_for(tmp_path: Path) -> None:
    all_held = facts_held(tmp_path / "a", {1: 1.0, 8: 1.0}, low=0.96)
    too_many = facts_held(tmp_path / "b", {16: 0.1, 64: 0.6}, low=0.0, high=0.7)
    groups = comparison.read_groups([f"first={all_held}", f"second={too_many}"], "accuracy")
    lines = capacity.markdown(groups).splitlines()
    assert "| first | 256 | 16 | >= 8 [>= 8, >= 8] |" in lines
    assert "| second | 256 | 16 | < 16 [< 16, < 16] |" in lines
    held = capacity.facts_held(groups)
    assert capacity.most_asked(held) == {8: "most that was asked of first", 64: "most that was asked of second"}
    assert capacity.most_asked(held[:1]) == {8: "most that was asked"}
    assert [capacity.interval(one) for one in held] == [(8, 8), (0, 16)]


def test_what_is_written_anew_leaves_nothing_of_an_earlier_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = facts_held(tmp_path / "facts", {1: 1.0, 2: 0.5})
    one = evaluation(tmp_path / "one", [*answers({1024: 1.0}), *costs({1024: 8.0})])
    out = tmp_path / "out"
    run(["--results", facts, one, "--output", str(out)], capsys)
    (out / "notes.md").write_text("mine")
    own = {"comparison.md", "comparison.png", "cost.md", "cost.png", "capacity.md", "capacity.png"}
    assert {path.name for path in out.iterdir()} == {*own, "notes.md"}
    run(["--results", one, "--output", str(out)], capsys)
    assert {path.name for path in out.iterdir()} == {*own, "notes.md"} - {"capacity.md", "capacity.png"}
    run(["--results", one, "--metric", "loss", "--output", str(out)], capsys)
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.png", "notes.md"}
