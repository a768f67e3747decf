"""The training job: what it refuses, what it writes, and that stopping and going on changes nothing."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from safetensors.torch import load_file

import rmt_core
from pipelines import claim, storage, train
from pipelines.config import InputError, build
from pipelines.data.tokenise import load_tokenizer
from pipelines.training import checkpoints, run_directory, worker
from pipelines.training.settings import (
    CurriculumSettings,
    OptimizerSettings,
    TrainConfig,
    learning_rate,
    next_stage,
    num_segments_at,
    stage_at,
)

SMALL = {
    "segment_len": 48,
    "batch_size": 4,
    "model": {"width": 32, "feed_forward_width": 48, "memory": {"kind": "rmt", "num_tokens": 2}},
    "curriculum": {"num_segments": [2, 3], "steps": [20, 28]},
    "dataset": {"piece_segments": 5},
    "report": {"log_every": 4, "checkpoint_every": 20},
}
LOGGED = list(range(4, 49, 4))
LEFT_OVER = "checkpoint_2026-01-31_13-00-59.000123"  # named as Ray Train names its directories


def config(output: Path, **changes: Any) -> TrainConfig:
    return build(TrainConfig, SMALL | {"output": str(output)} | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("train") / "run"
    result = train.train(config(run))
    assert result == {
        "output": str(run),
        "checkpoint": str(run / "model"),
        "num_steps": 48,
        "loss": result["loss"],
        "tokens_per_s": result["tokens_per_s"],
        "peak_memory_bytes": result["peak_memory_bytes"],
    }
    return run


def test_a_run_writes_metrics_board_checkpoints_and_a_model(finished: Path) -> None:
    metrics = lines(finished)
    assert [line["step"] for line in metrics] == LOGGED
    for line in metrics:
        assert line["loss"] > 0
        assert line["gradient_norm"] > 0
        assert line["state_norm"] > 0
        assert line["tokens_per_s"] > 0
        assert line["peak_memory_bytes"] > 2**20
        assert line["learning_rate"] > 0
        assert 0 <= line["padding_fraction"] < 1
        assert len(line["loss_by_segment"]) >= 1
    assert list((finished / "tensorboard").glob("events.*"))
    assert len([path for path in finished.glob("checkpoint_*") if path.is_dir()]) == 2  # the newest are kept
    assert json.loads((finished / "config.json").read_text())["segment_len"] == 48


def test_the_model_is_portable_and_has_its_tokenizer(finished: Path) -> None:
    model = rmt_core.load(finished / "model")
    tokenizer = load_tokenizer(str(finished / "model"))
    assert model.segment_len == 48
    assert model.backbone.vocab_size == tokenizer.vocab_size
    rmt_core.generate(model, [tokenizer.encode("It is a truth").tolist()], 3)


def test_a_finished_run_is_left_alone(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = train.train(config(finished))
    assert result["checkpoint"] == str(finished / "model")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_workers_that_the_machine_can_never_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "has_cluster", lambda: False)
    monkeypatch.setattr(train, "connect", contextlib.nullcontext)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    for seeds in (1, 2):
        with pytest.raises(InputError, match="exceeds the 2 cores"):
            train.train(config(tmp_path / "run", seeds=seeds, workers={"num_workers": 3}))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_sealed_and_an_altered_one_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = max(path for path in finished.glob("checkpoint_*") if path.is_dir())
    files = [path for path in last.rglob("*") if path.is_file()]
    assert storage.check_sums(last, str(last)) == len(files) - 1  # all but the checksums themselves
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    settings = config(tmp_path, resume=str(tmp_path / "copy"))
    for name, says in (
        ("worker_00000.json", "damaged"),
        ("progress.json", "incomplete"),
        ("worker_00000.sha256", "incomplete"),
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(last, tmp_path / "copy")
        with contextlib.ExitStack() as stack:
            assert worker._checkpoint(settings, stack) == tmp_path / "copy"
        altered = tmp_path / "copy" / name
        altered.write_bytes(altered.read_bytes() + b" ") if says == "damaged" else altered.unlink()
        with contextlib.ExitStack() as stack, pytest.raises(storage.DamagedError, match=f"copy is {says}: {name}"):
            worker._checkpoint(settings, stack)


def test_other_settings_on_the_same_output_are_refused_by_name(finished: Path) -> None:
    with pytest.raises(InputError, match="other settings or data: seed 0 -> 1[.]"):
        train.train(config(finished, seed=1))
    model = SMALL["model"] | {"width": 64}  # type: ignore[operator]
    with pytest.raises(InputError, match="model.width 32 -> 64; workers.zero_stage 2 -> 1"):
        train.train(config(finished, model=model, workers={"zero_stage": 1}))
    with pytest.raises(InputError, match="resume is never"):
        train.train(config(finished, resume="never"))


def test_a_run_cannot_begin_at_the_last_step_of_another(finished: Path, tmp_path: Path) -> None:
    last = max(finished.glob("checkpoint_*/progress.json"), key=lambda path: json.loads(path.read_text())["step"])
    with pytest.raises(InputError, match="is of the last step, 48: nothing is left to do"):
        train.train(config(tmp_path / "run", resume=str(last.parent)))


def test_begun_at_a_checkpoint_the_same_command_goes_on(finished: Path, tmp_path: Path) -> None:
    run, origin = tmp_path / "run", str(tmp_path / "elsewhere" / "checkpoint_1")
    shutil.copytree(finished, run)
    settings = json.loads((run / "config.json").read_text()) | {"resume": origin}
    (run / "config.json").write_text(json.dumps(settings))
    assert train.train(config(run, resume=origin))["num_steps"] == 48  # finished
    (run / "run.json").unlink()
    identity = train.check(config(run))
    assert run_directory.earlier(config(run, resume=origin), identity) is None  # it goes on
    with pytest.raises(InputError, match="holds a run already; give another --output to start from"):
        run_directory.earlier(config(run, resume=origin + "2"), identity)


def test_a_backbone_that_is_asked_for_after_the_end_is_written(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    report = SMALL["report"] | {"backbone": True}  # type: ignore[operator]
    train.train(config(run, report=report))
    assert (run / "backbone" / "model.safetensors").exists()


def test_lines_by_which_a_stage_is_judged_are_part_of_the_run(tmp_path: Path) -> None:
    curriculum = SMALL["curriculum"] | {"advance_below": 0.1}  # type: ignore[operator]
    often, seldom = ({"report": {"log_every": every}} for every in (2, 4))
    judged = [train.check(config(tmp_path, curriculum=curriculum, **report)) for report in (often, seldom)]
    assert judged[0]["settings"] != judged[1]["settings"]
    assert train.check(config(tmp_path, **often)) == train.check(config(tmp_path, **seldom))


def test_auxiliary_losses_count_from_their_stage_on(local_ray: None, tmp_path: Path) -> None:
    def losses(cost: float, aux_from: int = 1) -> list[float]:
        memory = {"kind": "rmt", "num_tokens": 2, "gate": "lstm", "write_cost": cost}
        curriculum = {"num_segments": [2, 2], "steps": [3, 3], "vary": False, "aux_from": aux_from}
        run, model = tmp_path / f"{cost}{aux_from}", SMALL["model"] | {"memory": memory}  # type: ignore[operator]
        train.train(config(run, model=model, curriculum=curriculum, report={"log_every": 1}))
        return [line["loss"] for line in lines(run)]

    free, costly = losses(0.0), losses(20.0)
    assert free[:4] == costly[:4]  # the fourth step's loss is of weights that three steps have changed
    assert free[4] != costly[4]
    assert losses(20.0, aux_from=-1) == costly


@pytest.mark.parametrize("below", ["", "/run", "/runs/run"])
def test_an_output_that_is_or_is_below_a_file_is_one_line(
    local_ray: None, below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert train.main(["tiny", "--output", f"{tmp_path}/file{below}"]) == 2
    assert re.search("file: is a file|is a file; --output|a file stands where", capsys.readouterr().err)


def test_a_second_start_leaves_what_the_first_is_writing(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / LEFT_OVER).mkdir(parents=True)
    storage.write_json(str(run / "config.json"), config(run).model_dump(mode="json"))
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    with (
        claim.claimed(str(run), "train"),
        pytest.raises(InputError, match=f"another train is at work on {run}: process"),
    ):
        train.train(config(run))
    assert sorted(os.listdir(run)) == [LEFT_OVER, "config.json"]


OTHERS: dict[str, dict[str, str]] = {
    "a model": {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
    "results": {"config.json": '{"output": "elsewhere", "tasks": []}', "metrics.jsonl": "{}"},
    "a list": {"config.json": "[1]"},
    "no JSON": {"config.json": "half"},
    "a file": {"notes.txt": "mine"},
    "checkpoints of another kind": {"checkpoint_1/weights": "mine", "model/config.json": "{}"},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("on", ["disk", "s3"])
def test_a_directory_that_holds_something_else_is_refused_and_left(
    s3_bucket: str, kind: str, on: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "mine") if on == "disk" else f"{s3_bucket}/mine/{kind.replace(' ', '-')}"
    for name, content in OTHERS[kind].items():
        storage.write_bytes(f"{output}/{name}", content.encode())
    names = storage.list_names(output)
    line = refused(["tiny", "--output", output], capsys)
    assert re.search(f"{output} holds {names[0]}.* and no training run; give an --output that is new or empty", line)
    assert storage.list_names(output) == names
    for name, content in OTHERS[kind].items():
        assert storage.read_bytes(f"{output}/{name}") == content.encode()


@pytest.mark.parametrize("on", ["disk", "s3"])
@pytest.mark.parametrize(
    "names",
    [
        [],
        [".validate_storage_marker"],
        [".validate_storage_marker", "driver.json"],
        [".driver.json.0a1b2c3d.tmp", "driver.json"],
        ["config.json", "driver.json", LEFT_OVER + "/worker_00000.json"],
    ],
)
def test_what_an_interrupted_start_has_left_is_begun_again(
    s3_bucket: str, names: list[str], on: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "run") if on == "disk" else f"{s3_bucket}/begun/{len(names)}-{len(''.join(names))}"
    for name in names:
        settings = config(tmp_path).model_dump(mode="json") if name == "config.json" else {}
        storage.write_json(f"{output}/{name}", settings)
    assert run_directory.earlier(config(tmp_path).model_copy(update={"output": output}), {}) is None


@pytest.mark.parametrize("on", ["disk", "s3"])
def test_only_directories_named_as_checkpoints_are_removed(s3_bucket: str, on: str, tmp_path: Path) -> None:
    output = str(tmp_path / "run") if on == "disk" else f"{s3_bucket}/removing"
    kept = LEFT_OVER.replace("13", "14")
    mine = ["checkpoint_best", "checkpoint_1.json", "checkpoint_2026-01-01", f"{LEFT_OVER}.kept", kept]
    for name in [LEFT_OVER, *mine]:
        storage.write_bytes(f"{output}/{name}/weights", b"1")
    storage.write_json(f"{output}/{run_directory.REGISTRY}", {"checkpoint_results": [{"checkpoint_dir_name": kept}]})
    run_directory.remove_unfinished(output)
    assert storage.list_names(output) == sorted([*mine, run_directory.REGISTRY])


def test_a_node_that_came_later_and_does_not_see_the_output_is_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = worker.Setup(config(finished), *[None] * 7)  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "set_up", lambda config: known)
    monkeypatch.setattr(worker, "_checkpoint", lambda config, stack: None)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 1)
    with contextlib.ExitStack() as stack:
        assert worker._prepare(config(finished), config(finished), stack) == (known, None)
        with pytest.raises(InputError, match=f"^node .* does not see {tmp_path}/config.json, which the driver wrote"):
            worker._prepare(config(tmp_path), config(tmp_path), stack)


def test_what_workers_before_left_unfinished_is_removed_by_the_first_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = tmp_path / "run", LEFT_OVER.replace("13", "14")
    for name in (LEFT_OVER, kept):
        storage.write_bytes(f"{run}/{name}/weights", b"1")
    storage.write_json(f"{run}/config.json", {})
    storage.write_json(f"{run}/{run_directory.REGISTRY}", {"checkpoint_results": [{"checkpoint_dir_name": kept}]})
    known = worker.Setup(config(run), *[None] * 7)  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "set_up", lambda config: known)
    monkeypatch.setattr(worker, "start_trackers", lambda config: ())
    monkeypatch.setattr(worker, "_checkpoint", lambda config, stack: None)
    unlisted = LEFT_OVER.replace("13", "15")
    for rank, newest, left in ((1, kept, [LEFT_OVER, kept]), (0, unlisted, [LEFT_OVER, kept]), (0, kept, [kept])):
        monkeypatch.setattr(worker.dist, "get_rank", lambda rank=rank: rank)
        checkpoint = ray.train.Checkpoint(str(run / newest))
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda checkpoint=checkpoint: checkpoint)
        with contextlib.ExitStack() as stack:
            worker._prepare(config(run), config(run), stack)
        assert [path.name for path in sorted(run.glob("checkpoint_*")) if path.is_dir()] == left


def checkpoint_of(run: str, step: int, second: int, num_workers: int = 1) -> str:
    """A whole checkpoint without weights; its name, which tells a time."""
    name = f"checkpoint_2026-01-31_13-00-{second:02d}.000000"
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_progress(Path(folder), checkpoints.Progress(step, 0, num_workers, {}))
        storage.seal(Path(folder), part="worker_00000")
        for path in Path(folder).iterdir():
            storage.write_bytes(f"{run}/{name}/{path.name}", path.read_bytes())
    return name


@pytest.mark.parametrize("on", ["disk", "s3"])
@pytest.mark.parametrize("rest", ["", '{"checkpoint_results": ['])
def test_a_list_of_checkpoints_that_is_cut_off_is_made_again_of_those_that_are_whole(
    s3_bucket: str, on: str, rest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path) if on == "disk" else f"{s3_bucket}/cut-off/{len(rest)}"
    later, earlier = checkpoint_of(run, 20, 30), checkpoint_of(run, 10, 40)  # a clock was set back
    altered, unfinished = checkpoint_of(run, 30, 50), checkpoint_of(run, 40, 55, num_workers=2)
    storage.write_json(f"{run}/{altered}/progress.json", checkpoints.Progress(30, 1, 1, {})._asdict())
    storage.write_bytes(f"{run}/{run_directory.REGISTRY}", rest.encode())
    assert run_directory.registered_checkpoints(run) == [earlier, later, altered]
    run_directory.mend_registry(run)
    assert run_directory.registered_checkpoints(run) == [earlier, later]
    assert run_directory.last_progress(run).step == 20
    assert f"{altered} is damaged" in caplog.text
    assert "checkpoints of steps 10, 20" in caplog.text
    mended = storage.read_bytes(f"{run}/{run_directory.REGISTRY}")
    run_directory.mend_registry(run)
    assert storage.read_bytes(f"{run}/{run_directory.REGISTRY}") == mended
    run_directory.remove_unfinished(run)
    assert not storage.exists(f"{run}/{unfinished}/progress.json")


def test_a_list_of_checkpoints_that_is_cut_off_with_none_that_is_whole_is_refused(tmp_path: Path) -> None:
    checkpoint_of(str(tmp_path), 40, 55, num_workers=2)
    (tmp_path / run_directory.REGISTRY).write_text("")
    with pytest.raises(InputError, match="is cut off, .* and no checkpoint beside it is whole; give another --output"):
        run_directory.mend_registry(str(tmp_path))


class Saving(worker.Run):
    """A worker whose checkpoints meet what `fault` is when they are written."""

    def __init__(self, output: Path, fault: Exception | None) -> None:
        self.config, self.fault, self.rank, self.step = config(output), fault, 0, 3

    def write(self, folder: Path) -> None:
        if self.fault is not None:
            raise self.fault


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", [FULL, RuntimeError("PytorchStreamWriter failed writing file data/0: write failed")])
def test_a_full_disk_under_a_checkpoint_is_one_line(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5))
    with pytest.raises(storage.StorageError, match=f"^{tmp_path}/.*: the disk is full .*; free some room, or give"):
        Saving(tmp_path / "run", fault).save({})


def test_another_fault_under_a_checkpoint_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^odd$"):
        Saving(tmp_path / "run", RuntimeError("odd")).save({})


def test_a_disk_that_refuses_a_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(metrics: dict[str, Any], checkpoint: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ray.train, "report", refuse)
    with pytest.raises(storage.RefusedError, match=f"^{tmp_path}/run: no permission"):
        Saving(tmp_path / "run", None).save({})


def test_of_a_run_that_failed_the_fault_of_a_store_is_told() -> None:
    full, odd = storage.StorageError("the disk is full"), OSError("odd")
    assert train._cause(WorkerGroupError("both", {0: odd, 1: full}), "runs/a") is full
    told = train._cause(ControllerError(FULL), "runs/a")
    assert isinstance(told, storage.StorageError)
    assert str(told).startswith("runs/a: the disk is full")
    for error in (WorkerGroupError("one", {0: odd}), ControllerError(odd), ControllerError(ValueError("odd"))):
        assert train._cause(error, "runs/a") is error


def monitor_of(*, has_begun: bool) -> Any:
    """A monitor that knows of no metrics yet, for a `ray.get` that takes values for references."""
    values = {"latest": {}, "noted": [], "has_begun": has_begun, "stop": None}
    return SimpleNamespace(
        **{name: SimpleNamespace(remote=lambda value=value: value) for name, value in values.items()}
    )


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Thread]:
    """A thread that lasts 3 seconds, as one in which Ray Train waits for workers."""
    monkeypatch.setattr(ray, "get", lambda values: values)
    thread = threading.Thread(target=time.sleep, args=(3,))
    thread.start()
    yield thread
    thread.join()


def test_asked_to_stop_before_any_worker_has_started_a_run_ends(fitting: threading.Thread, tmp_path: Path) -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        train._watch(fitting, monitor_of(has_begun=False), config(tmp_path))
    assert fitting.is_alive()


def test_asked_to_stop_a_run_that_has_workers_waits_for_their_checkpoint(
    fitting: threading.Thread, tmp_path: Path
) -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert train._watch(fitting, monitor_of(has_begun=True), config(tmp_path))
    assert not fitting.is_alive()


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_run_that_waits_for_room_says_so(
    has_begun: bool,
    fitting: threading.Thread,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(train, "_WAITING_S", 1.0)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}, "Labels": {}}] * 2)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 5.0})
    with caplog.at_level(logging.INFO, logger="pipelines"):
        train._watch(fitting, monitor_of(has_begun=has_begun), config(tmp_path, workers={"num_workers": 4, "cpus": 2}))
    told = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    line = "no worker has started yet: waiting for 4 of 2 CPU each; the cluster has room for 2 now"
    assert told == ([] if has_begun else [line])


@pytest.mark.long
def test_gone_on_with_after_its_list_was_cut_off_a_run_equals_the_uninterrupted(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.json").unlink()
    shutil.rmtree(run / "model")
    (run / run_directory.REGISTRY).write_bytes(b"")
    last = run / run_directory.registered_checkpoints(str(run))[-1]
    (last / "worker_00000.json").write_bytes(b"{}")
    train.train(config(run))
    assert [line["step"] for line in lines(run)] == LOGGED
    for name, tensor in weights(finished).items():
        assert torch.equal(weights(run)[name], tensor), name


@pytest.mark.long
def test_a_run_that_diverges_ends_as_a_result(local_ray: None, tmp_path: Path) -> None:
    steps = {"curriculum": {"num_segments": [2], "steps": [4]}, "report": {"log_every": 2}}
    settings = config(tmp_path / "run", optimizer={"learning_rate": 1e30, "warmup_steps": 0}, **steps)
    result = train.train(settings)
    assert result["loss"] is None
    assert [line["loss"] for line in lines(tmp_path / "run")][-1:] == [None]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train.train(settings) == result  # finished


@pytest.mark.long
def test_stopped_by_ctrl_c_and_gone_on_with_equals_uninterrupted(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def interrupt() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and lines(run)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(config(run))
    finally:
        thread.join()
    assert lines(run)[-1]["step"] < 48
    assert [path for path in run.glob("checkpoint_*") if path.is_dir()]
    train.train(config(run))
    assert [line["step"] for line in lines(run)] == LOGGED
    for name, tensor in weights(finished).items():
        assert torch.equal(weights(run)[name], tensor), name
    for line, wanted in zip(lines(run), lines(finished), strict=True):
        assert line["loss"] == wanted["loss"]


@pytest.mark.scenario
def test_two_workers_learn_what_one_does(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.train(config(run, workers={"num_workers": 2, "zero_stage": 2, "cpus": 0.5}))
    for line, wanted in zip(lines(run), lines(finished), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
    for name, tensor in weights(finished).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=2e-4, rtol=0)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert train.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if "error" in line]
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tyny"], "did you mean tiny"),
        (["tiny", "model.witdh", "8"], "model.width"),
        (["batch_size=3", "workers.num_workers=4"], "use at most 3 workers"),
        (["--batch-size", "3", "workers.num_workers", "2,4"], "use at most 3 workers"),
        (["workers.num_workers", "4,2"], "MIN,MAX such as 2,8"),
        (["workers.num_workers", "0"], "MIN,MAX such as 2,8"),
        (["workers.offload_optimizer", "yes", "workers.zero_stage", "0"], "needs zero_stage 1, 2 or 3"),
        (["gradient.mode", "replay", "gradient.exact_depth", "yes"], "exact_depth"),
        (["gradient.mode", "truncated"], "bptt_segments"),
        (["gradient.mode", "sideways"], "truncated"),
        (["model.memory", "rtm"], "did you mean 'rmt'"),
        (["model.memory", '{"kind": "rmt", "num_token": 3}'], "num_tokens"),
        (["model.max_positions", "50"], "use at most 42"),
        (["model.backbone", "nowhere"], "not a directory"),
        (["dataset.piece_segments", "none", "--batch-size", "64"], "piece_segments"),
        (["curriculum.num_segments", "1", "2", "curriculum.steps", "5"], "one of each a stage"),
        (["--segment-len", "16", "curriculum.num_segments", "1", "curriculum.steps", "5"], "too short for the facts"),
        (["dataset.tasks", "recal"], "did you mean recall?"),
        (["dataset.tasks", "recall,perplexity"], "there is no task 'perplexity' to train on"),
        (["dataset.tasks", '{"task": "recall", "backgroud": "noise"}'], "'backgroud' is no option of a task"),
        (["dataset.tasks", '{"task": "passkey", "background": "noise"}'], "background is not read by passkey"),
        (["dataset.tasks", '{"task": "copy", "depths": [0.5]}'], "depths is not read by copy"),
        (["dataset.tasks", '{"task": "recall", "depths": [2]}'], "less than or equal to 1"),
        (["dataset.tasks", '{"task": "recall"'], "is not JSON"),
        (["dataset.tasks", "reason", "dataset.task_fraction", "0.01", "curriculum.advance_below=none"], "is no row"),
        (["dataset.tasks", "capacity_64", "curriculum.num_segments", "4", "curriculum.steps", "5"], "of capacity_64 ("),
        (["curriculum.least_segments", "2"], "at most the 1 segments"),
        (["curriculum.aux_from", "7"], "aux_from is 7; it must be a stage, from 0 to 6, or from -1"),
        (["curriculum.aux_from", "-8"], "aux_from is -8; it must be a stage"),
        (["mine.yaml"], "mine.yaml: there is no such file"),
        (["--seeds", "2", "--resume", "runs/a/checkpoint_1"], "where seeds is more than 1"),
        (["--data", "nowhere"], "nowhere"),
        (["--resume", "nowhere"], "no checkpoint"),
        (["report.backbone", "yes", "model.feed_forward", '{"kind": "ultramem", "layers": [1]}'], "leave it or"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused([*arguments, "--output", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["tiny", "--dry-run", "model.num_layers", "3"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["model"]["num_layers"] == 3


@pytest.mark.parametrize(("given", "wanted"), [(2, (2, 2)), ("2", (2, 2)), ("1,4", (1, 4)), ([1, 4], (1, 4))])
def test_workers_are_a_number_or_between_two(given: Any, wanted: tuple[int, int]) -> None:
    found = build(TrainConfig, {"workers": {"num_workers": given}})
    assert found.workers.num_workers == wanted
    assert build(TrainConfig, found.model_dump(mode="json")) == found


def test_the_learning_rate_rises_and_falls() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate(settings, step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)


def test_the_curriculum_goes_stage_by_stage_and_varies_within() -> None:
    settings = CurriculumSettings(num_segments=[1, 4], steps=[10, 400])
    assert [stage_at(settings, step) for step in (0, 9, 10, 409, 1000)] == [0, 0, 1, 1, 1]
    drawn = [num_segments_at(settings, 1, step, seed=0) for step in range(400)]
    assert set(drawn) == {1, 2, 3, 4}
    assert drawn == [num_segments_at(settings, 1, step, seed=0) for step in range(400)]
    assert {num_segments_at(settings, 0, step, seed=0) for step in range(10)} == {1}
    fixed = CurriculumSettings(num_segments=[1, 4], steps=[10, 400], vary=False)
    assert {num_segments_at(fixed, 1, step, seed=0) for step in range(10, 410)} == {4}


def test_a_stage_lasts_its_steps_or_until_its_answers_are_known() -> None:
    by_steps = CurriculumSettings(num_segments=[1, 4], steps=[10, 400])
    assert next_stage(by_steps, 0, 9, answer_loss=0.0) == 0
    assert next_stage(by_steps, 0, 10, answer_loss=None) == 1
    by_loss = CurriculumSettings(num_segments=[1, 4], steps=[10, 400], advance_below=0.1)
    assert next_stage(by_loss, 0, 200, answer_loss=0.2) == 0
    assert next_stage(by_loss, 0, 200, answer_loss=None) == 0
    assert next_stage(by_loss, 0, 5, answer_loss=0.05) == 1
    assert next_stage(by_loss, 1, 6, answer_loss=0.05) == 1
