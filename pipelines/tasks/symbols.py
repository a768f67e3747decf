"""Sequences of symbols: copied, reversed, sorted by frequency; and pairs that are looked up.

Copy and reverse as in Bulatov et al. 2022 (arXiv:2207.06881, section 4), associative retrieval with and without
rewrites as in Rodkin et al. 2024 (arXiv:2407.04841, appendix E), sorting as in Martins et al. 2022 (arXiv:2109.00301,
section 4.1). Every symbol is a letter, encoded by itself.

Deviations: a copied source is asked for once, where the paper asks for it twice over. A source has at most 4,096
symbols; where the text is longer, background stands behind it. There are at most 4,096 pairs, one a segment where that
is fewer, and no more than the text has room for. The drift of a sorting text is constant within each of 64 or more
stretches, so that its counts are known before it is made.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from pipelines.tasks.samples import Answer, Asked, Maker, Sample, Scene, TooShortError, Wanted, ask, closing, compose
from pipelines.tasks.texts import joined

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUM_SORTED = 20  # symbols of a sorting text
KEY_LEN = 4  # letters
MOST_ASKED = 8  # keys of a text of the tasks that ask for all
NUM_REWRITTEN = 16  # keys whose values are written again and again

_MAX_SOURCE = 4096  # symbols
_MAX_PAIRS = 4096
_STRETCHES = 64  # of a sorting text's drift, at least
_MAX_STRETCH = 2**16  # symbols


def _letters(scene: Scene, num: int) -> list[np.ndarray]:
    scene.check_apart(LETTERS[:num])
    return [scene.encode(letter) for letter in LETTERS[:num]]


def copying(*, backwards: bool) -> Maker:
    """The source first, and all of it at the end, in its order or backwards."""
    return partial(_copying, backwards)


def _copying(backwards: bool, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    letters = _letters(scene, len(LETTERS))
    start, end = scene.encode("\nsource: "), scene.encode("\n")
    question = scene.encode("\nreversed: " if backwards else "\ncopied: ")
    width = max(len(letter) for letter in letters)
    others = len(start) + len(end) + len(question)
    room = (wanted.length - others) // (2 * width)
    if room < 1:
        raise TooShortError(others + 2 * width)
    gap = -(-wanted.segment_len // (2 * width))  # so that the source ends before the segment of the first answer
    num = min(_MAX_SOURCE, max(1, room - gap))
    source = [letters[i] for i in generator.integers(len(letters), size=num)]
    answers = source[::-1] if backwards else source
    asked = [Asked(question if i == 0 else question[:0], one, len(letters)) for i, one in enumerate(answers)]
    return compose(scene, wanted, [np.concatenate([start, *source, end])], asked, generator, place="start")


def retrieval(*, rewrites: bool, most_asked: int = 1) -> Maker:
    """Pairs of a key and a letter in background, one a segment; then a key, whose letter must follow.

    Without rewrites all keys differ. With them there are 16 keys, and what holds is the letter written last. Up to
    `most_asked` different keys are asked for, in any order; from many questions a text looking up is learned sooner.
    """
    return partial(_retrieval, rewrites, most_asked)


def _retrieval(rewrites: bool, most_asked: int, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    num = int(np.clip(wanted.length // wanted.segment_len - 1, 1, _MAX_PAIRS))
    while True:
        try:
            return _looked_up(num, rewrites, most_asked, scene, wanted, generator)
        except TooShortError as error:
            if num == 1:
                raise
            num = max(1, num * wanted.length // error.need)  # fewer: the need is longer


def _looked_up(
    num: int, rewrites: bool, most_asked: int, scene: Scene, wanted: Wanted, generator: np.random.Generator
) -> Sample:
    """With so many pairs."""
    scene.check_apart(LETTERS)
    names = _distinct_keys(min(num, NUM_REWRITTEN) if rewrites else num, generator)
    which = generator.integers(len(names), size=num) if rewrites else np.arange(num)
    values = generator.integers(len(LETTERS), size=num)
    pairs = [scene.encode(f"\n{names[k]}:{LETTERS[v]}\n") for k, v in zip(which, values, strict=True)]
    held = dict(zip(which.tolist(), values.tolist(), strict=True))  # what was written last
    asked = generator.permutation(list(held))[:most_asked].tolist()
    questions = [ask(scene, f"\n{names[k]}:", LETTERS[held[k]], len(LETTERS)) for k in asked]
    return compose(scene, wanted, pairs, questions, generator)


def _distinct_keys(num: int, generator: np.random.Generator) -> list[str]:
    chosen = generator.choice(len(LETTERS) ** KEY_LEN, num, replace=False)
    digits = chosen[:, None] // len(LETTERS) ** np.arange(KEY_LEN) % len(LETTERS)
    return ["".join(LETTERS[i] for i in row) for row in digits]


def sorting(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """Symbols whose frequencies drift from one distribution to another; then all of them, the most frequent first.

    Ties go to the symbol with the lower letter. Each answer is asked for behind the true ones before it, so that those
    are out of the question: the oracle knows them too, and goes on with what comes most in the last quarter alone.
    """
    letters = _letters(scene, NUM_SORTED)
    if len({len(letter) for letter in letters}) > 1:
        raise ValueError("every capital letter must have the same number of tokens; use another tokenizer")
    width = len(letters[0])
    question = scene.encode("\nsorted: ")
    num = (wanted.length - len(question)) // width - NUM_SORTED
    if num < NUM_SORTED:
        raise TooShortError(len(question) + 2 * NUM_SORTED * width)
    first, last = (generator.integers(1, 11, size=NUM_SORTED).astype(float) for _ in range(2))
    counts = _drifting_counts(num, first / first.sum(), last / last.sum(), generator)
    order, guess = _by_frequency(counts.sum(0)), _by_frequency(counts[-(len(counts) // 4) :].sum(0))
    asked = [Asked(question if i == 0 else question[:0], letters[s], NUM_SORTED - i) for i, s in enumerate(order)]
    length = num * width + len(question) + NUM_SORTED * width
    tail, answers = closing(asked, length)
    table = np.stack(letters).astype(np.int32)
    stream = joined(partial(_sorting_text, table, counts, int(generator.integers(2**62))), [], tail)
    return Sample(stream, length, answers, _is_long(answers, wanted), oracle=_right_by(guess, order))


def _is_long(answers: tuple[Answer, ...], wanted: Wanted) -> bool:
    """Whether a segment, so at least half of the symbols, stands before the one in which the first answer begins."""
    return answers[0].at > wanted.segment_len


def _drifting_counts(num: int, first: np.ndarray, last: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How often each symbol occurs in each stretch of a text of `num` symbols, (stretches, symbols) int64."""
    num_stretches = min(num, max(_STRETCHES, -(-num // _MAX_STRETCH)))
    sizes = np.diff(np.arange(num_stretches + 1) * num // num_stretches)
    share = ((np.arange(num_stretches) + 0.5) / num_stretches)[:, None]
    return generator.multinomial(sizes, (1 - share) * first + share * last)


def _by_frequency(counts: np.ndarray) -> np.ndarray:
    return np.argsort(-counts, kind="stable")


def _right_by(guess: np.ndarray, order: np.ndarray) -> float:
    """The share of places of `order` at which the first of `guess` not listed before them stands."""
    left, num_right = guess.tolist(), 0
    for symbol in order.tolist():
        num_right += left[0] == symbol
        left.remove(symbol)
    return num_right / len(order)


def _sorting_text(letters: np.ndarray, counts: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """letters (symbols, tokens each); each stretch's symbols in random order."""
    generator = np.random.default_rng(seed)
    for stretch in counts:
        yield letters[generator.permutation(np.repeat(np.arange(len(stretch)), stretch))].reshape(-1)
