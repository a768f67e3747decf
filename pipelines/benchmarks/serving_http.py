"""What batching gains over HTTP: sessions that write at the same time against the same server one at a time.

The server is a process of its own, with the whole application but for Ray's proxy, which both ways would pass alike.
"""

import http.client
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import uvicorn
from transformers import LlamaConfig

import rmt_core
from pipelines.config import build
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.app import create_app
from pipelines.serving.chat import ChatFormat
from pipelines.serving.engine import Engine, Settings
from pipelines.serving.front import Front
from pipelines.serving.serve_config import ServeConfig
from pipelines.serving.service import Service
from pipelines.serving.sessions import Sessions
from pipelines.serving.store_memory import MemoryStore

from .measuring import RMT, Job, compared, tell

MIN_BATCHING = 4.0  # times the throughput of one session at a time
_WAIT_S = 120.0


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 256
    num_layers: int = 4
    segment_len: int = 256
    num_sessions: int = 16
    num_prompt: int = 64
    num_new: int = 48
    repeats: int = 5  # timed rounds


QUICK = Sizes(width=32, num_layers=2, segment_len=16, num_sessions=4, num_prompt=8, num_new=6, repeats=2)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


def serve_http(job: Job) -> dict[str, Any]:
    """Throughput together and alone, with equal texts."""
    sizes: Sizes = job.sizes
    prompts = ["".join(chr(97 + (i * j) % 26) for j in range(sizes.num_prompt)) for i in range(sizes.num_sessions)]
    written: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(sizes.num_sessions) as clients:
        model = _model(sizes, job.device)
        rmt_core.save(folder, model)
        with _server(folder, sizes, job.device) as port:

            def together() -> None:
                written["together"] = list(clients.map(lambda prompt: _ask(port, prompt, sizes.num_new), prompts))

            def alone() -> None:
                written["alone"] = [_ask(port, prompt, sizes.num_new) for prompt in prompts]

            together()  # kernels, and which batch sizes agree
            alone()
            taken = _take_turns({"together": together, "alone": alone}, sizes.repeats)
    to_alone = compared(taken["alone"], taken["together"])
    num_written = sizes.num_sessions * sizes.num_new
    for name, times in taken.items():
        tell(f"{name:>30} {num_written / min(times):>9.1f} tokens a second over HTTP")
    promises = {
        "batching_over_http": to_alone.ratio >= MIN_BATCHING,
        "texts_are_those_alone": written["together"] == written["alone"] == _wanted(model, prompts, sizes.num_new),
    }
    for promise, kept in promises.items():
        tell(f"{promise:>30} {'not judged' if job.quick else 'kept' if kept else 'MISSED'}")
    return {
        "promises": promises,
        "tokens_per_s": {name: num_written / min(times) for name, times in taken.items()},
        "to_alone": to_alone._asdict(),
    }


def _take_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds by the clock, since the work is done in another process; every other round goes backwards."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats):
        for name in list(works)[:: 1 if i % 2 else -1]:
            begun = time.perf_counter()
            works[name]()
            taken[name].append(time.perf_counter() - begun)
    return taken


def _model(sizes: Sizes, device: str) -> rmt_core.RecurrentModel:
    """A llama with random weights that speaks bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.width // (64 if sizes.width >= 128 else 8),
        intermediate_size=sizes.width * 8 // 3,
        vocab_size=ByteTokenizer.vocab_size,
    )
    return rmt_core.build(backbone=config, memory=RMT, segment_len=sizes.segment_len).to(device).eval()


def _wanted(model: rmt_core.RecurrentModel, prompts: Sequence[str], num_new: int) -> list[str]:
    """What the library writes, without a server."""
    bytes_ = ByteTokenizer()
    tokens = [rmt_core.generate(model, [bytes_.encode(prompt).tolist()], num_new).tokens[0] for prompt in prompts]
    return [bytes_.decode(row) for row in tokens]


def _ask(port: int, prompt: str, num_new: int) -> str:
    """What the server writes after a prompt."""
    body = {"model": "m", "prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {content['error']['message']}")
    return content["choices"][0]["text"]


@contextmanager
def _server(folder: str, sizes: Sizes, device: str) -> Iterator[int]:
    """The port of a server in a process of its own."""
    context = get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(folder, sizes, device, its), daemon=True)
    process.start()
    try:
        if not ours.poll(_WAIT_S):
            raise RuntimeError("the server did not start")
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(folder: str, sizes: Sizes, device: str, started: Connection) -> None:
    torch.set_num_threads(1)
    model, bytes_ = rmt_core.load(folder, device), ByteTokenizer()
    settings = Settings(num_slots=sizes.num_sessions, prefix_bytes=0)
    engine = Engine(model, settings, fingerprint=rmt_core.fingerprint(model), tokenizer=bytes_)
    sessions = Sessions(MemoryStore(), engine.start(), fingerprint=engine.fingerprint)
    config = build(ServeConfig, {"model": folder, "model_name": "m", "store": "memory:"})
    app = create_app(Front(Service(engine, sessions), bytes_, config, ChatFormat(None)), None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started.send(listener.getsockname()[1])  # connections wait until it accepts them
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
