"""Lanes: every segment once an epoch, in order, for any number of workers."""

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from pipelines.config import InputError
from pipelines.data import lanes, plan, sampling, task_lanes
from pipelines.data.plan import Share
from pipelines.data.prefetch import Prefetched
from pipelines.data.store import DocumentEntry
from pipelines.tasks import texts

SEGMENT_LEN = 8
EOS = 256


class FakeStore:
    """Documents of known lengths whose tokens name their document and place."""

    segment_len = SEGMENT_LEN

    def __init__(self, sizes: list[int], shares: Sequence[Share] = ()) -> None:
        self.shares = shares
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
    pieces = plan.cut_pieces(FakeStore(SIZES).manifest, None)
    planned = plan.plan(pieces, 4, 0, 1)
    assert sorted(piece for lane in planned for piece in lane) == pieces
    loads = [sum(piece.num_segments for piece in lane) for lane in planned]
    assert max(loads) - min(loads) <= max(piece.num_segments for piece in pieces)
    assert plan.plan(pieces, 4, 0, 1) == planned
    assert plan.plan(pieces, 4, 1, 1) != planned != plan.plan(pieces, 4, 0, 2)


def test_workers_share_the_lanes_without_changing_them() -> None:
    store = FakeStore(SIZES)
    whole = lanes.Lanes(document_lanes(store, 4), SEGMENT_LEN).window(0, 6)
    for rank in range(2):
        mine = lanes.Lanes(document_lanes(store, 4)[rank::2], SEGMENT_LEN).window(0, 6)
        assert np.array_equal(mine.tokens, whole.tokens[rank::2])


def test_more_lanes_than_documents_are_refused_with_the_way_out() -> None:
    for shares in ((), [Share(range(0, 2), 1.0), Share(range(2, 3), 5.0)]):
        with pytest.raises(InputError, match=r"3 documents cannot fill 4 lanes.*at most 3.*dataset\.piece_segments"):
            document_lanes(FakeStore([9, 9, 9], shares), 4)[0].source.lane(0, 0)


def test_the_waste_of_a_plan_is_counted() -> None:
    source = document_lanes(FakeStore([8, 8, 16, 3]), 2)[0].source  # of segments of 8: loads 2 and 3
    found = source.figures()
    assert (found.num_lanes, found.num_pieces, found.least_segments, found.most_segments) == (2, 4, 2, 3)
    assert found.padding_fraction == pytest.approx(5 / 40)
    assert found.uneven_fraction == pytest.approx(1 / 6)
    assert "12.5% of it is padding" in source.describe()
    pieces = document_lanes(FakeStore([20]), 1, piece_segments=2)[0].source.figures()
    assert (pieces.num_pieces, pieces.padding_fraction) == (2, pytest.approx(4 / 24))


# --- mixtures -----------------------------------------------------------------------------------------

SHARES = [Share(range(0, 3), 3.0), Share(range(3, 12), 1.0)]


def test_weights_hold_and_a_stores_documents_are_read_equally_often() -> None:
    store = FakeStore(SIZES, SHARES)
    blend = plan.Blend(plan.cut_pieces(store.manifest, 2), SHARES, 4, seed=5)
    num_segments, times = [0, 0], Counter[tuple[int, int]]()
    for epoch in range(40):
        for piece in blend.pieces(epoch):
            num_segments[piece.document >= 3] += piece.num_segments
            times[piece.document, piece.start] += 1
    assert num_segments[0] / sum(num_segments) == pytest.approx(0.75, abs=0.002)
    for share in SHARES:
        counts = [count for (document, _), count in times.items() if document in share.documents]
        assert max(counts) - min(counts) <= 1
        assert {document for document, _ in times} >= set(share.documents)


def test_every_epoch_of_a_mixture_fills_every_lane() -> None:
    """A store of one long document, which begins in few epochs, and few short ones."""
    shares = [Share(range(0, 1), 9.0), Share(range(1, 5), 1.0)]
    store = FakeStore([800, 8, 8, 8, 8], shares)
    source = lanes.DocumentSource(store, 5, seed=1, eos_id=None, piece_segments=None)
    for epoch in range(12):
        assert all(source.lane(number, epoch) for number in range(5))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_mixture_reads_the_same_for_any_number_of_workers_and_from_any_cursor(num_workers: int) -> None:
    store = FakeStore(SIZES, SHARES)
    whole = lanes.Lanes(document_lanes(store, 4), SEGMENT_LEN).window(0, 60)
    for rank in range(num_workers):
        mine = document_lanes(store, 4)[rank::num_workers]
        for step in range(20):
            mine = [lanes.DocumentLane(lane.source, lane.number, lanes.Cursor(*lane.cursor)) for lane in mine]
            window = lanes.Lanes(mine, SEGMENT_LEN).window(step, 3)
            assert np.array_equal(window.tokens, whole.tokens[rank::num_workers, 3 * step : 3 * step + 3])


def test_prose_of_a_mixture_follows_the_weights() -> None:
    store = FakeStore(SIZES, SHARES)
    prose, generator = task_lanes.store_prose(store), np.random.default_rng(0)
    first = [texts.whole(prose(1, generator))[0] < 3000 for _ in range(2000)]
    assert np.mean(first) == pytest.approx(0.75, abs=0.04)


# --- windows drawn anywhere ---------------------------------------------------------------------------


def sample_lanes(store: FakeStore, num_lanes: int) -> list[sampling.SampleLane]:
    source = sampling.SampleSource(store, seed=3, eos_id=EOS)
    return [sampling.SampleLane(source, number) for number in range(num_lanes)]


def test_sampled_windows_are_whole_segments_in_a_row_with_a_fresh_memory() -> None:
    store = FakeStore(SIZES)
    seen = set()
    for step in range(60):
        window = lanes.Lanes(sample_lanes(store, 3), SEGMENT_LEN).window(step, 4)
        assert window.reset[:, 0].all()
        for row in range(3):
            for i in range(4):
                number, at = divmod(int(window.tokens[row, i, 0]), 1000)
                size = int(window.lengths[row, i])
                tokens = store.tokens(number)
                assert at % SEGMENT_LEN == 0
                assert window.tokens[row, i, :size].tolist() == tokens[at : at + SEGMENT_LEN].tolist()
                following = [*tokens[at + 1 : at + size + 1].tolist(), EOS][:size]
                assert window.labels[row, i, :size].tolist() == following
                if not window.reset[row, i]:
                    assert window.tokens[row, i, 0] == window.tokens[row, i - 1, 0] + SEGMENT_LEN
                    assert window.segment_index[row, i] == window.segment_index[row, i - 1] + 1
                else:
                    assert window.segment_index[row, i] == 0
                    if i:  # the document before had no more segments
                        before, last = divmod(int(window.tokens[row, i - 1, 0]), 1000)
                        assert last // SEGMENT_LEN == store.manifest[before].num_segments - 1
                seen.add((number, at))
    assert len(seen) == sum(entry.num_segments for entry in store.manifest)  # every segment can be drawn


@pytest.mark.parametrize("num_segments", [pytest.param(1, marks=pytest.mark.long), 3, 8])
def test_of_each_document_its_share_is_read_however_long_windows_are(num_segments: int) -> None:
    sizes = [SEGMENT_LEN] * 40 + [40 * SEGMENT_LEN]  # half of all segments are one document's
    for shares, wanted in (((), 0.5), ([Share(range(40), 1.0), Share(range(40, 41), 3.0)], 0.75)):
        lanes_ = lanes.Lanes(sample_lanes(FakeStore(sizes, shares), 8), SEGMENT_LEN)
        windows = [lanes_.window(step, num_segments).tokens for step in range(3000 // num_segments)]
        of_long = np.mean([window[..., 0] >= 40_000 for window in windows])
        assert of_long == pytest.approx(wanted, abs=0.03)


def test_sampled_windows_depend_on_seed_step_and_lane_alone() -> None:
    store = FakeStore(SIZES)
    whole = lanes.Lanes(sample_lanes(store, 4), SEGMENT_LEN)
    windows = [whole.window(step, 2).tokens for step in range(5)]
    for rank in range(2):
        mine = lanes.Lanes(sample_lanes(store, 4)[rank::2], SEGMENT_LEN)
        assert np.array_equal(mine.window(3, 2).tokens, windows[3][rank::2])  # begun at step 3
    assert len({window.tobytes() for window in windows}) == 5
    assert whole.cursors() == [None] * 4


# --- made ahead of time -------------------------------------------------------------------------------


def sizes_of(step: int) -> int:
    return 1 + step * 7 % 5


@pytest.mark.parametrize("expected", [sizes_of, lambda step: 2, lambda step: 0 if step == 9 else sizes_of(step)])
def test_windows_made_ahead_are_those_made_in_time(expected: object) -> None:
    """Whether their sizes were foreseen or not; and cursors are those of the windows that were taken."""
    store = FakeStore(SIZES)
    kinds = [*document_lanes(store, 2), *sample_lanes(store, 1)]
    plain = lanes.Lanes(kinds, SEGMENT_LEN)
    ahead = Prefetched(lanes.Lanes([*document_lanes(store, 2), *sample_lanes(store, 1)], SEGMENT_LEN), expected)
    for step in range(25):
        assert ahead.cursors() == plain.cursors()
        wanted, found = plain.window(step, sizes_of(step)), ahead.window(step, sizes_of(step))
        for name in lanes.Window._fields:
            assert np.array_equal(getattr(found, name), getattr(wanted, name))
    ahead.close()


def test_lanes_can_be_moved_while_windows_are_made_ahead() -> None:
    """As a run does that goes on from a checkpoint."""
    store = FakeStore(SIZES)
    ahead = Prefetched(lanes.Lanes(document_lanes(store, 2), SEGMENT_LEN), sizes_of)
    windows, cursors = [], []
    for step in range(9):
        windows.append(ahead.window(step, sizes_of(step)))
        cursors.append(ahead.cursors())
    ahead.move(cursors[4])
    assert ahead.cursors() == cursors[4]
    for step in range(5, 9):
        assert np.array_equal(ahead.window(step, sizes_of(step)).tokens, windows[step].tokens)
    ahead.close()


class FailingStore(FakeStore):
    """Cannot be read at one of its readings."""

    reads, fails_at = 0, 7
    threads: frozenset[str] = frozenset()

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        self.threads |= {threading.current_thread().name}
        if self.reads == self.fails_at:
            raise OSError("the disk is gone")
        return super().read(document, start, stop)


def test_what_goes_wrong_ahead_is_raised_where_its_window_is_taken_and_can_be_tried_again() -> None:
    plain = lanes.Lanes(document_lanes(FakeStore(SIZES), 2), SEGMENT_LEN)
    store = FailingStore(SIZES)
    ahead = Prefetched(lanes.Lanes(document_lanes(store, 2), SEGMENT_LEN), lambda step: 1)
    for step in range(8):
        wanted = plain.window(step, 1)
        if step == 3:  # two readings a step: the seventh is of the fourth
            with pytest.raises(OSError, match="the disk is gone"):
                ahead.window(step, 1)
        assert np.array_equal(ahead.window(step, 1).tokens, wanted.tokens)
    assert store.threads == {"windows_0"}  # all in the background
    ahead.close()
