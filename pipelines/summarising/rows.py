"""Rows of the summaries: one a document, the same in Parquet and JSONL."""

from typing import Any

import pyarrow as pa

from pipelines.data.batch_requests import Answer, result_line
from pipelines.data.catalogue import Entry
from pipelines.summarising.documents import Summary

OK, ERROR, SKIPPED = "ok", "error", "skipped"

SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("summary", pa.string()),  # null where the status is not ok
        ("num_tokens", pa.int64()),  # of the document, all of them read; of an error row, those read before
        ("num_segments", pa.int64()),
        ("model", pa.string()),  # the model's fingerprint
        ("status", pa.string()),  # ok, error or skipped
        ("error", pa.string()),  # the reason; null where the status is ok
        ("num_written", pa.int64()),  # tokens of the summary
        ("finish_reason", pa.string()),  # stop: the model ended it; length: max_new_tokens were written
        ("strategy", pa.string()),
        ("settings", pa.string()),  # fingerprint of all that decides what is written
        ("source", pa.string()),  # file, and line or row in it
        ("sha256", pa.string()),  # of the text
        ("attempt", pa.int32()),  # 1, and one more for each retry of what failed
        ("elapsed_s", pa.float64()),  # from opening the document to its row, beside others
        ("finished_unix_s", pa.int64()),
        ("url", pa.string()),  # of the batch request that it answers, else null
    ]
)


def row(entry: Entry, summary: Summary | None, about: dict[str, Any]) -> dict[str, Any]:
    """The row of a summary; without one, of an entry whose outcome was known before. `about` gives what is left."""
    if summary is None:
        status, reason = entry.outcome, entry.reason
    else:
        status, reason = (ERROR, summary.error) if summary.error else (OK, None)
    found = {name: None if summary is None else getattr(summary, name) for name in ("finish_reason",)}
    counts = {
        name: 0 if summary is None else getattr(summary, name) for name in ("num_tokens", "num_segments", "num_written")
    }
    return {
        "doc_id": entry.doc_id,
        "summary": summary.text if summary is not None and status == OK else None,
        "status": status,
        "error": reason,
        "source": entry.source,
        "sha256": entry.sha256,
        "elapsed_s": 0.0 if summary is None else round(summary.elapsed_s, 3),
        "url": entry.url,
        **found,
        **counts,
        **about,
    }


def dead_letter(row: dict[str, Any]) -> dict[str, Any]:
    """What is needed to find a document that failed and to see why."""
    return {name: row[name] for name in ("doc_id", "source", "error", "attempt", "num_tokens", "sha256")}


def batch_line(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a result line of an OpenAI Batch."""
    return result_line(
        Answer(
            custom_id=row["doc_id"],
            url=row["url"],
            model=row["model"],
            text=row["summary"],
            error=row["error"],
            finish_reason=row["finish_reason"],
            prompt_tokens=row["num_tokens"],
            completion_tokens=row["num_written"],
            created_unix_s=row["finished_unix_s"],
        )
    )
