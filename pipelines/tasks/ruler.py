"""The six tasks of RULER that need no text of others: needles, variables, common and frequent words.

Made anew from Hsieh et al. 2024 (arXiv:2404.06654, section 3 and appendix B) and its published code, with the questions
as published: `niah_single_1` (a number in repeated sentences), `niah_multikey_2` and `_3` (among other needles, numbers
or UUIDs), `vt` (variables that got one value), `cwe` (the ten words that come ten times as often as others) and `fwe`
(of made-up words the second to fourth most frequent: dots, which are to be ignored, come more often). Beside the answer
to the letter, `string_match` is the published mark: the share of expected strings in what the model writes freely, in
as many tokens as published.

Deviations: instructions do not stand before texts, nor worked examples before `vt` and `cwe`. Keys and the words of
`cwe` are made of syllables. What is asked for stands before the segment that asks where there is room, except in `fwe`.
A haystack's needles and words are drawn while the text is read, each line whole, and the few tokens that are left over
are new lines. `cwe` has a word a line without numbers, and answers without them; its other words come near one another;
below 4,096 tokens it has three words, ten times each, among words that come once. `fwe` has 2,000 words, and in the
published configuration one for 50 tokens: from 1,600 tokens to six million words this makes no difference, as words
that would come less than once do not come.
"""

import bisect
import dataclasses
import itertools
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from pipelines.tasks.needle import in_hay
from pipelines.tasks.samples import Maker, Sample, Scene, Scorer, TooShortError, Wanted, ask, compose
from pipelines.tasks.texts import Background, Stream, filled

MATCH = "string_match"
NEEDLE = "One of the special magic {kind} for {key} is: {value}.\n"
NIAH_QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} "
    "mentioned in the provided text is"
)
VT_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {num} variables are assigned the value {value}, they are:"
)
CWE_QUESTION = (
    "\nQuestion: What are the {num} most common words in the above list? Answer: The top {num} words that appear most "
    "often in the list are:"
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
NUM_HOPS = 4
_SCATTER = 7654321  # shares no factor with 70
FREQUENT, ZETA = 3, 2.0  # words asked for, exponent of their frequencies
DOTS = "..."  # in place of the most frequent word
_SHORT = 4096  # tokens, below which cwe has fewer words
_CODED, _CODED_LEN = 2000, 6  # different words of fwe, their letters
_LEAST_CODED = 53  # from here on no two of the five highest counts of fwe are equal
_STRETCH = 4096  # words of fwe whose order is drawn at once
_NEAR = 256  # other words of cwe that come near one another
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # written for the mark, by kind of task
_SYLLABLES = tuple(a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou"))  # 70


def word(number: int, num_syllables: int = 4) -> str:
    """A word for each number below 70 ** num_syllables; those of neighbouring numbers look nothing alike."""
    number = number * _SCATTER % len(_SYLLABLES) ** num_syllables
    return "".join(_SYLLABLES[number // len(_SYLLABLES) ** i % len(_SYLLABLES)] for i in range(num_syllables))


NUM_WORDS = len(_SYLLABLES) ** 4


def niah_single(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`niah_single_1`."""
    key, value = word(int(generator.integers(NUM_WORDS))), str(generator.integers(10**6, 10**7))
    return _needle(in_hay(scene), wanted, "number", (key, value), generator)


def niah_multikey(kind: str) -> Maker:
    """`niah_multikey_2` of "number", `niah_multikey_3` of "uuid"."""
    return partial(_multikey, kind)


def _multikey(kind: str, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    key, value = _pair(kind, generator)

    def others(generator: np.random.Generator) -> Iterator[str]:
        while True:
            other = _pair(kind, generator)
            if other[0] != key:
                yield NEEDLE.format(kind=kind, key=other[0], value=other[1])

    hay = scene._replace(background=_lines(scene, others))
    return _needle(hay, wanted, kind, (key, value), generator)


def _needle(scene: Scene, wanted: Wanted, kind: str, pair: tuple[str, str], generator: np.random.Generator) -> Sample:
    key, value = pair
    fact = scene.encode(NEEDLE.format(kind=kind, key=key, value=value))
    asked = ask(scene, NIAH_QUESTION.format(kind=kind, key=key), f" {value}", 9e6 if kind == "number" else 2.0**122)
    return _matched(
        compose(scene, wanted, [fact], [asked], generator, between_blocks=True), [value], NEW_TOKENS["niah"]
    )


def _pair(kind: str, generator: np.random.Generator) -> tuple[str, str]:
    if kind == "number":
        return word(int(generator.integers(NUM_WORDS))), str(generator.integers(10**6, 10**7))
    key, value = (str(uuid.UUID(bytes=generator.bytes(16), version=4)) for _ in range(2))
    return key, value


def _in_letters(code: int, num: int) -> str:
    """So many lower-case letters for each number below 26 ** num."""
    return "".join(chr(ord("a") + code // 26**i % 26) for i in range(num))


def variable_tracking(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`vt`: one chain of four hops."""
    value = str(generator.integers(10**4, 10**5))
    codes = generator.choice(26**5, NUM_HOPS + 1, replace=False)
    names = [_in_letters(code, 5).upper() for code in codes.tolist()]
    given = [value, *(f"VAR {name}" for name in names[:-1])]
    facts = [scene.encode(f"VAR {name} = {got}\n") for name, got in zip(names, given, strict=True)]
    question = VT_QUESTION.format(value=value, num=len(names))
    asked = ask(scene, question, " " + " ".join(names), 26.0**25)
    sample = compose(in_hay(scene), wanted, facts, [asked], generator, between_blocks=True)
    return _matched(sample, names, NEW_TOKENS["vt"])


def common_words(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`cwe`: words between other words that come three times each, asked for in the order of their first appearance."""
    num, times, others = (3, 10, 1) if wanted.length < _SHORT else (10, 30, 3)
    codes = generator.choice(NUM_WORDS, num, replace=False)
    told = generator.permutation(np.repeat(codes, times)).tolist()
    common = [word(code) for code in dict.fromkeys(told)]
    facts = [scene.encode(f"{word(code)}\n") for code in told]
    first = int(generator.integers(NUM_WORDS))
    hay = scene._replace(background=_lines(scene, partial(_other_words, first, others, frozenset(told))))
    asked = ask(scene, CWE_QUESTION.format(num=num), " " + " ".join(common), float(NUM_WORDS) ** num)
    return _matched(compose(hay, wanted, facts, [asked], generator, between_blocks=True), common, NEW_TOKENS["cwe"])


def _other_words(first: int, times: int, common: frozenset[int], generator: np.random.Generator) -> Iterator[str]:
    """Words from number `first` on without the common ones, so often each, near one another."""
    for start in itertools.count(first, _NEAR):
        for i in generator.permutation(_NEAR * times).tolist():
            code = (start + i % _NEAR) % NUM_WORDS
            if code not in common:
                yield f"{word(code)}\n"


def frequent_words(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`fwe`: of `num` words the one of rank n comes floor(num n^-2 / zeta(2)) times; the first one is dots."""
    codes = generator.choice(26**_CODED_LEN, _CODED - 1, replace=False).tolist()
    names = [DOTS, *(_in_letters(code, _CODED_LEN) for code in codes)]
    found = names[1 : FREQUENT + 1]
    asked = ask(scene, FWE_QUESTION, " " + " ".join(found), 1)
    room = wanted.length - len(asked.question) - len(asked.answer)
    most = 2 * max(room, 0) + 100  # words: more than there is room for, as each has a token
    words = [scene.encode(f" {name}") for name in names[: len(_counts(most))]]
    lengths = np.array([len(one) for one in words])

    def size(num: int) -> int:
        counts = _counts(num)
        return int(counts @ lengths[: len(counts)])

    num = bisect.bisect_right(range(most), room, key=size) - 1
    if num < _LEAST_CODED:
        raise TooShortError(wanted.length - room + size(_LEAST_CODED))
    counts = _counts(num)
    hay = scene._replace(background=_coded(words, counts, scene.encode("\n")))
    asked = asked._replace(num_choices=float(math.perm(len(counts) - 1, FREQUENT)))  # of the words that come
    return _matched(compose(hay, wanted, [], [asked], generator), found, NEW_TOKENS["fwe"])


def _counts(num: int) -> np.ndarray:
    """How often the word of each rank comes: of `num` words the whole part of its share, (those that come,) int64."""
    counts = (num * np.arange(1.0, _CODED + 1) ** -ZETA * 6 / math.pi**2).astype(np.int64)  # zeta(2) is pi^2 / 6
    return counts[counts > 0]


def _coded(words: Sequence[np.ndarray], counts: np.ndarray, filler: np.ndarray) -> Background:
    def draw(num: int, generator: np.random.Generator) -> Stream:
        return partial(filled, partial(_coded_words, words, counts, int(generator.integers(2**62))), num, filler)

    return draw


def _coded_words(words: Sequence[np.ndarray], counts: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Each word just as often as told, all in random order, of which a stretch is drawn at once."""
    generator = np.random.default_rng(seed)
    left = counts
    while num := min(_STRETCH, int(left.sum())):
        stretch = generator.multivariate_hypergeometric(left, num, method="marginals")
        for i in generator.permutation(np.repeat(np.arange(len(stretch)), stretch)):
            yield words[i]
        left = left - stretch


def _lines(scene: Scene, lines: Callable[[np.random.Generator], Iterator[str]]) -> Background:
    """Whole lines, a block each; they have to go on for ever."""

    def draw(num: int, generator: np.random.Generator) -> Stream:
        seed = int(generator.integers(2**62))

        def encoded() -> Iterator[np.ndarray]:
            return (scene.encode(line) for line in lines(np.random.default_rng(seed)))

        return partial(filled, encoded, num, scene.encode("\n"))

    return draw


def _matched(sample: Sample, expected: Sequence[str], max_new_tokens: int) -> Sample:
    """The sample with the published mark."""
    scorer = Scorer(MATCH, lambda written: string_match(written, expected))
    return dataclasses.replace(sample, scorers=(scorer,), max_new_tokens=max_new_tokens)


def string_match(written: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that occur, whatever their case."""
    return sum(one.lower() in written.lower() for one in expected) / len(expected)
