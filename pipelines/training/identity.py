"""What a run is, so that a checkpoint is continued under the same settings, data and model only."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rmt_core
from pipelines.config import InputError, canonical_json, fingerprint
from pipelines.data.mixture import Store
from pipelines.training.settings import TrainConfig

# Not part of what is learned: a run may go on with other values of these.
HOUSEKEEPING: dict[str, Any] = {
    **dict.fromkeys(("output", "resume", "report", "data", "seeds"), True),
    "model": {"backbone"},  # where it lies: what is in it counts
    "workers": {"num_workers", "cpus", "use_gpu", "max_failures", "resize_every_s"},
}

Identity = dict[str, Any]  # settings, data and model: JSON values by part

_WEIGHTS = ("*.safetensors", "*.bin")  # of a Hugging Face directory, the first that there are


def identity_of(config: TrainConfig, store: Store, model: rmt_core.ModelConfig) -> Identity:
    """Equal for runs that would learn the same, whatever the number of workers.

    Reads a backbone's weights from the first byte to the last: seconds for a large one. InputError where it has none.
    """
    identity: Identity = {
        "settings": config.model_dump(mode="json", exclude=HOUSEKEEPING),
        "data": {
            "fingerprint": store.fingerprint,
            "num_documents": len(store.manifest),
            "num_tokens": sum(document.num_tokens for document in store.manifest),
            "segment_len": store.segment_len,
        },
        "model": model.to_json(),
    }
    if config.model.backbone is not None:
        identity["model"]["weights"] = _fingerprint_weights(config.model.backbone)
    return json.loads(canonical_json(identity))


def _fingerprint_weights(backbone: str) -> str:
    """A hash of a directory's weights, by names and contents of their files."""
    found = (sorted(Path(backbone).glob(pattern)) for pattern in _WEIGHTS)
    files = next((paths for paths in found if paths), [])
    if not files:
        raise InputError(f"model.backbone {backbone!r} holds no weights ({' or '.join(_WEIGHTS)})")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def seal(identity: Identity) -> str:
    """The identity as one hash."""
    return fingerprint(identity)


def check_same(old: Identity, new: Identity, what: str) -> None:
    """InputError that names what differs and how; `what` is the old one: "runs/a holds a run"."""
    if old == new:
        return
    if not isinstance(old, Mapping):
        raise InputError(f"{what} of an earlier version; give another --output to begin anew")
    found = list(_changes(old["settings"], new["settings"], ""))
    if old["data"] != new["data"]:
        found += _changes(old["data"], new["data"], "the data's ")
    if not found:  # otherwise these follow from the settings
        found += _changes(old["model"], new["model"], "the model's ")
    raise InputError(
        f"{what} with other settings or data: {'; '.join(found)}. Give the old ones, or another --output to begin anew"
    )


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    """`name old -> new` of every value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        separator = "." if name and not name.endswith(" ") else ""
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key, "unset"), new.get(key, "unset"), f"{name}{separator}{key}")
    elif old != new:
        yield f"{name} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:16] + "..."
