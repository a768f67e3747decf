"""Recall: one fact in a long text, asked for at its end.

The text is prose from a book, or noise for tiny models. The fact is a sentence of its own, `The secret key is K.`, with
one of 16 letters; the text ends with the sentence's beginning, and what must follow is the letter. A model that forgot
can do no better than guess among the letters. The scheme is the "memorise" (fact first) and "detect and memorise" (fact
anywhere) tasks of Bulatov et al. 2023 (arXiv:2304.11062, section 4) put into real text, as in BABILong
(arXiv:2406.10149).
"""

import numpy as np

from pipelines.tasks.samples import Sample, Scene, Wanted, ask, compose

LETTERS = "ABCDEFGHIJKLMNOP"
FACT = "\nThe secret key is {}.\n"
QUESTION = "\nThe secret key is"
ANSWER = " {}"


def detect(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """The fact anywhere, or at the wanted depth."""
    scene.check_apart(LETTERS)
    letter = LETTERS[int(generator.integers(len(LETTERS)))]
    asked = ask(scene, QUESTION, ANSWER.format(letter), len(LETTERS))
    return compose(scene, wanted, [scene.encode(FACT.format(letter))], [asked], generator)


def memorise(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """The fact first."""
    return detect(scene, wanted._replace(depth=0.0), generator)
