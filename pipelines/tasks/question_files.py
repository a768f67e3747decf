"""Questions from the files of BABILong, RULER, LongBench and SCROLLS, as published, where a user has them.

A file is JSON lines or Parquet. Its form is known by its fields:

    BABILong    input, question, target
    RULER       input, outputs (and, in newer files, answer_prefix)
    LongBench   context, input, answers, length (all_classes may be null)
    SCROLLS     id, pid, input, output

At `length` tokens all rows count that have at most so many, question and answer included; how many are longer is a
figure of its own, and nothing is cut. Texts are tokenised whole, so that a batch of rows lies in memory.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from pipelines import storage
from pipelines.config import InputError
from pipelines.tasks import babi, texts
from pipelines.tasks.babilong import LAX, QUESTION, STRICT, is_laxly_right, is_strictly_right
from pipelines.tasks.base import Figure, Material, check_length
from pipelines.tasks.questions import measured
from pipelines.tasks.ruler import MATCH, string_match
from pipelines.tasks.samples import Answer, Sample, Scene, Scorer
from rmt_core import RecurrentModel

F1, EM, LONGER = "f1", "exact_match", "num_longer"


class Question(NamedTuple):
    """A row: what is read, what is to be written, and how it is marked."""

    prompt: str
    answer: str
    scorers: tuple[Scorer, ...]


def read(uri: str) -> list[Question]:
    """All rows of a file; InputError with the row's number where one is not as published."""
    rows = list(_rows(uri))
    if not rows:
        raise InputError(f"--questions {uri}: the file holds no rows")
    form = next((form for form in _FORMS if form.fields <= rows[0].keys()), None)
    if form is None:
        known = "; ".join(f"{form.name} {', '.join(sorted(form.fields))}" for form in _FORMS)
        raise InputError(f"--questions {uri}: fields {', '.join(rows[0])} are of no known form ({known})")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(form.question(row))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"--questions {uri}: row {number} is no row of {form.name}: {error!r}") from error
    return found


def _rows(uri: str) -> Iterator[dict[str, Any]]:
    try:
        content = storage.read_bytes(uri)
    except OSError as error:
        raise InputError(f"--questions {uri} cannot be read: {error}") from error
    if uri.endswith(".parquet"):
        try:
            yield from pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"--questions {uri}: no Parquet file: {error}") from error
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"--questions {uri}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"--questions {uri}: line {number} is no JSON object")
        yield row


# --- the forms --------------------------------------------------------------------------------------


def _babilong(row: Mapping[str, Any]) -> Question:
    question, target = row["question"].strip(), row["target"].strip()
    labels = _labels(target)
    return Question(
        row["input"] + QUESTION.format(question),
        f" {target}",
        (
            Scorer(STRICT, lambda written: float(is_strictly_right(written, question, target, labels))),
            Scorer(LAX, lambda written: float(is_laxly_right(written, target))),
        ),
    )


def _labels(target: str) -> tuple[str, ...]:
    """Of the first five tasks: those among which the target is."""
    return next((labels for labels in babi.LABELS.values() if target in labels), (target,))


def _ruler(row: Mapping[str, Any]) -> Question:
    expected = [str(one) for one in row["outputs"]]
    scorer = Scorer(MATCH, lambda written: string_match(written, expected))
    return Question(row["input"] + row.get("answer_prefix", ""), " " + " ".join(expected), (scorer,))


def _longbench(row: Mapping[str, Any]) -> Question:
    question = f"{row['context']}\n\nQuestion: {row['input']}\nAnswer:" if row["input"] else f"{row['context']}\n\n"
    return Question(question, f" {row['answers'][0]}", _overlap(row["answers"]))


def _scrolls(row: Mapping[str, Any]) -> Question:
    return Question(f"{row['input']}\n\n", row["output"], _overlap([row["output"]]))


def _overlap(expected: Sequence[str]) -> tuple[Scorer, ...]:
    """The best over the expected answers."""
    return (
        Scorer(F1, lambda written: max(token_f1(written, one) for one in expected)),
        Scorer(EM, lambda written: float(any(_words(written) == _words(one) for one in expected))),
    )


class _Form(NamedTuple):
    name: str
    fields: frozenset[str]
    question: Callable[[Mapping[str, Any]], Question]


_FORMS = (
    _Form("BABILong", frozenset({"input", "question", "target"}), _babilong),
    _Form("RULER", frozenset({"input", "outputs"}), _ruler),
    _Form("LongBench", frozenset({"context", "input", "answers"}), _longbench),
    _Form("SCROLLS", frozenset({"input", "output"}), _scrolls),
)


def token_f1(written: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, in lower case without articles and punctuation (SQuAD)."""
    ours, theirs = Counter(_words(written)), Counter(_words(expected))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else float(not ours and not theirs)


def _words(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char.isalnum() or char.isspace())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


# --- the task ---------------------------------------------------------------------------------------


class FileTask:
    """Accuracy to the letter, and the marks of the file's form for what is written freely."""

    settings = frozenset({"questions"})

    def check(self, length: int, segment_len: int, material: Material) -> None:
        check_length("file", length, segment_len)
        if material.questions is None:
            raise InputError("task file needs the questions' file: --questions FILE")
        self._samples(length, segment_len, material)

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        samples, num_longer = self._samples(length, model.segment_len, material)
        found = measured(model, len(samples), lambda index: samples[index], material)
        return [*found, Figure(LONGER, num_longer)]

    def _samples(self, length: int, segment_len: int, material: Material) -> tuple[list[Sample], int]:
        """Those that count, and how many rows are longer."""
        assert material.questions is not None
        scene = Scene(material.tokenizer, texts.noise(material.tokenizer))
        rows = [sample(scene, question, segment_len) for question in read(material.questions)]
        counted = [row for row in rows if row.num_tokens <= length]
        if not counted:
            shortest = min(row.num_tokens for row in rows)
            raise InputError(f"file at length {length}: the shortest row of {material.questions} has {shortest} tokens")
        return counted, len(rows) - len(counted)


def sample(scene: Scene, question: Question, segment_len: int) -> Sample:
    """The whole row; whether it needs memory is told by its length alone."""
    prompt, answer = scene.encode(question.prompt), scene.encode(question.answer)
    if not len(answer):
        raise InputError("a question with an empty answer cannot be marked; leave it out")
    text = np.concatenate([prompt, answer])
    answers = (Answer(len(prompt), answer, float("inf")),)
    return Sample(
        partial(iter, [text]),
        len(text),
        answers,
        needs_memory=len(prompt) > segment_len,
        scorers=question.scorers,
        max_new_tokens=len(answer) + 8,
    )
