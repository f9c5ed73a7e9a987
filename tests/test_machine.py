"""What a process may use of its machine, on control groups of both versions that are made here as files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.cli import program
from server.engines.embedded.model.kv_cache import default_kv_bytes
from server.machine import let_waiting_threads_sleep, limit_threads, memory_limit_bytes, usable_cores

GIB = 2**30
HOST_BYTES = memory_limit_bytes(Path("/nonexistent"))
V1_UNLIMITED = "9223372036854771712"
Machine = Callable[..., Path]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A /proc whose process is in `group`, of a hierarchy mounted in tmp_path that has these `files`."""

    def make(group: str, files: dict[str, str], *, root: str = "/", version: int = 2, name: str = "cgroup") -> Path:
        point = tmp_path / name
        for file, text in files.items():
            (point / file).parent.mkdir(parents=True, exist_ok=True)
            (point / file).write_text(text + "\n")
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True, exist_ok=True)
        written = str(point).replace(" ", "\\040")
        if version == 2:
            groups, kinds = [f"0::{group}"], ["cgroup2 cgroup rw,nsdelegate"]
        else:
            groups = [f"7:cpu,cpuacct:{group}", f"4:memory:{group}", "1:name=systemd:/", "0::/"]
            kinds = ["cgroup cgroup rw,memory", "cgroup cgroup rw,cpu,cpuacct"]
        mounts = [f"{31 + i} 23 0:28 {root} {written} rw,nosuid - {kind}" for i, kind in enumerate(kinds)]
        (proc / "self/cgroup").write_text("\n".join(groups) + "\n")
        (proc / "self/mountinfo").write_text("\n".join(["22 27 0:21 / /proc rw - proc proc rw", *mounts]) + "\n")
        return proc

    return make


def test_without_control_groups_the_hardware_is_the_limit() -> None:
    assert os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") == HOST_BYTES
    assert usable_cores(Path("/nonexistent")) == 8


@pytest.mark.parametrize(
    ("version", "group", "files", "limit"),
    [
        (2, "/", {"memory.max": str(GIB)}, GIB),
        (2, "/", {"memory.max": "max"}, HOST_BYTES),
        (2, "/", {"memory.max": str(HOST_BYTES + GIB)}, HOST_BYTES),
        (2, "/", {"memory.max": str(GIB), "memory.high": str(GIB // 2)}, GIB // 2),
        (2, "/", {"memory.max": "max", "memory.high": str(GIB)}, GIB),
        (2, "/pod/box", {"pod/box/memory.max": "max", "pod/memory.max": str(GIB), "memory.max": "max"}, GIB),
        (2, "/pod/box", {"pod/box/memory.max": str(GIB // 4), "pod/memory.max": str(GIB)}, GIB // 4),
        (1, "/docker/box", {"docker/box/memory.limit_in_bytes": str(GIB)}, GIB),
        (1, "/docker/box", {"docker/box/memory.limit_in_bytes": V1_UNLIMITED}, HOST_BYTES),
        (1, "/docker/box", {"docker/memory.limit_in_bytes": str(GIB)}, GIB),
        (2, "/", {"memory.max": "lots"}, HOST_BYTES),
    ],
)
def test_memory_is_the_least_that_any_group_allows(
    machine: Machine, version: int, group: str, files: dict[str, str], limit: int
) -> None:
    assert memory_limit_bytes(machine(group, files, version=version)) == limit


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_its_own_group_as_the_root_finds_its_limit(machine: Machine, version: int) -> None:
    file = "memory.max" if version == 2 else "memory.limit_in_bytes"
    inside = machine("/docker/box/inner", {f"inner/{file}": str(GIB)}, root="/docker/box", version=version)
    assert memory_limit_bytes(inside) == GIB
    elsewhere = machine("/../other", {file: str(GIB // 2)}, root="/docker/box", version=version, name="a b")
    assert memory_limit_bytes(elsewhere) == GIB // 2


@pytest.mark.parametrize(
    ("version", "files", "cores"),
    [
        (2, {"cpu.max": "200000 100000"}, 2),
        (2, {"cpu.max": "150000 100000"}, 2),
        (2, {"cpu.max": "25000 100000"}, 1),
        (2, {"cpu.max": "max 100000"}, 8),
        (2, {"cpu.max": "6400000 100000"}, 8),
        (2, {"pod/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        (1, {"pod/cpu.cfs_quota_us": "50000", "pod/cpu.cfs_period_us": "25000"}, 2),
        (1, {"pod/cpu.cfs_quota_us": "-1", "pod/cpu.cfs_period_us": "100000"}, 8),
        (2, {"cpu.max": "200000 0"}, 8),
    ],
)
def test_cores_are_those_that_the_quota_pays_for(
    machine: Machine, version: int, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(machine("/pod", files, version=version)) == cores


def test_threads_follow_the_quota_unless_the_user_said_how_many(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    proc = machine("/", {"cpu.max": "300000 100000"})
    environ: dict[str, str] = {}
    limit_threads(environ, proc)
    assert (environ, told) == ({"OMP_NUM_THREADS": "3"}, [3])
    set_before = {"OMP_NUM_THREADS": "5"}
    limit_threads(set_before, proc)
    assert (set_before, told) == ({"OMP_NUM_THREADS": "5"}, [3])
    unlimited: dict[str, str] = {}
    limit_threads(unlimited, machine("/", {"cpu.max": "max 100000"}))
    assert (unlimited, told) == ({}, [3])


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}])
def test_waiting_threads_sleep_unless_the_user_said_how_they_wait(said: dict[str, str]) -> None:
    environ: dict[str, str] = {}
    let_waiting_threads_sleep(environ)
    assert environ == {"GOMP_SPINCOUNT": "0"}
    before = dict(said)
    let_waiting_threads_sleep(said)
    assert said == before


def test_every_command_settles_its_threads_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(program, "limit_threads", lambda: done.append("limited"))
    monkeypatch.setattr(program, "let_waiting_threads_sleep", lambda: done.append("asleep"))
    command_at = program._command_at
    monkeypatch.setattr(program, "_command_at", lambda path: (done.append(path), command_at(path))[1])
    assert program.main(["serve", "--port", "99999"]) == 2
    assert done == ["limited", "asleep", "server.cli.serve:Serve"]


def test_keys_and_values_get_half_of_what_the_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engines.embedded.model.kv_cache.memory_limit_bytes", lambda: 3 * GIB)
    assert default_kv_bytes(torch.device("cpu")) == math.floor(1.5 * GIB)
