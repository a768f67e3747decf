"""Texts of several rows, cut into segments while they are read."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipelines.tasks import base

CPU = torch.device("cpu")


def blocks(text: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(text), size):
        yield text[start : start + size]


@pytest.mark.parametrize("segment_len", [1, 7, 64, 5000])
@pytest.mark.parametrize("sizes", [(9000, 9000), (9000, 4096, 1, 0), (4096, 8192), (5,)])
def test_segments_are_the_texts_in_order(segment_len: int, sizes: tuple[int, ...]) -> None:
    texts = [np.random.default_rng(i).integers(1, 100, size) for i, size in enumerate(sizes)]
    parts = list(base.segments([blocks(text, 300 + i) for i, text in enumerate(texts)], segment_len, CPU))
    assert [part.start for part in parts] == list(range(0, max(sizes), segment_len))
    for part in parts:
        wanted = [text[part.start : part.start + segment_len] for text in texts]
        assert part.tokens.shape == (len(texts), max(map(len, wanted)))
        assert part.tokens.dtype == torch.int64
        for row, text in zip(part.tokens.tolist(), wanted, strict=True):
            assert row == text.tolist() + [0] * (len(row) - len(text))
        ragged = len({len(text) for text in wanted}) > 1
        assert (part.lengths is None) == (not ragged)
        if part.lengths is not None:
            assert part.lengths.tolist() == [len(text) for text in wanted]


def test_texts_are_made_while_they_are_read() -> None:
    made = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal made
        while True:
            made += 1000
            yield np.ones(1000, dtype=np.int32)

    parts = base.segments([endless()], 100, CPU)
    for _ in range(200):
        next(parts)
    assert made < 30_000


def test_no_rows_with_text_give_no_segments() -> None:
    assert list(base.segments([iter(())], 8, CPU)) == []
