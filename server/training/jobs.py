"""The jobs of one server: one runs, a few wait, and the last that have ended can still be asked for.

Used from the event loop; the work of a job is in a thread of its own, which no exit waits for. Knows nothing of HTTP.
Enter at `HeadJobs.add`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from server.engines.base import Engine
from server.errors import (
    HeadConflictError,
    InvalidRequestError,
    LateCancelError,
    OverloadedError,
    RecontrolError,
    ShuttingDownError,
    UnknownJobError,
)
from server.telemetry import Telemetry
from server.training.control import JobCancelledError, JobControl, Progress
from server.training.recipe import Recipe
from value_models.errors import ValueModelError
from value_models.store import HeadCard

if TYPE_CHECKING:
    from server.training.request import HeadRequest

MAX_QUEUED = 8
MAX_ENDED = 50
"""Jobs that have ended, the newest, which are kept."""
_END_S = 5.0
"""For a job to end when the server does."""
_RETRY_S = 60
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
_FIELD = re.compile(r"(?:pairs|texts|instruction_prompts|instruction|contrast|prompts|ignore_fields)(?:\.\d+)?(?=[: ])")
_log = logging.getLogger(__name__)
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Train = Callable[[Engine, Recipe, JobControl], HeadCard]
_Result = TypeVar("_Result")


def _train_and_save(engine: Engine, recipe: Recipe, control: JobControl) -> HeadCard:
    # Here, as what it imports takes long and most servers train nothing.
    from server.training.trainer import train_and_save

    return train_and_save(engine, recipe, control)


@dataclass(slots=True, eq=False)
class HeadJob:
    recipe: Recipe
    control: JobControl
    id: str = field(default_factory=lambda: f"headjob-{secrets.token_hex(12)}")
    status: Status = "queued"
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    ended_s: float | None = None
    card: HeadCard | None = None
    error: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON, in the words of OpenAI's fine-tuning jobs where they have them."""
        progress = self.control.progress
        end_s = time.time() if self.ended_s is None else self.ended_s
        return {
            "id": self.id,
            "object": "head.job",
            "status": self.status,
            "head": self.recipe.name,
            "method": self.recipe.source.method,
            "created_at": int(self.created_s),
            "started_at": None if self.started_s is None else int(self.started_s),
            "finished_at": None if self.ended_s is None else int(self.ended_s),
            "seconds": None if self.started_s is None else round(end_s - self.started_s, 1),
            "progress": {"phase": progress.phase, "done": progress.done, "of": progress.of},
            "error": self.error,
            "result": None
            if self.card is None
            else {"head": self.recipe.name, "card": self.card.model_dump(mode="json")},
        }

    def begin(self) -> None:
        self.status, self.started_s = "running", time.time()

    def end(self, status: Status) -> None:
        self.status, self.ended_s = status, time.time()


class HeadJobs:
    def __init__(
        self, engine: Engine, telemetry: Telemetry, *, pinned: Collection[str] = (), train: Train = _train_and_save
    ) -> None:
        """`pinned` heads are the operator's, and no job replaces them."""
        self._engine = engine
        self._telemetry = telemetry
        self._pinned = pinned
        self._train = train
        self._jobs: dict[str, HeadJob] = {}
        """By id, the oldest first."""
        self._worker: asyncio.Task[None] | None = None
        self._is_closed = False

    def prepared(self, request: HeadRequest) -> Recipe:
        """What `add` takes, checked as far as it can be beforehand; it takes long, and no event loop.

        Raises InvalidRequestError, UnsupportedFieldError, HeadConflictError, ReadOnlyHeadsError.
        """
        from server.training.trainer import check_recipe

        try:
            recipe = request.recipe()
            check_recipe(self._engine, recipe)
        except ValueModelError as error:
            raise _as_request_error(error) from error
        return recipe

    def add(self, recipe: Recipe) -> HeadJob:
        """Queue a job. Raises HeadConflictError, OverloadedError, ShuttingDownError."""
        self.check_room(recipe.name, replaces=recipe.replaces)
        job = HeadJob(recipe, JobControl(recipe.source.num_texts))
        self._jobs[job.id] = job
        self._forget_oldest()
        self._tell()
        if self._worker is None or self._worker.done():
            # The task outlives the request that starts it, whose id belongs on no line of a job.
            self._worker = asyncio.create_task(self._work(), context=contextvars.Context())
        return job

    def check_room(self, name: str, *, replaces: bool) -> None:
        """Whether `add` would take such a job now. Raises as it does."""
        if self._is_closed:
            raise ShuttingDownError("The server is shutting down; it takes no new jobs.")
        if name in self._pinned:
            raise HeadConflictError(f"name: the value head {name!r} is pinned by the server's settings", param="name")
        if name in self._engine.info.heads and not replaces:
            raise HeadConflictError(
                f"name: there is a value head {name!r}; choose another name, or replace it", param="name"
            )
        if any(job.recipe.name == name for job in self._unended()):
            raise HeadConflictError(f"name: a job that makes {name!r} is queued or runs", param="name")
        if len(self._with("queued")) >= MAX_QUEUED:
            raise OverloadedError(f"{MAX_QUEUED} jobs are queued already; try again later.", retry_after_s=_RETRY_S)

    def get(self, job_id: str) -> HeadJob:
        """Raises UnknownJobError."""
        if job_id not in self._jobs:
            raise UnknownJobError(f"There is no job {job_id[:64]!r}; the last {MAX_ENDED} that have ended are kept.")
        return self._jobs[job_id]

    def all(self) -> list[HeadJob]:
        """The newest first."""
        return list(reversed(self._jobs.values()))

    def cancel(self, job_id: str) -> HeadJob:
        """Have a job end; one that runs ends a moment later, and one that has ended stays as it is.

        Raises UnknownJobError, LateCancelError for one whose head is being saved.
        """
        job = self.get(job_id)
        if job.ended_s is None and not self._cancel(job):
            raise LateCancelError(
                f"It is too late to cancel {job_id}: its head {job.recipe.name!r} is being saved. Once the job has "
                "succeeded, the head can be unloaded."
            )
        return job

    def _cancel(self, job: HeadJob) -> bool:
        """Whether the job will end of it."""
        will_end = job.control.cancel()
        if job.status == "queued":
            contextvars.Context().run(self._end, job, "cancelled")
        return will_end

    def open(self) -> None:
        """Take jobs, also anew in a server that is started again."""
        self._is_closed = False

    def stop(self) -> None:
        """Cancel all jobs and take no more."""
        self._is_closed = True
        for job in self._unended():
            self._cancel(job)

    async def close(self) -> None:
        """`stop`, and wait a moment for what runs."""
        self.stop()
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=_END_S)
            self._worker.cancel()

    async def _work(self) -> None:
        while queued := self._with("queued"):
            await self._run(queued[0])

    async def _run(self, job: HeadJob) -> None:
        job.begin()
        self._tell()
        recipe = job.recipe
        _log.info("Job %s trains the value head %r.", job.id, recipe.name)
        try:
            job.card = await _in_a_thread(partial(self._train, self._engine, recipe, job.control))
            await self._engine.load_head(recipe.name)
            self._telemetry.bind_heads(self._engine.info.heads)
            job.control.progress = Progress("done", job.control.progress.done, job.control.progress.of)
            self._end(job, "succeeded")
        except JobCancelledError:
            self._end(job, "cancelled")
        except Exception as error:
            if job.control.is_cancelled:
                # Whatever the end of what it used has made it raise.
                self._end(job, "cancelled")
                return
            job.error = _told(error, job.id)
            self._end(job, "failed")

    def _end(self, job: HeadJob, status: Status) -> None:
        job.end(status)
        self._telemetry.count_head_job(status)
        self._tell()
        _log.info("Job %s %s", job.id, _sentence_end(job))

    def _unended(self) -> list[HeadJob]:
        return [*self._with("queued"), *self._with("running")]

    def _with(self, status: Status) -> list[HeadJob]:
        return [job for job in self._jobs.values() if job.status == status]

    def _forget_oldest(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended_s is not None]
        for job in ended[: max(len(ended) - MAX_ENDED, 0)]:
            del self._jobs[job.id]

    def _tell(self) -> None:
        self._telemetry.set_head_jobs(queued=len(self._with("queued")), running=len(self._with("running")))


def _sentence_end(job: HeadJob) -> str:
    """What a job that has ended has done, for the log."""
    if job.error is not None:
        return f"has failed: {job.error['message']}"
    if job.status == "cancelled":
        return "was cancelled."
    return f"has succeeded; it made the value head {job.recipe.name!r}."


def _as_request_error(error: ValueModelError) -> InvalidRequestError:
    """What is wrong with a user's texts, in the words of a request: fields where the command line has flags."""
    message = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), str(error))
    at = _FIELD.match(message)
    return InvalidRequestError(message, param=at and at[0])


async def _in_a_thread(work: Callable[[], _Result]) -> _Result:
    """In a daemon, unlike those of an executor, for which Python waits when it exits."""
    future: concurrent.futures.Future[_Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="recontrol-training", daemon=True).start()
    return await asyncio.wrap_future(future)


def _told(error: Exception, job_id: str) -> dict[str, Any]:
    """What whoever started the job is told of its end."""
    if isinstance(error, ValueModelError):
        error = _as_request_error(error)
    if isinstance(error, RecontrolError):
        return {"code": error.code, "message": error.message, "param": error.param}
    _log.error("Job %s has failed.", job_id, exc_info=error)
    message = f"An internal error occurred; the server's log tells more of {job_id}."
    return {"code": "internal_error", "message": message, "param": None}
