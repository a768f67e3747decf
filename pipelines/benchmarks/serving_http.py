"""What batching gains over HTTP: sessions that write at the same time against the same server one at a time.

Sessions are made, have a text appended and then write, all through a store in a directory; completions, which need no
store, and Hugging Face's own `generate` in this process are measured beside them. The server is a process of its own,
with the whole application but for Ray's proxy, which both ways would pass alike.
"""

import http.client
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

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
from pipelines.serving.store_directory import DirectoryStore

from .measuring import RMT, Job, compared, tell
from .serving import hugging_face

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


class Answer(NamedTuple):
    """What the server wrote."""

    text: str
    num_tokens: int


def serve_http(job: Job) -> dict[str, Any]:
    """Throughput together and alone, with equal texts of as many tokens."""
    sizes: Sizes = job.sizes
    prompts = ["".join(chr(97 + (i * j) % 26) for j in range(sizes.num_prompt)) for i in range(sizes.num_sessions)]
    written: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(sizes.num_sessions) as clients:
        model = _model(sizes, job.device)
        rmt_core.save(folder, model)
        with _server(folder, sizes, job.device) as port:

            def work(name: str, ask: Callable[[int, str, int], Answer], each: Callable[..., Iterable[Answer]]) -> None:
                written[name] = list(each(lambda prompt: ask(port, prompt, sizes.num_new), prompts))

            bytes_ = ByteTokenizer()
            tokens = [bytes_.encode(prompt).tolist() for prompt in prompts]
            works: dict[str, Callable[[], object]] = {
                f"{kind}_{name}": partial(work, f"{kind}_{name}", ask, each)
                for kind, ask in (("sessions", _ask_session), ("completions", _ask))
                for name, each in (("together", clients.map), ("alone", map))
            }
            works["hugging_face"] = partial(hugging_face, model, tokens, sizes.num_new)
            for each in works.values():  # kernels, and which batch sizes agree
                each()
            taken = _take_turns(works, sizes.repeats)
    num_written = sizes.num_sessions * sizes.num_new
    for name, times in taken.items():
        tell(f"{name:>30} {num_written / min(times):>9.1f} tokens a second")
    ratios = {
        "sessions_to_alone": compared(taken["sessions_alone"], taken["sessions_together"]),
        "completions_to_alone": compared(taken["completions_alone"], taken["completions_together"]),
        "sessions_to_hugging_face": compared(taken["hugging_face"], taken["sessions_together"]),
    }
    wanted = [Answer(text, sizes.num_new) for text in _wanted(model, prompts, sizes.num_new)]
    promises = {
        "batching_over_http": ratios["sessions_to_alone"].ratio >= MIN_BATCHING,
        "texts_are_those_alone": all(found == wanted for found in written.values()),
    }
    for promise, kept in promises.items():
        tell(f"{promise:>30} {'not judged' if job.quick else 'kept' if kept else 'MISSED'}")
    return {
        "promises": promises,
        "tokens_per_s": {name: num_written / min(times) for name, times in taken.items()},
        **{name: ratio._asdict() for name, ratio in ratios.items()},
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


def _ask(port: int, prompt: str, num_new: int) -> Answer:
    """What the server writes after a prompt."""
    body = {"model": "m", "prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True}
    found = _post(port, "/v1/completions", body)
    return Answer(found["choices"][0]["text"], found["usage"]["completion_tokens"])


def _ask_session(port: int, prompt: str, num_new: int) -> Answer:
    """What a session writes that has read a prompt."""
    path = f"/v1/sessions/{_post(port, '/v1/sessions', {})['id']}"
    _post(port, f"{path}/append", {"text": prompt})
    found = _post(port, f"{path}/generate", {"max_tokens": num_new, "ignore_eos": True})
    return Answer(found["text"], found["usage"]["completion_tokens"])


def _post(port: int, path: str, body: Mapping[str, object]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"the server answered {answer.status}: {content['error']['message']}")
    return content


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
    sessions = Sessions(DirectoryStore(f"{folder}/sessions"), engine.start(), fingerprint=engine.fingerprint)
    config = build(ServeConfig, {"model": folder, "model_name": "m"})
    app = create_app(Front(Service(engine, sessions), bytes_, config, ChatFormat(None)), None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started.send(listener.getsockname()[1])  # connections wait until it accepts them
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
