"""Memformer's slots against the equations of arXiv:2010.06891, section 3, slot by slot and head by head.

Axes: N tokens of a text, T tokens of a segment, K slots, D width, d = D / heads.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.memory.slots import MemformerMemory, SlotWriter

from .tiny import MEMFORMER, RMT, XL, close, next_labels, tiny_config, tiny_model, tokens_like

T = 6
LENGTHS = [3 * T, 2 * T + 1, T, 2, 1]


class Read(NamedTuple):
    """What the naive reference finds for one text."""

    hidden: Tensor  # (N, D)
    slots: Tensor  # (K, D)


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """(N, D): each row with mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def naive_read(reader: Any, h: Tensor, slots: Tensor, num_heads: int) -> Tensor:
    """What tokens h (N, D) find in slots (K, D): (N, D)."""
    width = h.shape[-1]
    d, rows = width // num_heads, slots * width**0.5
    found = []
    for x in normed(h, reader.norm):
        heads = []
        for a in range(0, width, d):
            query = reader.query.weight[a : a + d] @ x
            keys, values = rows @ reader.key.weight[a : a + d].T, rows @ reader.value.weight[a : a + d].T
            weights = (keys @ query / d**0.5).exp()
            heads.append((weights / weights.sum()) @ values)
        found.append(reader.out.weight @ torch.cat(heads))
    return torch.stack(found)


def naive_write(memory: MemformerMemory, h: Tensor, slots: Tensor) -> Tensor:
    """The slots (K, D) after tokens h (N, D)."""
    config, width, writer = memory.config, h.shape[-1], memory.writer
    assert writer is not None
    d, x = width // config.num_heads, normed(h, writer.norm)
    new = []
    for i, slot in enumerate(slots):
        row, heads = slot * width**0.5, []
        for a in range(0, width, d):
            part = slice(a, a + d)
            query = writer.query.weight[part] @ row
            keys = torch.stack([writer.key.weight[part] @ y for y in (row, *x)])
            values = torch.stack([row[part], *(writer.value.weight[part] @ y for y in x)])
            weights = (keys @ query / d**0.5 / config.temperature).exp()
            heads.append((weights / weights.sum()) @ values)
        drawn = torch.cat(heads) / width**0.5
        if config.forgetting:
            drawn = drawn + memory.bias.weight[i]
        new.append(drawn / drawn.square().sum().sqrt())
    return torch.stack(new)


def reading(stack: ExitStack, layer: nn.Module, attention: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
    """Let a layer of the Hugging Face model add `read` of what stands after its self-attention."""
    given: list[Tensor] = []
    stack.callback(layer.register_forward_pre_hook(lambda _, args: given.append(args[0])).remove)

    def add(_: nn.Module, args: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return out[0] + read(given.pop() + out[0])[None], *out[1:]

    stack.callback(attention.register_forward_hook(add).remove)


def naive(model: RecurrentModel, text: Tensor) -> Read:
    """The Hugging Face model's own forward pass over each segment of a text (N,), with the slots read and written."""
    memory: Any = model.memory
    lm: Any = model.backbone.lm
    layers, attention = (lm.transformer.h, "attn") if hasattr(lm, "transformer") else (lm.model.layers, "self_attn")
    slots = memory.bias.weight / memory.bias.weight.square().sum(-1, keepdim=True).sqrt()
    hidden = []
    for segment in text.split(T):
        with ExitStack() as stack:
            for layer, reader in zip(layers, memory.readers, strict=True):

                def read(h: Tensor, reader: Any = reader, slots: Tensor = slots) -> Tensor:
                    return naive_read(reader, h[0], slots, memory.config.num_heads)

                reading(stack, layer, getattr(layer, attention), read)
            hidden.append(lm.base_model(input_ids=segment[None], use_cache=False).last_hidden_state[0])
        slots = naive_write(memory, hidden[-1], slots)
    return Read(torch.cat(hidden), slots)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"num_slots": 1, "num_heads": 1}),
        ("llama", {"num_slots": 7, "num_heads": 4, "temperature": 1.0}),
        ("llama", {"forgetting": False}),
        ("gpt2", {"temperature": 0.1}),
    ],
)
def test_ragged_rows_follow_the_equations(family: str, settings: dict[str, Any]) -> None:
    """Outputs, slots, and the gradient of random weights on both."""
    model = tiny_model({**MEMFORMER, **settings}, family, T)
    tokens = tokens_like(len(LENGTHS), max(LENGTHS))
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens, lengths=torch.tensor(LENGTHS))
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        wanted = naive(model, tokens[i, :length])
        assert close(out.hidden[i, :length], wanted.hidden)
        assert close(state[i], wanted.slots)
        for a, b in ((out.hidden[i, :length], wanted.hidden), (state[i], wanted.slots)):
            weight = torch.randn_like(b)
            ours, theirs = ours + (a * weight).sum(), theirs + (b * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=1e-11 * (1 + float(b.abs().max()))) for a, b in pairs)


def test_slots_begin_at_their_own_vectors_and_have_length_one() -> None:
    model = tiny_model(MEMFORMER)
    memory: Any = model.memory
    start = model.init_state(2)
    assert close(start[1] * memory.bias.weight.norm(dim=-1, keepdim=True), memory.bias.weight)
    _, state = rmt_core.run(model, tokens_like(2, 3 * T))
    assert close(state.norm(dim=-1), torch.ones(2, 3))


def test_a_slot_sees_no_other_slot() -> None:
    torch.manual_seed(0)
    writer = SlotWriter(8, 2, 0.25).double()
    h, slots = torch.randn(1, 5, 8).double(), torch.randn(1, 3, 8).double()
    through = torch.autograd.functional.jacobian(lambda x: writer(h, x, None), slots)[0, :, :, 0]  # (K, D, K, D)
    for i in range(3):
        for j in range(3):
            assert bool(through[i, :, j].any()) == (i == j)


@pytest.mark.parametrize("forgetting", [True, False])
def test_a_slot_that_takes_nothing_in_returns_to_its_own_vector(forgetting: bool) -> None:
    """With values of zero, and one head, a slot keeps its direction but for the forgetting."""
    model = tiny_model({"kind": "memformer", "num_slots": 3, "num_heads": 1, "forgetting": forgetting})
    memory: Any = model.memory
    with torch.no_grad():
        memory.writer.value.weight.zero_()
    began = state = nn.functional.normalize(tokens_like(1, 3, 32).double() - 11, dim=-1)
    for i in range(8):
        _, state = model.step(tokens_like(1, T, seed=i), state)
    assert close(state, model.init_state(1), atol=0.01) if forgetting else close(state, began)


@pytest.mark.parametrize("memory", [MEMFORMER, {**MEMFORMER, "forgetting": False}, [XL, MEMFORMER], [MEMFORMER, RMT]])
def test_all_parameters_learn_from_the_first_step(memory: Any) -> None:
    torch.manual_seed(0)
    model = rmt_core.build(backbone=tiny_config(), memory=memory, segment_len=T, dtype="float64")
    tokens = tokens_like(2, 2 * T)
    rmt_core.backward(model, tokens, next_labels(tokens))
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_no_slots_are_the_plain_backbone() -> None:
    model, plain = tiny_model({"kind": "memformer", "num_slots": 0}), tiny_model()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    model.backbone.load_state_dict(plain.backbone.state_dict())
    tokens = tokens_like(2, 2 * T)
    assert torch.equal(rmt_core.run(model, tokens)[0].logits, rmt_core.run(plain, tokens)[0].logits)


def test_slots_cost_no_positions() -> None:
    """A segment as long as the backbone's positions still fits, and the state is K x D numbers a row."""
    model = tiny_model({**MEMFORMER, "num_slots": 5}, segment_len=64)
    _, state = model.step(tokens_like(1, 64), model.init_state(1))
    assert state.shape == (1, 5, 32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_slots", -1), ("num_slots", 2.5), ("num_heads", 0), ("num_heads", 5), ("temperature", 0.0)],
        *[("temperature", 1.5), ("temperature", float("nan")), ("forgetting", 1)],
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"memory\.{name} is {value}; it must "):
        tiny_model({**MEMFORMER, name: value})
