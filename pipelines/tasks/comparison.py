"""Evaluations of several models side by side: those of one memory, from several seeds, as a mean with a band.

A seed that failed is a line of the table and a dot of the plot like any other.
"""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from pipelines import storage
from pipelines.config import InputError
from pipelines.tasks.base import MEMORIES, TRUE
from pipelines.tasks.questions import ACCURACY
from pipelines.tasks.report import (
    CONFIG,
    FORMAT,
    METRICS,
    STYLES,
    Line,
    Subject,
    cell,
    distinct,
    length_axis,
    pooled,
    titled,
)

_MARKERS = "osD^vPX*"  # of memories, as far as the eye tells them apart
_LINES = ("-", "--", "-.", ":")


class Evaluation(NamedTuple):
    """What evaluate has left of one model."""

    name: str  # of its directory
    subject: Subject
    lines: list[Line]  # accuracies; those of several seeds of questions are one


def read_evaluation(uri: str) -> Evaluation:
    """InputError where there is no finished evaluation, or it asked no questions."""
    file = storage.join(uri, CONFIG)
    content = storage.read_json(file) if storage.exists(file) else None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{uri} is no finished evaluation; give directories written by evaluate")
    lines = [json.loads(line) for line in storage.read_bytes(storage.join(uri, METRICS)).splitlines()]
    found = [line for line in pooled(lines) if line["metric"] == ACCURACY]
    if not found:
        raise InputError(f"{uri} has no accuracy; evaluate tasks that ask questions")
    return Evaluation(uri.rstrip("/").rpartition("/")[2], Subject(**content["model"]), found)


def by_memory(evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    """Those with equal memories together, in the order given."""
    groups: dict[str, list[Evaluation]] = {}
    for one in evaluations:
        groups.setdefault(f"{one.subject.memory}, {one.subject.state_floats:,} floats", []).append(one)
    return groups


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """For each task and memory a row a length: every model, then all of them with each memory."""
    parts = []
    for memory, mine in by_memory(evaluations).items():
        for task in _tasks(mine):
            heads = ["tokens", "samples", *(one.name for one in mine), "mean", "zeroed", "shuffled", "chance"]
            rows = [_row(mine, task, length) for length in _lengths(mine, task)]
            parts.append(titled(f"{task}: accuracy, memory {memory}", heads, rows))
    parts.append("In brackets: the 95 % Wilson interval over a model's samples. Means are over models.")
    return "\n\n".join(parts) + "\n"


def _row(evaluations: Sequence[Evaluation], task: str, length: int) -> list[str]:
    found = [_line(one, task, length, TRUE) for one in evaluations]
    samples = sorted({line["num_samples"] for line in found if line is not None})
    means = [_mean(evaluations, task, length, memory) for memory in MEMORIES]
    chance = next(line["chance"] for line in found if line is not None)
    return [
        f"{length:,}",
        ", ".join(map(str, samples)),
        *(cell(line) for line in found),
        *("-" if mean is None else f"{mean:.4f}" for mean in means),
        f"{chance:.4f}",
    ]


def _tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    return distinct([line for one in evaluations for line in one.lines], "task")


def _lengths(evaluations: Sequence[Evaluation], task: str) -> list[int]:
    return sorted({line["length"] for one in evaluations for line in one.lines if line["task"] == task})


def _line(evaluation: Evaluation, task: str, length: int, memory: str) -> Line | None:
    wanted = (task, length, memory)
    return next((line for line in evaluation.lines if (line["task"], line["length"], line["memory"]) == wanted), None)


def _values(evaluations: Sequence[Evaluation], task: str, length: int, memory: str) -> list[float]:
    found = (_line(one, task, length, memory) for one in evaluations)
    return [line["value"] for line in found if line is not None]


def _mean(evaluations: Sequence[Evaluation], task: str, length: int, memory: str) -> float | None:
    values = _values(evaluations, task, length, memory)
    return sum(values) / len(values) if values else None


def plot(evaluations: Sequence[Evaluation], trained_len: int | None) -> bytes:
    """A PNG, a panel a task: accuracy by length, a line a memory, the trained range shaded."""
    tasks = _tasks(evaluations)
    drawing = Drawing(figsize=(7.2 * len(tasks), 5.0), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    for panel, task in zip(drawing.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        _panel(panel, task, evaluations, trained_len)
    out = io.BytesIO()
    drawing.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(panel: Axes, task: str, evaluations: Sequence[Evaluation], trained_len: int | None) -> None:
    groups = {memory: mine for memory, mine in by_memory(evaluations).items() if task in _tasks(mine)}
    for number, (memory, mine) in enumerate(groups.items()):
        style = {"linestyle": _LINES[number % len(_LINES)], "marker": _MARKERS[number % len(_MARKERS)]}
        label = f"{memory}: mean of {len(mine)}" if len(mine) > 1 else memory
        _curve(panel, mine, task, TRUE, {"color": "black", "label": label, **style})
    if len(groups) == 1:
        for memory in MEMORIES[1:]:
            _curve(panel, evaluations, task, memory, {"label": f"{memory} memory", **STYLES[memory]})
    chance = next(line["chance"] for one in evaluations for line in one.lines if line["task"] == task)
    panel.axhline(chance, color="grey", linestyle=":", label=f"chance ({chance:.3g})")
    lengths = _lengths(evaluations, task)
    if trained_len is not None:
        lengths = sorted({*lengths, trained_len})
        panel.axvspan(0.5, trained_len, color="0.9", zorder=0, label=f"trained on up to {trained_len:,} tokens")
    length_axis(panel, lengths)
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("accuracy (band and dots: single models)")
    panel.set_title(f"{task}: accuracy by length", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left")


def _curve(panel: Axes, mine: Sequence[Evaluation], task: str, memory: str, style: dict[str, Any]) -> None:
    """The mean, a band from the lowest to the highest, and a dot for each model."""
    by_length = {length: _values(mine, task, length, memory) for length in _lengths(mine, task)}
    points = [(length, values) for length, values in by_length.items() if values]
    if not points:
        return
    x = [length for length, _ in points]
    panel.plot(x, [sum(values) / len(values) for _, values in points], markersize=6, **style)
    panel.fill_between(
        x,
        [min(values) for _, values in points],
        [max(values) for _, values in points],
        color=style["color"],
        alpha=0.2,
        linewidth=0,
    )
    dots = [(length, value) for length, values in points for value in values]
    panel.scatter([at for at, _ in dots], [value for _, value in dots], s=8, color=style["color"], zorder=3)
