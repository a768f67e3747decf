"""What memory tokens hold over time, as heat maps of one text, curves of read-outs, and a Markdown table.

Axes: K recorded segments, P segments of read-outs, M memory tokens or slots.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure as Drawing

from pipelines.tasks.curves import End, log_axis, name_ends, png, style
from pipelines.tasks.intervals import wilson_interval
from pipelines.tasks.report import titled
from pipelines.tasks.slots import ReadOut, Trace

_WIDTH_INCHES = 10.0
_ROW_INCHES = 0.16  # of a token
_LEAST_MOVED = 1e-4  # what is told apart from standing still


class Shown(NamedTuple):
    """What a picture is of, in words."""

    title: str
    noun: str  # what a row of the memory is called: token or slot


def plot(trace: Trace, found: ReadOut, shown: Shown) -> bytes:
    """A PNG: of the first text what tokens keep and how far they move, of all texts the read-outs."""
    num_tokens = trace.kept.shape[2]
    map_height, curve_height = max(1.6, _ROW_INCHES * num_tokens), max(4.0, _ROW_INCHES * num_tokens)
    heights = [map_height, map_height, curve_height]
    drawing = Drawing(figsize=(_WIDTH_INCHES, sum(heights) + 2.4), dpi=110, layout="constrained")
    FigureCanvasAgg(drawing)
    kept, moved, read = drawing.subplots(3, 1, gridspec_kw={"height_ratios": heights})
    _map(kept, trace.at, trace.kept[0], "cividis", Normalize(min(0.0, float(trace.kept[0].min())), 1.0), shown.noun)
    kept.set_title("kept: cosine similarity to itself right behind the fact (first text)", fontsize=10)
    drawing.colorbar(kept.images[0], ax=kept, label="cosine similarity")
    least = max(_LEAST_MOVED, float(trace.moved[0].min()))  # the first segment may move a token a hundred times as far
    far = np.maximum(trace.moved[0], least)
    _map(moved, trace.at, far, "Greys", LogNorm(least, max(2 * least, float(far.max()))), shown.noun)
    moved.set_title("moved: norm of a segment's change, as a share of the norm before (first text)", fontsize=10)
    drawing.colorbar(moved.images[0], ax=moved, label="share of its norm")
    _curves(read, trace, found, shown.noun)
    drawing.suptitle(shown.title, fontsize=10, wrap=True)
    return png(drawing)


def _map(panel: Axes, at: np.ndarray, values: np.ndarray, colors: str, norm: Normalize, noun: str) -> None:
    """values (K, M), a row a token, a column a recorded segment."""
    extent = (at[0] - 0.5, at[-1] + 0.5, values.shape[1] - 0.5, -0.5)
    panel.imshow(values.T, cmap=colors, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    every = -(-values.shape[1] // 16)
    panel.set_yticks(range(0, values.shape[1], every))
    panel.set_ylabel(f"memory {noun}")
    panel.set_xlabel("segments since the fact")


def _curves(panel: Axes, trace: Trace, found: ReadOut, noun: str) -> None:
    x = [int(at) + 1 for at in trace.probed_at]
    ends = []
    for number in range(found.tokens.shape[1]):
        panel.plot(x, found.tokens[:, number], **style(number))
        ends.append(End(x[-1], float(found.tokens[-1, number]), f"{noun} {number}", style(number)["color"]))
    panel.plot(x, found.together, color="0.6", linewidth=4, alpha=0.6, zorder=1)
    ends.append(End(x[-1], float(found.together[-1]), f"all {noun}s", "0.6"))
    panel.axhline(found.chance, color="grey", linestyle=":")
    ends.append(End(x[-1], found.chance, f"chance ({found.chance:.3g})", "grey"))
    log_axis(panel, x, [str(at) for at in trace.probed_at], "segments since the fact")
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("accuracy of the read-out")
    panel.set_title(
        f"read-out: the fact from each {noun} alone, by a linear classifier fitted to other texts "
        f"({len(trace.states)} texts)",
        fontsize=10,
    )
    panel.grid(alpha=0.3)
    name_ends(panel, ends)


def table(trace: Trace, found: ReadOut, shown: Shown) -> str:
    """A row a probed segment, a column a token, all of them together with their interval last."""
    num = len(trace.states)
    rows = []
    for at, alone, together in zip(trace.probed_at, found.tokens, found.together, strict=True):
        low, high = wilson_interval(float(together) * num, num)
        rows.append([f"{at:,}", *(f"{share:.4f}" for share in alone), f"{together:.4f} [{low:.4f}, {high:.4f}]"])
    names = [f"{shown.noun} {number}" for number in range(found.tokens.shape[1])]
    heads = ["segments since the fact", *names, f"all {shown.noun}s"]
    return (
        titled("read-out of the fact", heads, rows, "accuracy")
        + f"\n\n{num} texts; the most frequent fact alone would "
        f"give {found.chance:.4f}. {_about_unseen(found)}In brackets: the 95 % Wilson interval.\n"
    )


def _about_unseen(found: ReadOut) -> str:
    if not found.num_unseen:
        return ""
    return f"Of these, {found.num_unseen} have a fact that no other text has and count as wrong. "
