"""What of a preparation is done, so that an interrupted one goes on: kept beside the store until it is finished.

    unit-00000.json                    a finished work unit: what became of it, and its segment file's checksum
    tokens-00000-<hash>.safetensors    a batch of a unit that is being made, named by its texts and its tokenizer

Whatever is not exactly as it was left is done again.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from pipelines import storage
from pipelines.claim import CLAIM
from pipelines.config import InputError, fingerprint
from pipelines.data import store
from pipelines.data.inputs import InputFile
from pipelines.data.pieces import Encoded, Piece, encode
from pipelines.data.read import file_sha256
from pipelines.data.segment import Unit, UnitResult, tokenizer_of
from pipelines.data.store import DocumentEntry, ErrorEntry, part_name

log = logging.getLogger(__name__)

_KEPT = re.compile(r"unit-\d{5,}\.json|tokens-\d{5,}-[0-9a-f]{32}\.safetensors")
_OWN = re.compile(
    r"(segments-\d{5,}\.parquet|manifest\.parquet|errors\.jsonl|inputs\.json|tokenizer(_config)?\.json"
    rf"|store(\.partial)?\.json|SHA256SUMS|{_KEPT.pattern})"
)
_TEMPORARY = re.compile(rf"\.({_OWN.pattern})\.[0-9a-f]{{8}}\.tmp")
_DIGEST_BYTES = 32


def unit_name(number: int) -> str:
    """The file that says that a unit is finished."""
    return f"unit-{number:05d}.json"


def units_in(names: Sequence[str]) -> set[int]:
    """The numbers of the units that files of these names say are finished."""
    return {int(found[1]) for name in names if (found := re.fullmatch(r"unit-(\d{5,})\.json", name))}


def save_unit(unit: Unit, result: UnitResult) -> None:
    """Says that a unit is finished; its segment file stands, or there is none where it has no documents."""
    part = storage.join(unit.output, part_name(unit.number))
    sha256 = file_sha256(part) if result.documents else None
    content = {"unit": _unit_fingerprint(unit), "segments_sha256": sha256, "result": result._asdict()}
    content["checksum"] = fingerprint(content)
    storage.write_json(storage.join(unit.output, unit_name(unit.number)), content)


def load_unit(unit: Unit) -> UnitResult | None:
    """What became of a finished unit; None where it is not finished, or its segment file is not as it was."""
    uri = storage.join(unit.output, unit_name(unit.number))
    if not storage.exists(uri):
        return None
    try:
        content = storage.read_json(uri)
    except ValueError:
        return None
    if not isinstance(content, dict) or content.pop("checksum", None) != fingerprint(content):
        return None
    result = unit_result(content["result"])
    part = storage.join(unit.output, part_name(unit.number))
    whole = not result.documents or content["segments_sha256"] == file_sha256(part)
    return result if whole and content["unit"] == _unit_fingerprint(unit) else None


def _unit_fingerprint(unit: Unit) -> str:
    return fingerprint(unit._replace(output=""))


def unit_result(content: Mapping[str, Any]) -> UnitResult:
    """A unit's result from its JSON."""
    return UnitResult(
        content["number"],
        [DocumentEntry(*entry) for entry in content["documents"]],
        [ErrorEntry(*entry) for entry in content["errors"]],
        [InputFile(*entry) for entry in content["inputs"]],
    )


# --- tokens of a unit that is being made --------------------------------------------------------------


def tokens_name(unit: Unit, pieces: Sequence[Piece]) -> str:
    """The file for the tokens of these pieces: another one for other texts, or another tokenizer."""
    hashed = [piece._replace(text=hashlib.sha256(piece.text.encode()).hexdigest()) for piece in pieces]
    digest = fingerprint([unit.tokenizer_fingerprint, hashed])[:32]
    return f"tokens-{unit.number:05d}-{digest}.safetensors"


def encode_and_save(unit: Unit, pieces: Sequence[Piece], name: str) -> list[Encoded]:
    """The tokens of a batch's pieces, kept in a file of this name."""
    encoded = encode(tokenizer_of(unit), pieces)
    save_tokens(storage.join(unit.output, name), encoded)
    return encoded


def save_tokens(uri: str, encoded: Sequence[Encoded]) -> None:
    """Keeps the tokens of a batch, unless something is wrong with one of its pieces: those are rare."""
    if not all(one.fits_before and one.fits_after and one.difference is None for one in encoded):
        return
    lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
    ids = np.concatenate([one.ids for one in encoded]) if len(encoded) else np.zeros(0, dtype=np.int32)
    data = safetensors.numpy.save({"ids": ids, "lengths": lengths})
    storage.write_bytes(uri, hashlib.sha256(data).digest() + data, flush=False)


def load_tokens(uri: str) -> list[Encoded] | None:
    """The tokens that were kept; None where they are not as they were left."""
    content = storage.read_bytes(uri)
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        return None
    tensors = safetensors.numpy.load(data)
    parts = np.split(tensors["ids"], np.cumsum(tensors["lengths"])[:-1])
    return [Encoded(ids, True, True, None) for ids in parts] if len(tensors["lengths"]) else []


# --- the directory ----------------------------------------------------------------------------------


def check(output: str) -> list[str]:
    """What is there, the claim left out; InputError where that holds anything that is not ours."""
    if storage.exists(output) and not storage.is_directory(output):
        raise InputError(f"{output} is a file; --output needs a directory")
    names = [name for name in storage.list_names(output) if not name.startswith((CLAIM, f".{CLAIM}."))]
    whole = [name for name in names if not _TEMPORARY.fullmatch(name)]
    foreign = [name for name in whole if not _OWN.fullmatch(name)]
    if foreign or (whole and store.PARTIAL not in whole and store.STORE not in whole):
        raise InputError(
            f"{output} is not empty and no segment store (it holds {(foreign or whole)[0]}); give another --output"
        )
    return names


def stale(output: str, identity: str, num_units: int) -> list[str]:
    """The files there that are of no use to this run; InputError as of `check`."""
    names = check(output)
    whole = [name for name in names if not _TEMPORARY.fullmatch(name)]
    if not names:
        return []
    kept = {store.PARTIAL}
    if store.PARTIAL in whole and _identity_there(output) == identity:
        done = units_in(names)
        kept |= {name for name in names if _KEPT.fullmatch(name)} | {store.part_name(n) for n in done}
        log.info("%s holds an interrupted run: going on, %d of %d units are done", output, len(done), num_units)
    else:
        log.info("%s holds an interrupted run with other settings or input: beginning anew", output)
    return [name for name in names if name not in kept]


def _identity_there(output: str) -> str | None:
    """What the interrupted run in a directory was to become."""
    try:
        return storage.read_json(storage.join(output, store.PARTIAL)).get("identity")
    except (ValueError, AttributeError):  # not what this program writes
        return None


def clear(output: str) -> None:
    """Deletes what was only needed to go on; last of all the file that says that a store is being made."""
    names = storage.list_names(output)
    if store.PARTIAL in names:
        left = [name for name in names if _KEPT.fullmatch(name) or _TEMPORARY.fullmatch(name)]
        for name in (*left, store.PARTIAL):
            with contextlib.suppress(FileNotFoundError):  # by another prepare, that found it finished, too
                storage.delete(storage.join(output, name))
