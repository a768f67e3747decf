"""What stands before every route: keys, where a request comes from, sizes and times of bodies, headers, counts.

A plain ASGI middleware, so that streams pass through it as they come.
"""

import asyncio
import logging
import re
import secrets
import time
from traceback import format_tb
from urllib.parse import urlsplit

from fastapi.exceptions import HTTPException
from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Keys, given_key
from .errors import ApiError
from .metrics import Metrics
from .serve_config import ServeConfig, is_loopback

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """The middleware. Without keys everybody on this machine is the tenant "". Where a proxy in front `names` requests
    in their headers, it names the answers too.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys | None, metrics: Metrics, *, names: bool) -> None:
        self.app = app
        self.config = config
        self.keys = keys
        self.metrics = metrics
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        status = 0
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if not self.names:
                    headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, _Body(scope, receive, self.config).receive, answer)
        except ApiError as error:
            await error.response(_challenge(scope, error))(scope, receive, answer)
        except (ClientDisconnect, TaskCancelledError):  # the latter is how Ray Serve may say it
            pass  # nobody is there to be answered
        except Exception as error:  # the border: its message may hold what the user wrote, so neither shown nor logged
            where = "".join(format_tb(error.__traceback__))
            log.error("request %s failed: %s\n%s", request_id, type(error).__name__, where)
            if not status:
                await ApiError(500, "failed", f"the server failed on request {request_id}").response()(
                    scope, receive, answer
                )
        finally:
            self.metrics.answered(_route(scope), scope["method"], status, time.monotonic() - begun)

    def _admit(self, scope: Scope) -> None:
        """Who asks, into the scope's state; ApiError where nobody may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if (origin := headers.get("origin")) is not None and _netloc(origin) != host:
            raise ApiError(403, "foreign_origin", "pages of other sites may not use this server")
        if scope["path"] in OPEN_PATHS:
            return
        if self.keys is None:
            if not is_loopback(_host_name(host)):
                raise ApiError(403, "foreign_host", "without keys this server answers to localhost and 127.0.0.1 only")
            scope["state"]["tenant"] = ""
            return
        key = given_key(headers.get("authorization", ""))
        tenant = None if key is None else self.keys.tenant(key)
        if tenant is None:
            raise ApiError(401, "invalid_api_key", "give a valid API key as `Authorization: Bearer KEY`")
        scope["state"]["tenant"] = tenant


class _Body:
    """A request's body within its size and its time, and with no longer a pause than is allowed."""

    def __init__(self, scope: Scope, receive: Receive, config: ServeConfig) -> None:
        headers = Headers(scope=scope)
        streamed = scope["path"].endswith("/append") and not _is_json(headers.get("content-type", ""))
        self.limit = config.max_append_bytes if streamed else config.max_body_bytes
        self.pause_s = config.body_timeout_s
        self.timeout_s = config.request_timeout_s
        self._begun = time.monotonic()
        self._receive = receive
        self._declared = headers.get("content-length", "0")
        self._num_bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        if self._declared.isdecimal() and len(self._declared) < 20 and int(self._declared) > self.limit:
            raise self._too_large()
        left_s = max(0.0, self._begun + self.timeout_s - time.monotonic())
        try:
            async with asyncio.timeout(min(self.pause_s, left_s)):
                message = await self._receive()
        except TimeoutError:
            late = f"no further part of the body came within {self.pause_s:g} s"
            if left_s < self.pause_s:
                late = f"the body was not whole within {self.timeout_s:g} s"
            raise HTTPException(408, late) from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._num_bytes > self.limit:
                raise self._too_large()
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body has more than the {self.limit} bytes that are allowed here")


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _host_name(host: str) -> str:
    """`name` of `name:port` and `[v6]:port`."""
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _netloc(origin: str) -> str | None:
    """`name:port` of an origin; None where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _challenge(scope: Scope, error: ApiError) -> dict[str, str]:
    """With `Basic` a browser asks for the key; only the page's own request says so."""
    if error.status != 401:
        return {}
    return {"www-authenticate": 'Basic realm="key as password", charset="UTF-8"' if scope["path"] == "/" else "Bearer"}


def _route(scope: Scope) -> str:
    """The route's pattern: what a user wrote into a path never becomes a label."""
    return getattr(scope.get("route"), "path", "") or "none"
