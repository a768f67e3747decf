"""Many requests through one model: continuous batching at the grain of a segment, and of a token while writing.

    engine = Engine(model, fingerprint=rmt_core.fingerprint(model))
    reader = engine.add(Request(tokens=[...], max_new_tokens=20))
    while engine.busy:
        for reader, event in engine.step():
            ...

Three nouns: a `Reader` is a request in motion, the `Scheduler` says whose work is next, `Slots` hold the keys and
values of segments that are being written. A step runs one batch, of one shape. A finished or cancelled request leaves
at once, a waiting one enters at the next step. What a step computes is put into a reader only when it has succeeded; a
batch that raises is run again row by row, so that an error stays with its row.

Equal outputs. What a request gives does not depend on the requests beside it, nor on whether its prefix was cached or
its session moved to an equal machine: bit for bit, as batches have only such numbers of rows as `BatchSizes` finds to
give the same bits.

Axes: R rows of a batch, T tokens of a segment, D width, V vocabulary.
"""

import logging
import math
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pipelines.data.tokenise import Tokenizer
from rmt_core import RecurrentModel
from rmt_core import state as states
from rmt_core.generation import sample
from rmt_core.state import State

from .batch_sizes import BatchSizes
from .prefix import Boundary, PrefixCache, first_key, next_key
from .readers import Position, Reader, check
from .requests import Event, Failed, Request, RequestError, Written
from .scheduling import Scheduler, Shape, Work
from .slots import Slots
from .text import TextStream
from .trials import draw

log = logging.getLogger(__name__)

# Layers that a kind of batch is tried on, in all trials: where few elements differ, one shows in some of them.
_TRIAL_LAYERS = 16


@dataclass(frozen=True)
class Settings:
    """How much an engine does at once."""

    num_slots: int = 16  # sessions that write at the same time
    rows_read: int = 4  # segments read in a step
    write_steps_per_read: int = 8  # steps of writing to one of reading, where there is work of both kinds
    exact: bool = True  # the same bits whatever is batched; False: up to rounding, without trials at the first steps
    prefix_bytes: int = 256 * 1024**2  # of the prefix cache; 0: none
    server_key: bytes = field(default=b"", repr=False)  # secret of the prefix cache's keys

    def __post_init__(self) -> None:
        for name in ("num_slots", "rows_read", "write_steps_per_read"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prefix_bytes and not self.server_key:
            raise ValueError(
                "a prefix cache needs a server_key, secret random bytes; give one or set prefix_bytes to 0"
            )


class Engine:
    """See the module's description. Not for several threads, but for `add` and `cancel`, which any may call."""

    def __init__(
        self,
        model: RecurrentModel,
        settings: Settings,
        *,
        fingerprint: str,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model = model.eval()
        self.settings = settings
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.slots = Slots(model, settings.num_slots)
        self.scheduler = Scheduler(settings.write_steps_per_read)
        self.prefixes = PrefixCache(settings.prefix_bytes)
        self.device = self.slots.device
        self.sizes = BatchSizes(
            {
                "close": settings.rows_read,
                "open": settings.rows_read,
                "extend": settings.num_slots,
                "choose": settings.num_slots,
            },
            partial(draw, model, torch.Generator().manual_seed(0)),
            alone=("close", "open") if self.device.type == "cpu" else (),
            num_trials=math.ceil(_TRIAL_LAYERS / model.backbone.dimensions.num_layers) if settings.exact else 0,
        )
        self.readers: dict[int, Reader] = {}
        self.num_steps = 0
        self._changed: list[Reader] = []  # since their next work was looked up
        self._works: dict[int, Work[Reader]] = {}  # by reader, the longest waiting first
        self._waiting: deque[Reader] = deque()
        self._cancelled: deque[Reader] = deque()
        self._events: list[tuple[Reader, Event]] = []
        self.vocab_size = model.backbone.lm.get_input_embeddings().weight.shape[0]

    @property
    def busy(self) -> bool:
        return bool(self.readers or self._waiting)

    def start(self) -> Position:
        """Of a document of which nothing has been read."""
        return Position(states.detach(self.model.init_state(1)), (), None, 0, 0)

    def add(self, request: Request, position: Position | None = None) -> Reader:
        """A request that goes on from `position`; it enters at the next step. Raises RequestError."""
        self.check(request)
        text = None if self.tokenizer is None else TextStream(self.tokenizer, request.stop_strings)
        reader = Reader(request, self._here(position), self.model.segment_len, text)
        self._waiting.append(reader)
        return reader

    def _here(self, position: Position | None) -> Position:
        """The position with its tensors on the engine's device."""
        if position is None:
            return self.start()
        hidden = None if position.hidden is None else position.hidden.to(self.device)
        return position._replace(state=states.to(position.state, self.device), hidden=hidden)

    def check(self, request: Request) -> None:
        """RequestError where the request makes no sense in itself."""
        check(request, self.vocab_size)
        if request.stop_strings and self.tokenizer is None:
            raise RequestError("invalid_request", "stop strings need a tokenizer; this engine has none")

    def warm_up(self) -> None:
        """Run each kind of work once: before it, the first request would wait for what is made at a first time."""
        reader = self.add(Request([0] * (self.model.segment_len + 1), max_new_tokens=2))
        while self.busy:
            for _, event in self.step():
                if isinstance(event, Failed):
                    raise RuntimeError(f"the engine's first steps failed: {event.message}")
        assert reader.left

    def cancel(self, reader: Reader) -> None:
        """The request leaves at the next step, without further events."""
        self._cancelled.append(reader)

    @torch.inference_mode()
    def step(self) -> list[tuple[Reader, Event]]:
        """Run one batch; what it gave, in order. `Done` and `Failed` are a reader's last."""
        self._events = []
        while self._cancelled:
            self._leave(self._cancelled.popleft())
        while self._waiting:
            self._enter(self._waiting.popleft())
        self._look_up()
        self.num_steps += 1
        batch = self.scheduler.choose(self._ready(), self.sizes.largest)
        if batch:
            self._run(batch)
            self._look_up()
        return self._events

    def _enter(self, reader: Reader) -> None:
        if reader.left:
            return
        self.readers[reader.number] = reader
        self._changed.append(reader)
        reader.since = self.num_steps
        if self.settings.prefix_bytes:
            self._use_prefixes(reader)

    def _leave(self, reader: Reader) -> None:
        reader.left = True
        self.readers.pop(reader.number, None)
        self._works.pop(reader.number, None)
        self.slots.release(reader)

    def _look_up(self) -> None:
        """Choose the next tokens of readers that changed; what these need next comes behind all other work."""
        changed, self._changed = self._changed, []
        self._choose_tokens([reader for reader in changed if not reader.left and reader.work() is None])
        for reader in changed:
            self._works.pop(reader.number, None)
            if not reader.left and (work := reader.work()) is not None:
                self._works[reader.number] = Work(reader, *work, reader.since)

    def _ready(self) -> list[Work[Reader]]:
        """What can be run now. Where slots are free, those that wait longest get them."""
        ready = []
        num_free = self.slots.num_free
        for work in self._works.values():
            if work.shape.stage == "open" and work.owner.slot is None:
                if not num_free:
                    continue
                num_free -= 1
            ready.append(work)
        return ready

    # --- a batch ------------------------------------------------------------------------------------

    def _run(self, batch: Sequence[Work[Reader]]) -> None:
        shape = batch[0].shape
        stages = {"close": self._close, "open": self._open, "extend": self._extend}
        readers = [work.owner for work in batch]
        self._changed += readers
        for reader in readers:
            reader.since = self.num_steps
            if shape.stage == "open":
                self.slots.take(reader)
        self._isolated(partial(stages[shape.stage], shape), readers)

    def _isolated(self, work: Callable[[Sequence[Reader]], None], readers: Sequence[Reader]) -> None:
        """`work` on all readers; where that raises, on each alone. It changes no reader before it has succeeded."""
        try:
            work(readers)
        except torch.AcceleratorError:  # the device is lost: nothing can be computed any more
            raise
        except Exception as error:  # some row's fault; whose is seen by running each alone
            if len(readers) == 1:
                self._fail(readers[0], error)
                return
            for reader in readers:
                self._isolated(work, [reader])

    def _close(self, shape: Shape, readers: Sequence[Reader]) -> None:
        def compute(rows: Sequence[int]) -> State:
            out, state = self.model.step(*self._batch(shape, _meant(readers, rows)))
            return out.hidden[:, -1], state

        hidden, state = self.sizes.run(shape, len(readers), compute)
        ends = [Boundary(states.select(state, [i]), hidden[i : i + 1].clone()) for i in range(len(readers))]
        for reader, end in zip(readers, ends, strict=True):
            if not self._is_finite(reader, end.hidden):
                continue
            chain = None if reader.chain is None else next_key(reader.chain, reader.next_tokens())
            reader.close(end.state, end.hidden, chain)
            if chain is not None:
                self.prefixes.put(chain, end)
            if not reader.written:
                self._tell(reader, reader.progress())

    def _open(self, shape: Shape, readers: Sequence[Reader]) -> None:
        def compute(rows: Sequence[int]) -> State:
            batch = _meant(readers, rows)
            tokens, state = self._batch(shape, batch)
            lengths = torch.tensor([reader.num_open for reader in batch], device=self.device)
            return self.slots.open(readers[rows[0] : rows[-1] + 1], tokens, lengths, state)

        self._opened(readers, self.sizes.run(shape, len(readers), compute)[: len(readers)])

    def _extend(self, shape: Shape, readers: Sequence[Reader]) -> None:
        num_rows = len(self.slots.holders)
        hidden, state = self.sizes.run(shape, num_rows, lambda rows: self.slots.extend(readers, rows))
        hidden = hidden[[reader.slot for reader in readers]]
        self.slots.keep(readers, state)
        self._opened(readers, hidden)

    def _opened(self, readers: Sequence[Reader], hidden: Tensor) -> None:
        """Keys and values of the readers' open tokens are there, and the hidden states (readers, D) at their last."""
        for reader, last in zip(readers, hidden.clone().split(1), strict=True):
            if self._is_finite(reader, last):
                reader.opened(last)

    def _batch(self, shape: Shape, readers: Sequence[Reader]) -> tuple[Tensor, State]:
        """The readers' next tokens (R, n) and states, R rows."""
        rows = [reader.next_tokens() for reader in readers]
        # Padded with a row's own token: another's values, were they not finite, would reach the row as 0 x NaN.
        padded = [[*row, *row[-1:] * (shape.num_tokens - len(row))] for row in rows]
        tokens = torch.tensor(padded, device=self.device)
        return tokens, states.stack([reader.state for reader in readers])

    def _is_finite(self, reader: Reader, hidden: Tensor) -> bool:
        """Whether the reader's hidden state is; otherwise it fails."""
        finite = bool(torch.isfinite(hidden).all())
        if not finite:
            self._fail(reader, RequestError("failed", "the model's values are not finite"))
        return finite

    # --- tokens and ends ----------------------------------------------------------------------------

    def _choose_tokens(self, ready: Sequence[Reader]) -> None:
        """The next token of those that have a hidden state to choose it from; what then is complete leaves."""
        writing = [reader for reader in ready if reader.writes]
        for start in range(0, len(writing), self.settings.num_slots):
            self._isolated(self._choose, writing[start : start + self.settings.num_slots])
        for reader in ready:
            if not reader.left and not reader.writes and reader.work() is None:
                self._finish(reader)

    def _choose(self, readers: Sequence[Reader]) -> None:
        hidden = torch.cat([reader.hidden for reader in readers if reader.hidden is not None])  # (readers, D)
        logits: Tensor = self.sizes.run(
            Shape("choose", 1),
            len(readers),
            lambda rows: self.model.backbone.head(hidden[[min(i, len(readers) - 1) for i in rows]]),
        )
        logits = logits[: len(readers)]  # (readers, V)
        likeliest = logits.argmax(-1).tolist()
        for reader, row, token in zip(readers, logits.split(1), likeliest, strict=True):
            self._isolated(partial(self._write, row, token), [reader])  # what fails from here on is not repeated

    def _write(self, logits: Tensor, likeliest: int, readers: Sequence[Reader]) -> None:
        """The next token of one reader, from logits (1, V)."""
        (reader,) = readers
        sampling = reader.request.sampling
        token = likeliest if sampling.temperature == 0 else int(sample(logits, sampling, [reader.generator]))
        if token in reader.request.stop_tokens:
            reader.reason = "stop"
            return
        reader.put(token)
        text = "" if reader.text is None else reader.text.add(token)
        if reader.text is not None and reader.text.stopped:
            reader.reason = "stop"
        self._tell(reader, Written((token,), text))

    def _finish(self, reader: Reader) -> None:
        if any(bool(leaf.isnan().any()) for leaf in states.leaves(reader.state)):
            self._fail(reader, RequestError("failed", "the memory's values are not numbers"))
            return
        if reader.text is not None and (text := reader.text.finish()):
            self._tell(reader, Written((), text))
        self._tell(reader, reader.done())
        self._leave(reader)

    def _fail(self, reader: Reader, error: Exception) -> None:
        if isinstance(error, RequestError):
            event = Failed(error.code, str(error))
        else:  # its message may hold what the user wrote: neither shown nor logged
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %d failed: %s\n%s", reader.number, type(error).__name__, where)
            event = Failed("failed", f"the model could not compute this request ({type(error).__name__})")
        self._tell(reader, event)
        self._leave(reader)

    def _tell(self, reader: Reader, event: Event) -> None:
        self._events.append((reader, event))

    # --- prefixes -----------------------------------------------------------------------------------

    def _use_prefixes(self, reader: Reader) -> None:
        """Start from the last segment boundary of the reader's tokens that was reached before."""
        if reader.chain is None:
            if reader.num_before:  # a document of which the beginning is not known
                return
            reader.chain = first_key(self.settings.server_key, self.fingerprint, reader.request.tenant)
        size, key, keys = reader.segment_len, reader.chain, []
        for start in range(0, len(reader.tokens) - size + 1, size):
            key = next_key(key, reader.tokens[start : start + size])
            keys.append(key)
        for i in reversed(range(len(keys))):
            if (found := self.prefixes.get(keys[i])) is not None:
                reader.skip((i + 1) * size, found.state, found.hidden, keys[i])
                self._tell(reader, reader.progress())
                return


def _meant(readers: Sequence[Reader], rows: Sequence[int]) -> list[Reader]:
    """The readers of some rows of a batch; rows behind the last reader, which only fill it, are as the last."""
    return [readers[min(i, len(readers) - 1)] for i in rows]
