"""Where attention goes, as a Markdown table and as heat maps.

Axes: L layers, H heads, S rows that a layer sees.
"""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure as Drawing

from rmt_core import AttentionMaps, AttentionMass

_PANEL_INCHES = 2.2
_MAX_PANELS = 144  # of 12 layers with 12 heads
_GAMMA = 0.4  # of the colours: small weights can be told from none


def mass_table(masses: Sequence[AttentionMass]) -> str:
    """A line for each of the masses, as `rmt_core.attention_mass` or `mean_over_heads` gives them."""
    heads = ["layer", "head", "read", "write", "process", "sequence", "read per text row"]
    rows = [
        [str(mass.layer), "mean" if mass.head is None else str(mass.head)]
        + [f"{share:.4f}" for share in (*mass[2:], mass.read_per_text_row)]
        for mass in masses
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in [heads, ["---:"] * len(heads), *rows])


def heat_maps(maps: AttentionMaps, title: str = "", *, by_head: bool = True) -> bytes:
    """A PNG with a panel for each layer and head (`by_head`), or for each layer with the mean of its heads.

    A panel's rows are what attends, its columns what is attended to, the first at the top left; lines set memory rows
    apart from text rows. Raises ValueError for more panels than can be read.
    """
    weights = maps.weights.double().cpu()
    if not by_head:
        weights = weights.mean(1, keepdim=True)
    num_layers, num_heads, size, _ = weights.shape
    if num_layers * num_heads > _MAX_PANELS:
        raise ValueError(
            f"{num_layers} layers of {num_heads} heads are more than {_MAX_PANELS} panels; use by_head=False, "
            "or fewer layers"
        )
    edges = [i - 0.5 for i in range(1, size) if bool(maps.is_memory[i]) != bool(maps.is_memory[i - 1])]
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
            for edge in edges:
                panel.axhline(edge, color="white", linewidth=0.6)
                panel.axvline(edge, color="white", linewidth=0.6)
            panel.set_title(f"layer {layer}, {f'head {head}' if by_head else 'mean of heads'}", fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
    drawing.supxlabel("attended to", fontsize=9)
    drawing.supylabel("attending", fontsize=9)
    if title:
        drawing.suptitle(title, fontsize=10, wrap=True)
    assert image is not None
    drawing.colorbar(image, ax=panels, shrink=0.6, label="share of a row's attention")
    out = io.BytesIO()
    drawing.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
