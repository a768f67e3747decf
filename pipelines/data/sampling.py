"""Lanes that read windows drawn anywhere in documents, each on its own: nothing is carried from one to the next.

Axes: R lanes of a worker, K segments of a window.
"""

import numpy as np

from pipelines.data.lanes import Passage, Window, put
from pipelines.data.plan import Reads, token_shares

_STREAM = 1  # other random numbers than those of texts of tasks, which draw by (seed, step, lane)


class SampleSource:
    """Passages of documents: as many segments are read of each store as its weight says, of each document by its size.

    A passage holds all of a short document and K segments of a long one. So a document that gives k segments is drawn
    with a chance in proportion to its share of the tokens over k: what is expected of it is then its share, whatever
    room a window has left.
    """

    def __init__(self, store: Reads, *, seed: int, eos_id: int | None) -> None:
        self.store = store
        self.seed = seed
        self.eos_id = eos_id
        self._shares = token_shares(store)
        self._sizes = np.array([document.num_segments for document in store.manifest])
        self._cumulative: dict[int, np.ndarray] = {}  # chances of the documents, by the segments there is room for

    def describe(self) -> str:
        """What is read and what of it is waste, in a line."""
        num_segments = sum(document.num_segments for document in self.store.manifest)
        num_tokens = sum(document.num_tokens for document in self.store.manifest)
        padding = 1 - num_tokens / (num_segments * self.store.segment_len)
        return f"rows read windows drawn anywhere in {num_segments} segments; {padding:.1%} of them is padding"

    def draw(self, generator: np.random.Generator, num_segments: int) -> Passage:
        """Up to `num_segments` segments in a row: fewer only where the document has no more."""
        cumulative = self._cumulative.get(num_segments)
        if cumulative is None:
            cumulative = np.cumsum(self._shares / np.minimum(self._sizes, num_segments))
            self._cumulative[num_segments] = cumulative
        number = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        document = self.store.manifest[number]
        start = int(generator.integers(max(0, document.num_segments - num_segments) + 1))
        return Passage(number, start, min(start + num_segments, document.num_segments), 0)


class SampleLane:
    """Draws each window anew, by the step: resumed at a step it goes on as if it had never stopped."""

    def __init__(self, source: SampleSource, number: int) -> None:
        self.source = source
        self.number = number

    def fill(self, window: Window, row: int, step: int) -> None:
        """Write K segments into row `row`: of one document, or of several short ones with a reset before each."""
        generator = np.random.default_rng((self.source.seed, step, self.number, _STREAM))
        num_segments = window.tokens.shape[1]
        filled = 0
        while filled < num_segments:
            passage = self.source.draw(generator, num_segments - filled)
            put(self.source.store, self.source.eos_id, passage, window, (row, filled))
            filled += passage.stop - passage.start
