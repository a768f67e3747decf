"""Tokenise documents once and cut them into segments: the store that training and evaluation read.

    python pipelines/prepare.py --input books/ --output store --tokenizer bytes --segment-len 512

Reads .txt, .txt.gz, .jsonl (`text`, optional `id`) and .parquet (columns `text`, optional `id`) from disk or
s3://. Ids that are not given are made of the files' names, and of as much of their paths as tells equal names apart.
A document stays whole and in order in one Parquet file; nothing of it is truncated, and what cannot be read exactly
goes to errors.jsonl. The same command again does nothing; other settings on the same output are refused. An
interrupted run, however it ended, is gone on with by the same command: work units that are finished are kept, and the
store is the same to the byte as that of a run that was not interrupted.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pydantic
import ray
import ray.data

from pipelines import storage
from pipelines.claim import claimed, clear_dead
from pipelines.cluster import connect, pool
from pipelines.config import Config, Count, InputError, StrictError, fingerprint
from pipelines.data import inputs, progress, segment, spreading, store
from pipelines.data.batches import BATCH_CHARS
from pipelines.data.inputs import InputFile
from pipelines.data.read import SUFFIXES
from pipelines.data.segment import Unit, UnitResult
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.job import run_job
from pipelines.storage import FileEntry

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.prepare")

_REPORT_S = 10.0  # between progress lines
_MAX_IN_FLIGHT = 64  # batches of a unit, of about 5 MB each with their tokens; more than its reader can keep up with
_POOL_CPUS = 32  # of a pool that is idle, or has not started yet: as many as take `_MAX_IN_FLIGHT`
_SHOWN_KEYS = ("num_documents", "num_segments", "num_tokens", "num_errors", "num_bytes", "num_files", "errors")


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
    if content is None:
        progress.check(output)
        units = _units(files, output, config.segment_len, tokenizer)
        with claimed(output, "prepare"):
            content = store.read_store_json(output)  # another may have made it meanwhile
            if content is None:
                return _summary(output, _make(output, config, tokenizer, units), strict=config.strict)
    _refuse_other_use(output, content, config, tokenizer, files)
    progress.clear(output)
    clear_dead(output, "prepare")
    log.info("%s is already made from this input with these settings: nothing to do", output)
    return _summary(output, content, strict=config.strict)


def _make(output: str, config: PrepareConfig, tokenizer: Tokenizer, units: list[Unit]) -> dict[str, Any]:
    """Makes the store; the content of its store.json."""
    files = [file for unit in units for file in unit.files]
    identity = fingerprint([_settings(config.segment_len, tokenizer.fingerprint), files])
    stale = progress.stale(output, identity, len(units))
    log.info("reading %d files as %d work units", len(files), len(units))
    with connect(config.num_cpus):
        _begin(output, {"identity": identity, "config": _saved(config)}, tokenizer, stale)
        results = _drop_later_duplicates(units, _run(units))
        return _finish(output, config, tokenizer, results)


# --- a store that is there already ------------------------------------------------------------------


def _settings(segment_len: int, tokenizer_fingerprint: str) -> dict[str, Any]:
    """All that decides what becomes of an input."""
    return {"format": store.FORMAT, "segment_len": segment_len, "tokenizer": tokenizer_fingerprint}


def _refuse_other_use(
    output: str, content: dict[str, Any], config: PrepareConfig, tokenizer: Tokenizer, files: list[FileEntry]
) -> None:
    store.check_keys(output, content, _SHOWN_KEYS)
    differences = []
    if content["segment_len"] != config.segment_len:
        differences.append(f"segment_len {content['segment_len']} there, {config.segment_len} asked for")
    there = content["tokenizer_fingerprint"]
    if there != tokenizer.fingerprint:
        asked = tokenizer.fingerprint[:16]
        differences.append(f"tokenizer {there[:16]} there, {asked} ({config.tokenizer}) asked for")
    if (difference := inputs.difference(_inputs_there(output), files)) is not None:
        differences.append(f"other input ({difference})")
    if differences:
        raise InputError(
            f"{output} is a finished store made otherwise: {'; '.join(differences)}; give another --output or delete it"
        )


def _inputs_there(output: str) -> list[InputFile]:
    """What a finished store was made of; InputError where its file does not say."""
    file = storage.join(output, store.INPUTS)
    try:
        return [InputFile(**entry) for entry in storage.read_json(file)]
    except storage.StorageError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise InputError(store.unusable(file, error)) from error


def _begin(output: str, about: dict[str, Any], tokenizer: Tokenizer, stale: list[str]) -> None:
    """Clears what is of no use, says that a store is being made, and puts the tokenizer there.

    In this order: what says that units are finished must not outlive the settings that they were made with.
    """
    for name in stale:
        storage.delete(storage.join(output, name))
    storage.write_json(storage.join(output, store.PARTIAL), about)
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        tokenizer.save_pretrained(directory)
        for path in sorted(Path(directory).iterdir()):
            storage.write_bytes(storage.join(output, path.name), path.read_bytes())


# --- the work ---------------------------------------------------------------------------------------


def _units(files: list[FileEntry], output: str, segment_len: int, tokenizer: Tokenizer) -> list[Unit]:
    """The work; InputError where files would give their documents the same ids."""
    callings = inputs.distinct_callings(files)
    if callings:
        example = min(callings.values())
        log.info("%d files have names that others have too; their documents' ids tell more: %s", len(callings), example)
    units: list[Unit] = []
    for group in inputs.plan_units(files):
        of_group = {file.uri: callings[file.uri] for file in group if file.uri in callings}
        units.append(Unit(len(units), group, output, segment_len, tokenizer.fingerprint, of_group or None))
    return units


def _run(units: list[Unit]) -> list[UnitResult]:
    """Every unit's result, in order."""
    results: list[UnitResult] = []
    last_report = time.monotonic()
    for result in _written(units):
        results.append(result)
        if time.monotonic() - last_report > _REPORT_S or len(results) == len(units):
            last_report = time.monotonic()
            done = [document for result in results for document in result.documents]
            megabytes = sum(document.num_bytes for document in done) / 1e6
            log.info("%d of %d units: %d documents, %.1f MB", len(results), len(units), len(done), megabytes)
    return sorted(results, key=lambda result: result.number)


def _written(units: list[Unit]) -> Iterator[UnitResult]:
    """What becomes of units, as they end: of long ones, which are spread, beside Ray Data's job over the others."""
    num_cpus = _num_cpus()
    in_flight = {unit.number: _in_flight(unit, len(units), num_cpus) for unit in units}
    waiting = deque(unit for unit in units if in_flight[unit.number])
    running: list[ray.ObjectRef[UnitResult]] = []

    def ended(timeout_s: float | None) -> Iterator[UnitResult]:
        """Of long units, of which one a core is at work."""
        nonlocal running
        while waiting and len(running) < num_cpus:
            unit = waiting.popleft()
            running.append(spreading.begin(unit, in_flight[unit.number], pool("data")))
        if running:
            done, running = ray.wait(running, timeout=timeout_s)
            yield from map(ray.get, done)

    try:
        yield from ended(0)
        if others := [unit._asdict() for unit in units if not in_flight[unit.number]]:
            for content in _map(_write_unit, others):
                yield progress.unit_result(content)
                yield from ended(0)
        while waiting or running:
            yield from ended(None)
    finally:
        for unit in running:
            ray.cancel(unit)


def _num_cpus() -> int:
    """Cores that may come to work: those that there are, or more where a pool grows with the work it is given."""
    there = int(ray.cluster_resources().get("CPU", 1))
    return max(there, _POOL_CPUS) if pool("data") else there


def _in_flight(unit: Unit, num_units: int, num_cpus: int) -> int:
    """How many batches of a unit are held at a time, to be tokenised by all workers; 0: its own worker does all.

    A unit is spread where it is so long that it would be the last to end, or where units are fewer than cores; on one
    core there is nobody to spread it to.
    """
    num_bytes = sum(max(0, file.num_bytes) for file in unit.files)
    few = num_units < num_cpus and num_bytes >= 4 * BATCH_CHARS
    spread = num_cpus > 1 and (few or num_bytes > inputs.UNIT_BYTES)
    return min(2 * num_cpus, _MAX_IN_FLIGHT) if spread else 0


def _map(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """A Ray Data job over few, long items: one task each, results as they come."""
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in dataset.map(lambda row: {"item": json.dumps(function(json.loads(row["item"])))}).iter_rows():
        yield json.loads(row["item"])


def _write_unit(item: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a unit, made now or found finished."""
    unit = _unit(item)
    done = progress.load_unit(unit)
    if done is None:
        done = segment.write_unit(unit)
        progress.save_unit(unit, done)
    return done._asdict()


def _unit(item: dict[str, Any]) -> Unit:
    return Unit(**{**item, "files": [FileEntry(*file) for file in item["files"]]})


def _drop_later_duplicates(units: list[Unit], results: list[UnitResult]) -> list[UnitResult]:
    """Takes documents whose id an earlier unit has out of their files, and reports them."""
    drop = segment.later_duplicates(results)
    items = [[units[number]._asdict(), results[number]._asdict(), sorted(ids)] for number, ids in drop.items()]
    rewritten = [progress.unit_result(content) for content in _map(_rewrite, items)] if items else []
    changed = {result.number: result for result in rewritten}
    return [changed.get(result.number, result) for result in results]


def _rewrite(item: list[Any]) -> dict[str, Any]:
    """A unit without some documents; ended between the two writes, the unit is made once more."""
    unit, content, ids = item
    result = segment.without_documents(unit["output"], progress.unit_result(content), set(ids))
    progress.save_unit(_unit(unit), result)
    return result._asdict()


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
    progress.clear(output)
    return content


def _saved(config: PrepareConfig) -> dict[str, Any]:
    """The configuration, but for what must not show in what is made: where it lies and how many cores did it."""
    return config.model_dump(mode="json", exclude={"num_cpus", "output"})


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
