"""How many curves are drawn so that they are told apart, also in grey: markers, lines, and a name at each one's end."""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

HOLLOW = "hollow: no memory is needed"

_MARKERS = "osD^vPX*<>h"  # eleven and five have no common divisor: 55 curves before one comes again
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), "-.", (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_GREYS = ("black", "0.45")
_LEAST_GAP = 0.055  # between names, of a panel's height
_COLUMNS = 3  # of panels
_LEGEND_LINE_INCHES = 0.2
_LEGEND_LETTERS_PER_INCH = 13
_LETTER_INCHES = 0.1  # of a name on an axis, with some room between names
_SLANTED_INCHES = 0.22  # along the axis


class End(NamedTuple):
    """Where a curve ends, and its name."""

    x: float
    y: float
    name: str
    color: str


def style(number: int) -> dict[str, Any]:
    """Of the curve with this number: neighbours differ in marker, line and grey."""
    return {
        "color": _GREYS[number % len(_GREYS)],
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 6,
    }


def name_ends(panel: Axes, ends: Sequence[End]) -> None:
    """Names right of the panel, each joined to the end of its curve; call it when the axes have their limits."""
    to_panel = (panel.transData + panel.transAxes.inverted()).transform
    heights = {end: float(to_panel((end.x, end.y))[1]) for end in ends if math.isfinite(end.y)}
    ordered = sorted(heights, key=lambda end: heights[end])
    gap = min(_LEAST_GAP, 1 / max(1, len(ordered) - 1))
    for end, height in zip(ordered, spread([heights[end] for end in ordered], gap), strict=True):
        panel.annotate(
            end.name,
            xy=(end.x, end.y),
            xytext=(1.03, height),
            textcoords=panel.transAxes,
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.6, "linestyle": ":", "shrinkB": 3},
            annotation_clip=False,
        )


def draw_chance(panel: Axes, by_place: Mapping[int, Sequence[float]], label: str) -> None:
    """What chance gives: a dotted line, by place where it is not the same at all; two where questions are unlike."""
    looks: dict[str, Any] = {"color": "grey", "linestyle": ":"}
    values = {value for there in by_place.values() for value in there}
    if len(values) == 1:
        panel.axhline(values.pop(), label=label, **looks)
        return
    places = sorted(by_place)
    low, high = ([least(by_place[at]) for at in places] for least in (min, max))
    panel.plot(places, low, label=label, **looks)
    if high != low:
        panel.plot(places, high, **looks)


def about_chance(values: Iterable[float]) -> str:
    """One number, or from the least to the greatest."""
    shown = list(dict.fromkeys(f"{value:.3g}" for value in sorted(values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def hollow(panel: Axes, x: Sequence[float], y: Sequence[float], looks: Mapping[str, Any]) -> None:
    """Empties the markers of a curve at these points, where no memory is needed."""
    panel.plot(x, y, zorder=4, **{**looks, "linestyle": "none", "markerfacecolor": "white", "label": None})


def tell_hollow(panel: Axes) -> None:
    """A line of the legend."""
    panel.plot([], [], color="grey", marker="o", markerfacecolor="white", linestyle="none", label=HOLLOW)


def mark_end(panel: Axes, x: float, words: str, color: str) -> None:
    """A dotted line, with its meaning along it, where something stops."""
    panel.axvline(x, color=color, linestyle=":", linewidth=1.2)
    panel.annotate(
        words,
        (x, 0),
        xycoords=panel.get_xaxis_transform(),
        xytext=(-4, 6),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8,
        color=color,
        bbox={"color": "white", "alpha": 0.8, "pad": 1},  # may stand on a curve
    )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights in [0, 1], moved as little as keeps them `gap` apart: around their middle."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _lowest(clusters[-1], gap) - _highest(clusters[-2], gap) < gap - 1e-9:
            last = clusters.pop()
            clusters[-1].extend(last)
    return [_lowest(cluster, gap) + i * gap for cluster in clusters for i in range(len(cluster))]


def _lowest(cluster: Sequence[float], gap: float) -> float:
    extent = (len(cluster) - 1) * gap
    return max(0.0, min(1 - extent, sum(cluster) / len(cluster) - extent / 2))


def _highest(cluster: Sequence[float], gap: float) -> float:
    return _lowest(cluster, gap) + (len(cluster) - 1) * gap


def grid(num_panels: int, size: tuple[float, float], most_columns: int = _COLUMNS) -> tuple[Drawing, list[Axes]]:
    """A drawing with so many panels of this size in inches."""
    columns, rows = min(num_panels, most_columns), -(-num_panels // most_columns)
    drawing = Drawing(figsize=(size[0] * columns, size[1] * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    cells = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for cell in cells[num_panels:]:
        cell.remove()
    return drawing, cells[:num_panels]


def legend_below(drawing: Drawing, cells: Sequence[Axes]) -> None:
    """One legend for all panels, in as many lines more as it needs."""
    handles = {label: handle for cell in cells
               for handle, label in zip(*cell.get_legend_handles_labels(), strict=True)}  # fmt: skip
    texts = [textwrap.fill(label, int(_LEGEND_LETTERS_PER_INCH * drawing.get_figwidth())) for label in handles]
    num_lines = sum(text.count("\n") + 1 for text in texts)
    drawing.set_figheight(drawing.get_figheight() + _LEGEND_LINE_INCHES * (num_lines + 1))
    drawing.legend(handles.values(), texts, loc="outside lower left", fontsize=8, handlelength=5, frameon=False)


def png(drawing: Drawing) -> bytes:
    """The same bytes for the same drawing."""
    out = io.BytesIO()
    drawing.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def sideways(number: int, num: int, gap: float) -> float:
    """How far the one with this number stands right of the middle of `num` that are `gap` apart."""
    return (number - (num - 1) / 2) * gap


def moved(panel: Axes, points: float, places: Transform | None = None) -> Transform:
    """The transform that draws so many points right of the panel's own places, or of these."""
    drawing = panel.get_figure(root=True)
    assert drawing is not None
    return (places or panel.transData) + ScaledTranslation(points / 72, 0, drawing.dpi_scale_trans)


def place_of(panel: Axes, drawn: Transform, end: End) -> float:
    """Where on the panel's axis an end stands that is drawn so; call it when the axes have their limits."""
    return float((drawn + panel.transData.inverted()).transform((end.x, end.y))[0])


def log_axis(panel: Axes, places: Sequence[int], names: Sequence[str], label: str) -> None:
    """A logarithmic axis with these places, in order, marked; where their names would touch they are slanted, and those
    that would still are left out.

    A place 0 stands left of the others.
    """
    least = min((place for place in places if place), default=1)
    if places[0]:
        panel.set_xscale("log", base=2)
    else:
        panel.set_xscale("symlog", base=2, linthresh=least)
    panel.xaxis.set_major_locator(FixedLocator(places))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlim(places[0] / 1.4 if places[0] else -0.4 * least, max(places[-1], least) * 1.4)
    inches = [_inches(panel, place) for place in places]
    if _fitting(inches, [len(name) * _LETTER_INCHES for name in names]) == set(range(len(names))):
        panel.set_xticklabels(names)
    else:
        shown = _fitting(inches, [_SLANTED_INCHES] * len(names))
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        panel.set_xticklabels([name if i in shown else "" for i, name in enumerate(names)], **slanted)
    panel.set_xlabel(label)


def _inches(panel: Axes, place: float) -> float:
    """Along the axis of places."""
    drawing = panel.get_figure(root=True)
    assert drawing is not None
    return float(panel.transData.transform((place, 1))[0] / drawing.dpi)


def _fitting(at: Sequence[float], widths: Sequence[float]) -> set[int]:
    """Which of these names, in order, touch none before them; the last one is among them."""
    shown: list[int] = []
    for i in range(len(at)):
        while i == len(at) - 1 and shown and at[i] - at[shown[-1]] < (widths[i] + widths[shown[-1]]) / 2:
            shown.pop()
        if not shown or at[i] - at[shown[-1]] >= (widths[i] + widths[shown[-1]]) / 2:
            shown.append(i)
    return set(shown)
