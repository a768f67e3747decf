"""Counts and times for Prometheus. No label holds anything that a user wrote, nor who the user is."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .requests import Usage
from .service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Of one replica, which `rmt_process_id` names; a registry of its own, so that several may live in one process."""

    def __init__(self, service: Service) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._answers = Counter("rmt_answers", "Requests answered.", ["route", "method", "status"], registry=registry)
        self._durations = Histogram(
            "rmt_answer_seconds", "From request to end of the answer.", ["route"], registry=registry, buckets=_SECONDS
        )
        self._tokens = Counter("rmt_tokens", "Tokens of requests that are done.", ["kind"], registry=registry)
        self.first_token = Histogram(
            "rmt_first_token_seconds", "From request to first token.", registry=registry, buckets=_SECONDS
        )
        self.token_gap = Histogram(
            "rmt_between_tokens_seconds", "From one token to the next.", registry=registry, buckets=_SECONDS
        )
        Gauge("rmt_process_id", "Of the replica that answers.", registry=registry).set(os.getpid())
        for name in service.load()._fields:
            gauge = Gauge(f"rmt_engine_{name}", f"The engine's {name}.", registry=registry)
            gauge.set_function(lambda name=name: getattr(service.load(), name))  # type: ignore[misc]

    def answered(self, route: str, method: str, status: int, duration_s: float) -> None:
        """An answer has ended; status 0: the client was gone before it began."""
        known = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self._answers.labels(route, known, str(status)).inc()
        self._durations.labels(route).observe(duration_s)

    def done(self, usage: Usage) -> None:
        self._tokens.labels("read").inc(usage.num_prompt - usage.num_cached)
        self._tokens.labels("cached").inc(usage.num_cached)
        self._tokens.labels("written").inc(usage.num_written)

    def text(self) -> bytes:
        return generate_latest(self._registry)
