"""`prepare` against the library that it tokenises with, against `datasets.map`, and on two workers against one.

The text is that of the embedded novels, again and again; the tokenizer a byte-level BPE trained on them. Unlike the
other benchmarks this one needs all that `prepare` does, and the package `datasets`, imported where they are used.
"""

import filecmp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .measuring import Compared, Job, compared, take_turns, tell

# The promises: no figure may be smaller.
MIN_OF_LIMIT = 0.85  # of the bytes that the tokenizer alone gets through in the same time on a core
MIN_OF_DATASETS = 1.5  # times the bytes of `datasets.map(batched=True)` on a core
MIN_SPEED_UP = 1.7  # one long document on two workers

_PREPARE = Path(__file__).resolve().parents[1] / "prepare.py"
_SEGMENT_LEN = 1024


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    vocab_size: int = 16_000
    num_documents: int = 2_000  # of the many short ones
    document_chars: int = 8_000
    repeats: int = 5  # timed rounds on one core, at least 2
    long_chars: int = 2**29  # of the one long document: long beside what two workers take to start
    long_repeats: int = 3  # rounds of one and two workers, at least 2
    whole_chars: int = 2**22  # of a document that is also tokenised in one piece: 100 bytes of memory each


QUICK = Sizes(
    vocab_size=400,
    num_documents=50,
    document_chars=2_000,
    repeats=2,
    long_chars=2**22 + 2**20,  # just long enough to be spread over workers
    long_repeats=2,
    whole_chars=2**20 + 2**19,
)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


class _Place(NamedTuple):
    """Where the benchmark works."""

    folder: Path
    books: str
    tokenizer: Any  # of the library `tokenizers`

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"


def ingest(job: Job) -> dict[str, Any]:
    """All three measurements, with the same tokens each way."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a ratio compares work on one core
    with tempfile.TemporaryDirectory(prefix="rmt-ingest-") as name:
        place = _place(Path(name), job.sizes.vocab_size)
        core = _on_one_core(place, job.sizes)
        long = _long_document(place, job.sizes)
    promises = {
        "same_tokens": core.pop("same_tokens") and long.pop("same_tokens"),
        "limit_of_the_tokenizer": core["of_limit"] >= MIN_OF_LIMIT,
        "against_datasets": core["of_datasets"] >= MIN_OF_DATASETS,
        "two_workers": long["speed_up"] >= MIN_SPEED_UP,
    }
    for promise, kept in promises.items():
        tell(f"{promise:>30} {'not judged' if job.quick else 'kept' if kept else 'MISSED'}")
    return {"promises": promises, "one_core": core, "long_document": long}


def _place(folder: Path, vocab_size: int) -> _Place:
    import tokenizers

    from pipelines.data.books import embedded_books

    books = "\n\n".join(embedded_books("train").values())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books.splitlines(keepends=True), trainer)
    place = _Place(folder, books, tokenizer)
    place.tokenizer_folder.mkdir()
    tokenizer.save(str(place.tokenizer_folder / "tokenizer.json"))
    return place


def _text(books: str, start: int, num_chars: int) -> str:
    """`num_chars` characters of the books, over again at their end."""
    start %= len(books)
    times = -(-(start + num_chars) // len(books))
    return (books * times)[start : start + num_chars]


# --- many short documents, one core -----------------------------------------------------------------


def _on_one_core(place: _Place, sizes: Sizes) -> dict[str, Any]:
    """A work unit of `prepare`, from JSONL to Parquet, against the tokenizer alone and against `datasets.map`."""
    texts = [_text(place.books, 7919 * n, sizes.document_chars) for n in range(sizes.num_documents)]
    lines = (json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts))
    (place.folder / "short.jsonl").write_text("".join(lines))
    works: dict[str, Callable[[], Any]] = {
        "limit": partial(place.tokenizer.encode_batch_fast, texts, add_special_tokens=False),
        "prepare": _unit_of_prepare(place),
        "datasets": _datasets_map(place, texts),
    }
    limit, documents, columns = (works[name]() for name in works)  # also the first, untimed turn
    ids = [encoding.ids for encoding in limit]
    taken = take_turns(works, sizes.repeats, "cpu")
    of_limit, of_datasets = (compared(taken[name], taken["prepare"]) for name in ("limit", "datasets"))
    num_bytes = sum(len(text.encode()) for text in texts)
    tell(f"{num_bytes / 1e6:.1f} MB in {len(texts)} documents, on one core:")
    tell(f"{'tokenizer':>12} {num_bytes / 1e6 / of_limit.first_s:6.2f} MB/s")
    tell(f"{'prepare':>12} {num_bytes / 1e6 / of_limit.second_s:6.2f} MB/s{_spread(of_limit)} of the tokenizer's")
    tell(f"{'datasets.map':>12} {num_bytes / 1e6 / of_datasets.first_s:6.2f} MB/s{_spread(of_datasets)} of it")
    return {
        "num_bytes": num_bytes,
        "of_limit": of_limit.ratio,
        "of_datasets": of_datasets.ratio,
        "limit": of_limit._asdict(),
        "datasets": of_datasets._asdict(),
        "same_tokens": documents() == ids == columns["input_ids"][:],
    }


def _spread(found: Compared) -> str:
    low, high = found.ratio_quartiles
    return f", {found.ratio:.2f} ({low:.2f} to {high:.2f})"


def _unit_of_prepare(place: _Place) -> Callable[[], Callable[[], list[list[int]]]]:
    """What a worker of `prepare` does with the file; gives a function that reads the tokens back."""
    from pipelines import storage
    from pipelines.data.read import SUFFIXES
    from pipelines.data.segment import Unit, write_unit
    from pipelines.data.tokenise import load_tokenizer

    tokenizer = load_tokenizer(str(place.tokenizer_folder))
    output = place.folder / "unit"
    tokenizer.save_pretrained(output)
    files = storage.expand([str(place.folder / "short.jsonl")], SUFFIXES)
    unit = Unit(0, files, str(output), _SEGMENT_LEN, tokenizer.fingerprint)

    def work() -> Callable[[], list[list[int]]]:
        result = write_unit(unit)
        return lambda: _tokens(output, [document.document_id for document in result.documents])

    return work


def _tokens(output: Path, document_ids: list[str]) -> list[list[int]]:
    """Each document's tokens in the segment files of a folder."""
    import pyarrow.parquet as pq

    found: dict[str, list[int]] = {document_id: [] for document_id in document_ids}
    for path in sorted(output.glob("segments-*.parquet")):
        table = pq.read_table(path)
        for document_id, tokens in zip(table["document_id"].to_pylist(), table["tokens"].to_pylist(), strict=True):
            found[document_id] += tokens
    return list(found.values())


def _datasets_map(place: _Place, texts: list[str]) -> Callable[[], Any]:
    """The way that the documentation of `datasets` and `transformers` teaches, from text in memory."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=place.tokenizer)
    dataset = datasets.Dataset.from_dict({"text": texts})
    return lambda: dataset.map(
        lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"], load_from_cache_file=False
    )


# --- one long document, one and two workers ---------------------------------------------------------


def _long_document(place: _Place, sizes: Sizes) -> dict[str, Any]:
    """The command as users run it, without the start of Ray."""
    whole = _text(place.books, 0, sizes.whole_chars)
    _prepare(place, "whole", whole, 2)
    ids = place.tokenizer.encode(whole, add_special_tokens=False).ids
    same = _tokens(place.folder / "whole", ["whole"]) == [ids]
    text = _text(place.books, 0, sizes.long_chars)
    taken: dict[int, list[float]] = {1: [], 2: []}
    for i in range(sizes.long_repeats):
        for num_workers in (1, 2) if i % 2 else (2, 1):
            taken[num_workers].append(_prepare(place, f"long-{num_workers}", text, num_workers))
    same = same and _same_files(*(place.folder / f"long-{num_workers}" for num_workers in (1, 2)))
    found = compared(taken[1], taken[2])
    megabytes = len(text.encode()) / 1e6
    tell(f"one document of {megabytes:.1f} MB:")
    tell(f"{'1 worker':>12} {megabytes / found.first_s:6.2f} MB/s")
    tell(f"{'2 workers':>12} {megabytes / found.second_s:6.2f} MB/s{_spread(found)} times as fast")
    return {"num_bytes": len(text.encode()), "speed_up": found.ratio, "times": found._asdict(), "same_tokens": same}


def _prepare(place: _Place, name: str, text: str, num_workers: int) -> float:
    """Seconds that `prepare` takes for a document, from when it has its Ray to the finished store."""
    output = place.folder / name
    if output.exists():
        for path in output.iterdir():
            path.unlink()
    source = place.folder / "whole.txt" if name == "whole" else place.folder / "long.txt"
    if not source.exists():
        source.write_text(text, encoding="utf-8", newline="")
    argv = ["--input", source, "--output", output, "--tokenizer", place.tokenizer_folder]
    argv += ["--segment-len", _SEGMENT_LEN, "--num-cpus", num_workers]
    done = subprocess.run([sys.executable, _PREPARE, *map(str, argv)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"prepare failed: {done.stderr}")
    # The tokenizer is put there when Ray stands, store.json when all is done.
    begun, ended = ((output / file).stat().st_mtime_ns for file in ("tokenizer.json", "store.json"))
    return (ended - begun) / 1e9


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    _, different, odd = filecmp.cmpfiles(one, other, names, shallow=False)
    return names == sorted(path.name for path in other.iterdir()) and not different and not odd
