"""Scheduler, text stream, prefix cache, batch sizes and record-free parts of the engine."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.batch_sizes import BatchSizes, Compute
from pipelines.serving.engine import Engine, Settings
from pipelines.serving.prefix import Boundary, PrefixCache, first_key, next_key
from pipelines.serving.scheduling import Kind, Scheduler, Shape, Work
from pipelines.serving.text import TextStream
from tests.rmt_core.tiny import MEMORIES, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CLOSE, EXTEND = Shape("close", 8), Shape("extend", 1)
NUM_ROWS = {"close": 2, "open": 2, "extend": 4}


def work(owner: str, kind: Kind, shape: Shape, since: int = 0) -> Work[str]:
    return Work(owner, kind, shape, since)


# Turns


def test_kinds_take_turns_in_their_shares() -> None:
    scheduler = Scheduler(write_steps_per_read=3)
    ready = [
        work("book", Kind.READ, CLOSE),
        work("talk", Kind.WRITE, EXTEND),
        work("tail", Kind.TAIL, Shape("open", 4)),
    ]
    chosen = Counter(scheduler.choose(ready, NUM_ROWS)[0].owner for _ in range(70))
    assert chosen == {"book": 10, "talk": 30, "tail": 30}


def test_a_kind_that_was_idle_neither_owes_nor_is_owed() -> None:
    scheduler = Scheduler(write_steps_per_read=2)
    talk, book = work("talk", Kind.WRITE, EXTEND), work("book", Kind.READ, CLOSE)
    for _ in range(50):
        scheduler.choose([talk], NUM_ROWS)
    chosen = "".join(scheduler.choose([talk, book], NUM_ROWS)[0].owner[0] for _ in range(9))
    assert "bb" not in chosen
    assert chosen.count("b") == 3
    for _ in range(50):
        scheduler.choose([book], NUM_ROWS)
    chosen = "".join(scheduler.choose([talk, book], NUM_ROWS)[0].owner[0] for _ in range(9))
    assert "bb" not in chosen
    assert "ttt" not in chosen


def test_the_longest_waiting_goes_first_and_others_of_its_shape_with_it() -> None:
    ready = [
        work("a", Kind.READ, CLOSE, 5),
        work("b", Kind.READ, CLOSE, 2),
        work("c", Kind.READ, CLOSE, 3),
        work("d", Kind.WRITE, CLOSE, 1),
    ]
    assert [each.owner for each in Scheduler(1).choose(ready, NUM_ROWS)] == ["b", "c"]
    assert [each.owner for each in Scheduler(1).choose(ready[1:2] + ready[3:], NUM_ROWS)] == ["b", "d"]
    assert Scheduler(1).choose([], NUM_ROWS) == []


def test_a_ratio_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="write_steps_per_read is 0; it must be at least 1"):
        Scheduler(0)


# Text


@pytest.mark.parametrize("text", ["plain", "ä€😀 ¼", "\ufffd", "a\ufffd\ufffdb"])
def test_streamed_text_is_the_whole_text_in_whole_characters(text: str) -> None:
    stream = TextStream(ByteTokenizer())
    parts = [stream.add(token) for token in text.encode()] + [stream.finish()]
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert parts[-1] == ""
        assert "\ufffd" not in "".join(parts)


def test_streamed_bytes_that_are_no_text_are_what_decoding_makes_of_them() -> None:
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.choice([65, 0xC3, 0xA4, 0xE2, 0x82, 0xAC, 0xFF, 256]) for _ in range(draw.randint(1, 20))]
        stream = TextStream(ByteTokenizer())
        assert "".join([stream.add(token) for token in tokens] + [stream.finish()]) == ByteTokenizer().decode(tokens)


def test_text_ends_before_the_first_stop_string_and_nothing_of_it_is_shown() -> None:
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choice("abc") for _ in range(draw.randint(1, 12)))
        stops = ["".join(draw.choice("abc") for _ in range(draw.randint(1, 4))) for _ in range(2)]
        stream = TextStream(ByteTokenizer(), stops)
        shown = ""
        for token in text.encode():
            shown += stream.add(token)
            if stream.stopped:
                break
        if not stream.stopped:
            shown += stream.finish()
        # The first stop string to be complete ends the text.
        ends = [
            (end, text[:end].index(stop)) for end in range(1, len(text) + 1) for stop in stops if stop in text[:end]
        ]
        assert stream.stopped == bool(ends)
        first = min(ends, default=None)
        assert shown == (text if first is None else text[: min(start for end, start in ends if end == first[0])])


# Prefixes


def boundary(num_floats: int) -> Boundary:
    return Boundary(torch.zeros(1, num_floats), torch.zeros(1, 1))


def test_the_cache_never_takes_more_than_its_bytes_and_the_longest_unused_goes() -> None:
    size = boundary(1000).num_bytes
    cache = PrefixCache(3 * size)
    for key in (b"a", b"b", b"c"):
        cache.put(key, boundary(1000))
    assert cache.get(b"a") is not None
    cache.put(b"d", boundary(1000))
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert (len(cache), cache.num_bytes) == (3, 3 * size)
    cache.put(b"e", boundary(10_000))
    assert cache.get(b"e") is None
    cache.put(b"f", boundary(2000))
    assert cache.num_bytes <= cache.max_bytes
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


@pytest.mark.long
def test_an_entry_is_counted_as_what_it_takes_of_the_machine() -> None:
    """In a process of its own, whose memory holds nothing else."""
    measured = subprocess.run([sys.executable, "-c", FILL], cwd=ROOT, capture_output=True, text=True, check=True)
    resident, counted = map(int, measured.stdout.split())
    assert 0.5 * counted < resident < 1.1 * counted


FILL = """
import os, torch
from pipelines.serving.prefix import Boundary, PrefixCache

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

cache, before = PrefixCache(2**40), resident()
for _ in range(10_000):
    cache.put(os.urandom(32), Boundary((torch.zeros(1, 60), torch.zeros(1, 3)), torch.zeros(1, 16)))
print(resident() - before, cache.num_bytes)
"""


def test_keys_tell_tenants_models_servers_and_every_token_apart() -> None:
    keys = [first_key(key, model, tenant) for key in (b"k", b"l") for model in "mn" for tenant in ("a", "b", "")]
    keys += [next_key(keys[0], tokens) for tokens in ([1, 2], [2, 1], [1], [1, 2, 0], [258])]
    keys.append(next_key(next_key(keys[0], [1]), [2]))
    assert len(set(keys)) == len(keys)


# Batch sizes


class Rows:
    """Rows of which `spoil` says what batch they are in: (number of rows, place) -> what is added."""

    def __init__(self, spoil: Callable[[int, int], float]) -> None:
        self.spoil = spoil
        self.asked: list[list[int]] = []

    def draw(self, shape: Shape, num_rows: int) -> Compute:
        values = torch.randn(num_rows)
        return lambda rows: self.compute(values, rows)

    def compute(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        self.asked.append(list(rows))
        added = [self.spoil(len(rows), place) for place in range(len(rows))]
        return values[[row % len(values) for row in rows]] + torch.tensor(added)


def sizes_of(rows: Rows, largest: int, *alone: str) -> BatchSizes:
    return BatchSizes({"close": largest}, rows.draw, alone=alone, num_trials=3)


@pytest.mark.parametrize(
    ("spoil", "alone", "wanted"),
    [
        (lambda size, place: 0.0, True, [1, 2, 4, 6]),
        (lambda size, place: 0.0, False, [1, 2, 4, 6]),
        (lambda size, place: 0.5 * (size < 4), True, [1, 2]),
        (lambda size, place: 0.5 * (size < 4), False, [4, 6]),
        (lambda size, place: 0.5 * (place == 5), True, [1, 2, 4]),
        (lambda size, place: 0.5 * (place == 5), False, [1]),
        (lambda size, place: 0.5 * (place == size - 1), True, [1]),
    ],
)
def test_only_sizes_that_give_the_bits_of_the_reference_are_used(
    spoil: Callable[[int, int], float], alone: bool, wanted: list[int]
) -> None:
    sizes = sizes_of(Rows(spoil), 6, *(["close"] if alone else []))
    assert sizes.of(CLOSE) == wanted


def test_a_batch_is_filled_up_to_the_least_size_or_cut_to_the_largest() -> None:
    rows = Rows(lambda size, place: 0.5 * (size < 4))
    sizes = BatchSizes({"close": 4}, rows.draw, alone=(), num_trials=1)
    assert sizes.of(CLOSE) == [4]
    rows.asked.clear()
    values = torch.arange(10.0)
    for num_rows, parts in ((1, 1), (4, 1), (5, 2), (9, 3)):
        found = sizes.run(CLOSE, num_rows, lambda rows_: rows.compute(values, rows_))
        assert torch.equal(found[:num_rows], values[:num_rows])
        assert [len(asked) for asked in rows.asked] == [4] * parts
        rows.asked.clear()


@pytest.mark.parametrize("kind", ["rmt", "armt", "shm"])
def test_models_of_usual_widths_are_batched(kind: str) -> None:
    """In float32, with one thread: rows of segments and of tokens come out as alone, in each number of rows from 4."""
    model = tiny_model(MEMORIES[kind], segment_len=8, intermediate_size=64).float()
    engine = Engine(model, Settings(num_slots=8, prefix_bytes=0), fingerprint="f")
    with torch.inference_mode():
        for shape in (Shape("extend", 1), Shape("choose", 1)):
            assert engine.sizes.of(shape)[-1] == 8
        assert engine.sizes.of(Shape("close", 8))[0] == 1
        assert engine.sizes.of(Shape("open", 4))[0] == 1
