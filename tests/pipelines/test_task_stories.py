"""Stories against a reader that knows English sentences and nothing of the simulator; and the marks of free answers."""

import re
from collections import Counter

import numpy as np
import pytest

from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import babi, texts
from pipelines.tasks.babi import Story
from pipelines.tasks.babilong import asked_along, every_question, is_laxly_right, is_strictly_right, story_task
from pipelines.tasks.samples import Scene, TooShortError, Wanted

BYTES = ByteTokenizer()
SCENE = Scene(BYTES, texts.noise(BYTES))

GO = re.compile(r"(\w+) (?:went|went back|moved|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:took|got|grabbed|picked up) the (\w+) there\.")
DROP = re.compile(r"(\w+) (?:dropped|left|put down|discarded) the (\w+)\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
LIES = re.compile(r"The (\w+) is (\w+) of the (\w+)\.")
STEP = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


class Reader:
    """What somebody knows who reads the facts one by one; anything impossible is an error."""

    def __init__(self, facts: list[str]) -> None:
        self.where: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.path: dict[str, list[str]] = {}
        self.gifts: list[tuple[str, str, str]] = []
        for fact in facts:
            self.read(fact)

    def read(self, fact: str) -> None:
        if found := GO.fullmatch(fact):
            who, place = found.groups()
            assert self.where.get(who) != place
            self.where[who] = place
            for thing, holder in self.holder.items():
                if holder == who:
                    self.path[thing].append(place)
        elif found := TAKE.fullmatch(fact):
            who, thing = found.groups()
            assert thing not in self.holder
            assert self.path.get(thing, [self.where[who]])[-1] == self.where[who]
            self.path.setdefault(thing, [self.where[who]])
            self.holder[thing] = who
        elif found := DROP.fullmatch(fact):
            who, thing = found.groups()
            assert self.holder.pop(thing) == who
        elif found := GIVE.fullmatch(fact):
            giver, thing, receiver = found.groups()
            assert self.holder[thing] == giver
            assert giver != receiver
            assert self.where[giver] == self.where[receiver]
            self.holder[thing] = receiver
            self.gifts.append((giver, thing, receiver))
        else:
            pytest.fail(f"what is {fact!r}?")

    def answer(self, question: str) -> str:
        gifts = list(reversed(self.gifts))
        if found := re.fullmatch(r"Where is the (\w+)\?", question):
            return self.path[found[1]][-1]
        if found := re.fullmatch(r"Where is (\w+)\?", question):
            return self.where[found[1]]
        if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
            path = self.path[found[1]]
            return next(path[i - 1] for i in range(len(path) - 1, 0, -1) if path[i] == found[2])
        if found := re.fullmatch(r"What did (\w+) give to (\w+)\?", question):
            return next(thing for giver, thing, receiver in gifts if (giver, receiver) == found.groups())
        if found := re.fullmatch(r"Who received the (\w+)\?", question):
            return next(receiver for _, thing, receiver in gifts if thing == found[1])
        if found := re.fullmatch(r"Who did (\w+) give the (\w+) to\?", question):
            return next(receiver for giver, thing, receiver in gifts if (giver, thing) == found.groups())
        if found := re.fullmatch(r"Who gave the (\w+) to (\w+)\?", question):
            return next(giver for giver, thing, receiver in gifts if (thing, receiver) == found.groups())
        found = re.fullmatch(r"Who gave the (\w+)\?", question)
        assert found, question
        return next(giver for giver, thing, _ in gifts if thing == found[1])


def read_map(story: Story) -> str:
    """The answer to a question about places, from their coordinates."""
    facts = [LIES.fullmatch(fact) for fact in story.facts]
    at = {facts[0][1]: (0, 0)} if facts[0] else {}
    for found in facts * 2:  # a fact may hang on what a later one says
        assert found
        a, way, b = found.groups()
        x, y = STEP[way]
        if a in at:
            at[b] = (at[a][0] - x, at[a][1] - y)
        elif b in at:
            at[a] = (at[b][0] + x, at[b][1] + y)
    if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", story.question):
        (x, y), (p, q) = STEP[found[1]], at[found[2]]
        return next(place for place, here in at.items() if here == (p + x, q + y))
    found = re.fullmatch(r"What is the (\w+) (\w+) of\?", story.question)
    assert found, story.question
    (x, y), (p, q) = STEP[found[2]], at[found[1]]
    return next(place for place, here in at.items() if here == (p - x, q - y))


def draw(task: str, num: int) -> list[Story]:
    return [babi.story(task, np.random.default_rng((7, i))) for i in range(num)]


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa5"])
def test_who_reads_a_story_finds_its_answer(task: str) -> None:
    low, high = babi.NUM_FACTS[task]
    for story in draw(task, 300):
        assert low <= len(story.facts) <= high
        assert story.answer in babi.LABELS[task]
        assert Reader(story.facts).answer(story.question) == story.answer


@pytest.mark.parametrize(
    ("task", "low", "high", "mean"), [("qa1", 2, 10, 6), ("qa2", 3, 68, 17), ("qa3", 4, 32, 15), ("qa5", 4, 126, 19)]
)
def test_stories_are_as_long_as_published_and_long_ones_are_rare(task: str, low: int, high: int, mean: float) -> None:
    sizes = [len(asked.facts) for asked in draw(task, 2000)]
    assert min(sizes) == low
    assert max(sizes) <= high
    assert np.mean(sizes) == pytest.approx(mean, abs=1)
    assert task != "qa1" or Counter(sizes).keys() == {2, 4, 6, 8, 10}
    assert task == "qa1" or np.mean(sizes) > np.median(sizes)


def test_facts_stand_between_sentences_of_prose() -> None:
    def prose(num: int, generator: np.random.Generator) -> texts.Stream:
        sentence = "it was so. was it? "
        return lambda: iter([BYTES.encode((sentence * num)[:num])])

    for seed in range(20):
        sample = story_task("qa1")(Scene(BYTES, prose), Wanted(3000, 64), np.random.default_rng(seed))
        parts = re.split(r"\n[A-Z][^\n]*\.\n", BYTES.decode(texts.whole(sample.stream)).partition("\nQuestion")[0])
        assert len(parts) > 2
        assert [part for part in parts[1:-1] if part and part[-1] not in ".?"] == []
        assert not parts[0] or parts[0][-1] in ".?"
        assert "".join(parts) == ("it was so. was it? " * 3000)[: len("".join(parts))]


def test_a_short_text_holds_a_story_that_fits() -> None:
    for seed in range(100):
        sample = story_task("qa5")(SCENE, Wanted(1000, 64), np.random.default_rng(seed))
        assert len(texts.whole(sample.stream)) == 1000
    with pytest.raises(TooShortError) as error:
        story_task("qa5")(SCENE, Wanted(100, 64), np.random.default_rng(0))
    story_task("qa5")(SCENE, Wanted(error.value.need, 64), np.random.default_rng(0))


def test_who_draws_a_map_finds_what_lies_where() -> None:
    for story in draw("qa4", 300):
        assert len(story.facts) == 2
        assert read_map(story) == story.answer


def test_the_place_told_twice_is_the_answer_of_every_other_question() -> None:
    """By the four forms of the published questions, of which each is as frequent."""
    forms, middles = Counter(), 0
    for story in draw("qa4", 800):
        told = Counter(name for fact in story.facts for name in re.findall(r"the (\w+)", fact.lower()))
        middles += told[story.answer] == 2
        named = next(name for name in told if name in story.question)
        forms[(bool(re.fullmatch(r"What is \w+ of the \w+\?", story.question)), told[named] == 2)] += 1
    assert middles / 800 == pytest.approx(0.5, abs=0.06)
    assert all(num / 800 == pytest.approx(0.25, abs=0.05) for num in forms.values())
    assert len(forms) == 4


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa4", "qa5"])
def test_no_label_answers_most_questions(task: str) -> None:
    answers = Counter(story.answer for story in draw(task, 400))
    assert set(answers) == set(babi.LABELS[task])
    assert max(answers.values()) < 400 / len(answers) * 2


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa4", "qa5"])
def test_chance_is_among_what_is_asked_for_and_not_named(task: str) -> None:
    """By the form of the question: a place, a person or a thing."""
    seen = set()
    for asked in draw(task, 200):
        kinds = [(r"Where|What is", babi.PLACES), (r"Who", babi.GIVERS), (r"What did", babi.THINGS)]
        kind = next(labels for pattern, labels in kinds if re.match(pattern, asked.question))
        left = set(kind) - set(re.findall(r"\w+", asked.question))
        assert set(babi.choices(asked.question, asked.answer)) == left
        assert asked.answer in left
        seen.add(len(left))
    assert seen == {"qa1": {6}, "qa2": {6}, "qa3": {5}, "qa4": {5}, "qa5": {3, 4}}[task]
    [answer] = story_task(task)(SCENE, Wanted(3000, 64), np.random.default_rng(0)).answers
    assert answer.num_choices in seen


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa4", "qa5"])
def test_all_questions_of_a_story_are_asked_and_answered(task: str) -> None:
    nums, firsts = set(), Counter()
    for seed in range(60):
        sample = every_question(task)(SCENE, Wanted(6000, 64), np.random.default_rng(seed))
        tokens = texts.whole(sample.stream)
        told, *asked = BYTES.decode(tokens).split("\nQuestion: ")
        facts = [line for line in told.split("\n") if re.fullmatch(r"[A-Z].*\.", line)]
        found = [re.fullmatch(r"(.*\?)\nAnswer: (\w+)\.", one) for one in asked]
        pairs = [one.groups() for one in found if one]
        whole = babi.story(task, np.random.default_rng(seed))
        assert facts == whole.facts
        assert pairs == whole.together
        assert len(pairs) == len(asked) == len(set(pairs))
        assert [BYTES.decode(tokens[a.at : a.at + len(a.tokens)]) for a in sample.answers] == [
            f" {b}" for _, b in pairs
        ]
        assert len(tokens) == 6000
        nums.add(len(pairs))
        firsts[re.sub(r"bath.*|bed.*|garden.*|hall.*|kitchen.*|office.*", "", pairs[0][0])] += 1
        for question, answer in pairs:
            one = Story(facts, question, answer, [])
            assert (read_map(one) if task == "qa4" else Reader(facts).answer(question)) == answer
    assert nums == {"qa1": {1, 2, 3, 4}, "qa2": {1, 2, 3}, "qa3": {1, 2, 3}, "qa4": {2}, "qa5": {1, 2, 3}}[task]
    assert len(firsts) > 2  # in any order


@pytest.mark.parametrize("task", ["qa3", "qa4", "qa5"])
def test_no_question_tells_the_answer_of_another(task: str) -> None:
    """Each is about a thing of its own; of a map the second asks for a place that nothing names."""
    seen = set()
    for seed in range(300):
        together = babi.story(task, np.random.default_rng(seed)).together
        if task == "qa4":
            (first, second), named = together, " ".join(together[0])
            assert second[1] not in named
            [middle] = [place for place in babi.PLACES if place in second[0]]
            assert middle in named
            seen.add(first[1] == middle)
            continue
        things = [next(thing for thing in babi.THINGS if thing in " ".join(pair)) for pair in together]
        assert len(set(things)) == len(things)
        asked_for = [pair[1] in babi.THINGS for pair in together]
        assert not any(asked_for[1:])  # behind others it would be the thing that they do not name
        seen.update(re.sub(r"[A-Z]\w+|apple|football|milk|" + "|".join(babi.PLACES), "_", pair[0]) for pair in together)
    assert len(seen) == {"qa3": 1, "qa4": 2, "qa5": 5}[task]


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa4", "qa5"])
def test_what_is_asked_along_a_story_is_about_what_was_told_so_far(task: str) -> None:
    shares, nums = [], set()
    for seed in range(60):
        sample = asked_along(task)(SCENE, Wanted(2000, 64), np.random.default_rng(seed))
        tokens = texts.whole(sample.stream)
        assert len(tokens) == sample.num_tokens == 2000
        text = BYTES.decode(tokens)
        story = re.compile(r"\n([A-Z][^\n]*\.)\n|\nQuestion: ([^\n]*\?)\nAnswer: (\w+)\.")
        facts: list[str] = []
        answers = []
        for found in story.finditer(text):
            fact, question, answer = found.groups()
            if fact:
                facts.append(fact)
                continue
            told = Story(facts[-2:], question, answer, [])
            assert (read_map(told) if task == "qa4" else Reader(facts).answer(question)) == answer
            answers.append((found.start(3) - 1, f" {answer}", 1 / len(babi.choices(question, answer))))
        assert text.endswith(f"{answers[-1][1]}.")
        assert [
            (a.at, BYTES.decode(tokens[a.at : a.at + len(a.tokens)]), 1 / a.num_choices) for a in sample.answers
        ] == answers
        assert set(story.sub("", text)) <= set(texts.NOISE)
        shares.append(len(story.sub("", text)) / 2000)
        nums.add(len(answers))
    assert min(shares) < 0.2
    assert max(shares) > 0.8
    assert min(nums) == 1
    assert max(nums) > 8


def test_a_story_that_is_asked_along_needs_room_for_its_first_question() -> None:
    with pytest.raises(TooShortError) as error:
        asked_along("qa4")(SCENE, Wanted(60, 64), np.random.default_rng(0))
    sample = asked_along("qa4")(SCENE, Wanted(error.value.need, 64), np.random.default_rng(0))
    assert len(sample.answers) == 1


@pytest.mark.parametrize("task", ["qa1", "qa4"])
def test_a_text_ends_with_the_label_and_a_stop_that_is_no_part_of_the_answer(task: str) -> None:
    sample = story_task(task)(SCENE, Wanted(1000, 64), np.random.default_rng(0))
    [answer] = sample.answers
    label = BYTES.decode(answer.tokens)
    assert label.strip() in babi.LABELS[task]
    assert len(texts.whole(sample.stream)) == 1000
    assert BYTES.decode(texts.whole(sample.stream)[answer.at - len("Answer:") :]) == f"Answer:{label}."
    marks = {scorer.metric: scorer.mark(f"{label}. bathroom garden office") for scorer in sample.scorers}
    assert marks == {"strict": 1, "lax": 1}


@pytest.mark.parametrize(
    ("written", "strict", "lax"),
    [
        (" kitchen", True, True),
        (" The Kitchen. Then the garden.", True, True),
        (" kitchen\nQuestion: garden", True, True),
        (" kitchen or garden", False, True),
        (" from the office to the kitchen", True, True),  # the office stands in the question
        (" garden", False, False),
        (" garden. kitchen", False, True),
        ("", False, False),
    ],
)
def test_strict_takes_one_label_and_lax_any(written: str, strict: bool, lax: bool) -> None:
    question = "Where was the apple before the office?"
    assert is_strictly_right(written, question, "kitchen", babi.PLACES) == strict
    assert is_laxly_right(written, "kitchen") == lax
