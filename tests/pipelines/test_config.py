"""Command lines become configurations, or one line that says what is wrong; jobs end with one JSON line."""

import json
import logging
import os
from typing import Annotated, Any, Literal

import pydantic
import pytest

from pipelines.config import (
    Config,
    Count,
    InputError,
    StrictError,
    build,
    fingerprint,
    given,
    parse,
    parse_count,
    split_commas,
)
from pipelines.job import run_job


class Optimiser(Config):
    learning_rate: float = pydantic.Field(1e-3, gt=0, description="peak learning rate")
    kind: Literal["adam", "sgd"] = pydantic.Field("adam", description="which optimiser")
    warmup_steps: int | None = pydantic.Field(None, description="steps of warm-up")


class Job(Config):
    input: list[str] = pydantic.Field(min_length=1, description="files to read")
    segment_len: Count = pydantic.Field(512, ge=1, description="tokens a segment")
    lengths: Annotated[list[Count], pydantic.BeforeValidator(split_commas)] = pydantic.Field(
        [1024], description="lengths in tokens"
    )
    memory: dict[str, Any] | list[Any] = pydantic.Field(default={"kind": "none"}, description="memory")
    strict: bool = pydantic.Field(False, description="fail on any error")
    optimiser: Optimiser = pydantic.Field(Optimiser(), description="the optimiser")


def _parse(*argv: str, **keywords: Any) -> Job:
    return parse(Job, argv, prog="job", description="A job.", **keywords)[0]


def _error(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        _parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_in_every_spelling_are_the_same() -> None:
    wanted = _parse("--input", "a", "b", "--segment-len", "64", "--optimiser.learning-rate", "0.5")
    assert wanted.input == ["a", "b"]
    assert wanted.segment_len == 64
    assert wanted.optimiser.learning_rate == 0.5
    for spelling in (
        ["--optimiser.learning_rate", "0.5"],
        ["--optimiser.learning-rate=0.5"],
        ["optimiser.learning_rate", "0.5"],
        ["optimiser.learning-rate=0.5"],
    ):
        assert _parse("--input", "a", "--input=b", "--segment_len=64", *spelling) == wanted


def test_flags_can_be_set_and_unset() -> None:
    for argv, value in (
        ([], False),
        (["--strict"], True),
        (["--strict", "--no-strict"], False),
        (["--strict", "true"], True),
        (["--strict=false"], False),
        (["--strict", "optimiser.kind=sgd"], True),
        (["--strict", "optimiser.kind", "sgd"], True),
    ):
        assert _parse("--input", "a", *argv).strict is value


def test_a_flag_that_is_neither_set_nor_unset_is_told_with_its_value() -> None:
    for argv in (["--strict", "maybe"], ["--strict=maybe"]):
        assert _error("--input", "a", *argv) == "--strict 'maybe': needs to be yes or no"


def test_values_are_read_by_type() -> None:
    job = _parse("--input", "a", "--lengths", "4k,64k", "1m", "--memory", '{"kind": "rmt"}')
    assert job.lengths == [4096, 65536, 1024**2]
    assert job.memory == {"kind": "rmt"}
    assert _parse("--input", "a", "--optimiser.warmup_steps", "none").optimiser.warmup_steps is None
    assert _parse("--input", "a", "--optimiser.warmup_steps", "3").optimiser.warmup_steps == 3


def test_the_command_line_wins_over_the_base_and_the_base_over_defaults() -> None:
    base = {"segment_len": 8, "optimiser": {"kind": "sgd", "learning_rate": 0.25}}
    job = _parse("--input", "a", "optimiser.learning_rate=0.5", base=base)
    assert (job.segment_len, job.optimiser.kind, job.optimiser.learning_rate) == (8, "sgd", 0.5)
    assert base["optimiser"] == {"kind": "sgd", "learning_rate": 0.25}


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ([], None),
        (["--input", "a"], None),
        (["--segment-len", "4"], "4"),
        (["--input", "a", "segment_len=4"], "4"),
        (["--segment-len"], ""),
    ],
)
def test_what_a_command_line_gives_for_one_field(argv: list[str], found: str | None) -> None:
    assert given("segment_len", Job, argv) == found


def test_an_unknown_option_names_the_nearest() -> None:
    assert _error("--input", "a", "--segmnt-len", "4") == "unknown option --segmnt-len; did you mean --segment-len?"
    assert "did you mean optimiser.learning_rate?" in _error("--input", "a", "optimiser.learning_rat=4")
    assert "did you mean --optimiser.kind?" in _error("--input", "a", "--optimiser.knd", "sgd")
    with pytest.raises(InputError, match=r"unknown setting segmentlen; did you mean segment_len\?"):
        build(Job, {"input": ["a"], "segmentlen": 3})


def test_an_invalid_value_is_told_with_field_value_and_range() -> None:
    assert _error("--input", "a", "--segment-len", "0").startswith("--segment-len 0: needs to be greater than")
    assert "--segment-len 'many': needs a whole number" in _error("--input", "a", "--segment-len", "many")
    message = _error("--input", "a", "--optimiser.kind", "lion")
    assert "--optimiser.kind 'lion'" in message
    assert "'adam' or 'sgd'" in message
    for value in ("inf", "nan"):
        assert "needs to be" in _error("--input", "a", "--optimiser.learning-rate", value)
    assert _error() == "--input is required"
    assert "expected one argument" in _error("--input", "a", "--segment-len")


def test_help_shows_descriptions_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parse("--help")
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tokens a segment (default: 512)" in out
    assert "files to read (required)" in out


def test_counts_take_binary_units() -> None:
    assert [parse_count(text) for text in ("7", "4k", "64K", "1m")] == [7, 4096, 65536, 1024**2]
    for wrong in ("", "k", "1.5k", "-3", "4kb"):
        with pytest.raises(ValueError, match="whole number"):
            parse_count(wrong)


def test_a_fingerprint_depends_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [2, "é"]}) == fingerprint({"b": [2, "é"], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def _run(job: Any, *argv: str) -> int:
    return run_job(job, Job, argv, prog="job", description="A job.")


def test_only_the_result_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    def job(config: Job) -> dict[str, Any]:
        print("printed by Python")
        os.write(1, b"printed by a library\n")
        return {"output": config.input[0]}

    assert _run(job, "--input", "a") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"output": "a"}
    assert captured.out.count("\n") == 1
    assert "printed by Python" in captured.err
    assert "printed by a library" in captured.err


def test_log_lines_go_to_the_stderr_of_the_moment(capfd: pytest.CaptureFixture[str]) -> None:
    def job(config: Job) -> dict[str, Any]:
        logging.getLogger("pipelines.job").info("read %s", config.input[0])
        return {}

    for name in "ab":
        assert _run(job, "--input", name) == 0
        captured = capfd.readouterr()
        assert captured.err.endswith(f" read {name}\n")
        assert captured.err.count("\n") == 1
    assert not logging.getLogger("pipelines").handlers


def test_a_dry_run_prints_the_resolved_configuration(capfd: pytest.CaptureFixture[str]) -> None:
    def job(config: Job) -> dict[str, Any]:
        raise AssertionError("ran")

    assert _run(job, "--input", "a", "--segment-len", "4k", "--dry-run") == 0
    shown = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert shown["segment_len"] == 4096
    assert shown["optimiser"]["kind"] == "adam"


@pytest.mark.parametrize(
    ("error", "code", "stdout"),
    [
        (InputError("no such\nfile"), 2, ""),
        (StrictError({"num_errors": 3}, "3 errors"), 2, '{"num_errors":3}\n'),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("broken"), 1, ""),
    ],
)
def test_the_exit_code_tells_the_truth(
    error: BaseException, code: int, stdout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def job(config: Job) -> dict[str, Any]:
        raise error

    assert _run(job, "--input", "a") == code
    captured = capfd.readouterr()
    assert captured.out == stdout
    assert captured.err.startswith("Traceback" if code == 1 else "job: ")
    if code == 2:
        assert captured.err.count("\n") == 1
