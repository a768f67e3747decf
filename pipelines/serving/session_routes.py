"""`/v1/sessions`: what a user has had read, kept as a state of constant size between requests."""

import codecs
import secrets
from collections.abc import Iterator
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Query, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from . import sse
from .errors import ApiError
from .front import Front, sampling_of, seed_of, usage_of
from .openai_schema import AppendText, CreateSession, ForkSession, GenerateText, check_text
from .requests import Done, Event, Progress, Request, Written
from .sessions import Info

_APPEND_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": AppendText.model_json_schema()},
            "text/plain": {"schema": {"type": "string", "description": "UTF-8 text of any length, in any chunks"}},
        },
    }
}
_TEXT_TYPES = ("text/plain", "application/octet-stream")


def routes(front: Front) -> APIRouter:
    router = APIRouter(prefix="/v1/sessions")
    sessions = front.service.sessions

    @router.post("", status_code=201)
    async def create(http: HttpRequest, body: CreateSession | None = None) -> dict[str, Any]:
        session = _new_id(None if body is None else body.id)
        return _described(session, await front.call(sessions.create, http.state.tenant, session))

    @router.get("/{session}")
    async def get(session: str, http: HttpRequest) -> dict[str, Any]:
        return _described(session, await front.call(sessions.info, http.state.tenant, session))

    @router.delete("/{session}", status_code=200)
    async def delete(session: str, http: HttpRequest) -> dict[str, Any]:
        await front.call(sessions.delete, http.state.tenant, session)
        return {"id": session, "object": "session.deleted", "deleted": True}

    @router.post("/{session}/fork", status_code=201)
    async def fork(session: str, http: HttpRequest, body: ForkSession | None = None) -> dict[str, Any]:
        body = body or ForkSession(id=None, version=None)
        new = _new_id(body.id)
        return _described(new, await front.call(sessions.fork, http.state.tenant, session, new, body.version))

    @router.post("/{session}/append", openapi_extra=_APPEND_BODY)
    async def append(
        session: str,
        http: HttpRequest,
        stream: Annotated[bool, Query(description="progress as server-sent events")] = False,
        request_id: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
        expected_version: Annotated[int | None, Query(ge=0)] = None,
    ) -> Response:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            body = await _json_body(http)
            tokens, stream = await front.encode(body.text), stream or body.stream
            request_id = request_id if body.request_id is None else body.request_id
            expected_version = expected_version if body.expected_version is None else body.expected_version
        elif kind in _TEXT_TYPES:
            tokens = await front.encode(await _text_body(http))
        else:
            raise ApiError(415, "unsupported_media_type", "give application/json, or text/plain in UTF-8")
        request = Request(
            tokens=tokens,
            session=session,
            tenant=http.state.tenant,
            request_id=request_id,
            expected_version=expected_version,
        )
        return await _respond(front, request, http, stream=stream)

    @router.post("/{session}/generate")
    async def generate(session: str, body: GenerateText, http: HttpRequest) -> Response:
        request = Request(
            tokens=await front.encode(body.prompt),
            max_new_tokens=front.max_tokens(body.max_tokens),
            session=session,
            tenant=http.state.tenant,
            sampling=sampling_of(body, temperature=0.0),
            seed=seed_of(body.seed, body.request_id),
            stop_tokens=front.stop_tokens(body),
            stop_strings=body.stops,
            request_id=body.request_id,
            expected_version=body.expected_version,
        )
        return await _respond(front, request, http, stream=body.stream)

    return router


async def _respond(front: Front, request: Request, http: HttpRequest, *, stream: bool) -> Response:
    running = await front.begin(request, http)
    if stream:
        return sse.respond(running, lambda event: _chunks(request, event))
    text, done = await running.result()
    return JSONResponse(_result(request, done, text))


def _chunks(request: Request, event: Event) -> Iterator[dict[str, Any]]:
    if isinstance(event, Progress):
        yield {"object": "session.progress", **event._asdict()}
    elif isinstance(event, Written) and event.text:
        yield {"object": "session.text", "text": event.text}
    elif isinstance(event, Done):
        yield _result(request, event, None)


def _result(request: Request, done: Done, text: str | None) -> dict[str, Any]:
    """How a request of a session ended; in a stream the text has been sent before."""
    written: dict[str, str] = {} if not request.max_new_tokens else {"finish_reason": done.finish_reason}
    if text is not None and request.max_new_tokens:
        written["text"] = text
    return {
        "id": request.session,
        "object": "session.generation" if request.max_new_tokens else "session.append",
        **written,
        "version": done.version,
        "num_tokens": done.num_tokens,
        "num_segments": done.num_segments,
        "usage": usage_of(done.usage),
    }


def _new_id(given: str | None) -> str:
    return f"session-{secrets.token_hex(16)}" if given is None else given


def _described(session: str, info: Info) -> dict[str, Any]:
    return {
        "id": session,
        "object": "session",
        "version": info.version,
        "num_tokens": info.num_tokens,
        "num_segments": info.num_segments,
        "num_bytes": info.num_bytes,
        "saved_s": info.saved_s,
        "kept_versions": [boundary.version for boundary in info.kept],
    }


async def _json_body(http: HttpRequest) -> AppendText:
    try:
        return AppendText.model_validate(await http.json())
    except pydantic.ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from None
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is not valid JSON") from None


async def _text_body(http: HttpRequest) -> str:
    """The text of a body that comes in chunks cut anywhere. ApiError where it is not UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    num_bytes = 0
    try:
        async for chunk in http.stream():
            parts.append(check_text(decoder.decode(chunk)))
            num_bytes += len(chunk)
        parts.append(decoder.decode(b"", final=True))
    except ClientDisconnect:
        raise
    except UnicodeDecodeError:
        raise ApiError(400, "invalid_text", f"the text is not UTF-8, near byte {num_bytes}") from None
    except ValueError as error:
        raise ApiError(400, "invalid_text", f"the text {error}, near byte {num_bytes}") from None
    return "".join(parts)
