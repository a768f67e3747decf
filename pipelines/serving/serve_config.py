"""What the server is asked to be: one configuration for the command line, the replicas and the routes."""

import ipaddress
from typing import Literal

import pydantic

from pipelines.config import Config, Count


class ServeConfig(Config):
    """Settings of `serve`."""

    model: str = pydantic.Field(description="directory of a model saved with its tokenizer, on disk or s3://")
    model_name: str | None = pydantic.Field(
        None, description="name that requests call the model by; none: the last part of --model"
    )
    host: str = pydantic.Field("127.0.0.1", description="address to listen on; others than loopback need --api-keys")
    port: int = pydantic.Field(8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    api_keys: str | None = pydantic.Field(
        None, description="file of `tenant:sha256` lines; none: only this machine is served, without a key"
    )
    store: str = pydantic.Field(
        "runs/sessions", description="where sessions are kept: a directory, s3://, redis:// or memory: (one replica)"
    )
    session_ttl_s: float | None = pydantic.Field(
        604_800.0, gt=0, description="seconds after its last change that a session is kept; none: for ever"
    )
    max_sessions: int | None = pydantic.Field(100_000, ge=1, description="sessions in the store, of all tenants")
    kept_versions: int = pydantic.Field(
        0, ge=0, description="earlier versions of a session that a fork may begin at, each as large as the session"
    )
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where a replica's model is: cpu or cuda")
    replica_cpus: float = pydantic.Field(1.0, ge=0, description="cores that a replica reserves")
    min_replicas: int = pydantic.Field(1, ge=1, description="replicas, each with the model, at least")
    max_replicas: int = pydantic.Field(1, ge=1, description="replicas at most; more come as segments queue")
    segments_per_replica: int = pydantic.Field(64, ge=1, description="queued segments that call for one replica more")
    scale_up_after_s: float = pydantic.Field(30.0, ge=0, description="seconds that they call before one more starts")
    scale_down_after_s: float = pydantic.Field(600.0, ge=0, description="seconds without a call before one is ended")
    num_slots: int = pydantic.Field(16, ge=1, description="requests that a replica writes for at the same time")
    rows_read: int = pydantic.Field(4, ge=1, description="segments read in one step")
    write_steps_per_read: int = pydantic.Field(8, ge=1, description="steps of writing to one of reading")
    prefix_cache_bytes: Count = pydantic.Field(2**28, ge=0, description="bytes of the prefix cache of a replica")
    max_requests: int = pydantic.Field(256, ge=1, description="requests in a replica; a further one gets a 429")
    max_body_bytes: Count = pydantic.Field(2**23, ge=1024, description="bytes of a JSON body, at most")
    max_append_bytes: Count = pydantic.Field(2**25, ge=1024, description="bytes of a text that is streamed to append")
    max_prompt_tokens: Count = pydantic.Field(2**22, ge=1, description="tokens that one request may have read")
    max_new_tokens: Count = pydantic.Field(4096, ge=1, description="tokens that one request may have written")
    request_timeout_s: float = pydantic.Field(
        600.0, gt=0, description="seconds that a body may take to come, and then its request"
    )
    body_timeout_s: float = pydantic.Field(30.0, gt=0, description="seconds without a further part of a body")
    drain_timeout_s: float = pydantic.Field(
        60.0, ge=0, description="seconds that a leaving replica waits for requests, then summaries"
    )

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ServeConfig":
        if self.api_keys is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} would serve other machines without a key; "
                "give --api-keys FILE, or --host 127.0.0.1"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"--max-replicas {self.max_replicas} is less than --min-replicas {self.min_replicas}")
        if self.store == "memory:" and self.max_replicas > 1:
            raise ValueError("--store memory: is for one replica; replicas share a directory, s3:// or redis://")
        return self

    @property
    def served_name(self) -> str:
        return self.model_name or self.model.rstrip("/").rpartition("/")[2] or "model"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
