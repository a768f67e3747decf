"""Evaluation tasks against loops written out from their definitions, in float64.

Axes: B rows, N tokens of a text, T tokens of a segment, V vocabulary.
"""

import dataclasses
import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import rmt_core
from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, base, perplexity, questions, texts
from pipelines.tasks.base import MEMORIES, Figure, Material, batch_sizes
from pipelines.tasks.held_out import TextHeldOut
from pipelines.tasks.intervals import Ratios, t_interval, wilson_interval
from pipelines.tasks.perplexity import Row, batch_losses, stretch_bounds
from pipelines.tasks.questions import Marks, batch_marks
from pipelines.tasks.samples import Answer, Sample, Scorer
from rmt_core import RecurrentModel
from tests.rmt_core.tiny import MEMORIES as TINY_MEMORIES
from tests.rmt_core.tiny import VOCAB, tiny_model

BYTES = ByteTokenizer()


def byte_model(memory: Any = None, segment_len: int = 16) -> RecurrentModel:
    return tiny_model(memory or TINY_MEMORIES["rmt"], segment_len=segment_len, vocab_size=BYTES.vocab_size)


def text(num_tokens: int, seed: int = 0, vocab: int = 100) -> TextHeldOut:
    tokens = np.random.default_rng(seed).integers(vocab, size=num_tokens).astype(np.int32)
    return TextHeldOut("random", "f", tokens)


def material(**settings: Any) -> Material:
    return Material(**{"tokenizer": BYTES, "held_out": text(200), "batch_size": 4, "num_samples": 6, **settings})


def select(figures: list[Figure], metric: str, memory: str) -> list[Figure]:
    return [figure for figure in figures if figure.metric == metric and figure.memory == memory]


class Documents:
    """Several of random tokens."""

    name, fingerprint = "random", "f"

    def __init__(self, num_tokens: list[int], vocab: int = VOCAB) -> None:
        self.num_tokens = num_tokens
        self._texts = [text(num, seed, vocab).tokens for seed, num in enumerate(num_tokens)]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._texts[document][start:stop]


def naive_nats(logits: torch.Tensor, labels: Sequence[int]) -> list[float]:
    return [-float(torch.log_softmax(row, 0)[int(label)]) for row, label in zip(logits, labels, strict=True)]


def naive_logits(model: RecurrentModel, rows: list[list[int]], memory: str) -> list[torch.Tensor]:
    """Logits (N, V) of each row, one row and one segment at a time. The neighbour of row i is row i - 1."""
    size, count = model.segment_len, len(rows)
    carried = [[model.init_state(1)] for _ in rows]  # carried[i][s]: row i's own state before its segment s
    pieces = [[row[start : start + size] for start in range(0, len(row), size)] for row in rows]
    for i, row in enumerate(pieces):
        for piece in row:
            carried[i].append(model.step(torch.tensor([piece]), carried[i][-1])[1])
    found = []
    for i, row in enumerate(pieces):
        out = []
        for s, piece in enumerate(row):
            neighbour = carried[(i - 1) % count]
            state = neighbour[min(s, len(neighbour) - 1)] if memory == "shuffled" else carried[i][s]
            if memory == "zeroed":
                state = rmt_core.state.tree_map(lambda tensor: tensor * 0, state)
            out.append(model.step(torch.tensor([piece]), state)[0].logits[0])
        found.append(torch.cat(out).detach())
    return found


@pytest.mark.parametrize("memory", ["none", "rmt", "xl", "xl+rmt"])
def test_losses_equal_a_naive_loop(memory: str) -> None:
    model = tiny_model(TINY_MEMORIES[memory], segment_len=6)
    held_out = Documents([17, 40])
    rows = [Row(0, 0, 17), Row(1, 0, 17), Row(1, 17, 34), Row(1, 34, 40)]  # the last one ends before the others
    losses = batch_losses(model, rows, held_out=held_out, memories=MEMORIES, bounds=stretch_bounds(16, 6))
    texts = [held_out.read(*row) for row in rows]
    for kind in MEMORIES:
        naive = naive_logits(model, [one[:-1].tolist() for one in texts], kind)
        for i, (logits, one) in enumerate(zip(naive, texts, strict=True)):
            nats = naive_nats(logits, one[1:])
            wanted = [sum(nats[start : start + 6]) for start in range(0, 16, 6)]
            np.testing.assert_allclose(losses[kind][i], wanted, rtol=0, atol=1e-9)


def test_whole_documents_are_measured_as_a_naive_loop_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row after row, alone: full rows, the shorter last ones, and documents shorter than the length."""
    monkeypatch.setattr(perplexity, "_SINGLE", 4)  # segments from 4 on are told in twos, from 8 on in fours
    monkeypatch.setattr("pipelines.tasks.held_out._BLOCK", 5)
    model, documents = byte_model(segment_len=3), Documents([71, 95, 2, 14, 1, 31], vocab=256)
    figures = TASKS["perplexity"].measure(model, 40, material(held_out=documents, batch_size=3))
    nats: dict[str, list[list[float]]] = {"true": [], "zeroed": []}
    for number, num in enumerate(documents.num_tokens):
        for start in range(0, num, 40):
            row = documents.read(number, start, min(start + 40, num)).tolist()
            for memory, found in nats.items():
                if len(row) >= 2:
                    [logits] = naive_logits(model, [row[:-1]], memory)
                    found.append(naive_nats(logits, row[1:]))
    stretches = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 12), (12, 13)]
    for memory, found in nats.items():
        assert sorted(map(len, found)) == [1, 13, 14, 30, 30, 39, 39, 39]
        loss = select(figures, "loss", memory)[0]
        assert loss.value == pytest.approx(sum(map(sum, found)) / 205, abs=1e-10)
        assert (loss.num_tokens, loss.num_samples, loss.num_read, loss.num_held_out) == (205, 8, 213, 214)
        bits = select(figures, "bits_per_byte", memory)[0]
        assert bits.value == pytest.approx(loss.value / math.log(2), abs=1e-10)
        curve = select(figures, "loss_by_segment", memory)
        assert [(one.segment, (one.segment or 0) + (one.num_segments or 1)) for one in curve] == stretches
        for one, (start, end) in zip(curve, stretches, strict=True):
            parts = [part for row in found if (part := row[3 * start : 3 * end])]
            assert one.value == pytest.approx(sum(map(sum, parts)) / sum(map(len, parts)), abs=1e-10)
            assert (one.num_tokens, one.num_samples) == (sum(map(len, parts)), len(parts))


class Unchanging(torch.nn.Module):
    """What perplexity needs of a model, as little as can be: it foretells by the last token alone."""

    segment_len = step_len = 256

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.head = torch.nn.Linear(4, 8)
        self.backbone.vocab_size = 8

    def init_state(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 1)

    def step(self, tokens: torch.Tensor, state: torch.Tensor, lengths: Any) -> tuple[Any, torch.Tensor]:
        return SimpleNamespace(hidden=(tokens[..., None] % 4 == torch.arange(4)).float()), state


class Made(Documents):
    """Long texts that are made when they are read."""

    def __init__(self, num_tokens: list[int]) -> None:
        self.name, self.fingerprint, self.num_tokens = "made", "f", num_tokens

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return (np.arange(start, stop) % 8).astype(np.int32)


def test_memory_is_the_same_at_every_length() -> None:
    """Neither rows nor a figure for every segment are held."""
    peaks, counts = [], []
    for length in (2**17, 2**20):
        held_out = Made([length, length - 1])
        tracemalloc.start()
        figures = TASKS["perplexity"].measure(Unchanging(), length, material(held_out=held_out, ablations=False))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        counts.append(len(figures))
        assert figures[0].num_tokens == 2 * length - 3
    assert counts == [2 + 128 + 64 * 2, 2 + 128 + 64 * 5]
    assert peaks[1] < peaks[0] + 2**19  # of each row, int32, there are 3.5 MiB more


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("rest", [0, 5])
@pytest.mark.parametrize("counts", [[7], [4, 4], [5, 5, 3], [1, 2, 9, 6], [20, 3, 3], [1] * 9, [2, 1, 1], [16, 16]])
def test_neighbours_are_of_different_documents_where_that_can_be(counts: list[int], rest: int, batch_size: int) -> None:
    counts = [num + bool(rest) for num in counts]  # of rows of 10 tokens, the last one shorter
    rows = [
        Row(i, at, min(at + 10, 10 * (num - bool(rest)) + rest))
        for i, num in enumerate(counts)
        for at in range(0, 10 * num, 10)
    ]
    there = Documents([10 * (num - bool(rest)) + rest for num in counts])
    cut = list(perplexity.batches(perplexity.rows_to_read(10, 5, material(held_out=there)), batch_size))
    assert sorted(row for batch in cut for row in batch) == rows
    lengths = [[row.num_tokens for row in batch] for batch in cut]
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(lengths))  # the longest ones first
    for batch in cut:
        neighbours = list(zip(batch, [batch[-1], *batch[:-1]], strict=True))
        same = sum(a.document == b.document for a, b in neighbours)
        most = max(Counter(row.document for row in batch).values())
        if most <= len(batch) // 2:
            assert same == 0
        elif len(counts) > 1 and max(counts) <= len(rows) / 2 and not rest:
            assert same <= 1  # an odd number of rows, or a single row too many
        if len(counts) == 1 and len(batch) > 2:
            assert min(abs(a.start - b.start) for a, b in neighbours) >= 10 * ((len(batch) - 1) // 2)


def test_it_is_told_whether_a_shuffled_memory_is_of_another_document() -> None:
    for num_tokens, wanted in (([200], 5), ([80, 80], 0), ([120, 40], 2)):
        figures = TASKS["perplexity"].measure(byte_model(), 40, material(held_out=Documents(num_tokens)))
        assert select(figures, "loss", "shuffled")[0].num_same_text == wanted
        assert {figure.num_same_text for figure in figures if figure.memory != "shuffled"} == {None}


def test_a_decoder_that_treats_the_first_token_apart_counts_every_byte() -> None:
    class Spaced(ByteTokenizer):
        """Gives a space for every token 0, but none at the start; 200 is a third of a character."""

        def decode_bytes(self, ids: Any) -> bytes:
            text = "".join(" " if one == 0 else "b" if one < 200 else "c" for one in np.asarray(ids))
            text = text.replace("ccc", "\N{EURO SIGN}").replace("c", "\N{REPLACEMENT CHARACTER}" * 2)
            return text.removeprefix(" ").encode()

    ids = np.array([0, 0, 5, 200, 200, 200, 7] * 9, dtype=np.int32)
    held_out = TextHeldOut("spaced", "f", ids)
    for block in (1, 2, 3, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipelines.tasks.held_out._BLOCK", block)
            assert perplexity._num_bytes(Spaced(), held_out, Row(0, 0, 63)) == 9 * 7 - 1


def test_true_loss_is_the_models_own() -> None:
    model = byte_model()
    figures = TASKS["perplexity"].measure(model, 50, material(held_out=text(100)))
    tokens = torch.from_numpy(text(100).tokens).long().view(2, 50)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert select(figures, "loss", "true")[0].value == pytest.approx(model(tokens, labels).item(), abs=1e-9)


def test_a_zeroed_memory_is_each_segment_alone_from_a_state_of_zeros() -> None:
    model = byte_model(segment_len=8)
    held_out, rows = text(2 * 25), [Row(0, 0, 25), Row(0, 25, 50)]
    texts = held_out.tokens.reshape(2, 25)
    bounds = stretch_bounds(24, 8)
    losses = batch_losses(model, rows, held_out=held_out, memories=["true", "zeroed"], bounds=bounds)["zeroed"]
    for s, start in enumerate(range(0, 24, 8)):
        inputs, labels = (torch.from_numpy(texts[:, at : at + 8]).long() for at in (start, start + 1))
        out, _ = model.step(inputs, torch.zeros_like(model.init_state(2)))
        wanted = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none")
        np.testing.assert_allclose(losses[:, s], wanted.view(2, 8).sum(1).detach(), rtol=0, atol=1e-9)


def test_without_a_memory_the_three_are_equal() -> None:
    figures = TASKS["perplexity"].measure(byte_model("none"), 40, material())
    values = [select(figures, "loss", memory)[0].value for memory in MEMORIES]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("length", [16, 17, 18, 32, 40, 200])
def test_perplexity_counts_every_predicted_token(length: int) -> None:
    held_out = text(200)
    figures = TASKS["perplexity"].measure(byte_model(), length, material(held_out=held_out))
    num_rows, rest = divmod(200, length)
    num_rows, num_read = (num_rows + 1, 200) if rest >= 2 else (num_rows, 200 - rest)
    whole = select(figures, "loss", "true")[0]
    curve = select(figures, "loss_by_segment", "true")
    assert whole.num_tokens == num_read - num_rows == sum(figure.num_tokens or 0 for figure in curve)
    assert (whole.num_read, whole.num_held_out, whole.num_samples) == (num_read, 200, num_rows)
    assert [figure.segment for figure in curve] == list(range(math.ceil((length - 1) / 16)))
    mean = sum(figure.value * (figure.num_tokens or 0) for figure in curve) / whole.num_tokens
    assert whole.value == pytest.approx(mean, abs=1e-12)
    bits = select(figures, "bits_per_byte", "true")[0]
    assert bits.value == pytest.approx(whole.value / math.log(2), abs=1e-12)  # a byte tokenizer: one byte a token


def test_the_intervals_of_losses_are_those_of_their_rows() -> None:
    held_out, rows = text(200), [Row(0, at, at + 40) for at in range(0, 200, 40)]
    figures = TASKS["perplexity"].measure(byte_model(), 40, material(held_out=held_out))
    bounds = stretch_bounds(39, 16)
    losses = batch_losses(byte_model(), rows, held_out=held_out, memories=["true"], bounds=bounds)["true"]
    whole = select(figures, "loss", "true")[0]
    assert (whole.value, whole.low, whole.high) == pytest.approx(t_interval((losses.sum(1) / 39).tolist()), abs=1e-12)
    last = select(figures, "loss_by_segment", "true")[-1]
    assert (last.value, last.low, last.high) == pytest.approx(t_interval((losses[:, -1] / 7).tolist()), abs=1e-12)
    assert {figure.num_samples for figure in figures} == {5}
    alone = TASKS["perplexity"].measure(byte_model(), 200, material())[0]
    assert (alone.low, alone.high, alone.num_samples) == (None, None, 1)


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.uniform(1, 5, size=(20, 2000))
    sums = 2 * sizes + generator.normal(size=(20, 2000)) * sizes
    sizes[:4, 0] = 0  # rows that have no part in the first one
    ratios, covered = Ratios(2000), 0
    for row in zip(sums, sizes, strict=True):
        ratios.add(*row)
    for index in range(2000):
        has = sizes[:, index] > 0
        x, y = sums[has, index], sizes[has, index]
        mean, low, high = ratios.interval(index)
        assert low is not None
        assert high is not None
        half = {20: 2.093, 16: 2.131}[len(x)] * math.sqrt(((x - mean * y) ** 2).sum() / (len(x) - 1) / len(x))
        assert (mean, high - mean, mean - low) == pytest.approx(
            (x.sum() / y.sum(), half / y.mean(), half / y.mean()), rel=1e-10
        )
        covered += low < 2 < high
    assert 0.91 < covered / 2000 < 0.97


def test_questions_of_other_lengths_are_other_ones_and_the_same_again() -> None:
    task = TASKS["detect"]
    drawn = [
        [int(task._sample(i, length, 16, material()).answers[0].tokens[0]) for i in range(20)]
        for length in (64, 64, 80)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_tasks_draw_apart_and_steps_of_one_task_alike() -> None:
    def drawn(name: str) -> list[Sample]:
        return [TASKS[name]._sample(i, 64, 16, material(background="noise")) for i in range(40)]

    letters = [[int(sample.answers[0].tokens[-1]) for sample in drawn(name)] for name in ("detect", "recall")]
    assert sum(a == b for a, b in zip(*letters, strict=True)) < 10
    joined, marked = ([bytes(texts.whole(sample.stream)[:-2].tolist()) for sample in drawn(name)]
                      for name in ("join", "join_marked"))  # fmt: skip
    assert joined == marked


def test_depths_at_which_facts_stand_at_the_same_place_are_told() -> None:
    """A passkey's lines of 90 bytes between which it stands: in 400 bytes there are three, in 4,000 forty."""
    model = tiny_model("none", segment_len=16, vocab_size=BYTES.vocab_size)
    asked = material(depths=(0.0, 0.1, 0.5, 0.55, 1.0), ablations=False)
    figures = TASKS["passkey"].measure(model, 400, asked)
    told = {one.depth: one.same_place for one in figures if one.metric == "accuracy_at_depth"}
    assert told == {0.0: None, 0.1: True, 0.5: None, 0.55: True, 1.0: None}
    assert TASKS["passkey"]._same_places(4000, 16, asked) == set()


def test_only_texts_that_are_asked_tell_whether_places_are_the_same() -> None:
    """The first four stories fit, of the first eight one does not."""
    model = tiny_model("none", segment_len=64, vocab_size=BYTES.vocab_size)
    asked = material(background="noise", depths=(0.0, 1.0), num_samples=4, ablations=False)
    with pytest.raises(InputError, match="need more tokens"):
        TASKS["qa2"].check(352, 64, dataclasses.replace(asked, num_samples=8))
    TASKS["qa2"].check(352, 64, asked)
    figures = TASKS["qa2"].measure(model, 352, asked)
    assert [one.depth for one in figures if one.metric == "accuracy_at_depth"] == [0.0, 1.0]


@pytest.mark.parametrize("task", ["qa5", "qa2_all", "capacity_16"])
def test_a_length_that_is_said_to_be_enough_is(task: str) -> None:
    asked = material(background="noise", num_samples=32)
    with pytest.raises(InputError, match=r"\d+ are enough") as error:
        TASKS[task].check(100, 64, asked)
    TASKS[task].check(int(str(error.value).split()[-3]), 64, asked)


def test_what_a_tokenizer_does_not_allow_is_one_line() -> None:
    class Uneven:
        def encode_inside(self, text: str) -> np.ndarray:
            return np.concatenate([np.full(1 + (letter == "C"), ord(letter)) for letter in text] or [np.zeros(0)])

    with pytest.raises(InputError, match="sorting: every capital letter must have the same number"):
        TASKS["sorting"].check(256, 16, material(tokenizer=Uneven(), background="noise"))
    with pytest.raises(InputError, match="prose needs a text of at least one token"):
        TASKS["recall"].check(256, 16, material(held_out=text(0)))


def test_a_single_row_is_measured_without_shuffling() -> None:
    figures = TASKS["perplexity"].measure(byte_model(), 200, material())
    assert {figure.memory for figure in figures} == {"true", "zeroed"}


def test_perplexity_does_not_depend_on_the_batch() -> None:
    whole = TASKS["perplexity"].measure(byte_model(), 40, material(batch_size=8))
    paired = TASKS["perplexity"].measure(byte_model(), 40, material(batch_size=2))
    for memory in ("true", "zeroed"):
        a, b = (select(figures, "loss_by_segment", memory) for figures in (whole, paired))
        assert [x.value for x in a] == pytest.approx([x.value for x in b], abs=1e-10)


def test_limit_segments_takes_rows_from_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, read = text(400), []
    monkeypatch.setattr(TextHeldOut, "read", lambda self, i, a, b: read.append(a) or self.tokens[a:b])
    TASKS["perplexity"].measure(byte_model(), 40, material(held_out=held_out, limit_segments=7))
    assert {at // 40 for at in read} == {0, 5}


def test_limit_segments_leaves_short_rows_out_first() -> None:
    held_out = Documents([30, 95, 20, 50])
    for limit, wanted in ((3, 40), (6, 80), (9, 120), (12, 150), (17, 170), (18, 185), (24, 195), (None, 195)):
        figures = TASKS["perplexity"].measure(byte_model(), 40, material(held_out=held_out, limit_segments=limit))
        assert figures[0].num_read == wanted


@pytest.mark.parametrize(
    ("task", "length", "changes", "words"),
    [
        ("perplexity", 15, {}, ["15", "segment of 16", "at least 16"]),
        ("perplexity", 201, {}, ["201", "longer", "at most 200"]),
        ("perplexity", 64, {"limit_segments": 3}, ["--limit-segments 3", "4 segments", "at least 4"]),
        ("recall", 15, {}, ["15", "at least 16"]),
        ("recall", 30, {}, ["30", "are enough"]),
    ],
)
def test_lengths_that_cannot_be_measured_are_refused(
    task: str, length: int, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        TASKS[task].check(length, 16, material(**changes))
    assert all(word in str(error.value) for word in words), str(error.value)


# --- questions --------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A text and the answer behind it."""

    tokens: np.ndarray
    answer: np.ndarray

    def sample(self) -> Sample:
        both = np.concatenate([self.tokens, self.answer])
        answer = Answer(len(self.tokens), self.answer, 4)
        return Sample(lambda: iter([both[:5], both[5:5], both[5:]]), len(both), (answer,))


def questions_of(num: int, lengths: list[int], answer_len: int = 3, seed: int = 5) -> list[Question]:
    generator = np.random.default_rng(seed)
    return [
        Question(generator.integers(VOCAB, size=n), generator.integers(VOCAB, size=answer_len))
        for _, n in zip(range(num), itertools.cycle(lengths), strict=False)
    ]


def answered_by(model: RecurrentModel, question: Question) -> Question:
    """The question with the answer that greedy decoding writes."""
    written = rmt_core.generate(model, [question.tokens.tolist()], len(question.answer)).tokens[0]
    return question._replace(answer=np.array(written))


def batch_answers(model: RecurrentModel, questions: list[Question], memories: Sequence[str]) -> dict[str, list[bool]]:
    marks = batch_marks(model, [question.sample() for question in questions], memories, BYTES)
    return {memory: [bool(one.all()) for one in right] for memory, right in marks.right.items()}


@pytest.mark.parametrize("memory", ["none", "rmt", "xl+rmt"])
@pytest.mark.parametrize("length", [10, 11, 12, 13])  # the answer in one segment, or over a segment's end
def test_an_answer_is_right_when_greedy_decoding_writes_it(memory: str, length: int) -> None:
    model = tiny_model(TINY_MEMORIES[memory], segment_len=6)
    questions = questions_of(4, [length])
    right = [answered_by(model, question) for question in questions]
    spoilt = [
        one._replace(answer=np.where(np.arange(3) == i, (one.answer + 1) % VOCAB, one.answer))
        for i, one in enumerate(right[:3])
    ]
    assert all(batch_answers(model, right, ["true"])["true"])
    assert not any(batch_answers(model, spoilt, ["true"])["true"])


@pytest.mark.parametrize("lengths", [[13, 13, 13, 14, 15], [7, 25, 18, 12, 31]])  # a row may end before its neighbour
def test_ablated_answers_equal_a_naive_loop(lengths: list[int]) -> None:
    model = tiny_model(TINY_MEMORIES["rmt"], segment_len=6)
    questions = questions_of(5, lengths, answer_len=1)
    rows = [question.tokens.tolist() for question in questions]
    likeliest = {
        memory: [logits[-1].argmax().item() for logits in naive_logits(model, rows, memory)] for memory in MEMORIES
    }
    for answers in likeliest.values():
        asked = [one._replace(answer=np.array([token])) for one, token in zip(questions, answers, strict=True)]
        found = batch_answers(model, asked, MEMORIES)
        for memory in MEMORIES:
            assert found[memory] == [a == b for a, b in zip(likeliest[memory], answers, strict=True)]
    assert len({tuple(answers) for answers in likeliest.values()}) == 3


def test_answers_in_a_ragged_batch_equal_those_alone() -> None:
    model = tiny_model(TINY_MEMORIES["xl+rmt"], segment_len=6)
    questions = questions_of(6, [7, 19, 12, 30], answer_len=2)
    questions = [answered_by(model, one) if i % 2 else one for i, one in enumerate(questions)]
    together = batch_answers(model, questions, ["true", "zeroed"])
    for i, question in enumerate(questions):
        alone = batch_answers(model, [question], ["true", "zeroed"])
        assert [together[memory][i] for memory in alone] == [alone[memory][0] for memory in alone]


def test_each_of_several_answers_counts_by_itself() -> None:
    model = tiny_model(TINY_MEMORIES["rmt"], segment_len=6)
    tokens = np.random.default_rng(3).integers(VOCAB, size=40)
    [logits] = naive_logits(model, [tokens.tolist()], "true")
    answers, wanted = [], []
    for at in (11, 12, 13, 18, 25, 39):  # some rightly: the text itself is changed nowhere
        tokens[at] = int(logits[at - 1].argmax()) if at in (12, 39) else tokens[at]
        [logits] = naive_logits(model, [tokens.tolist()], "true")
        answers.append(Answer(at, tokens[at : at + 1], 4))
    wanted = [int(logits[answer.at - 1].argmax()) == tokens[answer.at] for answer in answers]
    marks = batch_marks(model, [Sample(lambda: iter([tokens]), 40, tuple(answers))], ["true"], BYTES)
    assert marks.right["true"][0].tolist() == wanted
    assert 0 < sum(wanted) < len(wanted)


@pytest.mark.parametrize("lengths", [[12, 12, 12], [7, 25, 18]])
def test_scorers_get_what_each_memory_writes(lengths: list[int]) -> None:
    model = byte_model(segment_len=6)
    questions = questions_of(3, lengths)
    heard: list[str] = []

    def mark(written: str) -> float:
        heard.append(written)
        return 0.25

    scorer = Scorer("length", mark)
    batch = [dataclasses.replace(one.sample(), scorers=(scorer,), max_new_tokens=9) for one in questions]
    marks = batch_marks(model, batch, MEMORIES, BYTES)
    assert marks.scores == {memory: [{"length": 0.25}] * 3 for memory in MEMORIES}

    def written(tokens: np.ndarray, session: rmt_core.Session | None = None) -> str:
        return BYTES.decode(
            rmt_core.generate(model, [tokens.tolist()], 9, session=session, stop_tokens=[256]).tokens[0]
        )

    whole = [written(one.tokens) for one in questions]
    starts = [(len(one.tokens) - 1) // 6 * 6 for one in questions]
    carried = [model.init_state(1) for _ in questions]
    given: list[list[Any]] = []  # each row's state before each segment, or at its end
    for start in range(0, max(lengths) + 2, 6):
        given.append(list(carried))
        for row, one in enumerate(questions):
            if len(piece := np.concatenate([one.tokens, one.answer[:-1]])[start : start + 6]):
                carried[row] = model.step(torch.from_numpy(piece)[None], carried[row])[1]

    def alone(question: Question, start: int, state: Any) -> str:
        """Greedy writing, a segment at a time, each of which is given this state."""
        open_tokens, found = question.tokens[start:].tolist(), []
        for _ in range(9):
            logits = model.step(torch.tensor([open_tokens]), state)[0].logits[0, -1]
            found.append(int(logits.argmax()))
            open_tokens = [*(open_tokens if len(open_tokens) < 6 else []), found[-1]]
        return BYTES.decode(found[: found.index(256)] if 256 in found else found)

    zeroed = [alone(one, at, carried[0] * 0) for one, at in zip(questions, starts, strict=True)]
    shuffled = [
        alone(one, at, given[at // 6][i - 1]) for i, (one, at) in enumerate(zip(questions, starts, strict=True))
    ]
    assert sorted(heard) == sorted([*whole, *zeroed, *shuffled])


def test_rows_of_an_ablated_memory_write_as_each_alone_up_to_the_end_token() -> None:
    model, states = byte_model(segment_len=6), torch.randn(3, *byte_model().init_state(1).shape[1:]).double()
    prompts = [[5, 6], [7, 8, 9, 10, 11], [1, 2, 3, 4, 5, 6]]

    def written(rows: list[int], ends: list[int]) -> list[list[int]]:
        session = rmt_core.open_session(model, len(rows))._replace(state=states[rows])
        return questions._written_from_one_state(model, [prompts[row] for row in rows], 20, session, ends)

    alone = [written([row], [])[0] for row in range(3)]
    assert written([0, 1, 2], []) == alone
    assert [len(one) for one in alone] == [20] * 3
    end = alone[1][8]
    stopped = [one[: one.index(end)] if end in one else one for one in alone]
    assert written([0, 1, 2], [end]) == stopped
    assert len({len(one) for one in stopped}) > 1


def test_writing_ends_at_the_end_token() -> None:
    model, [question] = byte_model(segment_len=6), questions_of(1, [20])
    tokens = rmt_core.generate(model, [question.tokens.tolist()], 9).tokens[0]
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = tokens[4]
    heard: list[str] = []
    scorer = Scorer("heard", lambda written: float(heard.append(written) or 1))
    sample = dataclasses.replace(question.sample(), scorers=(scorer,), max_new_tokens=9)
    batch_marks(model, [sample], ["true"], tokenizer)
    assert heard == [BYTES.decode(tokens[: tokens.index(tokens[4])])]


@pytest.mark.parametrize("background", ["prose", "noise"])
def test_recall_gives_fractions_with_interval_and_chance(background: str) -> None:
    figures = TASKS["recall"].measure(byte_model(), 160, material(background=background))
    assert [figure.memory for figure in figures] == list(MEMORIES)
    for figure in figures:
        assert (figure.metric, figure.num_samples, figure.chance) == ("accuracy", 6, pytest.approx(1 / 16))
        assert figure.low is not None
        assert figure.high is not None
        assert 0 <= figure.low <= figure.value <= figure.high <= 1


def test_samples_whose_values_are_no_numbers_are_told_and_wrong() -> None:
    model = byte_model(segment_len=50)
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight[BYTES.encode("#")] = float("nan")
    figures = TASKS["detect"].measure(model, 120, material(background="noise"))
    assert {figure.memory: figure.value for figure in figures if figure.metric == "accuracy"}["true"] == 0
    told = {figure.memory: figure.value for figure in figures if figure.metric == "num_not_finite"}
    assert told == {"true": 6, "zeroed": 0, "shuffled": 6}  # a zeroed memory has not seen it
    sound = TASKS["detect"].measure(byte_model(segment_len=50), 120, material(background="noise"))
    assert not [figure for figure in sound if figure.metric == "num_not_finite"]


def test_a_recalled_fact_ends_before_the_segment_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Sample] = []

    def marks(model: Any, batch: list[Sample], memories: tuple[str, ...], tokenizer: Any, **settings: Any) -> Marks:
        drawn.extend(batch)
        return Marks(
            {memory: [np.zeros(1, dtype=bool) for _ in batch] for memory in memories},
            {memory: [{} for _ in batch] for memory in memories},
            {memory: [False for _ in batch] for memory in memories},
        )

    monkeypatch.setattr("pipelines.tasks.questions.batch_marks", marks)
    model = byte_model(segment_len=50)
    for length in (102, 130, 150, 300):
        drawn.clear()
        figures = TASKS["recall"].measure(model, length, material(num_samples=50))
        assert figures[0].needs_memory
        for sample in drawn:
            tokens = texts.whole(sample.stream)
            assert len(tokens) == sample.num_tokens == length
            [answer] = sample.answers
            answering = (answer.at - 1) // 50 * 50
            assert b"secret key is" not in BYTES.decode_bytes(tokens[answering : answer.at])[:-19]
            assert BYTES.decode_bytes(tokens[:answering]).count(BYTES.decode_bytes(answer.tokens) + b".") >= 1
    assert not TASKS["recall"].measure(model, 50, material())[0].needs_memory


def test_recall_is_the_same_for_the_same_seed_and_any_batch() -> None:
    model = byte_model()
    one, two, other = (
        [figure.value for figure in TASKS["recall"].measure(model, 90, material(batch_size=size, seed=seed))][:2]
        for size, seed in ((2, 1), (6, 1), (6, 2))
    )
    assert one == two
    assert len(other) == 2


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_its_published_values(num_right: int, num: int, low: float, high: float) -> None:
    assert wilson_interval(num_right, num) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(num - num_right, num)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_holds_what_was_measured() -> None:
    for num in range(1, 400):
        for num_right in (0, 1, num // 2, num - 1, num):
            low, high = wilson_interval(num_right, num)
            assert 0 <= low <= num_right / num <= high <= 1, (num_right, num)


# --- what tasks share -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_no_batch_is_a_single_row(batch_size: int) -> None:
    assert batch_sizes(1, batch_size) == [1]
    for num in range(2, 40):
        sizes = batch_sizes(num, batch_size)
        assert sum(sizes) == num
        assert min(sizes) >= 2
        assert max(sizes) <= max(3, batch_size)


def test_logits_in_pieces_are_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(segment_len=6)
    hidden = torch.randn(7, 32, dtype=torch.float64)
    monkeypatch.setattr(base, "_HEAD_FLOATS", 2 * VOCAB + 1)
    found = list(base.logits_in_pieces(model, hidden))
    assert len(found) == 4
    together = torch.cat([logits for _, logits in found])
    assert torch.allclose(together, model.backbone.head(hidden), rtol=0, atol=1e-12)


def test_every_task_names_settings_that_exist() -> None:
    known = set(Material.__dataclass_fields__)
    for task in TASKS.values():
        assert task.settings <= known
