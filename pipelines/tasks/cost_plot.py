"""What a text costs beside what it gives: accuracy, seconds and memory of groups of evaluations by length."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from pipelines.tasks.comparison import Group, differences_of_measuring, panel_name, panels, places
from pipelines.tasks.comparison_plot import PANEL_INCHES, curve, draw, length_axis, told
from pipelines.tasks.comparison_table import shown
from pipelines.tasks.curves import grid, legend_below, name_ends, png, style
from pipelines.tasks.report import titled

_KINDS = {  # of cost: the title, the unit
    "seconds": ("time a text", "s"),
    "peak_bytes": ("peak memory, libraries and all texts read at once", "B"),
    "state_floats": ("carried at the end of a text", "floats"),
}
_COLUMNS = 2  # of panels: quality and three kinds of cost


def are_measured(groups: Sequence[Group]) -> bool:
    """Whether any evaluation tells what a text costs."""
    return any(group.costs(task, "seconds") for group in groups for task in panels(groups))


def markdown(groups: Sequence[Group]) -> str:
    """A table for each task and kind of cost: a row a length, a column a group."""
    parts = []
    for task in panels(groups):
        for kind, (title, unit) in _KINDS.items():
            lengths = {length for group in groups for length in group.costs(task, kind)} | _ends(groups, task)
            rows = [
                [f"{length:,}", *(_cell(group, task, length, kind) for group in groups)] for length in sorted(lengths)
            ]
            heads = ["tokens", *(group.label for group in groups)]
            parts.append(titled(f"{panel_name(groups, task)}: {title}, means over models", heads, rows, unit))
    return "\n\n".join([*parts, *_notes(groups)]) + "\n"


def _ends(groups: Sequence[Group], task: str) -> set[int]:
    return {end for group in groups if (end := group.end(task)) is not None}


def _cell(group: Group, task: str, length: int, kind: str) -> str:
    values = group.costs(task, kind).get(length)
    return shown(group, task, length, sum(values) / len(values) if values else None)


def _notes(groups: Sequence[Group]) -> list[str]:
    evaluations = [one for group in groups for one in group.evaluations]
    notes = []
    if unlike := differences_of_measuring(evaluations):
        notes.append(f"**Not measured alike**: {unlike}.")
    if any(told["ablations"] == "measured too" for one in evaluations for told in one.measuring.values()):
        notes.append(
            "Seconds where ablations were measured hold theirs: three passes in place of one over every segment of "
            "perplexity, elsewhere over the segments in which something is asked."
        )
    return notes


def plot(groups: Sequence[Group], metric: str, trained_len: int | None) -> bytes:
    """A PNG: for each task the metric, seconds, peak memory and the size of what is carried, all by length."""
    tasks = panels(groups)
    drawing, cells = grid(len(tasks) * (1 + len(_KINDS)), PANEL_INCHES, _COLUMNS)
    free = iter(cells)
    for task in tasks:
        draw(next(free), task, groups, metric, trained_len)
        for kind in _KINDS:
            _panel(next(free), task, kind, groups, trained_len)
    legend_below(drawing, cells)
    return png(drawing)


def _panel(panel: Axes, task: str, kind: str, groups: Sequence[Group], trained_len: int | None) -> None:
    title, unit = _KINDS[kind]
    found = [group.costs(task, kind) for group in groups]
    ends = []
    for number, (group, costs) in enumerate(zip(groups, found, strict=True)):
        looks = {"label": told(group, alone=len(groups) == 1), **style(number)}
        ends.append(curve(panel, costs, group, looks))
    if kind == "state_floats":
        panel.set_yscale("symlog", linthresh=1)  # nothing at all may be carried
        panel.set_ylim(bottom=-0.2)
    else:
        panel.set_yscale("log")
        low, high = (math.log10(limit) for limit in panel.get_ylim())
        low, high = math.floor(low), math.ceil(high)  # whole decades: at least two places are named
        panel.set_ylim(10**low, 10**high)
        panel.yaxis.set_minor_formatter(NullFormatter())
        if high - low == 1:
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(EngFormatter(unit if len(unit) == 1 else ""))
    lengths = {length for costs in found for length in costs} or places(groups, task)
    length_axis(panel, task, groups, sorted(lengths), trained_len)
    panel.set_ylabel(f"{title} ({unit})")
    panel.set_title(f"{panel_name(groups, task)}: {title}, by length", fontsize=10)
    panel.grid(alpha=0.3)
    if len(groups) > 1:
        name_ends(panel, [end for end in ends if end is not None])
