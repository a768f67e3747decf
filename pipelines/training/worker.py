"""What each training worker does: follow its lanes, step, report, checkpoint, and go on where it stopped.

Axes: R rows of a worker.
"""

import contextlib
import errno
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
from torch import distributed as dist

import rmt_core
from pipelines import storage
from pipelines.config import InputError, build
from pipelines.data import lanes as data
from pipelines.data.prefetch import Prefetched
from pipelines.data.tokenise import Tokenizer
from pipelines.stores.faults import shown
from pipelines.training import checkpoints
from pipelines.training import engine as engines
from pipelines.training.backbones import apart, brought, with_directory
from pipelines.training.bell import SILENT, Bell
from pipelines.training.checkpoints import Part, Progress
from pipelines.training.identity import Identity, check_same, identity_of
from pipelines.training.instruments import Instruments
from pipelines.training.probe import Texts, probe_texts
from pipelines.training.reading import make_lanes, open_store
from pipelines.training.records import Journal, Metrics, Sums, finite
from pipelines.training.run_directory import CONFIG, remove_unfinished
from pipelines.training.settings import TrainConfig, learning_rate, model_config, next_stage, num_segments_at
from pipelines.training.steps import Stepper, agree, seed_of
from pipelines.training.tracking import Tracker, start_trackers
from pipelines.training.weights import fresh_model, load_trained

PreparedT = TypeVar("PreparedT")

_PATIENCE = timedelta(hours=24)  # of workers that wait for one that downloads or converts
_FULL_BYTES = 16 * 1024**2  # with less room than this left, a write that failed has failed for it


class Setup(NamedTuple):
    """What a worker knows before its engine starts."""

    config: TrainConfig
    numbers: list[int]  # of its lanes, globally
    lanes: data.Lanes
    description: rmt_core.ModelConfig
    model: rmt_core.RecurrentModel
    tokenizer: Tokenizer
    identity: Identity
    texts: Texts | None  # of probes, of all workers
    trackers: Sequence[Tracker] = ()  # of the worker that writes


class Found(NamedTuple):
    """The checkpoint to go on from."""

    folder: Path
    progress: Progress


def train_worker(settings: dict[str, Any], monitor: Any) -> None:
    """The function that Ray Train runs on each worker. `monitor` is told of progress and says when to stop."""
    config = build(TrainConfig, settings)
    monitor.begin.remote()
    if not config.workers.use_gpu:
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    with contextlib.ExitStack() as stack:
        local = _together(lambda: _bring(config, stack), monitor)
        if local is None:
            return
        at_hand = _shared(local)
        prepared = _together(lambda: _prepare(config, at_hand, stack), monitor)
        if prepared is None:
            return
        run = start_run(*prepared)
    try:
        run.loop(monitor)
    finally:
        run.lanes.close()


def _together(work: Callable[[], PreparedT], monitor: Any) -> PreparedT | None:
    """What `work` gives; None, and word to the monitor, where any worker finds fault with what the user gave.

    A fault ends the run: Ray would start workers that fail again and again.
    """
    patient = _patient()
    prepared: PreparedT | None = None
    fault: str | None = None
    try:
        prepared = work()
    except (InputError, storage.RefusedError, storage.DamagedError) as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault, group=patient)
    found = next((fault for fault in faults if fault is not None), None)
    if found is None:
        return prepared
    if dist.get_rank() == 0:
        ray.get(monitor.refuse.remote(found))
    return None


def _patient() -> Any:
    """All workers as a group that waits long, to be made before what may take so; every worker calls it.

    A worker that is lost meanwhile is noticed at once, as its connections break. The group of the steps gives up after
    minutes, so that devices that hang are noticed too.
    """
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _bring(config: TrainConfig, stack: contextlib.ExitStack) -> TrainConfig:
    """The configuration with its directory on this machine, which the first worker there brings. InputError."""
    return stack.enter_context(brought(config)) if os.environ["LOCAL_RANK"] == "0" else config


def _shared(local: TrainConfig) -> TrainConfig:
    """With the place that the first worker of this machine has the directory at; every worker calls it."""
    node = os.environ["NODE_RANK"]
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (node, os.environ["LOCAL_RANK"], local.model.directory))
    place = next(place for there, rank, place in places if (there, rank) == (node, "0"))
    return local if place is None else with_directory(local, place)


def _prepare(config: TrainConfig, at_hand: TrainConfig, stack: contextlib.ExitStack) -> tuple[Setup, Found | None]:
    """What a worker needs to start, `at_hand` with its weights; the checkpoint is open as the stack is. InputError."""
    _check_output(config.output)
    setup = set_up(at_hand)._replace(config=config)
    if dist.get_rank() == 0:
        remove_unfinished(config.output, _newest())  # of a group of workers before this one, which has ended
        setup = setup._replace(trackers=start_trackers(config))
    folder = _checkpoint(config, stack)
    if folder is None:
        return setup, None
    progress = checkpoints.read_progress(folder)
    check_same(progress.identity, setup.identity, "the checkpoint is of a run")
    return setup, Found(folder, progress)


def _newest() -> str | None:
    """The name of the run's last checkpoint, as Ray Train's controller knows it."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else os.path.basename(checkpoint.path)


def _check_output(output: str) -> None:
    """InputError where this node, which may have come after the driver had asked all nodes, does not see the output."""
    written = storage.join(output, CONFIG)
    if not storage.exists(written):
        node = ray.util.get_node_ip_address()
        raise InputError(
            f"node {node} does not see {written}, which the driver wrote; give paths on storage that all machines "
            "share, or s3://"
        )


def set_up(config: TrainConfig) -> Setup:
    """Opens the data, plans this worker's lanes and builds the model. InputError."""
    store = open_store(config)
    tokenizer = store.load_tokenizer()
    description = model_config(config, tokenizer, store.segment_len)
    model = fresh_model(description, config.model, config.seed)
    description = model.config = apart(description)
    lanes = make_lanes(config, store, tokenizer)
    numbers = list(range(len(lanes)))[dist.get_rank() :: dist.get_world_size()]
    mine = data.Lanes([lanes[number] for number in numbers], store.segment_len)
    identity = identity_of(config, store, description)
    texts = probe_texts(config, store, tokenizer)
    return Setup(config, numbers, mine, description, model, tokenizer, identity, texts)


def start_run(setup: Setup, found: Found | None) -> "Run":
    """The run at its start, or at a checkpoint; every worker calls it."""
    config, world_size = setup.config, dist.get_world_size()
    universal = found is not None and checkpoints.needs_conversion(found.progress, world_size)
    given = engines.deepspeed_config(config, world_size, universal=universal)
    engine = engines.start_engine(setup.model, config, given)
    run = Run(setup, engine)
    if found is not None:
        run.restore(*found)
    return run


def _checkpoint(config: TrainConfig, stack: contextlib.ExitStack) -> Path | None:
    """The run's last checkpoint, or the one that `resume` names, if there is one; DamagedError where it was altered."""
    checkpoint, named = ray.train.get_checkpoint(), config.resume
    if checkpoint is not None:
        folder, where = Path(stack.enter_context(checkpoint.as_directory())), checkpoint.path
    elif named not in ("auto", "never"):
        folder, where = stack.enter_context(storage.local_directory(named)), named
    else:
        return None
    if os.environ["LOCAL_RANK"] == "0":  # once a machine
        storage.check_sums(folder, where)
        checkpoints.check_parts(folder, where)
    return folder


class Run:
    """One worker's part of a run in motion."""

    def __init__(self, setup: Setup, engine: Any) -> None:
        self.setup, self.config, self.engine = setup, setup.config, engine
        self.lanes = Prefetched(setup.lanes, self._expected)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.stepper = Stepper(engine, setup.config)
        self.sums = Sums(engine.device)
        self.instruments = Instruments(setup.config, engine, setup.description, setup.numbers, setup.texts)
        with self._gathered():
            state = rmt_core.state.detach(engine.module.model.init_state(len(setup.numbers)))
            self.state = rmt_core.state.tree_map(torch.clone, state)
        self.step = self.stage = self.num_segments = 0  # the last: of the latest window
        self.checkpoint_s: float | None = None  # what a checkpoint took since the last line of metrics
        self._seed()

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        import deepspeed

        parameters = list(self.engine.module.model.memory.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.engine.zero_optimization_partition_weights()):
            yield

    def _seed(self) -> None:
        """Dropout differs between workers, and between stretches of a run with different numbers of them."""
        torch.manual_seed(seed_of(self.config.seed, self.step, self.world_size, self.rank))

    def loop(self, monitor: Any) -> None:
        """Steps until the end, or until the monitor says stop; a checkpoint stands for the last step in either case."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.instruments.close)
            for tracker in self.setup.trackers:
                stack.callback(tracker.close)
            journal = Journal(self.config.output, self.step) if self.rank == 0 else None
            if journal is not None:
                stack.callback(journal.close)
            self._loop(monitor, journal)

    def _loop(self, monitor: Any, journal: Journal | None) -> None:
        config, every = self.config, self.config.report
        if self.rank == 0:
            workers = f"{self.world_size} worker{'s' * (self.world_size > 1)}"
            monitor.note.remote(f"training with {workers} from step {self.step}")
        bell = Bell(lambda: bool(ray.get(monitor.is_stopping.remote())))
        began, saved = time.monotonic(), self.step if self.step else -1
        metrics: Metrics = {}
        has_diverged = False
        while self.step < config.num_steps:
            stop, look = self.advance(bell.wishes() if self.rank == 0 else SILENT)
            answer_loss = None
            if self.step % every.log_every == 0 or self.step == config.num_steps:
                now = time.monotonic()
                figures = self._metrics(now - began)
                metrics, began = finite(figures), now
                if self.rank == 0 and not has_diverged and not _is_finite(figures.get("loss")):
                    has_diverged = True
                    monitor.note.remote(
                        f"the loss is not a finite number at step {self.step}: the run has diverged and goes on to its "
                        "end with null in metrics.jsonl; try a lower optimizer.learning_rate"
                    )
                if journal is not None:
                    journal.write(metrics)
                    for tracker in self.setup.trackers:
                        tracker.write(metrics)
                    monitor.tell.remote(metrics)
                answer_loss = metrics["answer_loss"]
            self.stage = next_stage(config.curriculum, self.stage, self.step, answer_loss)
            due = stop or self.step % every.checkpoint_every == 0 or self.step == config.num_steps
            is_announced = not due and look and bell.is_new(ray.train.get_preemption_info())
            if (due or is_announced) and saved != self.step:
                saving = time.monotonic()
                if journal is not None:
                    journal.flush()
                self.save(metrics)
                saved, began = self.step, began + time.monotonic() - saving
                if is_announced and self.rank == 0:
                    monitor.note.remote(f"a node is about to be taken away: there is a checkpoint of step {self.step}")
            if stop:
                return

    def advance(self, wishes: Sequence[bool] = ()) -> list[bool]:
        """One optimiser step; the wishes that rank 0 had."""
        windows = self._windows()
        agreed = agree(windows, wishes, self.engine.device)
        rate = learning_rate(self.config.optimizer, self.step, self.config.num_steps)
        self.instruments.before_step(self.step)
        with_aux = self.stage >= self.config.curriculum.aux_stage
        result = self.stepper.step(windows, self.state, agreed.weight, step=self.step, rate=rate, with_aux=with_aux)
        self.instruments.after_step(self.step, windows, self.state, result.state)
        self.state, self.num_segments = result.state, windows[-1].tokens.shape[1]
        self.step += 1
        for window, nats in zip(windows, result.nats, strict=True):
            self.sums.add(window, nats)
        return agreed.wishes

    def _windows(self) -> list[data.Window]:
        """What the next optimiser step reads."""
        config, count = self.config, self.config.optimizer.accumulation_steps
        found = []
        for number in range(self.step * count, (self.step + 1) * count):
            num_segments = num_segments_at(config.curriculum, self.stage, number, config.seed)
            found.append(self.lanes.window(number, num_segments))
        return found

    def _expected(self, number: int) -> int:
        """Segments of window `number`, as far as the stage of now tells."""
        curriculum = self.config.curriculum
        stage = next_stage(curriculum, self.stage, number // self.config.optimizer.accumulation_steps, None)
        return num_segments_at(curriculum, stage, number, self.config.seed)

    def _metrics(self, elapsed_s: float) -> Metrics:
        """What the next line of metrics says; every worker calls it."""
        sums = self.sums.metrics(elapsed_s)
        saved = {} if self.checkpoint_s is None else {"checkpoint_s": self.checkpoint_s}
        self.checkpoint_s = None
        return {
            "step": self.step,
            "stage": self.stage,
            "num_segments": self.num_segments,
            "learning_rate": learning_rate(self.config.optimizer, self.step - 1, self.config.num_steps),
            **sums,
            "gradient_norm": _number(self.engine.get_global_grad_norm()),
            **self.instruments.figures(sums["tokens_per_s"]),
            **saved,
            "num_workers": self.world_size,
        }

    def save(self, metrics: Metrics) -> None:
        """A checkpoint of this step, handed to Ray, which stores it and counts it once all of it is there."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            with _writing(name):
                self.write(Path(name))
                storage.seal(Path(name), part=checkpoints.part_name(self.rank))
            reported = {"step": self.step} | ({"loss": metrics["loss"]} if metrics.get("loss") is not None else {})
            with storage.disk_faults(self.config.output):
                ray.train.report(reported, checkpoint=ray.train.Checkpoint.from_directory(name))
        self.checkpoint_s = time.monotonic() - began

    def write(self, folder: Path) -> None:
        """This worker's part of a checkpoint of this step; every worker calls it, and all parts make one directory."""
        setup = self.setup
        self.engine.save_checkpoint(
            str(folder / "deepspeed"), tag=checkpoints.ENGINE_TAG, exclude_frozen_parameters=True
        )
        engines.save_portable(folder / "model", self.engine, setup.description, setup.tokenizer)
        if self.rank == 0:
            checkpoints.write_progress(folder, Progress(self.step, self.stage, self.world_size, setup.identity))
        part = Part(self.state, self.lanes.cursors(), self.sums.state(), checkpoints.random_states(self.engine.device))
        checkpoints.write_part(folder, self.rank, setup.numbers, part, setup.identity)
        dist.barrier()

    def restore(self, folder: Path, progress: Progress) -> None:
        """Go on from a checkpoint, whoever wrote it; every worker calls it."""
        if checkpoints.needs_conversion(progress, self.world_size):
            is_first = os.environ["LOCAL_RANK"] == "0"  # on this machine, as Ray Train says
            patient = _patient()
            converted = checkpoints.convert(folder) if is_first else checkpoints.universal_directory(folder)
            dist.barrier(group=patient)
            engines.load_universal(self.engine, converted.parent, converted.name, load_trained)
            dist.barrier(group=patient)
            if is_first:
                shutil.rmtree(converted, ignore_errors=True)
        else:
            directory = str(folder / "deepspeed")
            self.engine.load_checkpoint(directory, tag=checkpoints.ENGINE_TAG, custom_load_fn=load_trained)
        part = checkpoints.read_part(folder, self.rank, self.world_size, self.setup.numbers, progress)
        self.state = rmt_core.state.to(part.memory, self.engine.device)
        self.step, self.stage = progress.step, progress.stage
        self.sums.restore(part.sums)
        if part.random is None:
            self._seed()
        else:
            checkpoints.set_random_states(part.random, self.engine.device)
        self.lanes.move([None if cursor is None else data.Cursor(*cursor) for cursor in part.cursors])


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Tells in one line that a local disk is full or refuses what is written there, whatever a library makes of it."""
    with storage.disk_faults(folder):
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # torch and safetensors have exceptions of their own for a write that failed
            if shutil.disk_usage(folder).free >= _FULL_BYTES:
                raise
            raise OSError(errno.ENOSPC, shown(error)) from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _is_finite(loss: float | None) -> bool:
    """None, where nothing was asked, is no sign of a run that diverged."""
    return loss is None or math.isfinite(loss)
