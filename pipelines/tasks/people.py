"""Who is where: facts of bAbI's first task about people each of whom may be asked about, again and again.

To train on, before stories. From stories that ask about everybody once, and from few questions a text, what is learned
is not to look up a person's place but to count: of the places told those that no answer has named yet. Here anybody is
asked about at every question, so that what was answered rules out nothing. And a sentence is several steps at once: of
words that follow each other directly looking up is learned soon, and then of the sentences.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from pipelines.tasks import babi
from pipelines.tasks.babilong import END, QUESTION, sentence_ends
from pipelines.tasks.samples import Maker, Sample, Scene, Wanted, ask, compose

NAMES = (*babi.PEOPLE, *(name for name in babi.GIVERS if name not in babi.PEOPLE))
COUNTS = range(1, len(NAMES) + 1)

_MORE_ASKED = 3  # questions than people


class Form(NamedTuple):
    """How it is told who is where, and how that is asked."""

    fact: str
    question: str


_TOLD = "\n{who} {verb} the {place}.\n"
FULL = Form(_TOLD, QUESTION.format("Where is {who}?"))
STEPS = (  # from words that follow each other to sentences
    Form("\n{who} {place}.\n", "\n{who}"),
    Form(_TOLD, "\n{who}"),
    Form(_TOLD, "\nWhere is {who}"),
    Form(_TOLD, "\nWhere is {who}?"),
    Form(_TOLD, "\nQuestion: Where is {who}?\n"),
    FULL,
)


def people(num_people: int) -> Maker:
    """Each of so many people is told of once; at the end anybody is asked about, in three questions more."""
    return partial(_people, _checked(num_people), 0, (FULL,))


def steps(num_people: int) -> Maker:
    """The same, each text in one of six forms, from bare words (`Fred office.`, `Fred`) to those of `people`."""
    return partial(_people, _checked(num_people), 0, STEPS)


def moved(num_people: int) -> Maker:
    """As `people`, and as many times again one of them goes somewhere: where each is told of last is asked for."""
    return partial(_people, _checked(num_people), num_people, (FULL,))


def _checked(num_people: int) -> int:
    if num_people not in COUNTS:
        raise ValueError(f"{num_people} people; there are names for 1 to {len(NAMES)}")
    return num_people


def _people(
    num_people: int,
    num_anew: int,
    forms: tuple[Form, ...],
    scene: Scene,
    wanted: Wanted,
    generator: np.random.Generator,
) -> Sample:
    form = forms[int(generator.integers(len(forms)))]
    names = [NAMES[i] for i in generator.choice(len(NAMES), num_people, replace=False)]
    told = [*names, *(names[i] for i in generator.integers(num_people, size=num_anew))]
    told = [told[i] for i in generator.permutation(len(told))]
    places = [babi.PLACES[i] for i in generator.integers(len(babi.PLACES), size=len(told))]
    verbs = [babi.MOVED[i] for i in generator.integers(len(babi.MOVED), size=len(told))]
    facts = [
        scene.encode(form.fact.format(who=who, verb=verb, place=place))
        for who, verb, place in zip(told, verbs, places, strict=True)
    ]
    at = dict(zip(told, places, strict=True))  # the place that comes last
    asked = [
        ask(scene, form.question.format(who=names[i]), f" {at[names[i]]}", len(babi.PLACES), end=END)
        for i in generator.integers(num_people, size=num_people + _MORE_ASKED)
    ]
    return compose(scene, wanted, facts, asked, generator, ends=sentence_ends(scene))
