"""Measure summaries against people's: ROUGE of each strategy, beside the lead and random sentences.

    python pipelines/summary_quality.py --model smollm2/ --pairs squality.jsonl --output runs/quality
    python pipelines/summary_quality.py --pairs squality.jsonl --output runs/quality --summaries memory=runs/summaries
    python pipelines/summary_quality.py --pairs squality.jsonl --output runs/pairs --training-texts

Pairs are lines of JSON: `id`, `text` and `references` (a list); SQuALITY's and QMSum's own lines are understood too (of
SQuALITY the first question, which asks for the plot; of QMSum the general query). Runs `summarise` with each strategy,
which goes on where it was stopped, then writes `results.md` and `results.json`. With `--training-texts` it writes
`texts.jsonl` instead, for prepare: each document, the prompt of the strategy `memory`, and a reference.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import logging
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from pipelines import storage
from pipelines.config import Config, Count, InputError
from pipelines.extras import require_extra
from pipelines.job import run_job
from pipelines.summarising.strategies import PROMPT
from pipelines.tasks import rouge
from pipelines.tasks.rouge import LEAD, MEASURES, RANDOM, Pair

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.summary_quality")

_DRAWS = 20  # of random sentences, whose scores are averaged
_PAIRS, _RESULTS, _TABLE, _TEXTS = "documents.jsonl", "results.json", "results.md", "texts.jsonl"
_TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


class QualityConfig(Config):
    pairs: list[str] = pydantic.Field(min_length=1, description="files of documents with references (.jsonl)")
    output: str = pydantic.Field(description="directory of summaries and results, on disk")
    model: str | None = pydantic.Field(None, description="directory of the model to measure (none: none is run)")
    strategy: list[Literal["memory", "rolling", "map_reduce"]] = pydantic.Field(
        ["rolling", "map_reduce"], description="strategies that it is run with"
    )
    summaries: list[str] = pydantic.Field([], description="further outputs of summarise to score, as name=directory")
    limit: Count | None = pydantic.Field(None, ge=2, description="only so many documents, the first (none: all)")
    max_new_tokens: int = pydantic.Field(400, ge=1, description="tokens a summary, at most")
    segment_len: Count | None = pydantic.Field(None, ge=32, description="tokens of a piece, as of summarise")
    batch_size: int = pydantic.Field(8, ge=1, description="documents or pieces side by side")
    block_size: int = pydantic.Field(2, ge=1, description="documents that are done again after a kill")
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where the model is: cpu or cuda")
    training_texts: bool = pydantic.Field(False, description="write texts to train on, and nothing else")


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(measure, QualityConfig, argv, prog="summary_quality", description=__doc__.splitlines()[0])


def measure(config: QualityConfig) -> dict[str, Any]:
    """Makes the summaries and scores them; headline numbers. InputError."""
    output = storage.absolute(config.output)
    pairs = [pair for file in config.pairs for pair in read_pairs(file)][: config.limit]
    if len({pair.doc_id for pair in pairs}) < len(pairs):
        raise InputError(f"{', '.join(config.pairs)}: ids are not unique")
    if config.training_texts:
        return _write_texts(pairs, storage.join(output, _TEXTS))
    require_extra("rouge", job="summary_quality")
    if len(pairs) < 2:
        raise InputError(f"{', '.join(config.pairs)} holds {len(pairs)} documents; intervals need at least 2")
    places = {name: place for name, _, place in (given.partition("=") for given in config.summaries)}
    if "" in places.values():
        raise InputError(f"--summaries {' '.join(config.summaries)}: needs name=directory")
    if config.model is not None:
        lines = [json.dumps({"id": pair.doc_id, "text": pair.text}) + "\n" for pair in pairs]
        documents, content = storage.join(output, _PAIRS), "".join(lines).encode()
        if not storage.exists(documents):
            storage.write_bytes(documents, content)
        elif storage.read_bytes(documents) != content:
            raise InputError(
                f"{output} holds summaries of other documents; give --pairs and --limit as before, or another --output"
            )
        for strategy in config.strategy:
            places[strategy] = storage.join(output, strategy)
            _summarise(config, documents, strategy, places[strategy])
    found = {name: _summaries(place) for name, place in places.items()}
    result = _results(config, pairs, found)
    storage.write_json(storage.join(output, _RESULTS), result)
    storage.write_bytes(storage.join(output, _TABLE), _table(result).encode())
    log.info("\n%s", _table(result))
    means = {name: {m: value[m]["mean"] for m in MEASURES} for name, value in result["systems"].items()}
    return {"output": output, "table": storage.join(output, _TABLE), "num_documents": len(pairs), "means": means}


# --- documents and references -----------------------------------------------------------------------


def read_pairs(file: str) -> list[Pair]:
    """The documents of a file that have references; InputError names a line that is not understood."""
    pairs = []
    try:
        lines = storage.read_bytes(storage.absolute(file)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--pairs {file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            pairs.append(_pair(json.loads(line), f"{Path(file).stem}:{number}"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"--pairs {file}: line {number} is no document with references ({reason})") from error
    return pairs


def _pair(value: dict[str, Any], default_id: str) -> Pair:
    if "questions" in value:  # SQuALITY
        references = [_text(reference) for reference in value["questions"][0]["references"]]
        return Pair(str(value["id"]), value["document"], references)
    if "meeting_transcripts" in value:  # QMSum
        turns = [f"{turn['speaker']}: {turn['content']}" for turn in value["meeting_transcripts"]]
        references = [query["answer"] for query in value["general_query_list"]]
        return Pair(str(value.get("id", default_id)), "\n".join(turns), references)
    return Pair(str(value.get("id", default_id)), value["text"], [str(text) for text in value["references"]])


def _text(reference: Any) -> str:
    return reference if isinstance(reference, str) else reference["response_text"]


def _write_texts(pairs: Sequence[Pair], target: str) -> dict[str, Any]:
    """A text for every reference, such as the strategy `memory` is to read and write."""
    texts = [
        {"id": f"{pair.doc_id}/{n}", "text": f"{pair.text}{PROMPT}{reference}"}
        for pair in pairs
        for n, reference in enumerate(pair.references)
    ]
    storage.write_bytes(target, "".join(json.dumps(text) + "\n" for text in texts).encode())
    return {"output": target, "num_documents": len(pairs), "num_texts": len(texts)}


# --- summaries --------------------------------------------------------------------------------------


def _summarise(config: QualityConfig, documents: str, strategy: str, output: str) -> None:
    """Runs the job; SystemExit with its exit code where it fails."""
    options: Mapping[str, Any] = {
        "model": config.model,
        "input": documents,
        "output": output,
        "strategy": strategy,
        "max-new-tokens": config.max_new_tokens,
        "segment-len": config.segment_len if strategy != "memory" else None,
        "batch-size": config.batch_size,
        "block-size": config.block_size,
        "device": config.device,
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    log.info("summarise with strategy %s", strategy)
    script = Path(__file__).resolve().parent / "summarise.py"
    code = subprocess.run([sys.executable, str(script), *words], stdout=sys.stderr, check=False).returncode
    if code:
        raise SystemExit(code)


def _summaries(place: str) -> dict[str, dict[str, Any]]:
    """Rows of an output of summarise by id."""
    file = storage.join(storage.absolute(place), "summaries.jsonl")
    if not storage.exists(file):
        raise InputError(f"{place} holds no summaries.jsonl; give an output of summarise")
    rows = [json.loads(line) for line in storage.read_bytes(file).splitlines()]
    return {row["doc_id"]: row for row in rows}


# --- results ----------------------------------------------------------------------------------------


def _results(
    config: QualityConfig, pairs: Sequence[Pair], found: Mapping[str, Mapping[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Means with intervals of every system and baseline, and of the differences to random sentences as long."""
    long = {pair.doc_id: rouge.reference_words(pair) for pair in pairs}
    random = _random_scores(pairs, long)
    scores = {
        LEAD: rouge.scores(pairs, {pair.doc_id: rouge.lead(pair, long[pair.doc_id]) for pair in pairs}),
        RANDOM: random,
    }
    as_long = {LEAD: random, RANDOM: random}
    about: dict[str, dict[str, Any]] = {LEAD: {}, RANDOM: {}}
    for name, rows in found.items():
        texts = {doc_id: row["summary"] or "" for doc_id, row in rows.items()}
        scores[name] = rouge.scores(pairs, texts)
        as_long[name] = _random_scores(pairs, {doc_id: len(text.split()) for doc_id, text in texts.items()})
        mine = [rows[pair.doc_id] for pair in pairs if pair.doc_id in rows]
        about[name] = {
            "num_summaries": sum(row["status"] == "ok" for row in mine),
            "mean_words": float(np.mean([len((row["summary"] or "").split()) for row in mine])) if mine else 0.0,
            "model": mine[0]["model"] if mine else None,
        }
    systems = {
        name: {
            **{m: rouge.mean(values[:, n])._asdict() for n, m in enumerate(MEASURES)},
            "over_random": {m: rouge.mean((values - as_long[name])[:, n])._asdict() for n, m in enumerate(MEASURES)},
            **about[name],
        }
        for name, values in scores.items()
    }
    words = [len(reference.split()) for pair in pairs for reference in pair.references]
    return {
        "num_documents": len(pairs),
        "mean_document_words": float(np.mean([len(pair.text.split()) for pair in pairs])),
        "mean_reference_words": float(np.mean(words)),
        "config": config.model_dump(mode="json"),
        "documents": [pair.doc_id for pair in pairs],
        "systems": systems,
    }


def _random_scores(pairs: Sequence[Pair], num_words: Mapping[str, int]) -> np.ndarray:
    """Of random sentences of so many words, averaged over draws: (documents, measures)."""
    drawn = [
        {pair.doc_id: rouge.random_sentences(pair, num_words.get(pair.doc_id, 0), seed) for pair in pairs}
        for seed in range(_DRAWS)
    ]
    return np.mean([rouge.scores(pairs, texts) for texts in drawn], axis=0)


def _table(result: Mapping[str, Any]) -> str:
    """Markdown: a row a system, 95 % intervals in brackets, that in ROUGE-2 over as long random sentences."""
    heads = [_TITLES[measure] for measure in MEASURES]
    lines = [
        f"| summaries | words | {' | '.join(heads)} | ROUGE-2 over random sentences as long |",
        "|---|---|" + "---|" * (len(heads) + 1),
    ]
    for name, system in result["systems"].items():
        words = f"{system['mean_words']:.0f}" if "mean_words" in system else f"{result['mean_reference_words']:.0f}"
        cells = [_cell(system[measure]) for measure in MEASURES]
        over = "" if name == RANDOM else _cell(system["over_random"]["rouge2"])
        lines.append(f"| {re.sub(r'[|]', '/', name)} | {words} | {' | '.join(cells)} | {over} |")
    return "\n".join(lines) + "\n"


def _cell(score: Mapping[str, float]) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
