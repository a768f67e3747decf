"""Sessions on an S3 that fails: what may pass is tried again, and an answer that is lost is no conflict."""

import uuid

import pytest

from pipelines.serving.store import ConflictError, Store, UnavailableError, open_store

from .faulty_s3 import Fault, FaultyS3

NAME = "group/part"
GET, PUT = r"^GET /\S+/part", r"^PUT "


@pytest.fixture
def store(proxy: FaultyS3, s3_bucket: str) -> Store:
    return open_store(f"{s3_bucket}/{uuid.uuid4().hex}")


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["status", "reset", "reset_in_body", "cut"])
def test_a_session_is_read_through_faults(store: Store, proxy: FaultyS3, kind: str) -> None:
    tag = store.put(NAME, bytes(range(256)) * 300, None)
    proxy.plan(Fault(kind, GET, times=2, status=503))  # type: ignore[arg-type]
    found = store.get(NAME)
    assert found is not None
    assert found == (bytes(range(256)) * 300, tag)
    assert proxy.num_faults == 2


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["status", "reset", "lost"])
def test_a_session_is_written_once_through_faults(store: Store, proxy: FaultyS3, kind: str) -> None:
    proxy.plan(Fault(kind, PUT))  # type: ignore[arg-type]
    tag = store.put(NAME, b"1", None)
    assert proxy.num_faults == 1
    proxy.plan(Fault(kind, PUT))  # type: ignore[arg-type]
    later = store.put(NAME, b"2", tag)
    assert store.get(NAME) == (b"2", later)
    with pytest.raises(ConflictError):
        store.put(NAME, b"3", tag)


@pytest.mark.s3
def test_another_writer_is_a_conflict_also_when_an_answer_is_lost(store: Store, proxy: FaultyS3) -> None:
    tag = store.put(NAME, b"1", None)
    proxy.plan(Fault("status", PUT))
    theirs = store.put(NAME, b"theirs", tag)
    proxy.plan(Fault("reset", PUT))
    with pytest.raises(ConflictError):
        store.put(NAME, b"ours", tag)
    assert store.get(NAME) == (b"theirs", theirs)


@pytest.mark.s3
def test_a_store_that_does_not_recover_is_one_line(
    store: Store, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.plan(Fault("status", times=99))
    with pytest.raises(UnavailableError, match=r"^s3://\S+/group/part: \S+ does not answer as it should, tried 6"):
        store.put(NAME, b"1", None)
    assert proxy.num_faults == 6
    proxy.plan(Fault("status", times=99, status=403, code="AccessDenied"))
    with pytest.raises(UnavailableError, match="no permission"):
        store.get(NAME)
    assert proxy.num_faults == 1
