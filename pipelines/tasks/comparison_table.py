"""Groups of evaluations as Markdown tables, and the difference between two of them."""

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.tasks.base import MEMORIES
from pipelines.tasks.comparison import (
    Evaluation,
    Group,
    described,
    differences_of_questions,
    main_memory,
    panel_name,
    panels,
    place_name,
    places,
)
from pipelines.tasks.intervals import t_interval
from pipelines.tasks.questions import CHANCE, ORACLE
from pipelines.tasks.report import NEEDS_NONE, UNITS, about_intervals, cell, number, titled


class Difference(NamedTuple):
    """First minus second at one place, over pairs of models."""

    panel: str
    at: int
    mean: float
    low: float | None  # ends of the 95 % t-interval; None for a single pair
    high: float | None
    num_pairs: int


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Of two groups of equally many models, which are pairs in the order given; none else, or of unlike questions."""
    if len(groups) != 2 or len(groups[0].evaluations) != len(groups[1].evaluations):
        return []
    if differences_of_questions(_all(groups)):
        return []
    found = []
    for panel in panels(groups):
        memory = main_memory(groups, panel)
        for at in places(groups, panel):
            pairs = zip(*(group.evaluations for group in groups), strict=True)
            points = [(first.point(panel, at, memory), second.point(panel, at, memory)) for first, second in pairs]
            gaps = [first.value - second.value for first, second in points if first and second]
            if gaps:
                found.append(Difference(panel, at, *t_interval(gaps), len(gaps)))
    return found


def markdown(groups: Sequence[Group], metric: str) -> str:
    """The models; all groups for each task, a column each; every model of each group; the difference of two groups."""
    parts = [_models(groups)]
    if unlike := differences_of_questions(_all(groups)):
        parts.append(f"**Not the same questions**: {unlike}.")
    for panel in panels(groups):
        if len(groups) > 1:
            parts.append(_side_by_side(groups, panel, metric))
    for group in groups:
        about = group.name if group.name == group.about else f"{group.name} ({group.about})"
        for panel in panels([group]):
            unit = UNITS.get(metric)
            parts.append(
                titled(
                    f"{panel_name([group], panel)}: {metric}, memory {about}", *_every_model(group, panel, metric), unit
                )
            )
    parts.extend(_difference_tables(groups, metric))
    notes = about_intervals([point.line for one in _all(groups) for point in one.points])
    if notes:
        parts.append(" ".join([*notes, "Means are over models."]))
    if any(group.without_memory(panel) for group in groups for panel in panels([group])):
        parts.append(NEEDS_NONE)
    return "\n\n".join(parts) + "\n"


def _all(groups: Sequence[Group]) -> list[Evaluation]:
    return [one for group in groups for one in group.evaluations]


def _models(groups: Sequence[Group]) -> str:
    """What is compared: kinds side by side are worth most at equal state floats and equal parameters."""
    rows = []
    for group in groups:
        for about in dict.fromkeys(described(one.subject) for one in group.evaluations):
            mine = [one for one in group.evaluations if described(one.subject) == about]
            subject = mine[0].subject
            sizes = map(number, (subject.num_parameters, subject.segment_len))
            rows.append([group.label, subject.memory, subject.floats, *sizes, ", ".join(one.name for one in mine)])
    return titled("models", ["group", "memory", "state", "parameters", "segment tokens", "models"], rows)


def _side_by_side(groups: Sequence[Group], panel: str, metric: str) -> str:
    """A row a place, a column a group: the mean over its models."""
    memory = main_memory(groups, panel)
    rows = [
        [
            place_name(groups, panel, at, metric),
            *(shown(group, panel, at, group.mean(panel, at, memory)) + _mark([group], panel, at) for group in groups),
        ]
        for at in places(groups, panel)
    ]
    told = f", {memory} memory" if memory else ""
    heads = [_place_head(metric), *(group.label for group in groups)]
    return titled(f"{panel_name(groups, panel)}: {metric}{told}, means over models", heads, rows, UNITS.get(metric))


def _mark(groups: Sequence[Group], panel: str, at: int) -> str:
    """Behind a place, or a value, where no memory is needed."""
    return "*" if any(at in group.without_memory(panel) for group in groups) else ""


def shown(group: Group, panel: str, at: int, value: float | None) -> str:
    """A value of a table, or that the texts do not fit."""
    end = group.end(panel)
    return "does not fit" if value is None and end is not None and at >= end else number(value)


def _every_model(group: Group, panel: str, metric: str) -> tuple[list[str], list[list[str]]]:
    """A row a place: every model, then all of them with each memory."""
    shown = [one.point(panel, at, None) or one.point(panel, at, MEMORIES[0])
             for at in group.places(panel) for one in group.evaluations]  # fmt: skip
    lines = [point.line for point in shown if point]
    extra = [name for name in ("num_samples", CHANCE, ORACLE) if any(name in line for line in lines)]
    known = [name for name in extra if name != "num_samples"]  # of the questions, whatever the model
    memory = main_memory([group], panel)
    others = MEMORIES[1:] if memory else ()
    rows = []
    for at in group.places(panel):
        points = [one.point(panel, at, memory) for one in group.evaluations]
        found = [point.line for point in points if point is not None]
        samples = ", ".join(map(str, sorted({line["num_samples"] for line in found if "num_samples" in line})))
        beside = [next((line[name] for line in found if name in line), None) for name in known]
        rows.append(
            [
                place_name([group], panel, at, metric) + _mark([group], panel, at),
                *([samples] if "num_samples" in extra else []),
                *(cell(None if point is None else point.line) for point in points),
                *(number(group.mean(panel, at, name)) for name in (memory, *others)),
                *map(number, beside),
            ]
        )
    heads = [
        _place_head(metric),
        *(["samples"] if "num_samples" in extra else []),
        *(one.name for one in group.evaluations),
        "mean",
        *others,
        *known,
    ]
    return heads, rows


def _place_head(metric: str) -> str:
    return "segment" if metric == "loss_by_segment" else "tokens"


def _difference_tables(groups: Sequence[Group], metric: str) -> list[str]:
    if len(groups) != 2:
        return []
    found = differences(groups)
    first, second = groups
    if len(first.evaluations) != len(second.evaluations):
        counts = f"{len(first.evaluations)} models of {first.label} and {len(second.evaluations)} of {second.label}"
        return [f"No difference is taken: {counts} are no pairs."]
    if not found:
        return ["No difference is taken: the questions, or the places where they were asked, are not the same."]
    pairs = ", ".join(f"{a.name} with {b.name}" for a, b in zip(first.evaluations, second.evaluations, strict=True))
    tables = []
    for panel in panels(groups):
        rows = [
            [
                place_name(groups, panel, one.at, metric) + _mark(groups, panel, one.at),
                number(one.mean),
                "-" if one.low is None else f"[{number(one.low)}, {number(one.high)}]",
                str(one.num_pairs),
            ]
            for one in found
            if one.panel == panel
        ]
        title = f"{panel_name(groups, panel)}: {metric} of {first.label} minus {second.label}"
        tables.append(titled(title, [_place_head(metric), "difference", "95 % interval", "pairs"], rows))
    return [*tables, f"Pairs of models in the order given: {pairs}. The interval is Student's t over pairs."]
