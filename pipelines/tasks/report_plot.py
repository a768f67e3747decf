"""Figures as a plot: loss by segment, accuracy by length, and by length and depth.

Lines as in `report`.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from pipelines.tasks.base import DOES_NOT_FIT, MEMORIES, TRUE
from pipelines.tasks.curves import about_chance, draw_chance, hollow, log_axis, mark_end, tell_hollow
from pipelines.tasks.questions import ACCURACY, AT_DEPTH, ORACLE
from pipelines.tasks.report import Line, Subject, curve_of, distinct, named, num_samples, pooled, short_length

STYLES: dict[str, dict[str, Any]] = {  # colours of Okabe and Ito, which colour-blind readers tell apart
    "true": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "zeroed": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "shuffled": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
}
SAME_PLACE = "\n†: facts stand where they do at the depth before"
ORACLE_KNOWS = "oracle: knows the counts of a text's last quarter"
_MAX_POINTS = 128  # of a curve; more segments are averaged
_COLUMNS = 4  # of panels


def plot(subject: Subject, lines: Sequence[Line]) -> bytes:
    """A PNG: loss by segment index at the longest length, each task's accuracy by length, and by length and depth."""
    lines = pooled(lines)
    curves = [line for line in lines if line["metric"] == "loss_by_segment"]
    answers = _by_task(lines, ACCURACY)
    ends, oracles = (_by_task(lines, metric) for metric in (DOES_NOT_FIT, ORACLE))
    depths = _by_task(lines, AT_DEPTH)
    num_panels = max(1, bool(curves) + len(answers) + len(depths))
    columns, rows = min(num_panels, _COLUMNS), -(-num_panels // _COLUMNS)
    drawing = Drawing(figsize=(6.4 * columns, 5.0 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
    if curves:
        _plot_curves(panels.pop(0), curves, subject)
    for task, mine in answers.items():
        _plot_accuracy(panels.pop(0), task, mine, ends.get(task, []), oracles.get(task, []))
    for task, mine in depths.items():
        _plot_depths(panels.pop(0), task, mine)
    for panel in panels:
        panel.remove()
    drawing.suptitle(
        f"{subject.name}: memory {subject.memory}, state of {subject.floats}, "
        f"segments of {subject.segment_len:,} tokens",
        fontsize=10,
        wrap=True,
    )
    out = io.BytesIO()
    drawing.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _by_task(lines: Sequence[Line], metric: str) -> dict[str, list[Line]]:
    chosen = [line for line in lines if line["metric"] == metric]
    return {task: [line for line in chosen if line["task"] == task] for task in distinct(chosen, "task")}


def _plot_depths(panel: Axes, task: str, lines: Sequence[Line]) -> None:
    """A heat map with the numbers in it; light is right, also in grey."""
    lengths, depths = sorted(distinct(lines, "length")), sorted(distinct(lines, "depth"))
    table = np.full((len(depths), len(lengths)), np.nan)
    same = np.zeros(table.shape, dtype=bool)
    for line in lines:
        if line["memory"] == TRUE:
            at = depths.index(line["depth"]), lengths.index(line["length"])
            table[at], same[at] = line["value"], line.get("same_place", False)
    panel.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(table):
        ink = "black" if value > 0.5 else "white"
        mark = "†" if same[row, column] else ""
        panel.text(column, row, f"{value:.2f}{mark}", ha="center", va="center", fontsize=8, color=ink)
    panel.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    panel.set_xlabel(f"text length (tokens){SAME_PLACE if same.any() else ''}")
    panel.set_ylabel("depth of the facts (0: earliest, 1: latest)")
    panel.set_title(f"{named(task, lines)}: accuracy, true memory, {num_samples(lines)} samples a cell", fontsize=10)


def _plot_curves(panel: Axes, lines: Sequence[Line], subject: Subject) -> None:
    length = max(distinct(lines, "length"))
    each = 1
    for memory in MEMORIES:
        curve = curve_of(lines, length, memory)
        if not curve:
            continue
        each = -(-len(curve) // _MAX_POINTS)
        x, y = zip(*curve.means(each), strict=True)
        panel.plot(x, y, label=memory, markersize=4 if len(x) <= 32 else 0, **STYLES[memory])
    averaged = f", means of {each}" if each > 1 else ""
    panel.set_xlabel(f"segment index (segments of {subject.segment_len:,} tokens{averaged})")
    panel.set_ylabel("loss (nats per token)")
    panel.set_title(f"perplexity: held-out loss by segment, texts of {length:,} tokens", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(title="memory")


def _plot_accuracy(
    panel: Axes, task: str, lines: Sequence[Line], ends: Sequence[Line], oracles: Sequence[Line]
) -> None:
    lengths = sorted({*distinct(lines, "length"), *distinct(ends, "length")})
    for shift, memory in zip((1.0, 0.97, 1.03), MEMORIES, strict=True):  # apart, so that intervals can be read
        chosen = sorted((line for line in lines if line["memory"] == memory), key=lambda line: line["length"])
        if not chosen:
            continue
        x = [line["length"] * shift for line in chosen]
        y = [line["value"] for line in chosen]
        below = [line["value"] - line["low"] for line in chosen]
        above = [line["high"] - line["value"] for line in chosen]
        looks = {"markersize": 5, **STYLES[memory]}
        panel.errorbar(x, y, yerr=(below, above), label=memory, capsize=3, **looks)
        without = [i for i, line in enumerate(chosen) if line.get("needs_memory") is False]
        hollow(panel, [x[i] for i in without], [y[i] for i in without], looks)
    if chances := [line["chance"] for line in lines if "chance" in line]:
        by_length = {line["length"]: [line["chance"]] for line in lines if "chance" in line}
        draw_chance(panel, by_length, f"chance ({about_chance(chances)})")
    if oracles:
        draw_oracle(panel, {line["length"]: line["value"] for line in oracles})
    if any(line.get("needs_memory") is False for line in lines):
        tell_hollow(panel)
    _length_axis(panel, lengths)
    panel.set_ylim(-0.03, 1.03)
    if ends:
        mark_end(panel, min(distinct(ends, "length")), "does not fit", "black")
    panel.set_ylabel("accuracy (95 % interval)")
    panel.set_title(f"{named(task, lines)}: {num_samples(lines)} samples a length", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(title="memory")


def draw_oracle(panel: Axes, by_length: Mapping[int, float]) -> None:
    """What the oracle of a task has right."""
    at = sorted(by_length)
    panel.plot(at, [by_length[length] for length in at], color="grey", linestyle="-.", label=ORACLE_KNOWS)


def _length_axis(panel: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis with the lengths, in order, marked."""
    log_axis(panel, lengths, [short_length(length) for length in lengths], "text length (tokens)")
