"""OpenAI Batch files: request lines in, result lines out.

A request line is `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`, its document the text of
`body.messages` (all of them, in order, with an empty line between), of `body.prompt` or of `body.input`. What the body
says about writing (`max_tokens`, `temperature`, `top_p`, `seed`) holds for its document; a parameter that would be
ignored makes the request an error.
"""

import math
from typing import Any, NamedTuple

from pipelines.config import fingerprint
from pipelines.data.read import Document, Fault, document, json_object, text_document

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_URLS = (CHAT, COMPLETIONS, RESPONSES)
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_HARMLESS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_ONLY: dict[str, Any] = {  # what is done anyway
    **{"n": 1, "stream": False, "logprobs": False, "echo": False, "best_of": 1, "tools": [], "tool_choice": "none"},
    **{"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}},
}
_MOST_TOKENS = 2**20  # that a document may ask to be written: a model may never end by itself


class Request(NamedTuple):
    """What a request asks for beside its text; None: as the job is set."""

    url: str
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class Line(NamedTuple):
    """A line of a JSONL file, read."""

    document: Document | Fault
    request: Request | None  # None where it is a document with `text`
    custom_id: str | None  # also of a request that cannot be used, where it has one


class Answer(NamedTuple):
    """What a result line tells."""

    custom_id: str
    url: str | None
    model: str
    text: str | None  # None: failed
    error: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    created_unix_s: int


def read_line(name: str, number: int, line: bytes) -> Line:
    """A line of the file `name`: a document with `text`, or a request."""
    value = json_object(line, number)
    if isinstance(value, Fault):
        return Line(value, None, None)
    if "text" in value or "custom_id" not in value:
        return Line(text_document(value, name, number), None, None)
    custom_id = value["custom_id"]
    if not isinstance(custom_id, str) or not custom_id:
        fault = Fault("bad_id", f"`custom_id` is {custom_id!r:.80}, needs a string that is not empty", number)
        return Line(fault, Request(CHAT), None)
    try:
        request, text = _request(value)
    except ValueError as error:
        url = value.get("url")
        return Line(
            Fault("bad_request", str(error), number, custom_id), Request(url if url in _URLS else CHAT), custom_id
        )
    return Line(document(text, custom_id, f"{name}:{number}", number), request, custom_id)


def _request(value: dict[str, Any]) -> tuple[Request, str]:
    """The request and its text; ValueError says what of it cannot be used."""
    body, url = value.get("body"), value.get("url", CHAT)
    if not isinstance(body, dict):
        raise ValueError(f"`body` is {type(body).__name__}, not an object")
    if url not in _URLS:
        raise ValueError(f"`url` is {url!r:.80}; allowed are {', '.join(_URLS)}")
    if value.get("method", "POST") != "POST":
        raise ValueError(f"`method` is {value['method']!r:.80}, not POST")
    texts = {name: body[name] for name in ("messages", "prompt", "input") if name in body}
    if len(texts) != 1:
        raise ValueError("`body` needs one of `messages`, `prompt` and `input`")
    known = {*texts, *_HARMLESS, *_LENGTHS, "temperature", "top_p", "seed"}
    for name, given in body.items():
        if name not in known and given is not None and (name not in _ONLY or given != _ONLY[name]):
            raise ValueError(f"`body.{name}` is {given!r:.80}, which is not supported")
    lengths = {name: body[name] for name in _LENGTHS if body.get(name) is not None}
    if len(set(map(repr, lengths.values()))) > 1:
        raise ValueError(f"`body` gives {' and '.join(lengths)}, which differ")
    request = Request(
        url,
        max_new_tokens=next((_whole(name, given, 1, _MOST_TOKENS) for name, given in lengths.items()), None),
        temperature=_number(body, "temperature", 0.0, math.inf),
        top_p=_number(body, "top_p", 0.0, 1.0),
        seed=None if body.get("seed") is None else _whole("seed", body["seed"], -(2**63)),
    )
    if request.top_p == 0:
        raise ValueError("`body.top_p` is 0; it must be above 0")
    return request, _text(*texts.popitem())


def _whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"`body.{name}` is {value!r:.80}, needs a whole number from {least} to {most}")
    return value


def _number(body: dict[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not least <= number <= most:
        raise ValueError(f"`body.{name}` is {value!r:.80}, needs a number from {least:g} to {most:g}")
    return number


def _text(name: str, value: Any) -> str:
    """The text of `messages`, `prompt` or `input`."""
    if isinstance(value, str) and name != "messages":
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"`body.{name}` is {type(value).__name__}, which holds no text")
    if name == "prompt":
        if len(value) == 1 and isinstance(value[0], str):
            return value[0]
        raise ValueError("`body.prompt` needs to be one string: a line is one document")
    return "\n\n".join(_message(name, message) for message in value)


def _message(name: str, message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"`body.{name}` holds a message with content that is no text")
        texts.append(part["text"])
    return "\n".join(texts)


# --- results ----------------------------------------------------------------------------------------


def result_line(answer: Answer) -> dict[str, Any]:
    """An answer as a line of a batch's output; a failed one has `response` null and `error`."""
    mark = fingerprint([answer.custom_id, answer.model])[:24]
    if answer.text is None:
        error = {"code": "document_failed", "message": answer.error}
        return {"id": f"batch_req_{mark}", "custom_id": answer.custom_id, "response": None, "error": error}
    response = {"status_code": 200, "request_id": f"req_{mark}", "body": _body(answer, mark)}
    return {"id": f"batch_req_{mark}", "custom_id": answer.custom_id, "response": response, "error": None}


def _body(answer: Answer, mark: str) -> dict[str, Any]:
    total = answer.prompt_tokens + answer.completion_tokens
    if answer.url == RESPONSES:
        content: list[dict[str, Any]] = [{"type": "output_text", "text": answer.text, "annotations": []}]
        complete = answer.finish_reason == "stop"
        return {
            "id": f"resp_{mark}",
            "object": "response",
            "created_at": answer.created_unix_s,
            "model": answer.model,
            "status": "completed" if complete else "incomplete",
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "output": [{"id": f"msg_{mark}", "type": "message", "role": "assistant", "content": content}],
            "usage": {
                "input_tokens": answer.prompt_tokens,
                "output_tokens": answer.completion_tokens,
                "total_tokens": total,
            },
        }
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
    if answer.url == COMPLETIONS:
        kind, choice["text"] = "text_completion", answer.text
    else:
        kind, choice["message"] = "chat.completion", {"role": "assistant", "content": answer.text}
    return {
        "id": f"{'cmpl' if answer.url == COMPLETIONS else 'chatcmpl'}-{mark}",
        "object": kind,
        "created": answer.created_unix_s,
        "model": answer.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": total,
        },
    }
