"""A server for tests: a tiny model behind the whole application, on a port of loopback, in a thread."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

import rmt_core
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.app import create_app
from pipelines.serving.auth import Key
from pipelines.serving.chat import ChatFormat
from pipelines.serving.engine import Engine, Settings
from pipelines.serving.front import Front
from pipelines.serving.serve_config import ServeConfig
from pipelines.serving.service import Service
from pipelines.serving.sessions import Limits, Sessions
from pipelines.serving.store import Store
from pipelines.serving.store_memory import MemoryStore
from tests.rmt_core.tiny import RMT, tiny_model

SEGMENT_LEN = 8
MODEL = tiny_model(RMT, segment_len=SEGMENT_LEN, vocab_size=257)
NAME = "tiny"
BYTES = ByteTokenizer()


def make_config(**settings: Any) -> ServeConfig:
    return ServeConfig(**{"model": NAME, "store": "memory:", "drain_timeout_s": 0.2, **settings})


def make_app(
    config: ServeConfig,
    keys: Sequence[Key] | None = None,
    store: Store | None = None,
    chat: ChatFormat | None = None,
    fingerprint: str = "f" * 64,
) -> tuple[FastAPI, Front]:
    settings = Settings(num_slots=config.num_slots, prefix_bytes=config.prefix_cache_bytes, server_key=b"key")
    engine = Engine(MODEL, settings, fingerprint=fingerprint, tokenizer=BYTES)
    sessions = Sessions(
        store if store is not None else MemoryStore(),
        engine.start(),
        fingerprint=engine.fingerprint,
        limits=Limits(config.session_ttl_s, config.max_sessions, kept_versions=config.kept_versions),
    )
    service = Service(engine, sessions, max_requests=config.max_requests)
    front = Front(service, BYTES, config, chat or ChatFormat(None))
    return create_app(front, keys), front


@dataclass
class Running:
    url: str
    app: FastAPI
    front: Front
    http: httpx.Client


@contextlib.contextmanager
def running(
    *,
    keys: Sequence[Key] | None = None,
    key: str | None = None,
    store: Store | None = None,
    chat: ChatFormat | None = None,
    fingerprint: str = "f" * 64,
    **settings: Any,
) -> Iterator[Running]:
    """A server that is ready; `key` is the client's."""
    app, front = make_app(make_config(**settings), keys, store, chat, fingerprint)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            url = f"http://127.0.0.1:{port}"
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
                yield Running(url, app, front, http)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def written(prompt: Sequence[int], num_new: int) -> str:
    """What the model writes, without any server."""
    tokens = rmt_core.generate(MODEL, [list(prompt)], num_new).tokens[0]
    return BYTES.decode(tokens[: tokens.index(BYTES.eos_id)] if BYTES.eos_id in tokens else tokens)


def until(condition: Any, what: str, timeout_s: float = 20.0) -> None:
    """Wait for something that happens elsewhere."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)
