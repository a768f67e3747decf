"""Every command and program of README.md runs, in its order, in a copy of the project.

What is changed to make them cheap, and only that:

* the books of the copy are cut to their first 32 kB, and `runs/` is the copy's;
* training gets two stages of two steps more on its command line, evaluation short lengths, few samples and few
  segments, pictures few texts, the benchmark `--quick`;
* `serve`, which would not end, gets `--dry-run`;
* `make` runs with -n, `pip install` is checked against pyproject.toml, `source .venv/bin/activate` is taken as done;
* buckets, addresses, ports and tokens are those of an S3 server and a Ray cluster that the test starts; jobs that would
  start a Ray of their own join that cluster.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from pipelines import storage

from .ray_head import Head, ray_head

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOOK_BYTES = 2**15

FROZEN = {
    "prepare": {"output", "num_documents", "num_segments", "num_tokens", "num_errors"},
    "train": {"output", "checkpoint", "num_steps", "loss"},
    "evaluate": {"output", "metrics"},
    "compare": {"output", "table", "plot"},
    "pictures": {"output", "pictures", "files"},
    "summarise": {"output", "num_ok", "num_error"},
    "benchmark": {"benchmark", "kept"},
    "serve": {"model", "url"},
}
CHEAPER = {
    "train": "curriculum.num_segments 1 2 curriculum.steps 2 2 curriculum.advance_below none report.log_every 2",
    "evaluate": "--num-samples 4 --limit-segments 8 --batch-size 2",
    "pictures": "--num-texts 32",
    "benchmark": "--quick",
    "serve": "--dry-run",
}

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]


class Piece(NamedTuple):
    """A command of a bash block, or the whole of a Python block."""

    line: int
    language: str
    text: str


def pieces() -> Iterator[Piece]:
    for block in re.finditer(r"^```(bash|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        line = README.count("\n", 0, block.start()) + 2
        if block[1] == "python":
            yield Piece(line, "python", block[2])
            continue
        for number, text in enumerate(re.sub(r"\\\n", "  ", block[2]).splitlines()):
            if shlex.split(text, comments=True):
                yield Piece(line + number, "bash", text)


PIECES = list(pieces())
COMMANDS = [piece for piece in PIECES if piece.language == "bash"]
JOBS = {job for job in FROZEN if any(f"pipelines/{job}.py" in piece.text for piece in COMMANDS)}


class Place(NamedTuple):
    """Where commands run."""

    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3_bucket: str) -> Place:
    """A copy of the project with short books. The environment's programs come first, its code is the copy's."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("rmt_core", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.lock", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    for book in (folder / "pipelines" / "books").glob("*/*.txt"):
        book.write_bytes(book.read_bytes()[:BOOK_BYTES])
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return Place(folder, {**os.environ, "PATH": programs, "PYTHONPATH": str(folder)})


@pytest.fixture(scope="module")
def cluster(place: Place) -> Iterator[Head]:
    """A Ray of its own that asks for a token; of the project it knows what is sent to it."""
    with ray_head(place.environment) as head:
        yield head


# --- the commands -----------------------------------------------------------------------------------


# Commands that no other one needs: with the long tests.
LAST = ("benchmark.py", "s3://my-bucket", "train.py detect", "pictures.py", "summarise.py")
FIRST = ("--output runs/novels --tokenizer", "--output runs/first ")  # of those that make the model `runs/first/model`


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(piece, marks=[pytest.mark.long] if any(name in piece.text for name in LAST) else [])
        for piece in PIECES
    ],
    ids=lambda piece: f"line {piece.line}",
)
def test_it_runs(piece: Piece, place: Place, s3_bucket: str, request: pytest.FixtureRequest) -> None:
    if "runs/first/model" in piece.text and not (place.folder / "runs" / "first" / "model").is_dir():
        for earlier in PIECES[: PIECES.index(piece)]:
            if any(name in earlier.text for name in FIRST):
                test_it_runs(earlier, place, s3_bucket, request)
    if piece.language == "python":
        run([sys.executable, "-c", piece.text], place)
        return
    variables, words = split(piece.text.replace("s3://my-bucket", s3_bucket))
    match words:
        case ["make", *targets]:
            assert targets
            run(["make", "-n", *targets], place)
        case ["source", ".venv/bin/activate"] | ["export", *_]:
            pass
        case ["pip", "install", what]:
            check_install(what)
        case ["ray", "job", "submit", *rest]:
            submit(words, rest, place, request.getfixturevalue("cluster"))
        case _:
            job = job_of(words)
            if job != "benchmark":
                head: Head = request.getfixturevalue("cluster")
                variables |= {"RAY_ADDRESS": head.address, **head.token}
            words = cheaper(job, words)
            printed = run(words, place._replace(environment=place.environment | variables))
            check_result(job, printed.splitlines(), words)


def split(text: str) -> tuple[dict[str, str], list[str]]:
    """Variables set before a command, and the command's words."""
    words = shlex.split(text, comments=True)
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def run(words: list[str], place: Place) -> str:
    done = subprocess.run(
        words, cwd=place.folder, env=place.environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}:\n{done.stderr[-6000:]}"
    return done.stdout


def job_of(words: list[str]) -> str:
    """The job that a command runs: `python pipelines/train.py ...` or `rmt-train ...`."""
    match words:
        case ["python", script, *_] if found := re.fullmatch(r"pipelines/([a-z]+)\.py", script):
            return found[1]
        case [script, *_] if found := re.fullmatch(r"rmt-([a-z]+)", script):
            return found[1]
    raise AssertionError(f"README.md has a command that this test does not know: {shlex.join(words)}")


def cheaper(job: str, words: list[str]) -> list[str]:
    if "--dry-run" in words:
        return words
    words = list(words)
    if job == "evaluate":
        words[words.index("--lengths") + 1] = "128,256"
    return [*words, *CHEAPER.get(job, "").split()]


def check_result(job: str, lines: list[str], words: list[str]) -> None:
    """One line: the result with its frozen keys; what it says was made is there."""
    (line,) = lines
    result: dict[str, Any] = json.loads(line)
    if "--dry-run" in words:
        return
    assert set(result) >= FROZEN[job]
    for name in {"output", "checkpoint"} & set(result):
        assert storage.is_directory(result[name]), result[name]


def check_install(what: str) -> None:
    """`pip install '.[extras]'` names extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert what.startswith("."), what
    assert Requirement(f"rmt-ray{what[1:]}").extras <= set(extras)


def submit(words: list[str], rest: list[str], place: Place, cluster: Head) -> None:
    """A submitted job prints its JSON line among Ray's own lines."""
    command = rest[rest.index("--") + 1 :]
    job = job_of(command)
    environment = place.environment | {"RAY_API_SERVER_ADDRESS": cluster.dashboard} | cluster.token
    environment.pop("PYTHONPATH")  # the submitted copy has to do
    printed = run([*words[: -len(command)], *cheaper(job, command)], Place(place.folder, environment))
    check_result(job, [line for line in printed.splitlines() if line.startswith("{")], command)


# --- what README.md has to hold ---------------------------------------------------------------------


def test_every_job_has_an_example() -> None:
    assert set(FROZEN) == JOBS
    text = "\n".join(piece.text for piece in COMMANDS)
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in text.splitlines()}
    assert "ray job submit --working-dir . -- python pipelines/train.py" in text


def test_what_it_names_is_there() -> None:
    for name in re.findall(r"`((?:pipelines|rmt_core|tests|docs)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_variables_that_it_sets_are_read() -> None:
    """By the jobs themselves, or by Ray's command line."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pipelines").rglob("*.py"))
    for name in re.findall(r"\b((?:RMT|AWS|RAY|OMP)_[A-Z0-9_]+)", README):
        assert name in source or name in {"RAY_API_SERVER_ADDRESS", "RAY_JOB_STOP_WAIT_TIME_S"}, name
