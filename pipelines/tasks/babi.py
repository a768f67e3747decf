"""Small worlds in which people move, carry and give things: stories with a question and one right answer.

The first five of the twenty tasks of Weston et al. 2015 (arXiv:1502.05698, section 3), made anew from their
descriptions: one, two and three supporting facts, relations with two and with three arguments. Names, places, things
and verbs are those of the published sets. Stories are drawn until their question has an answer.

They have as few and as many facts as those that BABILong has of the published sets (Kuratov et al. 2024,
arXiv:2406.10149): `qa1` any even number, as a published question follows every second sentence; `qa2`, `qa3`
and `qa5`, whose longest are rare, a number that falls off geometrically. Its mean is our choice, so that most stories
can be learned in windows of a few segments: those with an answer have 17, 15 and 19 facts on average.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

MOVED = ("went to", "went back to", "moved to", "journeyed to", "travelled to")
TOOK = ("took", "got", "grabbed", "picked up")
LEFT = ("dropped", "left", "put down", "discarded")
GAVE = ("gave", "handed", "passed")

LABELS = {"qa1": PLACES, "qa2": PLACES, "qa3": PLACES, "qa4": PLACES, "qa5": (*GIVERS, *THINGS)}
NUM_FACTS = {"qa1": (2, 10), "qa2": (2, 68), "qa3": (4, 32), "qa5": (2, 126)}  # of a story, fewest and most
MEAN_FACTS = {"qa2": 10, "qa3": 12, "qa5": 10}  # of stories drawn, with or without an answer


class Story(NamedTuple):
    """Facts in the order in which they happen, and what is asked when they are over."""

    facts: list[str]
    question: str
    answer: str  # one of the task's labels
    together: list[tuple[str, str]]  # questions with their answers, in an order in which none tells a later answer


class Gift(NamedTuple):
    giver: str
    thing: str
    receiver: str


@dataclass
class World:
    """Who is where and has what; `act` lets one thing happen and says so."""

    people: tuple[str, ...]
    generator: np.random.Generator
    has_things: bool = True
    has_gifts: bool = False
    place_of: dict[str, str] = field(default_factory=dict)  # of people that have moved
    holder_of: dict[str, str] = field(default_factory=dict)  # of things that are held
    places_of: dict[str, list[str]] = field(default_factory=dict)  # of things: where each has been since it was taken
    gifts: list[Gift] = field(default_factory=list)

    def act(self) -> str:
        """One of the things that may happen now; every kind of event is as likely as another."""
        possible = {kind: options for kind, options in self._options().items() if options}
        chosen = self._choose(list(possible))
        options = possible[chosen]
        who, what = options[int(self.generator.integers(len(options)))]
        if chosen == "move":
            return self._move(who, what)
        if chosen == "take":
            return self._take(who, what)
        if chosen == "leave":
            del self.holder_of[what]
            return f"{who} {self._choose(LEFT)} the {what}."
        giver = self.holder_of[what]
        self.holder_of[what] = who
        self.gifts.append(Gift(giver, what, who))
        return f"{giver} {self._choose(GAVE)} the {what} to {who}."

    def _options(self) -> dict[str, list[tuple[str, str]]]:
        """Who can do what by kind of event."""
        moves = [(who, place) for who in self.people for place in PLACES if self.place_of.get(who) != place]
        if not self.has_things:
            return {"move": moves}
        free = [thing for thing in THINGS if thing not in self.holder_of]
        takes = [(who, thing) for who, where in self.place_of.items() for thing in free if self._is_at(thing, where)]
        leaves = [(who, thing) for thing, who in self.holder_of.items()]
        options = {"move": moves, "take": takes, "leave": leaves}
        if self.has_gifts:
            options["give"] = [
                (who, thing)
                for thing, holder in self.holder_of.items()
                for who, where in self.place_of.items()
                if who != holder and where == self.place_of[holder]
            ]
        return options

    def _is_at(self, thing: str, place: str) -> bool:
        """A thing that nobody has touched lies wherever it is first taken."""
        return thing not in self.places_of or self.places_of[thing][-1] == place

    def _move(self, who: str, place: str) -> str:
        self.place_of[who] = place
        for thing, holder in self.holder_of.items():
            if holder == who:
                self.places_of[thing].append(place)
        return f"{who} {self._choose(MOVED)} the {place}."

    def _take(self, who: str, thing: str) -> str:
        self.holder_of[thing] = who
        self.places_of.setdefault(thing, [self.place_of[who]])
        return f"{who} {self._choose(TOOK)} the {thing} there."

    def _choose(self, options: list[str] | tuple[str, ...]) -> str:
        return options[int(self.generator.integers(len(options)))]


def story(task: str, generator: np.random.Generator) -> Story:
    """A story of one of the tasks `qa1` to `qa5`."""
    if task == "qa4":
        return _relations(generator)
    while True:
        world = _world(task, generator)
        facts = [world.act() for _ in range(_num_facts(task, generator))]
        found = _QUESTIONS[task](world)
        if found:
            question, answer = found[int(generator.integers(len(found)))]
            return Story(facts, question, answer, _one_of_each(task, found, generator))


def episodes(task: str, generator: np.random.Generator) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """A story that goes on without end: what happens next, and a question about all so far with its answer.

    None where nothing can be asked yet. Of `qa4` every two facts are a map, and what is asked is about the last one.
    """
    while task == "qa4":
        drawn = _relations(generator)
        yield drawn.facts[0], None
        yield drawn.facts[1], (drawn.question, drawn.answer)
    world = _world(task, generator)
    while True:
        fact, found = world.act(), _QUESTIONS[task](world)
        yield fact, found[int(generator.integers(len(found)))] if found else None


def _world(task: str, generator: np.random.Generator) -> World:
    people = GIVERS if task == "qa5" else PEOPLE
    return World(people, generator, has_things=task != "qa1", has_gifts=task == "qa5")


def _num_facts(task: str, generator: np.random.Generator) -> int:
    low, high = NUM_FACTS[task]
    if task not in MEAN_FACTS:
        return int(generator.choice(np.arange(low, high + 1, 2)))
    while True:
        num = low - 1 + int(generator.geometric(1 / (MEAN_FACTS[task] - low + 1)))
        if num <= high:
            return num


def _one_of_each(task: str, found: list[tuple[str, str]], generator: np.random.Generator) -> list[tuple[str, str]]:
    """One question about each person (`qa1`) or thing, or about the last gift of each thing (`qa5`), in any order.

    But what was given is asked first: it is one of the things that are not asked about.
    """
    if task in ("qa1", "qa2"):
        return [found[i] for i in generator.permutation(len(found))]
    about: dict[str, tuple[str, str]] = {}
    for i in generator.permutation(len(found)):
        question, answer = found[i]
        thing = next(thing for thing in THINGS if thing in question or thing == answer)
        about.setdefault(thing, (question, answer))
    return sorted(about.values(), key=lambda pair: pair[1] not in THINGS)


def choices(question: str, answer: str) -> list[str]:
    """What the question alone leaves: the labels of the kind that it asks for and does not name."""
    kind = next(labels for labels in (PLACES, GIVERS, THINGS) if answer in labels)
    return [label for label in kind if label not in question]


def _where_people(world: World) -> list[tuple[str, str]]:
    return [(f"Where is {who}?", place) for who, place in world.place_of.items()]


def _where_things(world: World) -> list[tuple[str, str]]:
    """Things that were carried somewhere: who took them and where that one went answer together."""
    return [(f"Where is the {thing}?", places[-1]) for thing, places in world.places_of.items() if len(places) > 1]


def _where_before(world: World) -> list[tuple[str, str]]:
    """The place before the last time that a thing came to another."""
    found = []
    for thing, places in world.places_of.items():
        for at in dict.fromkeys(places[1:]):
            last = max(i for i, place in enumerate(places) if place == at and i)
            found.append((f"Where was the {thing} before the {at}?", places[last - 1]))
    return found


def _who_gave(world: World) -> list[tuple[str, str]]:
    """The five questions about the last gift of each thing."""
    last = {gift.thing: gift for gift in world.gifts}
    found = []
    for giver, thing, receiver in last.values():
        found += [
            (f"Who gave the {thing}?", giver),
            (f"Who received the {thing}?", receiver),
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who did {giver} give the {thing} to?", receiver),
        ]
    if world.gifts:
        giver, thing, receiver = world.gifts[-1]
        found.append((f"What did {giver} give to {receiver}?", thing))
    return found


_QUESTIONS = {"qa1": _where_people, "qa2": _where_things, "qa3": _where_before, "qa5": _who_gave}


def _relations(generator: np.random.Generator) -> Story:
    """A place with one on either side of it: which lies next to which, asked from either side of either fact.

    Of two questions together the second asks what lies on the other side of the middle: asked what lies next to an
    outer place, the first one would tell.
    """
    ahead, middle, behind = (PLACES[i] for i in generator.choice(len(PLACES), 3, replace=False))
    way = list(OPPOSITE)[int(generator.integers(len(OPPOSITE)))]
    pairs = ((ahead, middle), (middle, behind))
    facts = [_relation(a, way, b, generator) for a, b in pairs]
    of_pairs = [
        [
            (f"What is {way} of the {b}?", a),
            (f"What is {OPPOSITE[way]} of the {a}?", b),
            (f"What is the {a} {way} of?", b),
            (f"What is the {b} {OPPOSITE[way]} of?", a),
        ]
        for a, b in pairs
    ]
    questions = [question for of_pair in of_pairs for question in of_pair]
    question, answer = questions[int(generator.integers(len(questions)))]
    told = [facts[i] for i in generator.permutation(2)]
    first = int(generator.integers(2))
    outer = [one for one in of_pairs[1 - first] if one[1] != middle]
    together = [options[int(generator.integers(len(options)))] for options in (of_pairs[first], outer)]
    return Story(told, question, answer, together)


def _relation(a: str, way: str, b: str, generator: np.random.Generator) -> str:
    """That `a` lies that way of `b`, said from either side."""
    if generator.integers(2):
        return f"The {a} is {way} of the {b}."
    return f"The {b} is {OPPOSITE[way]} of the {a}."
