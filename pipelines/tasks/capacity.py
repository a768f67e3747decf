"""How many facts a memory holds against its size, from accuracies of the tasks capacity_1 to capacity_64.

Facts held are a step and no interpolation: the largest number of facts that was asked for of which at least 95 % of
the answers are right, and 0 where there is none.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from pipelines.tasks.base import TRUE
from pipelines.tasks.comparison import Evaluation, Group, panels
from pipelines.tasks.curves import End, grid, log_axis, name_ends, png, style
from pipelines.tasks.report import number, titled

HELD_AT = 0.95  # accuracy

_TASK = re.compile(r"capacity_(\d+)")
_PANEL_INCHES = (6.4, 4.6)


class Held(NamedTuple):
    """What one model holds at one length of texts."""

    curve: str  # a kind of memory, or a named group
    length: int  # tokens
    state_floats: int
    num_facts: int
    most_asked: int  # facts: no more can have been held


def are_asked(groups: Sequence[Group]) -> bool:
    """Whether capacity tasks are among the results."""
    return any(_TASK.fullmatch(panel) for panel in panels(groups))


def facts_held(groups: Sequence[Group]) -> list[Held]:
    """Of every model at every length."""
    return [
        Held(group.kind, length, one.subject.floats_at(length), *_held(one, length))
        for group in groups
        for one in group.evaluations
        for length in sorted({point.at for point in one.points if _TASK.fullmatch(point.panel)})
    ]


def _held(evaluation: Evaluation, length: int) -> tuple[int, int]:
    """The facts held, and the most that were asked for."""
    values = {
        int(found[1]): point.value
        for point in evaluation.points
        if (found := _TASK.fullmatch(point.panel)) and point.at == length and point.memory == TRUE
    }
    return max((num for num, value in values.items() if value >= HELD_AT), default=0), max(values)


def _by_curve(found: Sequence[Held], length: int) -> Iterator[tuple[str, dict[int, list[int]]]]:
    """Each curve at a length: facts held by the models of each size."""
    for curve in dict.fromkeys(one.curve for one in found):
        mine = [one for one in found if (one.curve, one.length) == (curve, length)]
        floats = sorted({one.state_floats for one in mine})
        yield curve, {size: [one.num_facts for one in mine if one.state_floats == size] for size in floats}


def markdown(groups: Sequence[Group]) -> str:
    """A row a curve and size, a column a length; every model's facts."""
    found = facts_held(groups)
    lengths = sorted({one.length for one in found})
    cells = {
        (curve, size, length): f"{', '.join(map(str, nums))} (mean {number(sum(nums) / len(nums))})"
        for length in lengths
        for curve, sizes in _by_curve(found, length)
        for size, nums in sizes.items()
    }
    rows = [
        [curve, f"{size:,}", *(cells.get((curve, size, length), "-") for length in lengths)]
        for curve, size in dict.fromkeys((one.curve, one.state_floats) for one in found)
    ]
    table = titled("facts held", ["memory", "state floats", *(f"{length:,} tokens" for length in lengths)], rows)
    most = max(one.most_asked for one in found)
    return (
        f"{table}\n\nThe largest number of facts asked for, of at most {most}, of which at least {HELD_AT:.0%} were "
        "right: a step, not interpolated; one number a model.\n"
    )


def plot(groups: Sequence[Group]) -> bytes:
    """A PNG, a panel a length: facts held against state floats, a curve a kind of memory or named group."""
    found = facts_held(groups)
    lengths = sorted({one.length for one in found})
    drawing, cells = grid(len(lengths), _PANEL_INCHES)
    for panel, length in zip(cells, lengths, strict=True):
        _panel(panel, found, length)
    return png(drawing)


def _panel(panel: Axes, found: Sequence[Held], length: int) -> None:
    ends = []
    for index, (curve, sizes) in enumerate(_by_curve(found, length)):
        if not sizes:
            continue
        means = [sum(nums) / len(nums) for nums in sizes.values()]
        panel.plot(list(sizes), means, **style(index))
        low, high = ([least(nums) for nums in sizes.values()] for least in (min, max))
        panel.fill_between(list(sizes), low, high, color=style(index)["color"], alpha=0.15, linewidth=0)
        ends.append(End(max(sizes), means[-1], curve, style(index)["color"]))
    floats = sorted({one.state_floats for one in found})
    log_axis(panel, floats, [f"{size:,}" for size in floats], "state (floats)")
    most = max(one.most_asked for one in found)
    marks = [0, *(2**i for i in range(most.bit_length()))]
    panel.set_yscale("symlog", base=2, linthresh=1)
    panel.yaxis.set_major_locator(FixedLocator(marks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_yticklabels([str(mark) for mark in marks])
    panel.set_ylim(-0.2, most * 1.2)
    panel.axhline(most, color="grey", linestyle=":")
    panel.annotate("most that was asked", (floats[0], most), (0, -10), textcoords="offset points", fontsize=8)
    panel.set_ylabel(f"facts held (accuracy at least {HELD_AT:.0%})")
    panel.set_title(f"facts held in texts of {length:,} tokens: means, bands over models", fontsize=10)
    panel.grid(alpha=0.3)
    name_ends(panel, ends)
