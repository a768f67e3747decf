"""Memformer's encoder-decoder form, against the Hugging Face models' own forward pass with slots read and written.

Axes: B rows, N tokens of a text, T tokens of a source, U tokens of a target, K slots, D width.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutput

import rmt_core
from rmt_core import Seq2SeqBatch, Seq2SeqModel
from rmt_core.state import leaves, select

from .test_memformer import naive_read, naive_write
from .tiny import MEMFORMER, VOCAB, XL, close, close_states, gradients, same_states, stir, tokens_like

T, U = 6, 5
FAMILIES = ("t5", "t5-gated", "mt5", "bart")


def tiny_config(family: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 32, "decoder_start_token_id": 3, "pad_token_id": 1}
    if family == "bart":
        settings |= {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        settings |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
        settings |= {"dropout": 0.0, "scale_embedding": True, "bos_token_id": 0, "eos_token_id": 2}
    else:
        settings |= {"num_layers": 2, "num_decoder_layers": 1, "d_kv": 16, "d_ff": 48, "num_heads": 4}
        settings |= {"dropout_rate": 0.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
    if family == "t5-gated":
        settings |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return AutoConfig.for_model(family.split("-")[0], **settings | changes)


def tiny(
    family: str = "t5", memory: Any = MEMFORMER, segment_len: int = T, dtype: str = "float64", **changes: Any
) -> Seq2SeqModel:
    """A float64 model in evaluation mode; the same each time."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    model = rmt_core.build_seq2seq(backbone=config, memory=memory, segment_len=segment_len, dtype=dtype)
    stir(model)
    if family == "bart":
        model.backbone.lm.final_logits_bias.normal_()
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Seq2SeqModel:
    return tiny(family)


def after(model: Seq2SeqModel, num_rows: int) -> Tensor:
    """A state that has read a source in each row."""
    return model.encode(tokens_like(num_rows, T, seed=7), model.init_state(num_rows))[1]


def shifted(model: Seq2SeqModel, targets: Tensor) -> Tensor:
    return torch.cat([torch.full_like(targets[:, :1], model.backbone.start_token), targets[:, :-1]], dim=1)


# The equations


def naive_step(model: Seq2SeqModel, source: Tensor, targets: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (U, V) and slots (K, D) after one source (T,) and target (U,), by the Hugging Face model's forward."""
    lm, memory = model.backbone.lm, model.memory
    is_bart = hasattr(lm, "model")
    layers = lm.model.encoder.layers if is_bart else lm.encoder.block
    with ExitStack() as stack:
        for layer, reader in zip(layers, memory.readers, strict=True):
            place = layer.self_attn_layer_norm if is_bart else layer.layer[0]  # gives what stands after attention

            def read(_: nn.Module, __: Any, out: Any, reader: Any = reader) -> Any:
                h = out if is_bart else out[0]
                h = h + naive_read(reader, h[0], slots, memory.config.num_heads)[None]
                return h if is_bart else (h, *out[1:])

            stack.callback(place.register_forward_hook(read).remove)
        out = lm(input_ids=source[None], decoder_input_ids=shifted(model, targets[None]), use_cache=False)
    return out.logits[0], naive_write(memory, out.encoder_last_hidden_state[0], slots)


def test_ragged_rows_follow_the_equations(model: Seq2SeqModel) -> None:
    """Three sources and targets of rows of any length: logits, slots, and the gradient of random weights on both."""
    lengths = [[T, T, 4], [T, 3, 0], [2, 1, T], [0, T, 1]]
    torch.manual_seed(5)
    state, outs = model.init_state(4), []
    for i in range(3):
        given = torch.tensor([row[i] for row in lengths])
        out, state = model.step(tokens_like(4, T, seed=i), tokens_like(4, U, seed=10 + i), state, lengths=given)
        outs.append(out)
    ours, theirs = torch.zeros(()), torch.zeros(())
    for row, sizes in enumerate(lengths):
        bias = model.memory.bias.weight
        slots = bias / bias.square().sum(-1, keepdim=True).sqrt()
        for i, size in enumerate(sizes):
            assert bool(outs[i].logits.isfinite().all())
            if not size:
                continue
            source, targets = tokens_like(4, T, seed=i)[row, :size], tokens_like(4, U, seed=10 + i)[row]
            logits, slots = naive_step(model, source, targets, slots)
            assert close(outs[i].logits[row], logits, atol=1e-9)
            weight = torch.randn_like(logits)
            ours, theirs = ours + (outs[i].logits[row] * weight).sum(), theirs + (logits * weight).sum()
        assert close(state[row], slots)
        weight = torch.randn_like(slots)
        ours, theirs = ours + (state[row] * weight).sum(), theirs + (slots * weight).sum()
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b, atol=1e-9 * (1 + float(b.abs().max()))) for a, b in pairs)


@pytest.mark.parametrize("memory", ["none", {"kind": "memformer", "num_slots": 0}])
def test_without_memory_it_is_the_hugging_face_model(family: str, memory: Any) -> None:
    """Logits, and the loss over given targets, some of which are not asked for."""
    model = tiny(family, memory)
    source, targets, lengths = tokens_like(3, T), tokens_like(3, U, seed=2), torch.tensor([T, 2, 4])
    labels = targets.clone()
    labels[0, 3:], labels[2, 1] = -100, -100
    mask = (torch.arange(T) < lengths[:, None]).long()
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": shifted(model, targets)}
    theirs = model.backbone.lm(**inputs, labels=labels)
    out, _ = model.step(source, targets, model.init_state(3), lengths=lengths)
    assert close(out.logits, theirs.logits, atol=1e-10)
    batch = Seq2SeqBatch(source, targets, labels, lengths)
    assert close(model.unroll([batch], model.init_state(3)).loss, theirs.loss)


def test_training_draws_what_the_hugging_face_model_draws(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout is where it is there, in the same order."""
    # Some versions draw whether to leave out an encoder layer even where the chance is none.
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.ones(*shape))
    dropout = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.1}
    model = tiny(family, "none", **(dropout if family == "bart" else {"dropout_rate": 0.2})).train()
    source, targets = tokens_like(3, T), tokens_like(3, U, seed=2)
    torch.manual_seed(3)
    theirs = model.backbone.lm(input_ids=source, decoder_input_ids=shifted(model, targets)).logits
    torch.manual_seed(3)
    assert close(model.step(source, targets, model.init_state(3))[0].logits, theirs)


# The state and its rows


def test_a_target_sees_only_the_targets_before_it_and_all_of_the_source(model: Seq2SeqModel) -> None:
    source, targets, state = tokens_like(2, T), tokens_like(2, U, seed=2), after(model, 2)
    out, new = model.step(source, targets, state)
    for j in range(U):
        other = targets.clone()
        other[0, j] = (other[0, j] + 1) % VOCAB
        found, found_new = model.step(source, other, state)
        same = (found.hidden - out.hidden).abs().amax(-1) < 1e-12
        assert same[1].all()
        assert same[0, : j + 1].all()
        assert not same[0, j + 1 :].any()
        assert same_states(found_new, new)  # what is decoded writes nothing
    for j in range(T):
        other = source.clone()
        other[0, j] = (other[0, j] + 1) % VOCAB
        found, found_new = model.step(other, targets, state)
        same = (found.hidden - out.hidden).abs().amax(-1) < 1e-12
        assert same[1].all()
        assert not same[0].any()
        assert not close(found_new[0], new[0])
        assert close(found_new[1], new[1], atol=1e-12)


def test_the_past_is_felt_through_the_memory_only(model: Seq2SeqModel) -> None:
    source, targets = tokens_like(1, T), tokens_like(1, U, seed=2)
    outs = [model.step(source, targets, state)[0].hidden for state in (model.init_state(1), after(model, 1))]
    assert (outs[0] - outs[1]).abs().amax(-1).min() > 1e-6


def test_padding_touches_nothing(model: Seq2SeqModel) -> None:
    source, targets, lengths = tokens_like(3, T), tokens_like(3, U, seed=2), torch.tensor([T, 2, 4])
    out, new = model.step(source, targets, after(model, 3), lengths=lengths)
    other = source.where(torch.arange(T) < lengths[:, None], VOCAB - 1)
    found, found_new = model.step(other, targets, after(model, 3), lengths=lengths)
    assert close(found.hidden, out.hidden, atol=1e-12)
    assert close_states(found_new, new, atol=1e-12)


def test_rows_are_reset_kept_and_passed_over() -> None:
    model = tiny()
    source, targets, state = tokens_like(4, T), tokens_like(4, U, seed=2), after(model, 4)
    lengths, reset = torch.tensor([T, 0, T, 3]), torch.tensor([True, True, True, False])
    active = torch.tensor([True, True, False, True])
    out, new = model.step(source, targets, state, lengths=lengths, reset=reset, active=active)
    fresh, fresh_new = model.step(source, targets, model.init_state(4), lengths=lengths)
    plain, plain_new = model.step(source, targets, state, lengths=lengths)
    assert close(out.hidden[[0, 2]], fresh.hidden[[0, 2]])
    assert close(out.hidden[3], plain.hidden[3])
    assert close(new[0], fresh_new[0])
    assert close(new[1], model.init_state(1)[0])
    assert torch.equal(new[2], state[2])
    assert close(new[3], plain_new[3])


def test_a_state_survives_bytes_and_rows_form_batches() -> None:
    model = tiny()
    state = after(model, 3)
    again = rmt_core.state.from_bytes(rmt_core.state.to_bytes(state, "model"), "model")
    source, targets = tokens_like(3, T), tokens_like(3, U, seed=2)
    out, new = model.step(source, targets, again)
    for i in range(3):
        alone, alone_new = model.step(source[i : i + 1], targets[i : i + 1], select(state, [i]))
        assert close(alone.logits[0], out.logits[i])
        assert close_states(alone_new, select(new, [i]))


# The loss over texts


def test_each_segment_is_predicted_from_the_one_before_and_the_memory(model: Seq2SeqModel) -> None:
    tokens, lengths = tokens_like(3, 3 * T - 2), torch.tensor([3 * T - 2, T + 1, T])
    total, count = torch.zeros(()), 0
    for row, length in enumerate(lengths.tolist()):
        state, source = model.init_state(1), torch.full((1, 1), model.backbone.start_token)
        for part in tokens[row : row + 1, :length].split(T, 1):
            out, state = model.step(source, part, state)
            total, count = total + F.cross_entropy(out.logits[0], part[0], reduction="sum"), count + part.shape[1]
            source = part
    assert close(model(tokens, lengths=lengths), total / count)


def test_labels_choose_what_is_asked() -> None:
    model, tokens = tiny(), tokens_like(2, 2 * T)
    labels = torch.full_like(tokens, -100)
    labels[0, T + 2] = tokens[0, T + 2]
    parts = model.continuations(tokens, labels)
    result = model.unroll(parts, model.init_state(2))
    _, state = model.encode(parts[0].tokens, model.init_state(2))
    out, _ = model.step(tokens[:, :T], tokens[:, T:], state)
    assert close(model(tokens, labels), F.cross_entropy(out.logits[0, 2], tokens[0, T + 2]))
    assert float(result.weight) == 1
    assert [nats.shape for nats in result.nats] == [(2, T), (2, T)]


def test_sources_are_read_before_a_target_is_given() -> None:
    """A document of three segments and one target, as in summaries."""
    model, tokens, targets = tiny(), tokens_like(2, 3 * T), tokens_like(2, U, seed=2)
    nothing = targets[:, :0]
    segments = [Seq2SeqBatch(part, nothing, nothing) for part in tokens.split(T, 1)]
    segments[-1] = segments[-1]._replace(targets=targets, labels=targets)
    state = model.init_state(2)
    for part in tokens.split(T, 1):
        out, state = model.step(part, targets, state)
    result = model.unroll(segments, model.init_state(2))
    assert close(result.loss, F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()))
    assert close_states(result.state, state)


def test_checkpointing_gives_the_gradient_of_everything_kept(model: Seq2SeqModel) -> None:
    tokens, lengths = tokens_like(2, 3 * T), torch.tensor([3 * T, 2 * T + 1])
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        model(tokens, lengths=lengths, checkpointed=checkpointed).backward()
        found.append(gradients(model))
    assert all(close(found[0][name], found[1][name]) for name in found[0])


def test_segments_computed_again_draw_the_same() -> None:
    """The decoder drops out too, so its random numbers must be drawn where only the state is wanted."""
    model = tiny("bart", dropout=0.2, attention_dropout=0.1).train()
    segments = model.continuations(tokens_like(2, 3 * T))
    found = []
    for how in ({"mode": "full"}, {"mode": "replay"}, {"mode": "truncated", "bptt_segments": 3, "exact_depth": True}):
        model.zero_grad()
        torch.manual_seed(1)
        result = rmt_core.backward_segments(model, segments, model.init_state(2), **how)
        found.append({**gradients(model), "loss": result.loss, "random": torch.get_rng_state()})
    for other in found[1:]:
        assert all(close(found[0][name], other[name]) for name in found[0])


def test_truncation_stops_the_gradient() -> None:
    model, tokens = tiny(), tokens_like(2, 3 * T)
    writer = model.memory.writer
    reach = {}
    for horizon in (1, 2, 3):
        model.zero_grad()
        model(tokens, bptt_segments=horizon).backward()
        reach[horizon] = None if writer.value.weight.grad is None else writer.value.weight.grad.clone()
    assert reach[1] is None or not reach[1].any()
    assert reach[2].any()
    assert not close(reach[2], reach[3])


def test_all_parameters_learn_from_the_first_step(family: str) -> None:
    torch.manual_seed(0)
    model = rmt_core.build_seq2seq(backbone=tiny_config(family), memory=MEMFORMER, segment_len=T, dtype="float64")
    model(tokens_like(2, 3 * T)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# Writing


def test_transformers_writes_from_an_encoding(model: Seq2SeqModel) -> None:
    """Greedy search by `generate` is the teacher-forced argmax, over sources of different lengths."""
    lengths = torch.tensor([T, 3])
    encoded, _ = model.encode(tokens_like(2, T), after(model, 2), lengths=lengths)
    written = model.backbone.lm.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
        attention_mask=(torch.arange(T) < lengths[:, None]).long(),
        decoder_start_token_id=model.backbone.start_token,
        max_new_tokens=U,
        eos_token_id=None,
        forced_eos_token_id=None,
        do_sample=False,
    )[:, 1:]
    assert written.shape == (2, U)
    assert torch.equal(model.decode(encoded, written).logits.argmax(-1), written)


# Directories and borders


def test_a_saved_model_is_loaded_again(model: Seq2SeqModel, tmp_path: Path) -> None:
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load_seq2seq(tmp_path / "model")
    assert not again.training
    assert rmt_core.fingerprint(again) == rmt_core.fingerprint(model)
    source, targets = tokens_like(2, T), tokens_like(2, U, seed=2)
    for a, b in zip(
        model.step(source, targets, after(model, 2)), again.step(source, targets, after(again, 2)), strict=True
    ):
        assert torch.equal(a.logits, b.logits) if isinstance(a, rmt_core.Output) else same_states(a, b)


def test_a_backbone_comes_from_a_directory(family: str, tmp_path: Path) -> None:
    lm = tiny(family, "none").backbone.lm
    lm.save_pretrained(tmp_path)
    model = rmt_core.build_seq2seq(backbone=tmp_path, memory="none", segment_len=T, dtype="float64")
    source, targets = tokens_like(2, T), tokens_like(2, U, seed=2)
    theirs = lm(input_ids=source, decoder_input_ids=shifted(model, targets)).logits
    assert close(model.step(source, targets, model.init_state(2))[0].logits, theirs)


def test_each_form_has_its_loader(tmp_path: Path) -> None:
    rmt_core.save(tmp_path / "model", tiny())
    with pytest.raises(ValueError, match=r"has format 'rmt-seq2seq-1'; .*use rmt_core\.load_seq2seq"):
        rmt_core.load(tmp_path / "model")
    with pytest.raises(ValueError, match="backbone 't5' is not supported; supported are .*llama"):
        rmt_core.build(backbone=tiny_config("t5").to_dict(), segment_len=T)
    with pytest.raises(ValueError, match="backbone 'llama' is not supported; supported are bart, mt5, t5"):
        rmt_core.build_seq2seq(backbone={"model_type": "llama"}, segment_len=T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": XL}, "an encoder-decoder has no memory 'xl'; it takes one of: none, memformer"),
        ({"memory": [XL, MEMFORMER]}, "an encoder-decoder has no memory 'xl with memformer'"),
        ({"dtype": "float8"}, "dtype is 'float8'; allowed: float32"),
        ({"segment_len": 0}, "segment_len is 0; it must be a whole number of tokens, at least 1"),
        ({"family": "bart", "segment_len": 41}, "segment_len 41 exceeds the backbone's 40 positions"),
        ({"family": "bart", "encoder_layerdrop": 0.1}, r"leaves out layers at random \(encoder_layerdrop is 0.1"),
        ({"decoder_start_token_id": None}, "set decoder_start_token_id"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_shapes_that_are_no_segment_are_refused() -> None:
    model = tiny("bart")
    state = model.init_state(2)
    with pytest.raises(ValueError, match=rf"source is \(2, 7\); a step takes \(rows, 1 to {T} tokens\)"):
        model.step(tokens_like(2, T + 1), tokens_like(2, U), state)
    for size in (0, 41):
        with pytest.raises(ValueError, match=rf"targets are \(2, {size}\); a step takes \(rows, 1 to 40 tokens\)"):
            model.step(tokens_like(2, T), tokens_like(2, size), state)
    with pytest.raises(ValueError, match=r"tokens \(2, 6\) and labels \(2, 5\) must be equal"):
        model(tokens_like(2, 6), tokens_like(2, 5))
    assert leaves(state)[0].shape == (2, 3, 32)
