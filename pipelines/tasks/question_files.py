"""Questions from the files of BABILong, RULER, LongBench and SCROLLS, as published, where a user has them.

A file is JSON lines, a JSON array or Parquet. Its form is known by its fields:

    BABILong    input, question, target
    RULER       input, outputs (and, in newer files, answer_prefix)
    LongBench   context, input, answers, dataset, all_classes
    SCROLLS     id, pid, input, output; rows of one id are one question with several references

What is written freely is marked as published, in as many tokens as published, whatever the tokenizer:

    BABILong    laxly, by whether the target occurs, or all parts of a list; and strictly, by the labels of the task (as
                words: see `babilong`), which its question tells. A question that does not has no strict mark
    RULER       by the share of its outputs that occur; in `qa_1` and `qa_2`, by any of them
    LongBench   by the best reference, with its data sets' own marks (see `marking`; F1 for data sets of others), and by
                exact match beside F1
    SCROLLS     by F1 and exact match with the best reference; files of summaries, which are those whose references have
                30 words or more on average, by ROUGE-1, -2 and -L and the geometric mean of the three over the file

Deviation: where all references of a question are one line, F1 and exact match are of the first line written, as models
write on; published for LongBench's sets of examples alone (trec, triviaqa, samsum, lsht). To the letter the first
reference is asked for, and of RULER all outputs.

Texts are asked about as in the files, but BABILong's and LongBench's published instructions and examples stand in no
file, and the wording around their texts is our own: figures are not those of published tables. Questions of both stand
between `Question:` and `Answer:`, those too that ask for LongBench's summaries, counts and passages; its sets of
examples end with their last one, unanswered, and code with itself.

At `length` tokens all questions count that have at most so many, their answers included, short ones too; how many are
longer is a figure of its own, and nothing is cut. The text of the whole file lies in memory, and the tokens of a batch
of rows: texts are tokenised once to be counted and once to be read.
"""

import codecs
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from pipelines import storage
from pipelines.config import InputError
from pipelines.extras import require_extra
from pipelines.tasks import babi, marking, texts
from pipelines.tasks.babilong import LAX, QUESTION, STRICT, is_laxly_right, names_only, parts, published_sentence
from pipelines.tasks.base import Figure, Material, check_length
from pipelines.tasks.questions import measured
from pipelines.tasks.ruler import MATCH, NEW_TOKENS, string_match
from pipelines.tasks.samples import Answer, Sample, Scene, Scorer
from rmt_core import RecurrentModel

F1, EM, LONGER = "f1", "exact_match", "num_longer"
ROUGE = ROUGE_1, ROUGE_2, ROUGE_L = "rouge_1", "rouge_2", "rouge_l"
ROUGE_MEAN = "rouge_mean"  # geometric, of a file's three means
CLASSES, NUMBERS, EDITS = "classification", "numbers", "edit_similarity"

_BABILONG_TOKENS, _SCROLLS_TOKENS, _SUMMARY_TOKENS = 20, 256, 1024
_SUMMARY_WORDS = 30  # of a file's references on average: SCROLLS's summaries have 70 to 500, its answers 1 to 12


class Question(NamedTuple):
    """A row: what is read, what is to be written, and how it is marked."""

    prompt: str
    answer: str
    scorers: tuple[Scorer, ...]
    max_new_tokens: int  # written for the scorers
    row: int = 0  # of the file, from 1; of rows that are one question the first


def read(uri: str) -> list[Question]:
    """All questions of a file; InputError with the row's number where one is not as published."""
    rows = [_object(uri, number, row) for number, row in enumerate(_rows(uri), 1)]
    if not rows:
        raise InputError(f"--questions {uri}: the file holds no rows")
    form = next((form for form in _FORMS if form.fields <= rows[0].keys()), None)
    if form is None:
        known = "; ".join(f"{form.name} {', '.join(sorted(form.fields))}" for form in _FORMS)
        raise InputError(f"--questions {uri}: fields {', '.join(rows[0])} are of no known form ({known})")
    numbered = dict(enumerate(rows, 1))
    for number, row in numbered.items():
        if missing := sorted(form.fields - row.keys()):
            raise InputError(f"--questions {uri}: row {number} is no row of {form.name}: it has no {missing[0]}")
    found = []
    for number, row in (form.merged(numbered) if form.merged else numbered).items():
        try:
            found.append(_encodable(form.question(row))._replace(row=number))
        except InputError as error:
            raise InputError(f"--questions {uri}: row {number}: {error}") from error
    return found


def _encodable(question: Question) -> Question:
    """InputError where a text holds half of a surrogate pair, as JSON can write and no tokenizer reads."""
    for text in (question.prompt, question.answer):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            broken = ascii(text[error.start : error.end])
            raise InputError(f"character {broken} at place {error.start} of its text is no Unicode text") from error
    return question


def _object(uri: str, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"--questions {uri}: row {number} is no JSON object")
    return row


def _rows(uri: str) -> Iterator[Any]:
    try:
        content = storage.read_bytes(uri).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"--questions {uri} cannot be read: {error}") from error
    if uri.endswith(".parquet"):
        try:
            yield from pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            shown = " ".join(str(error).split())
            raise InputError(f"--questions {uri}: no Parquet file, or a damaged one: {shown}") from error
        return
    if content.lstrip()[:1] == b"[":
        try:
            yield from json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--questions {uri}: no JSON array: {error}") from error
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--questions {uri}: line {number} is no JSON: {error}") from error


# --- the forms --------------------------------------------------------------------------------------


_YES_OR_NO = ("no", "yes")
_WAYS = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")
_GOALS, _MOODS = ("bedroom", "garden", "kitchen"), ("bored", "hungry", "thirsty", "tired")
_SIDE = "(north|south|east|west)"
_ASKED = {  # a task's question in lower case -> what it may be answered with
    r"where is (the )?\w+": babi.PLACES,  # qa1, qa2, qa11, qa12, qa13
    r"where was the \w+ before the \w+": babi.PLACES,  # qa3
    rf"what is (the \w+ {_SIDE} of|{_SIDE} of the \w+)": babi.PLACES,  # qa4
    r"who (gave|received) the \w+( to \w+)?": babi.LABELS["qa5"],
    r"who did \w+ give the \w+ to|what did \w+ give to \w+": babi.LABELS["qa5"],
    r"how many objects is \w+ carrying": ("none", "one", "two", "three"),  # qa7
    r"what is \w+ carrying": (*babi.THINGS, "nothing"),  # qa8
    r"where was \w+ before the \w+": ("bedroom", "cinema", "kitchen", "office", "park", "school"),  # qa14
    r"what is \w+ afraid of": ("cat", "mouse", "sheep", "wolf"),  # qa15
    r"what color is \w+": ("gray", "green", "white", "yellow"),  # qa16
    r"is the [\w ]+ (above|below|to the left of|to the right of) the [\w ]+": _YES_OR_NO,  # qa17
    r"does the [\w ]+ fit in the [\w ]+|is the [\w ]+ bigger than the [\w ]+": _YES_OR_NO,  # qa18
    r"how do you go from the \w+ to the \w+": _WAYS,  # qa19
    r"where will \w+ go|why did \w+ (go to|get) the \w+": (*_GOALS, *_MOODS),  # qa20
}
_IS_THERE = r"is \w+ in the \w+"  # of qa6, qa9 and qa10
_OF_QA10 = frozenset({"bill", "fred", "julie", "cinema", "park", "school", "maybe"})  # beside Mary and places of both
_OF_QA6_AND_QA9 = frozenset({"daniel", "john", "sandra", "bathroom", "garden", "hallway"})
_FACT = re.compile(
    r"\b(Bill|Fred|Julie|Daniel|John|Sandra) (?:is|went|moved|travelled|journeyed)\b[^.]{,40}"
    r"\bthe (?:bathroom|bedroom|cinema|garden|hallway|kitchen|office|park|school)\."
)


def _babilong(row: Mapping[str, Any]) -> Question:
    text, question = _text_of("input", row["input"]), _text_of("question", row["question"]).strip()
    target = _text_of("target", row["target"]).strip()
    if not all(part.strip() for part in target.split(",")):
        raise InputError(f"its target is {_shown(target)}, which is empty or has an empty part between commas")
    scorers = [Scorer(LAX, lambda written: float(is_laxly_right(written, target)))]
    if labels := _labels(question, target, text):

        def is_strictly_right(written: str) -> float:
            return float(names_only(published_sentence(written), question, target, labels))

        scorers.insert(0, Scorer(STRICT, is_strictly_right))
    return Question(text + QUESTION.format(question), f" {target}", tuple(scorers), _BABILONG_TOKENS)


def _labels(question: str, target: str, text: str) -> tuple[str, ...]:
    """What the task of a question may be answered with; nothing where no task asks so or has this target."""
    asked = question.lower().rstrip("? ")
    if re.fullmatch(_IS_THERE, asked):
        labels = _yes_or_no({*asked.split(), target.lower()}, text)
    else:
        labels = next((labels for words, labels in _ASKED.items() if re.fullmatch(words, asked)), ())
    return labels if {part.lower() for part in parts(target)} <= {label.lower() for label in labels} else ()


def _yes_or_no(words: set[str], text: str) -> tuple[str, ...]:
    """Whether it may be `maybe` too, which the question's words tell, or else the people of the facts in the text."""
    known = _OF_QA10 | _OF_QA6_AND_QA9
    told = words & known or {name.lower() for name in _FACT.findall(text)}
    if told and told <= _OF_QA10:
        return ("maybe", *_YES_OR_NO)
    return _YES_OR_NO if told and told <= _OF_QA6_AND_QA9 else ()


_RULER = {  # words of a task's prompt -> its kind; other tasks are needles
    "Answer the question based on the given documents": "qa",
    "track the chain(s) of variable assignment": "vt",
    "Below is a numbered list of words": "cwe",
    "track the frequency of each coded word": "fwe",
}


def _ruler(row: Mapping[str, Any]) -> Question:
    prefix = row.get("answer_prefix")
    prompt = _text_of("input", row["input"]) + ("" if prefix is None else _text_of("answer_prefix", prefix))
    expected = _answers(row, "outputs")
    kind = next((kind for words, kind in _RULER.items() if words in prompt), "niah")
    wanted = [[one] for one in expected] if kind == "qa" else [expected]  # any of them, or all
    scorer = Scorer(MATCH, lambda written: max(string_match(written, group) for group in wanted))
    return Question(prompt, f" {expected[0] if kind == 'qa' else ' '.join(expected)}", (scorer,), NEW_TOKENS[kind])


def _answers(row: Mapping[str, Any], field: str) -> list[str]:
    """Texts of a list that holds at least one, none of them empty."""
    given = row.get(field)
    if not isinstance(given, list) or not given:
        raise InputError(f"its {field} are {_shown(given)}, no list of one text or more")
    for one in given:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise InputError(f"{_shown(one)} in its {field} is no text or number")
        if isinstance(one, float) and not math.isfinite(one):
            raise InputError(f"{_shown(one)} in its {field} is no finite number")
    return [_filled(field, str(one)) for one in given]


def _filled(field: str, text: str) -> str:
    if not text.strip():
        raise InputError(f"{_shown(text)} in its {field} is an empty answer, which cannot be marked")
    return text


def _text_of(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"its {field} is {_shown(value)}, no text")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


class _DataSet(NamedTuple):
    """How answers of a data set of LongBench are marked."""

    metric: str
    mark: Callable[..., float]  # of what was written, an expected answer and, where it classifies, all classes
    max_new_tokens: int
    is_same: Callable[[str, str], float] = marking.exact_match  # beside F1


_OTHER = _DataSet(F1, marking.token_f1, 64)
_LONGBENCH = {
    **dict.fromkeys(("narrativeqa", "qasper"), _DataSet(F1, marking.token_f1, 128)),
    "multifieldqa_en": _DataSet(F1, marking.token_f1, 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), _DataSet(F1, marking.token_f1, 32)),
    "multifieldqa_zh": _DataSet(F1, marking.character_f1, 64, marking.character_exact_match),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), _DataSet(ROUGE_L, marking.rouge_l, 512)),
    "samsum": _DataSet(ROUGE_L, marking.rouge_l, 128),
    "dureader": _DataSet(ROUGE_L, marking.character_rouge_l, 128),
    "vcsum": _DataSet(ROUGE_L, marking.character_rouge_l, 512),
    **dict.fromkeys(("trec", "lsht"), _DataSet(CLASSES, marking.class_share, 64)),
    **dict.fromkeys(
        ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), _DataSet(NUMBERS, marking.number_share, 32)
    ),
    **dict.fromkeys(("lcc", "repobench-p"), _DataSet(EDITS, marking.edit_similarity, 64)),
}


_EXAMPLES = ("trec", "triviaqa", "samsum", "lsht")  # of answered examples, and as their input one that is not
_QUESTIONS = {  # of data sets whose input asks nothing
    "passage_count": "How many different paragraphs are there above, each counted once however often it comes?",
    "passage_retrieval_en": "Which paragraph above does the following text sum up? Name it as in `Paragraph 1`.",
    "passage_retrieval_zh": "以下文字概括的是上面的哪个段落？请按“段落1”的形式写出编号。",
    "gov_report": "What does this report say? Sum it up in some paragraphs.",
    "multi_news": "What do these articles report together? Sum them up in some paragraphs.",
    "vcsum": "这次会议谈了哪些内容？请概括成一段话。",
}


def _longbench(row: Mapping[str, Any]) -> Question:
    expected, name = _answers(row, "answers"), str(row.get("dataset")).removesuffix("_e")
    prompt = _longbench_prompt(name, _text_of("context", row["context"]), _text_of("input", row["input"]))
    data_set = _LONGBENCH.get(name, _OTHER)
    follows = data_set.metric == EDITS or prompt[-1:].isspace() or prompt.endswith("：")  # with no space between
    mark = data_set.mark
    if data_set.metric == ROUGE_L:
        require_extra("rouge", job=f"LongBench's {name}")
    if data_set.metric == CLASSES:
        mark = partial(mark, classes=_answers(row, "all_classes"))
    of_line = name in _EXAMPLES or (data_set.metric == F1 and _are_lines(expected))
    scorers = [_best(data_set.metric, mark, expected, of_line=of_line)]
    if data_set.metric == F1:
        scorers.append(_best(EM, data_set.is_same, expected, of_line=of_line))
    answer = expected[0] if follows else f" {expected[0]}"
    return Question(prompt, answer, tuple(scorers), data_set.max_new_tokens)


def _longbench_prompt(name: str, context: str, given: str) -> str:
    if name in ("lcc", "repobench-p"):
        return context + given  # code, whose next line follows
    if name in _EXAMPLES:
        return f"{context}\n{given}"
    question = "\n".join(part for part in (_QUESTIONS.get(name), given) if part)
    return f"{context}\n\nQuestion: {question}\nAnswer:" if question else f"{context}\n\n"


def _scrolls(row: Mapping[str, Any]) -> Question:
    expected = row["output"]
    if any(one is None for one in expected):
        raise InputError("its output is null, as in test splits, so that nothing can be marked; use another split")
    expected = [_filled("output", _text_of("output", one)) for one in expected]
    prompt = f"{_text_of('input', row['input'])}\n\n"
    if row["is_summarised"]:
        require_extra("rouge", job="marking SCROLLS's summaries")
        marks = zip(ROUGE, (marking.rouge_1, marking.rouge_2, marking.rouge_l), strict=True)
        return Question(prompt, expected[0], tuple(_best(*mark, expected) for mark in marks), _SUMMARY_TOKENS)
    of_line = _are_lines(expected)
    scorers = (
        _best(F1, marking.token_f1, expected, of_line=of_line),
        _best(EM, marking.exact_match, expected, of_line=of_line),
    )
    return Question(prompt, expected[0], scorers, _SCROLLS_TOKENS)


def _by_id(rows: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A row for each id (and input), whose output is a list, by the number of its first row.

    What they are, answers or summaries, is told by the length of all outputs together.
    """
    lengths = [len(row["output"].split()) for row in rows.values() if isinstance(row["output"], str)]
    told = {"is_summarised": bool(lengths) and sum(lengths) >= _SUMMARY_WORDS * len(lengths)}
    first: dict[Any, int] = {}
    found: dict[int, dict[str, Any]] = {}
    for number, row in rows.items():
        key = tuple(part if isinstance(part, str) else repr(part) for part in (row.get("id", number), row["input"]))
        one = found.setdefault(first.setdefault(key, number), {**row, **told, "output": []})
        one["output"].append(row["output"])
    return found


def _best(metric: str, mark: Callable[[str, str], float], expected: Sequence[str], *, of_line: bool = False) -> Scorer:
    """The mark by the expected answer that it agrees with best; of the first line written, or of all."""

    def best(written: str) -> float:
        read = marking.first_line(written) if of_line else written
        return max(mark(read, one) for one in expected)

    return Scorer(metric, best)


def _are_lines(expected: Sequence[str]) -> bool:
    return not any("\n" in one.strip() for one in expected)


class _Form(NamedTuple):
    name: str
    fields: frozenset[str]
    question: Callable[[Mapping[str, Any]], Question]
    # rows of one question as one, all by their numbers
    merged: Callable[[Mapping[int, dict[str, Any]]], dict[int, dict[str, Any]]] | None = None


_FORMS = (
    _Form("BABILong", frozenset({"input", "question", "target"}), _babilong),
    _Form("RULER", frozenset({"input", "outputs"}), _ruler),
    _Form("LongBench", frozenset({"context", "input", "answers"}), _longbench),
    _Form("SCROLLS", frozenset({"input", "output"}), _scrolls, _by_id),
)


# --- the task ---------------------------------------------------------------------------------------


class FileTask:
    """Accuracy to the letter, and the marks of the file's form for what is written freely."""

    settings = frozenset({"questions", "compiled"})

    def check(self, length: int, segment_len: int, material: Material) -> None:
        check_length("file", length, segment_len)
        if material.questions is None:
            raise InputError("task file needs the questions' file: --questions FILE")
        self._samples(length, segment_len, material)

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        samples, num_longer = self._samples(length, model.segment_len, material)
        found = measured(model, len(samples), lambda index: samples[index], material)
        return [*found, *_rouge_means(found), Figure(LONGER, num_longer)]

    def _samples(self, length: int, segment_len: int, material: Material) -> tuple[list[Sample], int]:
        """Those that count, and how many rows are longer."""
        assert material.questions is not None
        scene = Scene(material.tokenizer, texts.noise(material.tokenizer))
        rows = []
        for question in read(material.questions):
            try:
                rows.append(sample(scene, question, segment_len))
            except InputError as error:
                raise InputError(f"--questions {material.questions}: row {question.row}: {error}") from error
        counted = [row for row in rows if row.num_tokens <= length]
        if not counted:
            shortest = min(row.num_tokens for row in rows)
            raise InputError(f"file at length {length}: the shortest row of {material.questions} has {shortest} tokens")
        return counted, len(rows) - len(counted)


def _rouge_means(figures: Sequence[Figure]) -> list[Figure]:
    """The geometric means of the three of ROUGE where they were measured, by memory, without intervals."""
    found = []
    for first in (figure for figure in figures if figure.metric == ROUGE_1):
        three = [figure.value for figure in figures if figure.metric in ROUGE and figure.memory == first.memory]
        mean = math.prod(three) ** (1 / len(three))
        found.append(first._replace(metric=ROUGE_MEAN, value=mean, low=None, high=None))
    return found


def sample(scene: Scene, question: Question, segment_len: int) -> Sample:
    """The whole row, tokenised when it is read; whether it needs memory is told by its length alone."""
    answer = scene.encode(question.answer)
    if not len(answer):
        raise InputError("a question with an empty answer cannot be marked; leave it out")
    num_prompt = len(scene.begin(question.prompt))
    if not num_prompt:
        raise InputError("a question with an empty text cannot be asked; leave it out")
    return Sample(
        partial(_text, scene, question),
        num_prompt + len(answer),
        (Answer(num_prompt, answer, float("inf")),),
        needs_memory=num_prompt > segment_len,
        scorers=question.scorers,
        max_new_tokens=question.max_new_tokens,
    )


def _text(scene: Scene, question: Question) -> Iterator[np.ndarray]:
    yield scene.begin(question.prompt)
    yield scene.encode(question.answer)
