"""Summaries as jobs: begun by one request, looked at, cancelled and fetched by others, on any replica.

A job's record lies in the sessions' store; the replica that took the job works on it and renews the record every
second, which is also how it learns that another replica has cancelled the job. A record that nobody renews belongs to
a replica that is gone: the job is then reported as failed, to be sent again. Records go an hour after their last
change.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from traceback import format_tb
from typing import Any, Literal

import rmt_core

from .errors import ApiError, closed
from .front import Front, usage_of
from .openai_schema import SummaryRequest
from .readers import Position
from .requests import Done, Failed, OverloadedError, Progress, Request, RequestError, Written
from .store import ConflictError

log = logging.getLogger(__name__)

_RENEW_S = 1.0
_STALE_S = 60.0
_CLOSED = "the server closed; send it again"


@dataclass(frozen=True)
class Job:
    """A job as it is kept; the text to summarise is not."""

    id: str
    created_s: float  # seconds since 1970
    renewed_s: float
    num_tokens: int  # to be read
    status: Literal["running", "succeeded", "failed", "cancelled"] = "running"
    num_read: int = 0
    num_written: int = 0
    summary: str | None = None
    error: str | None = None
    usage: dict[str, Any] | None = None


class SummaryJobs:
    """The jobs of one replica's store; those that it took itself it works on."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._store = front.service.sessions.store
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by name in the store

    async def create(self, tenant: str, body: SummaryRequest) -> Job:
        """Begin a job. Raises ApiError."""
        front = self._front
        if len(self._tasks) >= front.config.max_requests or front.service.is_full:
            raise ApiError(429, "overloaded", "too many summaries are being written; try again later")
        if not front.service.is_open:
            raise closed()
        max_tokens = front.max_tokens(body.max_tokens)
        tokens = await front.encode((body.text or "") + body.prompt)
        if not tokens:
            raise ApiError(400, "invalid_request", "text: there is nothing to read", "text")
        position: Position | None = None
        if body.session_id is not None:
            loaded = await front.call(front.service.sessions.load, tenant, body.session_id)
            position = loaded.record.position
        num_before = 0 if position is None else position.num_tokens
        eos = front.tokenizer.eos_id
        request = Request(
            tokens=tokens,
            max_new_tokens=max_tokens,
            tenant=tenant,
            sampling=rmt_core.Sampling(body.temperature, body.top_p),
            seed=body.seed,
            stop_tokens=() if eos is None else (eos,),
        )
        now = time.time()
        job = Job(f"summary-{secrets.token_hex(16)}", now, now, num_before + len(tokens), num_read=num_before)
        name = _name(tenant, job.id)
        tag = await front.call(self._put, name, job, None)
        task = self._tasks[name] = asyncio.create_task(self._work(name, job, tag, request, position))
        task.add_done_callback(lambda _: self._tasks.pop(name, None))
        return job

    async def get(self, tenant: str, job_id: str) -> Job:
        job, _ = await self._front.call(self._get, _name(tenant, job_id))
        return job

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a job that is at work; of an ended one: nothing."""
        name = _name(tenant, job_id)
        for _ in range(8):  # its worker may renew the record in between
            job, tag = await self._front.call(self._get, name)
            if job.status != "running":
                return job
            cancelled = replace(job, status="cancelled", renewed_s=time.time())
            with contextlib.suppress(ConflictError):
                await self._front.call(self._put, name, cancelled, tag)
                if (task := self._tasks.get(name)) is not None:
                    task.cancel()
                return cancelled
        raise ApiError(409, "version_conflict", "the job changes too fast to be cancelled; try again")

    async def delete(self, tenant: str, job_id: str) -> None:
        await self.cancel(tenant, job_id)
        await self._front.call(self._store.delete, _name(tenant, job_id))

    async def close(self, timeout_s: float) -> None:
        """Wait so long for what is at work, then stop it; the records say so."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    # --- one job ------------------------------------------------------------------------------------

    async def _work(self, name: str, job: Job, tag: str, request: Request, position: Position | None) -> None:
        """Do the job and keep its record; whatever ends it, the record says how."""
        last_renewed = time.monotonic()
        try:
            async with contextlib.aclosing(self._steps(job, request, position)) as steps:
                async for job in steps:
                    if job.status == "running" and time.monotonic() - last_renewed < _RENEW_S:
                        continue
                    job = replace(job, renewed_s=time.time())
                    tag = await self._keep(name, job, tag)
                    last_renewed = time.monotonic()
        except ConflictError:
            pass  # cancelled or deleted by another replica
        except asyncio.CancelledError:  # as the server closes; or by a user, whose request has changed the record
            if job.status == "running":
                job = replace(job, status="failed", error=_CLOSED, renewed_s=time.time())
            with contextlib.suppress(ConflictError, RequestError):
                await self._front.service.call(self._put, name, job, tag)
        except Exception as error:  # the border of a job: its message may hold what the user wrote
            log.error("a summary failed: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
            failed = replace(job, status="failed", error="the server failed on it", renewed_s=time.time())
            with contextlib.suppress(ConflictError, RequestError):
                await self._front.service.call(self._put, name, failed, tag)

    async def _keep(self, name: str, job: Job, tag: str) -> str:
        """Write the record; the new tag. While the store does not answer, a job goes on, and an ended one waits.

        ConflictError where another replica has cancelled or deleted the job.
        """
        call, give_up_s = self._front.service.call, time.monotonic() + _STALE_S
        while True:
            try:
                return await call(self._put, name, job, tag)
            except ConflictError:
                there, tag = await call(self._read, name)  # what was written although no answer came is ours
                if there == job:
                    return tag
                if there.status != "running":
                    raise
            except RequestError:
                if job.status == "running":
                    return tag
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(_RENEW_S)

    async def _steps(self, job: Job, request: Request, position: Position | None) -> AsyncGenerator[Job, None]:
        """The job as it goes on; the last one has ended."""
        service, parts = self._front.service, []
        try:
            stream = service.submit(request, position)
        except (OverloadedError, RequestError) as error:
            yield replace(job, status="failed", error=str(error))
            return
        try:
            while True:
                try:
                    async with asyncio.timeout(_RENEW_S):
                        event = await anext(stream)
                except TimeoutError:
                    yield job  # at work or waiting
                    continue
                except StopAsyncIteration:
                    yield replace(job, status="failed", error=_CLOSED)
                    return
                if isinstance(event, Progress):
                    job = replace(job, num_read=event.num_tokens)
                elif isinstance(event, Written):
                    parts.append(event.text)
                    job = replace(job, num_read=job.num_tokens, num_written=job.num_written + len(event.tokens))
                elif isinstance(event, Failed):
                    job = replace(job, status="failed", error=event.message)
                elif isinstance(event, Done):
                    self._front.metrics.done(event.usage)
                    job = replace(job, status="succeeded", summary="".join(parts), usage=usage_of(event.usage))
                yield job
                if job.status != "running":
                    return
        finally:
            stream.cancel()

    # --- records, blocking --------------------------------------------------------------------------

    def _put(self, name: str, job: Job, tag: str | None) -> str:
        return self._store.put(name, json.dumps(asdict(job)).encode(), tag)

    def _read(self, name: str) -> tuple[Job, str]:
        """What is written there; ConflictError where it was deleted."""
        blob = self._store.get(name)
        if blob is None:
            raise ConflictError(name)
        return Job(**json.loads(blob.data)), blob.tag

    def _get(self, name: str) -> tuple[Job, str]:
        try:
            job, tag = self._read(name)
        except ConflictError:
            raise RequestError("session_not_found", "there is no such summary") from None
        if job.status == "running" and time.time() - job.renewed_s > _STALE_S:
            job = replace(job, status="failed", error="the server that worked on it is gone; send it again")
        return job, tag


def _name(tenant: str, job_id: str) -> str:
    key = hashlib.sha256(f"summary {len(tenant)} {tenant} {job_id}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{key}/summary"
