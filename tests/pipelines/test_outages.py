"""A store that fails while documents are read ends the job: its documents are not counted as faulty."""

import gzip
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import Config, InputError
from pipelines.data import catalogue
from pipelines.data.batches import Failed, batches
from pipelines.data.read import SUFFIXES
from pipelines.data.tokenise import ByteTokenizer
from pipelines.job import run_job

from .faulty_s3 import Fault, FaultyS3

TEXT = "some words, " * 2000
GET = r"^GET /\S+/a\."
OUTAGES = [Fault("status", GET, times=999), Fault("cut", GET, times=999)]
REFUSAL = Fault("status", r"^(GET|HEAD) /\S+/a\.", times=999, status=403, code="AccessDenied")


@pytest.fixture(params=SUFFIXES)
def uri(
    request: pytest.FixtureRequest, proxy: FaultyS3, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A file of each kind, with one document."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    path = tmp_path / f"a{request.param}"
    match request.param:
        case ".txt":
            path.write_text(TEXT)
        case ".txt.gz":
            path.write_bytes(gzip.compress(os.urandom(9000).hex().encode()))
        case ".jsonl":
            path.write_text(f'{{"text": "{TEXT}"}}\n')
        case _:
            pq.write_table(pa.table({"text": [TEXT]}), path)
    found = f"{s3_bucket}/{uuid.uuid4().hex}/{path.name}"
    storage.write_bytes(found, path.read_bytes())
    return found


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*OUTAGES, REFUSAL], ids=lambda fault: f"{fault.kind}-{fault.status}")
def test_an_outage_is_no_documents_fault(uri: str, proxy: FaultyS3, fault: Fault) -> None:
    files = storage.expand([uri], SUFFIXES)
    (batch,) = batches(ByteTokenizer(), files)
    assert not [event for event in batch if isinstance(event, Failed)]
    expected = storage.RefusedError if fault.status == 403 else storage.StorageError
    entry, _ = catalogue.survey(files[0])
    assert isinstance(entry, catalogue.Entry)

    proxy.plan(fault)
    with pytest.raises(expected):
        list(batches(ByteTokenizer(), files))
    with pytest.raises(expected):
        list(catalogue.survey(files[0]))
    with pytest.raises(expected):
        list(catalogue.Reader().open(entry).chunks)


@pytest.mark.s3
def test_a_file_that_is_gone_or_damaged_is_one(proxy: FaultyS3, s3_bucket: str) -> None:
    place = f"{s3_bucket}/{uuid.uuid4().hex}"
    for name in ("a.txt", "b.txt.gz"):
        storage.write_bytes(f"{place}/{name}", b"text")
    files = storage.expand([place], SUFFIXES)
    storage.delete(f"{place}/a.txt")
    found = [event for batch in batches(ByteTokenizer(), files) for event in batch if isinstance(event, Failed)]
    assert [failed.fault.kind for failed in found] == ["unreadable", "unreadable"]


@pytest.mark.parametrize(
    ("fault", "code"), [(storage.StorageError("away"), 1), (storage.RefusedError("no"), 2), (OSError("odd"), 2)]
)
def test_bad_input_that_a_failed_store_feigns_is_a_failure(
    fault: OSError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job may say in its own words what could not be read; the exit code still tells whose fault it is."""

    def job(config: Config) -> dict[str, object]:
        raise InputError("the model cannot be read") from fault

    assert run_job(job, Config, [], prog="x", description="x") == code
    assert capsys.readouterr().err == "x: error: the model cannot be read\n"
