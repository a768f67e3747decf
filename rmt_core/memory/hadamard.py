"""Stable Hadamard memory, SHM (Le et al. 2024, arXiv:2410.10132): a matrix a layer, changed at every token.

    M_t = M_{t-1} * C_t + eta_t v_t k_t^T        C_t = 1 + tanh(theta_t (x) W_c x_t)        y_t = M_t q_t

`*` is by entries and (x) the outer product; theta_t is a random row of a learned table, so that a product of many C_t
stays near 1 in expectation.

Axes: B rows, T tokens of a segment, S positions that a layer sees, C positions of a chunk, H size, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..state import State
from .base import Block, Dimensions, LayerMemory, LayerwiseMemory, Segment, at_least

CHUNK_LEN = 16  # positions scanned at once: log2 of it passes over (B, C, H, H), and a loop over the chunks
UINT32 = 0xFFFFFFFF


@dataclass(frozen=True)
class SHMConfig:
    """Settings of the Stable Hadamard memory."""

    size: int = (
        32  # H: a layer's memory is H x H numbers, and as many are touched at each token; 0 is the plain backbone
    )
    num_thetas: int = 128  # rows of the table from which theta is drawn

    def __post_init__(self) -> None:
        at_least(0, self, "size")
        at_least(1, self, "num_thetas")


class Writes(NamedTuple):
    """What each position does to the memory and asks of it, (B, S, H) each."""

    thetas: Tensor  # 0 where the memory stays as it is
    calibrations: Tensor  # W_c x
    values: Tensor  # eta v; 0 where nothing is written
    keys: Tensor
    queries: Tensor


def shares(x: Tensor) -> Tensor:
    """relu(x) over its sum along the last axis; all zeros where nothing is positive, which reads and writes nothing."""
    x = x.relu()
    total = x.sum(-1, keepdim=True)
    return x / total.where(total > 0, 1)


def scan(matrix: Tensor, writes: Writes, chunk_len: int = CHUNK_LEN) -> tuple[Tensor, Tensor]:
    """Readings y (B, S, H) of a memory that starts as `matrix` (B, H, H), and the memory after the last position."""
    found = []
    for part in zip(*(x.split(chunk_len, 1) for x in writes), strict=True):
        readings, matrix = _scan_chunk(matrix, Writes(*part))
        found.append(readings)
    return torch.cat(found, dim=1), matrix


def _scan_chunk(matrix: Tensor, writes: Writes) -> tuple[Tensor, Tensor]:
    """`scan` over few positions, all at once.

    After the pass with a stride of n, position t holds what the last 2 n positions up to it did: M -> kept * M + new.
    Only products are formed, never quotients, so that a C near 0 does no harm.
    """
    calibrations = writes.thetas[..., :, None] * writes.calibrations[..., None, :]  # (B, C, H, H)
    kept = 2 * (2 * calibrations).sigmoid()  # 1 + tanh, without its cancellation near 0
    new = writes.values[..., :, None] * writes.keys[..., None, :]
    new = torch.cat([new[:, :1] + kept[:, :1] * matrix[:, None], new[:, 1:]], dim=1)
    stride = 1
    while stride < new.shape[1]:
        new = torch.cat([new[:, :stride], new[:, stride:] + kept[:, stride:] * new[:, :-stride]], dim=1)
        kept = torch.cat([kept[:, :stride], kept[:, stride:] * kept[:, :-stride]], dim=1)
        stride *= 2
    return (new @ writes.queries[..., None]).squeeze(-1), new[:, -1]


def mixed(numbers: Tensor, seed: Tensor) -> Tensor:
    """A pseudo-random whole number, 0 to 2^32 - 1, for each of `numbers` (int64, at least 0) and the seed ()."""
    x = (numbers * 0x9E3779B1 + seed) & UINT32  # 2^32 over the golden ratio sets neighbours apart
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & UINT32
    return x ^ (x >> 16)


class SHMLayer(LayerMemory):
    """One layer's matrix."""

    def __init__(self, config: SHMConfig, width: int) -> None:
        super().__init__()
        self.size, self.num_thetas = config.size, config.num_thetas
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.calibration = (
            nn.Linear(width, config.size, bias=False) for _ in range(4)
        )
        self.rate = nn.Linear(width, 1, bias=False)
        self.thetas = nn.Embedding(config.num_thetas, config.size)
        self.out = nn.Linear(config.size, width, bias=False)
        nn.init.xavier_uniform_(self.thetas.weight)
        nn.init.zeros_(self.out.weight)

    def init_state(self, batch_size: int) -> State:
        dtype = torch.promote_types(self.anchor.dtype, torch.float32)  # long products lose too much in half precision
        matrix = self.anchor.new_zeros(batch_size, self.size, self.size, dtype=dtype)
        return {"matrix": matrix, "num_read": torch.zeros(batch_size, dtype=torch.long, device=matrix.device)}

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        after: list[State] = []

        def read(h: Tensor) -> Tensor:
            text = segment.text(h)
            readings, matrix = scan(state["matrix"], self._writes(h, text, state, segment))
            after.append({"matrix": matrix, "num_read": state["num_read"] + text.sum(1)})
            return h + self.out(readings.to(h.dtype))

        h = block(h, between=read)
        return h, after[0]

    def _writes(self, h: Tensor, text: Tensor, state: State, segment: Segment) -> Writes:
        """Of h (B, S, D), where only the rows that are `text` (B, S) write."""
        x, dtype, other = self.norm(h), state["matrix"].dtype, ~text[..., None]
        numbers = (state["num_read"][:, None] + text.cumsum(1) - 1).clamp(min=0)  # (B, S) of each token in its document
        thetas = self.thetas(self._draw(numbers, segment.generator))
        values = self.rate(x).to(dtype).sigmoid() * self.value(x).to(dtype)
        return Writes(
            thetas.to(dtype).masked_fill(other, 0),
            self.calibration(x).to(dtype),
            values.masked_fill(other, 0),
            shares(self.key(x).to(dtype)),
            shares(self.query(x).to(dtype)),
        )

    def _draw(self, numbers: Tensor, generator: torch.Generator | None) -> Tensor:
        """Which row of the table each token takes, (B, S): drawn, or without a generator one after the other.

        One number is drawn for the segment, and mixed with a token's number in its document. So neither the rows
        beside nor their lengths have a part in it.
        """
        if generator is None:
            return numbers % self.num_thetas
        seed = torch.randint(UINT32, (), generator=generator, device=generator.device).to(numbers.device)
        return mixed(numbers, seed) % self.num_thetas


class SHMMemory(LayerwiseMemory):
    """Each layer adds to every row, between attention and feed-forward, what a matrix that runs over the text holds.

    A layer's state is `{"matrix": M (B, H, H), "num_read": (B,) int64 tokens so far}`, kept in float32 or better. Text
    changes the matrix token by token, in an open segment too. Padding and the rows of other memories change nothing:
    those before the text read the matrix from before it, those after it the matrix after it.

    In the published agents theta is always row 0 of the table. Here it is drawn with the step's generator, and
    without one, as in decoding, the rows are taken in turn. The reading passes an output projection, which starts at
    0, so that the model starts as its backbone.
    """

    Config = SHMConfig
    runs_within = True

    def __init__(self, config: SHMConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.layers = nn.ModuleList(
            SHMLayer(config, dimensions.width) if config.size else LayerMemory() for _ in range(dimensions.num_layers)
        )
