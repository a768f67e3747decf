"""The HTTP application of one replica: all routes, behind the guard.

    app = create_app(front, keys)

It is a FastAPI application like any other; what it needs of a replica is in `front`. Its lifespan starts the service,
warms it up and in the end drains it.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from . import openai_routes, session_routes, summary_routes
from .auth import Key, Keys
from .errors import ApiError, ErrorEnvelope, of_validation
from .front import Front
from .guard import Guard
from .summary_jobs import SummaryJobs

_PAGE = Path(__file__).parent / "web" / "index.html"
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "body_timeout", 413: "body_too_large"}
_MESSAGES = {404: "there is no such route", 405: "this route takes other methods", 400: "the body is not valid JSON"}


def create_app(front: Front, keys: Sequence[Key] | None, *, behind_serve: bool = False) -> FastAPI:
    """The application. `keys` None: no key is asked for, and only this machine is answered."""
    jobs = SummaryJobs(front)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await front.start()
        try:
            yield
        finally:
            await asyncio.gather(front.drain(), jobs.close(front.config.drain_timeout_s))
            await front.close()

    app = FastAPI(
        title="rmt-ray",
        summary="Language models that read texts of any length at constant memory.",
        lifespan=lifespan,
        docs_url=None,  # these pages load code from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorEnvelope}, "5XX": {"model": ErrorEnvelope}},
    )
    for router in (openai_routes.routes(front), session_routes.routes(front), summary_routes.routes(jobs)):
        app.include_router(router)
    _add_plain_routes(app, front)
    _add_error_handlers(app)
    _describe_errors(app)
    known = None if keys is None else Keys(keys)
    app.add_middleware(Guard, config=front.config, keys=known, metrics=front.metrics, names=behind_serve)
    return app


def _add_plain_routes(app: FastAPI, front: Front) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        if not front.service.healthy:
            raise ApiError(503, "unhealthy", "the engine has failed")
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        if not (front.ready and front.service.healthy):
            raise ApiError(503, "not_ready", "the server is warming up or leaving")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(page.replace("{{nonce}}", nonce), headers={"content-security-policy": policy})


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(_: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(_: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors()).response()

    async def other(_: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = error.status_code
        message = _MESSAGES.get(status, str(error.detail))
        return ApiError(status, _CODES.get(status, "invalid_request"), message).response(error.headers)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)


def _describe_errors(app: FastAPI) -> None:
    """The schema without FastAPI's own 422, which this server never gives."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
