"""Disks: full or read-only ones are told in one line, files appear whole as NFS needs it, seals find alterations."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import storage

CONTENT = bytes(range(256)) * 300


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(small_disk: Path) -> None:
    uri = str(small_disk / "a.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(storage.StorageError, match="the disk is full"):
        storage.write_bytes(uri, CONTENT * 2)
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(small_disk)) == ["a.bin"]
    with pytest.raises(storage.StorageError, match="the disk is full"):
        storage.upload_directory(_folder_of(small_disk.parent / "local", CONTENT * 2), str(small_disk / "there"))
    assert storage.list_names(str(small_disk)) == ["a.bin"]


def _folder_of(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "x.bin").write_bytes(content)
    return folder


def test_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(storage.RefusedError, match="the disk is read-only"):
        storage.write_bytes(str(small_disk / "a.bin"), b"1")


def test_a_place_where_nothing_can_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(storage.RefusedError, match="/proc/x/a: no permission .* nothing can be made there"):
        storage.write_bytes("/proc/x/a", b"1")
    long = str(tmp_path / ("a" * 300))
    for look in (storage.exists, storage.list_names, lambda uri: storage.write_bytes(f"{uri}/a", b"1")):
        with pytest.raises(storage.RefusedError, match="the name is too long for the disk"):
            look(long)


def test_files_are_flushed_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS needs it, and with no locks: fsync of the file, rename, fsync of its folder."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def note(name: str, path: str) -> None:
        calls.append(f"{name} {os.path.basename(path)}".rstrip())

    def fsync(descriptor: int) -> None:
        note(
            "fsync",
            re.sub(r"^\.(.+)\.[0-9a-f]{8}\.tmp$", r"fresh \1", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name),
        )
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (note("replace", str(b)), replace(a, b))[1])
    monkeypatch.setattr("fcntl.flock", lambda *_: pytest.fail("a lock"))
    monkeypatch.setattr("fcntl.lockf", lambda *_: pytest.fail("a lock"))
    storage.write_bytes(str(tmp_path / "run" / "a.json"), b"1")
    assert calls == ["fsync fresh a.json", "replace a.json", "fsync run"]
    calls.clear()
    storage.upload_directory(_folder_of(tmp_path / "local", b"1"), str(tmp_path / "run" / "there"))
    assert calls == ["fsync x.bin", "fsync fresh there", "fsync run"]


def test_a_file_replaced_by_another_host_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "a.json")
    storage.write_json(uri, {"a": 1})
    read, answers = Path.read_bytes, [OSError(116, "Stale file handle"), None]

    def stale_once(path: Path) -> bytes:
        if (error := answers.pop(0)) is not None:
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale_once)
    assert storage.read_json(uri) == {"a": 1}


def test_seals_of_several_writers_are_checked_together(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    for rank in range(2):
        folder = tmp_path / str(rank)
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / f"{rank}.bin").write_bytes(bytes([rank]) * 9)
        storage.seal(folder, part=f"worker_{rank:05d}")
        shutil.copytree(folder, merged, dirs_exist_ok=True)
    assert storage.check_sums(merged, "there") == 2
    (merged / "deep" / "1.bin").write_bytes(b"?")
    with pytest.raises(storage.StorageError, match=r"there is damaged: deep/1.bin does not match"):
        storage.check_sums(merged, "there")
