"""Summarise documents of any length with a trained model: one row a document, as Parquet and JSONL.

    python pipelines/summarise.py --model runs/train/model --input books/ --output runs/summaries

Reads .txt, .txt.gz, .jsonl (`text`, optional `id`) and .parquet (columns `text`, optional `id`) from disk or
s3://. A document is read segment by segment through the model's memory, then the prompt, then the summary is
written. Rows come in the order of the input. A document that cannot be read becomes a row with status `error` and
the reason. The output appears whole, when all is done; the same command again does nothing.

Memory: this process sees the names of the files and the rows of the result (one part of them at a time) and the
documents' ids, never a text; through Ray go names and ranges of lines one way and rows the other. What a worker holds
is said in pipelines/serving/summariser.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pydantic
import ray
import ray.data

from pipelines import storage
from pipelines.cluster import connect
from pipelines.config import Config, InputError, StrictError, fingerprint, run_job
from pipelines.data import inputs, parts
from pipelines.data.inputs import InputFile
from pipelines.data.parts import FilePart, Surveyed
from pipelines.data.read import SUFFIXES
from pipelines.serving.summariser import SCHEMA, Settings, Summariser, concatenate, load
from pipelines.storage import FileEntry

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.summarise")

FORMAT = "rmt-summaries-1"
RESULT, INPUTS, LINES = "result.json", "inputs.json", "summaries.jsonl"
_OWN_NAMES = re.compile(r"result\.json|inputs\.json|summaries\.jsonl|summaries-\d{5,}\.parquet")
_REPORT_S = 10.0  # between progress lines
_PART_ROWS = 10_000  # rows of a Parquet part
_UNITS_A_WORKER = 4  # more: workers end together; fewer: rows of a batch are idle at fewer ends
_SMALL_BYTES = 2**26  # inputs that are surveyed here, sooner than Ray could begin
_SHOWN_KEYS = ("num_ok", "num_error", "num_documents", "num_tokens", "tokens_per_s")


class SummariseConfig(Config):
    model: str = pydantic.Field(description="directory of a model saved with its tokenizer, on disk or s3://")
    input: list[str] = pydantic.Field(
        min_length=1, description="files, directories or globs (.txt .txt.gz .jsonl .parquet), on disk or s3://"
    )
    output: str = pydantic.Field(description="directory of the summaries, on disk or s3://")
    prompt: str = pydantic.Field("\n\nSummary: ", description="text read after a document, before the summary")
    max_new_tokens: int = pydantic.Field(128, ge=1, description="tokens a summary, at most")
    temperature: float = pydantic.Field(0.0, ge=0, allow_inf_nan=False, description="of sampling; 0: the likeliest")
    top_p: float = pydantic.Field(1.0, gt=0, le=1, description="mass of the likeliest tokens that are sampled from")
    seed: int = pydantic.Field(0, description="of sampling; a document's own is made of it and the document's id")
    batch_size: int = pydantic.Field(8, ge=1, description="documents that a worker reads side by side")
    num_workers: int = pydantic.Field(1, ge=1, description="workers, each with the model and one core (or GPU)")
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where a worker's model is: cpu or cuda")
    strict: bool = pydantic.Field(False, description="exit with 2 when any row is an error")

    @pydantic.field_validator("prompt")
    @classmethod
    def _prompt_is_text(cls, value: str) -> str:
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("needs to be UTF-8 text")
        return value


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(summarise, SummariseConfig, argv, prog="summarise", description=__doc__.splitlines()[0])


def summarise(config: SummariseConfig) -> dict[str, Any]:
    """Makes the summaries, or finds them made; the counts that are printed. InputError, StrictError."""
    output = storage.absolute(config.output)
    files = [file for file in storage.expand(config.input, SUFFIXES) if not file.uri.startswith(output + "/")]
    if not files:
        raise InputError(f"no input found outside the output {output}")
    model, tokenizer, model_fingerprint = load(storage.absolute(config.model))
    decisive = _decisive(config, model_fingerprint, tokenizer.fingerprint)
    del model  # only the workers need it
    result = _finished(output, decisive, files)
    if result is not None:
        log.info("%s already holds the summaries of this input by this model: nothing to do", output)
    else:
        with tempfile.TemporaryDirectory(prefix="rmt-") as parent, connect():
            directory = Path(parent) / "output"
            directory.mkdir()  # with the user's usual permissions, which the output keeps
            _make(config, directory, files, decisive)
            storage.upload_directory(directory, output, marker=RESULT)
        result = storage.read_json(storage.join(output, RESULT))
    return _shown(output, result, strict=config.strict)


# --- an output that is there already ----------------------------------------------------------------


def _decisive(config: SummariseConfig, model: str, tokenizer: str) -> dict[str, Any]:
    """All that decides what is written about a document."""
    names = ("prompt", "max_new_tokens", "temperature", "top_p", "seed")
    values = {name: getattr(config, name) for name in names}
    return {"format": FORMAT, "model": model, "tokenizer": tokenizer, **values}


def _finished(output: str, decisive: dict[str, Any], files: Sequence[FileEntry]) -> dict[str, Any] | None:
    """The result that is there already, None where there is none; InputError where there is something else."""
    try:
        if storage.exists(output) and not storage.is_directory(output):
            raise InputError(f"{output} is a file; --output needs a directory")
        names = storage.list_names(output)
        if RESULT not in names:
            foreign = [name for name in names if not _OWN_NAMES.fullmatch(name)]
            if foreign or (names and not storage.is_s3(output)):  # on S3 an upload may have been cut off
                raise InputError(f"{output} is not empty (it holds {(foreign or names)[0]}); give another --output")
            _check_writable(output)
            return None
        result = storage.read_json(storage.join(output, RESULT))
        before = [InputFile(**entry) for entry in storage.read_json(storage.join(output, INPUTS))]
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"output {output} cannot be used: {error}") from error
    there = result.get("decisive", {}) if isinstance(result, dict) else {}
    if there.get("format") != FORMAT:
        raise InputError(f"{output} holds a {RESULT} that is not of summaries; give another --output")
    differences = [
        f"{name} {_short(there.get(name))} there, {_short(value)} asked for"
        for name, value in decisive.items()
        if there.get(name) != value
    ]
    if (difference := inputs.difference(before, files)) is not None:
        differences.append(f"other input ({difference})")
    if differences:
        raise InputError(f"{output} holds other summaries: {'; '.join(differences)}; give another --output")
    return result


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else json.dumps(value)


def _check_writable(output: str) -> None:
    """Raises OSError now rather than after hours, where the output cannot be made."""
    if storage.is_s3(output):
        files, path = storage.filesystem(output)
        bucket = path.split("/")[0]
        if files.get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
            raise OSError(f"there is no bucket {bucket}")
        return
    parent = next(parent for parent in Path(output).parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".rmt-"):
        pass


# --- the work ---------------------------------------------------------------------------------------


def _make(config: SummariseConfig, directory: Path, files: Sequence[FileEntry], decisive: dict[str, Any]) -> None:
    """Writes all files of the output to a local directory."""
    begun = time.monotonic()
    surveyed = _survey(files)
    num_records = sum(file.num_records for file in surveyed)
    log.info("reading about %d documents of %d files with %d workers", num_records, len(files), config.num_workers)
    writer = _Writer(directory, num_records)
    for table in _summaries(config, decisive["model"], _units(config, surveyed)):
        writer.add(table)
    counts = writer.close()
    elapsed = time.monotonic() - begun
    records = [surveyed_file.file._asdict() for surveyed_file in surveyed]
    storage.write_json(str(directory / INPUTS), records)
    result = {
        "format": FORMAT,
        **counts,
        "elapsed_s": round(elapsed, 3),
        "tokens_per_s": round(counts["num_tokens"] / elapsed, 1),
        "decisive": decisive,
        "config_fingerprint": fingerprint(decisive),
        "input_fingerprint": inputs.input_fingerprint([file.file for file in surveyed]),
        "config": config.model_dump(mode="json"),
    }
    storage.write_json(str(directory / RESULT), result)


def _units(config: SummariseConfig, surveyed: Sequence[Surveyed]) -> list[list[FilePart]]:
    """Work units; with one worker a single one, so that its rows are refilled to the end."""
    if config.num_workers == 1:
        return parts.plan(surveyed, 1, 1)
    num_records = sum(file.num_records for file in surveyed)
    share = math.ceil(num_records / config.num_workers)
    return parts.plan(surveyed, _UNITS_A_WORKER * config.num_workers, min(config.batch_size, share))


def _survey(files: Sequence[FileEntry]) -> list[Surveyed]:
    """Checksums and numbers of lines, in the order of the files."""
    if sum(file.num_bytes for file in files) <= _SMALL_BYTES:
        return [parts.survey(file) for file in files]
    rows = [{"file": json.dumps(file)} for file in files]
    found = _ordered(ray.data.from_items(rows, override_num_blocks=min(len(rows), 256)).map(_survey_row))
    return [
        Surveyed(InputFile(*file), count)
        for table in found
        for file, count in (json.loads(text) for text in table.column("file").to_pylist())
    ]


def _survey_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"file": json.dumps(parts.survey(FileEntry(*json.loads(row["file"]))))}


def _summaries(config: SummariseConfig, model: str, units: Sequence[Sequence[FilePart]]) -> Iterator[pa.Table]:
    """Rows of the result, in order, as they are made."""
    settings = Settings(
        model=storage.absolute(config.model),
        fingerprint=model,
        prompt=config.prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        device=config.device,
    )
    rows = [{"parts": json.dumps(unit)} for unit in units]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Worker,
        fn_constructor_kwargs={"settings": settings},
        compute=ray.data.ActorPoolStrategy(size=min(config.num_workers, len(units))),
        batch_size=1,
        batch_format="pyarrow",
        **_resources(config),
    )
    yield from _ordered(dataset)


class _Worker:
    """An actor that holds the model; a batch is one work unit."""

    def __init__(self, settings: Settings) -> None:
        self._summariser = Summariser(settings)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for text in batch.column("parts").to_pylist():
            yield from self._summariser.summarise(FilePart(*part) for part in json.loads(text))


def _resources(config: SummariseConfig) -> dict[str, float]:
    """What a worker reserves: a core, or less where cores are few, since Ray's other tasks need some of them too."""
    available = ray.cluster_resources()
    share = available.get("CPU", 0.0) / 2 / config.num_workers
    num_cpus = min(1.0, max(0.01, math.floor(100 * share) / 100)) if share else 1.0
    if config.device == "cpu":
        return {"num_cpus": num_cpus}
    if not available.get("GPU"):
        raise InputError("device cuda: Ray sees no GPU; use --device cpu")
    return {"num_cpus": num_cpus, "num_gpus": min(1.0, math.floor(100 * available["GPU"] / config.num_workers) / 100)}


def _ordered(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The rows of a dataset in its order, as they come; small blocks, so that they come soon and none is large."""
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = -1  # one long document may take long
    context.target_max_block_size = 1
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


class _Writer:
    """Writes the rows as they come: a JSONL file and Parquet parts."""

    def __init__(self, directory: Path, num_expected: int) -> None:
        self._directory = directory
        self._lines = (directory / LINES).open("w", encoding="utf-8")
        self._waiting: list[pa.Table] = []  # less than a part
        self._num_parts = 0
        self._num_expected = num_expected
        self._taken: set[str] = set()
        self._counts = {"num_documents": 0, "num_ok": 0, "num_error": 0, "num_tokens": 0}
        self._begun = self._last_report = time.monotonic()

    def add(self, table: pa.Table) -> None:
        rows = [self._checked(row) for row in table.to_pylist()]
        for row in rows:
            self._counts["num_documents"] += 1
            self._counts[f"num_{row['status']}"] += 1
            self._counts["num_tokens"] += row["num_tokens"]
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._waiting.append(pa.Table.from_pylist(rows, SCHEMA))
        if sum(len(waiting) for waiting in self._waiting) >= _PART_ROWS:
            self._flush()
        if time.monotonic() - self._last_report > _REPORT_S:
            self._report()

    def close(self) -> dict[str, int]:
        """Ends the files; the counts."""
        if self._waiting or not self._num_parts:
            self._flush()
        self._lines.close()
        self._report()
        return self._counts

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, or an error where an earlier document has its id."""
        if row["status"] != "ok":
            return row
        if row["doc_id"] in self._taken:
            reason = "an earlier document has this id; the first is kept"
            return {**row, "summary": None, "status": "error", "error": reason}
        self._taken.add(row["doc_id"])
        return row

    def _flush(self) -> None:
        name = f"summaries-{self._num_parts:05d}.parquet"
        pq.write_table(concatenate(self._waiting), self._directory / name)
        self._waiting = []
        self._num_parts += 1

    def _report(self) -> None:
        self._last_report = time.monotonic()
        speed = self._counts["num_tokens"] / (self._last_report - self._begun)
        log.info(
            "%d of about %d documents: %d ok, %d errors, %.0f tokens/s",
            self._counts["num_documents"],
            self._num_expected,
            self._counts["num_ok"],
            self._counts["num_error"],
            speed,
        )


def _shown(output: str, result: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    shown = {"output": output, **{key: result[key] for key in _SHOWN_KEYS}}
    if not result["num_error"]:
        return shown
    faults = f"{result['num_error']} of {result['num_documents']} documents failed, see {storage.join(output, LINES)}"
    if strict:
        raise StrictError(shown, faults)
    log.warning("%s", faults)
    return shown


if __name__ == "__main__":
    sys.exit(main())
