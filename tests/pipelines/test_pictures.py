"""The pictures job as a command: what it draws of which memory, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

import rmt_core
from pipelines import pictures
from pipelines.data.tokenise import ByteTokenizer

from ..rmt_core.tiny import ARMT, MEMFORMER, RMT, XL, tiny_model

SLOTS = ["slots.png", "slots.md"]
ATTENTION = ["attention.png", "attention_by_layer.png", "attention.md"]
WRITES = ["writes.png", "writes.md"]
MEMORIES: dict[str, Any] = {
    "rmt": RMT,
    "gated": {**RMT, "gate": "binary"},
    "memformer": MEMFORMER,
    "armt": ARMT,
    "xl": XL,
    "none": "none",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, memory in MEMORIES.items():
        rmt_core.save(folder / name, tiny_model(memory, segment_len=16, vocab_size=257), ByteTokenizer())
    return folder


def words(models: Path, memory: str, output: Path, *more: str) -> list[str]:
    settings = "--background noise --length 100 --num-texts 32 --batch-size 4"
    return ["--model", str(models / memory), "--output", str(output), *settings.split(), *more]


@pytest.mark.parametrize(
    ("memory", "files"),
    [("gated", SLOTS + ATTENTION + WRITES), ("rmt", SLOTS + ATTENTION), ("memformer", SLOTS), ("armt", ATTENTION)],
)
def test_what_a_memory_allows_is_drawn(
    memory: str, files: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pictures.main(words(models, memory, tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["files"] == [str(tmp_path / "out" / name) for name in files]
    for name in found["files"]:
        assert Path(name).read_bytes().startswith(b"\x89PNG" if name.endswith("png") else (b"#", b"|"))
        if name.endswith("md"):
            page = Path(name).read_text()
            assert rmt_core.fingerprint(rmt_core.load(models / memory))[:16] in page
            settings = "--length 100 --background noise --num-texts 32 --batch-size 4"
            assert page.endswith(f"pictures.py --model {models / memory} --output DIR {settings}\n")
            assert ("armt is read through associations, not by attention" in page) == (memory == "armt")
    assert ("left out" in err) == (len(files) < 7)


def test_texts_of_a_tasks_own_are_in_no_background(models: Path, tmp_path: Path) -> None:
    asked = "--task passkey --length 1k --num-texts 8 --batch-size 4 --pictures attention"
    assert pictures.main(["--model", str(models / "rmt"), "--output", str(tmp_path), *asked.split()]) == 0
    assert "rmt: passkey, texts of 1,024 tokens" in (tmp_path / "attention.md").read_text()


def test_the_slots_of_a_memformer_are_called_slots(models: Path, tmp_path: Path) -> None:
    assert pictures.main(words(models, "memformer", tmp_path, "--seed", "1")) == 0
    assert "| segments since the fact | slot 0 | slot 1 | slot 2 | all slots |" in (tmp_path / "slots.md").read_text()


def test_the_attention_is_that_of_the_segment_that_asks_after_all_before_it(models: Path, tmp_path: Path) -> None:
    assert pictures.main(words(models, "rmt", tmp_path / "short", "--pictures", "attention")) == 0
    rows = (tmp_path / "short" / "attention.md").read_text().partition("\n\n")[0].splitlines()
    assert len(rows) == 2 + 2  # layers
    assert all(sum(map(float, row.split("|")[3:7])) == pytest.approx(1, abs=3e-4) for row in rows[2:])
    assert pictures.main(words(models, "rmt", tmp_path / "long", "--pictures", "attention", "--length", "132")) == 0
    assert (tmp_path / "long" / "attention.md").read_text().splitlines()[: len(rows)] != rows


def test_earlier_pictures_are_replaced_and_other_runs_left_alone(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*SLOTS, "notes.txt"):
        (tmp_path / name).write_text("of another model")
    assert pictures.main(words(models, "rmt", tmp_path, "--pictures", "attention")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*ATTENTION, "notes.txt"}
    for name in ("config.json", "config.partial.json"):
        other = tmp_path / name.removesuffix(".json")
        other.mkdir()
        (other / name).write_text("{}")
        capsys.readouterr()
        assert pictures.main(words(models, "rmt", other)) == 2
        assert "holds a run of another command, or a model; give a directory of its own" in capsys.readouterr().err
        assert [path.name for path in other.iterdir()] == [name]


@pytest.mark.parametrize("length", [97, 98, 100])
def test_the_attention_is_that_before_the_answer(length: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text's last token is the answer, with a segment of its own in 97 tokens and with the question in 98."""
    seen = []

    def maps(model: Any, tokens: Any, state: Any) -> Any:
        seen.append(tokens.tolist())
        return attention_maps(model, tokens, state)

    attention_maps = rmt_core.attention_maps
    monkeypatch.setattr(rmt_core, "attention_maps", maps)
    output = models.parent / f"before-{length}"
    assert pictures.main(words(models, "rmt", output, "--pictures", "attention", "--length", str(length))) == 0
    assert [len(tokens) for tokens in seen] == [(length - 2) % 16 + 1]
    assert bytes(seen[0]).endswith(b"?")


@pytest.mark.parametrize("seed", range(4))
def test_the_attention_is_that_of_texts_that_ask_in_the_same_segment(
    seed: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of qa1 have seven to nine tokens, so that some texts ask in segment 63 and some in segment 62."""
    seen = []

    def mass(model: Any, tokens: Any, before: Any, lengths: Any) -> Any:
        seen.extend(bytes(row[:num].tolist()) for row, num in zip(tokens, lengths.tolist(), strict=True))
        return attention_mass(model, tokens, before, lengths)

    attention_mass = rmt_core.attention_mass
    monkeypatch.setattr(rmt_core, "attention_mass", mass)
    output = models.parent / f"stories-{seed}"
    more = f"--pictures attention --task qa1 --length 1017 --batch-size 16 --num-texts 16 --seed {seed}"
    assert pictures.main(words(models, "rmt", output, *more.split())) == 0
    assert 0 < len(seen) < 16
    assert all(text.endswith(b":") for text in seen)


def test_what_short_texts_do_not_allow_is_left_out(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--length", "100", "--task", "pairs_16"]
    assert pictures.main(words(models, "gated", tmp_path / "all", *asked)) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(ATTENTION)
    assert "left out: writes: the facts have one place only" in capsys.readouterr().err
    assert pictures.main(words(models, "gated", tmp_path / "writes", *asked, "--pictures", "attention,writes")) == 2
    assert "error: writes: the facts have one place only; use a longer --length" in capsys.readouterr().err


def test_facts_that_all_differ_have_no_read_out(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--task", "needle", "--length", "300"]
    assert pictures.main(words(models, "rmt", tmp_path / "out", *more)) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(ATTENTION)
    assert "left out: slots: of 32 texts 32 have a fact that none of the others has" in capsys.readouterr().err
    assert pictures.main(words(models, "rmt", tmp_path / "slots", *more, "--pictures", "slots")) == 2
    assert "a --task that asks for few different answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "more", "says"),
    [
        ("xl", "", ["memory xl is not one vector", "memory xl is not rows among the text's; use rmt or armt"]),
        ("none", "", ["slots: memory none is not one vector", "attention: memory none has no rows to read or write"]),
        ("memformer", "--pictures attention", ["attention: memory memformer is not rows among"]),
        ("armt", "--pictures slots,attention", ["slots: memory armt is not one vector a token or slot"]),
        ("rmt", "--pictures writes", ["writes: memory rmt has no binary gate; use one rmt with"]),
        ("rmt", "--task memorise", ["--task memorise", "use recall, detect"]),
        ("rmt", "--length 30", ["use a longer --length"]),
        ("rmt", "--pictures slot", ["--pictures", "slot"]),
        ("rmt", "--data book.txt", ["--data is not read in noise"]),
        ("rmt", "--task vt --length 1k", ["--background is not read by vt"]),
        ("rmt", "--num-texts 4", ["--num-texts", "greater than or equal to 8"]),
        ("nothing", "", ["no such directory"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    memory: str, more: str, says: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pictures.main(words(models, memory, tmp_path / "out", *more.split())) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("pictures: error: ")
    assert all(word in line for word in says), line
    assert not (tmp_path / "out").exists()
