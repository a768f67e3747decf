"""Where a gate lets the memory be written: the record is that of the states, told apart by where the facts stand."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, placed, writes
from pipelines.tasks.base import TRUE
from pipelines.tasks.questions import batch_marks
from pipelines.tasks.samples import Scene, Wanted
from pipelines.tasks.texts import noise, whole
from pipelines.tasks.writes import AFTER, BEFORE, FACTS, NEXT, OPENING, PLACES, Passage, Writes
from pipelines.tasks.writes_picture import plot, table
from rmt_core.memory.rmt import BinaryGate

from ..rmt_core.tiny import ARMT, MEMFORMER, RMT, RMT_R, XL, tiny_model

BYTES = ByteTokenizer()
SIZE = 16
GATED = {"kind": "rmt", "num_tokens": 3, "gate": "binary"}


def told(length: int = 200, num: int = 12, task: str = "detect", seed: int = 0) -> writes.Told:
    return writes.make_texts(task, BYTES, noise(BYTES), Wanted(length, SIZE), num, seed)


def gate_of(model: Any) -> BinaryGate:
    return next(module for module in model.memory.modules() if isinstance(module, BinaryGate))


def gated_model(memory: Any = GATED) -> Any:
    """A model whose gate writes some tokens and some not."""
    model = tiny_model(memory, segment_len=SIZE, vocab_size=257)
    torch.manual_seed(3)
    gate = gate_of(model)
    nn.init.normal_(gate.update.weight, std=30.0)
    nn.init.constant_(gate.update.bias, -2.0)
    return model


def naive(model: Any, tokens: Tensor) -> tuple[list[list[bool]], list[list[float]]]:
    """Which tokens of the memory each segment of one text (N,) changes, and its gate's probabilities of these."""
    gate, seen = gate_of(model), []
    at = next((i for i, member in enumerate(getattr(model.memory, "members", [])) if hasattr(member, "gate")), None)

    def spy(memory: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.gelu(gate.hidden(torch.cat([written, memory], -1)))
        seen.append(torch.sigmoid(gate.update(features) + 2).flatten().tolist())
        return forward(memory, written)

    forward, gate.forward = gate.forward, spy
    state, changed = model.init_state(1), []
    for start in range(0, len(tokens), SIZE):
        new = model.step(tokens[None, start : start + SIZE], state)[1]
        memories = [one[0] if at is None else one[at][0] for one in (new, state)]
        changed.append([not torch.equal(a, b) for a, b in zip(*memories, strict=True)])
        state = new
    gate.forward = forward
    return changed, seen


@pytest.mark.parametrize("memory", [GATED, [XL, GATED]])
def test_the_record_is_that_of_the_states(memory: Any) -> None:
    model, found = gated_model(memory), told()
    trace = writes.record(model, found, BYTES, batch_size=5)
    num = (200 - 2) // SIZE
    assert trace.written.shape == trace.probability.shape == trace.places.shape == (12, num)
    for row, sample in enumerate(found.samples):
        text = torch.from_numpy(whole(sample.stream)[: num * SIZE].astype(np.int64))
        changed, probability = naive(model, text)
        assert trace.written[row] == pytest.approx(np.mean(changed, 1), abs=1e-6)
        assert trace.probability[row] == pytest.approx(np.mean(probability, 1), abs=1e-6)
        assert trace.highest[row] == pytest.approx(np.max(probability, 1), abs=1e-6)
    assert 0.1 < trace.written.mean() < 0.9  # some are written, some are not
    assert trace.first.tolist() == found.first.tolist()
    sure = sorted(
        (
            (-trace.highest[row, at], row, at)
            for row, at in np.ndindex(trace.written.shape)
            if trace.written[row, at] and PLACES[trace.places[row, at]] in (BEFORE, AFTER)
        ),
    )[:16]
    assert len(sure) == 16
    assert [(one.row, one.segment) for one in trace.passages] == [place[1:] for place in sure]
    for one in trace.passages:
        text = whole(found.samples[one.row].stream)
        assert one.words == BYTES.decode(text[one.segment * SIZE : (one.segment + 1) * SIZE])


def test_the_threshold_is_the_models() -> None:
    found = told(num=2)
    thresholds = [
        writes.record(tiny_model({**GATED, **given}, segment_len=SIZE, vocab_size=257), found, BYTES, 2).threshold
        for given in ({}, {"write_threshold": 0.9})
    ]
    assert thresholds == [0.5, 0.9]


def test_answers_are_those_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text counts as right where all of its answers are."""
    model, found = gated_model(), told(task="pairs_4", num=8)
    chosen = batch_marks(model, found.samples, (TRUE,), BYTES).right[TRUE]
    assert writes.record(model, found, BYTES, batch_size=3).right.tolist() == [bool(one.all()) for one in chosen]

    def some_right(model: Any, batch: Any, memories: Any, tokenizer: Any) -> Any:
        marks = batch_marks(model, batch, memories, tokenizer)
        right = [np.full(len(sample.answers), at % 2 == 0) for at, sample in enumerate(batch)]
        right[2][1] = False
        return marks._replace(right={TRUE: right})

    monkeypatch.setattr(writes, "batch_marks", some_right)
    assert writes.record(model, found, BYTES, batch_size=4).right.tolist() == [True, False, False, False] * 2


@pytest.mark.parametrize("task", ["detect", "recall", "pairs_16", "qa1", "vt"])
def test_facts_are_found_where_they_stand(task: str) -> None:
    """Between their first segment and their last lies all that the same text begins with where facts come first."""
    found = told(length=2048, num=6, task=task, seed=1)
    assert len(set(found.first.tolist())) > 2  # each text has a place of its own
    for i, sample in enumerate(found.samples):
        scene, wanted = Scene(BYTES, noise(BYTES)), Wanted(2048, SIZE, 0.0)
        first = placed.draw(task, scene, wanted, 1, i)
        late = placed.draw(task, scene, wanted._replace(depth=1.0), 1, i)
        facts = bytes(placed.facts_of(first.stream, late.stream).tolist())
        text = bytes(whole(sample.stream).tolist())
        begin, end = found.first[i] * SIZE, (found.last[i] + 1) * SIZE
        assert facts in text[begin:end]
        assert facts not in text[begin + SIZE : end]
        assert facts not in text[begin : end - SIZE]


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 100])
def test_tokens_are_found_across_blocks(cut: int) -> None:
    text = np.array([5, 1, 2, 1, 2, 3, 4, 1, 2, 3], dtype=np.int32)
    blocks = [text[at : at + cut] for at in range(0, len(text), cut)]
    assert placed.find(lambda: iter(blocks), np.array([1, 2, 3])) == 3
    assert placed.find(lambda: iter(blocks), np.array([4])) == 6
    assert placed.find(lambda: iter(blocks), text) == 0
    with pytest.raises(InputError, match="do not stand together"):
        placed.find(lambda: iter(blocks), np.array([2, 2]))


def test_segments_are_told_apart_by_where_the_facts_stand() -> None:
    places = writes.places_of(np.array([0, 1, 3, 5]), np.array([0, 2, 3, 6]), 6)
    assert [[PLACES[at] for at in row] for row in places] == [
        [FACTS, NEXT, AFTER, AFTER, AFTER, AFTER],
        [OPENING, FACTS, FACTS, NEXT, AFTER, AFTER],
        [OPENING, BEFORE, BEFORE, FACTS, NEXT, AFTER],
        [OPENING, BEFORE, BEFORE, BEFORE, BEFORE, FACTS],
    ]


def example() -> Writes:
    """Four texts with facts in segment 2 of 5: written there only; before too; after too; not there."""
    written = np.zeros((4, 5))
    written[:, 0] = 1
    written[:3, 2] = 0.5
    written[1, 1] = written[2, 4] = 1.0
    probability = np.where(written > 0, 0.95, 0.01)
    probability[0, 3] = 0.4
    first = np.full(4, 2)
    places, right = writes.places_of(first, first, 5), np.array([True, True, False, False])
    passages = [Passage(1, 1, "`a|b`\n"), Passage(2, 4, "é")]
    return Writes(written, probability, probability + 0.045, places, first, right, threshold=0.8, passages=passages)


def cells(lines: list[str]) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_tables_count_segments_and_answers() -> None:
    lines = table(example()).splitlines()
    heads = ("### written", "### thres", "### answ", "### taken")
    starts = [next(at for at, line in enumerate(lines) if line.startswith(head)) for head in heads]
    segments, above, answers = (cells(lines[slice(*part)]) for part in itertools.pairwise(starts))
    assert segments["the text's first"] == ["4", "4", "0", "1.0000", "0.9500"]
    assert segments["before the facts"] == ["4", "1", "0", "0.2500", "0.2450"]
    assert segments["with the facts"] == ["4", "3", "0", "0.3750", "0.7150"]
    assert segments["the next one"][:3] == ["4", "0", "1"]
    assert segments["after that"][:2] == ["4", "1"]
    assert "it writes those whose own is above 0.8." in lines[starts[1] - 2]
    assert list(above)[2:] == ["0.5", "0.8", "0.9", "0.99", "0.999", "0.9999"]  # behind the heads
    assert above["0.8"] == above["0.99"] == ["3", "1", "1"]
    assert above["0.999"] == ["0", "0", "0"]
    assert answers["nowhere"] == ["2", "1", "0.5000 [0.0945, 0.9055]"]
    assert answers["before the facts"][:2] == ["1", "1"]
    assert answers["after them"][:2] == ["1", "0"]
    assert answers["before and after"] == ["0", "-", "-"]
    assert answers["all texts"][:2] == ["4", "2"]
    assert "Texts in which no segment with the facts is written: 1, of which 0 are right." in lines[starts[3] - 2]
    assert lines[starts[3]] == "### taken for facts (the surest of 2 segments that are written elsewhere)"
    assert lines[-2:] == [
        r"| 1 | 1 | before the facts | 0.9950 | `'a\|b'\n` |",
        "| 2 | 4 | after that | 0.9950 | `é` |",
    ]
    assert "taken for facts" not in table(example()._replace(passages=[]))


def test_the_picture_changes_with_the_record() -> None:
    found = example()
    assert plot(found, "a title") == plot(found, "a title")
    others = [
        found._replace(written=1 - found.written),
        found._replace(right=~found.right),
        found._replace(first=found.first - 1),
    ]
    assert len({plot(one, "a title") for one in (found, *others)}) == 4


def test_a_write_among_many_segments_is_drawn() -> None:
    written = np.zeros((3, 5000))
    first = np.array([10, 2500, 4999])
    places = writes.places_of(first, first, 5000)
    found = Writes(written, written, written, places, first, np.ones(3, dtype=bool), threshold=0.5, passages=[])
    single = written.copy()
    single[1, 1234] = 1.0
    assert plot(found, "") != plot(found._replace(written=single), "")


@pytest.mark.parametrize(
    "memory",
    [
        RMT,
        RMT_R,
        {**RMT_R, "gate": "binary"},
        {**RMT, "gate": "lstm"},
        ARMT,
        XL,
        MEMFORMER,
        [XL, RMT],
        [XL, {**RMT_R, "gate": "binary"}],
        "none",
    ],
)
def test_memories_without_a_binary_gate_are_refused(memory: Any) -> None:
    with pytest.raises(InputError, match="has no binary gate; use one rmt with"):
        writes.check(tiny_model(memory, segment_len=SIZE, vocab_size=257))
    for memory in (GATED, [XL, GATED]):
        writes.check(gated_model(memory))


@pytest.mark.parametrize(
    ("task", "length", "says"),
    [
        ("memorise", 200, "cannot be put at a place of a text; use recall, detect"),
        ("pairs_16", 60, "pairs_16 at length 60: facts, questions and answers need at least"),
        ("perplexity", 200, "cannot be put at a place of a text"),
    ],
)
def test_texts_that_cannot_be_made_are_refused(task: str, length: int, says: str) -> None:
    assert task in TASKS
    with pytest.raises(InputError, match=says):
        told(length=length, task=task)


def test_texts_without_segments_to_look_at_are_refused() -> None:
    with pytest.raises(InputError, match="only 2 segments of 48 tokens precede the one that asks"):
        writes.make_texts("detect", BYTES, noise(BYTES), Wanted(140, 48), 2)


def test_facts_with_one_place_only_are_refused() -> None:
    with pytest.raises(InputError, match="the facts have one place only; use a longer --length"):
        told(length=100, task="pairs_16", num=2)
