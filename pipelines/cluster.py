"""Connecting to Ray; the only `ray.init` of the project.

Three cases: a Ray that this process is already connected to is used and left alone; inside a submitted job, or
with RAY_ADDRESS set, that cluster is joined; otherwise a private Ray is started on this machine and stopped at
the end. The private one is guarded by a token that lives in this process only: nothing is written to
`~/.ray/auth_token` and nothing stays in the environment, so later processes are not affected. What its
workers print goes to Ray's log files, and with RMT_SHOW_WORKERS=1 also to stderr (on a cluster it does, but
with RMT_SHOW_WORKERS=0); a worker's exception reaches the caller in either case.

A cluster may have pools: nodes labelled `rmt/pool`, which of them there are said by RMT_POOLS (`clusters/README.md`).
"""

import contextlib
import functools
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ray
import ray.data
import ray.util.client
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import InputError

_ROOT = Path(__file__).resolve().parents[1]
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entry point of a submitted job
_SHOW_WORKERS = "RMT_SHOW_WORKERS"  # 1 or 0: whether what the workers print appears here too
_POOLS = "RMT_POOLS"  # pools of the cluster, with commas: train,data
_POOL_LABEL = "rmt/pool"
_ANSWER_S = 5.0  # how long a cluster may take to accept a connection
SERVE_ENVIRONMENT = {
    # Serve's proxies have 5 seconds to start, in which a busy machine is still importing, and are killed then.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.proxy:middlewares",
}
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    **SERVE_ENVIRONMENT,  # here and not where Serve starts: workers that are started ahead have it too
}


@contextlib.contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray to work on while the block runs; `num_cpus` limits a private one (None: all cores).

    Raises InputError when the cluster named by RAY_ADDRESS does not answer or refuses our token.
    """
    for name in ("ray.data", "ray._private.authentication"):  # remarks only on errors, also while Ray starts
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        _configure_data()
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if _JOB_VARIABLE in os.environ:
            _join(address or "auto", None)
        elif address and address != "local":
            _use_token_file()
            _join(address, _runtime_env())
        else:
            stack.enter_context(_private_token())
            stack.enter_context(_environment(**{_POOLS: ""}))  # it has none; nor do the processes that join it see any
            with _environment(**_WORKER_ENVIRONMENT, PYTHONPATH=_path()):  # of all that Ray starts, from the first on
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    configure_logging=True,
                    logging_level=logging.WARNING,
                    log_to_driver=_shows_workers(default=False),
                )
        _configure_data()
        try:
            yield
        finally:
            _end_data_threads()
            ray.shutdown()


def _end_data_threads() -> None:
    """Stops what Ray Data still runs after an interruption: a thread that calls Ray while it shuts down may crash."""
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)


def environment() -> dict[str, str]:
    """The variables of this process, and those with which a command started by it joins the Ray it works on."""
    joined = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return {_SHOW_WORKERS: "0", **os.environ, **joined}


def _shows_workers(*, default: bool) -> bool:
    return os.environ.get(_SHOW_WORKERS, "1" if default else "0") == "1"


def has_cluster() -> bool:
    """Whether `connect` would find a Ray that is there already, instead of starting one on this machine."""
    return (
        ray.is_initialized()
        or _JOB_VARIABLE in os.environ
        or os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    )


def beside_driver() -> Any:
    """Where an actor outlives all nodes but the driver's; anywhere, for a driver outside the cluster."""
    if ray.util.client.ray.is_connected():
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def pool(name: Literal["train", "data"]) -> dict[str, str]:
    """The label selector for the nodes of a pool; empty, so any node, where the cluster has no such pool."""
    there = [each.strip() for each in os.environ.get(_POOLS, "").split(",")]
    return {_POOL_LABEL: name} if name in there else {}


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """These variables, while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _path() -> str:
    """Where workers on this machine find the project."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{_ROOT}{os.pathsep}{inherited}" if inherited else str(_ROOT)


def _runtime_env() -> dict[str, Any]:
    """What workers of a cluster need to import this project: its packages, sent there."""
    packages = [str(_ROOT / name) for name in ("rmt_core", "pipelines") if (_ROOT / name).is_dir()]
    pools = {_POOLS: os.environ[_POOLS]} if _POOLS in os.environ else {}
    return {"py_modules": packages, "env_vars": {**_WORKER_ENVIRONMENT, **pools}}


def _join(address: str, runtime_env: dict[str, Any] | None) -> None:
    if address != "auto" and not address.startswith("ray://"):
        _check_answers(address)
    try:
        ray.init(
            address=address,
            runtime_env=runtime_env,
            logging_level=logging.WARNING,
            log_to_driver=_shows_workers(default=True),
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no Ray cluster can be joined at {address} ({reason}); unset RAY_ADDRESS to work on this machine, "
            "or, where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH"
        ) from error


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"RAY_ADDRESS {address!r}: needs host:port, ray://host:port, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise InputError(
            f"RAY_ADDRESS {address} does not answer ({error}); start that cluster, or unset RAY_ADDRESS to "
            "work on this machine"
        ) from error


def _use_token_file() -> None:
    """Joins with a token where the user has one and has not said otherwise."""
    has_token = (
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@functools.cache
def _token() -> str:
    """One token a process: Ray keeps the first that it has seen."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _private_token() -> Iterator[None]:
    """A token for a private Ray, in the environment of this process only while that Ray runs."""
    if "RAY_AUTH_MODE" in os.environ:  # the user's choice
        yield
        return
    mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    before = {name: os.environ.get(name) for name in mine}
    os.environ["RAY_AUTH_TOKEN"] = _token()  # with a token at hand, ray.init turns the mode on and writes no file
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _configure_data() -> None:
    """Progress bars only on a terminal; one long document or training step is no stall.

    Ray Data works in the pool for data, where an operator does not say otherwise.
    """
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = -1
    context.execution_options.label_selector = pool("data") or None
    if not sys.stderr.isatty():
        context.enable_progress_bars = False
        context.enable_operator_progress_bars = False
