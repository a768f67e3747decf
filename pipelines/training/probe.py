"""What the memory is worth while a run goes on: the loss on texts held fixed, with memory and without.

With memory each text is read from its beginning with the state carried on. Without, every segment starts from the
state that a document starts with, which training has shown the model too, so that what is lost is what was carried.
The first segments of texts are the same in both and are left out. A probe changes nothing of the run: no gradient, no
dropout, and random numbers are as they were.

Axes: R rows of a worker, K segments of a text, T tokens of a segment.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

import rmt_core
from pipelines.config import InputError
from pipelines.data.books import BookStore
from pipelines.data.plan import Reads, cut_pieces
from pipelines.data.store import SegmentStore
from pipelines.data.tokenise import Tokenizer
from pipelines.training.settings import TrainConfig
from rmt_core import SegmentBatch
from rmt_core.state import State

log = logging.getLogger(__name__)

Forward = Callable[[list[SegmentBatch], State], Tensor]  # -> nats (R, K, T) of each label, 0 where nothing is asked


class Texts(NamedTuple):
    """The texts of all workers' probes."""

    tokens: np.ndarray  # (R, K, T) int64
    labels: np.ndarray  # (R, K, T) int64, -100 behind a text's end
    lengths: np.ndarray  # (R, K) int64


def probe_texts(config: TrainConfig, store: Reads, tokenizer: Tokenizer) -> Texts | None:
    """The texts that a run's probes read, a row for each of its lanes; None where none are asked for. InputError."""
    settings = config.report
    if settings.probe_every is None:
        if settings.probe_data is not None:
            raise InputError("report.probe_data is set without report.probe_every, so nothing would read it")
        return None
    held = store
    if settings.probe_data is not None:
        held = SegmentStore(settings.probe_data)
        if (held.segment_len, held.tokenizer_fingerprint) != (store.segment_len, tokenizer.fingerprint):
            raise InputError(
                f"report.probe_data {settings.probe_data} was prepared with another tokenizer or segment_len than the "
                "data; prepare it with the same"
            )
    elif config.data is None:
        held = BookStore(store.segment_len, "heldout")
    else:
        log.info("probes read documents that are trained on, too; report.probe_data names others")
    return take_texts(held, config.batch_size, settings.probe_segments, tokenizer.eos_id)


def take_texts(store: Reads, num_rows: int, num_segments: int, eos_id: int | None) -> Texts:
    """Texts for `num_rows` rows: beginnings of pieces of at most `num_segments` segments, spread over the store.

    Where the store has fewer such pieces, the last rows stay empty. InputError where no document has two segments.
    """
    pieces = [piece for piece in cut_pieces(store.manifest, num_segments) if piece.num_segments > 1]
    if not pieces:
        raise InputError(
            "report.probe_every: no document has two segments, so there is nothing to remember; prepare "
            "with a smaller segment_len, or give report.probe_data with longer documents"
        )
    num_used = min(num_rows, len(pieces))
    chosen = [pieces[i * len(pieces) // num_used] for i in range(num_used)]
    shape = (num_rows, num_segments, store.segment_len)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, rmt_core.IGNORED, dtype=np.int64)
    for row, piece in enumerate(chosen):
        document = store.manifest[piece.document]
        text = store.read(document, piece.start, min(piece.stop + 1, document.num_segments))
        size = min(piece.num_segments * store.segment_len, len(text))
        following = np.append(text[1 : size + 1], rmt_core.IGNORED if eos_id is None else eos_id)[:size]
        tokens[row].reshape(-1)[:size] = text[:size]
        labels[row].reshape(-1)[:size] = following
    starts = store.segment_len * np.arange(num_segments)
    sizes = np.zeros((num_rows, 1), dtype=np.int64)
    sizes[:num_used, 0] = [_size(store, piece.document, piece.start, piece.num_segments) for piece in chosen]
    return Texts(tokens, labels, np.clip(sizes - starts, 0, store.segment_len))


def _size(store: Reads, document: int, start: int, num_segments: int) -> int:
    """Tokens of some segments of a document, of which the last may be short."""
    rest = store.manifest[document].num_tokens - start * store.segment_len
    return min(rest, num_segments * store.segment_len)


class Probe:
    """The texts of one worker's rows, ready to be read again and again."""

    def __init__(self, texts: Texts, rows: Sequence[int], device: torch.device) -> None:
        tokens, labels, lengths = (torch.from_numpy(part[list(rows)]).to(device) for part in texts)
        begins = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
        begins[:, 0] = True
        always = torch.ones_like(begins)
        self.carried = _segments(tokens, labels, lengths, begins)
        self.forgotten = _segments(tokens, labels, lengths, always)
        self.num_labels = int((labels[:, 1:] != rmt_core.IGNORED).sum())

    def losses(self, module: nn.Module, forward: Forward, state: State) -> dict[str, float]:
        """`probe_loss` and `probe_loss_without_memory`, mean nats a label over all workers; every worker calls it.

        `forward` runs the module over segments; `state` is any state of as many rows, whose values are not used.
        """
        was_training = module.training
        device = self.carried[0].tokens.device
        sums = []
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            module.eval()
            try:
                for segments in (self.carried, self.forgotten):
                    sums.append(forward(segments, state)[:, 1:].double().sum())
            finally:
                module.train(was_training)
        total = torch.stack([*sums, sums[0].new_tensor(self.num_labels)])
        dist.all_reduce(total)
        with_memory, without, num_labels = total.tolist()
        return {"probe_loss": with_memory / num_labels, "probe_loss_without_memory": without / num_labels}


def _segments(tokens: Tensor, labels: Tensor, lengths: Tensor, reset: Tensor) -> list[SegmentBatch]:
    parts = zip(tokens.unbind(1), labels.unbind(1), lengths.unbind(1), reset.unbind(1), strict=True)
    return [SegmentBatch(t, y, size, begins) for t, y, size, begins in parts]
