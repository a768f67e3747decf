"""Continuations scored and written in one stream, against the model's logits one text at a time, in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import rmt_core
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import continuations
from pipelines.tasks.continuations import Asked, Writing, score, write
from rmt_core import RecurrentModel, Sampling
from tests.rmt_core.tiny import MEMORIES, tiny_model

BYTES = ByteTokenizer()
KINDS = ("none", "rmt", "xl+rmt", "armt")


def byte_model(memory: str = "rmt") -> RecurrentModel:
    return tiny_model(MEMORIES[memory], segment_len=6, vocab_size=BYTES.vocab_size)


def tokens(num: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(256, size=num).tolist()


def naive(model: RecurrentModel, one: Asked) -> tuple[float, bool]:
    """All logits of one text, a segment at a time from the initial state."""
    text = [*one.context, *one.continuation]
    state, rows = model.init_state(1), []
    for start in range(0, len(text), 6):
        out, state = model.step(torch.tensor([text[start : start + 6]]), state)
        rows += list(out.logits[0].detach())
    total, greedy = 0.0, True
    for place in range(len(one.context), len(text)):
        logits = rows[place - 1]
        total += float(torch.log_softmax(logits, 0)[text[place]])
        greedy &= int(logits.argmax()) == text[place]
    return total, greedy


def asked() -> list[Asked]:
    """Contexts of all lengths around segments' ends, some asked about several times; continuations over an end."""
    found = [Asked(tokens(size, 1), tokens(length, size)) for size in (1, 5, 6, 7, 12, 13, 40) for length in (1, 3, 15)]
    return [*found, Asked(tokens(13, 1), []), Asked(tokens(13, 2), tokens(2, 5))]


@pytest.mark.parametrize("memory", KINDS)
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_scores_are_those_of_each_text_alone(memory: str, batch_size: int) -> None:
    model = byte_model(memory)
    found = score(model, asked(), batch_size)
    for one, got in zip(asked(), found, strict=True):
        total, greedy = naive(model, one)
        assert got.log_likelihood == pytest.approx(total, abs=1e-9)
        assert got.is_greedy == greedy


@pytest.mark.parametrize("length", [1, 4, 9])
def test_what_greedy_decoding_writes_is_greedy_and_nothing_else(length: int) -> None:
    model, context = byte_model(), tokens(20, 3)
    written = rmt_core.generate(model, [context], length).tokens[0]
    spoilt = [*written[:-1], (written[-1] + 1) % 256]
    right, wrong = score(model, [Asked(context, written), Asked(context, spoilt)])
    assert right.is_greedy
    assert not wrong.is_greedy
    assert right.log_likelihood > wrong.log_likelihood


def test_a_context_is_read_once_however_often_it_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = byte_model(), []
    step = model.step
    monkeypatch.setattr(model, "step", lambda part, *rest: read.append(part.numel()) or step(part, *rest))
    score(model, [Asked(tokens(600, 1), tokens(1, seed)) for seed in range(4)], 4)
    assert sum(read) == 594 + 4 * 6


def test_a_text_without_context_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing predicts the first token"):
        score(byte_model(), [Asked([], [1])])


def alone(model: RecurrentModel, context: Sequence[int], most: int) -> str:
    return BYTES.decode(rmt_core.generate(model, [context], most, stop_tokens=[256]).tokens[0])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_texts_are_written_as_each_alone_up_to_a_stop(
    batch_size: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "_WRITTEN_AT_ONCE", at_once)
    model, contexts = byte_model(), [tokens(size, size) for size in (1, 6, 7, 30, 31)]
    whole = [alone(model, context, 20) for context in contexts]
    assert write(model, BYTES, contexts, Writing(20), batch_size) == whole
    stop = whole[1][3:5]
    cut = [text.partition(stop)[0] for text in whole]
    assert len(cut[1]) <= 3
    assert write(model, BYTES, contexts, Writing(20, (stop, "\x00never")), batch_size) == cut


def test_what_is_drawn_repeats_and_does_not_depend_on_the_batch() -> None:
    model, contexts = byte_model(), [tokens(9, seed) for seed in range(4)]
    writing = Writing(40, sampling=Sampling(temperature=2.0))
    found = write(model, BYTES, contexts, writing, 4)
    assert write(model, BYTES, contexts, writing, 1) == found
    assert len(set(found)) == 4
    assert all(len(BYTES.encode(text)) >= 40 and text[:8] != text[8:16] for text in found)
