"""The Stable Hadamard memory against its equations, token by token and entry by entry.

Axes: N tokens of a text, S positions, H size of the memory, D width.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.memory.hadamard import Writes, scan, shares
from rmt_core.state import leaves

from .test_xl import naive_layer, rms_norm
from .tiny import RMT, SHM, close, gradients, next_labels, tiny_config, tiny_model, tokens_like

T = 6
H = SHM["size"]
COMPOSITIONS: dict[str, Any] = {"shm": SHM, "rmt+shm": [RMT, SHM], "shm+rmt": [SHM, RMT]}


class Read(NamedTuple):
    """What the naive reference finds for one text."""

    hidden: Tensor  # (N, D)
    matrices: list[Tensor]  # L x (H, H)


def naive_scan(matrix: Tensor, writes: Writes) -> tuple[Tensor, Tensor]:
    """Readings (S, H) and the last matrix (H, H), from `writes` (S, H) each."""
    found = []
    for theta, c, v, k, q in zip(*writes, strict=True):
        rows = []
        for i in range(len(v)):
            rows.append(matrix[i] * (1 + torch.tanh(theta[i] * c)) + v[i] * k)
        matrix = torch.stack(rows)
        found.append(torch.stack([(row * q).sum() for row in matrix]))
    return torch.stack(found), matrix


def one_sum(x: Tensor) -> Tensor:
    positive = torch.where(x > 0, x, torch.zeros_like(x))
    return positive / positive.sum() if bool(positive.sum() > 0) else positive


def naive_read(layer: Any, h: Tensor, text: slice, matrix: Tensor, num_read: int) -> tuple[Tensor, Tensor]:
    """What rows h (S, D) become, and the matrix after those that are `text`, which alone write."""
    rows = []
    start, num_thetas = num_read, layer.thetas.weight.shape[0]
    for i, row in enumerate(h):
        x = row * (row.square().mean() + torch.finfo(row.dtype).eps).rsqrt() * layer.norm.weight
        if text.start <= i < text.stop:
            eta = 1 / (1 + torch.exp(-(layer.rate.weight @ x)))
            theta = layer.thetas.weight[start % num_thetas]
            kept = 1 + torch.tanh(torch.outer(theta, layer.calibration.weight @ x))
            matrix = matrix * kept + eta * torch.outer(layer.value.weight @ x, one_sum(layer.key.weight @ x))
            start += 1
        rows.append(row + layer.out.weight @ (matrix @ one_sum(layer.query.weight @ x)))
    return torch.stack(rows), matrix


def naive_shm(model: RecurrentModel, kinds: str, text: Tensor) -> Read:
    """One text (N,) through a llama whose layers read and write a matrix."""
    body: Any = model.backbone.lm.model
    memories: Any = [model.memory] if kinds == "shm" else model.memory.members
    memory = memories[kinds.split("+").index("shm")]
    width, m = body.config.hidden_size, RMT["num_tokens"] if "+" in kinds else 0
    matrices, hidden = [torch.zeros(H, H, dtype=torch.float64) for _ in body.layers], []
    carried = memories[kinds.split("+").index("rmt")].initial.weight if m else torch.zeros(0, width)
    for segment in text.split(T):
        h = torch.cat([carried, body.embed_tokens(segment), carried]) if m else body.embed_tokens(segment)
        place, done = slice(m, m + len(segment)), sum(len(part) for part in hidden)
        for i, (layer, own) in enumerate(zip(body.layers, memory.layers, strict=True)):

            def read(h: Tensor, i: int = i, own: Any = own, place: slice = place, done: int = done) -> Tensor:
                h, matrices[i] = naive_read(own, h, place, matrices[i], done)
                return h

            h = naive_layer(layer, h, torch.zeros(0, width, dtype=torch.float64), body.config.num_attention_heads, read)
        h = rms_norm(h, body.norm)
        hidden.append(h[place])
        carried = h[len(h) - m :]
    return Read(torch.cat(hidden), matrices)


@pytest.mark.parametrize("kinds", COMPOSITIONS)
def test_ragged_rows_follow_the_equations(kinds: str) -> None:
    """Outputs, states, and the gradient of random weights on both."""
    model = tiny_model(COMPOSITIONS[kinds], segment_len=T)
    tokens, lengths = tokens_like(4, 3 * T), [3 * T, 2 * T + 1, T - 1, 1]
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens, lengths=torch.tensor(lengths))
    state = state if kinds == "shm" else state[kinds.split("+").index("shm")]
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i, length in enumerate(lengths):
        wanted = naive_shm(model, kinds, tokens[i, :length])
        assert [int(layer["num_read"][i]) for layer in state] == [length] * 2
        pairs = [(out.hidden[i, :length], wanted.hidden)]
        pairs += [(layer["matrix"][i], matrix) for layer, matrix in zip(state, wanted.matrices, strict=True)]
        for found, right in pairs:
            assert close(found, right)
            weight = torch.randn_like(right)
            ours, theirs = ours + (found * weight).sum(), theirs + (right * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    grads = list(zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True))
    assert all(bool(a.any()) for a, _ in grads)
    assert all(close(a, b, atol=1e-11 * (1 + float(b.abs().max()))) for a, b in grads)


# The scan


def draw_writes(batch_size: int, num_rows: int, *, sharp: float = 1.0) -> tuple[Tensor, Writes]:
    """A start and writes; a large `sharp` puts C near 0 and near 2."""
    generator = torch.Generator().manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    thetas, calibrations, values, keys, queries = (draw(batch_size, num_rows, H) for _ in range(5))
    return draw(batch_size, H, H), Writes(sharp * thetas, calibrations, values, shares(keys), shares(queries))


@pytest.mark.parametrize("sharp", [1.0, 30.0])
@pytest.mark.parametrize("chunk_len", [1, 3, 16, 64])
def test_the_scan_is_the_loop_over_tokens(chunk_len: int, sharp: float) -> None:
    """Readings, last matrix and gradients, also where C is 0 or 2 to the last bit."""
    matrix, writes = draw_writes(2, 37, sharp=sharp)
    given = [x.requires_grad_() for x in (matrix, *writes)]
    readings, last = scan(given[0], Writes(*given[1:]), chunk_len)
    rows = [naive_scan(given[0][i], Writes(*(x[i] for x in given[1:]))) for i in range(2)]
    wanted, wanted_last = (torch.stack(parts) for parts in zip(*rows, strict=True))
    scale = 1 + float(wanted_last.detach().abs().max())
    assert close(readings, wanted, atol=1e-13 * scale)
    assert close(last, wanted_last, atol=1e-13 * scale)
    weights = torch.randn_like(wanted), torch.randn_like(wanted_last)
    ours = torch.autograd.grad((readings * weights[0]).sum() + (last * weights[1]).sum(), given)
    theirs = torch.autograd.grad((wanted * weights[0]).sum() + (wanted_last * weights[1]).sum(), given)
    for found, right in zip(ours, theirs, strict=True):
        assert close(found, right, atol=1e-12 * (1 + float(right.abs().max())))


def test_the_scan_is_safe_in_single_precision() -> None:
    """Where C is near 0, nothing is divided by it."""
    matrix, writes = draw_writes(2, 64, sharp=30.0)
    wanted, wanted_last = scan(matrix, writes)
    readings, last = scan(matrix.float(), Writes(*(x.float() for x in writes)))
    for found, right in ((readings, wanted), (last, wanted_last)):
        assert float((found - right).abs().max() / right.abs().max()) < 1e-5


def test_keys_sum_to_one_or_are_zero() -> None:
    found = shares(torch.tensor([[1.0, -3.0, 3.0], [-1.0, 0.0, -2.0]]))
    assert found.tolist() == [[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]]
    x = torch.full((1, 3), -1.0, requires_grad=True)
    shares(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


# The draws


def drawn(model: RecurrentModel, tokens: Tensor, generator: torch.Generator | None, **given: Any) -> list[Tensor]:
    """The table's rows that a step takes, (B, S) of each layer."""
    seen: list[Tensor] = []
    layers: Any = model.memory.layers
    handles = [layer.thetas.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    model.step(tokens, model.init_state(len(tokens)), generator=generator, **given)
    for handle in handles:
        handle.remove()
    return seen


def test_without_a_generator_the_rows_are_taken_in_turn() -> None:
    model = tiny_model({**SHM, "num_thetas": 4}, segment_len=T)
    for rows in drawn(model, tokens_like(2, T), None):
        assert rows.tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_with_a_generator_every_row_is_drawn_as_often() -> None:
    """Within four standard deviations, and anew in each layer and segment."""
    model, generator = tiny_model({**SHM, "num_thetas": 4}, segment_len=40), torch.Generator().manual_seed(0)
    steps = [drawn(model, tokens_like(1, 40), generator) for _ in range(25)]
    rows = torch.cat([part[0] for step in steps for part in step])
    counts, num = torch.bincount(rows, minlength=4), len(rows)
    assert bool(((counts - num / 4).abs() < 4 * (num * 3 / 16) ** 0.5).all())
    pairs = torch.bincount(rows[:-1] * 4 + rows[1:], minlength=16)
    assert bool(((pairs - num / 16).abs() < 4 * (num * 15 / 256) ** 0.5).all())
    assert len({tuple(part[0].tolist()) for step in steps for part in step}) == 50


def test_draws_depend_on_the_seed_and_on_no_other_row() -> None:
    model = tiny_model(SHM, segment_len=40)
    together = drawn(model, tokens_like(3, 40), torch.Generator().manual_seed(1), lengths=torch.tensor([40, 7, 20]))
    alone = drawn(model, tokens_like(1, 7), torch.Generator().manual_seed(1))
    assert all(torch.equal(a[1, :7], b[0]) for a, b in zip(together, alone, strict=True))
    other = drawn(model, tokens_like(1, 7), torch.Generator().manual_seed(2))
    assert not torch.equal(alone[0], other[0])


# Beginnings


def test_a_new_model_is_its_backbone_and_learns_to_remember() -> None:
    torch.manual_seed(0)
    model = rmt_core.build(backbone=tiny_config(), memory=SHM, segment_len=T, dtype="float64")
    plain = rmt_core.build(backbone=tiny_config(), memory="none", segment_len=T, dtype="float64")
    plain.backbone.load_state_dict(model.backbone.state_dict())
    tokens = tokens_like(2, 3 * T)
    assert close(rmt_core.run(model, tokens)[0].hidden, rmt_core.run(plain, tokens)[0].hidden)
    rmt_core.backward(model, tokens, next_labels(tokens))
    assert all(bool(gradients(model)[f"memory.layers.{i}.out.weight"].any()) for i in range(2))


def test_the_state_of_a_model_in_half_precision_is_in_single() -> None:
    model = rmt_core.build(backbone=tiny_config(), memory=SHM, segment_len=T, dtype="bfloat16")
    _, state = model.step(tokens_like(2, T), model.init_state(2))
    assert [leaf.dtype for leaf in leaves(state)] == [torch.float32, torch.int64] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": -1}, "memory.size is -1; it must be at least 0"),
        ({"num_thetas": 0}, "memory.num_thetas is 0; it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model({**SHM, **changes}, segment_len=T)
