"""What memory tokens hold: the record is that of the states, and a read-out finds what is there and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import slots
from pipelines.tasks.samples import Wanted
from pipelines.tasks.slots_picture import Shown, plot, table
from pipelines.tasks.texts import noise, whole

from ..rmt_core.tiny import ARMT, MEMFORMER, RMT, RMT_R, XL, tiny_model

BYTES = ByteTokenizer()


def texts(length: int = 200, num: int = 6, task: str = "detect") -> slots.Texts:
    return slots.make_texts(task, BYTES, noise(BYTES), Wanted(length, 16), num)


def test_texts_begin_with_facts_that_are_known() -> None:
    found = texts(num=40)
    assert found.num_fact_tokens == 2  # `#` and a letter
    for sample, fact in zip(found.samples, found.facts, strict=True):
        begin = whole(sample.stream)[:2].tolist()
        letters = sorted({int(whole(one.stream)[1]) for one in found.samples})
        assert begin == [ord("#"), letters[fact]]
    sentences = texts(length=400, task="recall")
    assert sentences.num_fact_tokens > 10


@pytest.mark.parametrize("memory", [RMT, MEMFORMER])
def test_the_record_is_that_of_the_states(memory: Any) -> None:
    model = tiny_model(memory, segment_len=16, vocab_size=257)
    found = texts()
    trace = slots.record(model, found, batch_size=4)
    num = (200 - 1) // 16  # whole segments before the answer, which is one token
    assert trace.at.tolist() == list(range(num))
    assert trace.probed_at.tolist() == [0, 1, 2, 4, 8]
    for row, sample in enumerate(found.samples):
        text = torch.from_numpy(whole(sample.stream).astype(np.int64))
        states = [model.init_state(1)]
        for start in range(0, num * 16, 16):
            states.append(model.step(text[None, start : start + 16], states[-1])[1])
        for i in range(num):
            cosine = torch.cosine_similarity(states[i + 1], states[1], dim=-1)[0]
            moved = ((states[i + 1] - states[i]).norm(dim=-1) / states[i].norm(dim=-1))[0]
            assert trace.kept[row, i] == pytest.approx(cosine.tolist(), abs=1e-9)
            assert trace.moved[row, i] == pytest.approx(moved.tolist(), abs=1e-9)
        for p, at in enumerate(trace.probed_at):
            assert torch.allclose(trace.states[row, p], states[at + 1][0].double(), atol=1e-9)


def test_a_long_text_is_recorded_at_so_many_segments_and_read_out_at_doubling_ones() -> None:
    model = tiny_model(RMT, segment_len=16, vocab_size=257)
    trace = slots.record(model, texts(length=16 * 600, num=2), batch_size=2)
    assert len(trace.at) == 256
    assert (trace.at[0], trace.at[-1]) == (0, 598)  # the segment of the answer is not among them
    assert trace.probed_at.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_a_read_out_finds_what_a_token_holds_and_nothing_elsewhere() -> None:
    """Token 0 holds the fact at first and nothing later, token 1 never, tokens 2 and 3 only together."""
    generator = torch.Generator().manual_seed(0)
    facts = np.random.default_rng(0).integers(4, size=200)
    random = torch.randn(200, 2, 4, 8, generator=generator, dtype=torch.float64)
    codes = torch.randn(4, 8, generator=generator, dtype=torch.float64)[facts] * 4
    random[:, 0, 0] += codes
    secret = torch.randn(200, 8, generator=generator, dtype=torch.float64) * 20
    random[:, 1, 2] += secret + codes
    random[:, 1, 3] += secret
    trace = slots.Trace(np.array([0, 1]), np.zeros((200, 2, 4)), np.zeros((200, 2, 4)), np.array([0, 1]), random)
    found = slots.read_out(trace, facts)
    assert found.chance == np.bincount(facts).max() / 200
    assert found.tokens[0, 0] > 0.95
    assert found.tokens[1, 0] < 0.4
    assert (found.tokens[:, 1] < 0.4).all()
    assert found.together[1] > found.tokens[1].max() + 0.3


def test_a_read_out_of_many_features_and_no_fact_is_at_chance() -> None:
    features = torch.randn(400, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert slots.accuracy(features, np.random.default_rng(0).integers(16, size=400)) < 0.12


def test_facts_of_a_single_text_cannot_be_read_out() -> None:
    shared = np.array([0, 0, 1, 1, 2, 2, 3, 4])  # in quarters that differ, but for the last two
    assert slots._unseen(shared).tolist() == [False] * 6 + [True] * 2
    in_one_quarter = np.array([0, 1, 1, 1, 0, 1, 1, 1])
    assert slots._unseen(in_one_quarter).tolist() == [True, False, False, False] * 2
    found = texts(num=8)
    slots.check_facts(found._replace(facts=shared))
    slots.check_facts(texts(num=64))
    with pytest.raises(InputError, match="of 64 texts 64 have a fact that none of the others has"):
        slots.check_facts(texts(length=400, num=64, task="needle"))
    with pytest.raises(InputError, match="of 8 texts 5 have"):
        slots.check_facts(found._replace(facts=np.array([0, 0, 0, 1, 2, 3, 4, 5])))


def test_the_picture_changes_with_the_record_and_the_table_says_how_many_texts() -> None:
    model = tiny_model(RMT, segment_len=16, vocab_size=257)
    found = texts(num=8)
    trace = slots.record(model, found, batch_size=8)
    read = slots.read_out(trace, found.facts)
    shown = Shown("tiny", "token")
    assert plot(trace, read, shown) == plot(trace, read, shown)
    assert plot(trace._replace(kept=-trace.kept), read, shown) != plot(trace, read, shown)
    written = table(trace, read, shown).splitlines()
    assert written[2] == "| segments since the fact | token 0 | token 1 | token 2 | all tokens |"
    assert len([line for line in written if line.startswith("| ")]) == 2 + 5
    assert "8 texts" in written[-1]
    assert f"{read.num_unseen} have a fact that no other text has and count as wrong" in written[-1]
    assert "count as wrong" not in table(trace, read._replace(num_unseen=0), shown)


@pytest.mark.parametrize("memory", ["none", XL, ARMT, RMT_R, [XL, RMT], {"kind": "rmt", "num_tokens": 0}])
def test_memories_that_are_not_rows_of_vectors_are_refused(memory: Any) -> None:
    with pytest.raises(InputError, match="not one vector a token or slot; use rmt or memformer"):
        slots.check(tiny_model(memory, segment_len=16, vocab_size=257))
    slots.check(tiny_model(RMT))
    slots.check(tiny_model(MEMFORMER))


@pytest.mark.parametrize(
    ("task", "length", "says"),
    [
        ("memorise", 200, "cannot be put at a place of a text; use recall, detect"),
        ("perplexity", 200, "cannot be put at a place of a text"),
        ("recall", 20, "need at least"),
        ("detect", 30, "use a longer --length"),
    ],
)
def test_texts_in_which_nothing_can_be_followed_are_refused(task: str, length: int, says: str) -> None:
    model = tiny_model(RMT, segment_len=16, vocab_size=257)
    with pytest.raises(InputError, match=says):
        slots.record(model, texts(length, task=task), batch_size=4)
