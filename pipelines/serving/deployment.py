"""The application on Ray Serve: replicas that each hold the model, the engine and the routes.

Requests of a session carry its id in the header `x-session-id`; Ray's consistent-hash router sends them to one
replica, whose prefix cache then knows the session's text. That is a hint and no more: sessions live in the store, and
any replica goes on with any of them from its last committed version.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    BackpressureConfig,
    RequestRouterConfig,
)

from pipelines import storage

from .app import create_app
from .auth import Key
from .chat import load_chat_format
from .engine import Engine, Settings
from .errors import RETRY_AFTER_S
from .front import Front
from .loading import load
from .serve_config import ServeConfig
from .service import Service
from .sessions import Limits, Sessions
from .store import open_store

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_WAITING = "num_waiting_segments"


def build_front(config: ServeConfig) -> Front:
    """The model of the configuration with its engine and its store; not yet started. InputError."""
    model, tokenizer, fingerprint = load(storage.absolute(config.model), config.device)
    settings = Settings(
        num_slots=config.num_slots,
        rows_read=config.rows_read,
        write_steps_per_read=config.write_steps_per_read,
        prefix_bytes=config.prefix_cache_bytes,
        server_key=secrets.token_bytes(32),
    )
    engine = Engine(model, settings, fingerprint=fingerprint, tokenizer=tokenizer)
    limits = Limits(config.session_ttl_s, config.max_sessions, kept_versions=config.kept_versions)
    sessions = Sessions(open_store(config.store), engine.start(), fingerprint=fingerprint, limits=limits)
    service = Service(engine, sessions, max_requests=config.max_requests)
    return Front(service, tokenizer, config, load_chat_format(storage.absolute(config.model), tokenizer.own_names))


@serve.ingress()
class Server:
    """A replica. Ray calls these methods by their names."""

    def __init__(self, config: dict[str, Any], keys: Sequence[tuple[str, str]] | None) -> None:
        self._keys = None if keys is None else [Key(*key) for key in keys]
        self._front = build_front(ServeConfig(**config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._front, self._keys, behind_serve=True)

    async def check_health(self) -> None:
        if not self._front.service.healthy:
            raise RuntimeError("the engine has failed")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {_WAITING: float(self._front.service.load().num_waiting_segments)}


class WaitingSegments:
    """Autoscaling: one replica more for every so many segments that wait: a request may be a word or a library."""

    def __init__(self, segments_per_replica: int) -> None:
        self._segments_per_replica = segments_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        waiting = sum((context.aggregated_metrics or {}).get(_WAITING, {}).values())
        wanted = 1 + int(waiting // self._segments_per_replica)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(least, min(most, wanted)), {}


def application(config: ServeConfig, keys: Sequence[Key] | None) -> serve.Application:
    """What `serve.run` and a RayService run. More requests are let in than are served, so that all can be answered."""
    let_in = 2 * config.max_requests + 64
    scaling = AutoscalingConfig(
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        upscale_delay_s=config.scale_up_after_s,
        downscale_delay_s=config.scale_down_after_s,
        policy=AutoscalingPolicy(
            policy_function=WaitingSegments, policy_kwargs={"segments_per_replica": config.segments_per_replica}
        ),
    )
    fixed = config.min_replicas == config.max_replicas
    deployment = serve.deployment(
        Server,
        name="rmt",
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": 1 if config.device == "cuda" else 0},
        max_ongoing_requests=let_in,
        max_queued_requests=let_in,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=2 * config.drain_timeout_s + 5,  # requests that Ray waits for, then summaries
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        **({"num_replicas": config.min_replicas} if fixed else {"autoscaling_config": scaling}),
    )
    return deployment.bind(config.model_dump(), None if keys is None else [tuple(key) for key in keys])


def check(config: ServeConfig) -> None:
    """InputError where a replica could not start, before Ray tries again and again. Needs no GPU here."""
    build_front(config.model_copy(update={"device": "cpu"}))
