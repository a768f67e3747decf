"""Full, truncated and checkpointed back-propagation.

Axes: B rows, N tokens of a text, K segments.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.recurrent import SegmentBatch, cut
from rmt_core.state import detach, leaves

from .tiny import MEMORIES, RMT, Embeddings, close, gradients, next_labels, tiny_model, tokens_like

T = 4
K = 5
LENGTHS = torch.tensor([K * T, 3 * T + 1, T - 1])


@pytest.fixture(params=MEMORIES)
def model(request: pytest.FixtureRequest) -> RecurrentModel:
    return tiny_model(MEMORIES[request.param], segment_len=T)


def text(lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and labels (3, K T); some places ask for nothing."""
    tokens = tokens_like(3, K * T)
    labels = next_labels(tokens)
    labels[:, 3::7] = -100
    if lengths is not None:
        labels[torch.arange(K * T) >= lengths[:, None] - 1] = -100
    return tokens, labels


def naive(model: RecurrentModel, tokens: Tensor, labels: Tensor, window: int, lengths: Tensor | None) -> Tensor:
    """The mean loss of all logits, with the state cut loose before every `window`-th segment, by a plain loop."""
    state, total, aux = model.init_state(len(tokens)), torch.zeros((), dtype=torch.float64), torch.zeros(())
    for i in range(0, tokens.shape[1], T):
        if i and (i // T) % window == 0:
            state = detach(state)
        real = None if lengths is None else (lengths - i).clamp(0, T)
        out, state = model.step(tokens[:, i : i + T], state, real)
        total = total + F.cross_entropy(
            out.logits.flatten(0, 1), labels[:, i : i + T].flatten(), ignore_index=-100, reduction="sum"
        )
        aux = aux + out.aux
    loss = total / (labels != -100).sum() + aux / K
    loss.backward()
    return loss.detach()


def taken(model: RecurrentModel) -> dict[str, Tensor]:
    """The gradients, which are then forgotten."""
    found = gradients(model)
    model.zero_grad()
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-11) -> bool:
    return a.keys() == b.keys() and all(close(a[name], b[name], atol) for name in a)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
def test_full_equals_a_plain_loop(model: RecurrentModel, lengths: Tensor | None) -> None:
    tokens, labels = text(lengths)
    wanted_loss = naive(model, tokens, labels, K, lengths)
    wanted = taken(model)
    loss = rmt_core.backward(model, tokens, labels, lengths=lengths)
    assert close(loss, wanted_loss)
    assert not loss.requires_grad
    assert equal(taken(model), wanted)
    assert any(grad.any() for grad in wanted.values())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
def test_checkpoint_equals_full(model: RecurrentModel, lengths: Tensor | None) -> None:
    tokens, labels = text(lengths)
    wanted_loss = rmt_core.backward(model, tokens, labels, lengths=lengths)
    wanted = taken(model)
    loss = rmt_core.backward(model, tokens, labels, mode="checkpoint", lengths=lengths)
    assert close(loss, wanted_loss)
    assert equal(taken(model), wanted)


@pytest.mark.parametrize("window", [1, 2, 3, K, K + 3])
def test_truncated_equals_a_plain_loop_with_detach(model: RecurrentModel, window: int) -> None:
    for lengths in (None, LENGTHS):
        tokens, labels = text(lengths)
        wanted_loss = naive(model, tokens, labels, window, lengths)
        wanted = taken(model)
        loss = rmt_core.backward(model, tokens, labels, mode="truncated", bptt_segments=window, lengths=lengths)
        assert close(loss, wanted_loss)
        assert equal(taken(model), wanted)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_forward_truncates_the_same(model: RecurrentModel, window: int) -> None:
    tokens, labels = text()
    rmt_core.backward(model, tokens, labels, mode="truncated", bptt_segments=window)
    wanted = taken(model)
    for checkpointed in (False, True):
        model(tokens, labels, bptt_segments=window, checkpointed=checkpointed).backward()
        assert equal(taken(model), wanted)


@pytest.mark.parametrize("how", ["backward", "forward"])
@pytest.mark.parametrize("memory", ["rmt", "xl+rmt", "rmt+xl"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_truncated_gradient_reaches_exactly_to_its_windows_start(window: int, memory: str, how: str) -> None:
    """A loss in segment s is felt by segments from the start of its window to s, and by no other."""
    model, tokens = tiny_model(MEMORIES[memory], segment_len=T), tokens_like(2, K * T)
    for asked in range(K):
        labels = torch.full_like(tokens, -100)
        labels[:, asked * T : (asked + 1) * T] = tokens[:, :T]
        with Embeddings(model) as embedded:
            if how == "backward":
                rmt_core.backward(model, tokens, labels, mode="truncated", bptt_segments=window)
            else:
                model(tokens, labels, bptt_segments=window).backward()
            grads = embedded.gradients()
        start = asked // window * window
        for i, grad in enumerate(grads):
            if start <= i <= asked:
                assert grad.abs().amax(-1).all()
            else:
                assert not grad.any()


def test_the_full_gradient_reaches_the_first_segment() -> None:
    model, tokens = tiny_model(RMT, segment_len=T), tokens_like(2, K * T)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = 3
    with Embeddings(model) as embedded:
        rmt_core.backward(model, tokens, labels)
        assert all(bool(grad.abs().amax(-1).all()) for grad in embedded.gradients())


def test_gradients_add_up() -> None:
    model, (tokens, labels) = tiny_model(RMT, segment_len=T), text()
    rmt_core.backward(model, tokens, labels)
    once = gradients(model)
    rmt_core.backward(model, tokens, labels)
    assert equal(gradients(model), {name: 2 * grad for name, grad in once.items()})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoint_equals_full_under_dropout(family: str) -> None:
    dropout = {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}
    changes: dict[str, Any] = dropout if family == "gpt2" else {"attention_dropout": 0.3}
    model, (tokens, labels) = tiny_model(RMT, family, T, **changes).train(), text()
    found = []
    for mode, seed in (("full", 3), ("checkpoint", 3), ("full", 4)):
        torch.manual_seed(seed)
        rmt_core.backward(model, tokens, labels, mode=mode)
        found.append(taken(model))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_labels_may_weigh_differently() -> None:
    """A segment's loss weights its labels; the loss is the weighted mean."""
    model, (tokens, labels) = tiny_model(RMT, segment_len=T), text()
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    segments = [
        segment._replace(weights=part)
        for segment, part in zip(cut(tokens, labels, None, T), weights.split(T, 1), strict=True)
    ]
    out, _ = rmt_core.run(model, tokens)
    nats = F.cross_entropy(out.logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    kept = weights * (labels != -100)
    unrolled = model.unroll(segments, model.init_state(3))
    assert close(unrolled.loss, (nats * kept).sum() / kept.sum())
    assert close(torch.cat(unrolled.nats, dim=1), nats)
    assert not any(part.requires_grad for part in unrolled.nats)


def test_unroll_carries_the_state_on() -> None:
    """Two calls that hand the state over equal one."""
    model, (tokens, labels) = tiny_model(RMT, segment_len=T), text()
    segments = cut(tokens, labels, None, T)
    whole = model.unroll(segments, model.init_state(3))
    first = model.unroll(segments[:2], model.init_state(3))
    second = model.unroll(segments[2:], first.state)
    assert close(torch.cat(first.nats + second.nats, dim=1), torch.cat(whole.nats, dim=1))
    assert close(leaves(second.state)[0], leaves(whole.state)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "backwards"}, "mode is 'backwards'; allowed: full, truncated, checkpoint, replay"),
        ({"mode": "truncated"}, "bptt_segments is None in mode 'truncated'"),
        ({"mode": "full", "bptt_segments": 2}, "bptt_segments is 2 in mode 'full'"),
        ({"mode": "checkpoint", "bptt_segments": 2}, "bptt_segments is 2 in mode 'checkpoint'"),
        ({"mode": "truncated", "bptt_segments": 0}, "bptt_segments is 0; it must be a whole number, at least 1"),
    ],
)
def test_modes_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    model, (tokens, labels) = tiny_model(segment_len=T), text()
    with pytest.raises(ValueError, match=message):
        rmt_core.backward(model, tokens, labels, **settings)


def test_labels_of_another_shape_are_refused() -> None:
    model, (tokens, labels) = tiny_model(segment_len=T), text()
    with pytest.raises(ValueError, match=r"tokens \(3, 20\) and labels \(3, 19\) must be equal"):
        rmt_core.backward(model, tokens, labels[:, 1:])
    with pytest.raises(ValueError, match="unroll needs at least one segment"):
        model.unroll([], model.init_state(3))


def test_a_checkpointed_segment_keeps_no_activations(model: RecurrentModel) -> None:
    """What autograd keeps between forward and backward does not grow by a segment's layers."""

    def kept_bytes(num_segments: int, checkpointed: bool) -> int:
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = tokens_like(2, num_segments * T)
        segments = [SegmentBatch(part, part) for part in tokens.split(T, 1)]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            unrolled = model.unroll(segments, model.init_state(2), checkpointed=checkpointed)
        assert unrolled.loss.requires_grad
        return sum(found.values())

    plain = kept_bytes(4, False) - kept_bytes(2, False)
    cheap = kept_bytes(4, True) - kept_bytes(2, True)
    assert cheap < plain / 4
