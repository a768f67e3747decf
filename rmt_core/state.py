"""States as values: trees of batch-first tensors that go into a step and come out of it.

A state is a tensor, a tuple of states or a dictionary of states; every tensor has the batch as its first axis.
A state's shapes never change from one segment to the next, and nothing here edits a tensor in place.

Axes: B rows.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

State = Any  # Tensor | tuple[State, ...] | dict[str, State]; recursive aliases defeat the type checkers in use

FORMAT = "rmt-state-2"
UNSEALED = "0" * 64  # stands where the hash of all other bytes comes


class ForeignStateError(ValueError):
    """A whole state, but another model's; `notes` are what was written with it."""

    def __init__(self, message: str, notes: Any) -> None:
        super().__init__(message)
        self.notes = notes


def tree_map(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """`function` applied to each tensor of `state` (and the tensors at the same places of `others`)."""
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, tuple):
        return tuple(tree_map(function, *parts) for parts in zip(state, *others, strict=True))
    if isinstance(state, dict):
        return {key: tree_map(function, state[key], *(other[key] for other in others)) for key in state}
    raise TypeError(f"a state holds tensors, tuples and dictionaries, not {type(state).__name__}")


def leaves(state: State) -> list[Tensor]:
    """The tensors of a state, in a fixed order."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    return [tensor for part in parts for tensor in leaves(part)]


def detach(state: State) -> State:
    """The same values outside the gradient."""
    return tree_map(Tensor.detach, state)


def to(state: State, device: torch.device | str) -> State:
    """The state on `device`."""
    return tree_map(lambda tensor: tensor.to(device), state)


def where(rows: Tensor, chosen: State, otherwise: State) -> State:
    """Row by row: `chosen` where rows (B,) is true, else `otherwise`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b)

    return tree_map(pick, chosen, otherwise)


def select(state: State, rows: Tensor | Sequence[int]) -> State:
    """The rows with the given indices, in their order."""
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        raise ValueError("rows are true or false; give their indices: mask.nonzero().flatten()")

    def pick(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, torch.as_tensor(rows, dtype=torch.long, device=tensor.device))

    return tree_map(pick, state)


def stack(states: Sequence[State]) -> State:
    """Several states as one batch: their rows one after another."""
    if not states:
        raise ValueError("stack needs at least one state")
    return tree_map(lambda *tensors: torch.cat(tensors), states[0], *states[1:])


def place(state: State, rows: Tensor, values: State) -> State:
    """`state` with the rows of the given indices replaced by the rows of `values`."""
    return tree_map(lambda old, new: old.index_copy(0, rows, new), state, values)


def are_alike(a: State, b: State) -> bool:
    """Whether both are the same tree of tensors of equal shapes and types: states of one model, of as many rows."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(are_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(are_alike(a[key], b[key]) for key in a)
    return False


def zeroed(state: State) -> State:
    """A state that holds nothing: zeros in every tensor (the ablation "without memory")."""
    return tree_map(torch.zeros_like, state)


def shuffled(state: State) -> State:
    """Each row gets its neighbour's state (the ablation "another document's memory"); needs at least two rows."""
    if any(tensor.shape[0] < 2 for tensor in leaves(state)):
        raise ValueError("shuffling states needs at least 2 rows; got 1: evaluate with a larger batch")
    return tree_map(lambda tensor: tensor.roll(1, 0), state)


def num_floats(state: State) -> int:
    """How many floating-point numbers one row of the state holds."""
    return sum(tensor[0].numel() for tensor in leaves(state) if tensor.is_floating_point())


def norm(state: State) -> Tensor:
    """Root mean square over a row's floating-point numbers, (B,); empty where the state holds none."""
    parts = [tensor.detach().flatten(1).float() for tensor in leaves(state) if tensor.is_floating_point()]
    if not parts:
        return torch.empty(0)
    return torch.cat(parts, dim=1).square().mean(1).sqrt()


def to_bytes(state: State, fingerprint: str, notes: Any = None) -> bytes:
    """The state as a safetensors file that names the model (`fingerprint`) it belongs to, sealed by a hash.

    `notes` are what else is to be known of it, as JSON has it, under the same seal.
    """
    tensors: dict[str, Tensor] = {}

    def shape_of(part: State) -> Any:
        if isinstance(part, Tensor):
            name = f"{len(tensors):05d}"
            tensors[name] = part.detach().cpu().contiguous().clone()  # clone: equal tensors must not share memory
            return name
        if isinstance(part, tuple):
            return [shape_of(item) for item in part]
        if isinstance(part, dict):
            return {key: shape_of(part[key]) for key in part}
        raise TypeError(f"a state holds tensors, tuples and dictionaries, not {type(part).__name__}")

    about = {"sha256": UNSEALED, "format": FORMAT, "fingerprint": fingerprint, "tree": shape_of(state)}
    if notes is not None:
        about["notes"] = notes
    data = save_tensors(tensors, metadata={"state": json.dumps(about)})  # one entry: several have no fixed order
    return seal(data)


def seal(data: bytes) -> bytes:
    """The file with the hash of all its other bytes in the place that is kept for it."""
    at = data.index(UNSEALED.encode())  # the first entry of the header: nothing before it looks so
    return data[:at] + _digest(data, at).encode() + data[at + len(UNSEALED) :]


def _digest(data: bytes, at: int) -> str:
    """SHA-256 of all bytes but the 64 from `at` on, hexadecimal."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(view[at + len(UNSEALED) :])
    return digest.hexdigest()


def from_bytes(data: bytes, fingerprint: str) -> State:
    """The state written by `to_bytes`; a ValueError when any byte is altered, ForeignStateError for another model's."""
    return with_notes_from_bytes(data, fingerprint)[0]


def with_notes_from_bytes(data: bytes, fingerprint: str) -> tuple[State, Any]:
    """`from_bytes`, and the notes that were written with the state; None where there were none."""
    about = _about(data)
    if about.get("format") != FORMAT:
        raise ValueError(f"state format is {about.get('format')!r}; this version reads {FORMAT!r}")
    found = str(about.get("sha256")).encode()
    if len(found) != len(UNSEALED) or (at := data.find(found)) < 0 or _digest(data, at).encode() != found:
        raise ValueError(f"not a state: of {len(data)} bytes some were altered or cut off after they were written")
    if about.get("fingerprint") != fingerprint:
        raise ForeignStateError(
            f"the state belongs to model {about.get('fingerprint')!r}, not to {fingerprint!r}; load it with that model",
            about.get("notes"),
        )
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"not a state: {len(data)} bytes that are no whole safetensors file ({error})") from error

    def build(part: Any) -> State:
        if isinstance(part, str) and part in tensors:
            return tensors[part]
        if isinstance(part, list):
            return tuple(build(item) for item in part)
        if isinstance(part, dict):
            return {key: build(item) for key, item in part.items()}
        raise ValueError(f"not a state: its tree names {part!r}, which is not in the file")

    return build(about.get("tree")), about.get("notes")


def _about(data: bytes) -> dict[str, Any]:
    """What the header of a file says of the state; nothing where it is another file's header."""
    size = int.from_bytes(data[:8], "little")  # of the header, JSON, that follows
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        about = json.loads(metadata.get("state", "{}")) if isinstance(metadata, dict) else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a state: {len(data)} bytes without a whole header ({error})") from error
    return about if isinstance(about, dict) else {}
