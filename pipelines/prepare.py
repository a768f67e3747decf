"""Tokenise documents once and cut them into segments: the store that training and evaluation read.

    python pipelines/prepare.py --input books/ --output store --tokenizer bytes --segment-len 512

Reads .txt, .txt.gz, .jsonl (`text`, optional `id`) and .parquet (columns `text`, optional `id`) from disk or
s3://. A document stays whole and in order in one Parquet file; nothing of it is truncated, and what cannot be
read exactly goes to errors.jsonl. The same command again does nothing; other settings on the same output are
refused; an interrupted run is done again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pydantic
import ray.data

from pipelines import storage
from pipelines.cluster import connect
from pipelines.config import Config, Count, InputError, StrictError, fingerprint, run_job
from pipelines.data import inputs, segment, store
from pipelines.data.inputs import InputFile
from pipelines.data.read import SUFFIXES
from pipelines.data.segment import Unit, UnitResult
from pipelines.data.store import DocumentEntry, ErrorEntry
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.storage import FileEntry

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.prepare")

_REPORT_S = 10.0  # between progress lines
_SHOWN_KEYS = ("num_documents", "num_segments", "num_tokens", "num_errors", "num_bytes", "num_files", "errors")
_OWN_NAMES = re.compile(
    r"(segments-\d{5,}\.parquet|manifest\.parquet|errors\.jsonl|inputs\.json|tokenizer(_config)?\.json"
    r"|store(\.partial)?\.json)"
)
_TEMPORARY_NAMES = re.compile(rf"\.({_OWN_NAMES.pattern})\.[0-9a-f]{{8}}\.tmp")


class PrepareConfig(Config):
    input: list[str] = pydantic.Field(
        min_length=1, description="files, directories or globs (.txt .txt.gz .jsonl .parquet), on disk or s3://"
    )
    output: str = pydantic.Field(description="directory of the segment store, on disk or s3://")
    tokenizer: str = pydantic.Field("bytes", description="`bytes`, or a directory or file of a tokenizer.json")
    segment_len: Count = pydantic.Field(512, ge=1, le=2**24, description="tokens a segment")
    strict: bool = pydantic.Field(False, description="exit with 2 when anything went to errors.jsonl")
    num_cpus: int | None = pydantic.Field(
        None, ge=1, description="cores for the Ray that is started here (none: all); the result is the same"
    )


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(prepare, PrepareConfig, argv, prog="prepare", description=__doc__.splitlines()[0])


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Makes the store, or finds it made; the counts that are printed. InputError, StrictError."""
    output = storage.absolute(config.output)
    tokenizer = load_tokenizer(config.tokenizer)
    files = [file for file in storage.expand(config.input, SUFFIXES) if not file.uri.startswith(output + "/")]
    if not files:
        raise InputError(f"no input found outside the output {output}")
    content = store.read_store_json(output)
    if content is not None:
        _refuse_other_use(output, content, config, tokenizer, files)
        log.info("%s is already made from this input with these settings: nothing to do", output)
    else:
        left = _left_by_interrupted_run(output)
        units = _units(files, output, config.segment_len, tokenizer)
        log.info("reading %d files as %d work units", len(files), len(units))
        with connect(config.num_cpus):
            _begin(output, config, tokenizer, left)
            results = _drop_later_duplicates(output, _run(units))
        content = _finish(output, config, tokenizer, results)
    return _summary(output, content, strict=config.strict)


# --- a store that is there already ------------------------------------------------------------------


def _settings(segment_len: int, tokenizer_fingerprint: str) -> dict[str, Any]:
    """All that decides what becomes of an input."""
    return {"format": store.FORMAT, "segment_len": segment_len, "tokenizer": tokenizer_fingerprint}


def _refuse_other_use(
    output: str, content: dict[str, Any], config: PrepareConfig, tokenizer: Tokenizer, files: list[FileEntry]
) -> None:
    differences = []
    if content["segment_len"] != config.segment_len:
        differences.append(f"segment_len {content['segment_len']} there, {config.segment_len} asked for")
    there = content["tokenizer_fingerprint"]
    if there != tokenizer.fingerprint:
        asked = tokenizer.fingerprint[:16]
        differences.append(f"tokenizer {there[:16]} there, {asked} ({config.tokenizer}) asked for")
    before = [InputFile(**entry) for entry in storage.read_json(storage.join(output, store.INPUTS))]
    if (difference := inputs.difference(before, files)) is not None:
        differences.append(f"other input ({difference})")
    if differences:
        raise InputError(
            f"{output} is a finished store made otherwise: {'; '.join(differences)}; give another --output or delete it"
        )


def _left_by_interrupted_run(output: str) -> list[str]:
    """The names of files to clear away; InputError where the output holds anything that is not ours."""
    if storage.exists(output) and not storage.is_directory(output):
        raise InputError(f"{output} is a file; --output needs a directory")
    names = storage.list_names(output)
    whole = [name for name in names if not _TEMPORARY_NAMES.fullmatch(name)]
    foreign = [name for name in whole if not _OWN_NAMES.fullmatch(name)]
    if foreign or (whole and store.PARTIAL not in whole):
        raise InputError(
            f"{output} is not empty and no segment store (it holds {(foreign or whole)[0]}); give another --output"
        )
    return names


def _begin(output: str, config: PrepareConfig, tokenizer: Tokenizer, left: list[str]) -> None:
    """Says that a store is being made, clears what an interrupted run left, and puts the tokenizer there."""
    if left:
        log.info("%s holds an interrupted run: it is done again", output)
    storage.write_json(storage.join(output, store.PARTIAL), _saved(config))
    for name in left:
        if name != store.PARTIAL:
            storage.delete(storage.join(output, name))
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        tokenizer.save_pretrained(directory)
        for path in sorted(Path(directory).iterdir()):
            storage.write_bytes(storage.join(output, path.name), path.read_bytes())


# --- the work ---------------------------------------------------------------------------------------


def _units(files: list[FileEntry], output: str, segment_len: int, tokenizer: Tokenizer) -> list[Unit]:
    groups = inputs.plan_units(files)
    return [Unit(n, group, output, segment_len, tokenizer.fingerprint) for n, group in enumerate(groups)]


def _run(units: list[Unit]) -> list[UnitResult]:
    """Every unit's result, in order."""
    results: list[UnitResult] = []
    last_report = time.monotonic()
    for item in _map(_write_unit, [unit._asdict() for unit in units]):
        results.append(_unit_result(item))
        if time.monotonic() - last_report > _REPORT_S or len(results) == len(units):
            last_report = time.monotonic()
            done = [document for result in results for document in result.documents]
            megabytes = sum(document.num_bytes for document in done) / 1e6
            log.info("%d of %d units: %d documents, %.1f MB", len(results), len(units), len(done), megabytes)
    return sorted(results, key=lambda result: result.number)


def _map(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """A Ray Data job over few, long items: one task each, results as they come."""
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in dataset.map(lambda row: {"item": json.dumps(function(json.loads(row["item"])))}).iter_rows():
        yield json.loads(row["item"])


def _write_unit(item: dict[str, Any]) -> dict[str, Any]:
    files = [FileEntry(*file) for file in item.pop("files")]
    return segment.write_unit(Unit(files=files, **item))._asdict()


def _unit_result(item: dict[str, Any]) -> UnitResult:
    return UnitResult(
        item["number"],
        [DocumentEntry(*entry) for entry in item["documents"]],
        [ErrorEntry(*entry) for entry in item["errors"]],
        [InputFile(*entry) for entry in item["inputs"]],
    )


def _drop_later_duplicates(output: str, results: list[UnitResult]) -> list[UnitResult]:
    """Takes documents whose id an earlier unit has out of their files, and reports them."""
    drop = segment.later_duplicates(results)
    items = [
        [number, storage.join(output, store.part_name(number)), results[number].documents, sorted(ids)]
        for number, ids in drop.items()
    ]
    rewritten = dict(_map(_rewrite, items)) if items else {}
    out = []
    for result in results:
        ids = drop.get(result.number, set())
        late = [document for document in result.documents if document.document_id in ids]
        faults = [segment.duplicate(document.document_id, None) for document in late]
        errors = [
            ErrorEntry(document.source, fault.document_id, fault.line, fault.kind, fault.reason)
            for document, fault in zip(late, faults, strict=True)
        ]
        kept = [DocumentEntry(*entry) for entry in rewritten.get(result.number, result.documents)]
        out.append(result._replace(documents=kept, errors=result.errors + errors))
    return out


def _rewrite(item: list[Any]) -> list[Any]:
    number, uri, documents, ids = item
    return [number, store.without_documents(uri, [DocumentEntry(*entry) for entry in documents], set(ids))]


# --- the end ----------------------------------------------------------------------------------------


def _finish(output: str, config: PrepareConfig, tokenizer: Tokenizer, results: list[UnitResult]) -> dict[str, Any]:
    """Writes the manifest, the errors, the inputs and, last, store.json; its content."""
    documents = [document for result in results for document in result.documents]
    errors = [error for result in results for error in result.errors]
    files = [file for result in results for file in result.inputs]
    store.write_manifest(output, documents)
    store.write_errors(output, errors)
    storage.write_json(storage.join(output, store.INPUTS), [file._asdict() for file in files])
    content = {
        "format": store.FORMAT,
        "segment_len": config.segment_len,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "config_fingerprint": fingerprint(_settings(config.segment_len, tokenizer.fingerprint)),
        "input_fingerprint": inputs.input_fingerprint(files),
        "num_documents": len(documents),
        "num_segments": sum(document.num_segments for document in documents),
        "num_tokens": sum(document.num_tokens for document in documents),
        "num_bytes": sum(document.num_bytes for document in documents),
        "num_files": len(files),
        "num_errors": len(errors),
        "errors": dict(sorted(Counter(error.kind for error in errors).items())),
        "config": _saved(config),
    }
    storage.write_json(storage.join(output, store.STORE), content)
    storage.delete(storage.join(output, store.PARTIAL))
    return content


def _saved(config: PrepareConfig) -> dict[str, Any]:
    """The configuration but for how many cores did it, which must not show in what is made."""
    return config.model_dump(mode="json", exclude={"num_cpus"})


def _summary(output: str, content: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    result = {"output": output, **{key: content[key] for key in _SHOWN_KEYS}}
    counts = "{num_documents} documents, {num_segments} segments, {num_tokens} tokens".format(**result)
    log.info("%s: %s", output, counts)
    if not content["num_errors"]:
        return result
    kinds = ", ".join(f"{kind} {count}" for kind, count in content["errors"].items())
    faults = f"{content['num_errors']} errors ({kinds}), see {storage.join(output, store.ERRORS)}"
    if strict:
        raise StrictError(result, faults)
    log.warning("%s", faults)
    return result


if __name__ == "__main__":
    sys.exit(main())
