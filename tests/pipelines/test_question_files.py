"""Published forms of question files, in small: what is asked, what is right, what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.tasks import TASKS, question_files, texts
from pipelines.tasks.base import MEMORIES, Material
from pipelines.tasks.held_out import open_held_out
from pipelines.tasks.samples import Scene
from tests.rmt_core.tiny import RMT, tiny_model

BYTES = ByteTokenizer()
ROWS: dict[str, dict[str, Any]] = {
    "babilong": {"input": "Long ago. Mary went to the office.", "question": "Where is Mary? ", "target": "office"},
    "ruler": {"index": 0, "input": "Find both: 12, 34.", "outputs": ["12", "34"], "answer_prefix": " They"},
    "longbench": {"context": "A book.", "input": "Who?", "answers": ["the cat", "a dog"], "length": 2,
                  "all_classes": None, "dataset": "qa", "language": "en", "_id": "0"},
    "scrolls": {"id": "1", "pid": "1_0", "input": "What now?\n\nA story.", "output": "It ends."},
}  # fmt: skip
PROMPTS = {
    "babilong": "Long ago. Mary went to the office.\nQuestion: Where is Mary?\nAnswer:",
    "ruler": "Find both: 12, 34. They",
    "longbench": "A book.\n\nQuestion: Who?\nAnswer:",
    "scrolls": "What now?\n\nA story.\n\n",
}
ANSWERS = {"babilong": " office", "ruler": " 12 34", "longbench": " the cat", "scrolls": "It ends."}
MARKS = {
    "babilong": [("in the Office", {"strict": 1, "lax": 1}), ("garden, office", {"strict": 0, "lax": 1})],
    "ruler": [("34 or so", {"string_match": 0.5})],
    "longbench": [
        ("\nDog!\nQuestion: And", {"f1": 1, "exact_match": 1}),
        ("a cat sat", {"f1": 2 / 3, "exact_match": 0}),
    ],
    "scrolls": [("it", {"f1": 2 / 3, "exact_match": 0})],
}


def write(path: Path, *rows: Any) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def material(uri: str | None) -> Material:
    return Material(BYTES, open_held_out(None, BYTES), questions=uri, batch_size=2)


def marks(written: str, question: question_files.Question) -> dict[str, float]:
    return {scorer.metric: scorer.mark(written) for scorer in question.scorers}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_a_published_row_is_asked_and_marked(form: str, suffix: str, tmp_path: Path) -> None:
    [question] = question_files.read(write(tmp_path / f"rows.{suffix}", ROWS[form]))
    assert question.prompt == PROMPTS[form]
    assert question.answer == ANSWERS[form]
    for written, wanted in MARKS[form]:
        assert marks(written, question) == pytest.approx(wanted)
    sample = question_files.sample(Scene(BYTES, texts.noise(BYTES)), question, 16)
    assert BYTES.decode(texts.whole(sample.stream)) == PROMPTS[form] + ANSWERS[form]
    assert sample.answers[0].at == len(PROMPTS[form])


@pytest.mark.parametrize(
    ("question", "target", "written", "strict"),
    [
        ("Where is Mary? ", "office", "\nOffice<context> garden", 1),
        ("Where is Mary? ", "office", "office\ngarden", 0),
        ("Where is Mary? ", "office", "office. garden", 1),
        ("Where is Mary? ", "office", "office<example>garden", 1),
        ("Where is Mary? ", "office", "office\nQuestion: Where is the kitchen?", 0),
        ("Where is the milk? ", "Office", "the office", 1),
        ("Where is the milk? ", "office", "the office of the cinema", 1),
        ("Where was the apple before the garden? ", "office", "the office, then the garden", 1),
        ("Where was the apple before the garden? ", "office", "the office, then the hallway", 0),
        ("What is the bedroom east of? ", "kitchen", "the kitchen, not the bedroom", 1),
        ("What is north of the bedroom? ", "kitchen", "kitchen and office", 0),
        ("What did Fred give to Bill? ", "milk", "milk, says Jeff", 0),
        ("Who gave the milk to Bill? ", "Fred", "Fred gave the milk to Bill", 1),
        ("Who received the milk? ", "Fred", "Fred or Jeff", 0),
        ("Who did Jeff give the milk to? ", "Fred", "Jeff gave it to fred", 1),
        ("Is Sandra in the office? ", "no", "No, she is not", 1),
        ("Is Sandra in the office? ", "no", "no, maybe", 1),
        ("Is Mary in the hallway? ", "no", "yes or no", 0),
        ("Is Bill in the kitchen? ", "maybe", "Maybe", 1),
        ("Is Bill in the kitchen? ", "no", "no, maybe", 0),
        ("Is Mary in the park? ", "no", "no, maybe", 0),
        ("How many objects is Mary carrying? ", "two", "two", 1),
        ("How many objects is Mary carrying? ", "two", "one or two", 0),
        ("How many objects is Mary carrying? ", "two", "two, the apple and the milk", 1),
        ("How many objects is Mary carrying? ", "none", "none", 1),
        ("What is Mary carrying? ", "apple,football", "The football and the apple", 1),
        ("What is Mary carrying? ", "apple,football", "the apple", 0),
        ("What is Mary carrying? ", "apple,football", "apple, football, milk", 0),
        ("What is Mary carrying? ", "nothing", "nothing", 1),
        ("What is Mary carrying? ", "milk", "milk or nothing", 0),
        ("Where was Julie before the school? ", "office", "the office, not the cinema", 0),
        ("Where was Julie before the school? ", "park", "the park, before the school", 1),
        ("Where was Julie before the school? ", "kitchen", "kitchen of the hallway", 1),
        ("What is Gertrude afraid of? ", "wolf", "the wolf, the garden", 1),
        ("What is Gertrude afraid of? ", "wolf", "the wolf and the cat", 0),
        ("What color is Lily? ", "gray", "gray", 1),
        ("What color is Lily? ", "gray", "gray or green", 0),
        ("Is the pink rectangle to the left of the red square? ", "yes", "yes, maybe", 1),
        ("Is the triangle above the pink rectangle? ", "yes", "yes or no", 0),
        ("Does the box of chocolates fit in the chest? ", "no", "no", 1),
        ("Is the box bigger than the suitcase? ", "no", "yes", 0),
        ("How do you go from the garden to the office? ", "s,e", "go s,e", 1),
        ("How do you go from the garden to the office? ", "s,e", "s,e or n,e", 0),
        ("How do you go from the garden to the office? ", "s,e", "e,s", 0),
        ("Why did sumit go to the kitchen? ", "hungry", "hungry, so he went to the kitchen", 1),
        ("Why did sumit go to the kitchen? ", "hungry", "hungry and bored", 0),
        ("Why did yann get the milk? ", "thirsty", "thirsty", 1),
        ("Where will jason go? ", "kitchen", "kitchen, tired", 0),
        ("Where will jason go? ", "kitchen", "kitchen, office", 1),
    ],
)
def test_babilongs_strict_mark_is_by_the_labels_of_the_task(
    question: str, target: str, written: str, strict: int, tmp_path: Path
) -> None:
    row = {"input": "Long ago.", "question": question, "target": target}
    [found] = question_files.read(write(tmp_path / "rows.jsonl", row))
    assert marks(written, found)["strict"] == strict


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("Fred is either in the school or the park. Long ago, John slept.", {"strict": 0}),
        ("Daniel went back to the bedroom. Long ago. Bill sang.", {"strict": 1}),
        ("Fred is in the park. John moved to the hallway.", {}),
        ("Mary is in the kitchen.", {}),
    ],
)
def test_whether_maybe_is_an_answer_is_told_by_the_facts_where_the_question_does_not(
    text: str, strict: dict[str, float], tmp_path: Path
) -> None:
    row = {"input": text, "question": "Is Mary in the kitchen?", "target": "yes"}
    [found] = question_files.read(write(tmp_path / "rows.jsonl", row))
    assert marks("yes, maybe", found) == {**strict, "lax": 1}


@pytest.mark.parametrize(
    ("question", "target"),
    [
        ("Where does Mary live?", "office"),
        ("Where is Mary?", "cinema"),
        ("What color is Lily?", "red"),
        ("Is Mary in the hallway?", "maybe"),
        ("How do you go from the garden to the office?", "s,n"),
    ],
)
def test_a_question_of_no_known_task_has_no_strict_mark(question: str, target: str, tmp_path: Path) -> None:
    row = {"input": "Long ago.", "question": question, "target": target}
    [found] = question_files.read(write(tmp_path / "rows.jsonl", row))
    assert marks(f"It is {target}.", found) == {"lax": 1}


def test_a_way_is_named_as_a_whole_and_a_list_by_its_parts(tmp_path: Path) -> None:
    way = {"input": "Long ago.", "question": "How do you go from the garden to the office?", "target": "s,e"}
    things = {"input": "Long ago.", "question": "What is Mary carrying?", "target": "apple,milk"}
    one, other = question_files.read(write(tmp_path / "rows.jsonl", way, things))
    assert marks("I have no idea, sorry", one) == {"strict": 0, "lax": 0}
    assert marks("milk, an apple", other) == {"strict": 1, "lax": 1}


def test_a_prefix_of_ruler_that_is_null_is_none(tmp_path: Path) -> None:
    rows = [{**ROWS["ruler"], **more} for more in ({"answer_prefix": ""}, {"answer_prefix": None})]
    one, other = question_files.read(write(tmp_path / "rows.jsonl", *rows))
    assert one.prompt == other.prompt


QA = "Answer the question based on the given documents. Only give me the answer.\n\nQuestion: Where?"


@pytest.mark.parametrize(
    ("prompt", "mark", "num_tokens", "answer"),
    [
        ("Some special magic numbers are hidden within the following text.", 0.5, 128, " 12 34"),
        ("Memorize and track the chain(s) of variable assignment hidden in the following text.", 0.5, 30, " 12 34"),
        ("Below is a numbered list of words. In these words, some appear more often.", 0.5, 120, " 12 34"),
        ("Read the following coded text and track the frequency of each coded word.", 0.5, 50, " 12 34"),
        (QA, 1, 32, " 12"),
    ],
)
def test_rulers_tasks_are_told_by_their_prompts(
    prompt: str, mark: float, num_tokens: int, answer: str, tmp_path: Path
) -> None:
    [question] = question_files.read(write(tmp_path / "rows.jsonl", {**ROWS["ruler"], "input": prompt}))
    [scorer] = question.scorers
    assert scorer.mark("It is 34.") == mark
    assert question.max_new_tokens == num_tokens
    assert question.answer == answer


@pytest.mark.parametrize(
    ("data_set", "answers", "written", "wanted", "num_tokens"),
    [
        ("hotpotqa", ["the cat"], " Cat\nmore", {"f1": 1, "exact_match": 1}, 32),
        ("narrativeqa", ["a cat"], "a cat sat", {"f1": 2 / 3, "exact_match": 0}, 128),
        ("multifieldqa_zh", ["北京市"], "北京。", {"f1": 4 / 5, "exact_match": 0}, 64),
        ("multifieldqa_zh", ["北京市"], "《北京 市》＋。", {"f1": 1, "exact_match": 1}, 64),
        ("multifieldqa_zh", ["30℃"], "30", {"f1": 4 / 5, "exact_match": 0}, 64),
        ("qasper", ["no."], "No\nIt is not.", {"f1": 1, "exact_match": 1}, 128),
        ("triviaqa", ["one\ntwo"], "one\ntwo", {"f1": 2 / 3, "exact_match": 0}, 32),
        ("lsht", ["city"], "animal\ncity", {"classification": 0}, 64),
        ("gov_report", ["one two three four"], "one three\nfour five", {"rouge_l": 3 / 4}, 512),
        ("samsum", ["one two three four"], "one three\nfour five", {"rouge_l": 2 / 3}, 128),
        ("vcsum", ["北京市"], "北市", {"rouge_l": 4 / 5}, 512),
        ("trec_e", ["animal"], "animal or city", {"classification": 1 / 2}, 64),
        ("trec", ["city name"], "city name\nanimal", {"classification": 1}, 64),
        ("passage_retrieval_en", ["Paragraph 3"], "Paragraph 3, or 30", {"numbers": 1 / 2}, 32),
        ("passage_count", ["7"], "none", {"numbers": 0}, 32),
        ("lcc", ["x = 1"], "# set\nx = 2\n", {"edit_similarity": 4 / 5}, 64),
        ("repobench-p", ["x = 1"], "\nx = 1\ny", {"edit_similarity": 1}, 64),
        ("lcc", ["# x"], "# x\n`x`\n// x", {"edit_similarity": 0}, 64),
        ("hotpotqa", ["The"], "a", {"f1": 0, "exact_match": 1}, 32),
    ],
)
def test_longbench_is_marked_by_its_data_set(
    data_set: str, answers: list[str], written: str, wanted: dict[str, float], num_tokens: int, tmp_path: Path
) -> None:
    row = {**ROWS["longbench"], "dataset": data_set, "answers": answers, "all_classes": ["animal", "city", "city name"]}
    [question] = question_files.read(write(tmp_path / "rows.jsonl", row))
    assert marks(written, question) == pytest.approx(wanted)
    assert question.max_new_tokens == num_tokens


@pytest.mark.parametrize("data_set", ["qasper", "multifieldqa_zh", None])
def test_a_reference_of_several_lines_is_matched_by_itself(data_set: str | None, tmp_path: Path) -> None:
    """Of LongBench's data sets, and of SCROLLS."""
    text, more = "First, a line.\nThen — another.", "Only one line."
    if data_set is None:
        rows = [{**ROWS["scrolls"], "output": one} for one in (more, text)]
    else:
        rows = [{**ROWS["longbench"], "dataset": data_set, "answers": [more, text]}]
    [question] = question_files.read(write(tmp_path / "rows.jsonl", *rows))
    assert marks(text, question) == {"f1": 1, "exact_match": 1}
    assert marks(f"{more}\nAnd so on", question)["exact_match"] == 0


@pytest.mark.parametrize(
    ("expected", "written", "f1"),
    [
        ("the café", "a café!", 1),
        ("it's", "its", 1),
        ("5 €", "5", 2 / 3),
        ("well—known", "wellknown", 0),
        ("“so”", '"so"', 0),
        ("the-cat", "the cat", 0),
        ("another theatre", "other atre", 0),
        ("half–a–mile", "half– –mile", 1),
    ],
)
def test_of_words_only_asciis_punctuation_and_whole_articles_are_left_out(
    expected: str, written: str, f1: float, tmp_path: Path
) -> None:
    [question] = question_files.read(write(tmp_path / "rows.jsonl", {**ROWS["scrolls"], "output": expected}))
    assert marks(written, question) == pytest.approx({"f1": f1, "exact_match": float(f1 == 1)})


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"dataset": "lcc", "input": "", "context": "def f():\n"}, "def f():\n", "    return"),
        ({"dataset": "repobench-p", "input": "g(\n", "context": "# f\n"}, "# f\ng(\n", "    return"),
        ({"dataset": "mine", "input": "", "context": "A report."}, "A report.\n\n", "    return"),
        ({"dataset": "mine", "input": "Who?", "context": "A."}, "A.\n\nQuestion: Who?\nAnswer:", "     return"),
    ],
)
def test_code_and_texts_without_a_question_are_gone_on_with(
    row: dict[str, Any], prompt: str, answer: str, tmp_path: Path
) -> None:
    [found] = question_files.read(write(tmp_path / "rows.jsonl", {"answers": ["    return"], **row}))
    assert (found.prompt, found.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("data_set", "context", "given", "prompt", "answer"),
    [
        ("trec", "Question: Who?\nType: Person", "Question: Where?\nType:",
         "Question: Who?\nType: Person\nQuestion: Where?\nType:", " city"),
        ("triviaqa", "Passage: a", "Passage: b\nAnswer:\n", "Passage: a\nPassage: b\nAnswer:\n", "city"),
        ("samsum_e", "Dialogue: a", "Dialogue: b\nSummary: ", "Dialogue: a\nDialogue: b\nSummary: ", "city"),
        ("lsht", "新闻：甲\n类别：乙", "新闻：丙\n类别：", "新闻：甲\n类别：乙\n新闻：丙\n类别：", "city"),
    ],
)  # fmt: skip
def test_sets_of_examples_end_with_the_one_to_be_answered(
    data_set: str, context: str, given: str, prompt: str, answer: str, tmp_path: Path
) -> None:
    row = {"context": context, "input": given, "answers": ["city"], "dataset": data_set, "all_classes": ["city"]}
    [found] = question_files.read(write(tmp_path / "rows.jsonl", row))
    assert (found.prompt, found.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("data_set", "given", "asks"),
    [
        ("passage_count", "", "How many different paragraphs"),
        ("passage_retrieval_en_e", "It is short.", "Which paragraph"),
        ("passage_retrieval_zh", "很短。", "哪个段落"),
        ("gov_report", "", "Sum it up"),
        ("multi_news_e", "", "Sum them up"),
        ("vcsum", "", "概括"),
    ],
)
def test_a_data_set_without_questions_is_asked_one(data_set: str, given: str, asks: str, tmp_path: Path) -> None:
    row = {"context": "A text.", "input": given, "answers": ["1"], "dataset": data_set}
    [found] = question_files.read(write(tmp_path / "rows.jsonl", row))
    start, question = found.prompt.split("\n\nQuestion: ")
    assert start == "A text."
    assert asks in question
    assert question.endswith(f"\n{given}\nAnswer:" if given else "\nAnswer:")
    assert found.answer == " 1"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for content in (json.dumps([ROWS["babilong"]], indent=1), json.dumps(ROWS["babilong"])):
        (tmp_path / "rows.json").write_text(content, encoding="utf-8-sig")
        assert len(question_files.read(str(tmp_path / "rows.json"))) == 1


def test_summaries_are_refused_without_rouge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    uri = write(tmp_path / "rows.jsonl", {**ROWS["longbench"], "dataset": "qmsum"})
    with pytest.raises(InputError, match=r"row 1: LongBench's qmsum needs rouge_score.*pip install"):
        question_files.read(uri)


def test_rows_of_an_id_are_references_of_one_question(tmp_path: Path) -> None:
    rows = [ROWS["scrolls"], {**ROWS["scrolls"], "id": "2"}, {**ROWS["scrolls"], "pid": "1_1", "output": "Here."}]
    first, second = question_files.read(write(tmp_path / "rows.jsonl", *rows))
    assert first.answer == second.answer == "It ends."
    assert [[scorer.mark("here") for scorer in one.scorers] for one in (first, second)] == [[1, 1], [0, 0]]


SHORT, LONG = "One two three.", "One two three four five six. " * 8


def test_files_of_summaries_are_marked_by_rouge(tmp_path: Path) -> None:
    rows = [{**ROWS["scrolls"], "output": LONG}, {**ROWS["scrolls"], "id": "2", "output": SHORT}]  # 48 and 3 words
    short = question_files.read(write(tmp_path / "short.jsonl", *rows))
    assert {marks(SHORT, one).keys() == {"f1", "exact_match"} for one in short} == {True}
    rows += [{**ROWS["scrolls"], "id": "2", "output": LONG}]  # 33 on average
    [first, second] = question_files.read(write(tmp_path / "long.jsonl", *rows))
    assert (first.max_new_tokens, second.max_new_tokens) == (1024, 1024)
    assert marks("Two one\nfour.", second) == pytest.approx({"rouge_1": 2 * 2 / 6, "rouge_2": 0, "rouge_l": 2 * 1 / 6})
    assert marks("two\n\nthree", second) == pytest.approx({"rouge_1": 4 / 5, "rouge_2": 2 / 3, "rouge_l": 4 / 5})
    assert marks(LONG, first) == {"rouge_1": 1, "rouge_2": 1, "rouge_l": 1}


def test_scrolls_summaries_are_refused_without_rouge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    uri = write(tmp_path / "rows.jsonl", {**ROWS["scrolls"], "output": LONG})
    with pytest.raises(InputError, match=r"row 1: marking SCROLLS's summaries needs rouge_score.*pip install"):
        question_files.read(uri)


def test_the_mean_of_rouge_is_the_geometric_one_of_the_files_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With marks of what was written that are told here; all the rest is measured."""
    told = iter([0.8, 0.2, 0.5] + [0.4, 0.0, 0.3] + [0.1] * 12)
    for measure in ("rouge_1", "rouge_2", "rouge_l"):
        monkeypatch.setattr(question_files.marking, measure, lambda written, expected: next(told))
    monkeypatch.setattr(question_files, "_SUMMARY_TOKENS", 2)
    uri = write(tmp_path / "rows.jsonl", *[{**ROWS["scrolls"], "id": name, "output": LONG} for name in "ab"])
    figures = TASKS["file"].measure(tiny_model(RMT, segment_len=16, vocab_size=257), 400, material(uri))
    found = {(one.metric, one.memory): one for one in figures}
    mean = found["rouge_mean", "true"]
    assert mean.value == pytest.approx((0.6 * 0.1 * 0.4) ** (1 / 3))
    assert (mean.num_samples, mean.low, mean.high) == (2, None, None)
    assert found["rouge_mean", "zeroed"].value == pytest.approx(0.1)
    assert {memory for metric, memory in found if metric == "rouge_mean"} == set(MEMORIES)


def test_how_much_is_written_does_not_depend_on_the_answer(tmp_path: Path) -> None:
    for form, field, answers in (("babilong", "target", ["hallway", "a"]), ("scrolls", "output", ["It ends.", "No"])):
        questions = [
            question_files.read(write(tmp_path / "rows.jsonl", {**ROWS[form], field: answer}))[0] for answer in answers
        ]
        samples = [question_files.sample(Scene(BYTES, texts.noise(BYTES)), one, 16) for one in questions]
        assert {sample.max_new_tokens for sample in samples} == {20 if form == "babilong" else 256}


def test_a_file_is_measured_with_each_memory_and_longer_rows_are_counted(tmp_path: Path) -> None:
    rows = [{**ROWS["babilong"], "input": "Mary went home. " * num} for num in (1, 2, 3, 30)]
    uri = write(tmp_path / "rows.jsonl", *rows)
    model = tiny_model(RMT, segment_len=16, vocab_size=257)
    TASKS["file"].check(200, 16, material(uri))
    figures = TASKS["file"].measure(model, 200, material(uri))
    assert {(one.metric, one.memory) for one in figures if one.memory} == {
        (metric, memory) for metric in ("accuracy", "strict", "lax") for memory in MEMORIES
    }
    assert {one.num_samples for one in figures if one.memory} == {3}
    assert [one.value for one in figures if one.metric == "num_longer"] == [1]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], ["no rows"]),
        (["{"], ["line 1 is no JSON"]),
        (["3"], ["row 1 is no JSON object"]),
        (["[{}, "], ["no JSON array"]),
        (["[" * 5000], ["no JSON array"]),
        (['{"a": ' * 5000], ["line 1 is no JSON"]),
        ([{**ROWS["ruler"], "outputs": []}], ["row 1", "its outputs are []", "no list of one text or more"]),
        ([{**ROWS["ruler"], "outputs": "12"}], ["row 1", 'its outputs are "12"']),
        ([{**ROWS["ruler"], "outputs": [""]}], ["row 1", '"" in its outputs is an empty answer']),
        ([{**ROWS["ruler"], "outputs": ["12", " \t"]}], ["row 1", r'" \t" in its outputs is an empty answer']),
        ([{**ROWS["ruler"], "outputs": [True]}], ["row 1", "true in its outputs is no text or number"]),
        ([{**ROWS["ruler"], "outputs": ["12", None]}], ["row 1", "null in its outputs is no text or number"]),
        ([{**ROWS["ruler"], "outputs": [float("nan")]}], ["row 1", "NaN in its outputs is no finite number"]),
        ([{**ROWS["ruler"], "outputs": [float("-inf")]}], ["row 1", "-Infinity in its outputs is no finite number"]),
        ([{**ROWS["longbench"], "answers": ["", "x"]}], ["row 1", '"" in its answers is an empty answer']),
        ([{**ROWS["longbench"], "answers": [""]}], ["row 1", '"" in its answers is an empty answer']),
        (
            [{**ROWS["longbench"], "dataset": "trec", "all_classes": ["the cat", ""]}],
            ["row 1", '"" in its all_classes is an empty answer'],
        ),
        ([{**ROWS["babilong"], "target": " "}], ["row 1", 'its target is ""', "empty"]),
        ([{**ROWS["babilong"], "target": ","}], ["row 1", 'its target is ","', "empty part"]),
        ([{**ROWS["babilong"], "target": "apple, "}], ["row 1", 'its target is "apple,"', "empty part"]),
        ([{**ROWS["scrolls"], "output": " "}], ["row 1", '" " in its output is an empty answer']),
        ([ROWS["scrolls"], {**ROWS["scrolls"], "output": ""}], ["row 1", '"" in its output is an empty answer']),
        ([{**ROWS["longbench"], "answers": "cat"}], ["row 1", 'its answers are "cat"']),
        ([ROWS["scrolls"], {**ROWS["scrolls"], "id": "2", "output": ""}], ["row 2", "empty answer"]),
        ([{**ROWS["scrolls"], "output": None}], ["row 1", "output is null", "another split"]),
        (
            [ROWS["scrolls"], ROWS["scrolls"], {**ROWS["scrolls"], "id": "2", "output": None}],
            ["row 3: its output is null"],
        ),
        ([ROWS["scrolls"], ROWS["scrolls"], {"id": "2", "input": "a"}], ["row 3 is no row", "it has no output"]),
        ([ROWS["scrolls"], ROWS["scrolls"], {**ROWS["scrolls"], "id": "2", "output": ""}], ["row 3", "empty answer"]),
        ([{**ROWS["scrolls"], "output": 5}], ["row 1", "its output is 5, no text"]),
        ([{**ROWS["scrolls"], "output": 0}], ["row 1", "its output is 0, no text"]),
        ([{**ROWS["scrolls"], "input": ["a"]}], ["row 1", 'its input is ["a"], no text']),
        ([{**ROWS["longbench"], "context": 5}], ["row 1", "its context is 5, no text"]),
        ([{**ROWS["longbench"], "input": None}], ["row 1", "its input is null, no text"]),
        ([{**ROWS["scrolls"], "input": "a\ud800"}], ["row 1", "character '\\ud800' at place 1", "no Unicode text"]),
        ([{**ROWS["babilong"], "target": "\udc00"}], ["row 1", "'\\udc00'", "no Unicode text"]),
        ([ROWS["ruler"], {"input": "", "outputs": ["a"]}], ["row 2", "empty text cannot be asked"]),
        ([{"text": "a"}], ["fields text", "BABILong", "SCROLLS"]),
        ([ROWS["babilong"], {"input": "a"}], ["row 2 is no row of BABILong: it has no question"]),
        ([{**ROWS["babilong"], "question": None}], ["row 1", "its question is null, no text"]),
        ([{**ROWS["babilong"], "target": 5}], ["row 1", "its target is 5, no text"]),
        ([{**ROWS["babilong"], "input": None}], ["row 1", "its input is null, no text"]),
        ([ROWS["ruler"], {"outputs": ["a"]}], ["row 2 is no row of RULER: it has no input"]),
        ([{**ROWS["ruler"], "input": ["a"]}], ["row 1", 'its input is ["a"], no text']),
        ([{**ROWS["ruler"], "answer_prefix": 5}], ["row 1", "its answer_prefix is 5, no text"]),
        (
            [{**ROWS["longbench"], "dataset": "trec", "all_classes": None}],
            ["row 1", "its all_classes are null, no list"],
        ),
        ([ROWS["scrolls"], {"id": "2", "output": "a"}], ["row 2 is no row of SCROLLS: it has no input"]),
        ([{**ROWS["babilong"], "input": "a" * 300}], ["at length 200", "has 3"]),
    ],
)
def test_other_files_are_refused(rows: list[Any], says: list[str], tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError) as error:
        TASKS["file"].check(200, 16, material(uri))
    assert all(word in str(error.value) for word in says), str(error.value)


@pytest.mark.parametrize("at", [-20, 30])
def test_a_damaged_parquet_file_is_refused_in_one_line(at: int, tmp_path: Path) -> None:
    """In its footer, which gives an OSError, or in its data."""
    path = Path(write(tmp_path / "rows.parquet", *[{**ROWS["babilong"], "input": str(i)} for i in range(100)]))
    content = bytearray(path.read_bytes())
    content[at : at + 12] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(InputError, match="no Parquet file, or a damaged one: ") as error:
        question_files.read(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("no")
    for uri, says in ((str(tmp_path / "rows.parquet"), "no Parquet"), (str(tmp_path / "none.jsonl"), "cannot be read")):
        with pytest.raises(InputError, match=says):
            question_files.read(uri)
    with pytest.raises(InputError, match="--questions FILE"):
        TASKS["file"].check(200, 16, material(None))
