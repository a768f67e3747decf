"""Segments computed again, in `checkpoint`, `replay` and with `exact_depth`: same gradient, same random numbers.

Axes: B rows, T tokens of a segment, K segments, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rmt_core
from rmt_core import RecurrentModel, SegmentBatch, Unrolled
from rmt_core.config import memory_settings
from rmt_core.random_state import GeneratorState
from rmt_core.recurrent import cut
from rmt_core.state import State, detach, leaves, tree_map

from .sampling import sampling_model
from .tiny import MEMORIES, RMT, close, close_states, gradients, next_labels, tiny_model, tokens_like

B, T, K = 3, 4, 4
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1},
}


def build(memory: str, family: str) -> RecurrentModel:
    """In training mode, with dropout."""
    if memory == "sampling":
        return sampling_model(family, T, **DROPOUT[family]).train()
    return tiny_model(MEMORIES[memory], family, T, **DROPOUT[family]).train()


def fits(memory: str, family: str) -> bool:
    """Whether the family has the positions that the memory needs."""
    kinds = [item["kind"] for item in memory_settings(MEMORIES[memory])]
    return family != "gpt2" or not any(rmt_core.MEMORIES[kind].needs_relative_positions for kind in kinds)


MODELS = [(memory, family) for family in DROPOUT for memory in MEMORIES if fits(memory, family)]


def cases() -> dict[str, list[SegmentBatch]]:
    """Whole rows; ragged rows; those with resets and weights, and with a loss on two segments only."""
    tokens = tokens_like(B, K * T)
    labels = next_labels(tokens)
    labels[:, 3::7] = -100
    lengths = torch.tensor([K * T, 2 * T + 1, T - 1])
    ragged = cut(tokens, labels.masked_fill(torch.arange(K * T) >= lengths[:, None] - 1, -100), lengths, T)
    resets = [None, torch.tensor([False, True, False]), torch.tensor([True, False, True]), torch.tensor([False] * 3)]
    weights = torch.rand(B, K * T, generator=torch.Generator().manual_seed(0), dtype=torch.float64).split(T, 1)
    reset = [part._replace(reset=r, weights=w) for part, r, w in zip(ragged, resets, weights, strict=True)]
    return {"whole": cut(tokens, labels, None, T), "ragged": ragged, "resets": reset, "some": asking(reset, {0, 2})}


def asking(segments: list[SegmentBatch], where: set[int]) -> list[SegmentBatch]:
    """The segments, with labels only where it is said."""
    return [
        part if i in where else part._replace(labels=torch.full_like(part.labels, -100))
        for i, part in enumerate(segments)
    ]


class Ran(NamedTuple):
    """What a way through the segments gave and left behind."""

    grads: dict[str, Tensor]
    result: Unrolled
    random: tuple[Tensor, Tensor]  # the global state, the generator's


def ran(model: RecurrentModel, way: Callable[[torch.Generator], Unrolled], seed: int = 3) -> Ran:
    model.zero_grad()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    result = way(generator)
    return Ran(gradients(model), result, (torch.get_rng_state(), generator.get_state()))


def through(model: RecurrentModel, segments: list[SegmentBatch], **how: Any) -> Ran:
    """`backward_segments` from the initial state."""

    def way(generator: torch.Generator) -> Unrolled:
        return rmt_core.backward_segments(model, segments, model.init_state(B), generator=generator, **how)

    return ran(model, way)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)


def assert_same(found: Ran, wanted: Ran) -> None:
    for name, grad in wanted.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=0, atol=1e-10, msg=name)
    assert close(found.result.loss, wanted.result.loss)
    assert close(found.result.aux, wanted.result.aux)
    assert close(found.result.weight, wanted.result.weight)
    assert close(torch.cat(found.result.nats), torch.cat(wanted.result.nats))
    assert close_states(found.result.state, wanted.result.state)
    assert not any(leaf.requires_grad for leaf in leaves(found.result.state))
    assert all(torch.equal(a, b) for a, b in zip(found.random, wanted.random, strict=True))


def naive(model: RecurrentModel, segments: list[SegmentBatch], depth: int) -> Callable[[torch.Generator], Unrolled]:
    """Each segment's loss by a run from the very beginning, cut loose `depth` segments back; all of one seed."""

    def loss_after(last: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state = model.init_state(B)
        for i, segment in enumerate(segments[: last + 1]):
            if i and i == last + 1 - depth:
                state = detach(state)
            out, state = model.step(segment.tokens, state, segment.lengths, segment.reset, generator=generator)
        nats = F.cross_entropy(out.logits.transpose(1, 2), segment.labels, ignore_index=-100, reduction="none")
        return (nats if segment.weights is None else nats * segment.weights).sum(), out.aux

    def way(generator: torch.Generator) -> Unrolled:
        seeds = torch.get_rng_state(), generator.get_state()
        total = model.unroll(segments, model.init_state(B), generator=generator)
        for i in range(len(segments)):
            torch.set_rng_state(seeds[0])
            generator.set_state(seeds[1])
            loss_sum, aux = loss_after(i, generator)
            (loss_sum / total.weight + aux / len(segments)).backward()
        return total._replace(state=detach(total.state))

    return way


# Equality


@pytest.mark.parametrize(("memory", "family"), [*MODELS, ("sampling", "llama"), ("sampling", "gpt2")])
def test_checkpoint_and_replay_equal_full(memory: str, family: str) -> None:
    """Gradients, losses, states and the random states left behind, with dropout."""
    model = build(memory, family)
    for segments in list(cases().values())[:: 3 if memory in MEMORIES else 1]:
        wanted = through(model, segments)
        assert any(grad.any() for grad in wanted.grads.values())
        for mode in ("checkpoint", "replay"):
            assert_same(through(model, segments, mode=mode), wanted)


@pytest.mark.parametrize("asked", range(2**K))
def test_replay_takes_a_loss_on_any_segments(asked: int) -> None:
    model, where = build("sampling", "llama"), {i for i in range(K) if asked >> i & 1}
    segments = asking(cases()["resets"], where)
    assert_same(through(model, segments, mode="replay"), through(model, segments))


@pytest.mark.parametrize("memory", MEMORIES)
def test_exact_depth_equals_a_naive_loop(memory: str) -> None:
    model, segments = build(memory, "llama"), cases()["resets"]
    found = through(model, segments, mode="truncated", bptt_segments=2, exact_depth=True)
    assert_same(found, ran(model, naive(model, segments, 2)))


@pytest.mark.parametrize("depth", [1, 2, 3, K + 1])
def test_every_exact_depth_equals_a_naive_loop(depth: int) -> None:
    model = build("sampling", "gpt2")
    for segments in cases().values():
        found = through(model, segments, mode="truncated", bptt_segments=depth, exact_depth=True)
        assert_same(found, ran(model, naive(model, segments, depth)))


def test_the_borders_of_the_modes_agree() -> None:
    """One segment; a depth of all segments; a depth of one."""
    model = build("sampling", "gpt2")  # llama's norms round to float32: the gradients' sum otherwise than each
    for segments in cases().values():
        for mode in ("checkpoint", "replay"):
            assert_same(through(model, segments[:1], mode=mode), through(model, segments[:1]))
        deep = through(model, segments, mode="truncated", bptt_segments=K, exact_depth=True)
        assert_same(deep, through(model, segments))
        alone = through(model, segments, mode="truncated", bptt_segments=1, exact_depth=True)
        assert_same(alone, through(model, segments, mode="truncated", bptt_segments=1))


@pytest.mark.parametrize("memory", ["rmt", "sampling"])
def test_the_comparison_would_see_other_random_numbers(memory: str) -> None:
    model, segments = build(memory, "llama"), cases()["whole"]

    def way(generator: torch.Generator) -> Unrolled:
        return model.unroll(segments, model.init_state(B), generator=generator)

    one, other = (leaves(ran(model, way, seed).result.state)[0] for seed in (3, 4))
    assert not close(one, other)


@pytest.mark.parametrize("mode", ["full", "checkpoint", "replay"])
def test_tokens_and_segments_give_the_same(mode: str) -> None:
    model, segments = build("sampling", "llama"), cases()["whole"]
    tokens, labels = (torch.cat([part[i] for part in segments], dim=1) for i in (0, 1))
    wanted = through(model, segments)
    loss: list[Tensor] = []

    def way(generator: torch.Generator) -> Unrolled:
        loss.append(rmt_core.backward(model, tokens, labels, mode=mode, generator=generator))
        return wanted.result

    assert_same(ran(model, way), wanted)
    assert close(loss[0], wanted.result.loss)


@pytest.mark.parametrize("how", [{"mode": "replay"}, {"mode": "truncated", "bptt_segments": 2, "exact_depth": True}])
def test_the_gradient_goes_on_into_a_given_state(how: dict[str, Any]) -> None:
    """One that a learned initial state is part of, one that the caller holds, and none."""
    model, segments = sampling_model("gpt2"), cases()["whole"]
    assert through(model, segments, **how).grads["memory.initial.weight"].any()
    held = []
    for mode in ({"mode": "full"}, how):
        state = tree_map(lambda leaf: leaf.requires_grad_(leaf.is_floating_point()), detach(model.init_state(B)))
        rmt_core.backward_segments(model, segments[:2], state, **mode)
        held.append(state["rows"].grad)
    assert held[0].any()
    assert close(held[0], held[1])
    model.zero_grad()
    rmt_core.backward_segments(model, segments, detach(model.init_state(B)), **how)
    assert model.memory.initial.weight.grad is None


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_loss_reaches_back_exactly_so_many_segments(depth: int) -> None:
    model, tokens = tiny_model(RMT, segment_len=T), torch.arange(5 * T).expand(2, -1)  # no token twice in a row
    for asked in range(5):
        labels = torch.full_like(tokens, -100)
        labels[:, asked * T : (asked + 1) * T] = 3
        model.zero_grad()
        rmt_core.backward(model, tokens, labels, mode="truncated", bptt_segments=depth, exact_depth=True)
        felt = model.backbone.lm.get_input_embeddings().weight.grad.abs().amax(-1) > 0
        wanted = [asked - depth < token // T <= asked for token in range(len(felt))]
        assert felt.tolist() == wanted


# Cost


def test_replay_goes_back_once_a_segment() -> None:
    model, segments = sampling_model(), cases()["whole"]
    seen: list[list[bool]] = []

    def counted(roots: Any, grads: Any) -> None:
        seen.append([grad is None for grad in grads])
        torch.autograd.backward(roots, grads)

    rmt_core.replay(model, segments, model.init_state(B), backward=counted)
    assert seen == [[True]] + [[True, False]] * (K - 1)  # the loss, and the one part of the state that learns


def test_replay_can_run_through_a_wrapper_that_scales() -> None:
    """As under a data-parallel wrapper: its own forward pass, one scalar to go back from, a scaled loss."""
    model, segments = sampling_model(), cases()["whole"]
    wanted = through(model, segments)

    def way(generator: torch.Generator) -> Unrolled:
        def unroll(part: Any, state: State) -> Unrolled:
            return model.unroll(part, state, generator=generator)

        def backward(roots: Any, grads: Any) -> None:
            (rmt_core.joined(roots[0], roots[1:], grads[1:]) * 4).backward()

        def loss(part: Unrolled) -> Tensor:
            return part.loss_sum / wanted.result.weight / 2 + part.aux / K / 2

        return rmt_core.replay(
            model, segments, model.init_state(B), loss=loss, generator=generator, unroll=unroll, backward=backward
        )

    found = ran(model, way)
    assert_same(found._replace(grads={name: grad / 2 for name, grad in found.grads.items()}), wanted)


class Kept:
    """Bytes that autograd keeps for the backward pass: now, and at most so far; a storage counts once."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "_Held":
        return _Held(self, tensor.detach())  # an output would hold the graph that holds it

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        before = self.uses.get(storage.data_ptr(), 0)
        self.uses[storage.data_ptr()] = before + by
        self.now += ((before + by > 0) - (before > 0)) * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Held:
    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.change(tensor, 1)

    def __del__(self) -> None:
        self.kept.change(self.tensor, -1)


def peak_bytes(model: RecurrentModel, num_segments: int, mode: str) -> int:
    kept, parts = Kept(), [tokens_like(B, T, seed=i) for i in range(num_segments)]
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        segments = [SegmentBatch(part, part) for part in parts]
        rmt_core.backward_segments(model, segments, model.init_state(B), mode=mode)
    assert kept.now == 0
    return kept.peak


@pytest.mark.parametrize("memory", MEMORIES)
def test_replay_keeps_one_segment_however_many_there_are(memory: str) -> None:
    model = tiny_model(MEMORIES[memory], segment_len=T)
    assert peak_bytes(model, 9, "replay") == peak_bytes(model, 3, "replay") < peak_bytes(model, 3, "full")


def test_the_values_of_a_part_hold_neither_graph_nor_state() -> None:
    model, segments = sampling_model(), cases()["whole"]
    found = model.unroll(segments, model.init_state(B)).values()
    assert found.state == ()
    assert not found.loss.requires_grad


def test_a_generator_state_can_be_entered_again() -> None:
    generator = torch.Generator().manual_seed(1)
    then = GeneratorState(generator)
    first = torch.rand(3, generator=generator)
    after = generator.get_state()
    for _ in range(2):
        with then:
            assert torch.equal(torch.rand(3, generator=generator), first)
        assert torch.equal(generator.get_state(), after)


# Borders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact_depth": True}, "exact_depth is set in mode 'full'; give it with 'truncated'"),
        ({"mode": "replay", "exact_depth": True}, "exact_depth is set in mode 'replay'"),
        ({"mode": "replay", "bptt_segments": 2}, "bptt_segments is 2 in mode 'replay'"),
        ({"mode": "truncated", "exact_depth": True}, "bptt_segments is None in mode 'truncated'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rmt_core.backward_segments(tiny_model(segment_len=T), cases()["whole"], (), **settings)


def test_no_segments_are_refused() -> None:
    model = tiny_model(segment_len=T)
    with pytest.raises(ValueError, match="there are no segments to replay"):
        rmt_core.replay(model, [], ())
    with pytest.raises(ValueError, match="there are no segments to go back through"):
        rmt_core.backward_segments(model, [], ())
