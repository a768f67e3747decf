"""Several facts at once: reasoning over two of them, and how many a memory holds.

Reasoning joins two sentences, as the third task of Bulatov et al. 2023 (arXiv:2304.11062, section 4) does: which key
there is, and what that key opens. Another key opens something else, so that neither sentence answers alone.
Capacity gives k facts first and asks for all of them, in another order, at the end. They are short, so that 64 facts
with their questions are 768 bytes.
"""

import itertools
from functools import partial

import numpy as np

from pipelines.tasks.samples import Maker, Sample, Scene, Wanted, ask, compose

LETTERS = "ABCDEFGHIJKLMNOP"
NAMES = tuple(f"{letter}{digit}" for letter, digit in itertools.product("QRSTUVWXYZ", range(10)))
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # of facts held at once


def reason(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """Which key there is, and what this one and another one open; in any order, anywhere or at the wanted depth."""
    scene.check_apart(LETTERS)
    key, other = generator.choice(len(LETTERS), 2, replace=False)
    opened, other_opened = generator.choice(len(LETTERS), 2, replace=False)
    facts = [
        f"\nThe key is {LETTERS[key]}.\n",
        f"\n{LETTERS[key]} opens {LETTERS[opened]}.\n",
        f"\n{LETTERS[other]} opens {LETTERS[other_opened]}.\n",
    ]
    encoded = [scene.encode(facts[i]) for i in generator.permutation(len(facts))]
    asked = ask(scene, "\nThe key opens", f" {LETTERS[opened]}", len(LETTERS))
    return compose(scene, wanted, encoded, [asked], generator)


def capacity(num_facts: int) -> Maker:
    """`num_facts` names with a letter each, at the start, and each of them asked for at the end, in any order."""
    if not 1 <= num_facts <= len(NAMES):
        raise ValueError(f"{num_facts} facts; there are names for 1 to {len(NAMES)}")
    return partial(_capacity, num_facts)


def _capacity(num_facts: int, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    scene.check_apart([*NAMES, *LETTERS])
    names = [NAMES[i] for i in generator.choice(len(NAMES), num_facts, replace=False)]
    letters = [LETTERS[i] for i in generator.integers(len(LETTERS), size=num_facts)]
    facts = [scene.encode(f"{name}: {letter}\n") for name, letter in zip(names, letters, strict=True)]
    asked = [ask(scene, f"\n{names[i]}:", f" {letters[i]}", len(LETTERS)) for i in generator.permutation(num_facts)]
    return compose(scene, wanted, facts, asked, generator, place="start")
