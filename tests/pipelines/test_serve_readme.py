"""The requests that README.md shows are answered, in its order."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.serving_http import running, until

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
ADDRESS = "localhost:8000"
BOOK = "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition. " * 9

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def commands() -> Iterator[list[str]]:
    for block in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if (words := shlex.split(line, comments=True)) and words[0] == "curl":
                yield words


def test_its_requests_are_answered(tmp_path: Path) -> None:
    book = tmp_path / "pipelines/books/train/emma.txt"
    book.parent.mkdir(parents=True)
    book.write_text(BOOK)
    answers = {}
    with running() as server:
        for words in commands():
            address = server.url.removeprefix("http://")
            words = [word.replace(ADDRESS, address) for word in words]
            (place,) = (word for word in words if address in word)
            done = subprocess.run(
                ["curl", "-sS", "--fail-with-body", *words[1:]],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
            answers[place.rpartition("/")[2]] = json.loads(done.stdout)
        job = answers["summaries"]["id"]
        until(lambda: server.http.get(f"/v1/summaries/{job}").json()["status"] == "succeeded", "the summary")
        assert server.http.get("/v1/sessions/emma").json()["num_tokens"] > len(BOOK)  # what was written counts too
    assert answers["sessions"]["id"] == "emma"
    assert answers["append"]["num_tokens"] == len(BOOK)
    assert answers["generate"]["text"]
    assert answers["fork"]["id"] != "emma"
