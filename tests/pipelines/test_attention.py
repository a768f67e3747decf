"""Attention as a table and as heat maps."""

import io
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

import rmt_core
from pipelines.tasks.attention import heat_maps, mass_chart, mass_table
from rmt_core import AttentionMaps, AttentionMass

from ..rmt_core.tiny import RMT, tiny_model, tokens_like


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_a_table_has_a_line_for_each_mass() -> None:
    masses = [AttentionMass(0, 1, 0.1, 0.2, 0.3, 0.4), AttentionMass(1, None, 0.25, 0.25, 0.25, 0.25)]
    assert mass_table(masses).splitlines() == [
        "| layer | head | read | write | process | sequence | read per text row |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 0 | 1 | 0.1000 | 0.2000 | 0.3000 | 0.4000 | 0.2000 |",
        "| 1 | mean | 0.2500 | 0.2500 | 0.2500 | 0.2500 | 0.5000 |",
    ]


def test_bars_show_shares_as_heights() -> None:
    """A layer that only reads is white from bottom to top, one that only writes dark: their parts of the picture."""

    def dark(*masses: AttentionMass) -> float:
        image = pixels(mass_chart(masses))
        return float((np.abs(image[..., :3] - 0.35).max(-1) < 0.02).mean())

    write, half, read = (AttentionMass(0, None, 1 - share, share, 0.0, 0.0) for share in (1.0, 0.5, 0.0))
    legend = dark(read)
    assert dark(half) - legend == pytest.approx((dark(write) - legend) / 2, rel=0.1)
    assert dark(write) > 10 * legend
    assert mass_chart([half], "a title") != mass_chart([half])


@pytest.mark.parametrize("by_head", [True, False])
def test_heat_maps_show_the_attention_of_a_model(by_head: bool) -> None:
    model = tiny_model(RMT)
    png = heat_maps(rmt_core.attention_maps(model, tokens_like(6)), "a title", by_head=by_head)
    assert png == heat_maps(rmt_core.attention_maps(model, tokens_like(6)), "a title", by_head=by_head)
    assert pixels(png).shape[0] > 300
    other = heat_maps(rmt_core.attention_maps(model, tokens_like(6, seed=2)), "a title", by_head=by_head)
    assert png != other


def test_a_weight_is_a_cell_of_its_colour() -> None:
    """All attention on the first row: the picture has both ends of the scale."""
    weights = torch.zeros(1, 1, 4, 4)
    weights[..., 0] = 1
    image = pixels(heat_maps(AttentionMaps(weights, torch.tensor([True, False, False, False]))))
    for colour in ([253, 231, 37], [68, 1, 84]):  # of a share of 1 and of 0
        near = np.abs(image[..., :3] - np.array(colour) / 255).max(-1) < 0.01
        assert near.mean() > 0.02


def test_more_panels_than_can_be_read_are_refused() -> None:
    many: Any = AttentionMaps(torch.zeros(13, 12, 2, 2), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="13 layers of 12 heads are more than 144 panels; use by_head=False"):
        heat_maps(many)
    assert pixels(heat_maps(many, by_head=False)).size
