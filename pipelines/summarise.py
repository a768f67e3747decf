"""Summarise documents of any length: one row a document, as Parquet and JSONL.

    python pipelines/summarise.py --model runs/train/model --input books/ --output runs/summaries
    python pipelines/summarise.py --model smollm2/ --strategy rolling --input requests.jsonl --output runs/summaries
    python pipelines/summarise.py status --output runs/summaries

Reads .txt, .txt.gz, .jsonl (`text`, optional `id`; or OpenAI Batch requests) and .parquet (columns `text`, optional
`id`) from disk or s3://. The input is read once to plan blocks of documents. Workers take blocks, and the rows of each
appear as one Parquet part when it ends. Every document ends as `ok`, `error` with the reason, or `skipped`. Killed at
any point, the same command goes on: parts that are there stay, a long document continues from its last stored state.

Memory: this process holds the names of files and the numbers of blocks, never a text or an id; through Ray go numbers.
What a worker holds is said in pipelines/summarising/worker.py.
"""

import sys
from pathlib import Path


def _utf8(number: int, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(f"text {number}: half of a surrogate pair at character {error.start}") from error


if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import pydantic

import rmt_core
from pipelines import storage
from pipelines.cluster import connect
from pipelines.config import Config, Count, InputError, StrictError, fingerprint
from pipelines.data import inputs
from pipelines.data.read import SUFFIXES
from pipelines.job import run_job
from pipelines.storage import FileEntry
from pipelines.summarising import ledger as ledgers
from pipelines.summarising import strategies
from pipelines.summarising.crew import Crew, run_blocks
from pipelines.summarising.documents import DocumentError, Style, Text
from pipelines.summarising.ledger import Counts, Ledger
from pipelines.summarising.planning import Wishes, make_plan
from pipelines.summarising.standing import Todo, job_there, whats_left
from pipelines.summarising.strategies import Settings, default_every
from pipelines.summarising.worker import Work

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.summarise")

_SHOWN_KEYS = ("num_ok", "num_error", "num_skipped", "num_pending", "num_documents", "num_tokens", "tokens_per_s")


class SummariseConfig(Config):
    model: str = pydantic.Field(description="directory of a model saved with its tokenizer, on disk or s3://")
    input: list[str] = pydantic.Field(
        min_length=1, description="files, directories or globs (.txt .txt.gz .jsonl .parquet), on disk or s3://"
    )
    output: str = pydantic.Field(description="directory of the summaries, on disk or s3://")
    strategy: Literal["memory", "rolling", "map_reduce"] | None = pydantic.Field(
        None,
        description="memory: of a model with memory, its default; rolling (default), map_reduce: of any instruct model",
    )
    prompt: str | None = pydantic.Field(
        None, description="text read after a document, before the summary (none: the strategy's own)"
    )
    segment_len: Count | None = pydantic.Field(
        None, ge=32, description="tokens of a piece, of rolling and map_reduce (none: 1024, or what the model takes)"
    )
    max_new_tokens: int = pydantic.Field(128, ge=1, description="tokens a summary, at most")
    temperature: float = pydantic.Field(0.0, ge=0, description="of sampling; 0: the likeliest")
    top_p: float = pydantic.Field(1.0, gt=0, le=1, description="mass of the likeliest tokens that are sampled from")
    seed: int = pydantic.Field(0, description="of sampling; a document's own is made of it and the document's id")
    limit: Count | None = pydantic.Field(None, ge=1, description="only so many documents, the first (none: all)")
    shard: str = pydantic.Field("0/1", description="i/n: every n-th block from the i-th on, i from 0 to n - 1")
    retry_failed: bool = pydantic.Field(False, description="try documents again that ended as errors")
    batch_size: int = pydantic.Field(8, ge=1, description="documents that a worker reads side by side")
    block_size: int | None = pydantic.Field(
        None, ge=1, description="documents committed together, redone at most after a kill (none: up to 4 batches)"
    )
    state_every: int | None = pydantic.Field(
        None, ge=0, description="segments between stored states of a document (none: 128, of pieces 1; 0: never)"
    )
    num_workers: int = pydantic.Field(1, ge=1, description="workers, each with the model and one core (or GPU)")
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where a worker's model is: cpu or cuda")
    strict: bool = pydantic.Field(False, description="exit with 2 when any row is an error")

    @pydantic.field_validator("prompt")
    @classmethod
    def _prompt_is_text(cls, value: str | None) -> str | None:
        if value is not None and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("needs to be UTF-8 text")
        return value

    @pydantic.field_validator("shard")
    @classmethod
    def _shard_is_one(cls, value: str) -> str:
        match = re.fullmatch(r"(\d+)/(\d+)", value)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError("needs i/n with i from 0 to n - 1: 0/4 to 3/4 are the shards of four")
        return value

    def shard_numbers(self) -> tuple[int, int]:
        """(this shard, how many there are)."""
        number, count = map(int, self.shard.split("/"))
        return number, count

    def style(self) -> Style:
        return Style(self.max_new_tokens, rmt_core.Sampling(self.temperature, self.top_p), self.seed)


class StatusConfig(Config):
    output: str = pydantic.Field(description="directory of the summaries, on disk or s3://")


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["status"]:
        description = "How far a job is: documents that are done, failed and left."
        return run_job(status, StatusConfig, words[1:], prog="summarise status", description=description)
    return run_job(summarise, SummariseConfig, words, prog="summarise", description=__doc__.splitlines()[0])


def summarise(config: SummariseConfig) -> dict[str, Any]:
    """Makes the summaries, or finds them made; the counts that are printed. InputError, StrictError."""
    output = storage.absolute(config.output)
    files = [file for file in storage.expand(config.input, SUFFIXES) if not file.uri.startswith(output + "/")]
    if not files:
        raise InputError(f"no input found outside the output {output}")
    files = inputs.with_distinct_names(files)
    settings, decisive = _settings(config)
    ledger = Ledger(output)
    job = job_there(ledger, decisive, files, retry=config.retry_failed)
    todo = None if job is None else whats_left(ledger, job, config.shard_numbers(), retry=config.retry_failed)
    if todo is not None and not todo.blocks and todo.result is not None:
        log.info("%s already holds the summaries of this input by this model: nothing to do", output)
        return _shown(output, todo.result, strict=config.strict)
    begun, made = time.monotonic(), Counts()
    if todo is None or job is None or todo.blocks:
        with connect():
            if job is None:
                job = _plan(config, ledger, files, decisive)
            todo = whats_left(ledger, job, config.shard_numbers(), retry=config.retry_failed)
            every = config.state_every if config.state_every is not None else default_every(settings.strategy)
            decided = job["plan"], job["decisive"]["model"], job["config_fingerprint"]
            work = Work(output, *decided, every, todo.round + 1, secrets.token_hex(8))
            made = run_blocks(settings, work, _crew(config, job, todo))
    result = _finish(ledger, job, todo, made, time.monotonic() - begun)
    return _shown(output, result, strict=config.strict)


def status(config: StatusConfig) -> dict[str, Any]:
    """How far the job in an output is. InputError where there is none."""
    output = storage.absolute(config.output)
    ledger = Ledger(output)
    job = ledger.read(ledgers.JOB)
    if job is None:
        raise InputError(f"{output} holds no {ledgers.JOB}: no summaries, or none that are planned yet")
    done = ledger.done()
    counts = ledger.count(sorted(done))
    found = {
        "output": output,
        **counts._asdict(),
        "num_documents": job["num_documents"],
        "num_pending": job["num_documents"] - counts.num_documents,
        "num_blocks": job["num_blocks"],
        "num_blocks_done": len(done),
        "num_stored_states": ledger.num_states(),
        "complete": len(done) == job["num_blocks"],
    }
    log.info(
        "%s: %d of %d documents: %d ok, %d errors, %d skipped",
        *(output, counts.num_documents, job["num_documents"], counts.num_ok, counts.num_error, counts.num_skipped),
    )
    return found


def _settings(config: SummariseConfig) -> tuple[Settings, dict[str, Any]]:
    """What workers need to know, and all that decides what is written about a document."""
    model = storage.absolute(config.model)
    wanted = Settings(
        model=model,
        strategy=config.strategy or strategies.default_strategy(model),
        prompt=config.prompt or "",
        style=config.style(),
        batch_size=config.batch_size,
        segment_len=config.segment_len,
        device=config.device,
    )
    subject = strategies.look_at(wanted, config.prompt)
    decisive = {
        "format": ledgers.FORMAT,
        "strategy": wanted.strategy,
        "model": subject.model,
        "tokenizer": subject.tokenizer,
        "prompt": subject.prompt,
        "segment_len": subject.segment_len,
        **strategies.describe_style(wanted.style),
        "limit": config.limit,
    }
    return wanted._replace(prompt=subject.prompt, segment_len=subject.segment_len), decisive


# --- the work ---------------------------------------------------------------------------------------


def _plan(
    config: SummariseConfig, ledger: Ledger, files: Sequence[FileEntry], decisive: dict[str, Any]
) -> dict[str, Any]:
    """Looks through the input and writes the plan; the job, which from now on is there.

    That is another command's where one that began meanwhile was sooner; InputError where it is about something else.
    """
    hands = config.num_workers * config.shard_numbers()[1]
    plan = make_plan(ledger, files, Wishes(config.limit, config.block_size, config.batch_size, hands))
    job = {
        "format": ledgers.FORMAT,
        "plan": plan.name,
        **plan.numbers._asdict(),
        "decisive": decisive,
        "config_fingerprint": fingerprint(decisive),
        "input_fingerprint": inputs.input_fingerprint(plan.files),
        "config": config.model_dump(mode="json"),
    }
    ledger.write(ledgers.inputs_name(plan.name), [file._asdict() for file in plan.files])
    if ledger.create_job(job):
        return job
    there = job_there(ledger, decisive, files, retry=config.retry_failed)
    assert there is not None
    log.info("another command has planned this job: going on with its blocks of %d documents", there["block_len"])
    return there


def _crew(config: SummariseConfig, job: dict[str, Any], todo: Todo) -> Crew:
    log.info(
        "%d of %d blocks of up to %d documents to do, with %d workers",
        *(len(todo.blocks), job["num_blocks"], job["block_len"], config.num_workers),
    )
    return Crew(config.num_workers, config.device, todo.blocks, todo.committed)


def _finish(ledger: Ledger, job: dict[str, Any], todo: Todo, made: Counts, elapsed_s: float) -> dict[str, Any]:
    """Writes the JSONL files and the result from the rows that are there, also of other shards."""
    done = ledger.done()
    if missing := [block for block in todo.mine if block not in done]:
        raise RuntimeError(f"{len(missing)} blocks have no rows, the first {missing[0]}; give the same command again")
    while True:
        counts = ledger.assemble(sorted(done))
        before, done = done, ledger.done()
        if before == done:  # no other shard has ended a block meanwhile
            break
    complete = len(done) == job["num_blocks"]
    if complete:
        if counts.num_documents != job["num_documents"]:
            raise RuntimeError(f"{ledger.output} has {counts.num_documents} rows for {job['num_documents']} documents")
        if not ledger.failed(sorted(done), todo.round):  # else another shard may be at work on them again
            ledger.sweep(job["plan"])
    result = {
        "format": ledgers.FORMAT,
        **counts._asdict(),
        "num_pending": job["num_documents"] - counts.num_documents,
        "num_blocks_done": len(done),
        "round": todo.round,
        "elapsed_s": round(elapsed_s, 3),
        "tokens_per_s": round(made.num_tokens / elapsed_s, 1),
        "config_fingerprint": job["config_fingerprint"],
    }
    ledger.write(ledgers.RESULT, result)
    return result


def _shown(output: str, result: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    shown = {"output": output, **{key: result[key] for key in _SHOWN_KEYS}}
    log.info("%(num_ok)d ok, %(num_error)d errors, %(num_skipped)d skipped, %(num_pending)d pending", result)
    if not result["num_error"]:
        return shown
    dead = storage.join(output, ledgers.DEAD_LETTERS)
    faults = f"{result['num_error']} of {result['num_documents']} documents failed, see {dead}"
    if strict:
        raise StrictError(shown, faults)
    log.warning("%s", faults)
    return shown


# --- without a job ----------------------------------------------------------------------------------


class Summariser:
    """Summaries in this process, without Ray or files: `Summariser(directory)(text)`."""

    def __init__(
        self,
        model: str,
        *,
        strategy: str | None = None,
        prompt: str | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 8,
    ) -> None:
        """`strategy` is one of `strategies.STRATEGIES`, None the model's default. InputError where they do not fit."""
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        uri = storage.absolute(model)
        strategy = strategy or strategies.default_strategy(uri)
        if strategy not in strategies.STRATEGIES:
            raise InputError(f"strategy is {strategy!r}; allowed: {', '.join(strategies.STRATEGIES)}")
        self._style = Style(max_new_tokens, rmt_core.Sampling(), 0)
        settings = Settings(uri, strategy, "", self._style, batch_size, None, "cpu")
        subject = strategies.look_at(settings, prompt)
        self._strategy, _ = strategies.open_strategy(
            settings._replace(prompt=subject.prompt, segment_len=subject.segment_len)
        )

    def __call__(self, texts: str | Sequence[str]) -> list[dict[str, str]]:
        """One dictionary a text, with its `summary_text`. DocumentError names a text that cannot be summarised."""
        given = [texts] if isinstance(texts, str) else list(texts)
        documents = (Text(str(n), [_utf8(n, text)], self._style) for n, text in enumerate(given))
        found = []
        for summary in self._strategy.summarise(documents):
            if summary.error:
                raise DocumentError(f"text {summary.doc_id}: {summary.error}")
            found.append({"summary_text": summary.text})
        return found


if __name__ == "__main__":
    sys.exit(main())
