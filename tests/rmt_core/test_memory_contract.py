"""What every memory must do, whatever its mechanism.

Axes: B rows, T tokens of a segment, D width.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.recurrent import SegmentBatch, cut
from rmt_core.state import State, from_bytes, leaves, select, stack, to_bytes, tree_map

from .tiny import (
    ENCODER_ONLY,
    MEMORIES,
    OFF,
    RMT,
    VOCAB,
    Embeddings,
    close,
    close_states,
    gradients,
    next_labels,
    same_states,
    tiny_model,
    tokens_like,
)

T = 6
OWN_ATTENTION = [MEMORIES[name] for name in MEMORIES if "rmt-open" in name or "bmojo" in name]
DETACHED = [MEMORIES[name] for name in ("none", "xl", "lamemo", "infinity", "xl+infinity")]


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest) -> Any:
    return MEMORIES[request.param]


@pytest.fixture
def model(memory: Any) -> RecurrentModel:
    return tiny_model(memory, segment_len=T)


def after(model: RecurrentModel, *shape: int, seed: int = 7) -> State:
    """A state that has read something: two segments of each row."""
    state = model.init_state(shape[0])
    for part in tokens_like(shape[0], 2 * T, seed=seed).split(T, 1):
        _, state = model.step(part, state)
    return state


def changed(tokens: Tensor, row: int, at: int) -> Tensor:
    other = tokens.clone()
    other[row, at] = (other[row, at] + 1) % VOCAB
    return other


# Causality


def test_no_look_ahead(model: RecurrentModel) -> None:
    tokens, state = tokens_like(2, T), after(model, 2)
    out, new = model.step(tokens, state)
    for j in range(T):
        other, other_new = model.step(changed(tokens, 0, j), state)
        same = (other.hidden - out.hidden).abs().amax(-1) < 1e-12  # (B, T)
        assert same[1].all()
        assert same[0, :j].all()
        assert not same[0, j:].any()
        if leaves(new):
            assert not close_states(new, other_new)


def test_no_gradient_comes_from_ahead(model: RecurrentModel) -> None:
    with Embeddings(model) as embedded:
        out, _ = model.step(tokens_like(2, T), after(model, 2))
        for j in range(T):
            (grad,) = torch.autograd.grad(out.hidden[0, j].sum(), embedded.seen[-1], retain_graph=True)
            assert not grad[0, j + 1 :].any()
            assert grad[0, : j + 1].abs().amax(-1).all()


def test_no_look_ahead_across_segments(model: RecurrentModel) -> None:
    tokens = tokens_like(1, 3 * T)
    out, _ = rmt_core.run(model, tokens)
    for j in (T - 1, T, 2 * T + 2):
        other, _ = rmt_core.run(model, changed(tokens, 0, j))
        assert close(other.hidden[:, :j], out.hidden[:, :j], atol=1e-12)


def test_the_past_is_felt(model: RecurrentModel, memory: Any) -> None:
    tokens, later = tokens_like(1, T), tokens_like(1, T, seed=2)
    for j in range(T):
        felt = []
        for first in (tokens, changed(tokens, 0, j)):
            _, state = model.step(first, model.init_state(1))
            out, _ = model.step(later, state)
            felt.append(out.hidden)
        same = (felt[0] - felt[1]).abs().amax(-1) < 1e-9
        assert same.all() if memory == "none" else not same.any()


# Rows


def test_rows_do_not_mix(model: RecurrentModel) -> None:
    tokens = tokens_like(3, 3 * T)
    other = tokens.clone()
    other[1] = tokens_like(3 * T, seed=9)
    lengths = torch.tensor([3 * T, 2 * T + 3, T + 1])
    for given in (None, lengths):
        out, state = rmt_core.run(model, tokens, lengths=given)
        moved, moved_state = rmt_core.run(model, other, lengths=given)
        assert close(out.hidden[[0, 2]], moved.hidden[[0, 2]], atol=1e-12)
        assert not close(out.hidden[1], moved.hidden[1])
        assert close_states(select(state, [0, 2]), select(moved_state, [0, 2]), atol=1e-12)


def test_gradients_of_rows_do_not_mix(model: RecurrentModel) -> None:
    lengths = torch.tensor([3 * T, 2 * T + 3, T + 1])
    with Embeddings(model) as embedded:
        out, state = rmt_core.run(model, tokens_like(3, 3 * T), lengths=lengths)
        (out.hidden[1].sum() + sum((leaf[1].double().sum() for leaf in leaves(state)), torch.zeros(()))).backward()
        for grad in embedded.gradients():
            assert grad[1].any()
            assert not grad[[0, 2]].any()


def test_permuting_rows_permutes_results(model: RecurrentModel) -> None:
    tokens, order = tokens_like(4, 3 * T), torch.tensor([2, 0, 3, 1])
    lengths = torch.tensor([3 * T, 0, T + 1, 2 * T])
    out, state = rmt_core.run(model, tokens, lengths=lengths)
    moved, moved_state = rmt_core.run(model, tokens[order], lengths=lengths[order])
    assert close(moved.hidden, out.hidden[order])
    assert close_states(moved_state, select(state, order))


def steps(model: RecurrentModel, tokens: Tensor, lengths: Tensor, seed: int) -> tuple[Tensor, State]:
    """As `run`, with a generator that is given to every step."""
    state, hidden, generator = model.init_state(len(tokens)), [], torch.Generator().manual_seed(seed)
    for i, part in enumerate(tokens.split(T, 1)):
        given = (lengths - i * T).clamp(0, part.shape[1])
        out, state = model.step(part, state, lengths=given, generator=generator)
        hidden.append(out.hidden)
    return torch.cat(hidden, dim=1), state


def test_what_is_drawn_for_a_row_depends_on_no_other_row(model: RecurrentModel) -> None:
    tokens, lengths, order = tokens_like(3, 3 * T), torch.tensor([3 * T, T + 1, 2 * T]), torch.tensor([2, 0, 1])
    hidden, state = steps(model, tokens, lengths, seed=4)
    moved, moved_state = steps(model, tokens[order], lengths[order], seed=4)
    assert close(moved, hidden[order])
    assert close_states(moved_state, select(state, order))
    alone, alone_state = steps(model, tokens[1:2], lengths[1:2], seed=4)
    assert close(alone[0, : T + 1], hidden[1, : T + 1])
    assert close_states(alone_state, select(state, [1]))


def test_a_ragged_batch_equals_each_row_alone(model: RecurrentModel) -> None:
    tokens, lengths = tokens_like(5, 3 * T), torch.tensor([3 * T, 2 * T + 1, T, T - 2, 1])
    labels = next_labels(tokens)
    labels[torch.arange(3 * T) >= lengths[:, None] - 1] = -100
    labels[-1, 0] = 3  # the row of one token predicts something too
    out, state = rmt_core.run(model, tokens, lengths=lengths)
    for i, length in enumerate(lengths.tolist()):
        alone, alone_state = rmt_core.run(model, tokens[i : i + 1, :length])
        assert close(out.hidden[i, :length], alone.hidden[0])
        assert close_states(select(state, [i]), alone_state)

    def nats(tokens: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Summed; without auxiliary losses, which are means over a batch."""
        return model.unroll(cut(tokens, labels, lengths, T), model.init_state(len(tokens))).loss_sum

    nats(tokens, labels, lengths).backward()
    together = gradients(model)
    model.zero_grad()
    for i, length in enumerate(lengths.tolist()):
        nats(tokens[i : i + 1, :length], labels[i : i + 1, :length]).backward()
    assert all(close(together[name], grad) for name, grad in gradients(model).items())


def test_padding_touches_nothing(model: RecurrentModel) -> None:
    tokens, lengths = tokens_like(3, T), torch.tensor([T, 2, 4])
    state = after(model, 3)
    out, new = model.step(tokens, state, lengths=lengths)
    real = torch.arange(T) < lengths[:, None]
    for filler in (0, VOCAB - 1):
        padded = tokens.masked_fill(~real, filler)
        other, other_new = model.step(padded, state, lengths=lengths)
        assert close(out.hidden[real], other.hidden[real], atol=1e-12)
        assert close_states(new, other_new, atol=1e-12)
        assert bool(other.hidden.isfinite().all())


def test_full_lengths_equal_no_lengths(model: RecurrentModel) -> None:
    tokens, state = tokens_like(2, T), after(model, 2)
    out, new = model.step(tokens, state)
    other, other_new = model.step(tokens, state, lengths=torch.tensor([T, T]))
    assert close(out.hidden, other.hidden)
    assert close_states(new, other_new)


# The state as a value


def test_streamed_equals_one_shot(model: RecurrentModel) -> None:
    tokens = tokens_like(2, 5 * T - 2)
    out, state = rmt_core.run(model, tokens)
    first, carried = rmt_core.run(model, tokens[:, : 2 * T])
    second, carried = rmt_core.run(model, tokens[:, 2 * T : 3 * T], carried)
    third, carried = rmt_core.run(model, tokens[:, 3 * T :], carried)
    assert torch.equal(torch.cat([first.hidden, second.hidden, third.hidden], dim=1), out.hidden)
    assert same_states(carried, state)


def test_the_loss_is_that_of_the_logits(model: RecurrentModel) -> None:
    tokens, lengths = tokens_like(2, 3 * T), torch.tensor([3 * T, 2 * T + 1])
    labels = next_labels(tokens)
    asked = labels.masked_fill(torch.arange(3 * T) >= lengths[:, None], -100)  # padding is not
    out, _ = rmt_core.run(model, tokens, lengths=lengths)
    wanted = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), asked.flatten(), ignore_index=-100)
    assert close(model(tokens, labels, lengths=lengths), wanted + out.aux)
    assert close(rmt_core.backward(model, tokens, labels, lengths=lengths), wanted + out.aux)


def test_a_reset_row_equals_a_fresh_one(model: RecurrentModel) -> None:
    tokens, state = tokens_like(3, T), after(model, 3)
    lengths = torch.tensor([T, 3, T])
    reset = torch.tensor([True, True, False])
    out, new = model.step(tokens, state, lengths=lengths, reset=reset)
    fresh, fresh_new = model.step(tokens, model.init_state(3), lengths=lengths)
    going_on, going_on_new = model.step(tokens, state, lengths=lengths)
    assert torch.equal(out.hidden[0], fresh.hidden[0])
    assert torch.equal(out.hidden[1, :3], fresh.hidden[1, :3])
    assert torch.equal(out.hidden[2], going_on.hidden[2])
    assert same_states(select(new, [0, 1]), select(fresh_new, [0, 1]))
    assert same_states(select(new, [2]), select(going_on_new, [2]))


def test_a_reset_stops_the_gradient(model: RecurrentModel) -> None:
    tokens, no_labels = tokens_like(2, 2 * T), torch.full((2, T), -100)
    labels = next_labels(tokens)[:, T:]
    segments = [
        SegmentBatch(tokens[:, :T], no_labels),
        SegmentBatch(tokens[:, T:], labels, reset=torch.tensor([True, False])),
    ]
    with Embeddings(model) as embedded:
        model.unroll(segments, model.init_state(2)).loss_sum.backward()  # auxiliary losses go back without labels
        first, second = embedded.gradients()
        assert not first[0].any()
        assert second[0].any()


@pytest.mark.parametrize("reset", [None, [False, True, True, False]])
@pytest.mark.parametrize("lengths", [None, [T, 0, 3, 0]])
def test_an_inactive_row_keeps_its_state_bit_for_bit(
    model: RecurrentModel, lengths: list[int] | None, reset: list[bool] | None
) -> None:
    state, active = after(model, 4), torch.tensor([True, False, False, False])
    _, new = model.step(
        tokens_like(4, T),
        state,
        lengths=None if lengths is None else torch.tensor(lengths),
        reset=None if reset is None else torch.tensor(reset),
        active=active,
    )
    assert same_states(select(new, [1, 2, 3]), select(state, [1, 2, 3]))
    assert not leaves(state) or not close_states(select(new, [0]), select(state, [0]))


def test_a_row_of_length_zero_keeps_its_state_bit_for_bit(model: RecurrentModel) -> None:
    state = after(model, 3)
    out, new = model.step(tokens_like(3, T), state, lengths=torch.tensor([0, T, 0]))
    assert same_states(select(new, [0, 2]), select(state, [0, 2]))
    assert bool(out.hidden.isfinite().all())


def test_a_row_of_length_zero_can_be_reset(model: RecurrentModel) -> None:
    state = after(model, 2)
    _, new = model.step(tokens_like(2, T), state, lengths=torch.tensor([0, T]), reset=torch.tensor([True, False]))
    assert same_states(select(new, [0]), model.init_state(1))


def test_an_inactive_row_passes_its_gradient_on(model: RecurrentModel, memory: Any) -> None:
    """Two rows, one of which skips the second segment: its memory's gradient goes to the first."""
    if memory in DETACHED:
        pytest.skip("no gradient crosses segments")
    with Embeddings(model) as embedded:
        _, state = model.step(tokens_like(2, T), model.init_state(2))
        _, state = model.step(tokens_like(2, T, seed=2), state, active=torch.tensor([True, False]))
        sum(leaf[1].double().sum() for leaf in leaves(state) if leaf.requires_grad).backward()
        first, second = embedded.gradients()
        assert first[1].any()
        assert not second[1].any()


def test_the_state_keeps_its_shape_and_type(model: RecurrentModel) -> None:
    state = model.init_state(3)
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves(state)]
    assert all(leaf.shape[0] == 3 for leaf in leaves(state))
    for i, size in enumerate((T, 1, T, 3, T, T)):
        _, state = model.step(tokens_like(3, size, seed=i), state, lengths=torch.tensor([size, 1, 0]))
        assert [(leaf.shape, leaf.dtype) for leaf in leaves(state)] == shapes


def test_the_state_survives_bytes(model: RecurrentModel) -> None:
    tokens, state = tokens_like(2, T), after(model, 2)
    data = to_bytes(state, "model")
    again = from_bytes(data, "model")
    assert type(again) is type(state)
    assert same_states(again, state)
    out, new = model.step(tokens, state)
    other, other_new = model.step(tokens, again)
    assert torch.equal(out.hidden, other.hidden)
    assert same_states(new, other_new)
    for spoilt in spoilt_copies(data):
        with pytest.raises(ValueError, match="state"):
            from_bytes(spoilt, "model")
    with pytest.raises(ValueError, match="belongs to model 'model', not to 'another'"):
        from_bytes(data, "another")


def spoilt_copies(data: bytes) -> Iterator[bytes]:
    """Cut off, or with one bit changed, at places all over."""
    for at in range(0, len(data), max(1, len(data) // 50)):
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def test_a_step_edits_nothing(model: RecurrentModel) -> None:
    tokens, state = tokens_like(2, T), after(model, 2)
    kept, kept_tokens, kept_model = tree_map(Tensor.clone, state), tokens.clone(), gradient_free_copy(model)
    out, new = model.step(tokens, state, lengths=torch.tensor([T, 2]), reset=torch.tensor([False, True]))
    again, again_new = model.step(tokens, state, lengths=torch.tensor([T, 2]), reset=torch.tensor([False, True]))
    assert same_states(state, kept)
    assert torch.equal(tokens, kept_tokens)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept_model.values(), strict=True))
    assert torch.equal(out.hidden, again.hidden)
    assert same_states(new, again_new)


def gradient_free_copy(model: RecurrentModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_states_of_different_documents_form_a_batch(model: RecurrentModel) -> None:
    """Rows that have read 0, 1 and 2 segments continue together as they would alone."""
    rows = [model.init_state(1)]
    for part in tokens_like(1, 2 * T, seed=3).split(T, 1):
        rows.append(model.step(part, rows[-1])[1])
    tokens = tokens_like(3, T)
    out, new = model.step(tokens, stack(rows))
    for i, row in enumerate(rows):
        alone, alone_new = model.step(tokens[i : i + 1], row)
        assert close(out.hidden[i], alone.hidden[0])
        assert close_states(select(new, [i]), alone_new)


# Cost


def test_no_attention_call_gets_a_mask(model: RecurrentModel, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if memory in OWN_ATTENTION:
        pytest.skip("computes attention itself: see its own tests")
    masks, causal = [], []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        masks.append(attn_mask)
        causal.append(rest["is_causal"])
        return attention(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    state = model.init_state(3)
    _, state = model.step(tokens_like(3, T), state)
    _, state = model.step(tokens_like(3, T), state, lengths=torch.tensor([T, 2, 0]))
    model.step(
        tokens_like(3, T), state, reset=torch.tensor([True, False, False]), active=torch.tensor([True, True, False])
    )
    assert len(masks) == 3 * 2  # steps x layers
    assert masks == [None] * 6
    assert all(causal)


def test_the_head_is_applied_only_where_it_is_asked(model: RecurrentModel) -> None:
    rows: list[int] = []
    head = model.backbone.lm.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].numel() // 32))
    tokens = tokens_like(2, 3 * T)
    labels = torch.full_like(tokens, -100)
    labels[0, 4], labels[1, 2 * T :] = 1, 2

    rmt_core.run(model, tokens)
    assert sum(rows) == 0
    model(tokens, labels)
    assert sum(rows) == 1 + T
    rmt_core.backward(model, tokens, labels)
    assert sum(rows) == 2 * (1 + T)
    handle.remove()


# Numbers


@pytest.mark.parametrize("off", OFF.values(), ids=OFF)
def test_a_memory_that_is_off_leaves_the_backbone(off: Any) -> None:
    """Logits and gradients are those of Hugging Face's model on each segment alone."""
    model, tokens = tiny_model(off, segment_len=T), tokens_like(2, 2 * T)
    lm = model.backbone.lm
    out, _ = rmt_core.run(model, tokens)
    wanted = torch.cat([lm(input_ids=part, use_cache=False).logits for part in tokens.split(T, 1)], dim=1)
    assert close(out.logits, wanted)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad((x * weight).sum(), list(lm.parameters())) for x in (out.logits, wanted))
    assert all(close(a, b, atol=1e-9) for a, b in zip(ours, theirs, strict=True))


def test_every_memory_can_be_off() -> None:
    assert {off if isinstance(off, str) else off["kind"] for off in OFF.values()} == set(
        rmt_core.MEMORIES
    ) - ENCODER_ONLY


# How far bfloat16 may be from float32 after four segments, as a fraction of the hidden states' norm. Measured over
# eight seeds: none, xl, lamemo, infinity and bmojo 0.010; memformer and rmt 0.013; shm, rmt-5-read and rmt-r 0.018.
# Weights are stirred less than elsewhere, for where they are large, a recurrence magnifies any rounding. Even so one
# seed of the eight, not the one below, goes further where a memory chooses tokens or divides by a small norm: rmt-open
# 0.021, armt 0.05, bmojo-full 0.05, shm with rmt 0.15. Of armt and bmojo-full, rounding the weights alone does it.
MAX_BF16_DISTANCE = 0.02


def test_bfloat16_stays_near_float32(memory: Any) -> None:
    model, tokens = tiny_model(memory, segment_len=T, stirred=0.1), tokens_like(3, 4 * T)
    lengths = torch.tensor([4 * T, 3 * T - 3, T + 1])
    real = torch.arange(4 * T) < lengths[:, None]
    with torch.no_grad():
        single, _ = rmt_core.run(as_type(model, "float32"), tokens, lengths=lengths)
        model = as_type(model, "bfloat16")
        half, state = rmt_core.run(model, tokens, lengths=lengths)
    assert half.hidden.dtype == torch.bfloat16
    assert [leaf.dtype for leaf in leaves(state)] == [leaf.dtype for leaf in leaves(model.init_state(3))]
    assert (half.hidden.float() - single.hidden)[real].norm() < MAX_BF16_DISTANCE * single.hidden[real].norm()


def as_type(model: RecurrentModel, dtype: str) -> RecurrentModel:
    """A model built in another type, with the same weights."""
    other = rmt_core.build(
        backbone=model.config.backbone, memory=model.config.memory, segment_len=model.segment_len, dtype=dtype
    )
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MEMORIES if "+" not in name] + ["xl+rmt"])
def test_a_step_compiles_whole(name: str) -> None:
    """Without a break in its graph; one layer and few compositions, since tracing takes seconds."""
    model = tiny_model(MEMORIES[name], segment_len=T, num_hidden_layers=1)
    compiled = torch.compile(model.step, backend="eager", fullgraph=True)
    tokens, state = tokens_like(2, T), after(model, 2)
    ragged = {"lengths": torch.tensor([T, 2]), "reset": torch.tensor([False, True])}
    out, new = model.step(tokens, state, **ragged)
    other, other_new = compiled(tokens, state, **ragged)
    assert close(out.hidden, other.hidden)
    assert close_states(new, other_new)
    torch.compiler.reset()


# Borders


@pytest.mark.parametrize("shape", [(2, T + 1), (2, 0), (T,)])
def test_a_step_refuses_tokens_that_are_no_segment(model: RecurrentModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"a step takes \\(rows, 1 to {T} tokens\\)"):
        model.step(torch.zeros(shape, dtype=torch.long), model.init_state(2))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([T + 1, 1], f"a length is {T + 1}; it must be 0 to {T}"),
        ([1, -1], f"a length is -1; it must be 0 to {T}"),
        ([1], r"lengths are \(1,\); give one for each of 2 rows"),
    ],
)
def test_lengths_that_rows_do_not_have_are_refused(model: RecurrentModel, lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.step(tokens_like(2, T), model.init_state(2), torch.tensor(lengths))


def test_a_state_of_other_rows_is_refused(model: RecurrentModel) -> None:
    if not leaves(model.init_state(1)):
        pytest.skip("nothing is carried")
    for num_rows in (1, 3):
        with pytest.raises(ValueError, match=f"the state is of {num_rows} rows, the tokens are of 2"):
            model.step(tokens_like(2, T), model.init_state(num_rows))


@pytest.mark.parametrize("bptt_segments", [0, -1, 1.5])
def test_windows_of_no_segments_are_refused(bptt_segments: Any) -> None:
    model, tokens = tiny_model(RMT), tokens_like(1, 2 * T)
    with pytest.raises(ValueError, match="bptt_segments is .*; it must be a whole number, at least 1, or None"):
        model(tokens, next_labels(tokens), bptt_segments=bptt_segments)


def test_a_text_without_labels_has_only_the_auxiliary_loss(model: RecurrentModel) -> None:
    tokens = tokens_like(2, 2 * T)
    loss = rmt_core.backward(model, tokens, torch.full_like(tokens, -100))
    aux = rmt_core.run(model, tokens)[0].aux
    assert close(loss, aux)
    assert bool(aux) == any(grad.any() for grad in gradients(model).values())


def test_a_short_segment_is_a_segment() -> None:
    """One token a step, which is the least: the memory is still written."""
    model = tiny_model(RMT, segment_len=1)
    tokens = tokens_like(2, 4)
    out, state = rmt_core.run(model, tokens)
    alone, alone_state = rmt_core.run(model, tokens[1:])
    assert close(out.hidden[1:], alone.hidden)
    assert close_states(select(state, [1]), alone_state)
