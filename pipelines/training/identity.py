"""What a run is, so that a checkpoint is continued under the same settings, data and model only."""

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import rmt_core
from pipelines import storage
from pipelines.config import InputError, canonical_json, fingerprint
from pipelines.data.mixture import Store
from pipelines.training.settings import TrainConfig

# Not part of what is learned: a run may go on with other values of these.
HOUSEKEEPING: dict[str, Any] = {
    **dict.fromkeys(("output", "resume", "report", "data", "seeds"), True),
    "model": {"backbone", "start"},  # where it lies: what is in it counts
    "workers": {"num_workers", "cpus", "use_gpu", "max_failures", "resize_every_s"},
}

Identity = dict[str, Any]  # settings, data and model: JSON values by part

_WEIGHTS = ("*.safetensors", "*.bin")  # of a Hugging Face directory, the first that there are
_READ_BYTES = 16 * 1024**2  # at a time


def identity_of(config: TrainConfig, store: Store, model: rmt_core.ModelConfig) -> Identity:
    """Equal for runs that would learn the same, whatever the number of workers.

    Reads weights that it begins with to the last byte: seconds for a large one. InputError where there are none.
    """
    settings = config.model_dump(mode="json", exclude=HOUSEKEEPING)
    if config.curriculum.advance_below is not None:  # which is looked at when a line of metrics is written
        settings["report"] = {"log_every": config.report.log_every}
    identity: Identity = {
        "settings": settings,
        "data": {
            "fingerprint": store.fingerprint,
            "num_documents": len(store.manifest),
            "num_tokens": sum(document.num_tokens for document in store.manifest),
            "segment_len": store.segment_len,
        },
        "model": model.to_json(),
    }
    if config.model.directory is not None:
        identity["model"]["weights"] = _fingerprint_weights(config.model.directory, config.model.directory_field)
    return json.loads(canonical_json(identity))


def _fingerprint_weights(directory: str, field: str) -> str:
    """A hash of a directory's weights, on disk or S3, by names and contents of their files."""
    names = storage.list_names(directory)
    found = (fnmatch.filter(names, pattern) for pattern in _WEIGHTS)
    chosen = next((each for each in found if each), [])
    if not chosen:
        raise InputError(f"{field} {directory!r} holds no weights ({' or '.join(_WEIGHTS)})")
    digest = hashlib.sha256()
    for name in chosen:
        digest.update(f"{name} {_sha256_of(storage.join(directory, name))}\n".encode())
    return digest.hexdigest()


def _sha256_of(uri: str) -> str:
    """Of a file's bytes, read a part at a time."""
    digest = hashlib.sha256()
    files, path = storage.filesystem(uri)
    with files.open_input_file(path) as stream:
        while part := stream.read(_READ_BYTES):
            digest.update(part)
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
