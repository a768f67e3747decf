"""What batching sessions gains, what keeping one costs, and what a known prefix saves.

Axes: V vocabulary.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import rmt_core
from pipelines.serving import records
from pipelines.serving.engine import Engine, Settings
from pipelines.serving.readers import Position
from pipelines.serving.records import KEPT_RESULTS, Record, Result, digest_of, hashed
from pipelines.serving.requests import Failed, Request
from pipelines.serving.serve_config import ServeConfig
from pipelines.serving.sessions import Limits, Sessions
from pipelines.serving.store_directory import DirectoryStore
from rmt_core import RecurrentModel
from rmt_core.state import leaves

from .measuring import RMT, VOCAB, Job, build, compared, random_tokens, take_turns, tell

MIN_BATCHING = 4.0  # times the throughput of one session at a time
MIN_SESSIONS = {"rmt": 1000.0, "armt": 40.0}  # times those of the same bytes of keys and values
MAX_OVERHEAD = 0.05  # of a record, and of a store of it, to its state's bytes
MIN_PREFIX = 50.0  # times sooner to the first token
KV_TOKENS = 32_768
FLOAT_BYTES = 4
_COMMITS = 6  # of a session whose store is looked at


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 256  # of the model that decodes
    num_layers: int = 4
    segment_len: int = 256
    num_sessions: int = 16
    num_prompt: int = 64
    num_new: int = 48
    repeats: int = 5  # timed rounds
    prefix_tokens: int = 65_536
    prefix_repeats: int = 3
    stored_width: int = 576  # of the model whose sessions are stored: as SmolLM2-135M
    stored_layers: int = 30


QUICK = Sizes(
    width=32,
    num_layers=2,
    segment_len=16,
    num_sessions=4,
    num_prompt=8,
    num_new=6,
    repeats=2,
    prefix_tokens=64,
    prefix_repeats=2,
    stored_width=96,
    stored_layers=2,
)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


def serve(job: Job) -> dict[str, Any]:
    """All parts, one after the other."""
    sizes: Sizes = job.sizes
    parts = {"batching": batching(sizes, job.device), "storing": storing(sizes), "prefix": prefix(sizes, job.device)}
    promises: dict[str, bool] = {}
    for part in parts.values():
        promises |= part.pop("promises")
    for promise, kept in promises.items():
        tell(f"{promise:>30} {'not judged' if job.quick else 'kept' if kept else 'MISSED'}")
    return {"promises": promises, **parts}


# --- batching ---------------------------------------------------------------------------------------


def batching(sizes: Sizes, device: str) -> dict[str, Any]:
    """Sessions that write side by side, one after the other, and Hugging Face's own `generate`, in turn."""
    model = build(sizes.width, sizes.num_layers, sizes.segment_len, RMT, device).eval()
    prompts = random_tokens(sizes.num_sessions, sizes.num_prompt, "cpu").tolist()
    engine = _engine(model, num_slots=sizes.num_sessions)
    written: dict[str, list[list[int]]] = {}

    def together() -> None:
        written["together"] = answers(engine, [Request(prompt, sizes.num_new) for prompt in prompts])

    def alone() -> None:
        written["alone"] = [answers(engine, [Request(prompt, sizes.num_new)])[0] for prompt in prompts]

    works: dict[str, Callable[[], object]] = {
        "together": together,
        "alone": alone,
        "hugging_face": partial(hugging_face, model, prompts, sizes.num_new),
    }
    for work in works.values():  # kernels, and which batch sizes agree
        work()
    taken = take_turns(works, sizes.repeats, device)
    num_written = sizes.num_sessions * sizes.num_new
    to_alone = compared(taken["alone"], taken["together"])
    to_hugging_face = compared(taken["hugging_face"], taken["together"])
    wanted = [rmt_core.generate(model, [prompt], sizes.num_new).tokens[0] for prompt in prompts]
    tell(f"{sizes.num_sessions} sessions, {sizes.num_new} tokens each: tokens a second")
    for name in works:
        tell(f"{name:>30} {num_written / min(taken[name]):>9.1f}")
    return {
        "tokens_per_s": {name: num_written / min(taken[name]) for name in works},
        "to_alone": to_alone._asdict(),
        "to_hugging_face": to_hugging_face._asdict(),
        "promises": {
            "batching": to_alone.ratio >= MIN_BATCHING,
            "batched_tokens_are_those_alone": written["together"] == written["alone"] == wanted,
        },
    }


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """What the engine writes to each of the requests, all at once."""
    readers = [engine.add(request) for request in requests]
    while engine.busy:
        failed = [event for _, event in engine.step() if isinstance(event, Failed)]
        if failed:
            raise RuntimeError(failed[0].message)
    return [reader.written for reader in readers]


def hugging_face(model: RecurrentModel, prompts: Sequence[Sequence[int]], num_new: int) -> None:
    """The plain backbone, which has no memory, one prompt after the other with its cache of keys and values."""
    lm: Any = model.backbone.lm
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=lm.device)
        lm.generate(tokens, attention_mask=torch.ones_like(tokens), **_greedy(num_new))


def _greedy(num_new: int) -> dict[str, Any]:
    return {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}


def _engine(model: RecurrentModel, **settings: Any) -> Engine:
    return Engine(model, Settings(**{"prefix_bytes": 0, **settings}), fingerprint=rmt_core.fingerprint(model))


# --- storing ----------------------------------------------------------------------------------------


def storing(sizes: Sizes) -> dict[str, Any]:
    """Bytes of a session's state and of its record, against keys and values of 32k tokens of the same model."""
    found: dict[str, Any] = {}
    for kind in MIN_SESSIONS:
        model = _stored_model(sizes, kind)
        config: Any = model.backbone.lm.config
        cache_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * KV_TOKENS
        cache_bytes *= FLOAT_BYTES
        state_bytes, overhead = _record_bytes(model)
        in_store = _store_overhead(model)
        found[kind] = {
            "state_bytes": state_bytes,
            "cache_bytes": cache_bytes,
            "sessions_per_gb": 10**9 / state_bytes,
            "caches_per_gb": 10**9 / cache_bytes,
            "sessions_to_caches": cache_bytes / state_bytes,
            "record_overhead_fraction": overhead / state_bytes,
            "store_overhead_fraction": in_store / state_bytes,
        }
        tell(
            f"{kind:>30} {state_bytes} bytes of state, {cache_bytes / state_bytes:.0f} x as many sessions as caches of "
            f"{KV_TOKENS} tokens; record {overhead / state_bytes:+.2%}, in a directory {in_store / state_bytes:+.2%}"
        )
    promises = {f"sessions_{kind}": found[kind]["sessions_to_caches"] >= least for kind, least in MIN_SESSIONS.items()}
    for what in ("record", "store"):
        promises[f"{what}_overhead"] = all(each[f"{what}_overhead_fraction"] <= MAX_OVERHEAD for each in found.values())
    return {**found, "promises": promises}


def _stored_model(sizes: Sizes, kind: str) -> RecurrentModel:
    """A llama with three query heads to one of keys and values, in float32, with little else than layers."""
    num_heads = sizes.stored_width // 64 if sizes.stored_width >= 192 else 3
    config = LlamaConfig(
        hidden_size=sizes.stored_width,
        num_hidden_layers=sizes.stored_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 3,
        head_dim=sizes.stored_width // num_heads,
        intermediate_size=8,  # no part of what a session keeps
        vocab_size=VOCAB,
        max_position_embeddings=4096,
    )
    memory = {"kind": kind, "num_tokens": RMT["num_tokens"]}
    return rmt_core.build(backbone=config, memory=memory, segment_len=sizes.segment_len).eval()


def _record_bytes(model: RecurrentModel) -> tuple[int, int]:
    """Of a session that has read and written: the state's bytes, and the record's beyond those of state and tokens."""
    position, result = _read_and_written(model)
    record = Record(hashed("session") * 2, 1, position, 1.7e9, (result,))
    state_bytes = sum(leaf.nbytes for leaf in leaves(position.state))
    data = records.to_bytes(record, rmt_core.fingerprint(model))
    return state_bytes, len(data) - state_bytes - _token_bytes(position, [result])


def _store_overhead(model: RecurrentModel) -> int:
    """Bytes of a directory that holds one session after some commits, kept as `serve` does if not told otherwise.

    Beyond those of its state and tokens: whatever else is kept of it, earlier versions too, is overhead.
    """
    position, result = _read_and_written(model)
    limits = Limits(kept_versions=ServeConfig.model_fields["kept_versions"].default)
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        store = DirectoryStore(directory)
        sessions = Sessions(store, position, fingerprint=rmt_core.fingerprint(model), limits=limits)
        sessions.create("tenant", "session")
        for _ in range(_COMMITS):
            sessions.commit(sessions.load("tenant", "session"), position, result)
        num_bytes = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    state_bytes = sum(leaf.nbytes for leaf in leaves(position.state))
    return num_bytes - state_bytes - _token_bytes(position, [result] * min(_COMMITS, KEPT_RESULTS))


def _read_and_written(model: RecurrentModel) -> tuple[Position, Result]:
    """Where a session stands that has read and written, and what it was answered."""
    engine = _engine(model)
    request = Request(random_tokens(1, model.segment_len + 7, "cpu")[0].tolist(), 4, request_id="r")
    reader = engine.add(request)
    while engine.busy:
        engine.step()
    result = Result(hashed("r"), digest_of(request), tuple(reader.written), reader.done())
    return reader.position(), result


def _token_bytes(position: Position, results: Sequence[Result]) -> int:
    return 4 * (len(position.open_tokens) + sum(len(result.tokens) for result in results))


# --- prefix -----------------------------------------------------------------------------------------


def prefix(sizes: Sizes, device: str) -> dict[str, Any]:
    """The time to the first token of a long text that was read before, against the same text read anew."""
    model = build(sizes.width, sizes.num_layers, sizes.segment_len, RMT, device).eval()
    engine = _engine(model, prefix_bytes=2**30, server_key=b"secret")
    tokens = random_tokens(1, sizes.prefix_tokens + 5, "cpu")[0].tolist()
    first: dict[str, list[list[int]]] = {}

    def known() -> None:
        first["known"] = answers(engine, [Request(tokens, 1)])

    def cold() -> None:
        engine.prefixes.clear()
        first["cold"] = answers(engine, [Request(tokens, 1)])

    for _ in range(2):  # kernels, and which batch sizes agree
        known()
    taken = take_turns({"known": known, "cold": cold}, sizes.prefix_repeats, device)
    ratio = compared(taken["cold"], taken["known"])
    longer = Request(tokens, 20)
    engine.prefixes.clear()
    same = answers(engine, [longer]) == answers(engine, [longer])
    tell(f"{'first token, cold':>30} {ratio.first_s:>9.3f} s, known {ratio.second_s:.4f} s, {ratio.ratio:.0f} x")
    return {
        "num_tokens": len(tokens),
        "cold_to_known": ratio._asdict(),
        "promises": {
            "known_prefix": ratio.ratio >= MIN_PREFIX,
            "known_prefix_same_output": same and first["known"] == first["cold"],
        },
    }
