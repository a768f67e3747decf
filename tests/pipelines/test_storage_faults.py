"""S3 that fails: what may pass is tried again and told, what stays is one clear line without credentials."""

import logging
import os
import pickle
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import InputError
from pipelines.stores import steady

from .faulty_s3 import Fault, FaultyS3

BUCKET = "rmt-tests"  # of the fixture s3_bucket

CONTENT = bytes(range(256)) * 300
GET, PUT, HEAD = r"^GET /\S+/\S+", r"^PUT ", r"^HEAD "


@pytest.fixture(params=["pyarrow", "s3fs"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RMT_S3_CLIENT", request.param)
    return str(request.param)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for a second; too little where much is sent on a busy machine."""
    monkeypatch.setenv("RMT_S3_CONNECT_TIMEOUT_S", "1")
    monkeypatch.setenv("RMT_S3_READ_TIMEOUT_S", "1")
    monkeypatch.setattr(steady, "LEAST_BYTES_PER_S", 10**6)


@pytest.fixture
def place(proxy: FaultyS3) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


PASSING = [
    Fault("status", times=2, status=500),
    Fault("status", status=503, code="SlowDown"),
    Fault("status", status=503, code="ServiceUnavailable"),
    Fault("status", status=429, code="TooManyRequests"),
    Fault("reset", times=2),
    Fault("reset_in_body"),
    Fault("cut"),
    Fault("silent"),
    Fault("slow", delay_s=0.5),
]


@pytest.mark.s3
@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}-{fault.code}")
def test_what_may_pass_is_tried_again_when_reading(
    client: str, proxy: FaultyS3, place: str, fault: Fault, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    uri = storage.join(place, "a.bin")
    storage.write_bytes(uri, CONTENT)
    caplog.clear()  # a busy machine may have been too slow in writing
    proxy.plan(fault._replace(where=GET))
    with caplog.at_level(logging.WARNING, "pipelines"):
        assert storage.read_bytes(uri) == CONTENT
    assert proxy.num_faults == fault.times
    told = sum("attempt" in record.message for record in caplog.records)
    assert 1 <= told <= fault.times  # a connection that is reset when used again the library itself opens anew


@pytest.mark.s3
@pytest.mark.parametrize("fault", [PASSING[0], PASSING[1], PASSING[4]], ids=lambda fault: f"{fault.kind}-{fault.code}")
def test_what_may_pass_is_tried_again_when_writing(
    client: str, proxy: FaultyS3, place: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan(fault._replace(where=PUT))
    with caplog.at_level(logging.WARNING, "pipelines"):
        storage.write_bytes(storage.join(place, "a.bin"), CONTENT)
    assert proxy.num_faults == fault.times
    told = sum("attempt" in record.message for record in caplog.records)
    assert 1 <= told <= fault.times  # a connection that is reset when used again the library itself opens anew
    assert storage.read_bytes(storage.join(place, "a.bin")) == CONTENT


@pytest.mark.s3
def test_asking_listing_and_deleting_are_tried_again(client: str, proxy: FaultyS3, place: str) -> None:
    uri = storage.join(place, "a.txt")
    storage.write_bytes(uri, b"1")
    proxy.plan(Fault("status", HEAD))
    assert storage.exists(uri)
    proxy.plan(Fault("reset", r"^GET /\S+\?"))
    assert storage.list_names(place) == ["a.txt"]
    proxy.plan(Fault("status", r"^(DELETE|POST) "), Fault("lost", r"^(DELETE|POST) "))
    storage.delete(uri)
    assert proxy.num_faults == 2
    assert not storage.exists(uri)


@pytest.mark.s3
def test_parquet_is_read_through_faults(client: str, proxy: FaultyS3, place: str, tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"a": list(range(20_000))})
    uri = storage.join(place, "a.parquet")
    with storage.writing(uri) as path:
        pq.write_table(table, path, row_group_size=5_000)
    proxy.plan(Fault("cut", GET), Fault("status", GET, times=2), Fault("reset_in_body", GET))
    files, key = storage.filesystem(uri)
    assert pq.ParquetFile(files.open_input_file(key)).read().equals(table)
    assert proxy.num_faults == 4


@pytest.mark.s3
def test_small_reads_are_few_requests(client: str, proxy: FaultyS3, place: str) -> None:
    content = os.urandom(2 * steady.READ_AHEAD_BYTES + 1000)
    storage.write_bytes(f"{place}/a.bin", content)
    proxy.plan()
    files, key = storage.filesystem(f"{place}/a.bin")
    with files.open_input_file(key) as file:
        assert b"".join(iter(lambda: file.read(8192), b"")) == content
        assert sum(each.line.startswith("GET") for each in proxy.seen) <= 3
        for at, size in ((5, 10), (steady.READ_AHEAD_BYTES - 3, 10), (0, 4), (len(content) - 2, 9), (len(content), 1)):
            file.seek(at)
            assert file.read(size) == content[at : at + size]
        assert file.tell() == len(content)


@pytest.mark.s3
def test_long_objects_go_up_in_parts_that_are_tried_again(
    proxy: FaultyS3, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(steady, "WHOLE_BYTES", 2**20)
    local = tmp_path / "long.bin"
    local.write_bytes(os.urandom(13 * 2**20))
    proxy.plan(Fault("status", r"^PUT .*partNumber=1", times=2), Fault("reset", r"^PUT .*partNumber=2"))
    uri = storage.join(place, "long.bin")
    with storage.writing(uri) as path:
        path.write_bytes(local.read_bytes())
    assert proxy.num_faults == 3
    with storage.local_file(uri) as copy:
        assert copy.read_bytes() == local.read_bytes()


@pytest.mark.s3
def test_copies_of_directories_are_checked(
    client: str, proxy: FaultyS3, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.bin").write_bytes(CONTENT)
    (tmp_path / "done.json").write_text("1")
    storage.upload_directory(tmp_path, place, marker="done.json")
    sums = storage.read_bytes(storage.join(place, "SHA256SUMS")).decode()
    assert re.fullmatch(r"[0-9a-f]{64}  deep/a\.bin\n[0-9a-f]{64}  done\.json\n", sums)
    with storage.local_directory(place) as copy:
        assert (copy / "deep" / "a.bin").read_bytes() == CONTENT

    storage.write_bytes(storage.join(place, "deep", "a.bin"), CONTENT[:-1] + b"?")
    with pytest.raises(storage.StorageError, match=r"damaged: deep/a.bin"), storage.local_directory(place):
        pass
    assert any("read again" in record.message for record in caplog.records)
    storage.delete(storage.join(place, "deep", "a.bin"))
    with pytest.raises(storage.StorageError, match=r"incomplete: deep/a.bin"), storage.local_directory(place):
        pass


@pytest.mark.s3
def test_a_directory_that_replaces_another_leaves_nothing_of_it(proxy: FaultyS3, place: str, tmp_path: Path) -> None:
    for names in (("a", "b", "done"), ("b", "c", "done")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).write_text(names[0])
        proxy.plan()
        storage.upload_directory(folder, place, marker="done")
        writes = [each.line for each in proxy.seen if each.line.startswith(("PUT", "POST", "DELETE"))]
        assert "/done" in writes[-1]
    assert storage.list_names(place) == ["SHA256SUMS", "b", "c", "done"]


# --- what does not pass -----------------------------------------------------------------------------

REFUSALS = [
    (Fault("status", times=99, status=403, code="AccessDenied"), "no permission"),
    (Fault("status", times=99, status=403, code="InvalidAccessKeyId"), "credentials are wrong"),
    (Fault("status", times=99, status=403, code="SignatureDoesNotMatch"), "credentials are wrong"),
    (Fault("status", times=99, status=400, code="ExpiredToken"), "credentials are wrong"),
]


@pytest.mark.s3
@pytest.mark.parametrize(("fault", "line"), REFUSALS, ids=lambda value: getattr(value, "code", None))
def test_refusals_are_one_line_and_not_tried_again(
    client: str, proxy: FaultyS3, place: str, fault: Fault, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan(fault)
    with pytest.raises(storage.RefusedError, match=line) as raised:
        storage.write_bytes(storage.join(place, "a.bin"), b"1")
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(place)
    assert not [record for record in caplog.records if "attempt" in record.message]


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_named(client: str, proxy: FaultyS3) -> None:
    for action in (
        lambda uri: storage.read_bytes(uri),
        lambda uri: storage.write_bytes(uri, b"1"),
        lambda uri: storage.exists(uri),
        lambda uri: storage.list_names(uri),
        lambda uri: storage.expand([uri], (".txt",)),
    ):
        with pytest.raises(storage.RefusedError, match="there is no bucket no-such-bucket at http://127.0.0.1"):
            action("s3://no-such-bucket/a/b.txt")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.mark.s3
def test_a_server_that_never_recovers_is_given_up(
    client: str, proxy: FaultyS3, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    proxy.plan(Fault("status", PUT, times=99))
    with pytest.raises(storage.StorageError, match="tried 3 times") as raised:
        storage.write_bytes(storage.join(place, "a.bin"), b"1")
    assert not isinstance(raised.value, storage.RefusedError)
    assert proxy.num_faults == 3


@pytest.mark.s3
def test_a_silent_or_absent_server_is_given_up(
    client: str, proxy: FaultyS3, place: str, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.plan(Fault("silent", times=99))
    with pytest.raises(storage.StorageError, match="RMT_S3_READ_TIMEOUT_S"):
        storage.read_bytes(storage.join(place, "a.bin"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(storage.StorageError, match=r"http://127.0.0.1:9 does not answer"):
        storage.read_bytes(storage.join(place, "a.bin"))


# --- credentials ------------------------------------------------------------------------------------


@pytest.mark.s3
def test_profiles_give_endpoint_region_and_credentials(
    client: str, proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        "[default]\nendpoint_url = http://127.0.0.1:1\n[profile mine]\nregion = eu-south-2\nservices = here\n"
        f"[services here]\ns3 =\n  endpoint_url = {proxy.endpoint}\n"
    )
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = PROFILEKEY\naws_secret_access_key = x\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert not storage.exists(f"s3://{BUCKET}/none")
    assert proxy.seen
    for each in proxy.seen:
        assert re.search(r"Credential=PROFILEKEY/\d+/eu-south-2/s3/", each.authorization)


@pytest.mark.s3
def test_what_is_sent_to_workers_holds_no_credentials(
    client: str, proxy: FaultyS3, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = f"secret-{uuid.uuid4().hex}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    files, key = storage.filesystem(f"{place}/a")
    sent = pickle.dumps(files)
    assert secret.encode() not in sent
    copy = pickle.loads(sent)
    with copy.open_output_stream(key) as stream:
        stream.write(CONTENT)
    assert storage.read_bytes(f"{place}/a") == CONTENT
    assert copy.equals(files)


@pytest.mark.parametrize(
    "uri", ["s3://AKIA:hidden@bucket/x", "s3://AKIA:hid/den@bucket/x", "s3://bucket/x?secret_key=hidden"]
)
def test_credentials_in_a_path_are_refused_and_not_shown(uri: str) -> None:
    for function in (storage.absolute, storage.filesystem):
        with pytest.raises(InputError, match="credentials") as raised:
            function(uri)
        assert "hid" not in str(raised.value)


@pytest.mark.s3
def test_messages_hide_credentials(proxy: FaultyS3, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "by the proxy")  # which is what the server's message says
    proxy.plan(Fault("status", times=99, status=400, code="Strange"))
    with pytest.raises(storage.StorageError) as raised:
        storage.write_bytes(storage.join(place, "a.bin"), b"1")
    assert "***" in str(raised.value)
    assert "by the proxy" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"), [("RMT_S3_CLIENT", "boto"), ("AWS_MAX_ATTEMPTS", "0"), ("RMT_S3_READ_TIMEOUT_S", "soon")]
)
def test_wrong_settings_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name):
        storage.filesystem("s3://bucket/x")


# --- a command's end --------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize(
    ("where", "fault", "code", "line"),
    [
        ("s3://no-such-bucket/a", None, 2, "there is no bucket no-such-bucket"),
        (f"s3://{BUCKET}/a", Fault("status", times=99, status=403, code="AccessDenied"), 2, "no permission"),
        (f"s3://{BUCKET}/a", Fault("status", times=99), 1, "does not answer as it should, tried 2 times"),
    ],
)
def test_commands_end_with_a_line_and_a_code(
    proxy: FaultyS3, where: str, fault: Fault | None, code: int, line: str
) -> None:
    proxy.plan(*([fault] if fault else []))
    done = subprocess.run(
        [sys.executable, "pipelines/prepare.py", "--input", where, "--output", "s3://rmt-tests/never"],
        env={**os.environ, "AWS_MAX_ATTEMPTS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert line in done.stderr.splitlines()[-1]
    assert done.stdout == ""


@pytest.mark.s3
def test_parallel_copies_of_many_files_end(proxy: FaultyS3, place: str, tmp_path: Path) -> None:
    """As Ray Train stores a checkpoint: more files at once than Arrow has threads for input and output."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number:02d}.bin").write_bytes(CONTENT)
    proxy.plan(Fault("status", PUT, times=3))
    files, key = storage.filesystem(place)
    pyarrow.fs.copy_files(str(folder), key, destination_filesystem=files, use_threads=True)
    back = tmp_path / "back"
    back.mkdir()
    pyarrow.fs.copy_files(key, str(back), source_filesystem=files, use_threads=True)
    assert [path.read_bytes() for path in sorted(back.iterdir())] == [CONTENT] * 24
    files.delete_dir(key)
    assert storage.list_names(place) == []


def test_only_the_s3_of_this_package_is_used() -> None:
    """Every S3 path goes through `pipelines/stores`; sessions need conditional writes, which only boto3 has."""
    for path in (Path(__file__).resolve().parents[2] / "pipelines").rglob("*.py"):
        if path.parent.name != "stores" and path.name != "store_s3.py":
            assert not re.search(r"S3FileSystem|import s3fs|import boto3|from_uri", path.read_text("utf-8")), path
    assert isinstance(storage.filesystem("s3://bucket/x")[0], pyarrow.fs.PyFileSystem)
