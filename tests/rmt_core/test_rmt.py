"""The Recurrent Memory Transformer against its equations, with the Hugging Face model as the backbone.

Axes: B rows, N tokens of a text, M memory tokens, D width.
"""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.backbone import Placement
from rmt_core.memory.base import Segment

from .tiny import FAMILIES, close, gradients, next_labels, tiny_model, tokens_like

T = 6


class Read(NamedTuple):
    """What the naive reference finds for one text."""

    hidden: Tensor  # (N, D)
    memory: Tensor  # (M, D) after the last segment
    past: list[Tensor]  # each (M, D): the memories that were read before


def sees(num_read: int, num_text: int, num_written: int, bidirectional: bool) -> Tensor:
    """Which row sees which, (S, S): figure 6d of arXiv:2207.06881."""
    size = num_read + num_text + num_written
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    if bidirectional:
        seen[:num_read, :num_read] = True
        seen[size - num_written :] = True
    return seen


def naive_retrieval(module: Any, rows: Tensor, memories: list[Tensor]) -> Tensor:
    """The rows (R, D) that RMT-R reads beside `rows`: one head over all memories, then a feed-forward layer."""
    seen = [module.norm(row) for memory in memories for row in memory]
    keys = torch.stack([module.key.weight @ row for row in seen])
    values = torch.stack([module.value.weight @ row for row in seen])
    found = []
    for row in rows:
        weights = (keys @ (module.query.weight @ module.norm(row)) / len(row) ** 0.5).softmax(0)
        r = module.output.weight @ (values.T @ weights) + row
        found.append(r + module.mlp(module.mlp_norm(r)))
    return torch.stack(found)


def naive_gate(gate: Any, kind: str | None, memory: Tensor, written: Tensor) -> Tensor:
    """arXiv:2203.07852, equations 2 to 7, number by number."""
    if kind is None:
        return written
    if kind == "binary":  # arXiv:1708.06834, one gate a token; its gradient is that of the probability
        both = torch.cat([written, memory], dim=1) @ gate.hidden.weight.T + gate.hidden.bias
        both = both * (1 + torch.erf(both / 2**0.5)) / 2
        p = 1 / (1 + torch.exp(-2 - gate.update.bias - both @ gate.update.weight[0]))
        rows = [new if p[m] > 0.5 else old for m, (old, new) in enumerate(zip(memory, written, strict=True))]
        return torch.stack(rows) + ((p - p.detach())[:, None] * (written - memory).detach())
    found = torch.empty_like(memory)
    for m, d in itertools.product(range(len(memory)), range(memory.shape[1])):
        old, row = memory[m, d], written[m]
        z = gate.value.weight[d] @ row + gate.value.bias[d]
        if kind == "fixed":
            g = 1 / (1 + torch.exp(-gate.bias[d]))
            found[m, d] = old * g + z * (1 - g)
        else:
            i = 1 / (1 + torch.exp(1 - gate.into.weight[d] @ row - gate.into.bias[d]))
            f = 1 / (1 + torch.exp(-1 - gate.forget.weight[d] @ row - gate.forget.bias[d]))
            found[m, d] = old * f + torch.tanh(z) * i
    return found


def naive_rmt(model: RecurrentModel, text: Tensor) -> Read:
    """arXiv:2207.06881, section 3, for one text (N,): `[M; E(x); M]` through the plain model, segment after segment."""
    lm: Any = model.backbone.lm
    body = lm.transformer if lm.config.model_type == "gpt2" else lm.model
    settings, memory, past, hidden = model.config.memory[0], model.memory.initial.weight, [], []
    num_read = settings["num_read_tokens"] or len(memory)
    for segment in text.split(T):
        read = memory[-num_read:]
        if num_read > len(memory):
            read = torch.cat([read, model.memory.extra.weight])
        if kept := settings["max_past_memories"]:
            read = torch.cat([read, naive_retrieval(model.memory.retrieval, read, [*past[-kept:], memory])])
        rows = torch.cat([read, lm.get_input_embeddings()(segment), memory])
        seen = sees(len(read), len(segment), len(memory), settings["bidirectional"])
        h = body(inputs_embeds=rows[None], attention_mask=seen[None, None], use_cache=False).last_hidden_state[0]
        hidden.append(h[len(read) : len(read) + len(segment)])
        past.append(memory)
        memory = naive_gate(model.memory.gate, settings["gate"], memory, h[len(h) - len(memory) :])
    return Read(torch.cat(hidden), memory, past)


def compare(model: RecurrentModel, tokens: Tensor, lengths: list[int] | None) -> None:
    """Outputs, state and the gradient of random weights on all of them."""
    torch.manual_seed(5)
    out, state = rmt_core.run(model, tokens, lengths=None if lengths is None else torch.tensor(lengths))
    ours, theirs, kept = torch.zeros(()), torch.zeros(()), model.config.memory[0]["max_past_memories"]
    for i, length in enumerate([tokens.shape[1]] * len(tokens) if lengths is None else lengths):
        wanted = naive_rmt(model, tokens[i, :length])
        pairs = [(out.hidden[i, :length], wanted.hidden), ((state["memory"] if kept else state)[i], wanted.memory)]
        if kept:
            count, past = int(state["count"][i]), wanted.past[-kept:]
            assert count == len(past)
            assert not state["past"][i, count:].any()
            pairs += list(zip(state["past"][i, :count], past, strict=True))
        for found, known in pairs:
            assert close(found, known)
            weight = torch.randn_like(known)
            ours, theirs = ours + (found * weight).sum(), theirs + (known * weight).sum()
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    # Gemma's norms sum the gradient of their weights in float32, here in another order: 2e-7 was measured.
    tolerance = 1e-6 if model.backbone.lm.config.model_type == "gemma3_text" else 1e-11
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=tolerance * (1 + float(b.abs().max()))) for a, b in pairs)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_segments_follow_the_equations(family: str, num_tokens: int) -> None:
    compare(tiny_model({"kind": "rmt", "num_tokens": num_tokens}, family, T), tokens_like(2, 3 * T), None)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_short_last_segment_follows_the_equations(family: str) -> None:
    compare(tiny_model({"kind": "rmt", "num_tokens": 3}, family, T), tokens_like(2, 2 * T + 2), None)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("num_tokens", [1, 4, 8])
def test_ragged_rows_follow_the_equations(family: str, num_tokens: int) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": num_tokens}, family, T)
    compare(model, tokens_like(5, 3 * T), [3 * T, 2 * T + 1, 2 * T, T - 1, 1])


OPEN = {"bidirectional": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "open": OPEN,
    "open, fewer read": {**OPEN, "num_read_tokens": 2},
    "more read": {"num_read_tokens": 5},
    "fewer read": {"num_read_tokens": 1},
    "retrieval": {"max_past_memories": 2},
    "retrieval, longer than the text": {"max_past_memories": 9},
    "fixed gate": {"gate": "fixed"},
    "lstm gate": {"gate": "lstm", "num_read_tokens": 2},
    "binary gate": {"gate": "binary"},
    "all": {**OPEN, "num_read_tokens": 4, "max_past_memories": 1, "gate": "lstm"},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_follow_the_equations(options: dict[str, Any], family: str) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3, **options}, family, T)
    compare(model, tokens_like(2, 3 * T), None)
    compare(model, tokens_like(4, 4 * T), [4 * T, 2 * T + 1, T, 2])


def test_in_a_composition_the_open_blocks_see_the_cache() -> None:
    """The rows that the opened blocks may attend to, found by which inputs move which outputs of one layer."""
    cached, m = 4, 3
    model = tiny_model([{"kind": "xl", "cache_len": cached}, {"kind": "rmt", "num_tokens": m, **OPEN}], segment_len=T)
    torch.manual_seed(0)
    state = model.init_state(2)
    _, state = model.step(tokens_like(2, T), state, lengths=torch.tensor([T, 2]))  # caches of 4 and of 2 rows
    segment = Segment(T, torch.tensor([T, T - 2]), m)
    h = torch.randn(2, m + T + m, 32, dtype=torch.float64, requires_grad=True)
    rows = state[0][0]["rows"].requires_grad_()
    block = model.backbone.blocks(h, Placement(torch.arange(m + T + m + cached)[None]))[0]
    out, _ = model.memory.around(0, h, block, state, segment)
    for row, (length, filled) in enumerate([(T, 4), (T - 2, 2)]):
        wanted = sees(m, length, m, True)
        for i in range(len(wanted)):
            on_h, on_rows = torch.autograd.grad(out[row, i].sum(), [h, rows], retain_graph=True)
            assert (on_h.abs().amax(-1) > 0)[row].tolist() == [*wanted[i].tolist(), *[False] * (T - length)]
            assert (on_rows.abs().amax(-1) > 0)[row].tolist() == [j < filled for j in range(cached)]


def test_equal_rows_get_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open blocks cost two more calls a layer; only ragged rows need a mask, of keys alone."""
    model, shapes = tiny_model({"kind": "rmt", "num_tokens": 3, **OPEN}, segment_len=T), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        shapes.append(None if attn_mask is None else attn_mask.shape[2])
        return attention(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model.step(tokens_like(2, T), model.init_state(2))
    assert shapes == [None] * 6
    shapes.clear()
    model.step(tokens_like(2, T), model.init_state(2), lengths=torch.tensor([T, 2]))
    assert shapes == [None, None, 1] * 2


def test_the_state_starts_as_the_learned_tokens() -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3})
    state = model.init_state(4)
    assert torch.equal(state, model.memory.initial.weight.expand(4, -1, -1))
    rows = model.memory.initial.weight
    assert not close(rows[0], rows[1])


@pytest.mark.parametrize("options", [{}, {"num_read_tokens": 2}, {"max_past_memories": 2}])
def test_noise_stands_on_the_memory_that_a_training_segment_reads_and_continues(options: dict[str, int]) -> None:
    plain = tiny_model({"kind": "rmt", "num_tokens": 3, **options}, segment_len=T)
    noisy = tiny_model({"kind": "rmt", "num_tokens": 3, "noise": 0.5, **options}, segment_len=T)
    tokens, lengths = tokens_like(2, T), torch.tensor([T, 2])
    _, state = plain.step(tokens_like(2, T, seed=5), plain.init_state(2))
    memory = state["memory"] if options.get("max_past_memories") else state
    torch.manual_seed(8)
    rms = (memory**2).mean(-1, keepdim=True) ** 0.5
    disturbed = memory + 0.5 * rms * torch.randn_like(memory)
    wanted, wanted_state = plain.step(
        tokens, {**state, "memory": disturbed} if isinstance(state, dict) else disturbed, lengths
    )
    torch.manual_seed(8)
    found, found_state = noisy.train().step(tokens, state, lengths)
    assert close(found.hidden, wanted.hidden)
    if isinstance(state, dict):  # what is remembered is what was carried
        assert close(found_state["memory"], wanted_state["memory"])
        assert torch.equal(found_state["past"][:, 1], memory)
    else:
        assert close(found_state, wanted_state)
    quiet, _ = noisy.eval().step(tokens, state, lengths)
    assert torch.equal(quiet.hidden, plain.step(tokens, state, lengths)[0].hidden)
    assert not close(found.hidden, quiet.hidden)


def test_a_gate_keeps_of_the_memory_without_noise() -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3, "noise": 0.5, "gate": "lstm"}, segment_len=T)
    tokens = tokens_like(2, T)
    _, state = model.step(tokens_like(2, T, seed=5), model.init_state(2))
    given: list[Tensor] = []
    model.memory.gate.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    model.step(tokens, state)
    model.train().step(tokens, state)
    quiet_memory, quiet_written, memory, written = given
    assert torch.equal(quiet_memory, state)
    assert torch.equal(memory, state)
    assert not close(written, quiet_written)


def binary_model(probability: float, **settings: Any) -> RecurrentModel:
    """One whose gate writes with this probability, whatever the text."""
    model = tiny_model({"kind": "rmt", "num_tokens": 3, "gate": "binary", **settings}, segment_len=T)
    with torch.no_grad():
        model.memory.gate.update.weight.zero_()
        model.memory.gate.update.bias.fill_(math.log(probability / (1 - probability)) - 2)
    return model


def test_a_binary_gate_writes_a_token_or_leaves_it_as_it_is() -> None:
    tokens = tokens_like(2, 5 * T)
    shut, open_ = binary_model(0.49), binary_model(0.51)
    _, first = shut.step(tokens[:, :T], shut.init_state(2))
    assert torch.equal(rmt_core.run(shut, tokens, first)[1], first)
    plain = tiny_model({"kind": "rmt", "num_tokens": 3}, segment_len=T)
    plain.load_state_dict({name: value for name, value in open_.state_dict().items() if "memory.gate" not in name})
    assert close(rmt_core.run(open_, tokens)[1], rmt_core.run(plain, tokens)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("threshold", "below", "above"), [(0.2, 0.19, 0.21), (0.9, 0.88, 0.92), (0.9999, 0.999, 0.99999)]
)
def test_in_evaluation_a_binary_gate_writes_above_the_threshold(
    threshold: float, below: float, above: float, dtype: torch.dtype
) -> None:
    """In half precision too, where 0.999 and 0.99999 are the same number."""
    for probability, is_written in [(below, False), (above, True)]:
        model = binary_model(probability, write_threshold=threshold).to(dtype)
        before = model.init_state(2)
        _, after = model.step(tokens_like(2, T), before)
        assert torch.equal((after != before).any(-1), torch.full((2, 3), is_written))
    trained = [binary_model(0.7, write_threshold=value).train() for value in (None, threshold)]
    states = []
    for model in trained:
        torch.manual_seed(3)
        states.append(model.step(tokens_like(1, T).expand(50, -1), model.init_state(50))[1])
    assert torch.equal(states[0], states[1])  # in training it is drawn as ever


@pytest.mark.parametrize(("floor", "wanted"), [(0.0, 0.2), (0.5, 0.6)])
def test_in_training_a_binary_gate_is_drawn(floor: float, wanted: float) -> None:
    model = binary_model(0.2, write_floor=floor).train()
    before = model.init_state(2000)
    torch.manual_seed(3)
    _, after = model.step(tokens_like(1, T).expand(2000, -1), before)
    changed = (after != before).all(-1)
    assert torch.equal(changed, (after != before).any(-1))  # a token is written as a whole
    assert (changed.double().mean(0) - wanted).abs().max() < 0.05  # each of three, 2,000 rows: 4 deviations or more
    assert torch.equal(changed.any(1), changed.all(1))  # tokens are drawn together, rows apart
    again = model.step(tokens_like(1, T).expand(2000, -1), before)[1]
    assert not torch.equal(again, after)


@pytest.mark.parametrize("training", [False, True])
def test_writing_costs(training: bool) -> None:
    model = binary_model(0.25, write_cost=0.4).train(training)
    tokens = tokens_like(2, 3 * T)
    aux = rmt_core.run(model, tokens)[0].aux
    assert close(aux, torch.tensor(0.1, dtype=torch.float64))
    grad = torch.autograd.grad(aux, model.memory.gate.update.bias)[0]
    assert close(grad, torch.tensor([0.4 * 0.25 * 0.75], dtype=torch.float64))
    assert rmt_core.run(binary_model(0.25).train(training), tokens)[0].aux == 0


@pytest.mark.parametrize("gate", ["fixed", "lstm", "binary"])
def test_a_row_costs_the_same_in_every_batch(gate: str) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3, "gate": gate, "write_cost": 2.0}, segment_len=T)
    tokens, lengths = tokens_like(3, 3 * T), [3 * T, T + 2, 2 * T]
    together = rmt_core.run(model, tokens, lengths=torch.tensor(lengths))[0].aux
    costs = []
    for row, length in enumerate(lengths):
        alone = rmt_core.run(model, tokens[row : row + 1, :length])[0].aux  # the mean over the row's own segments
        costs.append(alone * math.ceil(length / T) / 3)
    assert close(together, torch.stack(costs).mean())


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_other_gates_cost_by_what_they_let_in(gate: str) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3, "gate": gate, "write_cost": 2.0}, segment_len=T)
    _, state = model.step(tokens_like(2, T), model.init_state(2))
    seen: list[Tensor] = []
    model.memory.gate.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    out, _ = model.step(tokens_like(2, T, seed=4), state)
    module: Any = model.memory.gate
    share = 1 - torch.sigmoid(module.bias) if gate == "fixed" else torch.sigmoid(module.into(seen[1]) - 1)
    assert close(out.aux, 2 * share.mean())


@pytest.mark.parametrize("drawn", [{"noise": 0.5}, {"gate": "binary", "write_floor": 0.3, "write_cost": 0.5}])
@pytest.mark.parametrize("mode", ["checkpoint", "replay"])
def test_what_is_drawn_is_drawn_again_where_a_segment_is_computed_again(mode: str, drawn: dict[str, Any]) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 3, **drawn}, segment_len=T).train()
    tokens = tokens_like(2, 3 * T)
    found = {}
    for way in ("full", mode):
        model.zero_grad()
        torch.manual_seed(8)
        loss = rmt_core.backward(model, tokens, next_labels(tokens), mode=way)
        found[way] = loss, gradients(model)
    assert close(found[mode][0], found["full"][0])
    assert all(close(found[mode][1][name], grad) for name, grad in found["full"][1].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": -0.1}, r"memory\.noise is -0\.1; it must be at least 0"),
        ({"noise": float("nan")}, r"memory\.noise is nan; it must be at least 0"),
        ({"num_tokens": -1}, r"memory\.num_tokens is -1; it must be at least 0"),
        ({"num_tokens": 2.0}, r"memory\.num_tokens is 2\.0; it must be a whole number"),
        ({"num_tokens": True}, r"memory\.num_tokens is True; it must be a whole number"),
        ({"num_tokens": "3"}, r"memory\.num_tokens is '3'; it must be a whole number"),
        ({"num_read_tokens": 0}, r"memory\.num_read_tokens is 0; it must be a whole number, at least 1, or None"),
        ({"num_read_tokens": True}, r"memory\.num_read_tokens is True; it must be a whole number"),
        (
            {"num_tokens": 0, "num_read_tokens": 2},
            r"memory\.num_tokens is 0; it must be at least 1 where rows are read",
        ),
        ({"gate": "gru"}, r"memory\.gate is 'gru'; it must be one of fixed, lstm, binary, or None"),
        ({"write_cost": 0.1}, r"memory\.write_cost is 0\.1; it must be 0 where there is no gate"),
        ({"gate": "binary", "write_cost": -0.1}, r"memory\.write_cost is -0\.1; it must be at least 0"),
        ({"gate": "binary", "write_floor": 1.0}, r"memory\.write_floor is 1\.0; it must be at least 0 and below 1"),
        ({"gate": "binary", "write_floor": float("nan")}, r"memory\.write_floor is nan; it must be at least 0"),
        (
            {"gate": "lstm", "write_floor": 0.1},
            r"memory\.write_floor is 0\.1; it must be 0 where the gate is not binary",
        ),
        (
            {"gate": "binary", "write_threshold": 1.0},
            r"memory\.write_threshold is 1\.0; it must be above 0 and below 1",
        ),
        ({"gate": "binary", "write_threshold": "a"}, r"memory\.write_threshold is 'a'; it must be a number, or None"),
        ({"gate": "binary", "write_threshold": True}, r"memory\.write_threshold is True; it must be a number, or None"),
        ({"gate": "binary", "write_threshold": 0}, r"memory\.write_threshold is 0; it must be above 0 and below 1"),
        ({"gate": "binary", "write_threshold": float("nan")}, r"memory\.write_threshold is nan; it must be above 0"),
        (
            {"gate": "fixed", "write_threshold": 0.9},
            r"memory\.write_threshold is 0\.9; it must be None where the gate is not binary",
        ),
        (
            {"num_tokens": 0, "gate": "lstm"},
            r"memory\.num_tokens is 0; it must be at least 1 where rows are read, retrieved or gated",
        ),
        ({"num_tokens": 0, "max_past_memories": 2}, r"memory\.num_tokens is 0; it must be at least 1 where rows"),
        ({"max_past_memories": -2}, r"memory\.max_past_memories is -2; it must be at least 0"),
        ({"bidirectional": 1}, r"memory\.bidirectional is 1; it must be true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model({"kind": "rmt", **settings})


@pytest.mark.parametrize("gate", ["fixed", "lstm", "binary"])
def test_gates_keep_the_states_type_under_autocast(gate: str) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 2, "gate": gate}, segment_len=T).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = rmt_core.run(model, tokens_like(2, 3 * T))
    assert state.dtype == torch.float32
