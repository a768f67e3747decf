"""Documents through the engine: each gives the same alone and beside others, goes on from its state, fails alone."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import rmt_core
from pipelines.data.read import UnreadableError
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.engine import Engine
from pipelines.serving.loading import Loaded
from pipelines.storage import StorageError
from pipelines.summarising import memory as memory_strategy
from pipelines.summarising.documents import Style, Text, document_seed
from pipelines.summarising.memory import MemoryStrategy

SEGMENT_LEN = 16
PROMPT = "\n\nSummary: "
GREEDY = Style(20, rmt_core.Sampling(0.0, 0.9), 0)
DRAWN = Style(20, rmt_core.Sampling(1.0, 0.9), 0)
RMT = {"kind": "rmt", "num_tokens": 2}


def tiny_model(memory: object, seed: int = 0) -> rmt_core.RecurrentModel:
    torch.manual_seed(seed)
    backbone = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.5,  # so large that what is written depends on what was read
    )
    return rmt_core.build(backbone=backbone, memory=memory, segment_len=SEGMENT_LEN, dtype="float64").eval()


@pytest.fixture(scope="module")
def model() -> rmt_core.RecurrentModel:
    return tiny_model(RMT)


def strategy(
    model: rmt_core.RecurrentModel, num_rows: int, prompt: str = PROMPT, tokenizer: ByteTokenizer | None = None
) -> MemoryStrategy:
    return MemoryStrategy(Loaded(model, tokenizer or ByteTokenizer(), rmt_core.fingerprint(model)), prompt, num_rows)


def text(i: int, num_tokens: int, style: Style = GREEDY) -> Text:
    data = bytes(np.random.default_rng(i).integers(97, 123, num_tokens).astype(np.uint8))
    return Text(f"document-{i}", [data[start : start + 7] for start in range(0, num_tokens, 7)], style)


LENGTHS = [5, 100, 16, 1, 33, 64, 17, 48, 15, 700, 3, 80]  # below, at and past the ends of segments and of a lap


def texts(style: Style = GREEDY) -> list[Text]:
    return [text(i, num_tokens, style) for i, num_tokens in enumerate(LENGTHS)]


def reference(model: rmt_core.RecurrentModel, given: Text) -> str:
    """What the document gives by the core's own session: all its tokens read, then the prompt, then on."""
    tokens = torch.tensor([list(b"".join(given.chunks))])
    session = rmt_core.read(model, rmt_core.open_session(model, 1), tokens)
    seeds = [document_seed(given.style.seed, given.doc_id)]
    written = rmt_core.generate(
        model, [list(PROMPT.encode())], given.style.max_new_tokens, session=session,
        sampling=given.style.sampling, stop_tokens=[256], seeds=seeds,
    )  # fmt: skip
    return ByteTokenizer().decode(written.tokens[0])


@pytest.mark.parametrize("memory", ["none", RMT, {"kind": "xl", "cache_len": 8}, ["xl", "rmt"]])
@pytest.mark.parametrize("style", [GREEDY, DRAWN])
def test_a_document_gives_what_a_session_of_its_own_gives(memory: object, style: Style) -> None:
    model = tiny_model(memory)
    summaries = list(strategy(model, 3).summarise(texts(style)))
    assert [summary.text for summary in summaries] == [reference(model, given) for given in texts(style)]
    assert len({summary.text for summary in summaries}) > len(summaries) / 2  # it depends on the document


@pytest.mark.parametrize("style", [GREEDY, DRAWN])
@pytest.mark.parametrize("num_rows", [3, 20])
def test_documents_side_by_side_equal_documents_alone(
    model: rmt_core.RecurrentModel, style: Style, num_rows: int
) -> None:
    together = list(strategy(model, num_rows).summarise(texts(style)))
    alone = [next(iter(strategy(model, 1).summarise([given]))) for given in texts(style)]
    assert together == alone
    assert [summary.doc_id for summary in together] == [given.doc_id for given in texts()]
    assert [summary.num_tokens for summary in together] == LENGTHS
    assert [summary.num_segments for summary in together] == [-(-n // SEGMENT_LEN) for n in LENGTHS]


def test_seeds_follow_the_document_and_the_setting(model: rmt_core.RecurrentModel) -> None:
    other_seed = Style(DRAWN.max_new_tokens, DRAWN.sampling, 1)
    first, again = (list(strategy(model, 4).summarise(texts(DRAWN))) for _ in range(2))
    assert first == again
    assert first != list(strategy(model, 4).summarise(texts(other_seed)))
    same_text = texts(DRAWN)[1]._replace(doc_id="another id")
    assert next(iter(strategy(model, 4).summarise([same_text]))).text != first[1].text


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of each batch of whole segments."""
    batches: list[int] = []
    step = rmt_core.RecurrentModel.step

    def counted(self: rmt_core.RecurrentModel, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> object:
        batches.append(len(tokens))
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(rmt_core.RecurrentModel, "step", counted)
    return batches


def test_a_document_that_ends_makes_room_for_the_next(
    model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_of(monkeypatch)
    given = [text(i, 3 * SEGMENT_LEN, Style(1, GREEDY.sampling, 0)) for i in range(20)]
    list(strategy(model, 2, prompt="").summarise(given))
    assert sum(batches) == 60
    assert batches.count(1) <= 4


def test_documents_are_opened_only_when_there_is_room(model: rmt_core.RecurrentModel) -> None:
    opened = 0

    def some() -> Iterator[Text]:
        nonlocal opened
        for i in range(50):
            opened += 1
            yield text(i, 40)

    next(iter(strategy(model, 4).summarise(some())))
    assert opened <= 16


def test_who_stops_asking_leaves_nothing_behind(model: rmt_core.RecurrentModel) -> None:
    asked = strategy(model, 2)
    clean = list(asked.summarise(texts()))
    begun = asked.summarise(texts())
    next(begun)
    begun.close()
    assert list(asked.summarise(texts())) == clean
    assert not asked._engine.slots.holders


class PoisonError(Exception):
    pass


@pytest.mark.parametrize("at", [2, 20, 39])  # in a first segment, a second one, in the rest read with the prompt
def test_a_document_on_which_the_model_fails_fails_alone(
    model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    given = [text(i, 40) for i in range(6)]
    clean = list(strategy(model, 3).summarise(given))
    poisoned = bytearray(b"".join(given[2].chunks))
    poisoned[at] = ord("!")
    read = type(model).read

    def checked(self: rmt_core.RecurrentModel, tokens: torch.Tensor, *args: object, **kwargs: object) -> object:
        if bool((tokens == ord("!")).any()):
            raise PoisonError("the model\nrefuses")
        return read(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "read", checked)
    bad = Text("bad", [bytes(poisoned)], GREEDY)
    summaries = list(strategy(model, 3).summarise([*given[:2], bad, *given[3:]]))
    assert summaries[:2] + summaries[3:] == clean[:2] + clean[3:]
    assert (summaries[2].doc_id, summaries[2].text) == ("bad", "")
    assert summaries[2].error == "the model could not compute this request (PoisonError)"


def failing(after: int, error: Exception) -> Iterable[bytes]:
    yield b"a" * after
    raise error


def test_a_document_whose_text_fails_fails_alone(
    model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_strategy, "encode_chunks", _by_chunk)
    good = [text(i, 40) for i in range(4)]
    clean = list(strategy(model, 3).summarise(good))
    bad = [
        Text("first", failing(0, UnreadableError("no text here")), GREEDY),
        Text("late", failing(400, RuntimeError("the disk\nbroke")), GREEDY),
        Text("utf-8", failing(20, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "not UTF-8 at byte 20")), GREEDY),
        Text("empty", [], GREEDY),
    ]
    given = [one for pair in zip(bad, good, strict=True) for one in pair]
    summaries = list(strategy(model, 3).summarise(given))
    assert summaries[1::2] == clean
    reasons = ["no text here", "RuntimeError: the disk broke", "not UTF-8 at byte 20", "the document is empty"]
    assert [summary.error for summary in summaries[::2]] == reasons
    assert summaries[2].num_tokens == 400


def _by_chunk(tokenizer: ByteTokenizer, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    """Tokens as soon as there are bytes: the real one looks ahead."""
    for chunk in chunks:
        yield np.frombuffer(chunk, np.uint8).astype(np.int32)


def test_values_that_are_not_finite_are_an_error_of_their_document() -> None:
    model = tiny_model(RMT)
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight[[0, ord("!")]] = float("nan")
        model.backbone.lm.get_output_embeddings().weight[0] = 0
    given = [text(0, 40), Text("whole", [b"!" * 40], GREEDY), Text("rest", [b"!!!"], GREEDY), text(3, 9)]
    finite = "the model's values are not finite"
    assert [summary.error for summary in strategy(model, 4).summarise(given)] == ["", finite, finite, ""]


class FailingDecoder(ByteTokenizer):
    def decode(self, ids: Iterable[int]) -> str:
        raise OSError("cannot decode")


def test_a_tokenizer_that_cannot_decode_gives_error_rows(model: rmt_core.RecurrentModel) -> None:
    summaries = list(strategy(model, 2, tokenizer=FailingDecoder()).summarise(texts()[:3]))
    assert [summary.error for summary in summaries] == ["OSError: cannot decode"] * 3


class EndsWithAnyToken(ByteTokenizer):
    eos_id: int | None = None

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids)


def test_an_end_token_ends_the_summary(model: rmt_core.RecurrentModel) -> None:
    tokenizer = EndsWithAnyToken()
    free = next(iter(strategy(model, 1, tokenizer=tokenizer).summarise([texts()[1]])))
    assert (free.num_written, free.finish_reason) == (20, "length")
    tokens = free.text.split()
    tokenizer.eos_id = int(tokens[7])
    ended = next(iter(strategy(model, 1, tokenizer=tokenizer).summarise([texts()[1]])))
    assert ended.text.split() == tokens[: tokens.index(tokens[7])]
    assert (ended.num_written, ended.finish_reason) == (tokens.index(tokens[7]), "stop")


# --- stored states ------------------------------------------------------------------------------------


class Kept:
    """A keeper in memory."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.data: bytes | None = None

    def load(self) -> bytes | None:
        return self.data

    def keep(self, data: bytes) -> None:
        self.data = data


class Killed(BaseException):
    pass


@pytest.mark.parametrize("memory", ["none", RMT, "armt", ["xl", "rmt"]])
@pytest.mark.parametrize("alive", [3, 9, 29])
def test_a_document_goes_on_from_its_last_state_and_ends_the_same(
    monkeypatch: pytest.MonkeyPatch, memory: object, alive: int
) -> None:
    """Killed after `alive` segments; of 25, every fourth is stored."""
    model = tiny_model(memory)
    (uninterrupted,) = strategy(model, 2).summarise([text(0, 25 * SEGMENT_LEN + 3)])
    keeper = Kept(4)
    given = text(0, 25 * SEGMENT_LEN + 3)._replace(keeper=keeper)
    step = Engine.step
    with monkeypatch.context() as patch:
        batches = batches_of(patch)

        def dying(self: Engine) -> object:
            if len(batches) >= alive:
                raise Killed
            return step(self)

        patch.setattr(Engine, "step", dying)
        if alive < 25:
            with pytest.raises(Killed):
                list(strategy(model, 2).summarise([given]))
        else:
            list(strategy(model, 2).summarise([given]))  # its states are there, its summary was lost
    with monkeypatch.context() as patch:
        batches = batches_of(patch)
        assert list(strategy(model, 2).summarise([given])) == [uninterrupted]
    written_segments = (3 + len(PROMPT) + 20) // SEGMENT_LEN  # closed while writing
    assert len(batches) == 25 - min(alive, 25) // 4 * 4 + written_segments


def test_states_are_stored_where_they_are_due(model: rmt_core.RecurrentModel) -> None:
    for every, stored in ((1, 40), (7, 35), (16, 32), (100, 0), (0, 0)):
        keeper = Kept(every)
        list(strategy(model, 1).summarise([text(0, 40 * SEGMENT_LEN + 1)._replace(keeper=keeper)]))
        assert (keeper.data is not None) == bool(stored)
        if keeper.data is not None:
            kept = rmt_core.state.from_bytes(keeper.data, rmt_core.fingerprint(model))
            assert int(kept["num_segments"]) == stored


def test_an_altered_state_is_not_believed(model: rmt_core.RecurrentModel) -> None:
    keeper = Kept(4)
    given = text(0, 10 * SEGMENT_LEN)._replace(keeper=keeper)
    clean = list(strategy(model, 1).summarise([given]))
    assert keeper.data is not None
    keeper.data = keeper.data[:-1] + bytes([keeper.data[-1] ^ 1])
    assert list(strategy(model, 1).summarise([given])) == clean


def test_a_text_that_is_shorter_than_what_was_read_of_it_is_an_error(model: rmt_core.RecurrentModel) -> None:
    keeper = Kept(4)
    list(strategy(model, 1).summarise([text(0, 10 * SEGMENT_LEN)._replace(keeper=keeper)]))
    (found,) = strategy(model, 1).summarise([text(0, 5 * SEGMENT_LEN)._replace(keeper=keeper)])
    assert found.error == "its text ends before the 8 segments that were read of it before"


def test_what_cannot_be_stored_ends_the_run(model: rmt_core.RecurrentModel) -> None:
    class Full(Kept):
        def keep(self, data: bytes) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        list(strategy(model, 1).summarise([text(0, 90)._replace(keeper=Full(1))]))


def test_documents_may_be_written_about_each_in_its_way(model: rmt_core.RecurrentModel) -> None:
    ways = [Style(5, rmt_core.Sampling(), 0), Style(20, rmt_core.Sampling(1.0), 3), GREEDY]
    given = [text(i, 40, ways[i % 3]) for i in range(6)]
    together = list(strategy(model, 6).summarise(given))
    assert together == [next(iter(strategy(model, 1).summarise([one]))) for one in given]
    assert [summary.num_written for summary in together[::3]] == [5, 5]


def test_no_documents_give_no_summaries(model: rmt_core.RecurrentModel) -> None:
    assert list(strategy(model, 2).summarise([])) == []


@pytest.mark.parametrize("num_good", [0, 100])
def test_where_documents_come_from_failing_is_no_fault_of_a_document(
    model: rmt_core.RecurrentModel, num_good: int
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a" * num_good * SEGMENT_LEN * 10
        raise StorageError("the store does not answer")

    with pytest.raises(StorageError):
        list(strategy(model, 2).summarise([text(0, 30), Text("a", chunks(), GREEDY)]))
