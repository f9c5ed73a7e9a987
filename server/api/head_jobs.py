"""POST /v1/heads: train a head while the server runs; /v1/management/jobs: how far it is, its result, its end.

There only when a management key is set, as all of management. Enter at `router`; the work is in `server.training`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api.body import JsonRoute
from server.api.gate.auth import MANAGEMENT_PREFIX
from server.api.gate.context import context_of
from server.api.management import require_manager
from server.api.workers import Workers
from server.training.jobs import HeadJobs
from server.training.request import HeadRequest

_PATH = f"{MANAGEMENT_PREFIX}jobs"
router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_manager)])


@router.post("/v1/heads", status_code=202)
async def train_head(request: Request, body: HeadRequest) -> JSONResponse:
    """Queue a job that makes a head of pairs, texts or an instruction; the head is offered once it has succeeded."""
    jobs = _jobs(request)
    workers: Workers = request.app.state.workers
    jobs.check_room(body.name, replaces=bool(body.replace))
    recipe = await workers.run(lambda: jobs.prepared(body), size=context_of(request).num_body_bytes)
    job = jobs.add(recipe)
    return JSONResponse(job.facts(), 202, {"Location": f"{_PATH}/{job.id}"})


@router.get(_PATH)
async def list_jobs(request: Request) -> dict[str, Any]:
    """Jobs that wait or run and the last that have ended, the newest first, without their cards."""
    return {"object": "list", "data": [{**job.facts(), "result": None} for job in _jobs(request).all()]}


@router.get(_PATH + "/{job_id}")
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    return _jobs(request).get(job_id).facts()


@router.post(_PATH + "/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """Have a job end; where it runs, its status is `cancelled` a moment later. While it saves its head it is a 409."""
    return _jobs(request).cancel(job_id).facts()


def _jobs(request: Request) -> HeadJobs:
    return request.app.state.jobs
