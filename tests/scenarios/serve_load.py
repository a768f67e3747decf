"""Many sessions at once against a server, with clients that cancel and vanish: nothing may break, leak or grow.

    python tests/scenarios/serve_load.py --minutes 5

starts `pipelines/serve.py` with a tiny model on this machine; `--url` takes a server that is there already, of one
replica: `/metrics` tells of the one that answers. The last line is one JSON object: how often what was answered,
seconds to the first token and between tokens (p50, p95, p99), the server's resident memory along the way. The exit code
is 0 where there was no 5xx, no connection broke but by its client, nothing was left in a slot and memory was flat.
Figures of latency hold for this client on the same machine, where it takes its share of the cores.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("the", "memory", "of", "a", "long", "book", "is", "a", "state", "of", "constant", "size", "and", "reads", "on")
SEGMENT_LEN = 32  # tokens
MOST_WORDS = 120  # that a session reads at once: so many sessions can be served on two cores, clients and all
GROWTH_FRACTION, GROWTH_BYTES = 0.05, 32 * 2**20  # of resident memory, after the warm-up, whichever is more
WARM_UP_FRACTION = 0.3  # of the time
KEEPALIVE_S = 2.0  # shorter than any server's: a connection that is closed as it is used again would be no fault of it
_IN_STREAM = "error in a stream"
EXPECTED = (200, 201, 404, 409, 429)  # 404 and 409: a session whose creation or request was broken off


class Load:
    """The clients and what they have seen."""

    def __init__(self, client: httpx.AsyncClient, end_s: float, seed: int) -> None:
        self.client = client
        self.end_s = end_s
        self.seed = seed
        self.statuses: Counter[int] = Counter()
        self.broken_off: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()  # of connections, and errors within streams
        self.first_s: list[float] = []
        self.between_s: list[float] = []

    async def user(self, number: int) -> None:
        """One user: sessions one after the other, until the time is over."""
        chance = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.end_s:
            session = f"user-{number}-{chance.getrandbits(64):x}"
            try:
                await self._post("/v1/sessions", json={"id": session})
                for _ in range(chance.randint(1, 4)):
                    await self._read(session, chance)
                    await self._write(session, chance)
                await self._post(f"/v1/sessions/{session}/fork", json={"id": f"{session}-fork"})
                for name in (session, f"{session}-fork"):
                    self._seen((await self.client.delete(f"/v1/sessions/{name}")).status_code)
            except httpx.HTTPError as error:
                self.faults[type(error).__name__] += 1

    async def _read(self, session: str, chance: random.Random) -> None:
        text = " ".join(chance.choices(WORDS, k=chance.randint(1, MOST_WORDS))).encode()
        vanishes = chance.random() < 0.1

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(text), 97):
                if vanishes and start > len(text) // 2:
                    raise _VanishedError
                yield text[start : start + 97]

        with contextlib.suppress(_VanishedError):
            await self._post(f"/v1/sessions/{session}/append", content=chunks(), headers={"content-type": "text/plain"})
        self.broken_off["bodies"] += vanishes

    async def _write(self, session: str, chance: random.Random) -> None:
        """Have something written; sometimes go in the middle of it, or before it has begun."""
        body = {"prompt": "\n", "max_tokens": chance.randint(1, 60), "stream": True, "ignore_eos": True}
        leaves_after = chance.randint(1, 10) if chance.random() < 0.2 else None
        if chance.random() < 0.05:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self._post(f"/v1/sessions/{session}/generate", json={**body, "stream": False})
            self.broken_off["requests"] += 1
            return
        last = begun = time.monotonic()
        num_events = 0
        async with self.client.stream("POST", f"/v1/sessions/{session}/generate", json=body) as answer:
            self._seen(answer.status_code)
            async for line in answer.aiter_lines():
                if answer.status_code == 200 and '"error"' in line:
                    self.faults[_IN_STREAM] += 1
                if '"session.text"' not in line:
                    continue
                now = time.monotonic()
                (self.between_s if num_events else self.first_s).append(now - (last if num_events else begun))
                last, num_events = now, num_events + 1
                if num_events == leaves_after:
                    self.broken_off["streams"] += 1
                    break
        await _heed(answer)

    async def _post(self, path: str, **request: object) -> None:
        answer = await self.client.post(path, **request)  # type: ignore[arg-type]
        self._seen(answer.status_code)
        await _heed(answer)

    def _seen(self, status: int) -> None:
        self.statuses[status] += 1


async def _heed(answer: httpx.Response) -> None:
    """Wait as long as a server asks for that has no room."""
    if answer.status_code == 429:
        await asyncio.sleep(float(answer.headers["retry-after"]))


class _VanishedError(Exception):
    """The client goes in the middle of its body."""


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


async def run(url: str, key: str | None, num_sessions: int, seconds: float, seed: int) -> dict[str, object]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_sessions, keepalive_expiry=KEEPALIVE_S)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as client:
        begun = time.monotonic()
        load = Load(client, begun + seconds, seed)
        users = [asyncio.create_task(load.user(number)) for number in range(num_sessions)]
        resident: list[tuple[float, float]] = []
        while not all(user.done() for user in users):
            resident.append((time.monotonic() - begun, (await metrics(client))["process_resident_memory_bytes"]))
            await asyncio.sleep(max(0.5, seconds / 60))
        await asyncio.gather(*users)
        left = await _settled(client)
        resident.append((time.monotonic() - begun, left["process_resident_memory_bytes"]))
    return report(load, resident, left, seconds)


async def _settled(client: httpx.AsyncClient) -> dict[str, float]:
    """The metrics once nothing is at work, or after half a minute."""
    found: dict[str, float] = {}
    for _ in range(60):
        found = await metrics(client)
        if not found["rmt_engine_num_requests"] and not found["rmt_engine_num_writing"]:
            break
        await asyncio.sleep(0.5)
    return found


def report(
    load: Load, resident: list[tuple[float, float]], left: dict[str, float], seconds: float
) -> dict[str, object]:
    warm = next((size for at, size in resident if at >= WARM_UP_FRACTION * seconds), resident[0][1])
    grown = resident[-1][1] - warm
    faults = {
        "5xx": sum(count for status, count in load.statuses.items() if status >= 500),
        "other": sum(count for status, count in load.statuses.items() if status < 500 and status not in EXPECTED),
        "in streams": load.faults[_IN_STREAM],
        "connections": load.faults.total() - load.faults[_IN_STREAM],
        "left over": int(left["rmt_engine_num_requests"] + left["rmt_engine_num_writing"]),
        "memory": int(grown > max(GROWTH_FRACTION * warm, GROWTH_BYTES)),
    }
    return {
        "ok": not any(faults.values()) and bool(load.first_s),
        "faults": faults,
        "statuses": dict(sorted(load.statuses.items())),
        "broken_off": dict(load.broken_off),
        "kinds_of_faults": dict(load.faults),
        "first_token_s": percentiles(load.first_s),
        "between_tokens_s": percentiles(load.between_s),
        "resident_bytes": {"first": resident[0][1], "warm": warm, "end": resident[-1][1]},
        "resident_mib": [round(size / 2**20) for _, size in resident],
    }


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 4) for p in (50, 95, 99)}


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """The address of a server of a tiny model, ended afterwards."""
    import rmt_core
    from tests.pipelines.serving_http import BYTES
    from tests.rmt_core.tiny import RMT, tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(RMT, segment_len=SEGMENT_LEN, vocab_size=BYTES.vocab_size)
        rmt_core.save(Path(folder) / "tiny", model, tokenizer=BYTES)
        words = [sys.executable, str(ROOT / "pipelines" / "serve.py"), "--model", f"{folder}/tiny", "--port", "0"]
        words += [
            "--store",
            f"{folder}/sessions",
            "--max-requests",
            "512",
            "--prefix-cache-bytes",
            "8m",
            "--replica-cpus",
            "0.5",
        ]
        log = Path(folder) / "log"
        with log.open("w") as lines, subprocess.Popen(words, stderr=lines, stdout=subprocess.DEVNULL) as process:
            try:
                while (found := re.search(r"^http://\S+$", log.read_text(), re.MULTILINE)) is None:
                    if process.poll() is not None:
                        raise RuntimeError(f"the server did not start:\n{log.read_text()}")
                    time.sleep(0.2)
                yield found[0]
            finally:
                process.terminate()


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a server; none: one is started")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--sessions", type=int, default=200, help="users at the same time")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(own_server())
        found = asyncio.run(run(url, arguments.key, arguments.sessions, 60 * arguments.minutes, arguments.seed))
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
