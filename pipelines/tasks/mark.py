"""One symbol behind a mark, anywhere in a text, and asked for at its end: the smallest thing to detect and remember.

The "detect and memorise" task of Bulatov et al. 2023 (arXiv:2304.11062, section 4) with a fact of two symbols in place
of a sentence, so that fact, question and answer fit the shortest segments. With facts at depth 0 it is "memorise".
"""

import numpy as np

from pipelines.tasks.samples import Sample, Scene, Wanted, ask, compose

LETTERS = "ABCDEFGHIJKLMNOP"
MARK, QUESTION = "#", "?"


def detect(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """`#K` in the text with one of 16 letters; after `?` at its end the letter must follow."""
    letter = LETTERS[int(generator.integers(len(LETTERS)))]
    asked = ask(scene, QUESTION, letter, len(LETTERS))
    return compose(scene, wanted, [scene.encode(MARK + letter)], [asked], generator)
