"""Train a model with memory on a segment store, or on the embedded books, with Ray Train and DeepSpeed.

    python pipelines/train.py                                   # the recipe "tiny" on the embedded books
    python pipelines/train.py tiny --data store --output runs/mine model.num_layers 4 workers.num_workers 2
    python pipelines/train.py mine.yaml --seeds 3               # a recipe of your own, with three seeds

Rows of a batch follow documents segment by segment and carry their memory along; some read texts of tasks that ask for
a fact told earlier. The run's directory gets metrics.jsonl, tensorboard/, checkpoint_*/ and, at the end, model/: the
portable directory that the other jobs load. The same command again goes on where the run stopped. A worker or node that
fails costs the steps since the last checkpoint: the run goes on from there by itself.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from tqdm import tqdm

import rmt_core
from pipelines import storage
from pipelines.claim import claimed
from pipelines.cluster import beside_driver, connect, has_cluster, pool
from pipelines.config import InputError, build, given
from pipelines.data.mixture import Store
from pipelines.data.tokenise import Tokenizer
from pipelines.extras import require_extra
from pipelines.job import run_job
from pipelines.recipes import RECIPES, find_recipe
from pipelines.training.backbones import apart, described, with_directory
from pipelines.training.costs import model_size, outline
from pipelines.training.identity import Identity, identity_of
from pipelines.training.monitor import Monitor
from pipelines.training.plan import make_plan, tell
from pipelines.training.probe import probe_texts
from pipelines.training.reading import make_lanes, open_store
from pipelines.training.room import check_room, room_for
from pipelines.training.run_directory import (
    CONFIG,
    FINISHED,
    earlier,
    has_backbone,
    last_progress,
    mend_registry,
    publish,
    registered_checkpoints,
    remove_unfinished,
)
from pipelines.training.settings import ModelSettings, TrainConfig, model_config
from pipelines.training.tracking import check_tracking
from pipelines.training.visibility import check_storage
from pipelines.training.weights import check_start
from pipelines.training.worker import train_worker

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.train")

_LINE_S = 10.0  # between progress lines where there is no terminal
_WAITING_S, _WAITS_S = 60.0, 600.0  # until it is told that no worker has room yet, and between further times


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and (words[0].isidentifier() or words[0].endswith((".yaml", ".yml")))
    try:
        name = words.pop(0) if named else "tiny"
        recipe = find_recipe(name, trained=given("model.start", TrainConfig, words) is not None)
        build(TrainConfig, recipe)
    except InputError as error:
        print(f"train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    about = (
        f"{__doc__.splitlines()[0]} A recipe may come first, before all settings: {', '.join(RECIPES)}, or a YAML "
        "file of your own; without one it is tiny."
    )
    return run_job(train, TrainConfig, words, prog="train", description=about, base=recipe, plan=plan)


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs, or goes on with, a training run; what is printed. InputError, KeyboardInterrupt."""
    require_extra("train", job="train")
    config = _placed(config)
    if config.seeds > 1:
        return _train_seeds(config)
    identity = check(config)
    finished = earlier(config, identity)
    if finished is not None:
        if config.report.backbone and not has_backbone(config.output):
            publish(config)
        log.info("%s is finished with these settings: nothing to do", config.output)
        return finished
    with _connected(config):
        check_storage(config.output, _inputs(config), _resources(config))
        with claimed(config.output, "train"):
            return _run(config, identity)


@contextlib.contextmanager
def _connected(config: TrainConfig) -> Iterator[None]:
    """A Ray while the block runs; InputError where it is this machine's own and can never hold the workers."""
    joins = has_cluster()
    with connect():
        if not joins:
            check_room(config.workers, ray.cluster_resources())
        yield


def _run(config: TrainConfig, identity: Identity) -> dict[str, Any]:
    """The run of a directory that nobody else works on."""
    mend_registry(config.output)
    remove_unfinished(config.output)
    storage.write_json(storage.join(config.output, CONFIG), config.model_dump(mode="json"))
    metrics = _fit(config)
    remove_unfinished(config.output)  # of workers that failed on the way
    model = publish(config)
    log.info("trained %d steps; the model is in %s", config.num_steps, model)
    result = {"output": config.output, "checkpoint": model, "num_steps": config.num_steps, **metrics}
    storage.write_json(storage.join(config.output, FINISHED), {"identity": identity, "result": result})
    return result


def _train_seeds(config: TrainConfig) -> dict[str, Any]:
    """A run a seed, one after another; the result of the first, with those of all as `runs`."""
    runs = [
        config.model_copy(update={"seed": seed, "seeds": 1, "output": storage.join(config.output, f"seed-{seed}")})
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    check(runs[0])
    with _connected(config):
        results = [train(run) | {"seed": run.seed} for run in runs]
    first = {name: results[0][name] for name in ("checkpoint", "num_steps", "loss")}
    return {"output": config.output, **first, "runs": results}


def plan(config: TrainConfig) -> dict[str, Any]:
    """What `--dry-run` tells of a run, of several seeds one, after storage was found for all machines. InputError."""
    require_extra("train", job="train")
    config = _placed(config)
    check_tracking(config.report)
    store = open_store(config)
    tokenizer = store.load_tokenizer()
    lanes = make_lanes(config, store, tokenizer)
    probe_texts(config, store, tokenizer)
    _, model = _outlined(config, store, tokenizer)
    with connect() if has_cluster() else contextlib.nullcontext():
        num_nodes = check_storage(config.output, _inputs(config), _resources(config))
    found = make_plan(config, store, lanes, model)
    tell(found)
    return found | {"num_nodes_with_storage": num_nodes}


def _inputs(config: TrainConfig) -> list[str]:
    """What every worker has to read."""
    resumed = None if config.resume in ("auto", "never") else config.resume
    named = (*(config.data or []), config.model.directory, config.report.probe_data, resumed)
    return [uri for uri in named if uri is not None]


def _placed(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths: workers run in other folders."""
    found: dict[str, Any] = {"output": storage.absolute(config.output)}
    if config.data is not None:
        found["data"] = [storage.absolute(uri) for uri in config.data]
    if config.resume not in ("auto", "never"):
        found["resume"] = storage.absolute(config.resume)
    if config.model.directory is not None:
        found["model"] = with_directory(config, storage.absolute(config.model.directory)).model
    report: dict[str, Any] = {}
    if config.report.probe_data is not None:
        report["probe_data"] = storage.absolute(config.report.probe_data)
    if config.report.mlflow is not None and "://" not in config.report.mlflow:
        report["mlflow"] = storage.absolute(config.report.mlflow)
    return config.model_copy(update=found | {"report": config.report.model_copy(update=report)})


def check(config: TrainConfig) -> Identity:
    """Refuses, before anything starts, what cannot work; what the run is."""
    check_tracking(config.report)
    store = open_store(config)
    tokenizer = store.load_tokenizer()
    lanes = make_lanes(config, store, tokenizer)
    probe_texts(config, store, tokenizer)
    description, model = _outlined(config, store, tokenizer)
    size = model_size(model)
    log.info(
        "model: %s parameters, %s trained, memory %s; data: %d documents, %d tokens in segments of %d",
        f"{size.num_parameters:,}",
        f"{size.num_trained:,}",
        " + ".join(memory["kind"] for memory in description.memory),
        len(store.manifest),
        sum(document.num_tokens for document in store.manifest),
        store.segment_len,
    )
    for source in {id(lane.source): lane.source for lane in lanes}.values():
        log.info("%s", source.describe())
    return identity_of(config, store, description)


def _outlined(
    config: TrainConfig, store: Store, tokenizer: Tokenizer
) -> tuple[rmt_core.ModelConfig, rmt_core.RecurrentModel]:
    """The model's configuration, and the model without weights: none are read. InputError where parts do not fit."""
    try:
        with described(config) as at_hand:
            description = apart(model_config(at_hand, tokenizer, store.segment_len))
            if at_hand.model.start is not None:
                trained = outline(rmt_core.load_config(at_hand.model.start), ModelSettings())
                check_start(str(config.model.start), trained, outline(description, ModelSettings()))
        model = outline(description, config.model)
    except ValueError as error:
        raise InputError(str(error)) from error
    if model.backbone.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"the backbone knows {model.backbone.vocab_size} tokens, the tokenizer of the data has "
            f"{tokenizer.vocab_size}; prepare the data with the backbone's tokenizer"
        )
    return description, model


def _fit(config: TrainConfig) -> dict[str, Any]:
    """Ray Train over the workers; the last metrics. Ctrl-C and SIGTERM ask the workers to checkpoint and stop."""
    monitor = ray.remote(num_cpus=0)(Monitor).options(scheduling_strategy=beside_driver()).remote()
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            _fit_until_stuck(config, monitor)
        except BaseException as error:  # carried over to the main thread
            failure.append(_cause(error, config.output))

    thread = threading.Thread(target=fit, daemon=True)  # not the main thread: that one keeps the signals
    thread.start()
    interrupted = _watch(thread, monitor, config)
    if failure:
        raise failure[0]
    refused = ray.get(monitor.refused.remote())
    if refused is not None:
        raise InputError(refused)
    step = last_progress(config.output).step
    if interrupted and step < config.num_steps:
        log.info("stopped at step %d; the same command goes on from there", step)
        raise KeyboardInterrupt
    lines = storage.read_bytes(storage.join(config.output, "metrics.jsonl")).splitlines()
    metrics = json.loads(lines[-1])
    return {name: metrics.get(name) for name in ("loss", "tokens_per_s", "peak_memory_bytes")}


def _cause(error: BaseException, output: str) -> BaseException:
    """Of a failed run a worker's own complaint about what the user gave or a store that failed, or Ray's of a disk."""
    for failure in getattr(error, "worker_failures", {}).values():
        inner = getattr(failure, "cause", failure)
        if isinstance(inner, InputError | storage.StorageError):
            return inner
    failure = getattr(error, "controller_failure", None)  # Ray's controller keeps the list of checkpoints
    if isinstance(failure, OSError):
        try:
            with storage.disk_faults(output):
                raise failure
        except storage.StorageError as fault:
            return fault
        except OSError:
            return error
    return error


def _fit_until_stuck(config: TrainConfig, monitor: Any) -> None:
    """Runs Ray Train; as long as it comes further, again: `max_failures` are allowed between two checkpoints."""
    while True:
        before = registered_checkpoints(config.output)
        try:
            _trainer(config, monitor).fit()
        except TrainingFailedError as error:
            if registered_checkpoints(config.output)[-1:] == before[-1:]:
                raise
            mend_registry(config.output)
            reason = str(error).strip().splitlines()[-1]
            log.warning("workers failed (%s); going on from step %d", reason, last_progress(config.output).step)
        else:
            return


def _trainer(config: TrainConfig, monitor: Any) -> TorchTrainer:
    workers = config.workers
    files, path = storage.filesystem(config.output)
    least, most = workers.num_workers
    return TorchTrainer(
        train_worker_entry,
        train_loop_config={"settings": config.model_dump(mode="json"), "monitor": monitor},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if least == most else (least, most),
            elastic_resize_monitor_interval_s=workers.resize_every_s,
            use_gpu=workers.use_gpu,
            resources_per_worker=_resources(config),
            label_selector=pool("train") or None,
        ),
        run_config=ray.train.RunConfig(
            name=os.path.basename(path),
            storage_path=os.path.dirname(path),
            storage_filesystem=files if storage.is_s3(config.output) else None,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.report.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
    )


def _resources(config: TrainConfig) -> dict[str, float]:
    return {"CPU": config.workers.cpus} | ({"GPU": 1.0} if config.workers.use_gpu else {})


def train_worker_entry(arguments: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    train_worker(arguments["settings"], arguments["monitor"])


def _watch(thread: threading.Thread, monitor: Any, config: TrainConfig) -> bool:
    """Shows progress until the run ends; whether it was asked to stop by Ctrl-C or SIGTERM."""
    asked = threading.Event()

    def on_interrupt(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        log.info("stopping soon, with a checkpoint; Ctrl-C again stops at once")
        monitor.stop.remote()

    signals = (signal.SIGINT, signal.SIGTERM)  # SIGTERM: `ray job stop`, and most that end processes
    before = [signal.signal(each, on_interrupt) for each in signals]
    bar = tqdm(total=config.num_steps, unit="step", disable=not sys.stderr.isatty(), file=sys.stderr)
    try:
        shown, num_notes = time.monotonic(), 0
        tell_s = shown + _WAITING_S
        while thread.is_alive():
            thread.join(timeout=0.5)
            metrics, notes, has_begun = ray.get(
                [monitor.latest.remote(), monitor.noted.remote(), monitor.has_begun.remote()]
            )
            if not has_begun and thread.is_alive():
                if asked.is_set():
                    log.info("stopped before any worker had started; the same command starts again")
                    raise KeyboardInterrupt
                if time.monotonic() > tell_s:
                    tell_s = time.monotonic() + _WAITS_S
                    log.info(_waiting(config))
            for line in notes[num_notes:]:
                log.info(line)
            num_notes = len(notes)
            if not metrics:
                continue
            bar.n = metrics["step"]
            bar.set_postfix(loss=_nats(metrics["loss"]), tokens_per_s=f"{metrics['tokens_per_s']:.0f}")
            if bar.disable and time.monotonic() - shown > _LINE_S:
                shown = time.monotonic()
                log.info(_line(metrics, config.num_steps))
    finally:
        bar.close()
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
    return asked.is_set()


def _waiting(config: TrainConfig) -> str:
    """What the run waits for before its first worker has started."""
    needs, least = _resources(config), config.workers.num_workers[0]
    room = room_for(needs, ray.nodes(), ray.available_resources(), pool("train"))
    each = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    return f"no worker has started yet: waiting for {least} of {each} each; the cluster has room for {room} now"


def _nats(loss: float | None) -> str:
    """None: nothing was asked since the last line."""
    return "-" if loss is None else f"{loss:.3f}"


def _line(metrics: dict[str, Any], num_steps: int) -> str:
    answer = metrics.get("answer_loss")
    planted = "" if answer is None else f", answers {answer:.3f}"
    return (
        f"step {metrics['step']}/{num_steps}: loss {_nats(metrics['loss'])} nats{planted}, "
        f"{metrics['num_segments']} segments, {metrics['tokens_per_s']:.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
