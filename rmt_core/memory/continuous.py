"""Continuous long-term memory: the infinity-former (Martins et al. 2022, arXiv:2109.00301, section 3).

Axes: B rows, S positions that a layer sees, T tokens of a segment, D width, H heads, N basis functions, M samples of
the old curve, P points of a fit, R fits, BINS bins of the histogram.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from .base import Block, Dimensions, LayerMemory, LayerwiseMemory, Segment, at_least

BINS = 128  # of the attention's histogram over [0, 1], the paper's number
PRIOR_STD = 0.05  # of the attention's Gaussian in the KL term
MIN_VARIANCE = 1e-6  # of the attention's Gaussian, as in the authors' sorting experiment


@dataclass(frozen=True)
class InfinityConfig:
    """Settings of the continuous memory. The defaults suit segments of up to about 128 tokens; the paper has 512 basis
    functions and samples at segments of 512, with contraction 0.5 and ridge 0.5 for language."""

    num_basis: int = 64  # Gaussians that make up a layer's curve; 0 is the plain backbone
    basis_widths: tuple[float, ...] = (0.01, 0.05)  # their standard deviations; each has a grid of centres of its own
    num_samples: int = 64  # points of the old curve that an update keeps
    contraction: float = 0.75  # the part of [0, 1] into which an update squeezes the old curve
    ridge: float = 1.0  # penalty on the square of the coefficients
    sticky: bool = True  # sample the old curve where it was attended to; false: uniformly
    smoothing_kernel: int = 3  # tokens that the smoothing before writing looks at, an odd number; 0 writes as it is
    kl_weight: float = 1e-6  # of the term that keeps the attention narrow; 0 leaves it out

    def __post_init__(self) -> None:
        at_least(0, self, "num_basis", "smoothing_kernel", "kl_weight")
        at_least(1, self, "num_samples")
        widths: Any = self.basis_widths
        if not isinstance(widths, tuple) or not widths or not all(_is_positive(width) for width in widths):
            raise ValueError(f"memory.basis_widths is {widths!r}; it must be a list of numbers above 0")
        if self.num_basis % len(widths) or self.num_basis == len(widths):
            raise ValueError(
                f"memory.num_basis is {self.num_basis}; it must be 0 or a multiple of the {len(widths)} basis_widths, "
                f"at least {2 * len(widths)}"
            )
        if not 0 < self.contraction < 1:
            raise ValueError(f"memory.contraction is {self.contraction}; it must be above 0 and below 1")
        if not _is_positive(self.ridge):
            raise ValueError(f"memory.ridge is {self.ridge}; it must be above 0")
        if self.smoothing_kernel and self.smoothing_kernel % 2 == 0:
            raise ValueError(f"memory.smoothing_kernel is {self.smoothing_kernel}; it must be 0 or an odd number")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def horizon(num_basis: int, contraction: float) -> float:
    """After how many updates a segment is left with less than one basis function, ln(N (1 - tau)) / ln(1 / tau).

    Memory is unbounded in name only: k updates after it was written, a segment lies in a stretch of length
    (1 - tau) tau^k, where N (1 - tau) tau^k basis functions stand. Sticky sampling stretches what is attended to.
    """
    return max(0.0, math.log(num_basis * (1 - contraction)) / math.log(1 / contraction)) if num_basis else 0.0


def gaussian(at: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The density of Normal(mean, variance) at `at`; shapes broadcast."""
    return (-0.5 * (at - mean).square() / variance).exp() / (2 * math.pi * variance).sqrt()


class Basis(NamedTuple):
    """N Gaussian densities psi_j, which integrate to 1."""

    centres: Tensor  # (N,)
    variances: Tensor  # (N,)

    def at(self, points: Tensor) -> Tensor:
        """psi at points (...): (..., N)."""
        return gaussian(points[..., None], self.centres, self.variances)

    def under(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The means of psi under Normal(mean, variance), both (...): (..., N). In closed form."""
        return gaussian(mean[..., None], self.centres, variance[..., None] + self.variances)


@lru_cache(maxsize=64)
def _basis(num_basis: int, widths: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Basis:
    with torch.inference_mode(False):  # what is made while generating serves training too
        centres = torch.linspace(0, 1, num_basis // len(widths), dtype=torch.float64).repeat(len(widths))
        stds = torch.tensor(widths, dtype=torch.float64).repeat_interleave(num_basis // len(widths))
        return Basis(centres.to(device, dtype), stds.square().to(device, dtype))


def fit(num_vectors: Tensor, first: Tensor, max_vectors: int, config: InfinityConfig) -> Tensor:
    """The matrices (R, N, M + T) that give a curve's coefficients, `B = G [old samples ; new vectors]`, in float64.

    Fit r has `num_vectors[r]` <= T = `max_vectors` new vectors; columns of those that it has not are 0. Where
    `first[r]` there is no old curve: the new vectors lie at the middles of equal parts of [0, 1] and the columns of old
    samples are 0. Otherwise old samples lie so on [0, contraction] and new vectors on [contraction, 1]. On either side
    zeros follow, half as many as the P vectors between them (rounded up), at the spacing 1 / P. Ridge regression:
    `G = (F F' + ridge I)^-1 F`, F = psi at all points. Costs about R N^2 (M + T) multiplications times 4.
    """
    device, num_old, tau = num_vectors.device, config.num_samples, config.contraction
    basis = _basis(config.num_basis, config.basis_widths, torch.float64, device)

    def middles(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float64, device=device) + 0.5

    updates, count = (~first[:, None]).double(), num_vectors[:, None].double()  # (R, 1)
    start, total = tau * updates, (count + num_old * updates).clamp(min=1)
    beyond = middles((num_old + max_vectors + 1) // 2).expand(len(first), -1)
    old, new = middles(num_old).expand(len(first), -1) / num_old * tau, middles(max_vectors)
    points = [old, start + (1 - start) * new / count.clamp(min=1), -beyond / total, 1 + beyond / total]
    padded = beyond < (total / 2).ceil()
    real = torch.cat([updates.expand_as(old) > 0, new < count, padded, padded], dim=1)  # (R, P)
    psi = basis.at(torch.cat(points, dim=1)) * real[..., None]  # (R, P, N)
    gram = psi.mT @ psi + config.ridge * torch.eye(config.num_basis, dtype=torch.float64, device=device)
    factor, _ = torch.linalg.cholesky_ex(gram)  # positive definite: the ridge is above 0
    return torch.cholesky_solve(psi[:, : num_old + max_vectors].mT, factor)


@lru_cache(maxsize=16)
def _fit_of_whole(num_vectors: int, config: InfinityConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`fit` where all rows have as many vectors: a first fit and an update, (2, N, M + T)."""
    with torch.inference_mode(False):
        first = torch.tensor([True, False], device="cpu")
        return fit(torch.full_like(first, num_vectors, dtype=torch.long), first, num_vectors, config).to(device, dtype)


class Reading(NamedTuple):
    """What the tokens read of a curve."""

    rows: Tensor  # (B, S, D)
    mean: Tensor  # (B, H, S) where on [0, 1] each query looks
    variance: Tensor  # (B, H, S) of the Gaussian it looks through


class CurveLayer(LayerMemory):
    """One layer's curve, read and refitted."""

    def __init__(self, config: InfinityConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.config, self.width, self.num_heads = config, width, num_heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        nn.init.zeros_(self.out.weight)
        self.place = nn.Linear(config.num_basis, 2, bias=False)
        size = config.smoothing_kernel
        self.smoothing = nn.Conv1d(width, width, size, padding=size // 2) if size else None

    def init_state(self, batch_size: int) -> State:
        curve = self.anchor.new_zeros(batch_size, self.config.num_basis, self.width)
        state = {"curve": curve, "num_updates": torch.zeros(batch_size, dtype=torch.long, device=curve.device)}
        if self.config.sticky:
            state["attended"] = curve.new_full((batch_size, BINS), 1 / BINS)
        return state

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        reading = self._read(self.norm(h), state["curve"])
        out = block(h, between=lambda after: after + reading.rows)
        if not segment.writes:
            return out, state
        empty = state["num_updates"] == 0
        asking = segment.text(h) & ~empty[:, None]  # (B, S)
        if self.config.kl_weight:
            segment.aux.append(self.config.kl_weight * divergence(reading.variance, asking))
        mass = None
        if self.config.sticky:
            mass = histogram(reading.mean.detach(), reading.variance.detach(), asking)
        points = sample(mass, self.config.num_samples, segment.generator, reading.mean).expand(len(h), -1)
        curve = self._refit(state["curve"].detach(), points, self._smoothed(h, segment), empty, segment)
        new = {"curve": curve, "num_updates": state["num_updates"] + 1}
        if mass is not None:
            new["attended"] = mass.to(curve.dtype)
        return out, new

    def _read(self, x: Tensor, curve: Tensor) -> Reading:
        """x (B, S, D) attends to curve (B, N, D), each head through one Gaussian a query.

        The scores `q K'` (B, H, S, N) matter only through `place`, which is linear: it is applied to the keys first.
        """
        query, key, value = (self._heads(y) for y in (self.query(x), self.key(curve), self.value(curve)))
        placed = query @ self.place(key.mT) / query.shape[-1] ** 0.5  # (B, H, S, 2)
        at, spread = placed.to(torch.promote_types(x.dtype, torch.float32)).unbind(-1)
        mean, variance = at.sigmoid(), F.softplus(spread).clamp(min=MIN_VARIANCE)
        seen = self._psi(mean).under(mean, variance).to(x.dtype)  # (B, H, S, N)
        return Reading(self.out((seen @ value).transpose(1, 2).flatten(2)), mean, variance)

    def _smoothed(self, h: Tensor, segment: Segment) -> Tensor:
        """What is written of h (B, S, D): its text, (B, T, D), outside the gradient, 0 behind a short row's end."""
        text = slice(segment.text_start, segment.text_start + segment.text_len)
        x = self.norm(h[:, text].detach()) * segment.text(h)[:, text, None]
        return x if self.smoothing is None else x * self.smoothing(x.mT).mT.sigmoid()

    def _refit(self, curve: Tensor, points: Tensor, x: Tensor, empty: Tensor, segment: Segment) -> Tensor:
        """The curve (B, N, D) through the old one's values at points (B, M), contracted, and x (B, T, D) after them.

        Where rows have lengths of their own, so that no branch depends on them, each row's matrix is made anew.
        """
        old = self._psi(points).at(points) @ curve.to(points.dtype)  # (B, M, D)
        if segment.lengths is None:
            matrices = _fit_of_whole(segment.text_len, self.config, points.dtype, points.device)[(~empty).long()]
        else:
            matrices = fit(segment.lengths, empty, segment.text_len, self.config).to(points.dtype)
        return (matrices @ torch.cat([old, x.to(points.dtype)], dim=1)).to(curve.dtype)

    def _psi(self, like: Tensor) -> Basis:
        return _basis(self.config.num_basis, self.config.basis_widths, like.dtype, like.device)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, H, S, D / H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def divergence(variance: Tensor, asking: Tensor) -> Tensor:
    """KL(Normal(mu, variance) || Normal(mu, PRIOR_STD^2)) of variance (B, H, S), meaned over heads and `asking` (B, S).

    The mean over rows, (), of each row's mean over its tokens that read a curve, 0 where it has none: a row costs the
    same in every batch, and padding nothing.
    """
    ratio = variance / PRIOR_STD**2
    each = 0.5 * (ratio - ratio.log() - 1).mean(1)  # (B, S)
    return ((each * asking).sum(1) / asking.sum(1).clamp(min=1)).mean()


def histogram(mean: Tensor, variance: Tensor, asking: Tensor) -> Tensor:
    """The mass (B, BINS) that the Gaussians (B, H, S) of all heads and `asking` (B, S) queries put on parts of [0, 1].

    Mass outside [0, 1] is left out and the rest sums to 1; uniform where nobody asks.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=mean.dtype, device=mean.device)
    below = torch.special.ndtr((edges - mean[..., None]) / variance.sqrt()[..., None])  # (B, H, S, BINS + 1)
    mass = (below.diff(dim=-1).sum(1) * asking[..., None]).sum(1)
    mass = torch.where(asking.any(1)[:, None], mass, 1.0)
    return mass / mass.sum(-1, keepdim=True)


def sample(mass: Tensor | None, count: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Where to sample the old curves, (B, M) or for all rows (1, M), on [0, 1], ascending, typed and placed as `like`.

    At the quantiles (i + 1/2) / M of the piecewise constant density of `mass` (B, BINS); with a generator at random
    ones, the same for all rows, so that a row depends on none beside it. Where `mass` is None the density is uniform
    and nothing is drawn.
    """
    quantiles = ((torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count)[None]
    if mass is None:
        return quantiles
    if generator is not None:
        drawn = torch.rand(count, generator=generator, dtype=like.dtype, device=generator.device)
        quantiles = drawn.to(like.device).sort().values[None]
    total = mass.cumsum(-1)
    found = (quantiles[..., None] >= total[:, None]).sum(-1).clamp(max=BINS - 1)  # (B, M), the bin
    own = mass.gather(1, found)
    into = (quantiles - total.gather(1, found) + own) / own.clamp(min=torch.finfo(own.dtype).tiny)
    return (found + into.clamp(0, 1)) / BINS


class InfinityMemory(LayerwiseMemory):
    """Each layer's past as a curve over [0, 1], read beside attention and refitted by each segment.

    A layer's state is `{"curve": (B, N, D), "num_updates": (B,), "attended": (B, BINS)}`: the coefficients of the
    curve `B' psi(t)`, how often it was fitted (0: empty, reads as zero), and with `sticky` the attention's mass on the
    curve before, by which the last update sampled it. An update of a curve takes M samples of it, spreads them evenly
    over [0, contraction], puts the segment's vectors after them and fits a curve to both. See `horizon` for how far
    back it reaches.

    A segment is written after it was read: the mass is that of the reading of this very curve, as in the paper, where
    the writing of a segment waits for the next one. No gradient enters hidden states of earlier segments; that of the
    smoothing and of `norm` comes from the readings of the next segment only, since an update detaches the old curve.

    Deviations: queries have a projection of their own (rotary positions mean nothing on the curve), made like what is
    written from the layer's inputs by a norm of the memory's own; the output projection starts at zero, so that the
    model starts as the backbone; samples lie at the middles of equal parts instead of their right edges, and sticky
    ones anywhere in a bin instead of at its left edge; odd and short segments have fits of their own.
    """

    Config = InfinityConfig

    def __init__(self, config: InfinityConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        width, num_heads = dimensions.width, dimensions.num_heads
        if width % num_heads:
            raise ValueError(f"the backbone's width {width} is no multiple of its {num_heads} heads; use another one")
        layers = (
            CurveLayer(config, width, num_heads) if config.num_basis else LayerMemory()
            for _ in range(dimensions.num_layers)
        )
        self.layers = nn.ModuleList(layers)
