"""Lanes that read texts with a planted fact and a question at the end: what memory is trained on.

Axes: R lanes of a worker, K segments of a window, T tokens of a segment.
"""

import numpy as np

from pipelines.config import InputError
from pipelines.data.lanes import Window
from pipelines.data.plan import Reads, token_shares
from pipelines.tasks import recall


class RecallLane:
    """Texts with a planted fact and a question at the end, each exactly as long as a window; drawn anew each step."""

    def __init__(self, source: "RecallSource", number: int) -> None:
        self.source = source
        self.number = number

    def fill(self, window: Window, row: int, step: int) -> None:
        """Write the text of this step into row `row`."""
        num_segments, segment_len = window.tokens.shape[1:]
        sample = self.source.draw(step, self.number, num_segments, segment_len)
        tokens = np.concatenate([sample.tokens, sample.answer])
        size, question = len(tokens), len(sample.tokens)
        flat = {name: getattr(window, name)[row].reshape(-1) for name in ("tokens", "labels", "weights", "is_answer")}
        flat["tokens"][:size] = tokens
        flat["labels"][: size - 1] = tokens[1:]
        flat["weights"][: size - 1] = self.source.text_weight
        flat["weights"][question - 1 : size - 1] = self.source.answer_weight
        flat["is_answer"][question - 1 : size - 1] = True
        window.lengths[row] = np.clip(size - segment_len * np.arange(num_segments), 0, segment_len)
        window.segment_index[row] = np.arange(num_segments)
        window.reset[row, 0] = True


class RecallSource:
    """Planted facts in excerpts of the store's documents, or in noise."""

    def __init__(
        self,
        tokenizer: recall.Encodes,
        background: recall.Background,
        *,
        seed: int,
        text_weight: float,
        answer_weight: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.background = background
        self.seed = seed
        self.text_weight = text_weight
        self.answer_weight = answer_weight
        self.shortest = recall.shortest_text(tokenizer)  # tokens, without the answer
        self.longest_answer = recall.longest_answer(tokenizer)

    def describe(self) -> str:
        """What is read, in a line."""
        return f"rows read texts with a planted fact; its answer weighs {self.answer_weight:g}"

    def draw(self, step: int, lane: int, num_segments: int, segment_len: int) -> recall.RecallSample:
        """A text that ends, with its answer, anywhere in the last of `num_segments` segments.

        Where there is room the fact stands before the segment in which the answer begins, so that only memory
        brings it there.
        """
        generator = np.random.default_rng((self.seed, step, lane))
        longest = num_segments * segment_len - self.longest_answer
        shortest = max(self.shortest, longest - segment_len + 1)
        if shortest > longest:
            raise InputError(
                f"a window of {num_segments} segments of {segment_len} tokens is too short for a planted fact and its "
                f"question ({self.shortest} tokens and the answer); use longer segments, or more of them at first "
                "(curriculum.num_segments) with curriculum.vary no"
            )
        length = int(generator.integers(shortest, longest + 1))
        answering = (length - 1) // segment_len * segment_len  # where the answer's segment begins
        latest = answering - self.shortest + 1
        drawn = recall.samples(
            self.tokenizer,
            self.background,
            length=length,
            num=1,
            seed=int(generator.integers(2**62)),
            latest=latest if latest > 0 else None,
        )
        return next(drawn)


def store_prose(store: Reads) -> recall.Background:
    """Excerpts of the store's documents, each token of a store equally likely to be the first.

    A document that is too short starts over.
    """
    shares = token_shares(store)

    def draw(num: int, generator: np.random.Generator) -> np.ndarray:
        document = store.manifest[int(generator.choice(len(shares), p=shares))]
        start = int(generator.integers(document.num_tokens))
        found: list[np.ndarray] = []
        missing = num
        while missing > 0:
            segment, offset = divmod(start, store.segment_len)
            last = min(-(-(start + missing) // store.segment_len), document.num_segments)
            part = store.read(document, segment, last)[offset : offset + missing]
            found.append(part)
            missing -= len(part)
            start = 0
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)

    return draw
