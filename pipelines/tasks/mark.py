"""Letters behind marks, anywhere in a text, and asked for at its end: the smallest things to detect, join and remember.

The "detect and memorise" and "reasoning" tasks of Bulatov et al. 2023 (arXiv:2304.11062, section 4) with facts of two
or three symbols in place of sentences, so that facts, question and answer fit the shortest segments. With facts at
depth 0 the first is "memorise".
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from pipelines.tasks.samples import Maker, Sample, Scene, Wanted, ask, compose

LETTERS = "ABCDEFGHIJKLMNOP"
MARK, LEADS, QUESTION = "#", "=", "?"


def detect(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`#K` in the text with one of 16 letters; after `?` at its end the letter must follow."""
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
    marked, other = (LETTERS[i] for i in generator.choice(len(LETTERS), 2, replace=False))
    end, other_end = (LETTERS[i] for i in generator.choice(len(LETTERS), 2, replace=False))
    facts = _Facts(marked, {marked: end, other: other_end})
    texts = [MARK + marked, *(LEADS + start + led for start, led in facts.leads.items())]
    encoded = [scene.encode(texts[i]) for i in generator.permutation(len(texts))]
    asked = ask(scene, *question(facts, generator), len(LETTERS))
    return compose(scene, wanted, encoded, [asked], generator)
