"""Figures as a Markdown table.

A line is a figure as metrics.jsonl has it: `task, length, metric, value` and whichever of Figure's other fields apply.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.tasks import TASKS
from pipelines.tasks.base import DOES_NOT_FIT, MEMORIES, TRUE, ZEROED
from pipelines.tasks.intervals import wilson_interval
from pipelines.tasks.questions import AT_DEPTH, NOT_FINITE, ORACLE, UNWRITTEN

Line = Mapping[str, Any]

FORMAT = "rmt-evaluation-1"  # of an evaluation's directory, as its configuration says
FULL_ATTENTION = "full attention"  # in place of a memory
METRICS, COST_LINES, CONFIG = "metrics.jsonl", "costs.jsonl", "config.json"  # of its files

LOSSES = ("loss", "bits_per_byte", "loss_by_segment")  # means over rows of text; other figures are shares of samples
UNITS = {
    "loss": "nats per token",
    "loss_by_segment": "nats per token",
    "seconds": "wall clock of one run, all memories and samples",
    "peak_bytes": "of the process with its libraries, or on the GPU",
}
BACKGROUNDS = {"noise": "noise (random letters)", "prose": "prose (of the held-out text)"}  # around facts
ABOUT = {
    "true": "the state carried from segment to segment",
    "zeroed": "zeros instead of it before each segment that is measured; those before are read with the true one",
    "shuffled": "the state of the neighbouring row, which has read as much of another text, or that text to its end",
}
NEEDS_NONE = "\\* What is asked for can lie in the segment of the question: no memory is needed there."
_BESIDE = {"num_samples": "samples", "chance": "chance", "num_at_once": "runs at once"}  # heads of a table's columns


class Subject(NamedTuple):
    """What was evaluated, on what."""

    name: str  # of the model
    fingerprint: str
    memory: str  # in words
    segment_len: int
    state_floats: int
    held_out: str  # in words
    seed: str  # in words: one or more
    num_parameters: int | None = None  # of the whole model; None: an evaluation from before this was told
    floats_per_token: int = 0  # that full attention carries; 0: the state is the same at every length
    made_for: int | None = None  # under full attention: the segments that the model was made to read
    max_positions: int | None = None  # under full attention: those that the backbone was made for

    def floats_at(self, length: int) -> int:
        """What is carried at the end of a text."""
        return self.state_floats + self.floats_per_token * length

    @property
    def floats(self) -> str:
        """The same in words."""
        return f"{self.floats_per_token:,} floats a token" if self.floats_per_token else f"{self.state_floats:,} floats"


def short_length(length: int) -> str:
    """4096 as 4k, 1048576 as 1m; others as they are."""
    for unit, letter in ((1024**2, "m"), (1024, "k")):
        if length % unit == 0:
            return f"{length // unit}{letter}"
    return str(length)


def pooled(lines: Sequence[Line]) -> list[Line]:
    """Lines that differ in nothing but their seed as one, over the samples of all of them."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        key = tuple(line.get(name) for name in ("task", "length", "metric", "memory", "segment", "depth"))
        groups.setdefault(key, []).append(line)
    return [_pool(group) if len(group) > 1 else group[0] for group in groups.values()]


def _pool(lines: Sequence[Line]) -> Line:
    """Fractions of samples as that of all samples, with its interval; counts as their sum, others as their mean."""
    if lines[0]["metric"] in (NOT_FINITE, UNWRITTEN):  # told by the seeds that have some
        return {**lines[0], "value": sum(line["value"] for line in lines)}
    if any("low" not in line for line in lines):
        return {**lines[0], "value": sum(line["value"] for line in lines) / len(lines)}
    num = sum(line["num_samples"] for line in lines)
    num_right = sum(line["value"] * line["num_samples"] for line in lines)
    low, high = wilson_interval(num_right, num)
    chances = [line["chance"] for line in lines if "chance" in line]
    about = {"chance": sum(chances) / len(chances)} if chances else {}
    if any(line.get("needs_memory") is False for line in lines):
        about["needs_memory"] = False
    if any(line.get("same_place") for line in lines):
        about["same_place"] = True
    return {**lines[0], **about, "value": num_right / num, "num_samples": num, "low": low, "high": high}


def markdown(subject: Subject, lines: Sequence[Line]) -> str:
    """The whole report; figures of several seeds are pooled."""
    lines = pooled(lines)
    parameters = "" if subject.num_parameters is None else f"{subject.num_parameters:,} parameters; "
    parts = [
        f"# Evaluation of {subject.name}",
        f"Model `{subject.fingerprint[:16]}`: memory {subject.memory}; {parameters}"
        f"segments of {subject.segment_len:,} tokens; "
        f"the state is {subject.floats}{'' if subject.floats_per_token else ', whatever the length'}.\n"
        f"{_about_texts(subject, lines)}Seed {subject.seed}.",
        _about_full(subject)
        if subject.floats_per_token
        else "\n".join(f"- **{memory}** memory: {ABOUT[memory]}" for memory in MEMORIES),
    ]
    for task in distinct(lines, "task"):
        mine = [line for line in lines if line["task"] == task]
        parts.append(f"## {named(task, mine)}")
        for metric in distinct(mine, "metric"):
            chosen = [line for line in mine if line["metric"] == metric]
            if metric == DOES_NOT_FIT:
                parts.append(_ends(chosen))
                continue
            curves = any("segment" in line for line in chosen)
            table = _depth_table if metric == AT_DEPTH else _table
            parts.extend(_curve_tables(metric, chosen) if curves else [table(metric, chosen)])
        parts.extend(_notes(mine))
    return "\n\n".join(parts) + "\n"


def _about_texts(subject: Subject, lines: Sequence[Line]) -> str:
    """What stands around facts, and the held-out text where it is read."""
    backgrounds = {line["background"] for line in lines if "background" in line}
    told = "".join(f"Background: {BACKGROUNDS[one]}. " for one in sorted(backgrounds))
    is_read = any(_reads_held_out(line) for line in lines)
    return f"{told}Held-out text: {subject.held_out}. " if is_read else told


def _reads_held_out(line: Line) -> bool:
    """Whether the task's texts, or what stands around facts in them, are of it."""
    if "limit_segments" in TASKS[line["task"]].settings:
        return True
    return "held_out" in TASKS[line["task"]].settings and line.get("background") != "noise"


def in_background(task: str, backgrounds: Iterable[str]) -> str:
    """A task and what stands around its facts, as titles have it."""
    told = sorted(set(backgrounds))
    return f"{task} in {' and '.join(told)}" if told else task


def named(task: str, lines: Iterable[Line]) -> str:
    """The same of a task's lines."""
    return in_background(task, (line["background"] for line in lines if "background" in line))


def _about_full(subject: Subject) -> str:
    return (
        "Every token sees the whole text before it, through the keys and values of each layer: figures stand under "
        f"*true*. The model was made to read {subject.made_for:,} tokens at once, its backbone for "
        f"{subject.max_positions:,} positions; what longer texts give is shown as it is."
    )


def _ends(lines: Sequence[Line]) -> str:
    """Where nothing was measured, and why."""
    return "\n".join(f"- {line['length']:,} tokens do not fit: {line['reason']}." for line in lines)


def _table(metric: str, lines: Sequence[Line]) -> str:
    """A row a length, a column a memory; samples, chance and how many runs shared the machine where they apply."""
    extra = [name for name in _BESIDE if any(name in line for line in lines)]
    rows = []
    told = {line.get("memory") for line in lines}
    columns: Sequence[str | None] = MEMORIES if ZEROED in told else [TRUE if TRUE in told else None]
    for length in distinct(lines, "length"):
        found = {line.get("memory"): line for line in lines if line["length"] == length}
        first = next(iter(found.values()))
        mark = "*" if first.get("needs_memory") is False else ""
        beside = [number(first.get(name)) for name in extra]
        rows.append([f"{length:,}{mark}", *beside, *(cell(found.get(memory)) for memory in columns)])
    heads = [
        "tokens",
        *(_BESIDE[name] for name in extra),
        *(memory or "value" for memory in columns),
    ]
    return titled(metric, heads, rows)


def _depth_table(metric: str, lines: Sequence[Line]) -> str:
    """A row a length, a column a depth, of the true memory."""
    depths = sorted(distinct(lines, "depth"))
    mine = {(line["length"], line["depth"]): line for line in lines if line["memory"] == TRUE}
    rows = [
        [
            f"{length:,}",
            num_samples([line for (at, _), line in mine.items() if at == length]),
            *(_at_depth(mine.get((length, depth))) for depth in depths),
        ]
        for length in distinct(lines, "length")
    ]
    heads = ["tokens", "samples a depth", *(f"depth {depth:g}" for depth in depths)]
    return titled(f"{metric}, true memory", heads, rows)


def _at_depth(line: Line | None) -> str:
    return f"{cell(line)}†" if line is not None and line.get("same_place") else cell(line)


def num_samples(lines: Sequence[Line]) -> str:
    """How many samples stand behind figures: a number, or from the fewest to the most."""
    counts = sorted({line["num_samples"] for line in lines})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _curve_tables(metric: str, lines: Sequence[Line]) -> list[str]:
    """For each length the means over segments 0, 1, 2-3, 4-7, ... by memory, and how many rows reach them."""
    tables = []
    for length in distinct(lines, "length"):
        curves = {memory: curve_of(lines, length, memory) for memory in MEMORIES}
        size = max(len(curve) for curve in curves.values())
        if not curves[ZEROED]:
            curves = {TRUE: curves[TRUE]}
        reached = {line["segment"]: line["num_samples"] for line in lines
                   if line["length"] == length and line["memory"] == TRUE and "num_samples" in line}  # fmt: skip
        heads = ["segment", *(["rows"] if reached else []), *curves]
        rows = []
        for start, end in stretches(size):
            means = [number(mean_loss(curve[start:end]) if curve else None) for curve in curves.values()]
            beside = [f"{reached[start]:,}"] if reached else []
            rows.append([str(start) if end == start + 1 else f"{start}-{end - 1}", *beside, *means])
        tables.append(titled(f"{metric} at {length:,} tokens", heads, rows, UNITS.get(metric)))
    return tables


def stretches(num_segments: int) -> list[tuple[int, int]]:
    """Segments 0, 1, 2-3, 4-7 and so on as (start, end), the end not in it."""
    starts = [0, *(2**i for i in range(num_segments.bit_length()) if 2**i < num_segments)]
    return list(zip(starts, [*starts[1:], num_segments], strict=True))


def titled(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], unit: str | None = None) -> str:
    """A table under its title."""
    unit = unit or UNITS.get(title)
    table = [heads, ["---:"] * len(heads), *rows]
    written = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"### {title.replace('_', ' ')}{f' ({unit})' if unit else ''}\n\n{written}"


def _notes(lines: Sequence[Line]) -> list[str]:
    notes = about_intervals(lines)
    if any("chance" in line and line.get("memory") == "shuffled" for line in lines):
        notes.append(
            "A shuffled memory knows another sample's answer, which by chance is the right one too: a model that "
            "uses its memory comes out near chance here."
        )
    if any(line.get("needs_memory") is False for line in lines):
        notes.append(NEEDS_NONE)
    if any(line.get("same_place") for line in lines):
        notes.append(
            "† Facts stand where they do at the depth before, in most texts: these are too short to tell the two apart."
        )
    if any(line["metric"] == NOT_FINITE for line in lines):
        notes.append(
            "Not finite: at the answers of so many samples the model's values are no numbers, as where its state has "
            "overflowed; they count as wrong."
        )
    if any(line["metric"] == UNWRITTEN for line in lines):
        notes.append(
            "Unwritten: behind so many texts full attention has no room to write; marks of what is written are of the "
            "others."
        )
    if any(line["metric"] == ORACLE for line in lines):
        notes.append(
            "The oracle knows the counts of the text's last quarter, and at every place the true symbols before it; "
            "nothing else."
        )
    notes.extend(_read_of_held_out(lines))
    told = [line for line in lines if "memory" in line]
    measured = [{line["memory"] for line in told if line["length"] == length} for length in distinct(lines, "length")]
    if any(memories == {TRUE, ZEROED} for memories in measured):
        notes.append("A dash: a single row has no neighbour to be shuffled with.")
    return notes


def _read_of_held_out(lines: Sequence[Line]) -> Iterator[str]:
    """How much of the held-out text stands behind the losses of each length, and where shuffled memories come from."""
    whole = [line for line in lines if "num_read" in line]
    for line in (line for line in whole if line.get("memory") == TRUE):
        length, num_rows = line["length"], line["num_samples"]
        told = [
            f"Texts of {length:,} tokens: {line['num_read']:,} of the {line['num_held_out']:,} tokens of the held-out "
            f"text were read, in {counted(num_rows, 'row')}."
        ]
        same = next((one["num_same_text"] for one in whole if one["length"] == length and "num_same_text" in one), 0)
        if same:
            which = "All" if same == num_rows else f"{same:,} of the"
            told.append(f"{which} shuffled memories are of another stretch of the same document.")
        yield " ".join(told)


def counted(num: int, noun: str) -> str:
    """So many things, in words."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def about_intervals(lines: Iterable[Line]) -> list[str]:
    """What stands in brackets behind figures."""
    of_losses = {line["metric"] in LOSSES for line in lines if "low" in line}
    notes = ["In brackets: the 95 % Wilson interval over a model's samples."] if False in of_losses else []
    if True in of_losses:
        notes.append("In brackets: the 95 % interval over rows of text, as if they were independent (Student's t).")
    return notes


def cell(line: Line | None) -> str:
    """A figure with its interval, if it has one; counts without a fraction."""
    if line is None:
        return "-"
    if line["value"] is None:
        value = "nan"
    else:
        value = number(round(line["value"]) if line["metric"].startswith("num_") else line["value"])
    return f"{value} [{number(line['low'])}, {number(line['high'])}]" if "low" in line else value


def number(value: float | None) -> str:
    """Large ones without a fraction."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4f}"


def distinct(lines: Iterable[Line], name: str) -> list[Any]:
    """The values of a field, in the order of the lines."""
    return list(dict.fromkeys(line[name] for line in lines))


@dataclass(frozen=True)
class Curve:
    """Points (value, tokens) by segment; those of later segments are each of several together, from `starts[i]` on."""

    starts: list[int]
    points: list[tuple[float, int]]
    num_segments: int

    def __len__(self) -> int:
        return self.num_segments

    def __getitem__(self, part: slice) -> list[tuple[float, int]]:
        """The points that begin among these segments."""
        return [point for start, point in zip(self.starts, self.points, strict=True) if part.start <= start < part.stop]

    def means(self, each: int) -> Iterator[tuple[float, float]]:
        """Means over so many segments, or what is told together: pairs of (the middle of these segments, the value)."""
        ends = [*self.starts[1:], self.num_segments]
        told = list(zip(self.starts, ends, self.points, strict=True))
        for _, group in itertools.groupby(told, lambda one: one[0] // each):
            firsts, lasts, points = zip(*group, strict=True)
            yield (firsts[0] + lasts[-1] - 1) / 2, mean_loss(points)


def curve_of(lines: Iterable[Line], length: int, memory: str) -> Curve:
    chosen = [line for line in lines if line["length"] == length and line["memory"] == memory]
    chosen.sort(key=lambda line: line["segment"])
    points = [(math.nan if line["value"] is None else line["value"], line["num_tokens"]) for line in chosen]
    num_segments = chosen[-1]["segment"] + chosen[-1].get("num_segments", 1) if chosen else 0
    return Curve([line["segment"] for line in chosen], points, num_segments)


def mean_loss(points: Sequence[tuple[float, int]]) -> float:
    """The mean over all tokens of points (value, tokens), of which there is at least one."""
    return sum(value * num for value, num in points) / sum(num for _, num in points)
