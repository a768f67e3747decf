"""UltraMem: a large table of values, read sparsely, in place of a layer's feed-forward part.

Huang et al. 2024, arXiv:2411.12364, section 3; its retrieval and the penalty are restated in arXiv:2508.18756,
equations 6 to 9, 16 and 17.

Axes: X tokens (any leading axes), D width, k key width, n keys of a side, r rank, m values read, h cores, E expansion,
N = n x n / E values, v value width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import FeedForward
from .memory.base import at_least

CORE_NOISE = 0.1  # standard deviation of the core's entries at first: far below its first singular value, 1


@dataclass(frozen=True)
class UltraMemConfig:
    """Settings of UltraMem."""

    layers: tuple[int, ...] | None = (
        None  # numbers of the layers whose feed-forward part it replaces, from 0; None: all
    )
    num_keys: int = 64  # n, of rows and of columns: n x n places
    key_width: int = 32  # k
    rank: int = 2  # r of the Tucker core
    num_read: int = 16  # m, values that a token reads
    num_cores: int = 1  # h: as many groups of a value's columns have scores of their own; must divide value_width
    expansion: int = 4  # E: places that share a value, each with another projection; must divide n x n
    value_width: int = 32  # v
    penalty_weight: float = 0.001  # alpha, of the auxiliary loss
    penalty_margin: float = 0.15  # tau: how large singular values of the core, beside the first, go unpunished

    def __post_init__(self) -> None:
        names = ("num_keys", "key_width", "rank", "num_read", "num_cores", "expansion", "value_width")
        at_least(1, self, *names, of="feed_forward")
        at_least(0, self, "penalty_weight", "penalty_margin", of="feed_forward")
        places = self.num_keys**2
        if self.num_read > places:
            raise ValueError(
                f"feed_forward.num_read is {self.num_read}; {self.num_keys} keys a side have {places} places"
            )
        for name, whole, what in (
            ("expansion", places, f"{places} places"),
            ("num_cores", self.value_width, f"value_width {self.value_width}"),
        ):
            if whole % getattr(self, name):
                raise ValueError(f"feed_forward.{name} is {getattr(self, name)}; it must divide {what}")
        given: Any = self.layers
        numbers = {i for i in given if type(i) is int and i >= 0} if isinstance(given, tuple) else ()
        if given is not None and (not numbers or len(numbers) < len(given)):
            raise ValueError(f"feed_forward.layers is {given!r}; it must be null for all, or different layers from 0")


class UltraMem(FeedForward):
    """Each token reads the m best of n x n places, found without looking at all of them.

    The score of a place is bilinear in its row's and its column's scores, S = S_row^T C S_col with a small learned core
    C. As in the paper the search has two stages: C's best rank-one approximation, its first pair of singular vectors,
    ranks rows and columns alone, and among the m best rows times the m best columns the true scores choose m places.
    So a good place in a poor row can be missed, as where two negative scores make a large product: with fresh weights
    half of the true best m are found, with 0.87 of their score. This is the paper's approximation; with m >= n there
    is none. No softmax: values are summed with their scores as weights. Implicit value expansion: a place names, by a
    fixed random permutation, one of N values and one of E projections of it. With several cores the sum of all chooses,
    and each scores a group of the values' columns (multi-core scoring).

    Said nowhere and chosen here: the singular vectors' common sign, such that the left one's entries sum to at least
    zero; the core near rank one at first, all 1 / r; keys normalised to length 1 at first. Left out: the causal
    convolution over queries, which would be a second state, the heads and the faster learning rate of values; and the
    paper adds such layers beside feed-forward parts, here they replace them.
    """

    Config = UltraMemConfig

    def __init__(self, config: UltraMemConfig, width: int, std: float) -> None:
        super().__init__()
        self.config = config
        places = config.num_keys**2
        self.num_values = places // config.expansion
        self.rows = KeyScores(width, config)
        self.columns = KeyScores(width, config)
        self.core = TuckerCore(config)
        self.values = nn.Embedding(self.num_values, config.value_width)
        self.project = nn.Linear(config.expansion * config.value_width, width, bias=False)  # W_1 ... W_E side by side
        nn.init.normal_(self.values.weight, std=config.num_read**-0.5)
        nn.init.normal_(self.project.weight, std=std)
        self.register_buffer("shuffle", torch.randperm(places))

    shuffle: Tensor  # (n x n,) int64: place -> projection x N + value

    def forward(self, x: Tensor) -> Tensor:
        """x (X, D) -> (X, D)."""
        scores, places = self.search(x)
        at = self.shuffle[places]  # (X, m)
        values = self.values(at % self.num_values).unflatten(-1, (self.config.num_cores, -1))  # (X, m, h, v / h)
        weighted = (scores.mT[..., None] * values).flatten(-2)  # (X, m, v)
        projection = torch.arange(self.config.expansion, device=x.device)[:, None]
        chosen = (at // self.num_values)[..., None, :] == projection  # (X, E, m)
        return self.project((chosen.to(x.dtype) @ weighted).flatten(-2))

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The m places that each token reads: scores by each core (X, h, m), and row x n + column, (X, m) int64."""
        cores: Tensor = self.core()  # (h, r, r)
        row_scores, column_scores = self.rows(x), self.columns(x)  # (X, r, n)
        first_row, first_column = dominant(cores.sum(0))
        rows, row_scores = self._best(row_scores, first_row)  # (X, m'), (X, r, m')
        columns, column_scores = self._best(column_scores, first_column)
        grid = row_scores.mT[..., None, :, :] @ cores @ column_scores[..., None, :, :]  # (X, h, m', m')
        best = grid.detach().sum(-3).flatten(-2).topk(self.config.num_read, sorted=False).indices  # (X, m)
        count = rows.shape[-1]
        places = rows.gather(-1, best // count) * self.config.num_keys + columns.gather(-1, best % count)
        wanted = best[..., None, :].expand(*best.shape[:-1], len(cores), -1)
        return grid.flatten(-2).gather(-1, wanted), places

    def _best(self, scores: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The keys that are best by scores (X, r, n) added up by a vector (r,): numbers (X, m'), scores (X, r, m')."""
        count = min(self.config.num_read, self.config.num_keys)
        joined = (scores.detach() * vector[:, None].to(scores.dtype)).sum(-2)  # (X, n)
        best = joined.topk(count, sorted=False).indices
        return best, scores.gather(-1, best[..., None, :].expand(*scores.shape[:-1], -1))

    def penalty(self) -> Tensor:
        """Auxiliary loss, (): alpha / (r - 1) x sum over singular values of C but the first of max(0, it - tau)^2."""
        core = self.core().sum(0)
        beside = torch.linalg.svdvals(core.to(torch.promote_types(core.dtype, torch.float32)))[1:]
        excess = (beside - self.config.penalty_margin).clamp(min=0).square().sum()
        return self.config.penalty_weight / max(1, len(beside)) * excess


class KeyScores(nn.Module):
    """Scores of one side's keys: layer-normalised query times layer-normalised keys, r of them for each number."""

    def __init__(self, width: int, config: UltraMemConfig) -> None:
        super().__init__()
        self.query = nn.Linear(width, config.key_width, bias=False)
        self.query_norm = nn.LayerNorm(config.key_width)
        self.keys = nn.Parameter(torch.randn(config.rank, config.num_keys, config.key_width))
        self.key_norm = nn.LayerNorm(config.key_width)
        nn.init.constant_(self.key_norm.weight, config.key_width**-0.5)  # so that scores have variance 1 at first

    def forward(self, x: Tensor) -> Tensor:
        """x (X, D) -> (X, r, n)."""
        query = self.query_norm(self.query(x))  # (X, k)
        keys = self.key_norm(self.keys)  # (r, n, k)
        return F.linear(query, keys.flatten(0, 1)).unflatten(-1, keys.shape[:2])


class TuckerCore(nn.Module):
    """The cores (h, r, r), whose sum is near rank one at first."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        num_cores, rank = config.num_cores, config.rank
        noise = torch.randn(num_cores, rank, rank) * CORE_NOISE / num_cores**0.5
        self.weight = nn.Parameter(1 / (rank * num_cores) + noise)

    def forward(self) -> Tensor:
        return self.weight.view_as(self.weight)


def dominant(core: Tensor) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors of C (r, r), (r,) each, outside the gradient; the left sums to >= 0."""
    left, _, right = torch.linalg.svd(core.detach().to(torch.promote_types(core.dtype, torch.float32)))
    sign = torch.where(left[:, 0].sum() < 0, -1.0, 1.0)
    return left[:, 0] * sign, right[0] * sign
