"""Paths on disk and on S3 behave alike; nothing is seen half written; listings are complete and ordered."""

import os
import uuid
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.config import InputError

SUFFIXES = (".txt", ".txt.gz")


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to write to."""
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


def test_what_is_written_is_read(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    for data in (bytes(range(256)) * 3, b""):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
        assert storage.list_sizes(storage.join(root, "a")) == {"b.bin": len(data)}
    assert storage.list_sizes(root) == storage.list_sizes(storage.join(root, "none")) == {}
    assert storage.exists(uri)
    assert not storage.is_directory(uri)
    assert storage.is_directory(storage.join(root, "a"))
    assert storage.list_names(storage.join(root, "a")) == ["b.bin"]
    assert storage.list_names(storage.join(root, "none")) == []
    storage.delete(uri)
    assert not storage.exists(uri)


def test_json_is_kept(root: str) -> None:
    value = {"a": [1, 2.5, None], "é": "\u4f60"}
    storage.write_json(storage.join(root, "x.json"), value)
    assert storage.read_json(storage.join(root, "x.json")) == value


def test_suffixes_never_change_the_bytes(root: str) -> None:
    storage.write_bytes(storage.join(root, "x.gz"), b"not gzip")
    assert storage.read_bytes(storage.join(root, "x.gz")) == b"not gzip"


def test_a_failed_write_leaves_the_old_file(root: str) -> None:
    uri = storage.join(root, "a.txt")
    storage.write_bytes(uri, b"old")

    def fail() -> None:
        with storage.writing(uri) as path:
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(root) == ["a.txt"]


def test_directories_go_up_and_come_down(root: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    for name, data in (("done.json", b"1"), ("deep/er/x.bin", b"2")):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)
    uri = storage.join(root, "up", "there")
    for _ in range(2):  # the second replaces the first
        storage.upload_directory(local, uri, marker="done.json")
        with storage.local_directory(uri) as copy:
            files = {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        assert files == {"done.json": b"1", "deep/er/x.bin": b"2"}
    assert storage.list_names(storage.join(root, "up")) == ["there"]
    with storage.local_file(storage.join(uri, "done.json")) as path:
        assert path.read_bytes() == b"1"


def test_a_missing_directory_is_refused(root: str) -> None:
    with (
        pytest.raises(InputError, match="no such directory"),
        storage.local_directory(storage.join(root, "none")),
    ):
        pass


def _names(*patterns: str) -> list[str]:
    return [entry.name for entry in storage.expand(patterns, SUFFIXES)]


def test_files_directories_and_globs_are_listed_in_order(root: str) -> None:
    for name in ("b.txt", "a.TXT", "c.md", "sub/a.txt.gz", "sub/deep/z.txt", "other/q.txt", "[x].txt"):
        storage.write_bytes(storage.join(root, *name.split("/")), b"12")
    everything = ["[x].txt", "a.TXT", "b.txt", "other/q.txt", "sub/a.txt.gz", "sub/deep/z.txt"]
    assert _names(root) == _names(root + "/") == everything
    assert _names(f"{root}/*.txt") == ["[x].txt", "b.txt"]
    assert _names(f"{root}/[ab].[Tt]*") == ["a.TXT", "b.txt"]
    assert _names(f"{root}/[!b].TXT", f"{root}/?.txt") == ["a.TXT", "b.txt"]
    assert _names(f"{root}/**/*.txt") == ["[x].txt", "b.txt", "other/q.txt", "sub/deep/z.txt"]
    assert _names(f"{root}/s*") == ["sub/a.txt.gz", "sub/deep/z.txt"]
    assert _names(f"{root}/s*/deep/*.txt") == ["sub/deep/z.txt"]
    assert _names(f"{root}/[x].txt") == ["[x].txt"]
    assert _names(f"{root}/sub/deep/z.txt", f"{root}/b.txt") == ["z.txt", "b.txt"]
    entry = storage.expand([f"{root}/b.txt"], SUFFIXES)[0]
    assert entry.uri == f"{root}/b.txt"
    assert entry.num_bytes == 2
    assert entry.mtime_ns > 0


def test_a_file_named_twice_counts_once(root: str) -> None:
    storage.write_bytes(storage.join(root, "d", "a.txt"), b"1")
    assert _names(f"{root}/d", f"{root}/d/a.txt", f"{root}/d/*.txt") == ["a.txt"]


def test_a_missing_file_is_listed_beside_others(root: str) -> None:
    storage.write_bytes(storage.join(root, "a.txt"), b"1")
    sizes = [entry.num_bytes for entry in storage.expand([f"{root}/a.txt", f"{root}/no.txt"], SUFFIXES)]
    assert sizes == [1, -1]


def test_links_are_followed_but_not_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    for name in ("here/deep/a.txt", "there/b.txt"):
        (tmp_path / name).write_text("1")
    (tmp_path / "here" / "also").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "deep" / "up").symlink_to(tmp_path / "here")
    for pattern in ("here", "here/**/*.txt"):
        caplog.clear()
        assert _names(f"{tmp_path}/{pattern}") == ["also/b.txt", "deep/a.txt"]
        assert "deep/up leads back to a directory that it stands in" in caplog.text


def test_a_link_to_nothing_is_listed_as_missing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    for pattern in ("", "/*.txt"):
        sizes = {entry.name: entry.num_bytes for entry in storage.expand([f"{tmp_path}{pattern}"], SUFFIXES)}
        assert sizes == {"a.txt": 1, "b.txt": -1}
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"b\.txt does not exist"):
        storage.expand([str(tmp_path)], SUFFIXES)


def test_patterns_that_find_nothing_are_refused(root: str) -> None:
    storage.write_bytes(storage.join(root, "c.md"), b"1")
    for pattern, reason in (
        (root, "holds no"),
        (f"{root}/*.txt", "holds no"),
        (f"{root}/nowhere", "does not exist"),
        (f"{root}/nowhere.txt", "no input found"),
        (f"{root}/c.md", "unsupported suffix"),
        (f"{root}/[z-a].txt", "not a glob"),
        (f"{root}/a[].txt", "not a glob"),
    ):
        with pytest.raises(InputError, match=reason):
            storage.expand([pattern], SUFFIXES)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b") == str(tmp_path / "b")
    assert storage.absolute("~/x") == os.path.expanduser("~/x")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    for wrong in ("http://host/a.txt", "gs://bucket/a"):
        with pytest.raises(InputError, match="s3://"):
            storage.absolute(wrong)
    for wrong in ("s3://", "s3:///", "s3:///key"):
        for use in (storage.absolute, storage.filesystem):
            with pytest.raises(InputError, match=f"^{wrong}: needs a bucket, s3://bucket/key; look whether a variable"):
                use(wrong)
    with pytest.raises(InputError, match="a path is empty"):  # not the folder that one is in
        storage.absolute("")
