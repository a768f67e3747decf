"""On a GPU everything is what it is on the CPU: outputs, states, gradients, what is written, what is computed again.

Axes: B rows, T tokens of a segment, K segments.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel, SegmentBatch, Unrolled
from rmt_core.recurrent import cut
from rmt_core.state import State, from_bytes, leaves, to, to_bytes

from .tiny import MEMORIES, close, close_states, gradients, next_labels, same_states, tiny_model, tokens_like

pytestmark = pytest.mark.gpu

B, T, K = 3, 6, 4
ATOL = 1e-8
ACROSS = 1e-4  # between devices: llama's norms round to float32 on their way, and each device its own way
LAYER_LOCAL = [name for name in MEMORIES if "rmt" not in name and "memformer" not in name]


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest) -> Any:
    return MEMORIES[request.param]


def segments(device: str) -> list[SegmentBatch]:
    """Ragged rows, one of which begins anew half-way."""
    tokens = tokens_like(B, K * T)
    lengths = torch.tensor([K * T, 2 * T + 1, T - 1])
    labels = next_labels(tokens).masked_fill(torch.arange(K * T) >= lengths[:, None] - 1, -100)
    parts = cut(tokens, labels, lengths, T)
    parts[2] = parts[2]._replace(reset=torch.tensor([True, False, False]))
    return [SegmentBatch(*(None if each is None else each.to(device) for each in part)) for part in parts]


def on(device: str, memory: Any, **changes: Any) -> RecurrentModel:
    return tiny_model(memory, segment_len=T, **changes).to(device)


def unrolled(model: RecurrentModel, device: str) -> tuple[Unrolled, dict[str, Tensor]]:
    result = model.unroll(segments(device), model.init_state(B))
    result.loss.backward()
    return result, {name: grad.cpu() for name, grad in gradients(model).items()}


def on_cpu(state: State) -> State:
    return to(state, "cpu")


def test_losses_states_and_gradients_are_those_of_the_cpu(memory: Any) -> None:
    wanted, wanted_grads = unrolled(on("cpu", memory), "cpu")
    found, grads = unrolled(on("cuda", memory), "cuda")
    assert close(found.loss.cpu(), wanted.loss, ACROSS)
    assert close(torch.cat(found.nats).cpu(), torch.cat(wanted.nats), ACROSS)
    assert close_states(on_cpu(found.state), wanted.state, ACROSS)
    for name, grad in wanted_grads.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=ACROSS * scale, msg=name)


@pytest.mark.parametrize("mode", ["checkpoint", "replay"])
def test_what_is_computed_again_draws_the_same_on_the_device(memory: Any, mode: str) -> None:
    model = on("cuda", memory, attention_dropout=0.3).train()

    def through(mode: str) -> tuple[Unrolled, dict[str, Tensor], Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        result = rmt_core.backward_segments(model, segments("cuda"), model.init_state(B), mode)
        return result, gradients(model), torch.cuda.get_rng_state()

    wanted, wanted_grads, drawn = through("full")
    found, grads, drawn_again = through(mode)
    assert close(found.loss, wanted.loss)
    assert close_states(found.state, wanted.state)
    assert all(close(grads[name], grad, ATOL) for name, grad in wanted_grads.items())
    assert torch.equal(drawn, drawn_again)


@pytest.mark.parametrize("name", LAYER_LOCAL)
def test_the_diagonal_order_gives_the_same(name: str) -> None:
    model, tokens = on("cuda", MEMORIES[name]), tokens_like(B, K * T - 2).cuda()
    lengths = torch.tensor([K * T - 2, 2 * T + 1, T - 1], device="cuda")
    wanted, wanted_state = rmt_core.run(model, tokens, lengths=lengths)
    found, state = rmt_core.run(model, tokens, lengths=lengths, order="diagonal")
    real = torch.arange(K * T - 2, device="cuda") < lengths[:, None]
    assert close(found.hidden[real], wanted.hidden[real], ATOL)
    assert close_states(state, wanted_state, ATOL)


def test_a_state_goes_from_the_device_into_bytes_and_back(memory: Any) -> None:
    model = on("cuda", memory)
    _, state = rmt_core.run(model, tokens_like(B, 2 * T).cuda())
    data = to_bytes(state, rmt_core.fingerprint(model))
    back = to(from_bytes(data, rmt_core.fingerprint(model)), "cuda")
    assert same_states(back, state)
    assert all(leaf.is_cuda for leaf in leaves(back))


def test_the_same_is_written(memory: Any) -> None:
    prompts = [tokens_like(2 * T + 1).tolist(), [3], tokens_like(T, seed=4).tolist()]
    wanted = rmt_core.generate(on("cpu", memory), prompts, 2 * T + 1)
    found = rmt_core.generate(on("cuda", memory), prompts, 2 * T + 1)
    assert found.tokens == wanted.tokens
    assert close_states(on_cpu(found.session.state), wanted.session.state, ACROSS)


@pytest.mark.parametrize("kind", ["rmt", "xl", "armt", "infinity", "shm", "memformer"])
def test_bfloat16_reads_without_surprise(kind: str) -> None:
    exact = on("cuda", MEMORIES[kind], stirred=0.05)
    rough = on("cuda", MEMORIES[kind], stirred=0.05).to(torch.bfloat16)
    tokens = tokens_like(B, K * T).cuda()
    wanted, found = (rmt_core.run(model, tokens)[0].hidden.double() for model in (exact, rough))
    assert bool(found.isfinite().all())
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, ACROSS), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_full_attention_in_pieces_is_that_of_the_whole(family: str, dtype: torch.dtype, error: float) -> None:
    """Each type has kernels of its own."""
    model = rmt_core.FullContext(on("cuda", "none", family=family, stirred=0.05).to(dtype))
    tokens = tokens_like(B, 33).cuda()
    wanted = model.backbone.lm(input_ids=tokens, use_cache=False).logits.double()
    state, found = model.init_state(B, 33), []
    for part in tokens.split([7, 1, 20, 5], 1):
        out, state = model.step(part, state)
        found.append(out.logits.double())
    assert float((torch.cat(found, 1) - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("name", ["rmt", "rmt-r", "rmt-5-read", "xl", "armt"])
def test_skimming_leaves_the_state_that_steps_leave(name: str) -> None:
    """Recorded for the first three; a short segment and one of other rows in between, and a state from elsewhere."""
    model = on("cuda", MEMORIES[name])
    skimmer = rmt_core.Skimmer(model, patience=2)
    parts = tokens_like(B, 12 * T).cuda().split(T, 1)
    state = wanted = model.init_state(B)
    with torch.inference_mode():
        for i, part in enumerate(parts):
            lengths = torch.tensor([T, 1, 0], device="cuda") if i == 7 else None
            state = skimmer.after(part, state, lengths)
            wanted = model.step(part, wanted, lengths)[1]
            if i == 9:
                state = wanted
            assert close_states(state, wanted, ATOL)
        fewer = skimmer.after(parts[0][:2], model.init_state(2))
        assert close_states(fewer, model.step(parts[0][:2], model.init_state(2))[1], ATOL)
    assert (skimmer._fast is not None) == name.startswith("rmt")
