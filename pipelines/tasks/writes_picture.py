"""Where a gate lets the memory be written, as a row a text, and as Markdown tables.

Axes: B texts, S segments before the one that asks.
"""

import json
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from pipelines.tasks.curves import png
from pipelines.tasks.intervals import wilson_interval
from pipelines.tasks.report import titled
from pipelines.tasks.writes import AFTER, BEFORE, FACTS, PLACES, Writes, elsewhere

_MAX_TEXTS = 64  # that are drawn
_MAX_COLUMNS = 512  # of segments
_WIDTH_INCHES = 10.0
_ROW_INCHES = 0.09  # of a text
_UNSURE = (0.1, 0.9)  # probabilities
_THRESHOLDS = (0.5, 0.9, 0.99, 0.999, 0.9999)
_WORDS = {
    "opening": "the text's first",
    "before": "before the facts",
    "facts": "with the facts",
    "next": "the next one",
    "after": "after that",
}


def plot(found: Writes, title: str) -> bytes:
    """A PNG: a line a text, those with early facts first; dark where its memory is written, rings at the facts."""
    rows = np.argsort(found.first, kind="stable")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_TEXTS)).round().astype(np.int64)]
    drawing = Drawing(figsize=(_WIDTH_INCHES, max(2.4, _ROW_INCHES * len(rows)) + 1.6), dpi=110, layout="constrained")
    FigureCanvasAgg(drawing)
    panel = drawing.subplots()
    _lines(panel, found, rows)
    drawing.colorbar(panel.images[0], ax=panel, label="share of the memory's tokens that a segment writes")
    drawing.suptitle(title, fontsize=10, wrap=True)
    return png(drawing)


def _lines(panel: Axes, found: Writes, rows: np.ndarray) -> None:
    num = found.written.shape[1]
    each = -(-num // _MAX_COLUMNS)  # segments of a column, of which the most written is shown
    padded = np.pad(found.written[rows], ((0, 0), (0, -num % each)))
    columns = padded.reshape(len(rows), -1, each).max(-1)
    extent = (-0.5, columns.shape[1] * each - 0.5, len(rows) - 0.5, -0.5)
    panel.imshow(columns, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    looks: dict[str, Any] = {
        "marker": "o",
        "linestyle": "none",
        "markersize": 5,
        "fillstyle": "none",
        "color": "tab:orange",
    }
    panel.plot(found.first[rows], np.arange(len(rows)), label="the facts", **looks)
    wrong = np.flatnonzero(~found.right[rows])
    if len(wrong):
        at = np.full(len(wrong), extent[1])
        panel.plot(at, wrong, marker="x", linestyle="none", color="black", clip_on=False, label="answered wrongly")
    panel.set_xlim(extent[:2])
    panel.set_xlabel("segment" + (f" (a column is {each}: the one that writes most)" if each > 1 else ""))
    panel.set_ylabel(f"{len(rows)} of {len(found.first)} texts, by place of the facts")
    panel.set_yticks([])
    panel.legend(loc="upper right", fontsize=8)


def table(found: Writes) -> str:
    """What is written where and would be with other thresholds, answers by where else than at the facts it is, and how
    the passages begin that it is at.
    """
    parts = [_by_place(found), _by_threshold(found), _by_error(found), *([_passages(found)] if found.passages else [])]
    return "\n\n".join(parts) + "\n"


def _by_place(found: Writes) -> str:
    rows = []
    for number, place in enumerate(PLACES):
        here = found.places == number
        if not here.any():
            continue
        written, probability = found.written[here], found.probability[here]
        unsure = (probability > _UNSURE[0]) & (probability < _UNSURE[1])
        counts = [int(here.sum()), int((written > 0).sum()), int(unsure.sum())]
        means = [float(written.mean()), float(probability.mean())]
        rows.append([_WORDS[place], *(f"{count:,}" for count in counts), *(f"{mean:.4f}" for mean in means)])
    unsure_head = f"probability {_UNSURE[0]:g} to {_UNSURE[1]:g}"
    heads = ["where", "segments", "written", unsure_head, "mean share of tokens written", "mean probability"]
    note = (
        "Segments before the one that asks. *Written*: at least one token of the memory is. The probability is the "
        f"gate's, the mean of the memory's tokens; it writes those whose own is above {found.threshold:g}."
    )
    return f"{titled('written', heads, rows, 'segments')}\n\n{note}"


def _by_threshold(found: Writes) -> str:
    rows = []
    for least in sorted({*_THRESHOLDS, found.threshold}):
        above = found.highest > least
        at = {place: above & (found.places == PLACES.index(place)) for place in (BEFORE, FACTS, AFTER)}
        counts = [int(at[FACTS].any(1).sum()), int(at[BEFORE].sum()), int(at[AFTER].sum())]
        rows.append([f"{least:g}", *(f"{count:,}" for count in counts)])
    heads = ["write_threshold", "texts with facts above", "segments before them", "after them"]
    note = (
        "Segments in which at least one token's probability is above; of the facts one is enough. The memory is that "
        f"which {found.threshold:g} leaves: with another one it differs from the first other decision on."
    )
    return f"{titled('thresholds', heads, rows, 'segments above')}\n\n{note}"


def _by_error(found: Writes) -> str:
    wrote = {place: _wrote(found, place) for place in (BEFORE, FACTS, AFTER)}
    before, after = wrote[BEFORE], wrote[AFTER]
    groups = [
        ("nowhere", ~before & ~after),
        ("before the facts", before & ~after),
        ("after them", after & ~before),
        ("before and after", before & after),
        ("all texts", np.ones_like(before)),
    ]
    rows = [[name, *_answers(found.right[chosen])] for name, chosen in groups]
    heads = ["written elsewhere", "texts", "all answers right", "share"]
    note = (
        "*Elsewhere*: in another segment than those of the facts, the next one and the text's first. In brackets: the "
        "95 % Wilson interval. "
    )
    missed = ~wrote[FACTS]
    if missed.any():
        right = int(found.right[missed].sum())
        note += (
            f"Texts in which no segment with the facts is written: {int(missed.sum()):,}, of which {right:,} are right."
        )
    else:
        note += "In every text a segment with the facts is written."
    return f"{titled('answers', heads, rows, 'texts, by where else the memory is written')}\n\n{note}"


def _passages(found: Writes) -> str:
    rows = [
        [
            f"{one.row}",
            f"{one.segment:,}",
            _WORDS[PLACES[found.places[one.row, one.segment]]],
            f"{found.highest[one.row, one.segment]:.4f}",
            _as_code(one.words),
        ]
        for one in found.passages
    ]
    heads = ["text", "segment", "where", "highest probability", "begins with"]
    num = int(elsewhere(found.written, found.places).sum())
    return titled("taken for facts", heads, rows, f"the surest of {num:,} segments that are written elsewhere")


def _as_code(words: str) -> str:
    """In a cell of a table."""
    return "`" + json.dumps(words, ensure_ascii=False)[1:-1].replace("`", "'").replace("|", "\\|") + "`"


def _wrote(found: Writes, place: str) -> np.ndarray:
    """Whether a segment of the place is written, (B,) bool."""
    return ((found.written > 0) & (found.places == PLACES.index(place))).any(1)


def _answers(right: np.ndarray) -> list[str]:
    num, good = len(right), int(right.sum())
    if not num:
        return ["0", "-", "-"]
    low, high = wilson_interval(good, num)
    return [f"{num:,}", f"{good:,}", f"{good / num:.4f} [{low:.4f}, {high:.4f}]"]
