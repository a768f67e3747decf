"""The continuous memory, alone and composed, against its equations written out in loops over rows, heads and points.

Axes: N tokens of a text, S positions of a segment, T its tokens, P points of a fit, J basis functions, D width.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.memory.base import Segment
from rmt_core.memory.continuous import (
    BINS,
    PRIOR_STD,
    InfinityConfig,
    InfinityMemory,
    _basis,
    divergence,
    fit,
    histogram,
    horizon,
    sample,
)
from rmt_core.state import detach, leaves, select, zeroed

from .test_xl import rms_norm, rotate
from .tiny import INFINITY, RMT, XL, close, close_states, gradients, next_labels, tiny_model, tokens_like

T = 6
FLAT = {**INFINITY, "sticky": False, "smoothing_kernel": 0, "contraction": 0.5, "ridge": 0.3, "kl_weight": 0.0}


def config(**changes: Any) -> InfinityConfig:
    return InfinityConfig(**{"num_basis": 8, "basis_widths": (0.05, 0.2), "num_samples": 5, **changes})


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(t: float | Tensor, mean: float | Tensor, variance: float | Tensor) -> Tensor:
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return torch.exp(-((t - mean) ** 2) / (2 * variance)) / torch.sqrt(2 * math.pi * variance)


def bumps(settings: InfinityConfig) -> list[tuple[float, float]]:
    """Centre and standard deviation of each basis function."""
    each = settings.num_basis // len(settings.basis_widths)
    return [(i / (each - 1), width) for width in settings.basis_widths for i in range(each)]


def naive_ridge(points: list[float], values: Tensor, num_beside: int, settings: InfinityConfig) -> Tensor:
    """The coefficients (J, D) by least squares: values (P, D) at points, zeros beside them, the ridge as equations."""
    size = len(points)
    zeros = [-(k + 0.5) / size for k in range(num_beside)] + [1 + (k + 0.5) / size for k in range(num_beside)]
    rows = [torch.stack([normal(t, centre, std**2) for centre, std in bumps(settings)]) for t in points + zeros]
    penalty = settings.ridge**0.5 * torch.eye(settings.num_basis, dtype=torch.float64)
    wanted = torch.cat([values, values.new_zeros(len(zeros) + settings.num_basis, values.shape[1])])
    solution: Tensor = torch.linalg.lstsq(torch.cat([torch.stack(rows), penalty]), wanted).solution
    return solution


def naive_fit(curve: Tensor | None, at: list[float], x: Tensor, settings: InfinityConfig) -> Tensor:
    """The first curve, or the update of one that is sampled `at` points, with new vectors x (T, D)."""
    new, num_old, tau = len(x), len(at), settings.contraction
    if curve is None:
        return naive_ridge([(k + 0.5) / new for k in range(new)], x, math.ceil(new / 2), settings)
    old = [sum(b * normal(t, *_moments(j, settings)) for j, b in enumerate(curve)) for t in at]
    places = [tau * (i + 0.5) / num_old for i in range(num_old)]
    places += [tau + (1 - tau) * (k + 0.5) / new for k in range(new)]
    return naive_ridge(places, torch.cat([torch.stack(old), x]), math.ceil((num_old + new) / 2), settings)


def _moments(j: int, settings: InfinityConfig) -> tuple[float, float]:
    centre, std = bumps(settings)[j]
    return centre, std**2


@dataclass
class Layer:
    """What one layer of the reference remembers, and what it is to be compared by."""

    curve: Tensor | None = None  # (J, D)
    mass: list[float] = field(default_factory=lambda: [1 / BINS] * BINS)
    cached: Tensor | None = None  # (P, D), of an XL cache beside it


@dataclass
class Read:
    """What the reference finds for one text."""

    hidden: list[Tensor]  # K x (T, D)
    layers: list[Layer]
    divergences: list[list[Tensor]]  # L x K x (T or 0,): of each token that read a curve
    memory: Tensor | None


def naive_reading(cell: Any, h: Tensor, curve: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The long-term attention's output (S, D), and the mean and variance (S, H) of each Gaussian."""
    x, size = rms_norm64(h, cell.norm), h.shape[1] // num_heads
    all_keys, all_values = curve @ cell.key.weight.T, curve @ cell.value.weight.T
    rows, means, variances = [], [], []
    for query in x @ cell.query.weight.T:
        parts, mean, variance = [], [], []
        for head in range(num_heads):
            own = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[own] @ key[own] / size**0.5 for key in all_keys])
            mu, var = torch.sigmoid(cell.place.weight[0] @ scores), F.softplus(cell.place.weight[1] @ scores)
            reach = [normal(mu, centre, var + std**2) for centre, std in bumps(cell.config)]
            parts.append(sum(r * value[own] for r, value in zip(reach, all_values, strict=True)))
            mean.append(mu)
            variance.append(var)
        rows.append(cell.out.weight @ torch.cat(parts))
        means.append(torch.stack(mean))
        variances.append(torch.stack(variance))
    return torch.stack(rows), torch.stack(means), torch.stack(variances)


def rms_norm64(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def naive_smoothed(cell: Any, h: Tensor) -> Tensor:
    """What is written of the text h (T, D)."""
    x = rms_norm64(h, cell.norm)
    if cell.smoothing is None:
        return x
    weight, rows = cell.smoothing.weight, []
    for t in range(len(x)):
        gate = cell.smoothing.bias
        for k in range(weight.shape[2]):
            if 0 <= (s := t + k - weight.shape[2] // 2) < len(x):
                gate = gate + weight[:, :, k] @ x[s]
        rows.append(x[t] / (1 + torch.exp(-gate)))
    return torch.stack(rows)


def naive_mass(mean: Tensor, variance: Tensor) -> list[float]:
    """Each bin's share, from means and variances (T, H)."""

    def below(t: float, mu: float, var: float) -> float:
        return 0.5 * (1 + math.erf((t - mu) / math.sqrt(2 * var)))

    pairs = list(zip(mean.flatten().tolist(), variance.flatten().tolist(), strict=True))
    mass = [sum(below((b + 1) / BINS, *pair) - below(b / BINS, *pair) for pair in pairs) for b in range(BINS)]
    return [part / sum(mass) for part in mass]


def naive_quantile(mass: list[float], q: float) -> float:
    """Where the piecewise constant density of the mass reaches q."""
    total = 0.0
    for b, part in enumerate(mass):
        if total + part > q:
            return (b + (q - total) / part) / BINS
        total += part
    return 1.0


def naive_layer(block: Any, h: Tensor, reading: Tensor, cached: Tensor | None, num_heads: int) -> Tensor:
    """One llama layer on h (S, D), whose attention also sees `cached`, with `reading` added to attention's output."""
    attention, seen = block.self_attn, h if cached is None else torch.cat([cached, h])
    normed = rms_norm(seen, block.input_layernorm)

    def heads(projection: Any) -> Tensor:
        x = (normed @ projection.weight.T).unflatten(-1, (-1, h.shape[1] // num_heads)).transpose(0, 1)
        return x.repeat_interleave(num_heads // len(x), dim=0)

    queries, keys, values = rotate(heads(attention.q_proj)), rotate(heads(attention.k_proj)), heads(attention.v_proj)
    scores = queries[:, -len(h) :] @ keys.mT / keys.shape[-1] ** 0.5
    ahead = torch.ones(len(h), len(seen), dtype=torch.bool).triu(len(seen) - len(h) + 1)
    mixed = scores.masked_fill(ahead, float("-inf")).softmax(-1) @ values
    h = h + mixed.transpose(0, 1).flatten(1) @ attention.o_proj.weight.T + reading
    x, mlp = rms_norm(h, block.post_attention_layernorm), block.mlp
    return h + (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def naive_infinity(model: RecurrentModel, text: Tensor, cache_len: int | None, memory: Tensor | None) -> Read:
    """arXiv:2109.00301, section 3, for one text (N,)."""
    body, cells, settings = model.backbone.lm.model, infinity(model).layers, infinity(model).config
    num_heads, m = body.config.num_attention_heads, 0 if memory is None else len(memory)
    found = Read([], [Layer() for _ in cells], [[] for _ in cells], memory)
    for segment in text.split(T):
        h = body.embed_tokens(segment)
        h = h if found.memory is None else torch.cat([found.memory, h, found.memory])
        own = slice(m, m + len(segment))
        for i, (block, cell, layer) in enumerate(zip(body.layers, cells, found.layers, strict=True)):
            curve, before = layer.curve, h
            reading, cached = torch.zeros_like(h), layer.cached
            found.divergences[i].append(torch.zeros(0, dtype=torch.float64))
            if cache_len is not None:
                seen = h[own].detach() if cached is None else torch.cat([cached, h[own].detach()])
                layer.cached = seen[max(0, len(seen) - cache_len) :]
            if curve is not None:
                reading, mean, variance = naive_reading(cell, h, curve, num_heads)
                ratio = variance[own] / PRIOR_STD**2
                found.divergences[i][-1] = (0.5 * (ratio - torch.log(ratio) - 1)).mean(1)
                layer.mass = naive_mass(mean[own], variance[own])
                curve = curve.detach()
            h = naive_layer(block, h, reading, cached, num_heads)
            middles = [(i + 0.5) / settings.num_samples for i in range(settings.num_samples)]
            at = [naive_quantile(layer.mass, q) for q in middles] if settings.sticky else middles
            layer.curve = naive_fit(curve, at, naive_smoothed(cell, before[own].detach()), settings)
        h = rms_norm(h, body.norm)
        found.hidden.append(h[own])
        found.memory = None if found.memory is None else h[-m:]
    return found


def infinity(model: RecurrentModel) -> Any:
    members = getattr(model.memory, "members", [model.memory])
    return next(member for member in members if isinstance(member, InfinityMemory))


@pytest.mark.parametrize(
    "memory",
    [[INFINITY], [FLAT], [XL, INFINITY], [INFINITY, RMT]],
    ids=["sticky", "uniform", "xl+infinity", "infinity+rmt"],
)
def test_ragged_rows_follow_the_equations(memory: list[Any]) -> None:
    """Outputs, curves, histograms, the auxiliary loss, and the gradient of random weights on all of them."""
    model, lengths = tiny_model(memory, segment_len=T), [3 * T, 2 * T + 1, T - 1]
    kinds, settings = [part["kind"] for part in memory], infinity(model).config
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens_like(3, 3 * T), lengths=torch.tensor(lengths))
    parts = dict(zip(kinds, state if len(kinds) > 1 else (state,), strict=True))
    initial = model.memory.members[1].initial.weight if "rmt" in kinds else None
    cache_len = XL["cache_len"] if "xl" in kinds else None
    ours, theirs = out.aux, torch.zeros((), dtype=torch.float64)
    found = []
    for row, length in enumerate(lengths):
        wanted = naive_infinity(model, tokens_like(3, 3 * T)[row, :length], cache_len, initial)
        found.append(wanted)
        hidden = torch.cat(wanted.hidden)
        assert close(out.hidden[row, :length], hidden)
        weight = torch.randn_like(hidden)
        ours, theirs = ours + (out.hidden[row, :length] * weight).sum(), theirs + (hidden * weight).sum()
        for layer, naive in zip(parts["infinity"], wanted.layers, strict=True):
            assert naive.curve is not None
            assert close(layer["curve"][row], naive.curve)
            assert int(layer["num_updates"][row]) == math.ceil(length / T)
            if settings.sticky:
                assert close(layer["attended"][row], doubles(naive.mass))
            weight = torch.randn_like(naive.curve)
            ours, theirs = ours + (layer["curve"][row] * weight).sum(), theirs + (naive.curve * weight).sum()
        if wanted.memory is not None:
            weight = torch.randn_like(wanted.memory)
            ours, theirs = ours + (parts["rmt"][row] * weight).sum(), theirs + (wanted.memory * weight).sum()
    aux = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        for k in range(3):
            for row in found:
                read = row.divergences[i][k] if k < len(row.hidden) else ()
                aux = aux + settings.kl_weight * (read.mean() if len(read) else 0) / 3 / len(lengths)
    assert close(out.aux, aux)
    assert bool(aux) == bool(settings.kl_weight)
    named = {name: p for name, p in model.named_parameters() if "lm_head" not in name}
    grads = torch.autograd.grad(ours, list(named.values())), torch.autograd.grad(theirs + aux, list(named.values()))
    for name, a, b in zip(named, *grads, strict=True):
        assert close(a, b, atol=1e-10 * (1 + float(b.abs().max()))), name
        assert a.any(), name


# The curve


def test_the_closed_form_is_the_integral() -> None:
    basis = _basis(8, (0.05, 0.2), torch.float64, torch.device("cpu"))
    t = torch.linspace(-12, 13, 50_001, dtype=torch.float64)
    for mean, variance in ((0.5, 0.7), (0.03, 1e-4), (0.9, 0.02)):
        seen = basis.under(*torch.tensor([mean, variance], dtype=torch.float64))
        integral = torch.stack(
            [torch.trapezoid(normal(t, mean, variance) * normal(t, *_moments(j, config())), t) for j in range(8)]
        )
        assert close(seen, integral)
    assert close(torch.trapezoid(basis.at(t), t, dim=0), torch.ones(8))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_a_fit_is_ridge_regression(size: int) -> None:
    """By least squares, alone and among fits of other sizes."""
    settings, at = config(ridge=0.7, contraction=0.7), [(i + 0.5) / 5 for i in range(5)]
    x, curve = torch.randn(2, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    x = x[:size]
    old = torch.stack([torch.stack([normal(t, *_moments(j, settings)) for j in range(8)]) @ curve for t in at])
    sizes, first = torch.tensor([size, 3, size]), torch.tensor([True, False, False])
    for most in (size, 6):
        matrices = fit(sizes.clamp(max=most), first, most, settings)
        both = torch.cat([old, x, torch.full((most - size, 3), 1e9, dtype=torch.float64)])
        assert close(matrices[0] @ both, naive_fit(None, at, x, settings))
        assert close(matrices[2] @ both, naive_fit(curve, at, x, settings))


def test_an_update_contracts_the_old_curve() -> None:
    """With basis enough, the new curve is the old one squeezed into [0, tau], and then the new vectors."""
    settings = config(num_basis=60, num_samples=80, contraction=0.6, ridge=1e-6)
    basis = _basis(60, settings.basis_widths, torch.float64, torch.device("cpu"))
    t = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    first = fit(torch.tensor([40]), torch.tensor([True]), 40, settings)[0, :, 80:]
    update = fit(torch.tensor([40]), torch.tensor([False]), 40, settings)[0]
    old = first @ torch.stack([(math.pi * t).sin() ** 2, (2 * math.pi * t).sin() ** 2], dim=1)
    samples = basis.at((torch.arange(80, dtype=torch.float64) + 0.5) / 80) @ old
    new = update @ torch.cat([samples, torch.stack([(math.pi * t).sin() ** 2, 0 * t], dim=1)])
    inside = torch.linspace(0, 1, 51, dtype=torch.float64)
    assert close(basis.at(0.6 * inside) @ new, basis.at(inside) @ old, atol=0.015)
    wanted = torch.stack([(math.pi * inside).sin() ** 2, 0 * inside], dim=1)
    assert close(basis.at(0.6 + 0.4 * inside) @ new, wanted, atol=0.015)


def test_matrices_made_while_generating_serve_training() -> None:
    model, tokens = tiny_model({**INFINITY, "num_basis": 10}, segment_len=T), tokens_like(2, 2 * T)
    with torch.inference_mode():
        rmt_core.run(model, tokens)
    rmt_core.backward(model, tokens, next_labels(tokens))
    assert infinity(model).layers[0].smoothing.weight.grad.any()


# Sticky sampling


def attention(generator: torch.Generator, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances (B, H, S) and which queries count (B, S)."""
    mean, variance = torch.rand(2, rows, 4, 7, dtype=torch.float64, generator=generator)
    return mean, 0.01 + 0.1 * variance, torch.arange(7) < torch.arange(2, 2 + rows)[:, None]


def test_the_histogram_is_the_attentions_mass_and_sums_to_one() -> None:
    mean, variance, asking = attention(torch.Generator().manual_seed(0))
    mass = histogram(mean, variance, asking)
    assert close(mass.sum(-1), torch.ones(3))
    for row in range(3):
        counted = asking[row]
        assert close(mass[row], doubles(naive_mass(mean[row][:, counted], variance[row][:, counted])))
    assert close(histogram(mean, variance, asking & False), torch.full((3, BINS), 1 / BINS))


def test_points_are_the_quantiles_of_the_mass() -> None:
    mass = histogram(*attention(torch.Generator().manual_seed(1)))
    points = sample(mass, 9, None, mass)
    for row in range(3):
        wanted = [naive_quantile(mass[row].tolist(), (i + 0.5) / 9) for i in range(9)]
        assert close(points[row], doubles(wanted))
    uniform = sample(None, 9, torch.Generator(), mass)
    assert close(uniform, (torch.arange(9, dtype=torch.float64)[None] + 0.5) / 9)
    assert close(sample(torch.full_like(mass, 1 / BINS), 9, None, mass), uniform.expand(3, -1))


def test_drawn_points_follow_the_mass_and_the_generator() -> None:
    mass = histogram(*attention(torch.Generator().manual_seed(2)))
    points = sample(mass, 40_000, torch.Generator().manual_seed(3), mass)
    assert bool((points.diff(dim=-1) >= 0).all())
    for row in range(3):
        found = torch.histc(points[row], BINS, 0, 1) / 40_000
        assert float((found - mass[row]).abs().sum()) < 0.06
    again, other = (sample(mass, 40_000, torch.Generator().manual_seed(seed), mass) for seed in (3, 4))
    assert torch.equal(points, again)
    assert not torch.equal(points, other)
    assert torch.equal(sample(mass[1:2], 40_000, torch.Generator().manual_seed(3), mass), points[1:2])


def test_an_update_stretches_what_was_attended_to() -> None:
    mass = torch.full((1, BINS), 0.2 / 96)
    mass[:, 32:64] = 0.8 / 32
    points = sample(mass, 100, None, mass)
    assert int(((points >= 0.25) & (points < 0.5)).sum()) == 80


@pytest.mark.parametrize("memory", [INFINITY, FLAT])
def test_a_generator_is_used_where_points_are_sticky(memory: Any) -> None:
    model, tokens, found = tiny_model(memory, segment_len=T), tokens_like(2, T), []
    state = rmt_core.run(model, tokens_like(2, 2 * T))[1]
    for seed in (None, 1, 1, 2):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found.append(model.step(tokens, state, generator=generator)[1])
    assert close_states(found[1], found[2])
    assert close_states(found[0], found[1]) == close_states(found[1], found[3]) == (memory is FLAT)


# The auxiliary loss


def test_the_divergence_is_that_of_two_gaussians() -> None:
    _, variance, asking = attention(torch.Generator().manual_seed(4))
    a, b = torch.distributions.Normal(0.3, variance.sqrt()), torch.distributions.Normal(doubles([0.3]), PRIOR_STD)
    each = torch.distributions.kl_divergence(a, b).mean(1)
    rows = [row[read].mean() for row, read in zip(each, asking, strict=True)]
    assert close(divergence(variance, asking), torch.stack(rows).mean())
    assert float(divergence(variance, asking & False)) == 0
    first = asking & (torch.arange(len(asking)) == 0)[:, None]
    assert close(divergence(variance, first), rows[0] / len(rows))


def test_the_narrowest_attention_is_finite() -> None:
    """Where softplus has underflowed, the variance is kept above 0."""
    model, tokens = tiny_model(INFINITY, segment_len=T), tokens_like(2, 2 * T)
    with torch.no_grad():
        for layer in infinity(model).layers:
            layer.place.weight.mul_(1e6)
    loss = rmt_core.backward(model, tokens, next_labels(tokens))
    assert bool(loss.isfinite())
    assert all(bool(grad.isfinite().all()) for grad in gradients(model).values())


def test_a_row_costs_the_same_in_every_batch() -> None:
    model, tokens = tiny_model(INFINITY, segment_len=T), tokens_like(3, T, seed=4)
    state = rmt_core.run(model, tokens_like(3, 2 * T))[1]
    out, _ = model.step(tokens, state, lengths=torch.tensor([T, 2, 4]), reset=torch.tensor([False, False, True]))
    alone = [model.step(tokens[i : i + 1, :size], select(state, [i]))[0].aux for i, size in enumerate((T, 2))]
    assert close(out.aux, (alone[0] + alone[1]) / 3)
    assert bool(out.aux > 0)
    assert not bool(model.step(tokens, model.init_state(3))[0].aux)
    assert not bool(model.step(tokens, state, lengths=torch.zeros(3, dtype=torch.long))[0].aux)


# Gradients


def test_writing_learns_from_the_next_segment_only() -> None:
    model, tokens = tiny_model(INFINITY, segment_len=T), tokens_like(2, 3 * T)
    written = [p for name, p in model.named_parameters() if "smoothing" in name]

    def felt(cut: int | None) -> list[Tensor]:
        """The gradient of the third segment's outputs, with the state cut loose before segment `cut`."""
        state = model.init_state(2)
        for i, part in enumerate(tokens.split(T, 1)):
            out, state = model.step(part, detach(state) if i == cut else state)
        grads = torch.autograd.grad(out.hidden.square().sum(), written, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(written, grads, strict=True)]

    assert all(bool(grad.any()) for grad in felt(None))
    assert all(torch.equal(a, b) for a, b in zip(felt(None), felt(1), strict=True))
    assert not any(grad.any() for grad in felt(2))


def test_what_an_empty_curve_gives_is_nothing() -> None:
    model, tokens = tiny_model(INFINITY, segment_len=T), tokens_like(2, T)
    wanted = model.backbone.lm(input_ids=tokens, use_cache=False).logits
    for state in (model.init_state(2), zeroed(rmt_core.run(model, tokens_like(2, 2 * T))[1])):
        out, new = model.step(tokens, state)
        assert close(out.logits, wanted)
        assert all(bool(leaf.isfinite().all()) for leaf in leaves(new))


def test_a_new_model_is_the_backbone() -> None:
    torch.manual_seed(0)
    backbone = tiny_model().config.backbone
    model, tokens = rmt_core.build(backbone=backbone, memory=INFINITY, segment_len=T), tokens_like(2, 2 * T)
    wanted = [model.backbone.lm(input_ids=part, use_cache=False).logits for part in tokens.split(T, 1)]
    assert close(rmt_core.run(model, tokens)[0].logits, torch.cat(wanted, dim=1), atol=1e-6)


def test_no_basis_is_the_plain_backbone() -> None:
    model, plain = (tiny_model(memory, segment_len=T) for memory in ({"kind": "infinity", "num_basis": 0}, "none"))
    tokens = tokens_like(2, 3 * T)
    assert torch.equal(rmt_core.run(model, tokens)[0].hidden, rmt_core.run(plain, tokens)[0].hidden)
    assert not leaves(model.init_state(2))
    for one in (model, plain):
        rmt_core.backward(one, tokens, next_labels(tokens))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True))


def test_layers_can_run_side_by_side() -> None:
    """Under `torch.func.vmap` over layers, as over a loop; with lengths of each layer's own segment."""
    model = tiny_model(INFINITY, segment_len=T)
    layers, h = list(infinity(model).layers), torch.randn(2, 3, T, 32, dtype=torch.float64)
    state = [detach(part) for part in rmt_core.run(model, tokens_like(3, 2 * T))[1]]
    lengths = torch.tensor([[T, 2, 5], [1, T, 4]])
    parameters, _ = torch.func.stack_module_state(layers)

    def block(h: Tensor, *, between: Any) -> Tensor:
        moved: Tensor = between(2 * h)
        return moved.tanh()

    def cell(parameters: Any, h: Tensor, state: Any, lengths: Tensor) -> Any:
        segment = Segment(T, lengths)
        out, new = torch.func.functional_call(layers[0], parameters, (h, block, state, segment))
        return out, new, torch.stack(segment.aux)

    stacked = {key: torch.stack([part[key] for part in state]) for key in state[0]}
    out, new, aux = torch.func.vmap(cell)(parameters, h, stacked, lengths)
    for i, layer in enumerate(layers):
        segment = Segment(T, lengths[i])
        wanted, wanted_new = layer(h[i], block, state[i], segment)
        assert close(out[i], wanted)
        assert close_states({key: new[key][i] for key in wanted_new}, wanted_new)
        assert close(aux[i], torch.stack(segment.aux))


# Settings


def test_the_horizon_is_where_a_segment_has_less_than_one_basis_function() -> None:
    assert horizon(512, 0.5) == pytest.approx(8)
    for num_basis, tau in ((64, 0.75), (512, 0.9)):
        k = horizon(num_basis, tau)
        assert num_basis * (1 - tau) * tau ** (k - 0.01) > 1 > num_basis * (1 - tau) * tau ** (k + 0.01)
    assert horizon(2, 0.9) == horizon(0, 0.5) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_basis": -2}, "num_basis is -2; it must be at least 0"),
        ({"num_basis": 5}, "num_basis is 5; it must be 0 or a multiple of the 2 basis_widths, at least 4"),
        ({"num_basis": 2}, "num_basis is 2; it must be 0 or a multiple of the 2 basis_widths, at least 4"),
        ({"num_basis": 8.0}, "num_basis is 8.0; it must be a whole number"),
        ({"basis_widths": []}, r"basis_widths is \(\); it must be a list of numbers above 0"),
        ({"basis_widths": [0.1, 0]}, r"basis_widths is \(0.1, 0\); it must be a list of numbers above 0"),
        ({"basis_widths": 0.1}, "basis_widths is 0.1; it must be a list of numbers above 0"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"contraction": 1}, "contraction is 1; it must be above 0 and below 1"),
        ({"contraction": 0.0}, "contraction is 0.0; it must be above 0 and below 1"),
        ({"ridge": 0.0}, "ridge is 0.0; it must be above 0"),
        ({"sticky": 1}, "sticky is 1; it must be true or false"),
        ({"smoothing_kernel": 4}, "smoothing_kernel is 4; it must be 0 or an odd number"),
        ({"smoothing_kernel": -1}, "smoothing_kernel is -1; it must be at least 0"),
        ({"kl_weight": -1e-6}, "kl_weight is -1e-06; it must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"memory\.{message}"):
        tiny_model({"kind": "infinity", **settings})
