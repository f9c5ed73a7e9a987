"""What the thread of a job and whoever follows it tell each other: how far it is, and that it is to end."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

from server.errors import RecontrolError

Phase = Literal["waiting", "reading", "fitting", "saving", "done"]


class JobCancelledError(RecontrolError):
    """Raised in a job's own thread alone; nobody is answered with it."""

    code = "job_cancelled"


@dataclass(slots=True, frozen=True)
class Progress:
    phase: Phase
    done: int
    of: int
    """Texts that are read with the model; fitting comes after all of them."""


class JobControl:
    """`progress` is a new object each time, so that any thread may read it."""

    def __init__(self, num_texts: int) -> None:
        self.progress = Progress("waiting", 0, num_texts)
        self._is_cancelled = threading.Event()
        self._lock = threading.Lock()
        """So that a job is either cancelled or saved, and both sides know which."""

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled.is_set()

    def cancel(self) -> bool:
        """Whether the job will end of it; one that saves its head goes on."""
        with self._lock:
            if not self.is_cancelled and self.progress.phase in ("saving", "done"):
                return False
            self._is_cancelled.set()
            return True

    def check(self) -> None:
        """Raises JobCancelledError once the job is to end."""
        if self.is_cancelled:
            raise JobCancelledError("The job was cancelled.")

    def enter(self, phase: Phase) -> None:
        """Raises JobCancelledError."""
        with self._lock:
            self.check()
            self.progress = Progress(phase, self.progress.done, self.progress.of)

    def count(self) -> None:
        """One text more has been read."""
        self.progress = Progress("reading", self.progress.done + 1, self.progress.of)
