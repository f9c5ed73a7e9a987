"""Runs cases in forked processes, a few at once, each with limits on time and memory."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from tests.architectures.judge import Served, judge
from tests.architectures.models import ROTATIONS, Case, NotApplicableError, make_folder
from tests.architectures.reference import Reference
from tests.architectures.verdict import Verdict

TIME_S = 600
MEMORY_BYTES = 8 * 2**30


def judged(cases: list[Case], jobs: int, *, is_brief: bool) -> Iterator[Verdict]:
    """Verdicts in the order in which they come; a process that dies is a fault of its case."""
    # Nothing may start threads before the forks.
    torch.set_num_threads(1)
    pending, running = cases[::-1], {}
    while pending or running:
        while pending and len(running) < jobs:
            case = pending.pop()
            pid, reader = _start(case, is_brief)
            running[reader] = (case, pid, b"")
        for reader in select.select(list(running), [], [])[0]:
            case, pid, said = running[reader]
            if part := os.read(reader, 2**16):
                running[reader] = (case, pid, said + part)
                continue
            os.close(reader)
            del running[reader]
            _, status = os.waitpid(pid, 0)
            yield _verdict(case, said, status)


def _verdict(case: Case, said: bytes, status: int) -> Verdict:
    if status == 0 and said:
        return Verdict.from_json(json.loads(said))
    reason = f"its process ended with {os.waitstatus_to_exitcode(status)}"
    return Verdict(case.name, case.class_name, {"float32": Served("fault", reason)})


def _start(case: Case, is_brief: bool) -> tuple[int, int]:
    """The child's process id, and the end of the pipe at which it says its verdict."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.close(reader)
        signal.alarm(TIME_S)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writer, json.dumps(verdict_of(case, is_brief=is_brief).to_json()).encode())
        status = 0
    finally:
        os._exit(status)


def verdict_of(case: Case, *, is_brief: bool) -> Verdict:
    """In this process; what differs in its rotation alone is judged briefly always."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    verdict = Verdict(case.name, case.class_name, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        try:
            make_folder(case, path)
            Reference(path, torch.float32).logprobs(list(range(40)))
        except NotApplicableError:
            return verdict
        except Exception as error:
            return replace(verdict, unbuildable=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
        precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        is_brief = is_brief or case.variant in ROTATIONS
        return replace(
            verdict, served={name: judge(path, dtype, is_brief=is_brief) for name, dtype in precisions.items()}
        )
