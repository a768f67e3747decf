"""Losses joined with other tensors: what only writes the state gets a gradient, of zero, and trains in parallel.

Axes: B rows, T tokens of a segment.
"""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import rmt_core
from rmt_core import SegmentBatch
from tests.process_group import spawn

from .sampling import sampling_model
from .tiny import MEMORIES, gradients, next_labels, tiny_model, tokens_like

B, T = 3, 4
WORLD_SIZE = 2


def worker(rank: int) -> None:
    """One of two processes: steps on rows of its own; a gradient that is waited for in vain fails the next step."""
    model, alone = (tiny_model(MEMORIES["armt"], segment_len=T) for _ in range(2))  # has what only writes the state
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for num_segments in (1, 1, 2):
        model.zero_grad()
        alone.zero_grad()
        rows = [tokens_like(2, num_segments * T, seed=seed) for seed in range(WORLD_SIZE)]
        wrapped(rows[rank], next_labels(rows[rank])).backward()
        everything = torch.cat(rows)
        alone(everything, next_labels(everything)).backward()
        found = gradients(model)
        for name, grad in gradients(alone).items():
            torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.long
def test_one_segment_trains_under_data_parallelism() -> None:
    """Two processes have the gradient of one that has all rows (up to the float32 in llama's norms)."""
    spawn(worker, WORLD_SIZE)


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_parameter_gets_a_gradient_from_one_segment(memory: str) -> None:
    model, tokens = tiny_model(MEMORIES[memory], segment_len=T), tokens_like(B, T)
    model(tokens, next_labels(tokens)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_loss_is_tied_to_the_last_state() -> None:
    """What only writes it has felt no loss: its gradient is zero, not missing."""
    model, tokens = sampling_model(), tokens_like(B, T)
    for mode in ("full", "checkpoint", "replay"):
        model.zero_grad()
        segments = [SegmentBatch(tokens, tokens)]
        rmt_core.backward_segments(model, segments, model.init_state(B), mode=mode, loss=lambda part: part.loss_sum)
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert not model.memory.writer.weight.grad.any()
        assert model.memory.reader.weight.grad.any()


def test_a_tie_changes_no_value_and_no_gradient() -> None:
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    loss, infinite = x.square().sum(), x @ torch.full((2, 1), -1e308, dtype=torch.float64) * 10
    assert infinite.isinf().all()
    tied = rmt_core.joined(loss, [infinite, x.detach()])
    assert torch.equal(tied, loss)
    (grad,) = torch.autograd.grad(tied, [x])
    assert grad.tolist() == [[2, -4]]
    assert rmt_core.joined(loss, [x.detach()]) is loss


def test_joined_gradients_are_not_scaled() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    given = torch.tensor([5.0, 7.0], dtype=torch.float64)
    (rmt_core.joined(x.sum(), [x * 3, x * 2], [given, None]) * 10).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [10 + 15, 10 + 21]
