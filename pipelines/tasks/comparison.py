"""Evaluations of several models side by side, in groups: the models of a group are seeds of one recipe.

A seed that failed is a line of the table and a dot of the plot like any other.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipelines import storage
from pipelines.config import InputError
from pipelines.tasks import TASKS, babi
from pipelines.tasks.base import DOES_NOT_FIT, MEMORIES
from pipelines.tasks.cost import COSTS, PEAK_BYTES, SECONDS
from pipelines.tasks.facts import COUNTS
from pipelines.tasks.questions import ACCURACY, AT_DEPTH, ORACLE
from pipelines.tasks.report import (
    CONFIG,
    COST_LINES,
    FORMAT,
    METRICS,
    Line,
    Subject,
    curve_of,
    distinct,
    in_background,
    mean_loss,
    number,
    pooled,
    stretches,
)

BY_SEGMENT = "loss_by_segment"
_DECIDE = (  # what is asked
    "questions_version",
    "held_out",
    "background",
    "num_samples",
    "depths",
    "seed",
    "questions",
    "limit_segments",
)
_DECIDE_COST = ("batch_size", "device")
SEGMENT_LEN = "segment_len"  # decides what is asked, too, except of some tasks
_SHORT = 24  # letters of a label behind its kind, at most
NOT_TOLD = "not told"  # the value of a setting that is missing
_ALIKE_IN_ANY_SEGMENTS = frozenset(  # tasks whose texts do not depend on how long segments are
    (
        *("memorise", "quadratic", "sorting", "fwe", "file"),
        *(f"capacity_{num}" for num in COUNTS),
        *(f"{task}_along" for task in babi.LABELS),
    )
)

_FINGERPRINT = re.compile("[0-9a-f]{17,}")


class Point(NamedTuple):
    """One figure, as a point of a curve."""

    panel: str  # what the curve is of: a task, or texts of one length
    at: int  # tokens of the text; of a loss by segment the first segment of a stretch
    memory: str | None
    line: Line

    @property
    def value(self) -> float:
        """NaN where a diverged model gave no number."""
        return math.nan if self.line["value"] is None else float(self.line["value"])


class Cost(NamedTuple):
    """What one text of a run costs."""

    task: str
    length: int  # tokens
    seconds: float | None  # None: an evaluation from before texts were counted
    peak_bytes: float | None  # of the whole process; None: the system does not tell
    state_floats: int  # carried at the end of a text


class Evaluation(NamedTuple):
    """What evaluate has left of one model, in one directory or more: its figures of one metric; several seeds of
    questions are one.
    """

    name: str  # of its directory, or of all of them
    uri: str  # of the first one
    subject: Subject
    questions: dict[str, dict[str, str]]  # task -> the settings that decide what it asked, in words and in full
    points: list[Point]
    measuring: dict[str, dict[str, str]]  # URI -> the settings that decide what it cost, in words; none without costs
    costs: list[Cost]
    ends: dict[str, int]  # task -> the length at which texts no longer fit
    backgrounds: dict[str, str]  # task -> what stands around its facts, if it has such

    def told(self, setting: str) -> str:
        """A setting of its questions, in words; of all tasks that have it."""
        values = (asked[setting] for asked in self.questions.values() if setting in asked)
        return " and ".join(dict.fromkeys(map(_shown, values))) or NOT_TOLD

    def point(self, panel: str, at: int, memory: str | None) -> Point | None:
        return next((point for point in self.points if point[:3] == (panel, at, memory)), None)

    @property
    def measured(self) -> set[tuple[str, int]]:
        """What was measured, at which places, and where texts no longer fit."""
        return {(point.panel, point.at) for point in self.points} | set(self.ends.items())


class Group(NamedTuple):
    """Models that are seeds of one another."""

    name: str
    label: str  # short, and no other group's
    kind: str  # groups of one kind may differ in the size of their state
    evaluations: list[Evaluation]

    @property
    def about(self) -> str:
        """What its models are, in words."""
        return "; ".join(dict.fromkeys(described(one.subject) for one in self.evaluations))

    def values(self, panel: str, at: int, memory: str | None) -> list[float]:
        """Of its models, as far as they were measured there."""
        found = (one.point(panel, at, memory) for one in self.evaluations)
        return [point.value for point in found if point is not None]

    def mean(self, panel: str, at: int, memory: str | None) -> float | None:
        values = self.values(panel, at, memory)
        return sum(values) / len(values) if values else None

    def places(self, panel: str) -> list[int]:
        return places([self], panel)

    def costs(self, task: str, name: str) -> dict[int, list[float]]:
        """A field of its models' costs by length, as far as it was measured."""
        found: dict[int, list[float]] = {}
        for cost in sorted((cost for one in self.evaluations for cost in one.costs), key=lambda cost: cost.length):
            value = getattr(cost, name)
            if cost.task == task and value is not None:
                found.setdefault(cost.length, []).append(value)
        return found

    def without_memory(self, panel: str) -> set[int]:
        """The places where no memory is needed."""
        return {point.at for one in self.evaluations for point in one.points
                if point.panel == panel and point.line.get("needs_memory") is False}  # fmt: skip

    def end(self, panel: str) -> int | None:
        """The length at which texts no longer fit."""
        return min((one.ends[panel] for one in self.evaluations if panel in one.ends), default=None)


def read_groups(results: Sequence[str], metric: str) -> list[Group]:
    """Groups as they are named, NAME=DIR,DIR; plain directories by model, memory and questions. Raises InputError."""
    named: dict[str, list[str]] = {}
    plain = []
    for item in results:
        name, equals, rest = item.partition("=")
        if not equals or "/" in name:
            plain.append(storage.absolute(item))
        elif not name or name in named or not rest.strip(","):
            raise InputError(f"--results {item}: give each group once, with its directories: {name}=DIR,DIR")
        else:
            named[name] = [storage.absolute(uri) for uri in rest.split(",") if uri]
    uris = [*plain, *(uri for mine in named.values() for uri in mine)]
    if twice := next((uri for uri in uris if uris.count(uri) > 1), None):
        raise InputError(f"--results names {twice} twice")
    read = functools.partial(read_evaluation, metric=metric)
    groups = [Group(name, name, name, _by_model(map(read, mine))) for name, mine in named.items()]
    for group in groups:
        if unlike := differences_of_questions(group.evaluations):
            raise InputError(f"--results {group.name}: not the same questions: {unlike}; make groups of them")
    groups += _alike(_by_model(map(read, plain)), named)
    if not panels(groups):
        raise InputError(f"--results: no text fits, so that there is no {metric} to compare")
    segment_lens = {one.subject.segment_len for group in groups for one in group.evaluations}
    if metric == BY_SEGMENT and len(segment_lens) > 1:
        shown = " and ".join(map(str, sorted(segment_lens)))
        raise InputError(f"--metric {BY_SEGMENT}: segments of {shown} tokens cannot be put side by side")
    return groups


def _by_model(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Those of one model that was asked alike as one, with what was measured in any. InputError where that is twice."""
    found: list[list[Evaluation]] = []
    for one in evaluations:
        mine = next((parts for parts in found if all(_are_one_model(part, one) for part in parts)), [])
        if not mine:
            found.append(mine)
        for part in mine:
            if twice := part.measured & one.measured:
                panel, at = min(twice)
                raise InputError(
                    f"--results: {part.uri} and {one.uri} are of one model, with {panel} at {at:,} in both; "
                    "give one of them, or each as a named group"
                )
        mine.append(one)
    return [_together(parts) for parts in found]


def _are_one_model(one: Evaluation, other: Evaluation) -> bool:
    """Whether the same model, read the same way, was asked alike as far as both say."""
    if (one.subject.fingerprint, described(one.subject)) != (other.subject.fingerprint, described(other.subject)):
        return False
    return all(
        one.questions[task][name] == other.questions[task][name]
        for task in one.questions.keys() & other.questions.keys()
        for name in one.questions[task].keys() & other.questions[task].keys()
    )


def _together(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of one model as one."""
    return parts[0]._replace(
        name=" + ".join(dict.fromkeys(part.name for part in parts)),
        questions={
            task: {name: value for part in parts for name, value in part.questions.get(task, {}).items()}
            for task in dict.fromkeys(task for part in parts for task in part.questions)
        },
        points=[point for part in parts for point in part.points],
        measuring={uri: told for part in parts for uri, told in part.measuring.items()},
        backgrounds={task: told for part in parts for task, told in part.backgrounds.items()},
        costs=[cost for part in parts for cost in part.costs],
        ends={
            task: min(part.ends[task] for part in parts if task in part.ends) for part in parts for task in part.ends
        },
    )


def _alike(evaluations: Sequence[Evaluation], taken: Collection[str]) -> list[Group]:
    """Those of equal memories, sizes, segments and questions together, in the order given, of one kind by the size of
    their state; no label that is taken.
    """
    differ = [name for name in _unlike_settings(evaluations) if name != SEGMENT_LEN]
    found: dict[str, list[Evaluation]] = {}
    for one in evaluations:
        asked = [f"{name} {one.told(name)}" for name in differ]
        found.setdefault(", ".join([described(one.subject), *asked]), []).append(one)
    by_kind: dict[str, list[tuple[str, list[Evaluation]]]] = {}
    for name, mine in found.items():
        by_kind.setdefault(_free(_kind(mine[0].subject), taken), []).append((name, mine))
    groups: list[Group] = []
    for kind, alike in by_kind.items():
        alike.sort(key=lambda one: (one[1][0].subject.floats_per_token, one[1][0].subject.state_floats))
        apart = [f"{kind}, {words}" for words in _told_apart([mine[0] for _, mine in alike], differ)]
        labels = [kind] if len(alike) == 1 else apart
        taken = {*taken, *(group.label for group in groups)}
        if not labels or not taken.isdisjoint(labels):
            numbered = (f"{kind} {i}" for i in itertools.count(1))
            labels = list(itertools.islice((label for label in numbered if label not in taken), len(alike)))
        groups += [Group(name, label, kind, mine) for label, (name, mine) in zip(labels, alike, strict=True)]
    return groups


def _told_apart(models: Sequence[Evaluation], differ: Iterable[str]) -> list[str]:
    """What is unlike of each of these models, where it is one setting and short; nothing where it is not."""
    settings = [_settings(one, differ) for one in models]
    sizes = [
        {"floats": one.subject.floats, "parameters": f"{number(one.subject.num_parameters)} parameters"}
        for one in models
    ]
    for told in (settings, sizes):
        unlike = {name for one in told for name in one if len({other.get(name) for other in told}) > 1}
        if len(unlike) > 1:
            return []
        for name in unlike:
            words = [one.get(name, f"no {name}") for one in told]
            return words if len(set(words)) == len(words) and max(map(len, words)) <= _SHORT else []
    return []


def _settings(one: Evaluation, differ: Iterable[str]) -> dict[str, str]:
    """A model's memory, its segments, and those settings of its questions that differ, each in words."""
    found = {SEGMENT_LEN: f"segments of {one.subject.segment_len:,} tokens"}
    for name in differ:
        found[name] = f"{name.replace('_', ' ')} {one.told(name)}"
    parts = _parts(one.subject.memory)
    for kind, settings in parts:
        for setting in re.split(", (?=[a-z])", settings) if settings else ():
            name, _, value = setting.partition(" ")
            name = name.replace("_", " ") if len(parts) == 1 else f"{kind} {name.replace('_', ' ')}"
            found[name] = name if value == "True" else f"{name} {value}"
    return found


def _free(kind: str, taken: Collection[str]) -> str:
    """A kind that is not the name of a named group, so that no curve or column holds both."""
    while kind in taken:
        kind = f"other {kind}"
    return kind


def described(subject: Subject) -> str:
    """A model in words."""
    parameters = "" if subject.num_parameters is None else f", {subject.num_parameters:,} parameters"
    return f"{subject.memory}, {subject.floats}{parameters}, segments of {subject.segment_len:,} tokens"


def _kind(subject: Subject) -> str:
    """A memory without its settings."""
    return " with ".join(kind for kind, _ in _parts(subject.memory))


def _parts(memory: str) -> list[tuple[str, str]]:
    """Each kind and its settings in words, of which any may be a bracketed list."""
    return re.findall(r"([^()]+?)(?: \(((?:[^()]|\([^()]*\))*)\))?(?: with |$)", memory)


def differences_of_questions(evaluations: Sequence[Evaluation]) -> str:
    """In one line: which settings of tasks that several have are unlike and where; empty where all asked the same."""
    return _unlike(evaluations)


def differences_of_measuring(evaluations: Sequence[Evaluation]) -> str:
    """The same of what decides costs."""
    return _unlike(
        [one._replace(uri=uri, questions={"": told}) for one in evaluations for uri, told in one.measuring.items()]
    )


def _unlike(evaluations: Sequence[Evaluation]) -> str:
    return "; ".join(
        f"{name} is {' and '.join(f'{_shown(value)} in {_shortened(mine)}' for value, mine in values.items())}"
        for name, values in _unlike_settings(evaluations).items()
    )


def _unlike_settings(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, list[Evaluation]]]:
    """setting -> value -> the evaluations that have it, where those that ask of one task have different values."""
    found: dict[str, dict[str, list[Evaluation]]] = {}
    for task in dict.fromkeys(task for one in evaluations for task in one.questions):
        asking = [one for one in evaluations if task in one.questions]
        for name in dict.fromkeys(name for one in asking for name in one.questions[task]):
            values: dict[str, list[Evaluation]] = {}
            for one in asking:
                values.setdefault(one.questions[task].get(name, NOT_TOLD), []).append(one)
            for value, mine in values.items() if len(values) > 1 else ():
                known = found.setdefault(name, {}).setdefault(value, [])
                known += [one for one in mine if all(one is not other for other in known)]
    return found


def _shown(value: str) -> str:
    """Fingerprints by their first digits."""
    return value[:16] if _FINGERPRINT.fullmatch(value) else value


def _shortened(evaluations: Sequence[Evaluation]) -> str:
    """Where they are: the first one, and how many more."""
    more = f" and {len(evaluations) - 1} more" if len(evaluations) > 1 else ""
    return "/".join(evaluations[0].uri.split("/")[-2:]) + more


# --- what evaluate wrote ----------------------------------------------------------------------------


def read_evaluation(uri: str, metric: str) -> Evaluation:
    """InputError where there is no finished evaluation, or it has no such figures."""
    if metric == AT_DEPTH:
        raise InputError(f"--metric {AT_DEPTH}: evaluate draws it, as a heat map of one model")
    content, written = _left_by_evaluate(uri)
    lines = pooled(written)
    found = [line for line in lines if line["metric"] == metric]
    if metric == ACCURACY:
        found = _beside_oracles(found, lines)
    unfit = [line for line in lines if line["metric"] == DOES_NOT_FIT]
    if not found and any(line["metric"] != DOES_NOT_FIT for line in lines):
        known = ", ".join(sorted(set(distinct(lines, "metric")) - {AT_DEPTH}))
        raise InputError(f"{uri} has no {metric}; it has {known}")
    points = _points_by_segment(found) if metric == BY_SEGMENT else [
        Point(line["task"], line["length"], line.get("memory"), line) for line in found
    ]  # fmt: skip
    uri = uri.rstrip("/")
    identity = content.get("identity", {})
    subject = Subject(**content["model"])
    asked = {
        task: _questions(identity, task, metric, subject.segment_len) for task in distinct([*found, *unfit], "task")
    }
    measuring = {name: _in_words(identity[name]) for name in _DECIDE_COST if name in identity}
    has_ablations = identity.get("attention") != "full" and identity.get("ablations", True)
    measuring["ablations"] = "measured too" if has_ablations else "left out"
    if at_once := distinct((line for line in lines if "num_at_once" in line), "num_at_once"):
        measuring["runs at once"] = ",".join(map(str, sorted(at_once)))
    ends = {task: min(line["length"] for line in unfit if line["task"] == task) for task in distinct(unfit, "task")}
    costs = _costs(lines, subject)
    name = uri.rpartition("/")[2]
    tasks = [task for task in distinct(found, "task") if task in TASKS and "background" in TASKS[task].settings]
    backgrounds = {task: identity["background"] for task in tasks if "background" in identity}
    return Evaluation(name, uri, subject, asked, points, {uri: measuring} if costs else {}, costs, ends, backgrounds)


def _beside_oracles(found: Sequence[Line], lines: Sequence[Line]) -> list[Line]:
    """Accuracies with that of the oracle of the same task and length, where it has one."""
    known = {(line["task"], line["length"]): {ORACLE: line["value"]} for line in lines if line["metric"] == ORACLE}
    return [{**line, **known.get((line["task"], line["length"]), {})} for line in found]


def _left_by_evaluate(uri: str) -> tuple[dict[str, Any], list[Line]]:
    """A finished evaluation's configuration and figures. InputError."""
    file = storage.join(uri, CONFIG)
    try:
        content = storage.read_json(file) if storage.exists(file) else None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{uri} is no finished evaluation; give directories written by evaluate")
        Subject(**content["model"])
        files = [name for name in (METRICS, COST_LINES) if storage.exists(storage.join(uri, name))]
        if METRICS not in files:
            raise InputError(f"{uri} is an evaluation without {METRICS}; put it back, or measure it again")
        lines = [
            json.loads(line) for name in files for line in storage.read_bytes(storage.join(uri, name)).splitlines()
        ]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{uri} is a damaged evaluation ({error}); measure it again, to another --output") from error
    return content, lines


def _costs(lines: Sequence[Line], subject: Subject) -> list[Cost]:
    found: dict[tuple[str, int], dict[str, Line]] = {}
    for line in lines:
        if line["metric"] in COSTS:
            found.setdefault((line["task"], line["length"]), {})[line["metric"]] = line
    return [
        Cost(
            task,
            length,
            seconds=mine[SECONDS]["value"] / mine[SECONDS]["num_texts"] if "num_texts" in mine[SECONDS] else None,
            peak_bytes=mine[PEAK_BYTES]["value"] if PEAK_BYTES in mine else None,
            state_floats=subject.floats_at(length),
        )
        for (task, length), mine in found.items()
    ]


def _points_by_segment(lines: Sequence[Line]) -> list[Point]:
    """Means over segments 0, 1, 2-3, 4-7 and so on, for each length of texts."""
    found = []
    for length in distinct(lines, "length"):
        for memory in MEMORIES:
            curve = curve_of(lines, length, memory)
            for start, end in stretches(len(curve)) if curve else ():
                line = {"metric": BY_SEGMENT, "value": mean_loss(curve[start:end]), "end": end}
                found.append(Point(f"texts of {length:,} tokens", start, memory, line))
    return found


def _questions(identity: Mapping[str, Any], task: str, metric: str, segment_len: int) -> dict[str, str]:
    """The settings that a task reads, in words."""
    read = {"tokenizer", "questions_version", *(TASKS[task].settings if task in TASKS else ())}
    if identity.get("background") == "noise" and "limit_segments" not in read:
        read.discard("held_out")  # nothing of it is asked or read
    names = ["tokenizer", *_DECIDE, "seeds", *(_DECIDE_COST if metric in COSTS else ())]
    wanted = read | {"seeds" if "seed" in read else "", *(_DECIDE_COST if metric in COSTS else ())}
    found = {name: _in_words(identity[name]) for name in names if name in wanted and name in identity}
    if _depends_on_segments(task, identity):
        found[SEGMENT_LEN] = str(segment_len)
    return found


def _depends_on_segments(task: str, identity: Mapping[str, Any]) -> bool:
    """Whether a model's segments decide where facts stand and how many there are, or how much text is read."""
    if task in TASKS and "limit_segments" in TASKS[task].settings:
        return identity.get("limit_segments") is not None
    return task in TASKS and task not in _ALIKE_IN_ANY_SEGMENTS


def _in_words(value: Any) -> str:
    shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown or "none"


# --- where there are figures ------------------------------------------------------------------------


def panels(groups: Iterable[Group]) -> list[str]:
    """What there are curves of, in the order of the evaluations."""
    return list(dict.fromkeys(point.panel for group in groups for one in group.evaluations for point in one.points))


def panel_name(groups: Iterable[Group], panel: str) -> str:
    """A panel and what stands around its facts, as titles have it."""
    return in_background(
        panel, (one.backgrounds[panel] for group in groups for one in group.evaluations if panel in one.backgrounds)
    )


def places(groups: Iterable[Group], panel: str) -> list[int]:
    """The places of a panel at which any model was measured."""
    return sorted(
        {point.at for group in groups for one in group.evaluations for point in one.points if point.panel == panel}
    )


def main_memory(groups: Iterable[Group], panel: str) -> str | None:
    """The memory that figures of a panel are with: the true one, or none where they do not depend on it."""
    found = {point.memory for group in groups for one in group.evaluations for point in one.points
             if point.panel == panel}  # fmt: skip
    return None if None in found else MEMORIES[0]


def place_name(groups: Iterable[Group], panel: str, at: int, metric: str) -> str:
    """A length with commas, or the segments of a stretch."""
    if metric != BY_SEGMENT:
        return f"{at:,}"
    ends = [point.line["end"] for group in groups for one in group.evaluations for point in one.points
            if point[:2] == (panel, at)]  # fmt: skip
    return str(at) if max(ends) == at + 1 else f"{at}-{max(ends) - 1}"
