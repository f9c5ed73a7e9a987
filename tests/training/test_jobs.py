"""The jobs of a server: their order, their ends, and what is refused; the work itself is made up here."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.engines.base import Engine
from server.engines.fake import FakeEngine
from server.errors import HeadConflictError, LateCancelError, OverloadedError, ShuttingDownError, UnknownJobError
from server.logs import request_id_var
from server.telemetry import Telemetry
from server.training.control import JobControl
from server.training.jobs import MAX_ENDED, MAX_QUEUED, HeadJob, HeadJobs
from server.training.recipe import FromInstruction, Recipe
from tests.conftest import card_of, random_linear_head
from value_models.distillation import DistilSettings
from value_models.errors import TextsFileError
from value_models.store import HeadCard

CARD = card_of("kind", random_linear_head(1))


def recipe(name: str = "kind", *, replaces: bool = False) -> Recipe:
    return Recipe(name, "", replaces, FromInstruction("Be kind.", None, (), DistilSettings()))


class Work:
    """Jobs that go on until they are let go, or cancelled."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_end, self.is_saving, self.may_save = (threading.Event() for _ in range(3))
        self.may_save.set()
        self.names: list[str] = []
        self.error = error

    def __call__(self, engine: Engine, recipe: Recipe, job: JobControl) -> HeadCard:
        self.names.append(recipe.name)
        job.enter("reading")
        job.count()
        while not self.may_end.wait(0.005):
            job.check()
        if self.error is not None:
            raise self.error
        job.enter("saving")
        self.is_saving.set()
        self.may_save.wait(5)
        return CARD


@pytest.fixture
def make() -> Callable[..., HeadJobs]:
    def make(work: Any, **options: Any) -> HeadJobs:
        names = [f"h{i}" for i in range(99)]
        return HeadJobs(FakeEngine(spare_heads=("kind", *names)), Telemetry(), train=work, **options)

    return make


async def ended(*jobs: HeadJob) -> list[str]:
    deadline_s = time.monotonic() + 5
    while any(job.ended_s is None for job in jobs):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)
    return [job.status for job in jobs]


async def test_jobs_run_one_after_the_other_and_their_heads_are_offered(make: Callable[..., HeadJobs]) -> None:
    work = Work()
    jobs = make(work)
    made = [jobs.add(recipe(name)) for name in ("kind", "h1", "h2")]
    work.may_end.set()
    assert await ended(*made) == ["succeeded"] * 3
    assert work.names == ["kind", "h1", "h2"]
    assert {"kind", "h1", "h2"} <= set(jobs._engine.info.heads)
    assert [job.recipe.name for job in jobs.all()] == ["h2", "h1", "kind"]
    facts = made[0].facts()
    assert (facts["status"], facts["method"], facts["error"]) == ("succeeded", "instruction", None)
    assert facts["progress"] == {"phase": "done", "done": 1, "of": 0}
    assert facts["result"]["card"]["name"] == "kind"
    metrics = jobs._telemetry.render().decode()
    assert 'recontrol_head_jobs_ended_total{model_name="",status="succeeded"} 3.0' in metrics
    assert 'recontrol_head_jobs{model_name="",status="running"} 0.0' in metrics


async def test_a_job_is_cancelled_where_it_waits_and_where_it_runs(make: Callable[..., HeadJobs]) -> None:
    jobs = make(Work())
    first, second = jobs.add(recipe("h1")), jobs.add(recipe("h2"))
    assert jobs.cancel(second.id).status == "cancelled"
    jobs.cancel(first.id)
    assert await ended(first, second) == ["cancelled", "cancelled"]
    assert jobs.cancel(first.id).facts()["error"] is None
    assert "h1" not in jobs._engine.info.heads


async def test_a_job_that_saves_its_head_cannot_be_cancelled_and_succeeds(make: Callable[..., HeadJobs]) -> None:
    work = Work()
    work.may_save.clear()
    work.may_end.set()
    jobs = make(work)
    job = jobs.add(recipe("h1"))
    assert await asyncio.to_thread(work.is_saving.wait, 5)
    with pytest.raises(LateCancelError, match=r"too late to cancel .* its head 'h1' is being saved"):
        jobs.cancel(job.id)
    jobs.stop()
    work.may_save.set()
    assert await ended(job) == ["succeeded"]
    assert jobs.cancel(job.id).status == "succeeded"


async def test_lines_of_jobs_are_whole_sentences_and_carry_no_requests_id(
    make: Callable[..., HeadJobs], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.training.jobs")
    lines: list[tuple[str, str | None]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.getMessage(), request_id_var.get()))
    logging.getLogger("server.training.jobs").addHandler(handler)
    request_id_var.set("req-1")
    work = Work()
    jobs = make(work)
    first, second, third = (jobs.add(recipe(name)) for name in ("h1", "h2", "h3"))
    jobs.cancel(second.id)
    work.may_end.set()
    await ended(first, third)
    work.error = TextsFileError("pairs.3: long")
    failed = jobs.add(recipe("h4"))
    await ended(failed)
    logging.getLogger("server.training.jobs").removeHandler(handler)
    assert {request_id for _, request_id in lines} == {None}
    told = [text for text, _ in lines]
    assert f"Job {first.id} has succeeded; it made the value head 'h1'." in told
    assert f"Job {second.id} was cancelled." in told
    assert f"Job {failed.id} has failed: pairs.3: long" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TextsFileError("pairs.3: long; --cut-long cuts it"), ("invalid_value", "pairs.3: long; cut_long cuts it")),
        (RuntimeError("secret"), ("internal_error", "An internal error occurred")),
    ],
    ids=["texts", "inside"],
)  # fmt: skip
async def test_a_failed_job_says_why_and_the_next_one_runs(
    make: Callable[..., HeadJobs], error: Exception, told: tuple[str, str]
) -> None:
    work = Work(error)
    work.may_end.set()
    jobs = make(work)
    failed = jobs.add(recipe("h1"))
    assert await ended(failed) == ["failed"]
    assert failed.error is not None
    assert failed.error["code"] == told[0]
    assert failed.error["message"].startswith(told[1])
    assert "secret" not in failed.error["message"]
    work.error = None
    assert await ended(jobs.add(recipe("h1"))) == ["succeeded"]


async def test_a_name_that_is_taken_queued_or_pinned_is_refused(make: Callable[..., HeadJobs]) -> None:
    work = Work()
    jobs = make(work, pinned=("kind",))
    for name, replaces in (("positive", False), ("kind", False), ("kind", True)):
        with pytest.raises(HeadConflictError, match=r"^name: "):
            jobs.add(recipe(name, replaces=replaces))
    job = jobs.add(recipe("positive", replaces=True))
    with pytest.raises(HeadConflictError, match="queued or runs"):
        jobs.add(recipe("positive", replaces=True))
    work.may_end.set()
    assert await ended(job) == ["succeeded"]


async def test_so_many_wait_and_so_many_ended_ones_are_kept(make: Callable[..., HeadJobs]) -> None:
    work = Work()
    jobs = make(work)
    made = [jobs.add(recipe(f"h{i}")) for i in range(MAX_QUEUED)]
    with pytest.raises(OverloadedError, match=f"{MAX_QUEUED} jobs are queued"):
        jobs.add(recipe("h90"))
    work.may_end.set()
    await ended(*made)
    for i in range(MAX_ENDED):
        made.append(jobs.add(recipe("h1", replaces=True)))
        if i % MAX_QUEUED == 0:
            await ended(*made)
        await ended(made[-1])
    jobs.add(recipe("h1", replaces=True))
    assert len([job for job in jobs.all() if job.ended_s is not None]) == MAX_ENDED
    with pytest.raises(UnknownJobError):
        jobs.get(made[0].id)
    await jobs.close()


async def test_a_server_that_ends_cancels_its_jobs_and_takes_no_more(make: Callable[..., HeadJobs]) -> None:
    jobs = make(Work())
    first, second = jobs.add(recipe("h1")), jobs.add(recipe("h2"))
    started_s = time.monotonic()
    await jobs.close()
    assert time.monotonic() - started_s < 2
    assert [first.status, second.status] == ["cancelled", "cancelled"]
    with pytest.raises(ShuttingDownError):
        jobs.add(recipe("h3"))
