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
    "longbench": [("Dog!", {"f1": 1, "exact_match": 1}), ("a cat sat", {"f1": 2 / 3, "exact_match": 0})],
    "scrolls": [("it", {"f1": 2 / 3, "exact_match": 0})],
}


def write(path: Path, *rows: Any) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def material(uri: str | None) -> Material:
    return Material(BYTES, open_held_out(None, BYTES), questions=uri, batch_size=2)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_a_published_row_is_asked_and_marked(form: str, suffix: str, tmp_path: Path) -> None:
    [question] = question_files.read(write(tmp_path / f"rows.{suffix}", ROWS[form]))
    assert question.prompt == PROMPTS[form]
    assert question.answer == ANSWERS[form]
    for written, marks in MARKS[form]:
        assert {scorer.metric: scorer.mark(written) for scorer in question.scorers} == pytest.approx(marks)
    sample = question_files.sample(Scene(BYTES, texts.noise(BYTES)), question, 16)
    assert BYTES.decode(texts.whole(sample.stream)) == PROMPTS[form] + ANSWERS[form]
    assert sample.answers[0].at == len(PROMPTS[form])


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
        (["3"], ["line 1 is no JSON object"]),
        ([{"text": "a"}], ["fields text", "BABILong", "SCROLLS"]),
        ([ROWS["babilong"], {"input": "a"}], ["row 2", "no row of BABILong", "question"]),
        ([{**ROWS["babilong"], "input": "a" * 300}], ["at length 200", "has 3"]),
    ],
)
def test_other_files_are_refused(rows: list[Any], says: list[str], tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError) as error:
        TASKS["file"].check(200, 16, material(uri))
    assert all(word in str(error.value) for word in says), str(error.value)


def test_a_file_that_is_not_there_or_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("no")
    for uri, says in ((str(tmp_path / "rows.parquet"), "no Parquet"), (str(tmp_path / "none.jsonl"), "cannot be read")):
        with pytest.raises(InputError, match=says):
            question_files.read(uri)
    with pytest.raises(InputError, match="--questions FILE"):
        TASKS["file"].check(200, 16, material(None))
