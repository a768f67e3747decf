"""Each task's answers, found again from the text that a sample gives, by its definition."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import babi, facts, mark, needle, people, quadratic, recall, ruler, symbols, texts
from pipelines.tasks.samples import Maker, Sample, Scene, TooShortError, Wanted

BYTES = ByteTokenizer()
SCENE = Scene(BYTES, texts.noise(BYTES))
SEGMENT_LEN = 64


def draw(make: Maker, length: int, seed: int = 0, depth: float | None = None) -> Sample:
    return make(SCENE, Wanted(length, SEGMENT_LEN, depth), np.random.default_rng(seed))


def read(sample: Sample) -> tuple[str, list[str]]:
    """The text before the first question's answer, and all answers."""
    tokens = texts.whole(sample.stream)
    return BYTES.decode(tokens[: sample.answers[0].at]), [BYTES.decode(answer.tokens) for answer in sample.answers]


LENGTHS = (500, 501, 563, 564, 565, 2000)


@pytest.mark.parametrize("length", LENGTHS)
def test_recall_is_a_sentence_put_anywhere_before_the_segment_that_asks(length: int) -> None:
    """Against the text put together by its definition, for equal draws."""

    def letters(num: int, generator: np.random.Generator) -> str:
        return chr(97 + generator.integers(26)) * num

    def in_parts(num: int, generator: np.random.Generator) -> texts.Stream:
        parts = np.array_split(BYTES.encode(letters(num, generator)), 7)
        return lambda: iter(parts)

    question = "\nThe secret key is"
    for seed in range(20):
        generator = np.random.default_rng(seed)
        letter = "ABCDEFGHIJKLMNOP"[generator.integers(16)]
        fact = f"\nThe secret key is {letter}.\n"
        text = letters(length - len(fact) - len(question) - 2, generator)
        room = (length - 3) // SEGMENT_LEN * SEGMENT_LEN - len(fact)
        at = int(generator.integers(min(len(text), room) + 1))
        sample = recall.detect(Scene(BYTES, in_parts), Wanted(length, SEGMENT_LEN), np.random.default_rng(seed))
        assert BYTES.decode(texts.whole(sample.stream)) == f"{text[:at]}{fact}{text[at:]}{question} {letter}"


@pytest.mark.parametrize("make", [recall.detect, mark.detect])
def test_the_latest_place_ends_with_the_segment_before_the_one_that_asks(make: Maker) -> None:
    for length in (SEGMENT_LEN + 24, 3 * SEGMENT_LEN, 1000):
        text, _ = read(draw(make, length, depth=1.0))
        first = re.search(r"\nThe secret key is .\.\n|#.", text)
        assert first
        room = length // SEGMENT_LEN * SEGMENT_LEN - (length % SEGMENT_LEN < 3) * SEGMENT_LEN
        background = length - len(first[0]) - (20 if make is recall.detect else 2)
        assert first.end() == min(room, background + len(first[0]))


def test_a_marked_symbol_is_detected_anywhere() -> None:
    places = []
    for seed in range(60):
        text, [answer] = read(draw(mark.detect, 2000, seed))
        assert re.findall("#(.)", text) == [answer]
        assert text.endswith("?")
        places.append(text.index("#"))
    assert min(places) < 200
    assert 1700 < max(places) < 1984 - 1
    assert read(draw(mark.detect, 4))[0].startswith("#")  # nothing but fact, question and answer


def test_facts_stand_first_anywhere_or_at_the_depth() -> None:
    fact = "\nThe secret key is"
    assert read(draw(recall.memorise, 2000))[0].startswith(fact)
    places = [read(draw(recall.detect, 2000, seed))[0].index(fact) for seed in range(60)]
    assert min(places) < 200
    assert max(places) > 1700
    at = [read(draw(recall.detect, 2000, depth=depth))[0].index(fact) for depth in (0.0, 0.5, 1.0)]
    assert at[0] == 0
    assert at[1] == pytest.approx(at[2] / 2, abs=1)
    assert at[2] + len(fact) > 1984 - 64


@pytest.mark.parametrize(
    "make",
    [
        facts.reason,
        facts.capacity(4),
        needle.needle,
        needle.passkey,
        recall.detect,
        mark.detect,
        mark.join("both"),
        mark.pairs(4),
    ],
)
@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_facts_end_before_the_segment_of_the_answer(make: Maker, depth: float | None, length: int) -> None:
    sample = draw(make, length, 1, depth)
    assert sample.needs_memory
    start = (sample.answers[0].at - 1) // SEGMENT_LEN * SEGMENT_LEN
    rest = BYTES.decode(texts.whole(sample.stream)[start : sample.answers[0].at])
    assert not re.search(r"opens [A-P]|is [A-P]\.|\d: [A-P]|is: \d|key is \d|#|=.[A-P]", rest)


@pytest.mark.parametrize("make", [ruler.frequent_words, symbols.sorting])
def test_what_stands_all_over_a_text_needs_memory_where_half_lies_before_the_segment_of_the_answer(make: Maker) -> None:
    found = set()
    for segment_len in range(300, 1100, 10):
        sample = make(SCENE, Wanted(1000, segment_len), np.random.default_rng(0))
        at = sample.answers[0].at
        before = (at - 1) // segment_len * segment_len
        assert sample.needs_memory == (before >= at - before)
        found.add(sample.needs_memory)
    assert found == {True, False}


@pytest.mark.parametrize("seed", range(20))
def test_reasoning_needs_both_sentences(seed: int) -> None:
    text, [answer] = read(draw(facts.reason, 1000, seed))
    opens = dict(re.findall(r"\n([A-P]) opens ([A-P])\.\n", text))
    [key] = re.findall(r"\nThe key is ([A-P])\.\n", text)
    assert opens[key] == answer.strip()
    assert len(set(opens.values())) == 2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("length", [12, 24, 1000])
def test_joining_needs_the_mark_and_what_its_letter_leads_to(length: int, seed: int) -> None:
    text, [answer] = read(draw(mark.join("both"), length, seed))
    leads = dict(re.findall(r"=([A-P])([A-P])", text))
    [marked] = re.findall(r"#([A-P])", text)
    assert text.endswith("?")
    assert leads[marked] == answer
    assert len(set(leads.values())) == 2
    assert read(draw(mark.join("marked"), length, seed)) == (f"{text[:-1]}#", [marked])  # about the same text
    text, [answer] = read(draw(mark.join("leads"), length + 1, seed))
    assert answer == leads[text[-1]]
    assert text[-2] == "="


def test_either_letter_is_asked_for_where_one_leads_to_another() -> None:
    asked = set()
    for seed in range(20):
        text, _ = read(draw(mark.join("leads"), 24, seed))
        [marked] = re.findall(r"#([A-P])", text)
        asked.add(text[-1] == marked)
    assert asked == {True, False}


@pytest.mark.parametrize("num", mark.COUNTS)
def test_every_key_of_pairs_is_asked_for_in_another_order(num: int) -> None:
    sample = draw(mark.pairs(num), 4000, num)
    text = BYTES.decode(texts.whole(sample.stream))
    told = re.findall("=(.)([A-P])", text[: -3 * num])
    assert len(dict(told)) == num == len(sample.answers)
    asked = re.findall("=(.)([A-P])", text[-3 * num :])
    assert dict(asked) == dict(told)
    assert num < 4 or asked != told
    assert text.count("=") == 2 * num
    assert [BYTES.decode(answer.tokens) for answer in sample.answers] == [value for _, value in asked]
    with pytest.raises(TooShortError, match=str(6 * num)):
        draw(mark.pairs(num), 6 * num - 1)


@pytest.mark.parametrize("num", mark.COUNTS)
def test_the_value_of_a_pair_that_was_told_last_is_asked_for(num: int) -> None:
    sample = draw(mark.latest(num), 4000, num)
    text = BYTES.decode(texts.whole(sample.stream))
    told = re.findall("=(.)([A-P])", text[: -3 * num])
    assert len(told) == 2 * num
    assert len(dict(told)) == num == len(sample.answers)
    asked = re.findall("=(.)([A-P])", text[-3 * num :])
    assert dict(asked) == dict(told)  # the last of a key's values
    assert num < 4 or asked != list(dict(told).items())
    assert [BYTES.decode(answer.tokens) for answer in sample.answers] == [value for _, value in asked]
    with pytest.raises(TooShortError, match=str(9 * num)):
        draw(mark.latest(num), 9 * num - 1)


def test_any_pair_may_be_told_anew() -> None:
    times = set()
    for seed in range(40):
        text = BYTES.decode(texts.whole(draw(mark.latest(4), 200, seed).stream))
        times |= set(Counter(re.findall("=(.)[A-P]", text[:-12])).values())
    assert {1, 2, 3, 4} <= times <= {1, 2, 3, 4, 5}


TOLD = rf"\n(\w+) (?:{'|'.join(babi.MOVED)}) the (\w+)\.\n"
ASKED = r"\nQuestion: Where is (\w+)\?\nAnswer: (\w+)\."


@pytest.mark.parametrize("num", people.COUNTS)
@pytest.mark.parametrize("has_moved", [False, True])
def test_anybody_is_asked_about_where_he_is_told_of_last(num: int, has_moved: bool) -> None:
    make = people.moved(num) if has_moved else people.people(num)
    again = set()
    for seed in range(40):
        sample = draw(make, 1000, seed)
        text = BYTES.decode(texts.whole(sample.stream))
        told, asked = re.findall(TOLD, text), re.findall(ASKED, text)
        assert len(told) == (2 * num if has_moved else num)
        assert len(dict(told)) == num  # each at least once
        assert len(asked) == len(sample.answers) == num + 3
        assert [BYTES.decode(answer.tokens) for answer in sample.answers] == [f" {place}" for _, place in asked]
        assert all(dict(told)[who] == place for who, place in asked)
        assert sample.needs_memory
        assert {answer.num_choices for answer in sample.answers} == {6}
        again.add(len(asked) - len(dict(asked)))
    assert again == {3} if num == 1 else max(again) > 3  # what was answered rules out nobody


def test_every_text_of_the_steps_to_people_has_one_form() -> None:
    forms = Counter()
    for seed in range(60):
        sample = draw(people.steps(4), 1000, seed)
        text = BYTES.decode(texts.whole(sample.stream))
        first = sample.answers[0].at
        told = re.findall(r"\n([A-Z]\w+) (?:[a-z ]+ )?(\w+)\.\n", text[:first])
        assert len(told) == 4
        assert [BYTES.decode(answer.tokens)[1:] for answer in sample.answers] == [
            dict(told)[re.findall("|".join(people.NAMES), text[: answer.at])[-1]] for answer in sample.answers
        ]
        asked = text[: sample.answers[1].at].rpartition(".")[2]
        forms[bool(re.search(TOLD, text[:first])), re.sub("|".join(people.NAMES), "{who}", asked)] += 1
    assert set(forms) == {("{verb}" in form.fact, form.question) for form in people.STEPS}


def test_there_are_seven_people_to_tell_of() -> None:
    assert people.NAMES == ("Daniel", "John", "Mary", "Sandra", "Bill", "Fred", "Jeff")
    with pytest.raises(ValueError, match="8 people; there are names for 1 to 7"):
        people.people(8)


@pytest.mark.parametrize("num", facts.COUNTS)
def test_capacity_asks_for_every_fact_in_another_order(num: int) -> None:
    sample = draw(facts.capacity(num), 4000, num)
    text = BYTES.decode(texts.whole(sample.stream))
    told = re.findall(r"([Q-Z]\d): ([A-P])\n", text[: 6 * num])
    assert len(dict(told)) == num == len(sample.answers)
    asked = re.findall(r"\n([Q-Z]\d): ([A-P])", text[-6 * num :])
    assert dict(asked) == dict(told)
    assert num < 4 or asked != told
    assert not re.search("[A-Z]", text[6 * num : -6 * num])


@pytest.mark.parametrize("segment_len", [32, 64, 128, 256, 512])
def test_a_thousand_bytes_hold_all_facts_of_the_capacity_task(segment_len: int) -> None:
    sample = facts.capacity(64)(SCENE, Wanted(1024, segment_len), np.random.default_rng(0))
    assert sample.needs_memory
    assert sample.num_tokens == 1024
    with pytest.raises(TooShortError, match="768"):
        draw(facts.capacity(64), 767)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("length", [100, 1000, 20_000])
def test_a_source_is_copied_or_reversed(backwards: bool, length: int) -> None:
    sample = draw(symbols.copying(backwards=backwards), length)
    text, answers = read(sample)
    source = re.match(r"\nsource: ([A-Z]+)\n", text)  # its end is told whatever comes behind it
    assert source
    assert answers == list(source[1][::-1] if backwards else source[1])
    assert len(answers) == min(4096, (length - (21 if backwards else 19)) // 2 - 32)
    assert sample.needs_memory


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_value_written_last_is_retrieved(rewrites: bool, seed: int) -> None:
    text, [answer] = read(draw(symbols.retrieval(rewrites=rewrites), 3200, seed))
    pairs = re.findall(r"\n([A-Z]{4}):([A-Z])\n", text)
    assert len(pairs) == 49
    assert dict(pairs)[text[-5:-1]] == answer
    assert len(dict(pairs)) == 49 if not rewrites else len(dict(pairs)) <= 16


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("length", [64, 200, 3200])
def test_up_to_eight_keys_are_asked_for(rewrites: bool, length: int) -> None:
    orders = set()
    for seed in range(5):
        sample = draw(symbols.retrieval(rewrites=rewrites, most_asked=8), length, seed)
        text = BYTES.decode(texts.whole(sample.stream))
        asked = [text[answer.at - 5 : answer.at - 1] for answer in sample.answers]
        pairs = re.findall(r"(?<=\n)([A-Z]{4}):([A-Z])\n", text[: sample.answers[0].at - 6])
        told = dict(pairs)
        assert len(pairs) == max(1, length // SEGMENT_LEN - 1)
        assert len(set(asked)) == len(asked) == min(8, len(told))
        assert [told[key] for key in asked] == [BYTES.decode(answer.tokens) for answer in sample.answers]
        orders.add(tuple([list(told).index(key) for key in asked]))
    assert len(orders) > 1 or length < 3200


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("length", [15, 16, 100, 199, 391, 4000])
def test_there_are_no_more_pairs_than_the_text_has_room_for(length: int, rewrites: bool) -> None:
    """A segment of 4 tokens holds no pair of 8."""
    make = symbols.retrieval(rewrites=rewrites)
    sample = make(SCENE, Wanted(length, 4), np.random.default_rng(0))
    text, [answer] = read(sample)
    pairs = re.findall(r"(?<=\n)([A-Z]{4}):([A-Z])\n", text)
    assert len(texts.whole(sample.stream)) == length
    assert (length - 7) // 8 - 1 <= len(pairs) <= (length - 7) // 8
    assert dict(pairs)[text[-5:-1]] == answer


@pytest.mark.parametrize("length", [100, 1000, 300_000])
def test_symbols_are_sorted_by_how_often_they_come(length: int) -> None:
    sample = draw(symbols.sorting, length)
    text, answers = read(sample)
    source = text.removesuffix("\nsorted: ")
    assert len(source) + len("\nsorted: ") + 20 == length
    counts = Counter(source)
    letters = "ABCDEFGHIJKLMNOPQRST"
    assert answers == sorted(letters, key=lambda letter: (-counts[letter], letter))
    last = Counter(source[len(source) * 3 // 4 :])
    if length > 100:  # where stretches are whole
        guesses = [min(set(letters) - set(answers[:i]), key=lambda letter: (-last[letter], letter)) for i in range(20)]
        right = np.mean([a == b for a, b in zip(guesses, answers, strict=True)])
        assert sample.oracle == pytest.approx(right, abs=0.11)
    assert [answer.num_choices for answer in sample.answers] == list(range(20, 0, -1))


def test_the_window_oracle_of_sorting_has_as_many_right_as_published() -> None:
    """Martins et al. 2022, section 4.1: a model that sees only the last quarter has .38 of 20 symbols right."""
    oracle = np.mean([draw(symbols.sorting, 4000, seed).oracle or 0.0 for seed in range(100)])
    assert oracle == pytest.approx(0.37, abs=0.05)


class FoldsCase(ByteTokenizer):
    def encode_inside(self, text: str) -> np.ndarray:
        return super().encode_inside(text.lower())


class KnowsNoSigns(ByteTokenizer):
    def encode_inside(self, text: str) -> np.ndarray:
        return super().encode_inside(re.sub(r"[#=?]", "!", text))


@pytest.mark.parametrize("make", [mark.pairs, mark.latest])
@pytest.mark.parametrize("num", mark.COUNTS)
def test_keys_that_the_tokenizer_does_not_tell_apart_are_refused(num: int, make: Callable[[int], Maker]) -> None:
    scene, wanted = Scene(FoldsCase(), texts.noise(BYTES)), Wanted(600, SEGMENT_LEN)
    if num <= 16:  # capitals alone
        assert make(num)(scene, wanted, np.random.default_rng(0)).answers
        return
    with pytest.raises(ValueError, match="the same tokens for 'A' and 'a'; use another tokenizer"):
        make(num)(scene, wanted, np.random.default_rng(0))


@pytest.mark.parametrize("make", [mark.detect, mark.join("both"), mark.join("leads")])
def test_marks_that_the_tokenizer_does_not_tell_apart_are_refused(make: Maker) -> None:
    with pytest.raises(ValueError, match="the same tokens for '[#=]' and '[=?]'"):
        make(Scene(KnowsNoSigns(), texts.noise(BYTES)), Wanted(600, SEGMENT_LEN), np.random.default_rng(0))


class KnowsOneLetter(ByteTokenizer):
    def encode_inside(self, text: str) -> np.ndarray:
        return super().encode_inside(re.sub(r"[A-Z]", "A", text))


@pytest.mark.parametrize(
    "make",
    [
        recall.detect,
        facts.reason,
        facts.capacity(1),
        symbols.copying(backwards=True),
        symbols.retrieval(rewrites=True),
        symbols.sorting,
    ],
)
def test_letters_that_the_tokenizer_does_not_tell_apart_are_refused(make: Maker) -> None:
    with pytest.raises(ValueError, match="the same tokens for '[A-Z]0?' and '[A-Z]0?'"):
        make(Scene(KnowsOneLetter(), texts.noise(BYTES)), Wanted(600, SEGMENT_LEN), np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(20))
def test_the_roots_solve_the_equation(seed: int) -> None:
    sample = draw(quadratic.equation, 400, seed)
    text, answers = read(sample)
    found = re.match(r"\n(-?\d+)\*x\^2([+-]\d+)\*x([+-]\d+)=0\n", text)
    assert found
    a, b, c = map(int, found.groups())
    discriminant, low, high = map(int, answers)
    assert discriminant == b * b - 4 * a * c
    assert low <= high
    assert all(a * x * x + b * x + c == 0 for x in (low, high))
    assert (-b / a) == low + high


@pytest.mark.parametrize("seed", range(20))
def test_chance_of_a_number_is_that_of_the_likeliest_that_the_steps_before_it_leave(seed: int) -> None:
    sample = draw(quadratic.equation, 400, seed)
    discriminant, low, _ = map(int, read(sample)[1])
    a, r, s = np.ix_(np.arange(1, 10), np.arange(-99, 100), np.arange(-99, 100))
    values = (a * (r - s)) ** 2
    left = [tuple(sorted((i % 199 - 99, i // 199 % 199 - 99))) for i in np.flatnonzero(values == discriminant).tolist()]
    chances = [
        np.unique(values, return_counts=True)[1].max() / values.size,
        max(Counter(x for x, _ in left).values()) / len(left),
        max(Counter(y for x, y in left if x == low).values()) / len([x for x, _ in left if x == low]),
    ]
    assert [1 / answer.num_choices for answer in sample.answers] == pytest.approx(chances)
    assert sample.answers[2].num_choices <= 9
    assert chances[0] > 1.3 / 199  # of equal roots


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [ruler.niah_single, ruler.niah_multikey("number"), ruler.niah_multikey("uuid")])
def test_a_needle_is_told_once_among_others(make: Maker, seed: int) -> None:
    text, [answer] = read(draw(make, 5000, seed))
    told = re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.\n", text)
    [key] = re.findall(r"magic \w+ for ([\w-]+) mentioned in the provided text is$", text)
    assert [value for name, value in told if name == key] == [answer.strip()]
    assert (len(told) > 20) == (make is not ruler.niah_single)


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("make", [ruler.niah_single, ruler.niah_multikey("number")])
def test_a_needle_stands_whole_at_its_depth(make: Maker, depth: float) -> None:
    length = 5000
    text, [answer] = read(draw(make, length, depth=depth))
    at = text.index(f" is: {answer.strip()}.\n")
    question = length - text.index("\nWhat is the special magic")
    latest = (length - question) // SEGMENT_LEN * SEGMENT_LEN
    assert abs(at - depth * latest) < 300  # a line of the haystack, the needle, a segment
    if make is ruler.niah_single:
        lines = text.partition("\nWhat is the special magic")[0].splitlines()
        assert {line for line in lines if " is: " not in line} <= {needle.HAY.strip(), ""}


def test_frequent_words_fill_the_text_whatever_their_length_in_tokens() -> None:
    """A tokenizer that gives words of one and of eight tokens."""

    class Uneven:
        def encode_inside(self, text: str) -> np.ndarray:
            words = re.findall(r" ?\w+|\W", text)
            sizes = [1 if len(word) % 2 == 0 or word[-1] in "ae" else 8 for word in words]
            return np.repeat([len(word) for word in words], sizes) if words else np.zeros(0)

    sample = ruler.frequent_words(Scene(Uneven(), texts.noise(BYTES)), Wanted(20_000, 64), np.random.default_rng(0))
    tokens = texts.whole(sample.stream)
    question = len(Uneven().encode_inside(ruler.FWE_QUESTION))
    before = tokens[: sample.answers[0].at - question]
    filler = int(Uneven().encode_inside("\n")[0])
    assert len(tokens) == 20_000
    assert len(before) - 1 - np.flatnonzero(before != filler)[-1] < 100


@pytest.mark.parametrize("seed", range(5))
def test_variables_that_got_the_value_are_named(seed: int) -> None:
    text, [answer] = read(draw(ruler.variable_tracking, 2000, seed))
    got = dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.MULTILINE))
    [value] = re.findall(r"assigned the value (\d+) in", text)
    names = list(got)
    while True:
        names_of = {name: got.get(got[name], got[name]) for name in got}
        if names_of == got:
            break
        got = names_of
    assert set(answer.split()) == {name for name in names if got[name] == value}
    assert len(names) == 5


@pytest.mark.parametrize("length", [2000, 20_000])
def test_common_words_are_the_ten_that_come_most(length: int) -> None:
    text, [answer] = read(draw(ruler.common_words, length))
    words = Counter(text.partition("\nQuestion")[0].split())
    common = answer.split()
    times, others = (10, 1) if length < 4096 else (30, 3)
    assert {words.pop(word) for word in common} == {times}
    assert len(common) == (3 if length < 4096 else 10)
    assert max(words.values()) == others
    assert common == sorted(common, key=text.index)
    assert all(re.fullmatch(r"([b-z][aeiou]){4}", word) for word in words)


def test_no_common_word_follows_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words told by their numbers: common ones are drawn apart, and none is among the others."""
    monkeypatch.setattr(ruler, "word", str)
    [answer] = read(draw(ruler.common_words, 20_000))[1]
    steps = np.diff([int(code) for code in answer.split()])
    assert len(set(steps.tolist())) == 9
    assert min(abs(steps)) > 1
    near = int(answer.split()[0])
    others = ruler._other_words(near - 5, 3, frozenset({near}), np.random.default_rng(0))
    assert str(near) not in {next(others).strip() for _ in range(3 * 256)}


@pytest.mark.parametrize("depth", [None, 0.5, 1.0])
@pytest.mark.parametrize("make", [ruler.variable_tracking, needle.passkey])
def test_lines_of_facts_and_of_the_sentences_around_them_are_whole(make: Maker, depth: float | None) -> None:
    text, _ = read(draw(make, 2000, depth=depth))
    lines = text.partition("\nQuestion" if make is ruler.variable_tracking else "\nWhat is")[0].splitlines()
    others = [line for line in lines if line not in (needle.HAY.strip(), "")]
    assert len(others) == (5 if make is ruler.variable_tracking else 1)
    told = r"VAR [A-Z]{5} = (VAR [A-Z]{5}|\d{5})|The pass key is (\d{5})\. Remember it\. \2 is the pass key\."
    assert all(re.fullmatch(told, line) for line in others)


@pytest.mark.parametrize("length", [1000, 20_000, 200_000])
def test_frequent_words_are_those_of_ranks_2_to_4_behind_dots_as_published(length: int) -> None:
    sample = draw(ruler.frequent_words, length)
    text, [answer] = read(sample)
    words = Counter(text.partition("\nQuestion")[0].split())
    assert [word for word, _ in words.most_common(4)] == ["...", *answer.split()]
    counts = [num for _, num in words.most_common()]
    assert len(set(counts[:5])) == 5
    zeta = sum(n**-2 for n in range(1, 10**6))
    num = next(num for num in range(10**6) if int(num / zeta) == counts[0])
    wanted = [{int((num + more) / zeta / n**2) for more in (0, 1)} for n in range(1, 2001)]  # the same count of dots
    assert all(count in allowed for count, allowed in zip(counts, wanted, strict=False))
    assert 0 in wanted[len(counts)]
    assert all(re.fullmatch("[a-z]{6}", word) for word in words if word != "...")
    assert sample.answers[0].num_choices == (len(words) - 1) * (len(words) - 2) * (len(words) - 3)


def test_words_are_spread_over_a_text_of_many_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "_STRETCH", 64)
    text, [answer] = read(draw(ruler.frequent_words, 50_000))
    words = text.partition("\nQuestion")[0].split()
    for word in ("...", answer.split()[0]):
        places = [i / len(words) for i, one in enumerate(words) if one == word]
        assert np.mean(places) == pytest.approx(0.5, abs=0.04)
        assert len(places) == words.count(word) == int(words.count("...") / (1 if word == "..." else 4))


@pytest.mark.parametrize("num", [53, 54, 60, 75, 90, 100, 128, 200, 1000])
def test_no_two_of_the_highest_counts_are_equal(num: int) -> None:
    assert len(set(ruler._counts(num)[:5].tolist())) == 5
    assert len(set(ruler._counts(ruler._LEAST_CODED - 1)[:5].tolist())) == 4


def test_a_match_is_the_share_of_expected_strings() -> None:
    assert ruler.string_match(" it is Ab, and cd", ["AB", "CD", "ef", "gh"]) == 0.5


@pytest.mark.parametrize(
    ("make", "num_tokens"),
    [
        (ruler.niah_single, 128),
        (ruler.niah_multikey("uuid"), 128),
        (ruler.variable_tracking, 30),
        (ruler.common_words, 120),
        (ruler.frequent_words, 50),
    ],
)
def test_as_many_tokens_are_written_as_published(make: Maker, num_tokens: int) -> None:
    assert draw(make, 5000).max_new_tokens == num_tokens


@pytest.mark.parametrize(
    "make",
    [facts.reason, symbols.sorting, symbols.retrieval(rewrites=False), ruler.frequent_words, recall.detect],
)
def test_what_does_not_fit_says_what_would(make: Maker) -> None:
    with pytest.raises(TooShortError) as error:
        draw(make, 14)
    draw(make, error.value.need)
