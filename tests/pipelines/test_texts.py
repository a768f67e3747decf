"""Texts that are made while they are read, against the same texts made at once."""

import tracemalloc

import numpy as np
import pytest

from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, needle, texts
from pipelines.tasks.base import Material
from pipelines.tasks.held_out import TextHeldOut
from pipelines.tasks.questions import QuestionTask
from pipelines.tasks.samples import Sample, Scene, TooShortError
from pipelines.tasks.texts import Insert

BYTES = ByteTokenizer()
QUESTIONS = {name: task for name, task in TASKS.items() if isinstance(task, QuestionTask)}


class Documents:
    """Several documents whose tokens count up through all of them."""

    name = "numbers"
    fingerprint = "f"

    def __init__(self, sizes: list[int]) -> None:
        self.num_tokens = sizes

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        before = sum(self.num_tokens[:document])
        return np.arange(before + start, before + stop)


def material(num_tokens: int = 5000) -> Material:
    tokens = np.random.default_rng(0).integers(97, 123, size=num_tokens).astype(np.int32)
    return Material(BYTES, TextHeldOut("random", "f", tokens))


@pytest.mark.parametrize("sizes", [[10], [3, 0, 4, 1], [1, 1]])
def test_prose_goes_through_the_documents_and_begins_again(sizes: list[int]) -> None:
    total = sum(sizes)
    for seed in range(20):
        stream = texts.prose(Documents(sizes))(2 * total + 3, np.random.default_rng(seed))
        found = texts.whole(stream)
        assert found.tolist() == [(found[0] + i) % total for i in range(2 * total + 3)]
        assert found[0] == np.random.default_rng(seed).integers(total)


def test_a_stream_gives_the_same_tokens_whenever_it_is_opened() -> None:
    hay = needle.in_hay(Scene(BYTES, texts.noise(BYTES))).background
    for background in (texts.noise(BYTES), texts.prose(Documents([7])), hay):
        stream = background(200_000, np.random.default_rng(1))
        first = texts.whole(stream)
        assert len(first) == 200_000
        assert np.array_equal(first, texts.whole(stream))
        assert max(len(block) for block in stream()) <= 2**16


@pytest.mark.parametrize("num", [0, 1, 5, 6, 7, 2**16 + 5])
def test_whole_blocks_are_filled_up_to_the_length(num: int) -> None:
    blocks = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7])]
    found = np.concatenate(list(texts.filled(lambda: iter(blocks), num, np.array([9]))) or [np.zeros(0)]).tolist()
    whole = {0: [], 1: [], 5: [1, 2, 3, 4, 5], 6: [1, 2, 3, 4, 5]}.get(num, [1, 2, 3, 4, 5, 6, 7])
    assert found == [*whole, *[9] * (num - len(whole))]


@pytest.mark.parametrize("cuts", [[10], [4, 6], [1, 0, 8, 1], []])
def test_inserts_stand_where_they_would_in_the_whole_text(cuts: list[int]) -> None:
    parts = np.split(np.arange(sum(cuts)), np.cumsum(cuts)[:-1]) if cuts else []
    generator = np.random.default_rng(2)
    for _ in range(50):
        inserts = [Insert(int(generator.integers(sum(cuts) + 1)), np.array([100 + i, 200 + i])) for i in range(4)]
        naive = []
        for at in range(sum(cuts) + 1):
            naive += [int(token) for insert in inserts if insert.at == at for token in insert.tokens]
            naive += [at] if at < sum(cuts) else []
        found = texts.whole(texts.joined(lambda: iter(parts), inserts, np.array([7])))
        assert found.tolist() == [*naive, 7]


@pytest.mark.parametrize("latest", [None, 13, 27])
def test_between_blocks_no_block_is_cut_and_an_insert_goes_to_the_nearer_end(latest: int | None) -> None:
    blocks = [np.array([i] * 5) for i in range(6)]
    for at in range((30 if latest is None else latest) + 1):
        inserts = [Insert(at, np.array([77])), Insert(at, np.array([78]))]
        found = texts.whole(
            texts.joined(lambda: iter(blocks), inserts, np.array([]), between_blocks=True, latest=latest)
        ).tolist()
        allowed = [place for place in range(0, 31, 5) if latest is None or place <= latest]
        assert found.index(77) == min(allowed, key=lambda place: abs(place - at))
        assert found.index(78) == found.index(77) + 1
        assert [token for token in found if token < 77] == np.repeat(np.arange(6), 5).tolist()


@pytest.mark.parametrize("latest", [None, 9, 3])
def test_between_sentences_an_insert_goes_to_the_nearest_start_of_one_in_its_block(latest: int | None) -> None:
    text = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2])  # 0 ends a sentence
    blocks = np.split(text, [12, 15, 17])
    starts = [[0, 5, 11], [], [17], [17]]  # by block, at any place; a block that follows an end begins with a start
    for at in range((20 if latest is None else latest) + 1):
        found = texts.whole(
            texts.joined(lambda: iter(blocks), [Insert(at, np.array([7]))], np.array([]), ends=(0,), latest=latest)
        ).tolist()
        block = int(np.searchsorted([12, 15, 17, 20], at, side="right"))
        allowed = [place for place in starts[block] if latest is None or place <= latest] if block < 4 else []
        assert found.index(7) == min(allowed or [at], key=lambda place: abs(place - at))


@pytest.mark.parametrize("at", [0, 7, 12, 20])
def test_without_sentences_an_insert_stands_just_at_its_place(at: int) -> None:
    blocks = np.split(np.ones(20, dtype=np.int64), [12])
    found = texts.whole(texts.joined(lambda: iter(blocks), [Insert(at, np.array([7]))], np.array([]), ends=(0,)))
    assert found.tolist().index(7) == at


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_blocks_are_the_text_cut_evenly(size: int) -> None:
    parts = [np.arange(5), np.arange(0), np.arange(17), np.arange(1), np.arange(9)]
    together = np.concatenate(parts)
    found = list(texts.in_blocks(parts, size))
    assert [block.tolist() for block in found] == [
        together[i : i + size].tolist() for i in range(0, len(together), size)
    ]


# --- samples ----------------------------------------------------------------------------------------


def draw(name: str, index: int, length: int, segment_len: int = 64) -> Sample | None:
    try:
        return QUESTIONS[name]._sample(index, length, segment_len, material())
    except TooShortError as error:
        assert error.need > length  # noqa: PT017
        return None


@pytest.mark.parametrize("name", QUESTIONS)
def test_samples_have_the_wanted_length_and_hold_their_answers(name: str) -> None:
    drawn, has_full_stop = 0, name.startswith(("qa", "people", "moved"))
    for index, length in enumerate((90, 130, 400, 1000, 1001, 3000, 9000)):
        sample = draw(name, index, length)
        if sample is None:
            continue
        drawn += 1
        tokens = texts.whole(sample.stream)
        assert len(tokens) == sample.num_tokens
        assert length - 20 < sample.num_tokens <= length or name in ("copy", "reverse")
        assert tokens.min() >= 0
        assert tokens.max() < BYTES.vocab_size
        for answer, following in zip(sample.answers, [*sample.answers[1:], None], strict=True):
            end = answer.at + len(answer.tokens)
            assert tokens[answer.at : end].tolist() == answer.tokens.tolist()
            assert end <= following.at if following else end == len(tokens) - has_full_stop
        again = draw(name, index, length)
        assert again is not None
        assert np.array_equal(texts.whole(again.stream), tokens)
        other = draw(name, index + 1, length)
        assert other is None or not np.array_equal(texts.whole(other.stream), tokens)
    assert drawn >= 2


@pytest.mark.parametrize("name", QUESTIONS)
def test_memory_stays_flat_at_any_length(name: str) -> None:
    """The first million tokens of 50 million: what is drawn beforehand and what is kept is small."""
    sample = QUESTIONS[name]._sample(0, 50_000_000, 1024, material())
    assert sample.num_tokens > 49_999_900
    blocks = texts.in_blocks(sample.stream(), 1024)
    for _ in range(10):
        next(blocks)
    tracemalloc.start()
    try:
        for _ in range(200):
            next(blocks)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_short_texts_are_encoded_once_and_long_ones_each_time() -> None:
    class Counting(ByteTokenizer):
        asked: list[str]

        def encode_inside(self, text: str) -> np.ndarray:
            self.asked.append(text)
            return self.encode(text).astype(np.int64)

    tokenizer = Counting()
    tokenizer.asked = []
    remembered = texts.Remembered(tokenizer)
    short, long = "\nMary went to the garden.\n", "x" * 10_000
    for text in [short, long, short, long]:
        np.testing.assert_array_equal(remembered.encode_inside(text), BYTES.encode(text))
        np.testing.assert_array_equal(remembered.encode(text), BYTES.encode(text))
    assert tokenizer.asked == [short, long, long]
    with pytest.raises(ValueError, match="read-only"):
        remembered.encode_inside(short)[0] = 1
