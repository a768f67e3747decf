"""How many facts a memory holds against its size, from accuracies of the tasks capacity_1 to capacity_64.

The same of the pairs of pairs_1 to pairs_64 and latest_1 to latest_64.

Facts held are a step and no interpolation: the largest number of facts that was asked for of which at least 95 % of
the answers are right. Where that is the largest number of all the model may hold more (`>= 8`), and where not even
the smallest one that was asked for is held it may hold any fewer (`< 64`; of a single fact that is 0). An interval goes
from what is held by the lower ends of the accuracies' 95 % intervals to what is held by their upper ends.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from pipelines.tasks.base import TRUE
from pipelines.tasks.comparison import Evaluation, Group, panels
from pipelines.tasks.curves import HOLLOW, End, grid, hollow, log_axis, moved, name_ends, place_of, png, sideways, style
from pipelines.tasks.intervals import least_to_reach
from pipelines.tasks.report import NEEDS_NONE, Line, in_background, number, titled

HELD_AT = 0.95  # accuracy

_ASKED = {  # name of a task without its number -> what is held
    "capacity": "facts",
    "pairs": "pairs",
    "latest": "pairs told anew",
}
_TASK = re.compile(rf"({'|'.join(_ASKED)})_(\d+)")
_PANEL_INCHES = (6.4, 4.6)
_BESIDE_POINTS = 36.0  # for all curves side by side at one size of the state
_GAP_POINTS = 7.0  # between two of them, at most
_MODEL_POINTS = 1.5  # between two models of a curve


class Held(NamedTuple):
    """What one model holds at one length of texts."""

    curve: str  # a kind of memory, or a named group
    what: str  # is held: facts, pairs, pairs told anew
    length: int  # tokens
    state_floats: int
    num_facts: int  # 0: fewer than were asked for
    low: int  # facts, by the ends of the accuracies' intervals
    high: int
    least_asked: int  # facts: fewer may be held
    most_asked: int  # facts: more may be held
    num_samples: tuple[int, ...]  # that accuracies are of, from few to many
    background: str | None  # around the facts
    needs_memory: bool  # what is asked for lies in earlier segments

    @property
    def in_words(self) -> str:
        told = f"{self._told(self.num_facts)} [{self._told(self.low)}, {self._told(self.high)}]"
        return told if self.needs_memory else f"{told}*"

    def _told(self, num: int) -> str:
        if num == self.most_asked:
            return f">= {num}"
        return f"< {self.least_asked}" if not num and self.least_asked > 1 else str(num)

    @property
    def is_bound(self) -> bool:
        """Whether more may be held, or fewer than were asked for."""
        return self._told(self.num_facts) != str(self.num_facts)


def are_asked(groups: Sequence[Group]) -> bool:
    """Whether capacity tasks are among the results."""
    return any(_TASK.fullmatch(panel) for panel in panels(groups))


def facts_held(groups: Sequence[Group]) -> list[Held]:
    """Of every model at every length."""
    return [
        _held(group.kind, one, what, length)
        for group in groups
        for one in group.evaluations
        for what, length in sorted(_places(one))
    ]


def _places(evaluation: Evaluation) -> set[tuple[str, int]]:
    """What was asked for, in texts of which lengths."""
    return {(_ASKED[found[1]], point.at) for point in evaluation.points if (found := _TASK.fullmatch(point.panel))}


def _held(curve: str, evaluation: Evaluation, what: str, length: int) -> Held:
    points = {
        int(found[2]): point
        for point in evaluation.points
        if (found := _TASK.fullmatch(point.panel))
        and (_ASKED[found[1]], point.at, point.memory) == (what, length, TRUE)
    }
    lines = {num: point.line for num, point in points.items()}
    return Held(
        curve,
        what,
        length,
        evaluation.subject.floats_at(length),
        num_facts=_most_right(lines, "value"),
        low=_most_right(lines, "low"),
        high=_most_right(lines, "high"),
        least_asked=min(lines),
        most_asked=max(lines),
        num_samples=tuple(sorted({line["num_samples"] for line in lines.values()})),
        background=next(evaluation.backgrounds.get(point.panel) for point in points.values()),
        needs_memory=all(line.get("needs_memory") is not False for line in lines.values()),
    )


def _most_right(lines: Mapping[int, Line], name: str) -> int:
    """The largest number of facts whose accuracy, or an end of its interval, is high enough; 0 where there is none."""
    return max((num for num, line in lines.items() if line[name] is not None and line[name] >= HELD_AT), default=0)


def _by_curve(found: Sequence[Held]) -> Iterator[tuple[str, dict[int, list[Held]]]]:
    """Each curve: what the models of each size hold."""
    for curve in dict.fromkeys(one.curve for one in found):
        mine = [one for one in found if one.curve == curve]
        floats = sorted({one.state_floats for one in mine})
        yield curve, {size: [one for one in mine if one.state_floats == size] for size in floats}


def markdown(groups: Sequence[Group]) -> str:
    """A table of facts and ones of pairs: a row a curve and size, a column a length; what every model holds."""
    found = facts_held(groups)
    return "\n".join(
        _table(what, [one for one in found if one.what == what]) for what in sorted({one.what for one in found})
    )


def _table(what: str, found: Sequence[Held]) -> str:
    lengths = sorted({one.length for one in found})
    cells = {
        (curve, size, length): _cell(mine)
        for length in lengths
        for curve, sizes in _by_curve([one for one in found if one.length == length])
        for size, mine in sizes.items()
    }
    rows = [
        [
            curve,
            f"{size:,}",
            _numbers(num for one in found if (one.curve, one.state_floats) == (curve, size) for num in one.num_samples),
            *(cells.get((curve, size, length), "-") for length in lengths),
        ]
        for curve, sizes in _by_curve(found)
        for size in sizes
    ]
    heads = ["memory", "state floats", "samples", *(f"{length:,} tokens" for length in lengths)]
    least = least_to_reach(HELD_AT)
    too_few = (
        f" With fewer than {least} samples that is nothing by the lower ends, even where all answers are right."
        if any(num < least for one in found for num in one.num_samples)
        else ""
    )
    without = "" if all(one.needs_memory for one in found) else f" {NEEDS_NONE}"
    return (
        f"{titled(_named(what, found), heads, rows)}\n\nThe largest number of {what} asked for of which at least "
        f"{HELD_AT:.0%} were right: a step, not interpolated; one number a model. `>=`: all that was asked for is "
        f"held; `<`: not even the fewest {what} that were asked for are. In brackets: what is held by the ends of the "
        f"95 % intervals of the accuracies, which are of so many samples.{too_few}{without}\n"
    )


def _named(what: str, found: Iterable[Held]) -> str:
    """What a title says is held, and where."""
    return in_background(f"{what} held", (one.background for one in found if one.background))


def _cell(mine: Sequence[Held]) -> str:
    """Every model's facts, and their mean where all are known."""
    told = ", ".join(one.in_words for one in mine)
    return told if any(one.is_bound for one in mine) else f"{told} (mean {number(_mean(mine))})"


def _mean(mine: Sequence[Held]) -> float:
    return sum(one.num_facts for one in mine) / len(mine)


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def plot(groups: Sequence[Group]) -> bytes:
    """A PNG, a panel a length: facts or pairs held against state floats, a curve a kind of memory or named group."""
    found = facts_held(groups)
    places = sorted({(one.what, one.length) for one in found})
    drawing, cells = grid(len(places), _PANEL_INCHES)
    curves = list(dict.fromkeys(one.curve for one in found))
    for panel, place in zip(cells, places, strict=True):
        _panel(panel, [one for one in found if (one.what, one.length) == place], curves)
    return png(drawing)


def _panel(panel: Axes, here: Sequence[Held], curves: Sequence[str]) -> None:
    """Of the models of one length; all curves of the picture, so that each looks the same in every panel."""
    [(what, length)] = {(one.what, one.length) for one in here}
    ends, num_empty = [], 0
    for curve, sizes in _by_curve(here):
        index = curves.index(curve)
        color = style(index)["color"]
        beside = moved(panel, sideways(index, len(curves), min(_GAP_POINTS, _BESIDE_POINTS / len(curves))))
        means = [_mean(mine) for mine in sizes.values()]
        looks = {"transform": beside, **style(index)}
        panel.plot(list(sizes), means, **looks)
        empty = [i for i, mine in enumerate(sizes.values()) if not all(one.needs_memory for one in mine)]
        hollow(panel, [list(sizes)[i] for i in empty], [means[i] for i in empty], looks)
        num_empty += len(empty)
        low, high = ([least(one.num_facts for one in mine) for mine in sizes.values()] for least in (min, max))
        panel.fill_between(list(sizes), low, high, color=color, alpha=0.15, linewidth=0, transform=beside)
        for size, mine in sizes.items():
            for i, one in enumerate(mine):
                apart = moved(panel, sideways(i, len(mine), _MODEL_POINTS), beside)
                panel.vlines(size, *interval(one), color=color, linewidth=1, transform=apart)
        ends.append((beside, End(max(sizes), means[-1], curve, color)))
    floats = sorted({one.state_floats for one in here})
    log_axis(panel, floats, [f"{size:,}" for size in floats], "state (floats)")
    most = max(one.most_asked for one in here)
    marks = [0, *(2**i for i in range(most.bit_length()))]
    panel.set_yscale("symlog", base=2, linthresh=1)
    panel.yaxis.set_major_locator(FixedLocator(marks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_yticklabels([str(mark) for mark in marks])
    panel.set_ylim(-0.2, most * 1.2)
    for asked, name in most_asked(here).items():
        panel.axhline(asked, color="grey", linestyle=":")
        panel.annotate(name, (floats[0], asked), (0, -10), textcoords="offset points", fontsize=8)
    panel.set_ylabel(f"{what} held (accuracy at least {HELD_AT:.0%})")
    samples = _numbers(num for one in here for num in one.num_samples)
    notes = ["a bound counts as its number"] if any(one.is_bound for one in here) else []
    notes += ["curves side by side"] if len(curves) > 1 else []
    lines = [
        f"{_named(what, here)}, texts of {length:,} tokens, by {samples} samples each:",
        "means, bands over models; lines: by 95 % intervals of accuracy",
        "; ".join(notes),
        HOLLOW if num_empty else "",
    ]
    panel.set_title("\n".join(line for line in lines if line), fontsize=9)
    panel.grid(alpha=0.3)
    name_ends(panel, [end._replace(x=place_of(panel, beside, end)) for beside, end in ends])


def interval(one: Held) -> tuple[int, int]:
    """The ends of the line that is drawn for a model; where none of the facts is held all that were not asked for."""
    return one.low, max(one.high, one.least_asked if one.num_facts == 0 and one.least_asked > 1 else 0)


def most_asked(here: Sequence[Held]) -> dict[int, str]:
    """The most facts that were asked for at a length, and of whom where that differs."""
    found: dict[int, list[str]] = {}
    for one in here:
        curves = found.setdefault(one.most_asked, [])
        if one.curve not in curves:
            curves.append(one.curve)
    asked = "most that was asked"
    return {most: asked if len(found) == 1 else f"{asked} of {', '.join(curves)}" for most, curves in found.items()}
