"""A function from configuration to result as a command: `run_job`.

Logs and progress go to stderr, one JSON object is the last line of stdout, and the exit code says how it ended.
"""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.config import ConfigT, InputError, StrictError, canonical_json, parse
from pipelines.stores.faults import RefusedError, StorageError


def run_job(
    job: Callable[[ConfigT], dict[str, Any]],
    config_class: type[ConfigT],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    base: Mapping[str, Any] | None = None,
    plan: Callable[[ConfigT], dict[str, Any]] | None = None,
) -> int:
    """Runs a job as a command and returns its exit code: 0 done, 2 bad input, 1 failed, 130 interrupted.

    The job's result, or with --dry-run its configuration, is the only thing on stdout, as one JSON line. Where the job
    has a `plan`, --dry-run shows what that gives too, under the key "plan".
    """
    try:
        config, dry_run = parse(
            config_class,
            sys.argv[1:] if argv is None else argv,
            prog=prog,
            description=description,
            base=base,
        )
        with _logs_on_stderr(), _stdout_to_stderr():
            result, code = _shown(config, plan) if dry_run else _result(job, config, prog)
        print(canonical_json(result), flush=True)
        return code
    except InputError as error:
        return _told(error, prog, _code_of(error))
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the border: everything else becomes a traceback and exit code 1
        if (fault := _storage_fault(error)) is not None:
            return _told(fault, prog, _code_of(fault))
        traceback.print_exc()
        return 1


def _shown(config: ConfigT, plan: Callable[[ConfigT], dict[str, Any]] | None) -> tuple[dict[str, Any], int]:
    planned = {} if plan is None else {"plan": plan(config)}
    return _without_passwords(config.model_dump(mode="json")) | planned, 0


def _without_passwords(value: Any) -> Any:
    """A configuration as it may be shown: `user:password@` in addresses is left out."""
    if isinstance(value, dict):
        return {key: _without_passwords(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_passwords(each) for each in value]
    return re.sub(r"(?<=://)[^/@]*@", "***@", value) if isinstance(value, str) else value


def _code_of(error: BaseException) -> int:
    """2 for what the user can put right on the command line, 1 where a store has failed."""
    fault = _storage_fault(error)
    return 2 if fault is None or isinstance(fault, RefusedError) else 1


def _told(error: BaseException, prog: str, code: int) -> int:
    """The exit code, after one line on stderr."""
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _storage_fault(error: BaseException) -> StorageError | None:
    """The store's fault that an exception is, or that a worker's exception came from (Ray names it `cause`)."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return None
        cause = getattr(seen, "cause", None)
        if isinstance(seen, StorageError) and not isinstance(cause, StorageError):
            return seen
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return None


def _result(job: Callable[[ConfigT], dict[str, Any]], config: ConfigT, prog: str) -> tuple[dict[str, Any], int]:
    try:
        return job(config), 0
    except StrictError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.result, 2


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Sends to stderr what libraries, child processes and Ray's workers print meanwhile to stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[None]:
    """Shows the jobs' own log lines while a job runs."""
    logger = logging.getLogger("pipelines")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
