"""An HTTP proxy before an S3 server that makes the faults a test asks for: errors, resets, cut bodies, slow answers."""

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple

HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length", "expect"}


class Fault(NamedTuple):
    """What happens to the next `times` requests whose line `METHOD /path?query` matches `where`."""

    kind: Literal["status", "reset", "reset_in_body", "cut", "slow", "silent", "lost"]  # lost: done, and reset
    where: str = ""
    times: int = 1
    status: int = 500
    code: str = "InternalError"  # S3's, in the body of an answer with `status`
    delay_s: float = 0.0  # of slow ones: between the pieces of a body


class Seen(NamedTuple):
    """A request that came."""

    line: str  # METHOD /path?query
    authorization: str
    fault: str  # the kind, or nothing


class FaultyS3:
    """The proxy: `endpoint` for clients, `plan` for what is to go wrong, `seen` for what came."""

    def __init__(self, endpoint: str) -> None:
        self.behind = endpoint.removeprefix("http://")
        self.seen: list[Seen] = []
        self._plan: list[Fault] = []
        self._lock = threading.Lock()
        self.over = threading.Event()  # the plan in force: then slow and silent answers end
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def plan(self, *faults: Fault) -> None:
        """Forgets earlier plans and what was seen, and ends what is still slow or silent."""
        with self._lock:
            self.over.set()
            self.over = threading.Event()
            self._plan, self.seen = list(faults), []

    def next_fault(self, line: str, authorization: str) -> Fault | None:
        with self._lock:
            fault = next((each for each in self._plan if re.search(each.where, line)), None)
            if fault is not None:
                place = self._plan.index(fault)
                self._plan[place : place + 1] = [fault._replace(times=fault.times - 1)] if fault.times > 1 else []
            self.seen.append(Seen(line, authorization, fault.kind if fault else ""))
            return fault

    @property
    def num_faults(self) -> int:
        return sum(bool(each.fault) for each in self.seen)

    def stop(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def shutdown_request(self, request: Any) -> None:
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4] != struct.pack("i", 0):
            request.close()  # no orderly end: with lingering set to 0 this sends a reset
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what tests provoke."""


def _handler(proxy: FaultyS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Silence."""

        def serve(self) -> None:
            body = self.read_body()
            fault = proxy.next_fault(f"{self.command} {self.path}", self.headers.get("Authorization", ""))
            if fault is None:
                self.answer(*self.forward(body))
            elif fault.kind == "status":
                text = f"<Error><Code>{fault.code}</Code><Message>by the proxy</Message></Error>".encode()
                self.answer(fault.status, [("Content-Type", "application/xml")], text)
            elif fault.kind == "reset":
                self.reset()
            elif fault.kind == "lost":
                self.forward(body)
                self.reset()
            elif fault.kind == "silent":
                proxy.over.wait(120)
                self.reset()
            else:
                self.break_body(fault, *self.forward(body))

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve  # noqa: N815 - http.server's names

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return out

        def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(proxy.behind, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
            with contextlib.closing(connection):
                connection.request(self.command, self.path, body=body, headers=headers)
                response = connection.getresponse()
                data = response.read()
                return response.status, response.getheaders(), data

        def head(self, status: int, headers: list[tuple[str, str]], size: int) -> None:
            self.send_response_only(status)
            lengths = [value for name, value in headers if name.lower() == "content-length"]
            for name, value in headers:
                if name.lower() not in HOP_HEADERS:
                    self.send_header(name, value)
            length = lengths[0] if self.command == "HEAD" and lengths else str(size)
            self.send_header("Content-Length", length)
            self.end_headers()

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.head(status, headers, len(data))
            if self.command != "HEAD":
                self.wfile.write(data)

        def break_body(self, fault: Fault, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.head(status, headers, len(data))
            half = data[: len(data) // 2]
            self.wfile.write(half)
            self.wfile.flush()
            if fault.kind == "slow":
                over = proxy.over
                for byte in data[len(half) :]:
                    if over.wait(fault.delay_s):
                        self.reset()
                        break
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
            elif fault.kind == "cut":
                self.close_connection = True
            else:
                time.sleep(0.05)  # so that the half arrives
                self.reset()

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    return Handler


@contextlib.contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    proxy = FaultyS3(endpoint)
    try:
        yield proxy
    finally:
        proxy.stop()
