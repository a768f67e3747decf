"""What each kind of memory costs: bytes of a session, time per token, against a cache of keys and values.

Axes: B rows, T tokens of a segment, H heads, C positions with keys and values, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.backbone import Placement
from rmt_core.state import leaves

from .measuring import RMT, build, compared, random_tokens, take_turns, tell

MAX_DIFFERENCE = 1e-3  # of hidden states, float32

# Settings that one would use with segments of some hundred tokens; other kinds have their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "rmt": {"num_tokens": RMT["num_tokens"]},
    "armt": {"num_tokens": RMT["num_tokens"]},
    "memformer": {"num_slots": 32},
}
AS_LONG_AS_A_SEGMENT = {"xl": "cache_len", "lamemo": "cache_len", "bmojo": "window"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 256  # of the model that reads and writes
    num_layers: int = 4
    segment_len: int = 256
    num_segments: int = 4  # that are read at once
    repeats: int = 5  # timed rounds
    cache_lens: tuple[int, ...] = (32_768, 131_072)  # tokens of which keys and values are kept
    cache_tokens: int = 16  # that are written behind them at once
    cache_repeats: int = 3


QUICK = Sizes(width=32, num_layers=2, segment_len=16, num_segments=2, repeats=2, cache_lens=(64, 128), cache_tokens=2)


def sizes(quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


class KeyValues:
    """Keys and values of C past positions, allocated once with room for more: a cache that never copies.

    In the form that the backbone's attention updates; past positions hold random numbers.
    """

    def __init__(self, model: RecurrentModel, num_past: int, num_new: int) -> None:
        config: Any = model.backbone.lm.config
        like = model.backbone.lm.get_input_embeddings().weight
        shape = (1, config.num_key_value_heads, num_past + num_new, config.head_dim)
        generator = torch.Generator(like.device).manual_seed(0)
        self.num_past = num_past
        self.kept = [
            tuple(torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def nbytes(self) -> int:
        """Of the past positions."""
        room = self.kept[0][0].shape[2]
        return sum(part.nbytes for pair in self.kept for part in pair) * self.num_past // room

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keep (B, H, n, D / H) behind what is there; gives all so far."""
        end = self.num_past + keys.shape[2]
        kept_keys, kept_values = self.kept[layer]
        kept_keys[:, :, self.num_past : end] = keys
        kept_values[:, :, self.num_past : end] = values
        return kept_keys[:, :, :end], kept_values[:, :, :end]


@torch.inference_mode()
def attend_to_all(model: RecurrentModel, tokens: Tensor, cache: KeyValues) -> Tensor:
    """The plain model over tokens (B, n) behind a cache: hidden states (B, n, D).

    Several tokens at once see all keys, later ones too: that changes what comes out and not what it costs.
    """
    count, end = tokens.shape[1], cache.num_past + tokens.shape[1]
    mask = None if count == 1 else torch.ones(1, 1, 1, end, dtype=torch.bool, device=tokens.device)
    positions = torch.arange(cache.num_past, end, device=tokens.device)[None]
    h = model.backbone.embed(tokens)
    for block in model.backbone.blocks(h, Placement(positions, mask=mask, kv=cache)):
        h = block(h)
    return model.backbone.norm(h)


def kinds(sizes: Sizes, device: str) -> dict[str, Any]:
    """Every kind that a causal model can have, and the cache at each length, taking turns."""
    models, skipped = _models(sizes, device)
    for name, reason in skipped.items():
        tell(f"without {name}: {reason}")
    found, caches = _measure_kinds(sizes, models, device), _measure_caches(sizes, models["none"], device)
    for each in found.values():
        for figure in ("bytes", "read_us", "write_us"):
            each[f"{figure}_to_caches"] = [each[figure] / cache[figure] for cache in caches]
    _tell(found, caches)
    promises = {
        "states_smaller_than_caches": all(max(each["bytes_to_caches"]) < 1 for each in found.values()),
        "same_outputs": max(each["max_difference"] for each in (*found.values(), *caches)) <= MAX_DIFFERENCE,
    }
    return {"kinds": found, "caches": caches, "skipped": skipped, "promises": promises}


def _tell(found: dict[str, dict[str, Any]], caches: list[dict[str, Any]]) -> None:
    last = caches[-1]["num_tokens"]
    tell(f"Bytes of a session, microseconds a token; then {last} tokens' keys and values, as multiples of them")
    tell(f"{'kind':>12} {'bytes':>12} {'to read':>9} {'to write':>9} {'bytes':>9} {'read':>7} {'write':>7}")
    for name, each in found.items():
        line = f"{name:>12} {each['bytes']:>12} {each['read_us']:>9.1f} {each['write_us']:>9.1f}"
        times = [each[f"{figure}_to_caches"][-1] for figure in ("bytes", "read_us", "write_us")]
        shown = [f"{1 / part:.1f}" if part else "-" for part in times]
        tell(f"{line} {shown[0]:>9} {shown[1]:>7} {shown[2]:>7}")
    for cache in caches:
        tell(f"{cache['num_tokens']:>12} {cache['bytes']:>12} {cache['read_us']:>9.1f} {cache['write_us']:>9.1f}")


def _models(sizes: Sizes, device: str) -> tuple[dict[str, RecurrentModel], dict[str, str]]:
    """The same backbone with each kind; and why some cannot be had."""
    models, skipped = {}, {}
    for kind in rmt_core.MEMORIES:
        memory = {"kind": kind, **SETTINGS.get(kind, {})}
        if kind in AS_LONG_AS_A_SEGMENT:
            memory[AS_LONG_AS_A_SEGMENT[kind]] = sizes.segment_len
        try:
            models[kind] = build(sizes.width, sizes.num_layers, sizes.segment_len, memory, device)
        except ValueError as error:
            skipped[kind] = str(error)
    return models, skipped


def _measure_kinds(sizes: Sizes, models: dict[str, RecurrentModel], device: str) -> dict[str, dict[str, Any]]:
    """Bytes of a session's state; microseconds a token to read segments, and to write one with its closing.

    While a segment is written, its own keys and values are there too; a session is stored without them.
    """
    size = sizes.segment_len
    text = random_tokens(1, sizes.num_segments * size, device)
    found: dict[str, dict[str, Any]] = {}
    read: dict[str, Callable[[], object]] = {}
    write: dict[str, Callable[[], object]] = {}
    for kind, model in models.items():
        whole = rmt_core.read(model, rmt_core.open_session(model, 1), text)
        parts = rmt_core.open_session(model, 1)
        for part in text.split(size // 2 + 1, dim=1):
            parts = rmt_core.read(model, parts, part)
        read[kind] = partial(rmt_core.read, model, whole, text)
        write[kind] = partial(rmt_core.generate, model, text[:, :1], size, session=whole)
        found[kind] = {
            "memory": model.config.memory[0],
            "bytes": sum(leaf.nbytes for leaf in leaves(whole.state)),
            "max_difference": float((whole.hidden - parts.hidden).abs().max()),
        }
    reading = take_turns(read, sizes.repeats, device)
    writing = take_turns(write, sizes.repeats, device)
    for kind in models:
        found[kind] |= {
            "read_us": 1e6 * min(reading[kind]) / text.shape[1],
            "write_us": 1e6 * min(writing[kind]) / size,
            "read_to_none": compared(reading[kind], reading["none"])._asdict(),
            "write_to_none": compared(writing[kind], writing["none"])._asdict(),
        }
    return found


def _measure_caches(sizes: Sizes, model: RecurrentModel, device: str) -> list[dict[str, Any]]:
    """The same of the plain model with keys and values of all past tokens; reading by segments, too."""
    size, count = sizes.segment_len, sizes.cache_tokens
    segment = random_tokens(1, size, device)
    found = []
    for num_past in sizes.cache_lens:
        cache = KeyValues(model, num_past, size)

        @torch.inference_mode()
        def write(cache: KeyValues = cache) -> None:
            for token in segment[:, :count].split(1, dim=1):
                model.backbone.head(attend_to_all(model, token, cache))

        works: dict[str, Callable[[], object]] = {"write": write, "read": partial(attend_to_all, model, segment, cache)}
        taken = take_turns(works, sizes.cache_repeats, device)
        found.append(
            {
                "num_tokens": num_past,
                "bytes": cache.nbytes,
                "read_us": 1e6 * min(taken["read"]) / size,
                "write_us": 1e6 * min(taken["write"]) / count,
                "max_difference": _cache_difference(model, segment),
            }
        )
        del cache, works
    return found


@torch.inference_mode()
def _cache_difference(model: RecurrentModel, segment: Tensor) -> float:
    """Between the last of a segment's tokens behind the keys and values of the others, and Hugging Face's forward."""
    cache = KeyValues(model, 0, segment.shape[1])
    hidden = segment.new_zeros(())
    for i, token in enumerate(segment.split(1, dim=1)):
        cache.num_past = i
        hidden = attend_to_all(model, token, cache)
    wanted = model.backbone.lm.model(segment, use_cache=False).last_hidden_state
    return float((hidden[:, -1] - wanted[:, -1]).abs().max())
