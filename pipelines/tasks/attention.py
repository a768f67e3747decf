"""Where attention goes, as a Markdown table, as bars and as heat maps.

Axes: L layers, H heads, S rows that a layer sees.
"""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure as Drawing

from rmt_core import AttentionMaps, AttentionMass

_PANEL_INCHES = 2.2
MAX_PANELS = 144  # of 12 layers with 12 heads
_GAMMA = 0.4  # of the colours: small weights can be told from none
_SHARES = {  # what a share is of, its grey and its hatching
    "read": ("text to memory", "white", "//"),
    "write": ("memory to text", "0.35", ""),
    "process": ("memory to memory", "0.65", "xx"),
    "sequence": ("text to text", "0.9", ""),
}
_LEAST_TOLD = 0.05  # of the shares that have their number in the bar


def mass_table(masses: Sequence[AttentionMass]) -> str:
    """A line for each of the masses, as `rmt_core.attention_mass` or `mean_over_heads` gives them."""
    heads = ["layer", "head", "read", "write", "process", "sequence", "read per text row"]
    rows = [
        [str(mass.layer), "mean" if mass.head is None else str(mass.head)]
        + [f"{share:.4f}" for share in (*mass[2:], mass.read_per_text_row)]
        for mass in masses
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in [heads, ["---:"] * len(heads), *rows])


def mass_chart(masses: Sequence[AttentionMass], title: str = "") -> bytes:
    """A PNG with a bar for each of the masses, as `rmt_core.mean_over_heads` gives them: its four shares."""
    drawing = Drawing(figsize=(max(5.0, 1.0 + 0.6 * len(masses)), 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(drawing)
    panel = drawing.subplots()
    below = [0.0] * len(masses)
    for name, (meaning, grey, hatch) in _SHARES.items():
        shares = [getattr(mass, name) for mass in masses]
        label = f"{name}: {meaning}"
        panel.bar(range(len(masses)), shares, bottom=below, color=grey, hatch=hatch, edgecolor="black", label=label)
        for at, (share, start) in enumerate(zip(shares, below, strict=True)):
            if share >= _LEAST_TOLD:
                boxed = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
                panel.text(at, start + share / 2, f"{share:.2f}", ha="center", va="center", fontsize=8, bbox=boxed)
        below = [start + share for start, share in zip(below, shares, strict=True)]
    names = [str(mass.layer) if mass.head is None else f"{mass.layer}.{mass.head}" for mass in masses]
    panel.set_xticks(range(len(masses)), names)
    panel.set_xlabel("layer" if all(mass.head is None for mass in masses) else "layer.head")
    panel.set_ylabel("share of all attention")
    panel.set_ylim(0, 1)
    drawing.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    if title:
        drawing.suptitle(title, fontsize=10, wrap=True)
    out = io.BytesIO()
    drawing.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def heat_maps(maps: AttentionMaps, title: str = "", *, by_head: bool = True) -> bytes:
    """A PNG with a panel for each layer and head (`by_head`), or for each layer with the mean of its heads.

    A panel's rows are what attends, its columns what is attended to, the first at the top left; lines set memory rows
    apart from text rows, and the blocks are named on the outer axes. Raises ValueError for more panels than can be
    read.
    """
    weights = maps.weights.double().cpu()
    if not by_head:
        weights = weights.mean(1, keepdim=True)
    num_layers, num_heads = weights.shape[:2]
    if num_layers * num_heads > MAX_PANELS:
        raise ValueError(
            f"{num_layers} layers of {num_heads} heads are more than {MAX_PANELS} panels; use by_head=False, "
            "or fewer layers"
        )
    blocks = _blocks(maps.is_memory.tolist())
    size_inches = (_PANEL_INCHES * num_heads + 1.2, _PANEL_INCHES * num_layers + 0.8)
    drawing = Drawing(figsize=size_inches, dpi=100, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(num_layers, num_heads, squeeze=False)
    image = None
    for layer in range(num_layers):
        for head in range(num_heads):
            panel = panels[layer][head]
            image = panel.imshow(
                weights[layer, head].numpy(), cmap="viridis", norm=PowerNorm(_GAMMA, 0, 1), interpolation="nearest"
            )
            for start, _, _ in blocks[1:]:
                panel.axhline(start - 0.5, color="white", linewidth=0.6)
                panel.axvline(start - 0.5, color="white", linewidth=0.6)
            panel.set_title(f"layer {layer}, {f'head {head}' if by_head else 'mean of heads'}", fontsize=8)
            _name_blocks(panel, blocks, across=layer == num_layers - 1, down=head == 0)
    drawing.supxlabel("attended to", fontsize=9)
    drawing.supylabel("attending", fontsize=9)
    if title:
        drawing.suptitle(title, fontsize=10, wrap=True)
    assert image is not None
    drawing.colorbar(image, ax=panels, shrink=0.6, label="share of a row's attention")
    out = io.BytesIO()
    drawing.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _blocks(is_memory: Sequence[bool]) -> list[tuple[int, int, str]]:
    """(start, end, name) of each stretch of memory rows or text rows, the end not in it."""
    starts = [i for i in range(len(is_memory)) if i == 0 or is_memory[i] != is_memory[i - 1]]
    ends = [*starts[1:], len(is_memory)]
    return [(start, end, "memory" if is_memory[start] else "text") for start, end in zip(starts, ends, strict=True)]


def _name_blocks(panel: Axes, blocks: Sequence[tuple[int, int, str]], *, across: bool, down: bool) -> None:
    """Names in the middle of each block, below the panel and left of it where it stands at the edge of the picture."""
    middles = [(start + end - 1) / 2 for start, end, _ in blocks]
    names = [f"{name} ({end - start})" for start, end, name in blocks]
    panel.set_xticks(middles if across else [], names if across else [], fontsize=7, rotation=45, ha="right")
    panel.set_yticks(middles if down else [], names if down else [], fontsize=7)
    panel.tick_params(length=0)
