"""Serve a trained model over HTTP: OpenAI's interface, sessions that read texts of any length, summaries, a web page.

    python pipelines/serve.py --model runs/train/model
    python pipelines/serve.py --model runs/train/model --host 0.0.0.0 --api-keys keys.txt

Runs on Ray Serve, which it starts itself, until it is interrupted. What a session has read is a state of constant size
in `--store`, so that any replica goes on with it, also after a restart. Without `--api-keys` only this machine is
served. In a RayService of KubeRay, and where Serve runs already, the import path is `pipelines.serve:build`, with the
settings below as `args`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines import config as configs
from pipelines import storage
from pipelines.cluster import SERVE_ENVIRONMENT, connect, has_cluster
from pipelines.config import InputError
from pipelines.extras import require_extra
from pipelines.job import run_job
from pipelines.serving.serve_config import ServeConfig

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.serve")

APPLICATION = "rmt"


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(run, ServeConfig, argv, prog="serve", description=__doc__.splitlines()[0])


def build(args: Mapping[str, Any]) -> Any:
    """The application for a Serve config file or a RayService; `args` are settings by their names. InputError.

    The address is the proxy's there, not ours, so api_keys are needed unless `host` says that it is a loopback one.
    """
    return _application(configs.build(ServeConfig, {"host": "0.0.0.0", **args}))


def run(config: ServeConfig) -> dict[str, Any]:
    """Serves until SIGINT or SIGTERM; then where it served. InputError."""
    require_extra("serve", job="serve")
    application = _application(config)
    port = _free_port(config)
    url = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
    from ray import serve

    joins = has_cluster()
    with connect(), _until_told() as told:
        _check_no_serve()
        if not joins:
            _check_room(config)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": port, "keep_alive_timeout_s": 75},
            controller_options={"runtime_env": {"env_vars": SERVE_ENVIRONMENT}} if joins else None,
        )
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
            log.info("serving %s on %s", config.served_name, url)
            print(url, file=sys.stderr, flush=True)
            told.wait()
            log.info("leaving: what is being served is ended first")
        finally:
            serve.shutdown()
    return {"model": config.served_name, "url": url}


def _application(config: ServeConfig) -> Any:
    from pipelines.serving.auth import read_keys
    from pipelines.serving.deployment import application, check

    keys = None if config.api_keys is None else read_keys(config.api_keys)
    if "://" not in config.store and config.store != "memory:":
        config = config.model_copy(update={"store": storage.absolute(config.store)})
    config = config.model_copy(update={"model": storage.absolute(config.model), "model_name": config.served_name})
    check(config)
    return application(config, keys)


def _check_no_serve() -> None:
    """InputError where the cluster runs Serve: it would keep its own address, and end with all that it serves."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    raise InputError(
        "Serve runs on that cluster already, at an address of its own; deploy pipelines.serve:build there, "
        "or end it first with `serve shutdown`"
    )


def _free_port(config: ServeConfig) -> int:
    """The port to listen on; InputError where something listens there already."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise InputError(f"--host {config.host} --port {config.port}: {error}; give another --port") from error
        return int(probe.getsockname()[1])


def _check_room(config: ServeConfig) -> None:
    """InputError where this machine can never hold the replicas: Ray would wait for ever."""
    import ray

    there = ray.cluster_resources()
    cpus, gpus = config.min_replicas * config.replica_cpus, config.min_replicas if config.device == "cuda" else 0
    if gpus > there.get("GPU", 0):
        raise InputError(
            f"--device cuda needs {gpus} GPUs for {config.min_replicas} replicas; here are {there.get('GPU', 0):g}"
        )
    if cpus > there.get("CPU", 0):
        raise InputError(
            f"--min-replicas {config.min_replicas} of --replica-cpus {config.replica_cpus:g} exceeds the "
            f"{there.get('CPU', 0):g} cores of this machine; give less"
        )


class _Told:
    """SIGINT and SIGTERM: while it starts they end it, while it serves they are awaited, and the second ends it too."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._serving = False

    def __call__(self, *_: object) -> None:
        if not self._serving or self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()

    def wait(self) -> None:
        self._serving = True
        self._event.wait()


@contextlib.contextmanager
def _until_told() -> Iterator[_Told]:
    told = _Told()
    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
