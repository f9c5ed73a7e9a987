"""How much of this machine the process may use: memory and cores, by its control groups, its affinity and the hardware.

Control groups of version 1 and 2 are read, each from the process's own up to the root that it can see, since a limit of
any of them holds. Knows nothing of models. Enter at `memory_limit_bytes` and `usable_cores`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MEMORY_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")
"""Version 2's hard limit and the one from which on it throttles; version 1's."""
_THREADS_VARIABLE = "OMP_NUM_THREADS"
SPIN_VARIABLE = "GOMP_SPINCOUNT"
"""Of the OpenMP library that torch's builds for CPUs bring, read as that is loaded."""


@dataclass(slots=True, frozen=True)
class _Mount:
    """A hierarchy of control groups as mounted: the group `root` of it is at `point`."""

    root: PurePosixPath
    point: Path
    controllers: frozenset[str]
    """Of version 1; empty for version 2."""


def memory_limit_bytes(proc: Path = Path("/proc")) -> int:
    """The least of what the hardware has and what the control groups allow."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups("memory", proc):
        limits += [int(text) for name in _MEMORY_FILES if (text := _read(folder / name)).isdigit()]
    return min(limits)


def usable_cores(proc: Path = Path("/proc")) -> int:
    """Those that this process may run on, but no more than the control groups' quota of time, rounded up."""
    quotas = [quota for folder in _groups("cpu", proc) if (quota := _cpu_quota(folder)) is not None]
    return min([_num_cores(), *(max(1, math.ceil(quota)) for quota in quotas)])


def limit_threads(environ: MutableMapping[str, str] = os.environ, proc: Path = Path("/proc")) -> None:
    """Have libraries compute with as many threads as the quota allows, unless OMP_NUM_THREADS is set already.

    They count the cores of the affinity alone, and threads beyond a quota are stopped for most of each period. To be
    called before torch is imported; where it has been, torch is told.
    """
    if environ.get(_THREADS_VARIABLE) or (cores := usable_cores(proc)) >= _num_cores():
        return
    environ[_THREADS_VARIABLE] = str(cores)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(cores)


def let_waiting_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have torch's threads sleep as soon as they wait, unless the environment says how they are to wait.

    By default they spin for milliseconds after each operation, on the cores that the threads of the native kernels need
    for the next. To be called before torch is imported.
    """
    if not environ.keys() & {SPIN_VARIABLE, "OMP_WAIT_POLICY"}:
        environ[SPIN_VARIABLE] = "0"


def _num_cores() -> int:
    """By affinity, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the mounted root."""
    mounts = list(_mounts(proc))
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for mount in mounts:
            if (controller in names.split(",") and controller in mount.controllers) or not (names or mount.controllers):
                yield from _up_to(mount, PurePosixPath(path))


def _up_to(mount: _Mount, group: PurePosixPath) -> Iterator[Path]:
    """A container may see its own group as the root of the mount, whatever it is called outside."""
    is_below = group.is_relative_to(mount.root) and ".." not in group.parts
    folder = mount.point / group.relative_to(mount.root) if is_below else mount.point
    yield folder
    while folder != mount.point:
        folder = folder.parent
        yield folder


def _mounts(proc: Path) -> Iterator[_Mount]:
    """From mountinfo: `id parent device root point options [more ...] - type source options`."""
    for line in _read(proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[-1].split(",")) if kind[0] == "cgroup" else frozenset[str]()
        # A blank within a path is written as \040.
        root, point = (field.replace("\\040", " ") for field in fields[3:5])
        yield _Mount(PurePosixPath(root), Path(point), controllers)


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time; None without a limit."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return int(quota) / int(period)


def _read(file: Path) -> str:
    """Its text without the line's end; empty where it is not there or cannot be read."""
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""
