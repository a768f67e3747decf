"""Reading and writing, against reading everything again at every token.

Axes: N tokens of a text, V vocabulary.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel, Sampling, Session
from rmt_core.generation import sample

from .tiny import MEMORIES, RMT, VOCAB, XL, close, close_states, same_states, tiny_model, tokens_like

T = 5
PROMPT_LENGTHS = (1, T - 1, T, T + 1, 2 * T + 3)
NEW = 2 * T + 1


@pytest.fixture(params=MEMORIES)
def model(request: pytest.FixtureRequest) -> RecurrentModel:
    return tiny_model(MEMORIES[request.param], segment_len=T)


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    return [tokens_like(length, seed=10 + i).tolist() for i, length in enumerate(lengths)]


@torch.no_grad()
def last(model: RecurrentModel, text: Sequence[int]) -> Tensor:
    """The hidden state (D,) at the last token, after reading all of the text anew."""
    out, _ = rmt_core.run(model, torch.tensor([text]))
    return out.hidden[0, -1]


def naive(model: RecurrentModel, prompt: Sequence[int], num_new: int) -> list[int]:
    """Greedy writing that reads everything again at every token."""
    text = list(prompt)
    for _ in range(num_new):
        text.append(int(model.backbone.head(last(model, text)).argmax()))
    return text[len(prompt) :]


def check_session(model: RecurrentModel, session: Session, texts: Sequence[Sequence[int]]) -> None:
    """The session is that of a reader of these texts."""
    assert session.num_read.tolist() == [len(text) for text in texts]
    assert session.lengths.tolist() == [len(text) % T for text in texts]
    for i, text in enumerate(texts):
        closed = len(text) // T * T
        assert session.tokens[i, : len(text) - closed].tolist() == list(text[closed:])
        state = model.init_state(1)
        if closed:
            _, state = rmt_core.run(model, torch.tensor([text[:closed]]))
        assert close_states(rmt_core.state.select(session.state, [i]), state)
        assert close(session.hidden[i], last(model, text))


# Greedy writing


def check_greedy(model: RecurrentModel) -> None:
    """A ragged batch, each row past several segment ends."""
    result = rmt_core.generate(model, prompts(), NEW)
    wanted = [naive(model, prompt, NEW) for prompt in prompts()]
    assert result.tokens == wanted
    assert len({token for row in wanted for token in row}) > 2  # they say something
    assert result.finish_reasons == ["length"] * len(wanted)
    check_session(model, result.session, [p + w for p, w in zip(prompts(), wanted, strict=True)])


def test_greedy_equals_reading_everything_again(model: RecurrentModel) -> None:
    check_greedy(model)


@pytest.mark.parametrize(
    ("family", "memory"),
    [("gpt2", "none"), ("gpt2", RMT), ("gemma3_text", [XL, RMT]), ("smollm3", XL), ("qwen3", RMT)],
)
def test_greedy_equals_reading_everything_again_in_other_families(family: str, memory: Any) -> None:
    check_greedy(tiny_model(memory, family, T))


def test_a_cache_shorter_than_a_segment_is_decoded_too() -> None:
    check_greedy(tiny_model([{"kind": "xl", "cache_len": 3}, RMT], segment_len=T))


def test_segments_of_one_token_are_decoded() -> None:
    model = tiny_model(RMT, segment_len=1)
    result = rmt_core.generate(model, prompts((1, 3)), 4)
    assert result.tokens == [naive(model, prompt, 4) for prompt in prompts((1, 3))]


def test_a_batch_equals_each_row_alone(model: RecurrentModel) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9)
    together = rmt_core.generate(model, prompts(), NEW, sampling=sampling, seeds=[5, 6, 7, 8, 9])
    for i, prompt in enumerate(prompts()):
        alone = rmt_core.generate(model, [prompt], NEW, sampling=sampling, seeds=[5 + i])
        assert alone.tokens == [together.tokens[i]]
        assert close_states(rmt_core.state.select(together.session.state, [i]), alone.session.state)
        assert close(together.session.hidden[i], alone.session.hidden[0])


def test_prompts_may_be_a_tensor() -> None:
    model = tiny_model(RMT, segment_len=T)
    tokens = tokens_like(2, 7)
    assert rmt_core.generate(model, tokens, 3).tokens == rmt_core.generate(model, tokens.tolist(), 3).tokens


# Reading


@pytest.mark.parametrize("seed", [0, 1])
def test_streamed_in_chunks_of_any_size_equals_one_shot(model: RecurrentModel, seed: int) -> None:
    draw, texts = random.Random(seed), prompts((4 * T + 2, 3 * T, 2 * T + 4, 1))
    session, done = rmt_core.open_session(model, len(texts)), [0] * len(texts)
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        sizes = [draw.randint(0, min(2 * T, len(text) - at)) for at, text in zip(done, texts, strict=True)]
        chunk = torch.full((len(texts), max(*sizes, 1)), VOCAB - 1)
        for i, size in enumerate(sizes):
            chunk[i, :size] = torch.tensor(texts[i][done[i] : done[i] + size])
            done[i] += size
        session = rmt_core.read(model, session, chunk, torch.tensor(sizes))
    check_session(model, session, texts)


def test_reading_leaves_the_callers_session_alone(model: RecurrentModel) -> None:
    """A session can be forked."""
    before = rmt_core.generate(model, prompts((T + 2,)), 0).session
    kept = Session(*(rmt_core.state.tree_map(Tensor.clone, part) for part in before))
    for more in ([[]], prompts((3,))):
        first = rmt_core.generate(model, more, NEW, session=before)
        second = rmt_core.generate(model, more, NEW, session=before)
        assert first.tokens == second.tokens
    assert all(same_states(a, b) for a, b in zip(before, kept, strict=True))


def test_nothing_new_asked_is_reading(model: RecurrentModel) -> None:
    result = rmt_core.generate(model, prompts(), 0)
    assert result.tokens == [[]] * 5
    check_session(model, result.session, prompts())


# Sessions


@pytest.mark.parametrize("num_new", [1, T])
def test_a_continued_session_equals_one_prompt(model: RecurrentModel, num_new: int) -> None:
    first, more = prompts(), prompts((3, 0, 2 * T, 1, T))
    begun = rmt_core.generate(model, first, num_new)
    continued = rmt_core.generate(model, more, NEW, session=begun.session)
    whole = [a + b + c for a, b, c in zip(first, begun.tokens, more, strict=True)]
    assert continued.tokens == rmt_core.generate(model, whole, NEW).tokens
    check_session(model, continued.session, [a + b for a, b in zip(whole, continued.tokens, strict=True)])


def test_a_session_goes_on_without_a_further_prompt() -> None:
    model = tiny_model(RMT, segment_len=T)
    whole = rmt_core.generate(model, prompts(), NEW)
    begun = rmt_core.generate(model, prompts(), 4)
    continued = rmt_core.generate(model, [[]] * 5, NEW - 4, session=begun.session)
    assert [a + b for a, b in zip(begun.tokens, continued.tokens, strict=True)] == whole.tokens


# Stopping


def test_a_stop_token_ends_its_row_only(model: RecurrentModel) -> None:
    free = rmt_core.generate(model, prompts(), NEW)
    stop = free.tokens[0][T]
    result = rmt_core.generate(model, prompts(), NEW, stop_tokens=[stop])
    for row, whole, reason in zip(result.tokens, free.tokens, result.finish_reasons, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
        assert reason == ("stop" if stop in whole else "length")
    check_session(model, result.session, [p + w for p, w in zip(prompts(), result.tokens, strict=True)])


def test_any_of_several_stop_tokens_ends_a_row() -> None:
    model = tiny_model(RMT, segment_len=T)
    result = rmt_core.generate(model, prompts(), NEW, stop_tokens=list(range(VOCAB)))
    assert result.tokens == [[]] * 5
    assert result.finish_reasons == ["stop"] * 5


# Sampling


def draws(logits: Sequence[float], sampling: Sampling, num: int = 4000) -> Tensor:
    """Shares of `num` draws from one distribution, (V,)."""
    generator = torch.Generator().manual_seed(0)
    row = torch.tensor([logits])
    found = torch.cat([sample(row, sampling, [generator]) for _ in range(num)])
    return torch.bincount(found, minlength=len(logits)) / num


def shares(*weights: float) -> Tensor:
    return torch.tensor(weights) / sum(weights)


LOGITS = torch.tensor([0.3, 0.05, 0.5, 0.15]).log().tolist()


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0), shares(0.3, 0.05, 0.5, 0.15)),
        (Sampling(temperature=0.5), shares(0.3**2, 0.05**2, 0.5**2, 0.15**2)),
        (Sampling(temperature=2.0), shares(0.3**0.5, 0.05**0.5, 0.5**0.5, 0.15**0.5)),
        (Sampling(temperature=1.0, top_p=0.79), shares(0.3, 0, 0.5, 0)),
        (Sampling(temperature=1.0, top_p=0.81), shares(0.3, 0, 0.5, 0.15)),
        (Sampling(temperature=1.0, top_p=0.5 - 1e-6), shares(0, 0, 1, 0)),
        (Sampling(temperature=1.0, top_p=1e-9), shares(0, 0, 1, 0)),
        (Sampling(temperature=0.5, top_p=0.93), shares(0.3**2, 0, 0.5**2, 0)),
        (Sampling(temperature=1e-310), shares(0, 0, 1, 0)),
        (Sampling(temperature=5e-324, top_p=0.9), shares(0, 0, 1, 0)),
        (Sampling(), shares(0, 0, 1, 0)),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, wanted: Tensor) -> None:
    """Within four standard deviations; what is cut off never comes."""
    found = draws(LOGITS, sampling)
    assert not found[wanted == 0].any()
    assert bool(((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / 4000).sqrt()).all())


def test_a_greedy_tie_goes_to_the_lowest_token() -> None:
    assert sample(torch.tensor([[0.0, 2.0, 2.0]]), Sampling(), []).tolist() == [1]


def test_seeds_decide(model: RecurrentModel) -> None:
    def written(seeds: Sequence[int] | None) -> list[list[int]]:
        sampling = Sampling(temperature=1.5)
        return rmt_core.generate(model, prompts((4, 4)), NEW, sampling=sampling, seeds=seeds).tokens

    assert written([1, 2]) == written([1, 2])
    assert written([1, 2])[0] != written([3, 2])[0]
    assert written([1, 2])[1] == written([3, 2])[1]
    assert written(None) == written([0, 1])


# Borders


def test_a_session_may_begin_what_is_trained(model: RecurrentModel) -> None:
    """What was read without gradient is plain numbers to a later gradient."""
    session = rmt_core.read(model, rmt_core.open_session(model, 2), tokens_like(2, 2 * model.segment_len + 1))
    out, _ = model.step(tokens_like(2, model.segment_len), session.state)
    (out.hidden.sum() + model.backbone.head(session.hidden).sum()).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_a_session_of_others_is_refused() -> None:
    model = tiny_model(RMT)
    session = rmt_core.open_session(model, 1)
    with pytest.raises(ValueError, match="3 prompts for a session of 1 rows; give one a row"):
        rmt_core.generate(model, [[1], [2], [3]], 1, session=session)
    with pytest.raises(ValueError, match="the session has segments of 6 tokens, the model of 5"):
        rmt_core.generate(tiny_model(RMT, segment_len=5), [[1]], 1, session=session)


def test_what_is_written_carries_no_gradient() -> None:
    model = tiny_model(RMT, segment_len=T)
    session = rmt_core.generate(model, prompts(), 3).session
    assert not session.state.requires_grad
    assert not session.hidden.requires_grad
    assert not rmt_core.open_session(model, 1).state.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, "an empty prompt has no next token"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be 0 or more"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts; give one a row"),
        ({"prompts": [1, 2]}, r"a prompt has shape \(\); give a list of prompts, each a list of tokens"),
    ],
)
def test_what_cannot_be_written_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rmt_core.generate(tiny_model(), **{"prompts": [[1]], "max_new_tokens": 1, **settings})


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.1}],
)
def test_a_sampling_that_makes_no_sense_is_refused(settings: dict[str, float]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        Sampling(**settings)
