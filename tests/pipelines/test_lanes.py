"""Lanes: every segment once an epoch, in order, for any number of workers; planted facts that can be told."""

import numpy as np
import pytest

from pipelines.config import InputError
from pipelines.data import lanes
from pipelines.data.books import BookStore
from pipelines.data.store import DocumentEntry
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import recall

SEGMENT_LEN = 8
EOS = 256


class FakeStore:
    """Documents of known lengths whose tokens name their document and place."""

    segment_len = SEGMENT_LEN

    def __init__(self, sizes: list[int]) -> None:
        self.manifest = [
            DocumentEntry(str(i), "", size, size, -(-size // SEGMENT_LEN), "", 0, "") for i, size in enumerate(sizes)
        ]

    def tokens(self, number: int) -> np.ndarray:
        return (1000 * number + np.arange(self.manifest[number].num_tokens)).astype(np.int32)

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray:
        return self.tokens(int(document.document_id))[start * SEGMENT_LEN : stop * SEGMENT_LEN]


def document_lanes(store: FakeStore, num_lanes: int, piece_segments: int | None = None) -> list[lanes.DocumentLane]:
    source = lanes.DocumentSource(store, num_lanes, seed=3, eos_id=EOS, piece_segments=piece_segments)
    return [lanes.DocumentLane(source, number, lanes.Cursor()) for number in range(num_lanes)]


SIZES = [50, 7, 8, 9, 33, 64, 1, 20, 16, 41, 5, 90]


@pytest.mark.parametrize("piece_segments", [None, 1, 3])
def test_an_epoch_holds_every_token_once_and_in_order(piece_segments: int | None) -> None:
    store = FakeStore(SIZES)
    read: dict[int, list[int]] = {number: [] for number in range(len(SIZES))}
    for lane in document_lanes(store, 4, piece_segments):
        while lane.cursor.epoch == 0:
            window = lanes.Lanes([lane], SEGMENT_LEN).window(0, 1)
            tokens = window.tokens[0, 0, : window.lengths[0, 0]]
            if lane.cursor.epoch == 0 or len(tokens):
                read[int(tokens[0]) // 1000].extend(tokens.tolist())
    for number in range(len(SIZES)):
        assert sorted(read[number]) == store.tokens(number).tolist()
        if piece_segments is None:
            assert read[number] == store.tokens(number).tolist()


def test_labels_are_the_next_token_across_segments_and_the_end_token_last() -> None:
    store = FakeStore([20])
    window = lanes.Lanes(document_lanes(store, 1), SEGMENT_LEN).window(0, 3)
    tokens = np.concatenate([window.tokens[0, i, :n] for i, n in enumerate(window.lengths[0])])
    labels = np.concatenate([window.labels[0, i, :n] for i, n in enumerate(window.lengths[0])])
    assert tokens.tolist() == list(range(20))
    assert labels.tolist() == [*range(1, 20), EOS]
    assert window.lengths.tolist() == [[8, 8, 4]]
    assert (window.labels[0, 2, 4:] == lanes.IGNORED).all()
    assert (window.weights[window.labels == lanes.IGNORED] == 0).all()


def test_a_piece_that_is_not_the_documents_last_predicts_the_next_piece() -> None:
    lane = document_lanes(FakeStore([20]), 1, piece_segments=1)[0]
    seen = {}
    for _ in range(3):
        window = lanes.Lanes([lane], SEGMENT_LEN).window(0, 1)
        last = int(window.lengths[0, 0]) - 1
        seen[int(window.tokens[0, 0, last])] = int(window.labels[0, 0, last])
        assert window.reset[0, 0]
    assert seen == {7: 8, 15: 16, 19: EOS}


def test_resets_stand_where_documents_begin_and_only_there() -> None:
    store = FakeStore(SIZES)
    window = lanes.Lanes(document_lanes(store, 3), SEGMENT_LEN).window(0, 12)
    starts = window.tokens[..., 0] % 1000 == 0
    assert (window.reset == starts).all()
    assert (window.segment_index == (window.tokens[..., 0] % 1000) // SEGMENT_LEN).all()


@pytest.mark.parametrize("num_segments", [1, 2, 5])
def test_windows_of_any_size_and_a_restart_anywhere_give_the_same_stream(num_segments: int) -> None:
    store = FakeStore(SIZES)
    whole = lanes.Lanes(document_lanes(store, 2), SEGMENT_LEN).window(0, 40)
    cut = document_lanes(store, 2)
    parts = []
    for _ in range(40 // num_segments):
        again = document_lanes(store, 2)  # as after a restart: new lanes, the old cursors
        for lane, old in zip(again, cut, strict=True):
            lane.cursor = lanes.Cursor(*old.cursor)
        cut = again
        parts.append(lanes.Lanes(cut, SEGMENT_LEN).window(0, num_segments))
    for name in ("tokens", "labels", "lengths", "reset", "segment_index"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts], axis=1), getattr(whole, name))


def test_the_plan_is_balanced_seeded_and_whole() -> None:
    pieces = lanes.cut_pieces(FakeStore(SIZES).manifest, None)
    planned = lanes.plan(pieces, 4, 0, 1)
    assert sorted(piece for lane in planned for piece in lane) == pieces
    loads = [sum(piece.num_segments for piece in lane) for lane in planned]
    assert max(loads) - min(loads) <= max(piece.num_segments for piece in pieces)
    assert lanes.plan(pieces, 4, 0, 1) == planned
    assert lanes.plan(pieces, 4, 1, 1) != planned != lanes.plan(pieces, 4, 0, 2)
    assert 0 <= lanes.padding_fraction(planned) < 0.5


def test_workers_share_the_lanes_without_changing_them() -> None:
    store = FakeStore(SIZES)
    whole = lanes.Lanes(document_lanes(store, 4), SEGMENT_LEN).window(0, 6)
    for rank in range(2):
        mine = lanes.Lanes(document_lanes(store, 4)[rank::2], SEGMENT_LEN).window(0, 6)
        assert np.array_equal(mine.tokens, whole.tokens[rank::2])


def test_more_lanes_than_documents_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"3 documents cannot fill 4 lanes.*at most 3.*piece_segments"):
        document_lanes(FakeStore([9, 9, 9]), 4)[0].source.lane(0, 0)


def facts(text_weight: float = 1.0) -> lanes.RecallSource:
    return lanes.RecallSource(
        ByteTokenizer(), lanes.store_prose(BookStore(64)), seed=1, text_weight=text_weight, answer_weight=30.0
    )


def test_a_planted_text_fills_its_window_and_asks_for_its_fact() -> None:
    source, ends = facts(), set()
    for step in range(40):
        window = lanes.Lanes([lanes.RecallLane(source, 0)], 64).window(step, 3)
        text = bytes(window.tokens[0].reshape(-1)[: window.lengths.sum()].astype(np.uint8)).decode()
        letter = text[-1]
        assert recall.FACT.format(letter) in text
        assert text.endswith(recall.QUESTION + recall.ANSWER.format(letter))
        assert 128 < window.lengths.sum() <= 192
        ends.add(int(window.lengths.sum()))
        answers = window.labels[window.is_answer]
        assert bytes(answers.astype(np.uint8)).decode() == recall.ANSWER.format(letter)
        assert (window.weights[window.is_answer] == 30).all()
        assert window.reset.tolist() == [[True, False, False]]
        answer_at = int(window.is_answer[0].reshape(-1).argmax())
        assert text.index(recall.FACT.format(letter)) + len(recall.FACT) <= answer_at // 64 * 64
    assert len(ends) > 20  # the question falls anywhere in the last segment


def test_planted_texts_differ_by_step_and_lane_and_repeat_by_seed() -> None:
    draws = {(step, lane): facts().draw(step, lane, 2, 64).tokens.tobytes() for step in (0, 1) for lane in (0, 1)}
    assert len(set(draws.values())) == 4
    assert facts().draw(1, 0, 2, 64).tokens.tobytes() == draws[1, 0]


def test_a_window_too_short_for_a_fact_is_refused() -> None:
    with pytest.raises(InputError, match="too short for a planted fact"):
        facts().draw(0, 0, 1, 40)


def test_prose_comes_from_the_store_and_short_documents_start_over() -> None:
    store = FakeStore([5])
    drawn = lanes.store_prose(store)(12, np.random.default_rng(0))
    assert len(drawn) == 12
    assert set((drawn[1:] - drawn[:-1]).tolist()) == {1, -4}
