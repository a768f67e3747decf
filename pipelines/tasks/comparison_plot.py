"""Groups of evaluations as a plot: a panel for each task, a curve for each group, with a band over its models."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from pipelines.tasks.base import MEMORIES
from pipelines.tasks.comparison import BY_SEGMENT, Group, main_memory, panel_name, panels, place_name, places
from pipelines.tasks.cost import COSTS
from pipelines.tasks.curves import (
    End,
    about_chance,
    draw_chance,
    grid,
    hollow,
    legend_below,
    log_axis,
    mark_end,
    name_ends,
    png,
    style,
    tell_hollow,
)
from pipelines.tasks.questions import CHANCE, ORACLE
from pipelines.tasks.report import short_length
from pipelines.tasks.report_plot import STYLES, draw_oracle

_UNITS = {
    "loss": "loss (nats per token)",
    BY_SEGMENT: "loss (nats per token)",
    "bits_per_byte": "bits per byte",
    "seconds": "wall clock of a run (s)",
    "peak_bytes": "peak memory of a run (bytes)",
}
PANEL_INCHES = (7.2, 5.0)


def plot(groups: Sequence[Group], metric: str, trained_len: int | None) -> bytes:
    """A PNG, a panel a task: the metric by length, or loss by segment; the trained range is shaded."""
    shown = panels(groups)
    drawing, cells = grid(len(shown), PANEL_INCHES)
    for cell, name in zip(cells, shown, strict=True):
        draw(cell, name, groups, metric, trained_len)
    legend_below(drawing, cells)
    return png(drawing)


def draw(panel: Axes, name: str, groups: Sequence[Group], metric: str, trained_len: int | None) -> None:
    """A task's panel: a curve for each group, which ends where its texts no longer fit."""
    memory = main_memory(groups, name)
    ends = []
    for number, group in enumerate(groups):  # a group looks the same in every panel
        if group.places(name):
            looks = {"label": told(group, alone=len(groups) == 1), **style(number)}
            ends.append(_curve(panel, group, name, memory, looks, metric))
    if len(groups) == 1 and memory:
        for other in MEMORIES[1:]:
            _curve(panel, groups[0], name, other, {"label": f"{other} memory", **STYLES[other]}, metric)
    points = [point for group in groups for one in group.evaluations for point in one.points if point.panel == name]
    if chances := _beside(groups, name, CHANCE):
        draw_chance(panel, chances, _told_of_chance(groups))
    if oracles := _beside(groups, name, ORACLE):
        draw_oracle(panel, {at: max(there) for at, there in oracles.items()})
    if any(group.without_memory(name) for group in groups):
        tell_hollow(panel)
    _axes(panel, name, groups, metric, trained_len)
    if metric not in _UNITS and all("low" in point.line for point in points):
        panel.set_ylim(-0.03, 1.03)
    elif metric in COSTS:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(EngFormatter())
    several = any(len(group.evaluations) > 1 for group in groups)
    panel.set_ylabel(_UNITS.get(metric, metric) + (", means; bands and dots: single models" if several else ""))
    panel.grid(alpha=0.3)
    if len(groups) > 1:
        name_ends(panel, [end for end in ends if end is not None])


def _beside(groups: Sequence[Group], panel: str, what: str) -> dict[int, list[float]]:
    """What chance or an oracle gives at the places of a panel."""
    found: dict[int, list[float]] = {}
    for point in (point for group in groups for one in group.evaluations for point in one.points):
        if point.panel == panel and what in point.line:
            found.setdefault(point.at, []).append(point.line[what])
    return found


def _told_of_chance(groups: Sequence[Group]) -> str:
    """A line of the legend for all panels."""
    by_panel = {panel: _beside(groups, panel, CHANCE) for panel in panels(groups)}
    found: dict[str, list[str]] = {}
    for panel, chances in by_panel.items():
        if chances:
            span = about_chance(value for there in chances.values() for value in there)
            found.setdefault(span, []).append(panel)
    spans = list(found) if len(found) == 1 else [f"{', '.join(mine)}: {span}" for span, mine in found.items()]
    return f"chance ({'; '.join(spans)})"


def told(group: Group, *, alone: bool) -> str:
    """A line of the legend."""
    about = group.about if group.name == group.about else f"{group.name} ({group.about})"
    named = about if alone or about.startswith((f"{group.label} (", f"{group.label},")) else f"{group.label}: {about}"
    num = len(group.evaluations)
    return f"{named}; mean of {num}" if num > 1 else named


def _axes(panel: Axes, name: str, groups: Sequence[Group], metric: str, trained_len: int | None) -> None:
    """The places as a logarithmic axis, the trained ones shaded."""
    marks = places(groups, name)
    if metric == BY_SEGMENT:
        names = [place_name(groups, name, at, metric) for at in marks]
        size = groups[0].evaluations[0].subject.segment_len
        label = f"segment index, means over a stretch (segments of {size:,} tokens)"
        marks, trained = [at + 1 for at in marks], None if trained_len is None else trained_len / size
        log_axis(panel, marks, names, label)
        _shade(panel, trained, trained_len)
        title = f"loss by segment, {name}"
    else:
        length_axis(panel, name, groups, marks, trained_len)
        title = f"{panel_name(groups, name)}: {metric.replace('_', ' ')} by length"
    panel.set_title(title, fontsize=10)


def length_axis(
    panel: Axes, name: str, groups: Sequence[Group], lengths: Sequence[int], trained_len: int | None
) -> None:
    """Lengths as a logarithmic axis, the trained ones shaded, and where texts of a group no longer fit."""
    ends = [(group.end(name), number) for number, group in enumerate(groups)]
    found = {end for end, _ in ends if end is not None}
    marks = sorted({*lengths, *found, *([] if trained_len is None else [trained_len])})
    log_axis(panel, marks, [short_length(at) for at in marks], "text length (tokens)")
    _shade(panel, trained_len, trained_len)
    for end, number in ends:
        if end is not None:
            mark_end(panel, end, f"{groups[number].label} does not fit", style(number)["color"])


def _shade(panel: Axes, trained: float | None, trained_len: int | None) -> None:
    if trained is not None:
        panel.axvspan(0.1, trained, color="0.9", zorder=0, label=f"trained on up to {trained_len:,} tokens")


def _curve(panel: Axes, group: Group, name: str, memory: str | None, looks: dict[str, Any], metric: str) -> End | None:
    """Of one memory."""
    by_place = {at + (metric == BY_SEGMENT): group.values(name, at, memory) for at in group.places(name)}
    hollow_at = {at + (metric == BY_SEGMENT) for at in group.without_memory(name)}
    return curve(panel, by_place, group, looks, hollow_at)


def curve(
    panel: Axes,
    by_place: Mapping[int, Sequence[float]],
    group: Group,
    looks: dict[str, Any],
    hollow_at: Collection[int] = (),
) -> End | None:
    """The mean of a group's values, a band from the lowest to the highest, and a dot for each."""
    points = [(at, values) for at, values in by_place.items() if values]
    if not points:
        return None
    x = [at for at, _ in points]
    means = [sum(values) / len(values) for _, values in points]
    panel.plot(x, means, **looks)
    empty = [(at, mean) for at, mean in zip(x, means, strict=True) if at in hollow_at]
    hollow(panel, [at for at, _ in empty], [mean for _, mean in empty], looks)
    finite = [[value for value in values if math.isfinite(value)] or [math.nan] for _, values in points]
    low, high = ([least(values) for values in finite] for least in (min, max))
    panel.fill_between(x, low, high, color=looks["color"], alpha=0.15, linewidth=0)
    if len(group.evaluations) > 1:
        dots = [(at, value) for at, values in points for value in values]
        panel.scatter([at for at, _ in dots], [value for _, value in dots], s=6, color=looks["color"], zorder=3)
    drawn = [(at, mean) for at, mean in zip(x, means, strict=True) if math.isfinite(mean)]
    return End(*drawn[-1], group.label, looks["color"]) if drawn else None
