"""A probe reads fixed texts with and without memory, over all workers, and leaves the run as it was.

Axes: R rows, K segments, T tokens of a segment.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

import rmt_core
from pipelines.config import InputError
from pipelines.data.store import DocumentEntry
from pipelines.training.probe import Probe, take_texts
from pipelines.training.states import relative_change, state_figures
from rmt_core import SegmentBatch
from tests.process_group import join

T = 4


class Store:
    """Documents whose tokens tell which they are: 100 a document and the place in it."""

    def __init__(self, *sizes: int) -> None:
        self.segment_len = T
        self.manifest = [
            DocumentEntry(str(i), "", size, size, -(-size // T), "", 0, hashlib.sha256(b"").hexdigest())
            for i, size in enumerate(sizes)
        ]

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray:
        tokens = 100 * int(document.document_id) + np.arange(document.num_tokens)
        return tokens[start * T : stop * T].astype(np.int32)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    join(0, 1, tmp_path)
    yield
    dist.destroy_process_group()


def test_texts_are_tokens_with_the_next_ones_as_labels() -> None:
    texts = take_texts(Store(3, 10, 21), num_rows=2, num_segments=3, eos_id=999)
    first, second = texts.tokens.reshape(2, -1).tolist()
    assert first == [*range(100, 110), 0, 0]
    assert texts.labels.reshape(2, -1)[0].tolist() == [*range(101, 110), 999, -100, -100]
    assert texts.lengths[0].tolist() == [4, 4, 2]
    assert second == list(range(200, 212))
    assert texts.labels.reshape(2, -1)[1].tolist() == list(range(201, 213))  # the next piece's first is known
    assert texts.lengths[1].tolist() == [4, 4, 4]


def test_rows_without_a_text_stay_empty_and_texts_without_a_second_segment_are_left_out() -> None:
    texts = take_texts(Store(3, 6, 4), num_rows=3, num_segments=8, eos_id=None)
    assert texts.tokens.reshape(3, -1)[0, :6].tolist() == list(range(100, 106))
    assert (texts.labels[1:] == rmt_core.IGNORED).all()
    assert texts.lengths.sum(1).tolist() == [6, 0, 0]
    with pytest.raises(InputError, match="no document has two segments"):
        take_texts(Store(3, 4), num_rows=1, num_segments=2, eos_id=None)


def model_of(dropout: float = 0.0, memory: object = "rmt") -> rmt_core.RecurrentModel:
    torch.manual_seed(0)
    backbone = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 16, "intermediate_size": 24,
                "num_hidden_layers": 2, "num_attention_heads": 2, "attention_dropout": dropout}  # fmt: skip
    model = rmt_core.build(backbone=backbone, memory=memory, segment_len=T)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def forward_of(model: rmt_core.RecurrentModel):  # type: ignore[no-untyped-def]
    def forward(segments: list[SegmentBatch], state: object) -> torch.Tensor:
        return torch.stack(model.unroll(segments, state).nats, dim=1)

    return forward


def test_both_losses_are_means_over_the_later_segments(one_process: None) -> None:
    model, texts = model_of(), take_texts(Store(10, 12), num_rows=3, num_segments=3, eos_id=None)
    probe = Probe(texts, [0, 1, 2], torch.device("cpu"))
    found = probe.losses(model, forward_of(model), model.init_state(3))
    model.eval()
    nats: dict[str, list[float]] = {"probe_loss": [], "probe_loss_without_memory": []}
    with torch.no_grad():
        for row in (0, 1):
            state = model.init_state(1)
            for k in range(3):
                size = int(texts.lengths[row, k])
                tokens = torch.from_numpy(texts.tokens[row : row + 1, k, :size])
                out, state = model.step(tokens, state)
                alone = model.step(tokens, model.init_state(1))[0]
                for i, label in enumerate(texts.labels[row, k, :size].tolist()):
                    if k and label != rmt_core.IGNORED:
                        for name, each in zip(nats, (out, alone), strict=True):
                            nats[name].append(-float(each.logits[0, i].log_softmax(-1)[label]))
    for name, values in nats.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-5), name
    assert found["probe_loss"] != pytest.approx(found["probe_loss_without_memory"], abs=1e-3)


def test_a_probe_draws_no_random_numbers_and_leaves_training_on(one_process: None) -> None:
    model = model_of(dropout=0.5)
    probe = Probe(take_texts(Store(10), 1, 3, None), [0], torch.device("cpu"))
    before = torch.get_rng_state()
    first = probe.losses(model, forward_of(model), model.init_state(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert probe.losses(model, forward_of(model), model.init_state(1)) == first


# --- figures of the state ---------------------------------------------------------------------------


def test_the_drift_is_the_change_over_the_norm_of_followed_rows_alone(one_process: None) -> None:
    before = {"a": torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), "n": torch.tensor([1, 2, 3])}
    after = {"a": torch.tensor([[3.0, 5.0], [9.0, 9.0], [1.0, 1.0]]), "n": torch.tensor([4, 5, 6])}
    assert relative_change(before, after)[0] == pytest.approx(1 / 5)
    found = state_figures(before, after, torch.tensor([True, False, True]))  # the third began at zero: no ratio
    assert found["state_drift"] == pytest.approx(1 / 5)
    assert found["state_norm"] == pytest.approx(np.mean([np.sqrt(17), 9, 1]))
    assert state_figures(before, after, torch.tensor([False] * 3))["state_drift"] is None


def test_without_a_state_there_is_nothing_to_tell(one_process: None) -> None:
    assert state_figures((), (), torch.ones(2, dtype=torch.bool)) == {"state_norm": None, "state_drift": None}
