"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`, as OpenAI's clients speak."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rmt_core import state as states

from . import sse
from .errors import ApiError
from .front import Front, Running, sampling_of, seed_of, usage_of
from .openai_schema import ChatRequest, CompletionRequest, OpenAIRequest
from .requests import Done, Event, Request, Written

_COMPLETION_TOKENS = 16  # written where a request does not say: OpenAI's
_TEMPERATURE = 1.0  # OpenAI's, where a request does not say


def routes(front: Front) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(front, created)]}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        _check_model(front, model)
        return _model(front, created)

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, http: HttpRequest) -> Response:
        tokens = await _prompt_tokens(front, body)
        request = _request(front, body, http, tokens, front.max_tokens(body.max_tokens, _COMPLETION_TOKENS))
        shape = _Shape("cmpl", "text_completion", body.model)
        return await _respond(front, body, request, http, shape)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        _check_model(front, body.model)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "invalid_request", "give max_completion_tokens or max_tokens, not both", "max_tokens")
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = front.max_tokens(getattr(body, name), name=name)
        tokens = await front.encode(await asyncio.to_thread(front.chat.prompt, body.messages))
        request = _request(front, body, http, tokens, max_tokens, more_stops=front.chat.stop_strings)
        return await _respond(front, body, request, http, _ChatShape("chatcmpl", "chat.completion", body.model))

    return router


def _model(front: Front, created: int) -> dict[str, Any]:
    """The model as OpenAI lists it, with what its memory takes beside a cache of keys and values."""
    engine = front.service.engine
    config = engine.model.backbone.lm.config
    weight = engine.model.backbone.lm.get_input_embeddings().weight
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * config.num_hidden_layers * kv_heads * head_dim * weight.element_size()
    state = front.service.sessions.start.state
    return {
        "id": front.config.served_name,
        "object": "model",
        "created": created,
        "owned_by": "rmt-ray",
        "fingerprint": engine.fingerprint,
        "segment_len": engine.model.segment_len,
        "state_bytes": sum(leaf.numel() * leaf.element_size() for leaf in states.leaves(state)),
        "kv_bytes_per_token": kv_bytes,
    }


def _check_model(front: Front, name: str) -> None:
    if name != front.config.served_name:
        raise ApiError(
            404, "model_not_found", f"there is no such model here; it is {front.config.served_name}", "model"
        )


async def _prompt_tokens(front: Front, body: CompletionRequest) -> list[int]:
    _check_model(front, body.model)
    prompt = body.prompt
    if isinstance(prompt, str):
        return await front.encode(prompt)
    if prompt and isinstance(prompt[0], str):
        return await front.encode(prompt[0])
    tokens = [token for token in prompt if isinstance(token, int)]
    front.check_num_tokens(len(tokens))
    if any(not 0 <= token < front.tokenizer.vocab_size for token in tokens):
        raise ApiError(
            400, "invalid_request", f"prompt: a token is not one of 0 to {front.tokenizer.vocab_size - 1}", "prompt"
        )
    return tokens


def _request(
    front: Front,
    body: OpenAIRequest,
    http: HttpRequest,
    tokens: list[int],
    max_tokens: int,
    *,
    more_stops: tuple[str, ...] = (),
) -> Request:
    return Request(
        tokens=tokens,
        max_new_tokens=max_tokens,
        session=body.session_id,
        tenant=http.state.tenant,
        sampling=sampling_of(body, temperature=_TEMPERATURE),
        seed=seed_of(body.seed, body.request_id),
        stop_tokens=front.stop_tokens(body),
        stop_strings=(*body.stops, *more_stops),
        request_id=body.request_id,
        expected_version=body.expected_version,
    )


async def _respond(front: Front, body: OpenAIRequest, request: Request, http: HttpRequest, shape: "_Shape") -> Response:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "invalid_request", "stream_options is only for stream: true", "stream_options")
    running: Running = await front.begin(request, http)
    if body.stream:
        shape.include_usage = body.stream_options is not None and body.stream_options.include_usage
        return sse.respond(running, shape.chunks)
    return JSONResponse(shape.whole(*await running.result()))


@dataclass
class _Shape:
    """Answers to completions."""

    prefix: str
    object: str
    model: str
    include_usage: bool = False  # of a stream

    def __post_init__(self) -> None:
        self._begun = False
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.object,
            "created": int(time.time()),
            "model": self.model,
        }

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        choice = {"index": 0, **self.content(text), "logprobs": None, "finish_reason": done.finish_reason}
        return {**self._head, "choices": [choice], "usage": usage_of(done.usage), **_session(done)}

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream says of an event."""
        if not self._begun:
            self._begun = True
            yield from self.opening()
        if isinstance(event, Written) and event.text:
            yield self.chunk(self.piece(event.text), None)
        elif isinstance(event, Done):
            yield {**self.chunk(self.piece(""), event.finish_reason), **_session(event)}
            if self.include_usage:
                yield {**self._chunk_head(), "choices": [], "usage": usage_of(event.usage)}

    def chunk(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.include_usage else {}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self._chunk_head(), "choices": [choice], **usage}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def opening(self) -> Iterator[dict[str, Any]]:
        return iter(())


class _ChatShape(_Shape):
    """Answers to chat completions."""

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> Iterator[dict[str, Any]]:
        yield self.chunk({"delta": {"role": "assistant", "content": ""}}, None)


def _session(done: Done) -> dict[str, Any]:
    """What a request of a session learns beside OpenAI's answer."""
    if done.version is None:
        return {}
    return {"session": {"version": done.version, "num_tokens": done.num_tokens, "num_segments": done.num_segments}}
