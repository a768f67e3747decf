"""The encoder form against its equations, with the Hugging Face classifier as the backbone, and its contract.

Axes: B rows, N tokens of a document, T tokens of a segment, M memory tokens, D width, L labels.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

import rmt_core
from rmt_core import EncoderModel
from rmt_core.state import from_bytes, leaves, select, to_bytes

from .tiny import close, close_states, gradients, same_states, tiny_config
from .tiny_encoder import CLS, FAMILIES, SEP, VOCAB, documents, text, tiny_encoder, tiny_encoder_config

T = 6
RMT = {"kind": "rmt", "num_tokens": 3}
LENGTHS = (3 * T + 2, T, 1, 2 * T, T + 1)


class Read(NamedTuple):
    """What the naive reference finds for one document."""

    logits: list[Tensor]  # (L,) of each segment
    memory: Tensor  # (M, D) after the last segment


def naive(model: EncoderModel, document: Tensor, alignment: str) -> Read:
    """arXiv:2304.11062, section 2, for one document (N,): `[CLS] mem [SEP] x [SEP]` through the plain classifier."""
    lm: Any = model.backbone.lm
    words = lm.get_input_embeddings()
    cls, sep = words(torch.tensor([CLS])), words(torch.tensor([SEP]))
    pieces = [document[start : start + T] for start in range(0, len(document), T)]
    if alignment == "right":
        pieces = [document[max(0, end - T) : end] for end in range(len(document), 0, -T)][::-1]
    memory, logits = model.memory.initial.weight, []
    for piece in pieces:
        rows = torch.cat([cls, memory, sep, words(piece), sep])
        out = lm(inputs_embeds=rows[None], output_hidden_states=True)
        logits.append(out.logits[0])
        memory = out.hidden_states[-1][0, 1 : 1 + len(memory)]
    return Read(logits, memory)


@pytest.mark.parametrize("loss", ["last", "mean"])
@pytest.mark.parametrize("alignment", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_follow_the_equations(family: str, alignment: str, loss: str) -> None:
    """Logits, states, losses and gradients."""
    model = tiny_encoder(RMT, family, T, alignment=alignment, loss=loss)
    given, labels = documents(*LENGTHS), torch.tensor([0, 2, 1, 1, 0])
    read = model.read(given)
    nats = []
    for i, document in enumerate(given):
        wanted = naive(model, document, alignment)
        assert read.active[i].tolist() == [k >= 4 - len(wanted.logits) for k in range(4)]
        assert close(read.logits_by_segment[i, 4 - len(wanted.logits) :], torch.stack(wanted.logits))
        assert close(read.logits[i], wanted.logits[-1])
        assert close(read.state[i], wanted.memory)
        each = torch.stack([F.cross_entropy(logits, labels[i]) for logits in wanted.logits])
        nats.append(each[-1] if loss == "last" else each.mean())
    ours, theirs = model(given, labels), torch.stack(nats).mean()
    assert close(ours, theirs)
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    assert all(close(a, b) for a, b in pairs)


@pytest.mark.parametrize("memory", ["none", {"kind": "rmt", "num_tokens": 0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_memory_one_segment_is_the_plain_classifier(family: str, memory: Any) -> None:
    """Rows of different lengths, padded as Hugging Face does it."""
    model, tokens, lengths = tiny_encoder(memory, family, 9), text(3, 9), [9, 4, 1]
    out, state = model.step(tokens, model.init_state(3), torch.tensor(lengths))
    assert sum(leaf.numel() for leaf in leaves(state)) == 0
    pad = model.backbone.lm.config.pad_token_id
    padded, mask = torch.full((3, 11), pad), torch.zeros(3, 11, dtype=torch.long)
    for i, length in enumerate(lengths):
        padded[i, : length + 2] = torch.tensor([CLS, *tokens[i, :length].tolist(), SEP])
        mask[i, : length + 2] = 1
    whole = model.backbone.lm(input_ids=padded, attention_mask=mask, output_hidden_states=True)
    assert close(out.logits, whole.logits)
    for i, length in enumerate(lengths):
        assert close(out.hidden[i, :length], whole.hidden_states[-1][i, 1 : length + 1])
        assert close(out.first[i], whole.hidden_states[-1][i, 0])


# The contract


@pytest.fixture(params=["none", "rmt"])
def model(request: pytest.FixtureRequest) -> EncoderModel:
    return tiny_encoder(RMT if request.param == "rmt" else "none", segment_len=T)


def after(model: EncoderModel, batch_size: int) -> Any:
    """A state that has read a segment."""
    return model.step(text(batch_size, T, seed=7), model.init_state(batch_size))[1]


def test_a_batch_of_documents_equals_each_alone(model: EncoderModel) -> None:
    given, labels = documents(*LENGTHS), torch.tensor([0, 2, 1, 1, 0])
    together = model.read(given)
    model(given, labels).backward()
    grads = gradients(model)
    model.zero_grad()
    for i, document in enumerate(given):
        alone = model.read([document])
        assert close(alone.logits[0], together.logits[i])
        assert close_states(alone.state, select(together.state, [i]))
        (model([document], labels[i : i + 1]) / len(given)).backward()
    assert all(close(grads[name], grad) for name, grad in gradients(model).items())
    assert all(grad.any() for name, grad in grads.items())


def test_documents_are_sequences_or_a_tensor(model: EncoderModel) -> None:
    tokens = text(3, 2 * T + 1)
    assert torch.equal(model.read(tokens).logits, model.read(tokens.tolist()).logits)


def test_the_past_is_felt() -> None:
    for memory in ("none", RMT):
        model, tokens = tiny_encoder(memory, segment_len=T), text(1, 3 * T)
        for at in (0, T + 2):
            other = tokens.clone()
            other[0, at] = 2 if other[0, at] > 2 else 3
            same = close(model.read(tokens).logits, model.read(other).logits)
            assert same == (memory == "none")


def test_steps_equal_reading_at_once(model: EncoderModel) -> None:
    tokens = text(2, 3 * T)
    state, read = model.init_state(2), model.read(tokens)
    for k, part in enumerate(tokens.split(T, 1)):
        out, state = model.step(part, state)
        assert torch.equal(out.logits, read.logits_by_segment[:, k])
    assert same_states(state, read.state)


def test_padding_touches_nothing(model: EncoderModel) -> None:
    tokens, lengths, state = text(3, T), torch.tensor([T, 2, 4]), after(model, 3)
    out, new = model.step(tokens, state, lengths)
    real = torch.arange(T) < lengths[:, None]
    other, other_new = model.step(tokens.masked_fill(~real, 5), state, lengths)
    assert close(out.logits, other.logits, atol=1e-12)
    assert close(out.hidden[real], other.hidden[real], atol=1e-12)
    assert close_states(new, other_new, atol=1e-12)
    for i, length in enumerate(lengths.tolist()):
        alone, alone_new = model.step(tokens[i : i + 1, :length], select(state, [i]))
        assert close(out.logits[i : i + 1], alone.logits)
        assert close_states(select(new, [i]), alone_new)


def test_rows_do_not_mix(model: EncoderModel) -> None:
    tokens, state = text(3, T), after(model, 3)
    other = tokens.clone()
    other[1] = text(T, seed=9)
    (a, new), (b, other_new) = model.step(tokens, state), model.step(other, state)
    assert torch.equal(a.logits[[0, 2]], b.logits[[0, 2]])
    assert not close(a.logits[1], b.logits[1])
    assert same_states(select(new, [0, 2]), select(other_new, [0, 2]))


def test_reset_equals_fresh_and_others_keep_their_state(model: EncoderModel) -> None:
    tokens, state = text(4, T), after(model, 4)
    lengths, reset = torch.tensor([T, 3, T, 0]), torch.tensor([True, False, False, False])
    active = torch.tensor([True, True, False, True])
    out, new = model.step(tokens, state, lengths, reset, active)
    fresh, fresh_new = model.step(tokens, model.init_state(4), lengths)
    assert torch.equal(out.logits[0], fresh.logits[0])
    assert same_states(select(new, [0]), select(fresh_new, [0]))
    assert same_states(select(new, [2, 3]), select(state, [2, 3]))
    assert not leaves(state) or not close_states(select(new, [1]), select(state, [1]))
    assert bool(out.logits.isfinite().all())


def test_the_state_is_a_value_of_one_shape() -> None:
    model, tokens = tiny_encoder(RMT, segment_len=T), text(2, T)
    state = model.init_state(2)
    for size in (T, 1, 3):
        assert state.shape == (2, 3, 32)
        again = from_bytes(to_bytes(state, "model"), "model")
        assert same_states(model.step(tokens[:, :size], again)[1], model.step(tokens[:, :size], state)[1])
        state = model.step(tokens[:, :size], state)[1]


def test_recomputed_activations_give_the_same_gradient(model: EncoderModel) -> None:
    """With dropout on."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    model.train()
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        model(documents(*LENGTHS), [0, 2, 1, 1, 0], checkpointed=checkpointed).backward()
        found.append(gradients(model))
    assert all(close(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(4)
    model.zero_grad()
    model(documents(*LENGTHS), [0, 2, 1, 1, 0]).backward()
    assert not all(close(found[0][name], grad) for name, grad in gradients(model).items())


@pytest.mark.parametrize("bptt_segments", [None, 1, 2, 3])
def test_no_gradient_crosses_the_edge_of_a_window(bptt_segments: int | None) -> None:
    model, seen = tiny_encoder(RMT, segment_len=T), []

    def record(module: object, inputs: object, output: Tensor) -> None:
        if output.shape[1] == T:  # text, not a special token
            output.retain_grad()
            seen.append(output)

    model.backbone.lm.get_input_embeddings().register_forward_hook(record)
    model(text(2, 4 * T), [0, 1], bptt_segments=bptt_segments).backward()
    reached = [x.grad is not None and bool(x.grad.any()) for x in seen]
    assert reached == [k >= 4 - (bptt_segments or 4) for k in range(4)]


# Saving and loading


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_encoder(RMT, "roberta", T, alignment="left", loss="mean")
    rmt_core.save(tmp_path / "model", model)
    again = rmt_core.load_encoder(tmp_path / "model")
    assert again.config.to_json() == model.config.to_json()
    assert rmt_core.fingerprint(again) == rmt_core.fingerprint(model)
    assert torch.equal(again.read(documents(*LENGTHS)).logits, model.read(documents(*LENGTHS)).logits)
    with pytest.raises(ValueError, match=r"format 'rmt-encoder-1'; .*use rmt_core\.load_encoder"):
        rmt_core.load(tmp_path / "model")


def test_each_loader_takes_its_own(tmp_path: Path) -> None:
    causal = rmt_core.build(backbone=tiny_config(), segment_len=T)
    rmt_core.save(tmp_path / "model", causal)
    with pytest.raises(ValueError, match=r"format 'rmt-model-1'; .*use rmt_core\.load\)"):
        rmt_core.load_encoder(tmp_path / "model")


def backbone_directory(folder: Path, lm: PreTrainedModel) -> Path:
    lm.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_backbone_may_have_any_head(tmp_path: Path, family: str, kind: Any) -> None:
    """The encoder's weights are taken; a head of as many classes too, any other is new."""
    config = tiny_encoder_config(family, num_labels=3)
    saved = kind.from_config(config, dtype=torch.float64)
    folder = backbone_directory(tmp_path, saved)
    settings = {"segment_len": T, "cls_token_id": CLS, "sep_token_id": SEP, "dtype": "float64"}
    model = rmt_core.build_encoder(backbone=folder, num_labels=3, **settings)
    tokens = text(2, 8)
    ours = model.backbone.lm.base_model(tokens).last_hidden_state
    assert close(ours, saved.eval().base_model(tokens).last_hidden_state)
    if kind is AutoModelForSequenceClassification:
        assert close(model.backbone.lm(tokens).logits, saved(tokens).logits)
        assert rmt_core.build_encoder(backbone=folder, num_labels=5, **settings).read(tokens).logits.shape == (2, 5)


def test_a_backbone_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    lm = AutoModel.from_config(tiny_encoder_config(num_hidden_layers=1))
    backbone_directory(tmp_path, lm)
    tiny_encoder_config().save_pretrained(tmp_path)  # of two layers
    with pytest.raises(ValueError, match=r"do not fit its config\.json: .*missing_keys.*bert\.encoder\.layer\.1"):
        rmt_core.build_encoder(backbone=tmp_path, segment_len=T, cls_token_id=CLS, sep_token_id=SEP)


def test_special_tokens_come_from_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)} | {"[CLS]": 20, "[SEP]": 21, "[UNK]": 22}
    words = {word: i for word, i in words.items() if word not in ("w20", "w21", "w22")}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]").save_pretrained(tmp_path)
    backbone_directory(tmp_path, AutoModel.from_config(tiny_encoder_config()))
    config = rmt_core.EncoderConfig(backbone=tmp_path, segment_len=T)
    assert config.special_tokens == (20, 21)
    assert rmt_core.EncoderConfig(backbone=tmp_path, segment_len=T, cls_token_id=3).special_tokens == (3, 21)


# Borders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_len": 0}, "segment_len is 0; it must be a whole number, at least 1"),
        ({"num_labels": 1}, "num_labels is 1; it must be a whole number, at least 2"),
        ({"alignment": "middle"}, "alignment is 'middle'; allowed: right, left"),
        ({"loss": "first"}, "loss is 'first'; allowed: last, mean"),
        ({"dtype": "float8"}, "dtype is 'float8'; allowed: float32"),
        ({"cls_token_id": None}, "cls_token_id is None; give the token's id, 0 to 22"),
        ({"sep_token_id": 23}, "sep_token_id is 23; give the token's id, 0 to 22"),
        ({"memory": "xl"}, "an encoder has no memory 'xl'; it takes one of: none, rmt"),
        ({"memory": ["rmt", "xl"]}, "an encoder has no memory 'rmt with xl'"),
        ({"memory": "rtm"}, "memory kind is 'rtm'; did you mean 'rmt'"),
        ({"memory": {"kind": "rmt", "bidirectional": True}}, "it takes num_tokens only"),
        ({"memory": RMT, "segment_len": 59}, r"segment_len 59 \+ 6 memory and special .* 64 positions; use at most 58"),
        ({"memory": {"kind": "rmt", "num_tokens": 62}}, "use a smaller memory"),
        ({"segment_len": 62, "family": "roberta"}, "exceeds the backbone's 62 positions; use at most 60"),
        ({"changes": {"is_decoder": True}}, r"this bert backbone is not supported: it is a decoder"),
        ({"family": "electra", "changes": {"embedding_size": 16}}, "its embedding_size 16 is not its hidden_size 32"),
    ],
)
def test_what_cannot_be_built_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_encoder(**{"memory": "none", **settings})


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="backbone 'llama' is not supported; supported are bert, camembert, distilbert"
    ):
        rmt_core.build_encoder(backbone=tiny_config(), segment_len=T)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no documents"),
        ([[1], []], "document 1 is empty; a document needs at least one token"),
        ([1, 2], r"document 0 has shape \(\); give documents, each a list of tokens"),
    ],
)
def test_documents_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_encoder().read(given)


@pytest.mark.parametrize("shape", [(2, T + 1), (2, 0), (T,)])
def test_a_step_refuses_tokens_that_are_no_segment(shape: tuple[int, ...]) -> None:
    model = tiny_encoder(segment_len=T)
    with pytest.raises(ValueError, match=f"a step takes \\(rows, 1 to {T} tokens\\)"):
        model.step(torch.zeros(shape, dtype=torch.long), model.init_state(2))
