"""Server-sent events: one JSON object each, and `[DONE]` at the end."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.responses import StreamingResponse

from .errors import ApiError
from .front import Ping, Running
from .requests import Event

_HEADERS = {"x-accel-buffering": "no"}  # proxies are to pass events on at once


def respond(running: Running, objects: Callable[[Event], Iterable[dict[str, Any]]]) -> StreamingResponse:
    """The answer that streams what `objects` makes of each event. An error comes as an event of its own, the last."""
    return StreamingResponse(_lines(running, objects), media_type="text/event-stream", headers=_HEADERS)


async def _lines(running: Running, objects: Callable[[Event], Iterable[dict[str, Any]]]) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(running.events()) as events:
            async for event in events:
                if isinstance(event, Ping):
                    yield ": ping\n\n"
                    continue
                for value in objects(event):
                    yield _line(value)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _line(error.body())
    finally:
        running.end()


def _line(value: dict[str, Any]) -> str:
    """In ASCII: clients that cut lines as `str.splitlines` does would cut at U+2028 and U+0085 too."""
    return f"data: {json.dumps(value)}\n\n"
