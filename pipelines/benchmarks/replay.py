"""Replay against full back-propagation, and the replay of another implementation: what is kept, time, equality.

Axes: B rows, N tokens of a text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import rmt_core
from rmt_core.state import leaves

from . import peer
from .measuring import RMT, Compared, build, compared, random_tokens, take_turns, tell

# The promises: no figure may be larger.
MAX_GROWTH = 0.005  # bytes that replay keeps more a segment, as a fraction of what full back-propagation does
MAX_TIME_RATIO = 1.35  # replay's time, to that of full back-propagation
MAX_TIME_RATIO_SLOWED = 1.0  # the same where full back-propagation is slowed by its own size
SLOWED = 1.35  # full back-propagation takes so many times as long a segment as for the fewest segments
MAX_DIFFERENCE = 1e-4  # of gradients, to the largest number in a parameter's gradient; float32


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 384  # of the model that is trained, and of the other implementation's
    num_layers: int = 4
    segment_len: int = 256
    num_rows: int = 1
    segments: tuple[int, ...] = (4, 16, 64)  # of a text
    repeats: tuple[int, ...] = (9, 7, 5)  # timed rounds of each, at least 2


QUICK = Sizes(width=32, num_layers=2, segment_len=16, segments=(2, 3), repeats=(2, 2))


def sizes(quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


class Kept:
    """Bytes that autograd keeps for the backward pass: now, and at most so far. A storage counts once, weights never.

    Used as a context; works for what goes forward and backward inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.now = self.peak = 0
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._uses: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def _pack(self, tensor: Tensor) -> "_Held":
        return _Held(self, tensor.detach())  # an output would hold the graph that holds it

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._weights:
            return
        before = self._uses.get(key, 0)
        self._uses[key] = before + change
        if before == 0 or before + change == 0:
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor, counted for as long as it is held."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.count(tensor, 1)

    def __del__(self) -> None:
        self.kept.count(self.tensor, -1)


def replay(sizes: Sizes, device: str) -> dict[str, Any]:
    """Both ways of both implementations on the same texts, taking turns."""
    tell("Replay's time to that of full back-propagation, the most that each keeps, and how far their gradients differ")
    model = build(sizes.width, sizes.num_layers, sizes.segment_len, RMT, device).train()
    other, reason = peer.build_peer(sizes, RMT["num_tokens"], device)
    if other is None:
        tell(f"without the other implementation: {reason}")
    rows = []
    columns = (("segments", 9), ("full", 10), ("replay", 10), ("ratio", 7), ("quartiles", 12), ("full keeps", 11))
    tell(" ".join(f"{name:>{width}}" for name, width in (*columns, ("replay", 10), ("difference", 10))))
    for num_segments, repeats in zip(sizes.segments, sizes.repeats, strict=True):
        rows.append(found := _compare(sizes, model, other, num_segments, repeats))
        _tell(num_segments, "rmt_core", found["rmt_core"])
        if other is not None:
            _tell(num_segments, "other", found["other"])
            tell(f"{'':>9} the other's replay takes {found['other']['to_rmt_core']['ratio']:.2f} of rmt_core's time")
    growth = {name: _growth(rows, name) for name in rows[0]}
    for name, grown in growth.items():
        tell(f"{name:>9} replay keeps {grown:.3%} of what full back-propagation keeps more for each further segment")
    return {
        "segments": list(sizes.segments),
        "parameters": {"rmt_core": _size(model), **({} if other is None else {"other": _size(other)})},
        "growth": growth,
        "measured": rows,
        "promises": _promises(sizes.segments, [row["rmt_core"] for row in rows], growth["rmt_core"]),
    }


def _compare(
    sizes: Sizes, model: rmt_core.RecurrentModel, other: Any, num_segments: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """The figures of one text length: by implementation."""
    device = model.backbone.lm.device.type
    tokens = random_tokens(sizes.num_rows, num_segments * sizes.segment_len + 1, device)
    text, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    modules: dict[str, nn.Module] = {"rmt_core": model}
    ways: dict[str, dict[str, Callable[[], object]]] = {
        "rmt_core": {mode: partial(rmt_core.backward, model, text, labels, mode=mode) for mode in ("full", "replay")}
    }
    if other is not None:
        modules["other"] = other
        ways["other"] = {"full": partial(peer.full, other, tokens), "replay": partial(peer.replay, other, tokens)}
    found: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        kept, grads = {}, {}
        for way, work in ways[name].items():  # and so both are warm
            module.zero_grad(set_to_none=True)
            with Kept(module) as counted:
                work()
            kept[way] = counted.peak
            grads[way] = [p.grad for p in module.parameters() if p.grad is not None]
        if name == "rmt_core":
            kept["replay"] += (num_segments - 1) * _between_bytes(model, sizes.num_rows)
        found[name] = {"kept_bytes": kept, "max_difference": _difference(grads["replay"], grads["full"])}
        module.zero_grad(set_to_none=True)
    works = {f"{name} {way}": work for name, both in ways.items() for way, work in both.items()}
    taken = take_turns(works, repeats, device)
    for name in found:
        full, replayed = taken[f"{name} full"], taken[f"{name} replay"]
        found[name] |= {"time": compared(replayed, full)._asdict()}
    if other is not None:
        found["other"]["to_rmt_core"] = compared(taken["other replay"], taken["rmt_core replay"])._asdict()
    return found


def _between_bytes(model: rmt_core.RecurrentModel, num_rows: int) -> int:
    """What replay keeps between two segments besides activations: the state, and where random numbers stood."""
    device = leaves(model.init_state(1))[0].device
    random = torch.get_rng_state().nbytes + (torch.cuda.get_rng_state(device).nbytes if device.type == "cuda" else 0)
    return sum(leaf.nbytes for leaf in leaves(model.init_state(num_rows))) + random


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of gradients, to the largest number in the parameter's."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True))


def _growth(rows: list[dict[str, Any]], name: str) -> float:
    """Bytes that replay keeps more from the fewest to the most segments, as a fraction of full back-propagation's."""
    most, least = rows[-1][name]["kept_bytes"], rows[0][name]["kept_bytes"]
    return (most["replay"] - least["replay"]) / (most["full"] - least["full"])


def _promises(segments: tuple[int, ...], rows: list[dict[str, Any]], growth: float) -> dict[str, bool]:
    promises = {"replay_growth": growth <= MAX_GROWTH}
    for count, row in zip(segments, rows, strict=True):
        slowed = row["time"]["second_s"] / count > SLOWED * rows[0]["time"]["second_s"] / segments[0]
        limit = MAX_TIME_RATIO_SLOWED if slowed and count >= 16 else MAX_TIME_RATIO
        promises[f"replay_time_{count}_segments"] = Compared(**row["time"]).lowest() <= limit
    promises["replay_equals_full"] = all(row["max_difference"] <= MAX_DIFFERENCE for row in rows)
    return promises


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _tell(num_segments: int, name: str, row: dict[str, Any]) -> None:
    time, kept = row["time"], row["kept_bytes"]
    low, high = time["ratio_quartiles"]
    times = f"{time['second_s']:>8.2f} s {time['first_s']:>8.2f} s {time['ratio']:>7.3f} {low:>6.3f}-{high:.3f}"
    sizes = f"{kept['full'] / 1e6:>8.1f} MB {kept['replay'] / 1e6:>7.1f} MB"
    tell(f"{num_segments:>9} {times} {sizes} {row['max_difference']:>10.1e}  {name}")
