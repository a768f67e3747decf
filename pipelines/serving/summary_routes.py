"""`/v1/summaries`: jobs that summarise a text, or what a session has read."""

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from .openai_schema import SummaryRequest
from .summary_jobs import Job, SummaryJobs


def routes(jobs: SummaryJobs) -> APIRouter:
    router = APIRouter(prefix="/v1/summaries")

    @router.post("", status_code=202)
    async def create(body: SummaryRequest, http: HttpRequest) -> dict[str, Any]:
        return _described(await jobs.create(http.state.tenant, body))

    @router.get("/{job}")
    async def get(job: str, http: HttpRequest) -> dict[str, Any]:
        return _described(await jobs.get(http.state.tenant, job))

    @router.post("/{job}/cancel")
    async def cancel(job: str, http: HttpRequest) -> dict[str, Any]:
        return _described(await jobs.cancel(http.state.tenant, job))

    @router.delete("/{job}")
    async def delete(job: str, http: HttpRequest) -> dict[str, Any]:
        await jobs.delete(http.state.tenant, job)
        return {"id": job, "object": "summary.deleted", "deleted": True}

    return router


def _described(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "summary",
        "status": job.status,
        "created": int(job.created_s),
        "progress": {"num_tokens": job.num_tokens, "num_read": job.num_read, "num_written": job.num_written},
        "summary": job.summary,
        "error": job.error,
        "usage": job.usage,
    }
