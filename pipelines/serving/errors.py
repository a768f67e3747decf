"""What goes wrong, as OpenAI's clients expect it: {"error": {"message", "type", "code", "param"}}."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from starlette.responses import JSONResponse

from .requests import Code, RequestError

STATUS: Mapping[Code, int] = {
    "invalid_request": 400,
    "session_not_found": 404,
    "session_exists": 409,
    "version_conflict": 409,
    "model_mismatch": 409,
    "store_full": 429,
    "store_unavailable": 503,
    "failed": 500,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_HARMLESS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_INPUT = "Input should be "  # how pydantic begins
RETRY_AFTER_S = 1


class ErrorBody(pydantic.BaseModel):
    message: str
    type: str
    code: str | None
    param: str | None


class ErrorEnvelope(pydantic.BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than what was asked for. The message is one line and holds no text of the request."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "code": self.code, "param": self.param}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        retry = {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        return JSONResponse(self.body(), self.status, headers={**retry, **(headers or {})})


def closed() -> ApiError:
    """Nothing more is served here."""
    return ApiError(503, "closed", "the server is leaving, or its engine has failed; try again")


def of_request(error: RequestError) -> ApiError:
    """The engine's refusal as an answer."""
    return ApiError(STATUS[error.code], error.code, str(error))


def of_validation(faults: Sequence[Any]) -> ApiError:
    """The most telling fault that pydantic found in a request, without what the request holds there."""
    fault = min(faults, key=lambda fault: fault["type"].endswith("_type"))  # of several kinds, the one that was meant
    place = [part for part in fault["loc"] if part not in ("body", "query", "path", "header")]
    names = [str(part) for part in place if isinstance(part, int) or _HARMLESS_NAME.fullmatch(part)]
    param = ".".join(names) or None
    if fault["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "the body is not valid JSON")
    if fault["type"] == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"there is no parameter {param or 'of such a name'}", param)
    if fault["type"] == "unsupported":
        return ApiError(400, "unsupported_parameter", fault["msg"], fault["ctx"]["name"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if message.startswith(_INPUT):
        message = f"needs to be {message.removeprefix(_INPUT)}"
    return ApiError(400, "invalid_request", f"{param or 'the body'}: {message[:1].lower()}{message[1:]}", param)
