"""Lanes that read texts of tasks: whole samples with their answers weighted, the same for any number of workers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipelines.config import InputError, build
from pipelines.data import lanes
from pipelines.data.books import BookStore
from pipelines.data.task_lanes import Choice, TaskLane, TaskSource, store_prose
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, mark, recall, texts
from pipelines.tasks.questions import QuestionTask
from pipelines.training.reading import make_lanes
from pipelines.training.settings import TrainConfig, num_segments_at
from tests.pipelines.test_lanes import FakeStore

BYTES = ByteTokenizer()
STORE = BookStore(64)
QUESTIONS = sorted(name for name, task in TASKS.items() if isinstance(task, QuestionTask))


def make(name: str) -> Any:
    task = TASKS[name]
    assert isinstance(task, QuestionTask)
    return task.make


def source_of(choices: Sequence[Choice], segment_len: int = 64, seed: int = 1, text_weight: float = 1.0) -> TaskSource:
    return TaskSource(BYTES, choices, segment_len, seed=seed, text_weight=text_weight, answer_weight=30.0)


def facts() -> TaskSource:
    return source_of([Choice("recall", recall.detect, store_prose(STORE))])


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_row_is_a_sample_with_its_answers_weighted(name: str) -> None:
    source = source_of([Choice(name, make(name), texts.noise(BYTES))], text_weight=0.5)
    num_segments = 60
    for step in range(2):
        window = lanes.Lanes([TaskLane(source, 3)], 64).window(step, num_segments)
        sample = source.draw(step, 3, num_segments)
        tokens = [token for block in sample.stream() for token in block.tolist()]
        size = len(tokens)
        assert 64 * (num_segments - 1) < size == sample.num_tokens <= 64 * num_segments
        row = {field: getattr(window, field)[0].reshape(-1) for field in ("tokens", "labels", "weights", "is_answer")}
        assert row["tokens"].tolist() == tokens + [0] * (64 * num_segments - size)
        asked = {answer.at + i: token for answer in sample.answers for i, token in enumerate(answer.tokens.tolist())}
        end = max(asked)  # what stands behind the last answer is trained like it
        for place in range(64 * num_segments):
            follows = place + 1
            assert row["labels"][place] == (tokens[follows] if follows < size else -100)
            assert row["weights"][place] == (
                30 if follows in asked or end < follows < size else 0.5 if follows < size else 0
            )
            assert row["is_answer"][place] == (follows in asked)
            assert follows not in asked or asked[follows] == tokens[follows]
        assert window.lengths[0].tolist() == [min(64, max(0, size - 64 * i)) for i in range(num_segments)]
        assert window.reset[0].tolist() == [True] + [False] * (num_segments - 1)
        assert window.segment_index[0].tolist() == list(range(num_segments))


def test_so_many_texts_begin_with_a_fresh_memory_and_all_are_the_same() -> None:
    choice = Choice("recall", recall.detect, store_prose(STORE))

    def windows(fraction: float) -> list[lanes.Window]:
        source = TaskSource(BYTES, [choice], 64, seed=1, text_weight=1.0, answer_weight=30.0, fresh_fraction=fraction)
        rows = lanes.Lanes([TaskLane(source, number) for number in range(8)], 64)
        return [rows.window(step, 2) for step in range(60)]

    always, seldom, never = windows(1.0), windows(0.25), windows(0.0)
    assert all(window.reset[:, 0].all() for window in always)
    assert seldom[0].reset[:, 0].all()
    assert never[0].reset[:, 0].all()
    assert not any(window.reset.any() for window in never[1:])
    assert 0.18 < np.mean([window.reset[:, 0] for window in seldom[1:]]) < 0.32
    assert not any(window.reset[:, 1].any() for window in seldom)
    for one, other in zip(always, seldom, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.labels, other.labels)


def test_text_that_weighs_nothing_is_not_asked_for() -> None:
    choice = Choice("recall", recall.detect, store_prose(STORE))
    weighed, bare = (
        lanes.Lanes([TaskLane(source_of([choice], text_weight=weight), 3)], 64).window(0, 4) for weight in (0.5, 0.0)
    )
    for field in ("tokens", "lengths", "reset", "segment_index", "is_answer"):
        assert np.array_equal(getattr(bare, field), getattr(weighed, field)), field
    assert bare.is_answer.any()
    assert np.array_equal(bare.labels, np.where(bare.is_answer, weighed.labels, lanes.IGNORED))
    assert np.array_equal(bare.weights, np.where(bare.is_answer, weighed.weights, 0))


def test_the_end_of_a_story_is_asked_for_where_its_text_weighs_nothing() -> None:
    source = source_of([Choice("qa1", make("qa1"), texts.noise(BYTES))], text_weight=0.0)
    window = lanes.Lanes([TaskLane(source, 3)], 64).window(0, 8)
    [answer] = source.draw(0, 3, 8).answers
    labels = window.labels[window.weights > 0]
    assert BYTES.decode(labels) == BYTES.decode(answer.tokens) + "."
    assert BYTES.decode(window.labels[window.is_answer]) == BYTES.decode(answer.tokens)


def test_a_text_ends_anywhere_in_the_last_segment_and_asks_for_what_stood_before_it() -> None:
    source, ends = facts(), set()
    for step in range(40):
        window = lanes.Lanes([TaskLane(source, 0)], 64).window(step, 3)
        text = bytes(window.tokens[0].reshape(-1)[: window.lengths.sum()].astype(np.uint8)).decode()
        letter = text[-1]
        assert text.endswith(f"\nThe secret key is {letter}")
        assert 128 < window.lengths.sum() <= 192
        ends.add(int(window.lengths.sum()))
        answers = window.labels[window.is_answer]
        assert bytes(answers.astype(np.uint8)).decode() == f" {letter}"
        fact = f"\nThe secret key is {letter}.\n"
        answer_at = int(window.is_answer[0].reshape(-1).argmax())
        assert text.index(fact) + len(fact) <= answer_at // 64 * 64
    assert len(ends) > 20


def test_texts_differ_by_step_lane_and_seed_and_repeat() -> None:
    def drawn(source: TaskSource, step: int, lane: int) -> bytes:
        return texts.whole(source.draw(step, lane, 2).stream).tobytes()

    draws = {(step, lane): drawn(facts(), step, lane) for step in (0, 1) for lane in (0, 1)}
    assert len(set(draws.values())) == 4
    assert drawn(facts(), 1, 0) == draws[1, 0]
    other = source_of([Choice("recall", recall.detect, store_prose(STORE))], seed=2)
    assert drawn(other, 1, 0) != draws[1, 0]


def test_tasks_are_mixed_by_weight_and_facts_stand_at_the_depths() -> None:
    noise = texts.noise(BYTES)
    choices = [Choice("detect", mark.detect, noise, 3.0, (0.0, 1.0)), Choice("recall", recall.detect, noise)]
    source = source_of(choices)
    found: Counter[int] = Counter()
    for step in range(400):
        text = BYTES.decode(texts.whole(source.draw(step, 0, 3).stream))
        place = text.find("#")
        found[place] += 1
    assert set(found) <= {-1, 0, 62, 126}  # in front, or just before the segment that asks, where it is the 2nd or 3rd
    assert found[-1] == pytest.approx(100, abs=30)
    assert found[0] == pytest.approx(150, abs=40)
    assert source.describe().startswith("rows read texts of detect (75%), recall (25%)")


@pytest.mark.parametrize("num_workers", [2, 3])
def test_rows_do_not_depend_on_how_many_workers_read_them(num_workers: int) -> None:
    settings = {"tasks": ["reason", {"task": "detect", "background": "noise"}], "task_fraction": 0.5}
    config = build(TrainConfig, {"batch_size": 6, "dataset": settings})
    whole = lanes.Lanes(make_lanes(config, STORE, BYTES), 64).window(7, 3)
    for rank in range(num_workers):
        mine = lanes.Lanes(make_lanes(config, STORE, BYTES)[rank::num_workers], 64).window(7, 3)
        assert np.array_equal(mine.tokens[: 3 // num_workers], whole.tokens[:3][rank::num_workers][: 3 // num_workers])
        assert np.array_equal(mine.weights, whole.weights[rank::num_workers])


@pytest.mark.parametrize("name", QUESTIONS)
def test_windows_just_long_enough_are_filled_and_shorter_ones_refused(name: str) -> None:
    """Where some samples of a task fit and others do not, those that fit are read."""
    source = source_of([Choice(name, make(name), texts.noise(BYTES))])
    refused = [num for num in range(1, 60) if not fits(source, num)]
    assert refused == list(range(1, len(refused) + 1))
    if refused:
        with pytest.raises(InputError, match=rf"too short for the facts, questions and answers of {name} \(\d+ tokens"):
            source.check(len(refused))


def fits(source: TaskSource, num_segments: int) -> bool:
    try:
        source.draw(0, 0, num_segments)
    except InputError:
        return False
    return True


def test_the_mean_length_is_that_of_the_texts() -> None:
    source = source_of(
        [Choice("detect", mark.detect, texts.noise(BYTES)), Choice("recall", recall.detect, store_prose(STORE))]
    )
    for num_segments in (1, 3):
        drawn = [source.draw(step, 0, num_segments).num_tokens for step in range(600)]
        assert source.mean_len(num_segments) == pytest.approx(np.mean(drawn), rel=0.05)


def test_prose_comes_from_the_store_and_short_documents_start_over() -> None:
    drawn = texts.whole(store_prose(FakeStore([5]))(12, np.random.default_rng(0)))
    assert len(drawn) == 12
    assert set((drawn[1:] - drawn[:-1]).tolist()) == {1, -4}


def test_varied_windows_have_at_least_so_many_segments() -> None:
    changes = {"num_segments": [3], "steps": [100], "least_segments": 2}
    curriculum = build(TrainConfig, {"curriculum": changes}).curriculum
    assert {num_segments_at(curriculum, 0, window, 0) for window in range(100)} == {2, 3}
    assert curriculum.shortest == 2
