"""The training job: what it refuses, what it writes, and that stopping and going on changes nothing."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from safetensors.torch import load_file

import rmt_core
from pipelines import claim, storage, train
from pipelines.config import InputError, build
from pipelines.data.tokenise import load_tokenizer
from pipelines.training import run_directory, worker
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
    (run / "checkpoint_being_written").mkdir(parents=True)
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    with (
        claim.claimed(str(run), "train"),
        pytest.raises(InputError, match=f"another train is at work on {run}: process"),
    ):
        train.train(config(run))
    assert os.listdir(run) == ["checkpoint_being_written"]


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


def test_a_list_of_checkpoints_that_is_cut_off_is_told(tmp_path: Path) -> None:
    (tmp_path / run_directory.REGISTRY).write_text('{"checkpoint_results": [')
    with pytest.raises(InputError, match="is not whole.*--resume"):
        train.train(config(tmp_path))


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
