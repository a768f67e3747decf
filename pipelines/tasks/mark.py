"""Letters behind marks, anywhere in a text, and asked for at its end: the smallest things to detect, join and look up.

The "detect and memorise" and "reasoning" tasks of Bulatov et al. 2023 (arXiv:2304.11062, section 4) with facts of two
or three symbols in place of sentences, so that facts, question and answer fit the shortest segments. With facts at
depth 0 the first is "memorise".

Pairs are multi-query associative recall, after Arora et al. 2023 (arXiv:2312.04927, section 4), with all queries at the
end: many questions a text, from which looking up is learned soon that hardly ever is from one. Where pairs are told
anew, what was told last holds, as in associative retrieval with rewrites (Rodkin et al. 2024, arXiv:2407.04841,
appendix E).
"""

import string
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from pipelines.tasks.samples import Maker, Sample, Scene, Wanted, ask, compose

LETTERS = "ABCDEFGHIJKLMNOP"
KEYS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # of pairs of a text
MARK, LEADS, QUESTION = "#", "=", "?"


def detect(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`#K` in the text with one of 16 letters; after `?` at its end the letter must follow."""
    scene.check_apart([*LETTERS, MARK, QUESTION])
    letter = LETTERS[int(generator.integers(len(LETTERS)))]
    asked = ask(scene, QUESTION, letter, len(LETTERS))
    return compose(scene, wanted, [scene.encode(MARK + letter)], [asked], generator)


class _Facts(NamedTuple):
    marked: str
    leads: dict[str, str]  # from the marked letter and from another one


def _joined(facts: _Facts, generator: np.random.Generator) -> tuple[str, str]:
    return QUESTION, facts.leads[facts.marked]


def _marked(facts: _Facts, generator: np.random.Generator) -> tuple[str, str]:
    return MARK, facts.marked


def _led_to(facts: _Facts, generator: np.random.Generator) -> tuple[str, str]:
    named = list(facts.leads)[generator.integers(len(facts.leads))]
    return LEADS + named, facts.leads[named]


_QUESTIONS: dict[str, Callable[[_Facts, np.random.Generator], tuple[str, str]]] = {
    "both": _joined,
    "marked": _marked,
    "leads": _led_to,
}


def join(steps: str) -> Maker:
    """`#K`, `=KV` and `=JW` in the text, in any order: K is marked and leads to V, J leads to W.

    With steps "both" the text ends with `?`, and V must follow: the mark says which of the two letters that are led to.
    "marked" (`#`: K) and "leads" (`=K`: V, or `=J`: W) ask for one step alone, about the same texts.
    """
    return partial(_join, _QUESTIONS[steps])


def _join(
    question: Callable[[_Facts, np.random.Generator], tuple[str, str]],
    scene: Scene,
    wanted: Wanted,
    generator: np.random.Generator,
) -> Sample:
    scene.check_apart([*LETTERS, MARK, LEADS, QUESTION])
    marked, other = (LETTERS[i] for i in generator.choice(len(LETTERS), 2, replace=False))
    end, other_end = (LETTERS[i] for i in generator.choice(len(LETTERS), 2, replace=False))
    facts = _Facts(marked, {marked: end, other: other_end})
    texts = [MARK + marked, *(LEADS + start + led for start, led in facts.leads.items())]
    encoded = [scene.encode(texts[i]) for i in generator.permutation(len(texts))]
    asked = ask(scene, *question(facts, generator), len(LETTERS))
    return compose(scene, wanted, encoded, [asked], generator)


def pairs(num_pairs: int) -> Maker:
    """`num_pairs` times `=KV` with different K in the text, and every `=K` at its end, in any order: V must follow.

    V is one of 16 letters, K too where there are at most 16 pairs, else one of as many symbols as there are pairs. 64
    pairs and their questions are 384 bytes.
    """
    return partial(_pairs, _checked(num_pairs), 0)


def latest(num_pairs: int) -> Maker:
    """As `pairs`, and as many times again `=KV` of any of these K: the V that was told last must follow.

    64 keys and their questions are 576 bytes.
    """
    return partial(_pairs, _checked(num_pairs), num_pairs)


def _checked(num_pairs: int) -> int:
    if not 1 <= num_pairs <= len(KEYS):
        raise ValueError(f"{num_pairs} pairs; there are keys for 1 to {len(KEYS)}")
    return num_pairs


def _pairs(num_pairs: int, num_anew: int, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    num_keys = max(num_pairs, len(LETTERS))
    scene.check_apart([*KEYS[:num_keys], LEADS])
    keys = [LEADS + KEYS[i] for i in generator.choice(num_keys, num_pairs, replace=False)]
    values = [LETTERS[i] for i in generator.integers(len(LETTERS), size=num_pairs + num_anew)]
    told = list(keys)
    if num_anew:  # in any order, every key at least once
        told += [keys[i] for i in generator.integers(num_pairs, size=num_anew)]
        told = [told[i] for i in generator.permutation(len(told))]
    facts = [scene.encode(key + value) for key, value in zip(told, values, strict=True)]
    held = dict(zip(told, values, strict=True))  # the value that comes last
    asked = [ask(scene, keys[i], held[keys[i]], len(LETTERS)) for i in generator.permutation(num_pairs)]
    return compose(scene, wanted, facts, asked, generator)
