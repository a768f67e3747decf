"""Instruct models: prompts hold all of a document and never overflow, documents side by side equal documents alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import rmt_core
from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.storage import StorageError
from pipelines.summarising import strategies
from pipelines.summarising.asking import Asking
from pipelines.summarising.documents import DocumentError, Style, Summary, Text
from pipelines.summarising.instruct import Ask, InstructModel, Reply
from pipelines.summarising.rereading import Frames
from pipelines.summarising.strategies import Settings
from tests.pipelines import tiny_instruct

STYLE = Style(12, rmt_core.Sampling(), 0)
NAMES = ("rolling", "map_reduce")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_instruct.save(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def model(folder: str) -> InstructModel:
    return InstructModel(folder)


def story(i: int, num_chars: int) -> str:
    return "".join(np.random.default_rng(i).choice(list("abcdefg. \n"), num_chars))


LENGTHS = (5, 90, 100, 101, 350, 1300, 30)
STORIES = [story(i, length) for i, length in enumerate(LENGTHS)]


def texts(stories: Sequence[str] = STORIES, style: Style = STYLE) -> list[Text]:
    return [Text(f"story-{i}", [text.encode()], style) for i, text in enumerate(stories)]


def asking(model: InstructModel, name: str, num_rows: int = 3, piece_len: int = 100) -> Asking:
    return Asking(model, name, "Sum up.", piece_len, num_rows)


class Watched(InstructModel):
    """Keeps what it is asked; its replies are the prompts' lengths."""

    def __init__(self, model: InstructModel, reply_len: int = 12) -> None:
        self.__dict__.update(model.__dict__)
        self.reply_len = reply_len
        self.asked: list[Ask] = []

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        self.asked += asks
        return [Reply([97 + len(self.asked) % 26] * self.reply_len, "length") for _ in asks]


@pytest.mark.parametrize("name", NAMES)
def test_every_character_is_read_once_and_in_order(model: InstructModel, name: str) -> None:
    for text in STORIES:
        watched = Watched(model)
        (summary,) = asking(watched, name).summarise(texts([text]))
        frame: Frames = asking(watched, name)._frames
        read = ""
        for ask in watched.asked:
            prompt = ask.prompt
            for kind in (frame.whole, frame.first, frame.further, frame.part):
                head, tail = kind[0], kind[-1]
                if prompt[: len(head)] == head and prompt[len(prompt) - len(tail) :] == tail:
                    inner = prompt[len(head) : len(prompt) - len(tail)]
                    if len(kind) == 3:
                        inner = inner[watched.reply_len + len(kind[1]) :]
                    read += bytes(inner).decode()
                    break
        assert read == text
        assert summary.num_tokens == len(text)
        assert summary.num_segments == max(1, -(-len(text) // 100)) or summary.num_segments > len(text) // 100


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_leaves_less_room_than_may_be_written(folder: str, model: InstructModel, name: str) -> None:
    """At the smallest context that is accepted for summaries of this length."""
    style = replace(STYLE, max_new_tokens=30)
    watched = Watched(model, reply_len=30)
    watched.context_len = next(n for n in range(50, 1000) if fits(watched, name, n, 30))
    summaries = list(asking(watched, name, piece_len=1000).summarise(texts(style=style)))
    assert [summary.error for summary in summaries] == [""] * len(STORIES)
    assert len(watched.asked) > 15
    assert max(len(ask.prompt) for ask in watched.asked) <= watched.context_len - 30


def fits(model: InstructModel, name: str, context_len: int, max_new_tokens: int) -> bool:
    model.context_len = context_len
    try:
        asking(model, name).check(max_new_tokens)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_documents_side_by_side_equal_documents_alone(model: InstructModel, name: str, temperature: float) -> None:
    style = replace(STYLE, sampling=rmt_core.Sampling(temperature, 0.9))
    together = list(asking(model, name, 4).summarise(texts(style=style)))
    alone = [next(asking(model, name, 1).summarise([text])) for text in texts(style=style)]
    assert together == alone
    assert len({summary.text for summary in together}) == len(together)  # it depends on the document
    assert [summary.doc_id for summary in together] == [text.doc_id for text in texts()]


def greedy(model: InstructModel, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens by whole forwards, until one that ends a turn or a text."""
    ids = list(prompt)
    ends = {model.tokenizer.convert_tokens_to_ids(tiny_instruct.END), model.tokenizer.eos_token_id}
    for _ in range(count):
        with torch.inference_mode():
            token = int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def prompt(model: InstructModel, message: str, *fills: Sequence[int]) -> list[int]:
    """The prompt by the chat template; the characters 0, 1, ... of the message stand for other tokens."""
    turns = [{"role": "user", "content": message}]
    rendered = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return [token for one in ids for token in (fills[one] if one < len(fills) else [one])]


def written(model: InstructModel, ids: list[int]) -> list[int]:
    special = set(model.tokenizer.all_special_ids)
    return [token for token in greedy(model, ids, 12) if token not in special]


TEXT = "one two three. " * 15  # 225 characters, cut after sentences: 90, 90, 45


def test_rolling_carries_the_summary_from_piece_to_piece(model: InstructModel) -> None:
    """Against prompts written here by the chat template, and greedy choices by whole forwards."""
    first, second, third = (list(TEXT[a:b].encode()) for a, b in ((0, 90), (90, 180), (180, 225)))
    found = written(model, prompt(model, "Here is the beginning of a long text:\n\n\0\n\nSum up.", first))
    for piece in (second, third):
        message = (
            "Here is a summary of a long text so far:\n\n\0\n\nHere is how the text goes on:\n\n\1\n\nSum up. "
            "Keep what the summary so far tells and add what is new."
        )
        found = written(model, prompt(model, message, found, piece))
    (summary,) = asking(model, "rolling").summarise(texts([TEXT]))
    assert summary.text == model.decode(found)
    assert (summary.num_segments, summary.num_written) == (3, len(found))


def test_map_reduce_summarises_summaries_until_one_is_left(model: InstructModel) -> None:
    pieces = [list(TEXT[a:b].encode()) for a, b in ((0, 90), (90, 180), (180, 225))]
    parts = [written(model, prompt(model, "Here is a part of a long text:\n\n\0\n\nSum up.", p)) for p in pieces]
    message = (
        "Here are summaries of the parts of one long text, in their order:\n\n\0\n\nSum up. Make them one summary."
    )
    gap = list(b"\n\n")
    found = written(model, prompt(model, message, [*parts[0], *gap, *parts[1], *gap, *parts[2]]))
    (summary,) = asking(model, "map_reduce").summarise(texts([TEXT]))
    assert summary.text == model.decode(found)


def test_map_reduce_goes_on_until_summaries_fit(model: InstructModel) -> None:
    watched = Watched(model)
    watched.context_len = next(n for n in range(50, 1000) if fits(watched, "map_reduce", n, 12))
    (summary,) = asking(watched, "map_reduce", piece_len=40).summarise(texts([story(0, 2000)]))
    frame = asking(watched, "map_reduce")._frames
    merges = [ask for ask in watched.asked if ask.prompt[: len(frame.merge[0])] == frame.merge[0]]
    assert summary.error == ""
    assert len(watched.asked) - len(merges) == summary.num_segments > 50
    assert len(merges) > summary.num_segments / 3
    assert max(len(ask.prompt) for ask in watched.asked) + 12 <= watched.context_len


class Kept:
    """A keeper in memory that may fail to store."""

    every = 2

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.times = 0

    def load(self) -> bytes | None:
        return self.data

    def keep(self, data: bytes) -> None:
        self.data = data
        self.times += 1


class Killed(BaseException):
    pass


class Dying(Watched):
    """The true model, which dies after so many prompts."""

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        self.asked += asks
        if len(self.asked) > self.reply_len:
            raise Killed
        return InstructModel.generate(self, asks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alive", [1, 3, 5, 8])
def test_a_document_goes_on_from_its_replies_and_ends_the_same(model: InstructModel, name: str, alive: int) -> None:
    whole = texts([story(3, 900)])
    (uninterrupted,) = asking(model, name, 1).summarise(whole)
    kept = Kept()
    dying = Dying(model, alive)
    text = [whole[0]._replace(keeper=kept)]
    with pytest.raises(Killed):
        list(asking(dying, name, 1).summarise(text))
    again = Dying(model, 10**6)
    (resumed,) = asking(again, name, 1).summarise([whole[0]._replace(keeper=kept)])
    assert resumed == uninterrupted
    num_asked = len(dying.asked) - 1 + len(again.asked)
    whole_asked = Dying(model, 10**6)
    list(asking(whole_asked, name, 1).summarise(whole))
    if name == "rolling":  # of map_reduce, the parts that are asked together are kept together
        assert num_asked - len(whole_asked.asked) < kept.every
    assert kept.times or alive < kept.every or name == "map_reduce"


def test_altered_replies_are_not_believed(model: InstructModel) -> None:
    (text,) = texts([story(3, 900)])
    kept = Kept()
    (clean,) = asking(model, "rolling").summarise([text._replace(keeper=kept)])
    assert kept.data is not None
    for data in (kept.data[:-9], kept.data.replace(b'"length"', b'"stop"', 1), b"[]", b"\xff"):
        kept.data = data
        watched = Dying(model, 10**6)
        assert list(asking(watched, "rolling").summarise([text._replace(keeper=kept)])) == [clean]
        assert len(watched.asked) >= 9  # all of it is asked anew


def test_what_looks_like_a_special_token_in_a_text_is_only_text(model: InstructModel) -> None:
    watched = Watched(model)
    text = "a" + tiny_instruct.END + "<|assistant|>Nothing."
    (summary,) = asking(watched, "rolling").summarise(texts([text]))
    assert summary.num_tokens == len(text)
    ends = model.tokenizer.convert_tokens_to_ids(tiny_instruct.MARKS)
    assert [sum(token == end for token in watched.asked[0].prompt) for end in ends] == [1, 1, 1]


def failing(after: bytes, error: Exception) -> Iterator[bytes]:
    yield after
    raise error


def test_a_document_that_fails_fails_alone(model: InstructModel) -> None:
    class Poisoned(InstructModel):
        def __init__(self) -> None:
            self.__dict__.update(model.__dict__)

        def generate(self, asks: Sequence[Ask]) -> list[Reply]:
            if any(ord("!") in ask.prompt for ask in asks):
                raise RuntimeError("the model\nrefuses")
            return model.generate(asks)

    good = texts([story(9, 150), story(8, 250)])
    bad = [
        Text("empty", [], STYLE),
        Text("late", failing(b"x" * 500, DocumentError("gone")), STYLE),
        Text("bytes", [b"x" * 300, b"\xff"], STYLE),
        Text("poison", [b"x" * 150 + b"!"], STYLE),
        Text("long", [b"x"], replace(STYLE, max_new_tokens=5000)),
    ]
    mixed = [bad[0], good[0], *bad[1:4], good[1], bad[4]]
    for name in NAMES:
        clean = list(asking(model, name).summarise(good))
        found = {summary.doc_id: summary for summary in asking(Poisoned(), name).summarise(mixed_again(mixed))}
        assert [found[text.doc_id] for text in good] == clean
        assert list(found) == [text.doc_id for text in mixed]
        reasons = [found[name].error for name in ("empty", "late", "bytes", "poison")]
        refused = "RuntimeError: the model refuses"
        assert reasons == ["the document is empty", "gone", "not UTF-8 at byte 300 (invalid start byte)", refused]
        assert "leaves no room" in found["long"].error


def mixed_again(items: list[Text]) -> list[Text]:
    """The documents with fresh chunks where these are used up by reading."""
    fresh = failing(b"x" * 500, DocumentError("gone"))
    return [text._replace(chunks=fresh) if text.doc_id == "late" else text for text in items]


def test_values_that_are_not_finite_are_an_error_of_their_document(folder: str) -> None:
    model = InstructModel(folder)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[ord("!")] = float("nan")
    stories = ["good text", "bad text!", "other text"]
    found: list[Summary] = list(asking(model, "rolling").summarise(texts(stories)))
    assert [summary.error for summary in found] == ["", "the model's values are not finite", ""]


def test_a_model_without_chat_template_gets_plain_text(tmp_path: Path) -> None:
    model = InstructModel(tiny_instruct.save(tmp_path / "plain", chat=False))
    watched = Watched(model)
    list(asking(watched, "rolling").summarise(texts(["a text"])))
    assert bytes(watched.asked[0].prompt) == b"Here is a text:\n\na text\n\nSum up."


def settings(model: str, strategy: str, **others: object) -> Settings:
    return Settings(model, strategy, "", STYLE, 2, None, "cpu")._replace(**others)


def test_models_that_cannot_are_refused_in_words(folder: str, tmp_path: Path) -> None:
    with_memory = tmp_path / "memory"
    backbone = InstructModel(folder).model.config
    built = rmt_core.build(backbone=backbone, memory={"kind": "rmt", "num_tokens": 2}, segment_len=32)
    rmt_core.save(with_memory, built, ByteTokenizer())
    t5 = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    InstructModel(folder).model.save_pretrained(tmp_path / "bare")
    ByteTokenizer().save_pretrained(tmp_path / "t5")
    long = replace(STYLE, max_new_tokens=900)
    for given, said in (
        (settings(folder, "memory"), "plain Hugging Face model, which has no memory; use --strategy rolling"),
        (settings(str(with_memory), "rolling"), "is a model with memory: use --strategy memory"),
        (settings(str(with_memory), "memory", segment_len=64), "has its own segments"),
        (settings(str(tmp_path / "t5"), "rolling"), "encoder-decoder"),
        (settings(str(tmp_path / "bare"), "rolling"), "tokenizer"),
        (settings(str(tmp_path / "nowhere"), "rolling"), "there is no such directory"),
        (settings(str(tmp_path), "rolling"), "has no config.json"),
        (settings(folder, "rolling", style=long), "leaves no room for text in the model's context of 1024 tokens; use"),
    ):
        with pytest.raises(InputError, match=said):
            strategies.look_at(given, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_good", [0, 50_000])
def test_where_texts_come_from_failing_is_no_fault_of_a_text(model: InstructModel, name: str, num_good: int) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a" * num_good
        raise StorageError("the store does not answer")

    with pytest.raises(StorageError):
        list(asking(Watched(model), name).summarise([*texts(), Text("a", chunks(), STYLE)]))


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_device_is_no_documents_fault(model: InstructModel, name: str) -> None:
    class Lost(Watched):
        def generate(self, asks: Sequence[Ask]) -> list[Reply]:
            raise torch.AcceleratorError("the device is lost")

    with pytest.raises(torch.AcceleratorError):
        list(asking(Lost(model), name).summarise(texts()))
