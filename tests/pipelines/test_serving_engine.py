"""The engine's outputs against each request alone, whatever stands beside it."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import rmt_core
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.engine import Engine, Settings
from pipelines.serving.readers import Position, Reader
from pipelines.serving.requests import Done, Event, Failed, Request, RequestError, Written
from rmt_core import RecurrentModel, Sampling
from rmt_core.state import leaves
from tests.rmt_core.tiny import MEMORIES, RMT, SHM, VOCAB, close_states, same_states, tiny_model, tokens_like

T = 5
KEY = b"the server's"
PROMPT_LENGTHS = (1, T - 1, T, T + 1, 2 * T + 3)
NEW = 2 * T + 1
FLOAT32_KINDS = ("rmt", "armt", "xl+rmt", "shm", "bmojo-full", "lamemo", "memformer", "infinity")


def engine_of(model: RecurrentModel, **settings: Any) -> Engine:
    """In float64, where rounding decides between no two tokens, without trials, which take time."""
    chosen = {"server_key": KEY, "num_slots": 4, "rows_read": 4, "exact": is_float32(model), **settings}
    return Engine(model, Settings(**chosen), fingerprint="f")


def is_float32(model: RecurrentModel) -> bool:
    return next(model.parameters()).dtype == torch.float32


def cold_engine_of(model: RecurrentModel) -> Engine:
    """It keeps nothing: each request that it gets by itself is alone."""
    return engine_of(model, prefix_bytes=0)


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    return [tokens_like(length, seed=10 + i).tolist() for i, length in enumerate(lengths)]


class Outcome:
    """What one request gave."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Written) for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Written))

    @property
    def last(self) -> Event:
        return self.events[-1]


def poison(engine: Engine) -> None:
    """Free slots hold what spreads to all that touches it."""
    used = len(engine.slots.holders)
    for buffer in (*engine.slots.segments.kept.buffers(), *leaves(engine.slots.state)):
        if buffer.is_floating_point():
            buffer[used:] = float("nan")


def finish(engine: Engine) -> dict[int, Outcome]:
    """Step to the end; outcomes by reader."""
    outcomes: dict[int, Outcome] = {}
    with torch.inference_mode():
        while engine.busy:
            poison(engine)
            for reader, event in engine.step():
                outcomes.setdefault(reader.number, Outcome()).events.append(event)
    assert not engine.slots.holders
    return outcomes


def serve(engine: Engine, *requests: Request, start: Position | None = None) -> list[tuple[Reader, Outcome]]:
    readers = [engine.add(request, start) for request in requests]
    outcomes = finish(engine)
    return [(reader, outcomes[reader.number]) for reader in readers]


def alone(engine: Engine, request: Request) -> list[int]:
    ((_, outcome),) = serve(engine, request)
    return outcome.tokens


def further(kind: str) -> list[pytest.MarkDecorator]:
    """Some kinds stand for all where a test takes seconds a kind; the others come with the long tests."""
    return [] if kind in ("rmt", "xl", "armt") else [pytest.mark.long]


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_full_engine_writes_what_each_prompt_gives_alone(kind: str) -> None:
    """More requests than slots and rows, each past several segment ends; the memory is that of reading all anew."""
    model = tiny_model(MEMORIES[kind], segment_len=T)
    served = serve(engine_of(model, rows_read=3), *(Request(prompt, NEW) for prompt in prompts()))
    wanted = rmt_core.generate(model, prompts(), NEW)
    for i, (reader, outcome) in enumerate(served):
        assert outcome.tokens == wanted.tokens[i]
        assert isinstance(outcome.last, Done)
        assert outcome.last.usage == (len(prompts()[i]), NEW, 0)
        text = [*prompts()[i], *outcome.tokens]
        num_closed = len(text) // T * T
        position = reader.position()
        assert position.num_tokens == outcome.last.num_tokens == len(text)
        assert list(position.open_tokens) == text[num_closed:]
        with torch.no_grad():
            _, state = rmt_core.run(model, torch.tensor([text[:num_closed]]))
        assert close_states(position.state, state)


def test_drawn_tokens_are_those_of_the_seed() -> None:
    model = tiny_model(RMT, segment_len=T)
    sampling = Sampling(temperature=1.3, top_p=0.9)
    wanted = rmt_core.generate(model, prompts(), NEW, sampling=sampling, seeds=range(5))
    requests = [Request(prompt, NEW, sampling=sampling, seed=i) for i, prompt in enumerate(prompts())]
    assert [outcome.tokens for _, outcome in serve(engine_of(model), *requests)] == wanted.tokens


def mixed_requests(draw: random.Random, count: int) -> list[Request]:
    return [
        Request(
            [draw.randrange(VOCAB) for _ in range(draw.randint(1, 4 * T))],
            draw.randint(0, 2 * T),
            sampling=Sampling(draw.choice([0.0, 0.0, 1.0])),
            seed=i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=further(kind)) for kind in FLOAT32_KINDS])
def test_in_float32_a_request_beside_others_gives_the_same_bits(kind: str) -> None:
    model = tiny_model(MEMORIES[kind], segment_len=T).float()
    draw = random.Random(0)
    requests = mixed_requests(draw, 12)
    engine = engine_of(model, prefix_bytes=0)
    readers: list[Reader] = []
    waiting = list(requests)
    outcomes: dict[int, Outcome] = {}
    with torch.inference_mode():
        while engine.busy or waiting:
            if waiting and draw.random() < 0.3:
                readers.append(engine.add(waiting.pop(0)))
            poison(engine)
            for reader, event in engine.step():
                outcomes.setdefault(reader.number, Outcome()).events.append(event)
    by_itself = cold_engine_of(model)
    for request, reader in zip(requests, readers, strict=True):
        ((other, outcome),) = serve(by_itself, request)
        assert outcome.tokens == outcomes[reader.number].tokens
        assert_same_position(reader.position(), other.position())


def assert_same_position(a: Position, b: Position) -> None:
    assert a._replace(state=None, hidden=None, chain=None) == b._replace(state=None, hidden=None, chain=None)
    assert same_states(a.state, b.state)
    assert (a.hidden is None) == (b.hidden is None)
    assert a.hidden is None or b.hidden is None or torch.equal(a.hidden, b.hidden)


# Sessions that move, prefixes that are known


def split(tokens: Sequence[int], draw: random.Random) -> Iterator[list[int]]:
    start = 0
    while start < len(tokens):
        size = draw.randint(1, 2 * T)
        yield list(tokens[start : start + size])
        start += size


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=further(kind)) for kind in FLOAT32_KINDS])
def test_a_prefix_found_at_any_boundary_gives_the_bits_of_reading_it(kind: str) -> None:
    model = tiny_model(MEMORIES[kind], segment_len=T).float()
    text = tokens_like(4 * T + 2, seed=5).tolist()
    engine = engine_of(model)
    serve(engine, Request(text))
    assert len(engine.prefixes) == 4
    cold_engine = cold_engine_of(model)
    for length in range(1, len(text) + 1):
        request = Request(text[:length], NEW)
        ((reader, outcome),) = serve(engine, request)
        ((cold, wanted),) = serve(cold_engine, request)
        assert isinstance(outcome.last, Done)
        assert outcome.last.usage.num_cached == length // T * T
        assert outcome.tokens == wanted.tokens
        assert_same_position(reader.position(), cold.position())


def test_what_was_written_is_found_as_a_prefix_too() -> None:
    model = tiny_model(RMT, segment_len=T).float()
    engine = engine_of(model)
    ((_, first),) = serve(engine, Request(prompts()[0], 3 * T))
    ((_, second),) = serve(engine, Request(prompts()[0] + first.tokens, 1))
    assert isinstance(second.last, Done)
    assert second.last.usage.num_cached == 3 * T


def test_prefixes_are_not_found_by_another_tenant_model_or_key() -> None:
    model, text = tiny_model(RMT, segment_len=T), tokens_like(3 * T).tolist()
    engine = engine_of(model)
    serve(engine, Request(text, tenant="a"))
    assert cached(engine, Request(text, tenant="a")) == 3 * T
    assert cached(engine, Request(text, tenant="b")) == 0
    for other in (
        Engine(model, Settings(server_key=KEY, exact=False), fingerprint="g"),
        Engine(model, Settings(server_key=b"another", exact=False), fingerprint="f"),
    ):
        other.prefixes = engine.prefixes
        assert cached(other, Request(text, tenant="a")) == 0


def cached(engine: Engine, request: Request) -> int:
    ((_, outcome),) = serve(engine, request)
    assert isinstance(outcome.last, Done)
    return outcome.last.usage.num_cached


def test_a_session_served_in_pieces_by_several_engines_gives_what_one_gives() -> None:
    """Each piece continues where the last one ended, on an engine that keeps nothing of it."""
    model = tiny_model(MEMORIES["xl+rmt"], segment_len=T).float()
    draw = random.Random(3)
    one, another, position, moved = engine_of(model), cold_engine_of(model), None, None
    for piece in split(tokens_like(8 * T, seed=2).tolist(), draw):
        request = Request(piece, draw.randint(0, T))
        ((here, first),) = serve(one, request, start=position)
        ((there, second),) = serve(another, request, start=moved)
        assert first.tokens == second.tokens
        position, moved = here.position(), there.position()
        assert_same_position(position, moved)


@pytest.mark.parametrize("num_rounds", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_two_tenants_interleaved_are_as_if_alone(num_rounds: int) -> None:
    model = tiny_model(MEMORIES["armt"], segment_len=T).float()
    draw = random.Random(7)
    together = engine_of(model)
    apart = {tenant: engine_of(model) for tenant in "ab"}
    start = together.start()
    positions: dict[tuple[str, str], Position] = {}
    for _ in range(num_rounds):
        requests = [
            Request(
                [draw.randrange(VOCAB) for _ in range(draw.randint(1, T))],
                draw.randint(0, 3),
                tenant=tenant,
                sampling=Sampling(draw.choice([0.0, 1.0])),
                seed=draw.randrange(100),
            )
            for tenant in "ab"
        ]
        readers = [together.add(request, positions.get(("both", request.tenant))) for request in requests]
        outcomes = finish(together)
        for request, reader in zip(requests, readers, strict=True):
            before = positions.get(("apart", request.tenant), start)
            ((other, outcome),) = serve(apart[request.tenant], request, start=before)
            assert outcome.tokens == outcomes[reader.number].tokens
            position = other.position()
            assert_same_position(reader.position(), position)
            if position.num_tokens > 100 * T:
                position = start
            positions["both", request.tenant] = positions["apart", request.tenant] = position


# Errors, cancellation, turns


def test_a_row_that_raises_or_is_not_finite_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(RMT, segment_len=T)
    raises, spoils = VOCAB - 1, VOCAB - 2
    embed = model.backbone.embed

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        if (tokens == raises).any():
            raise RuntimeError("secret words")
        return embed(tokens).masked_fill((tokens == spoils)[..., None], float("nan"))

    good = [[token % spoils for token in prompt] for prompt in prompts()]
    engine = engine_of(model, num_slots=16, rows_read=16)
    wanted = [alone(engine, Request(prompt, 1)) for prompt in good]
    engine.prefixes.clear()
    monkeypatch.setattr(model.backbone, "embed", broken)
    bad = [[1, raises], [1] * T + [raises], [raises] * T + [1], [1, spoils], [spoils] * T]
    served = serve(engine, *(Request(prompt, 1) for pair in zip(bad, good, strict=True) for prompt in pair))
    for (_, failed), (_, fine), tokens in zip(served[::2], served[1::2], wanted, strict=True):
        assert isinstance(failed.last, Failed)
        assert failed.last.code == "failed"
        assert "secret" not in failed.last.message
        assert fine.tokens == tokens


def test_a_row_that_raises_while_it_is_written_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(RMT, segment_len=T)
    engine = engine_of(model, num_slots=16)
    wanted = [alone(engine, Request(prompt, 4)) for prompt in prompts()]
    # A token that one row alone writes, once, where it does not fill a segment: it is run by itself.
    victim, at, token = next(
        (i, at, token)
        for i, row in enumerate(wanted)
        for at, token in enumerate(row[:3])
        if sum(each.count(token) for each in wanted) == 1
        and (len(prompts()[i]) + at + 1) % T
        and [token] not in [prompt[-1:] for prompt in prompts()]
    )
    embed = model.backbone.embed

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == 1 and (tokens == token).any():
            raise RuntimeError
        return embed(tokens)

    monkeypatch.setattr(model.backbone, "embed", broken)
    served = serve(engine, *(Request(prompt, 4) for prompt in prompts()))
    for i, (_, outcome) in enumerate(served):
        assert isinstance(outcome.last, Failed if i == victim else Done)
        assert outcome.tokens == wanted[i][: at + 1 if i == victim else 4]


def test_a_cancelled_request_leaves_at_once_and_a_waiting_one_gets_its_slot() -> None:
    model = tiny_model(RMT, segment_len=T)
    engine = engine_of(model, num_slots=1)
    first, second = (engine.add(Request(prompt, 50)) for prompt in prompts((2, 3)))
    with torch.inference_mode():
        for _ in range(6):
            engine.step()
        assert (first.slot, second.slot) == (0, None)
        assert len(first.written) > 2
        engine.cancel(first)
        events = engine.step()
    assert first.slot is None
    assert all(reader is second for reader, _ in events)
    assert second.slot == 0
    assert finish(engine)[second.number].tokens[-1:] == second.written[-1:]
    assert second.written == alone(engine_of(model), second.request)


def test_a_request_cancelled_before_it_enters_never_does() -> None:
    engine = engine_of(tiny_model(RMT, segment_len=T))
    engine.cancel(engine.add(Request([1], 5)))
    with torch.inference_mode():
        assert engine.step() == []
    assert not engine.busy


@pytest.mark.parametrize("share", [1, 3])
def test_books_being_read_and_conversations_take_turns(share: int) -> None:
    """While both have work, a step of reading comes after `share` steps of writing, however many books there are."""
    engine = engine_of(
        tiny_model(RMT, segment_len=T), write_steps_per_read=share, num_slots=2, rows_read=2, prefix_bytes=0
    )
    for i in range(5):
        engine.add(Request(tokens_like(60 * T, seed=i).tolist()))
    talk = engine.add(Request([1, 2], 3 * T))
    choose, kinds = engine.scheduler.choose, ""

    def watched(*given: Any) -> Any:
        nonlocal kinds
        batch = choose(*given)
        kinds += batch[0].kind.value[0]
        return batch

    engine.scheduler.choose = watched  # type: ignore[method-assign]
    while not talk.left:
        engine.step()
    both = kinds[kinds.index("w") :]
    assert both.count("w") >= 3 * T - 1
    assert max(len(run) for run in both.split("w")) == 1  # never two steps of reading in a row
    assert max(len(run) for run in both.split("r")) <= share + 1
    assert both.count("r") >= both.count("w") // (share + 1)


# Ends


def test_stop_tokens_and_strings_end_a_row_and_no_other() -> None:
    torch.manual_seed(0)
    model = tiny_model(RMT, segment_len=T, vocab_size=257)
    engine = Engine(model, Settings(server_key=KEY, exact=False), fingerprint="f", tokenizer=ByteTokenizer())
    prompt = list(b"abc")
    ((_, free),) = serve(engine, Request(prompt, NEW))
    assert free.text == ByteTokenizer().decode(free.tokens)
    stop = free.tokens[T]
    first = free.tokens.index(stop)
    ((_, by_token), (_, other)) = serve(engine, Request(prompt, NEW, stop_tokens=[stop]), Request(prompt, NEW))
    assert isinstance(by_token.last, Done)
    assert by_token.last.finish_reason == "stop"
    assert by_token.tokens == free.tokens[:first]
    assert other.tokens == free.tokens
    string = free.text[4:6]
    ((_, by_string),) = serve(engine, Request(prompt, NEW, stop_strings=["never", string]))
    assert isinstance(by_string.last, Done)
    assert by_string.last.finish_reason == "stop"
    assert by_string.text == free.text[: free.text.index(string)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "there are no tokens"),
        (Request([VOCAB], 1), "a token is not one of the model's, 0 to 22"),
        (Request([-1], 1), "a token is not one of the model's"),
        (Request([1], -1), "max_new_tokens is -1; it must be 0 or more"),
        (Request([1], 1, seed=2**63), r"seed is 9223372036854775808; it must be from -2\^63 to 2\^63 - 1"),
        (Request([1], 1, stop_strings=[""]), "a stop string is empty"),
        (Request([1], 1, stop_strings=["a"]), "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine_of(tiny_model(RMT, segment_len=T)).add(request_)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="num_slots is 0; it must be at least 1"):
        Settings(num_slots=0, server_key=KEY)
    with pytest.raises(ValueError, match="a prefix cache needs a server_key"):
        Settings()


def test_an_engine_warms_up_and_is_idle_again() -> None:
    engine = engine_of(tiny_model(SHM, segment_len=T))
    engine.warm_up()
    assert not engine.busy
    assert not engine.slots.holders
