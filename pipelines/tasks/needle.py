"""Passkey and needle: a number in a long text, asked for at its end; by depth a heat map.

Passkey as in Mohtashami and Jaggi 2023 (arXiv:2305.16300): a number of five digits among sentences that repeat.
Needle: a city's number of seven digits, in book prose or noise.

Deviations of passkey: no words before the text say that something important is hidden in it, and each line of sentences
is whole.
"""

import itertools
from functools import partial

import numpy as np

from pipelines.tasks.samples import Sample, Scene, Wanted, ask, compose
from pipelines.tasks.texts import Background, Stream, filled

HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
CITIES = (
    "Berlin",
    "Cairo",
    "Chicago",
    "Lima",
    "London",
    "Madrid",
    "Nairobi",
    "Oslo",
    "Paris",
    "Rome",
    "Tokyo",
    "Vienna",
)


def passkey(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """The key said twice, as published."""
    key = int(generator.integers(10**4, 10**5))
    fact = scene.encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
    asked = ask(scene, "\nWhat is the pass key? The pass key is", f" {key}", 9 * 10**4)
    return compose(in_hay(scene), wanted, [fact], [asked], generator, between_blocks=True)


def in_hay(scene: Scene) -> Scene:
    """The scene among the same sentences over and over, a block each line; new lines fill what is left over."""
    line, filler = scene.encode(HAY), scene.encode("\n")

    def draw(num: int, generator: np.random.Generator) -> Stream:
        return partial(filled, partial(itertools.repeat, line), num, filler)

    background: Background = draw
    return scene._replace(background=background)


def needle(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """One sentence."""
    city, number = CITIES[int(generator.integers(len(CITIES)))], int(generator.integers(10**6, 10**7))
    fact = scene.encode(f"\nThe special magic {city} number is: {number}.\n")
    asked = ask(scene, f"\nWhat is the special magic {city} number? It is:", f" {number}", 9 * 10**6)
    return compose(scene, wanted, [fact], [asked], generator)
