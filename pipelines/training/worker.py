"""What each training worker does: follow its lanes, step, report, checkpoint, and go on where it stopped.

Axes: R rows of a worker.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
from torch import distributed as dist

import rmt_core
from pipelines import storage
from pipelines.config import InputError, build, fingerprint
from pipelines.data import lanes as data
from pipelines.data.books import BookStore
from pipelines.data.store import SegmentStore
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks import recall
from pipelines.training import engine as engines
from pipelines.training.records import Journal, Sums, peak_memory_bytes, state_norm
from pipelines.training.settings import (
    HOUSEKEEPING,
    TrainConfig,
    learning_rate,
    model_config,
    next_stage,
    num_segments_at,
)
from rmt_core.state import State

ENGINE_TAG = "engine"


def open_store(config: TrainConfig) -> SegmentStore | BookStore:
    """The segments to train on."""
    return BookStore(config.segment_len) if config.data is None else SegmentStore(config.data)


def run_fingerprint(config: TrainConfig, store: SegmentStore | BookStore) -> str:
    """Equal for runs that would learn the same: what a checkpoint may be continued under."""
    return fingerprint([config.model_dump(mode="json", exclude=HOUSEKEEPING | {"workers"}), store.fingerprint])


def make_lanes(config: TrainConfig, store: SegmentStore | BookStore, tokenizer: Tokenizer) -> list[Any]:
    """All lanes of the run: first those of planted facts, then those that follow documents."""
    num_recall = config.num_recall_lanes
    settings = config.dataset
    prose = settings.recall_background == "prose"
    facts = data.RecallSource(
        tokenizer,
        data.store_prose(store) if prose else recall.noise(tokenizer),
        seed=config.seed,
        text_weight=settings.recall_text_weight,
        answer_weight=settings.recall_answer_weight,
    )
    if num_recall:  # what cannot be drawn is refused now, and what cannot be planned below
        shortest = 1 if config.curriculum.vary else min(config.curriculum.num_segments)
        facts.draw(0, 0, shortest, store.segment_len)
    lanes: list[Any] = [data.RecallLane(facts, number) for number in range(num_recall)]
    num_documents = config.batch_size - num_recall
    if num_documents:
        source = data.DocumentSource(
            store, num_documents, seed=config.seed, eos_id=tokenizer.eos_id, piece_segments=settings.piece_segments
        )
        source.lane(0, 0)
        lanes += [data.DocumentLane(source, number, data.Cursor()) for number in range(num_documents)]
    return lanes


class Progress(NamedTuple):
    """Where a run is: what a checkpoint gives back."""

    step: int
    state: State


def train_worker(settings: dict[str, Any], monitor: Any) -> None:
    """The function that Ray Train runs on each worker. `monitor` is told of progress and says when to stop."""
    config = build(TrainConfig, settings)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not config.workers.use_gpu:
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    store = open_store(config)
    tokenizer = store.load_tokenizer()
    torch.manual_seed(config.seed)
    description = model_config(config, tokenizer, store.segment_len)
    model = rmt_core.build(description).train()
    lanes = data.Lanes(make_lanes(config, store, tokenizer)[rank::world_size], store.segment_len)
    engine = engines.start_engine(model, config, engines.deepspeed_config(config, world_size))
    torch.manual_seed(config.seed * 1000 + rank)  # dropout differs between workers
    run = Run(config, engine, lanes, description, tokenizer, run_fingerprint(config, store))
    run.restore()
    run.loop(monitor)


class Run:
    """One worker's part of a run in motion."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Any,
        lanes: data.Lanes,
        description: rmt_core.ModelConfig,
        tokenizer: Tokenizer,
        identity: str,
    ) -> None:
        self.config, self.engine, self.lanes = config, engine, lanes
        self.description, self.tokenizer, self.identity = description, tokenizer, identity
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        with self._gathered():
            state = rmt_core.state.detach(engine.module.model.init_state(len(lanes.lanes)))
            self.state = rmt_core.state.tree_map(torch.clone, state)
        self.step = self.stage = 0

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        import deepspeed

        parameters = list(self.engine.module.model.memory.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.engine.zero_optimization_partition_weights()):
            yield

    def loop(self, monitor: Any) -> None:
        """Steps until the end, or until the monitor says stop; a checkpoint stands for the last step in either case."""
        config, every = self.config, self.config.report
        journal = Journal(config.output, self.step) if self.rank == 0 else None
        sums, began = Sums(self.engine.device), time.monotonic()
        saved = self.step if self.step else -1
        metrics: dict[str, Any] = {}
        while self.step < config.num_steps:
            rate = learning_rate(config.optimizer, self.step, config.num_steps)
            num_segments = num_segments_at(config.curriculum, self.stage, self.step, config.seed)
            window = self.lanes.window(self.step, num_segments)
            result = engines.optimise(self.engine, window, self.state, rate)
            self.state = result.state
            self.step += 1
            sums.add(window, result.nats)
            stop = False
            if self.step % every.log_every == 0 or self.step == config.num_steps:
                now = time.monotonic()
                metrics = {"step": self.step, "stage": self.stage, "num_segments": num_segments, "learning_rate": rate}
                metrics |= sums.metrics(now - began) | self._measured()
                began = now
                stop = self._tell(journal, monitor, metrics)
                answer_loss = metrics["answer_loss"]
            else:
                answer_loss = None
            self.stage = next_stage(config.curriculum, self.stage, self.step, answer_loss)
            due = stop or self.step % every.checkpoint_every == 0 or self.step == config.num_steps
            if due and saved != self.step:
                self.save(metrics)
                saved, began = self.step, time.monotonic()
            if stop:
                return

    def _measured(self) -> dict[str, Any]:
        return {
            "gradient_norm": _number(self.engine.get_global_grad_norm()),
            "state_norm": state_norm(self.state),
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
        }

    def _tell(self, journal: Journal | None, monitor: Any, metrics: dict[str, Any]) -> bool:
        """Report on rank 0; whether to stop, the same on all workers."""
        flag = torch.zeros((), device=self.engine.device)
        if journal is not None:
            journal.write(metrics)
            flag += float(ray.get(monitor.tell.remote(metrics)))
        dist.all_reduce(flag)
        return bool(flag.item())

    def save(self, metrics: dict[str, Any]) -> None:
        """A checkpoint of this step; every worker writes its part."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            client = {"step": self.step}
            self.engine.save_checkpoint(str(folder / "deepspeed"), tag=ENGINE_TAG, client_state=client)
            engines.save_portable(folder / "model", self.engine, self.description, self.tokenizer)
            cursors = {str(lane): cursor for lane, cursor in self.lanes.cursors().items()}
            part = {"step": self.step, "world_size": self.world_size, "identity": self.identity, "cursors": cursors}
            part["stage"] = self.stage
            (folder / f"worker_{self.rank:05d}.json").write_text(json.dumps(part))
            carried = {"memory": self.state, "random": random_states(self.engine.device)}
            (folder / f"worker_{self.rank:05d}.safetensors").write_bytes(
                rmt_core.state.to_bytes(carried, self.identity)
            )
            dist.barrier()
            reported = {name: metrics[name] for name in ("loss", "step") if metrics.get(name) is not None}
            ray.train.report(reported, checkpoint=ray.train.Checkpoint.from_directory(name))

    def restore(self) -> None:
        """Go on from the run's last checkpoint, or from the one that `resume` names, if there is one."""
        checkpoint, named = ray.train.get_checkpoint(), self.config.resume
        with contextlib.ExitStack() as stack:
            if checkpoint is not None:
                folder = Path(stack.enter_context(checkpoint.as_directory()))
            elif named not in ("auto", "never"):
                folder = stack.enter_context(storage.local_directory(named))
            else:
                return
            part = json.loads((folder / f"worker_{self.rank:05d}.json").read_text())
            check_continues(part, self.identity, self.world_size)
            self.engine.load_checkpoint(str(folder / "deepspeed"), tag=ENGINE_TAG)
            blob = (folder / f"worker_{self.rank:05d}.safetensors").read_bytes()
        carried = rmt_core.state.to(rmt_core.state.from_bytes(blob, self.identity), self.engine.device)
        self.state, self.step, self.stage = carried["memory"], part["step"], part["stage"]
        set_random_states(carried["random"], self.engine.device)
        for lane in self.lanes.lanes:
            if isinstance(lane, data.DocumentLane):
                lane.cursor = data.Cursor(*part["cursors"][str(lane.number)])


def check_continues(part: dict[str, Any], identity: str, world_size: int) -> None:
    """InputError where a checkpoint is of another run, or of another number of workers."""
    if part["identity"] != identity:
        raise InputError(
            "the checkpoint is of a run with other settings or other data; give the same ones, or another output"
        )
    if part["world_size"] != world_size:
        raise InputError(
            f"the checkpoint is of {part['world_size']} workers, this run has {world_size}; "
            f"set workers.num_workers {part['world_size']}"
        )


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators that a training step may draw from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
