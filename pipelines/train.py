"""Train a model with memory on a segment store, or on the embedded books, with Ray Train and DeepSpeed.

    python pipelines/train.py                                   # the recipe "tiny" on the embedded books
    python pipelines/train.py tiny --data store --output runs/mine model.num_layers 4 workers.num_workers 2

Rows of a batch follow documents segment by segment and carry their memory along; some read texts with a planted fact
instead. The run's directory gets metrics.jsonl, tensorboard/, checkpoint_*/ and, at the end, model/: the portable
directory that the other jobs load. The same command again goes on where the run stopped.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import difflib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from tqdm import tqdm

import rmt_core
from pipelines import storage
from pipelines.cluster import connect
from pipelines.config import InputError, run_job
from pipelines.extras import require_extra
from pipelines.recipes import RECIPES
from pipelines.training.settings import TrainConfig, model_config
from pipelines.training.worker import check_continues, make_lanes, open_store, run_fingerprint, train_worker

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.train")

_LINE_S = 10.0  # between progress lines where there is no terminal
FINISHED = "run.json"  # written last: a run without it has not reached its end


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0].isidentifier() else "tiny"
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"recipes are {', '.join(RECIPES)}"
        print(f"train: error: unknown recipe {name!r}; {hint}", file=sys.stderr)
        return 2
    return run_job(train, TrainConfig, words, prog="train", description=__doc__.splitlines()[0], base=RECIPES[name])


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs, or goes on with, a training run; what is printed. InputError, KeyboardInterrupt."""
    require_extra("train", job="train")
    config = _placed(config)
    identity = check(config)
    finished = _earlier(config, identity)
    if finished is not None:
        log.info("%s is finished with these settings: nothing to do", config.output)
        return finished
    storage.write_json(storage.join(config.output, "config.json"), config.model_dump(mode="json"))
    with connect():
        metrics = _fit(config)
    model = _publish(config)
    log.info("trained %d steps; the model is in %s", config.num_steps, model)
    result = {"output": config.output, "checkpoint": model, "num_steps": config.num_steps, **metrics}
    storage.write_json(storage.join(config.output, FINISHED), {"identity": identity, "result": result})
    return result


def _placed(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths: workers run in other folders."""
    found: dict[str, Any] = {"output": storage.absolute(config.output)}
    if config.data is not None:
        found["data"] = storage.absolute(config.data)
    if config.resume not in ("auto", "never"):
        found["resume"] = storage.absolute(config.resume)
    if config.model.backbone is not None:
        backbone = storage.absolute(config.model.backbone)
        found["model"] = config.model.model_copy(update={"backbone": backbone})
    return config.model_copy(update=found)


def check(config: TrainConfig) -> str:
    """Refuses, before anything starts, what cannot work; the run's fingerprint."""
    store = open_store(config)
    tokenizer = store.load_tokenizer()
    make_lanes(config, store, tokenizer)
    try:
        description = model_config(config, tokenizer, store.segment_len)
        model = rmt_core.build(description)
    except ValueError as error:
        raise InputError(str(error)) from error
    if model.backbone.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"the backbone knows {model.backbone.vocab_size} tokens, the tokenizer of the data has "
            f"{tokenizer.vocab_size}; prepare the data with the backbone's tokenizer"
        )
    log.info(
        "model: %s parameters, memory %s; data: %d documents, %d tokens in segments of %d",
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        " + ".join(memory["kind"] for memory in description.memory),
        len(store.manifest),
        sum(document.num_tokens for document in store.manifest),
        store.segment_len,
    )
    return run_fingerprint(config, store)


def _earlier(config: TrainConfig, identity: str) -> dict[str, Any] | None:
    """The result of a finished run with the same settings; refuses what would mix runs."""
    names = storage.list_names(config.output) if storage.exists(config.output) else []
    checkpoints = _checkpoints(config.output)
    if config.resume == "never" and names:
        raise InputError(f"{config.output} holds a run already and resume is never; give another --output")
    if config.resume not in ("auto", "never"):
        if not storage.exists(storage.join(config.resume, "worker_00000.json")):
            raise InputError(f"resume {config.resume!r} is no checkpoint; give a checkpoint_* directory of a run")
        if checkpoints:
            raise InputError(f"{config.output} holds a run already; give another --output to start from a checkpoint")
    if FINISHED in names:
        finished = storage.read_json(storage.join(config.output, FINISHED))
        if finished["identity"] != identity:
            raise InputError(f"{config.output} holds a finished run with other settings or data; give another --output")
        return dict(finished["result"])
    if checkpoints:
        part = storage.read_json(storage.join(config.output, checkpoints[-1], "worker_00000.json"))
        if part["identity"] != identity:
            raise InputError(f"{config.output} holds a run with other settings or data; give another --output")
        check_continues(part, identity, config.workers.num_workers)
        log.info("going on with the run in %s", config.output)
    return None


def _checkpoints(output: str) -> list[str]:
    """Names of the run's checkpoints, the oldest first."""
    names = storage.list_names(output) if storage.exists(output) else []
    return sorted(name for name in names if name.startswith("checkpoint_") and not name.endswith(".json"))


def _fit(config: TrainConfig) -> dict[str, Any]:
    """Ray Train over the workers; the last metrics. Ctrl-C asks the workers to checkpoint and stop."""
    workers = config.workers
    files, path = storage.filesystem(config.output)
    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    trainer = TorchTrainer(
        train_worker_entry,
        train_loop_config={"settings": config.model_dump(mode="json"), "monitor": monitor},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=_resources(config)
        ),
        run_config=ray.train.RunConfig(
            name=os.path.basename(path),
            storage_path=os.path.dirname(path),
            storage_filesystem=files if storage.is_s3(config.output) else None,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.report.keep_checkpoints),
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # carried over to the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)  # not the main thread: that one keeps Ctrl-C
    thread.start()
    interrupted = _watch(thread, monitor, config)
    if failure:
        raise _cause(failure[0])
    metrics: dict[str, Any] = ray.get(monitor.latest.remote())
    if interrupted:
        log.info("stopped at step %d; the same command goes on from there", metrics.get("step", 0))
        raise KeyboardInterrupt
    return {name: metrics.get(name) for name in ("loss", "tokens_per_s", "peak_memory_bytes")}


def _resources(config: TrainConfig) -> dict[str, float]:
    return {"CPU": config.workers.cpus} | ({"GPU": 1.0} if config.workers.use_gpu else {})


def _cause(error: BaseException) -> BaseException:
    """Of a failed run the worker's own complaint, where it is about what the user gave."""
    if isinstance(error, TrainingFailedError):
        for failure in getattr(error, "worker_failures", {}).values():
            inner = getattr(failure, "cause", failure)
            if isinstance(inner, InputError):
                return inner
    return error


class Monitor:
    """An actor between the workers and the driver: the last metrics one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.stopping = False

    def tell(self, metrics: dict[str, Any]) -> bool:
        """Takes metrics; whether to stop."""
        self.metrics = metrics
        return self.stopping

    def latest(self) -> dict[str, Any]:
        return self.metrics

    def stop(self) -> None:
        self.stopping = True


def train_worker_entry(arguments: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    train_worker(arguments["settings"], arguments["monitor"])


def _watch(thread: threading.Thread, monitor: Any, config: TrainConfig) -> bool:
    """Shows progress until the run ends; whether it was asked to stop by Ctrl-C."""
    asked = threading.Event()

    def on_interrupt(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        log.info("stopping after the next report, with a checkpoint; Ctrl-C again stops at once")
        monitor.stop.remote()

    before = signal.signal(signal.SIGINT, on_interrupt)
    bar = tqdm(total=config.num_steps, unit="step", disable=not sys.stderr.isatty(), file=sys.stderr)
    try:
        shown = time.monotonic()
        while thread.is_alive():
            thread.join(timeout=0.5)
            metrics = ray.get(monitor.latest.remote())
            if not metrics:
                continue
            bar.n = metrics["step"]
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", tokens_per_s=f"{metrics['tokens_per_s']:.0f}")
            if bar.disable and time.monotonic() - shown > _LINE_S:
                shown = time.monotonic()
                log.info(_line(metrics, config.num_steps))
    finally:
        bar.close()
        signal.signal(signal.SIGINT, before)
    return asked.is_set()


def _line(metrics: dict[str, Any], num_steps: int) -> str:
    answer = metrics.get("answer_loss")
    planted = "" if answer is None else f", answers {answer:.3f}"
    return (
        f"step {metrics['step']}/{num_steps}: loss {metrics['loss']:.3f} nats{planted}, "
        f"{metrics['num_segments']} segments, {metrics['tokens_per_s']:.0f} tokens/s"
    )


def _publish(config: TrainConfig) -> str:
    """Copy the last checkpoint's portable model to the run's `model`; its path."""
    target = storage.join(config.output, "model")
    with storage.local_directory(storage.join(config.output, _checkpoints(config.output)[-1], "model")) as folder:
        storage.upload_directory(folder, target, marker="config.json")
    return target


if __name__ == "__main__":
    sys.exit(main())
