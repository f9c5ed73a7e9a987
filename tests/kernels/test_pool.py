"""The threads that share kernels' pieces: none is lost or done twice, whoever calls, forks, fails or ends."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from server import kernels
from server.kernels import Kernels, linear, machine_levels
from server.kernels.linear import Bits, NativeLinear
from server.kernels.ops import sample

pytestmark = pytest.mark.skipif(not machine_levels() or shutil.which("g++") is None, reason="no AVX2 or no compiler")
SOURCES = [Path(__file__).with_name("pool_probe.cpp"), Path(kernels.__file__).with_name("pool.cpp")]
LOAD = """
import ctypes, os, sys, threading, time
probe = ctypes.CDLL(sys.argv[1])

def are_counted(threads, pieces, us=0):
    times, of_threads = (ctypes.c_int64 * pieces)(), ctypes.c_int64()
    arguments = map(ctypes.c_int64, (threads, pieces, us))
    return probe.count(*arguments, times, ctypes.byref(of_threads)) == 0 and set(times) == {1}
"""


@pytest.fixture(scope="module")
def probe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool, compiled with the calls of pool_probe.cpp."""
    file = tmp_path_factory.mktemp("pool") / "probe.so"
    flags = ["-O2", "-std=c++17", "-pthread", "-shared", "-fPIC", f"-I{SOURCES[1].parent}"]
    subprocess.run(["g++", *flags, *map(str, SOURCES), "-o", str(file)], check=True)
    return file


@pytest.fixture(scope="module")
def probe(probe_file: Path) -> Any:
    library = ctypes.CDLL(str(probe_file))
    numbers = ctypes.POINTER(ctypes.c_int64)
    library.count.argtypes = [*[ctypes.c_int64] * 3, numbers, numbers]
    library.meet.argtypes = [ctypes.c_int64]
    library.nest.argtypes = library.fail.argtypes = [*[ctypes.c_int64] * 3, numbers]
    return library


def counted(probe: Any, threads: int, pieces: int, us: int = 0) -> tuple[list[int], int]:
    """How often each piece was done, and by how many threads."""
    times, of_threads = (ctypes.c_int64 * pieces)(), ctypes.c_int64()
    assert probe.count(threads, pieces, us, times, ctypes.byref(of_threads)) == 0
    return list(times), of_threads.value


def run_alone(probe_file: Path, code: str) -> None:
    """As a program of its own, which must end by itself, without an error and saying nothing."""
    command = [sys.executable, "-c", LOAD + code, str(probe_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_every_piece_is_done_once(probe: Any, threads: int) -> None:
    for pieces in (0, 1, 2, 3, 10, 1000, *range(1, 60)):
        assert counted(probe, threads, pieces)[0] == [1] * pieces


def test_the_number_of_threads_is_each_calls_own(probe: Any) -> None:
    for threads in (4, 1, 2, 6, 1, 3):
        times, of_threads = counted(probe, threads, 40, us=200)
        assert times == [1] * 40
        assert of_threads <= threads


def test_other_threads_take_part_also_after_they_have_slept(probe: Any) -> None:
    for pause_s in (0.0, 0.0, 0.05, 0.001, 0.0):
        time.sleep(pause_s)
        assert probe.meet(2) == 0


def test_callers_from_many_threads_at_once_all_get_their_own(probe: Any) -> None:
    wrong: list[int] = []

    def call(seed: int) -> None:
        for i in range(100):
            pieces = (seed * 37 + i * 11) % 50 + 1
            times, of_threads = counted(probe, 1 + (seed + i) % 4, pieces, us=20 if i % 10 == 0 else 0)
            if times != [1] * pieces or of_threads > 4:
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


def test_a_piece_that_shares_pieces_does_them_itself(probe: Any) -> None:
    sums = (ctypes.c_int64 * 20)()
    assert probe.nest(3, 20, 50, sums) == 0
    assert list(sums) == [50] * 20


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_failing_piece_is_told_once_nobody_works_any_longer_and_the_next_call_works(probe: Any, threads: int) -> None:
    num_running = ctypes.c_int64(-1)
    for first in (0, 1, 29):
        assert probe.fail(threads, 30, first, ctypes.byref(num_running)) == 1
        assert num_running.value == 0
        assert counted(probe, threads, 30)[0] == [1] * 30


def test_a_kernel_without_memory_raises_memory_error() -> None:
    with pytest.raises(MemoryError, match="native kernel"):
        kernels._by_threads(lambda *_: 1)(1, 2)


def test_a_forked_process_has_threads_of_its_own(probe_file: Path) -> None:
    run_alone(
        probe_file,
        """
assert are_counted(3, 100)
for _ in range(10):
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        is_well = are_counted(3, 100, 100) and probe.meet(ctypes.c_int64(2)) == 0
        if grandchild:
            is_well = is_well and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if is_well else 1)
    assert are_counted(3, 100)
    assert os.waitpid(child, 0)[1] == 0
""",
    )


def test_a_process_may_fork_while_its_threads_compute(probe_file: Path) -> None:
    run_alone(
        probe_file,
        """
is_over = False
def call():
    while not is_over:
        assert are_counted(3, 30)
callers = [threading.Thread(target=call) for _ in range(2)]
[caller.start() for caller in callers]
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if are_counted(3, 100) else 1)
    assert os.waitpid(child, 0)[1] == 0
is_over = True
[caller.join() for caller in callers]
""",
    )


@pytest.mark.parametrize("last", ["time.sleep(0.2)", "pass", "sys.exit()"])
def test_a_process_ends_whatever_its_threads_do(probe_file: Path, last: str) -> None:
    run_alone(
        probe_file,
        f"""
def call():
    while True:
        are_counted(3, 30)
threading.Thread(target=call, daemon=True).start()
assert are_counted(3, 100)
{last}
""",
    )


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_maps_bits_do_not_depend_on_the_number_of_threads(
    library: Kernels, monkeypatch: pytest.MonkeyPatch, bits: Bits, rows: int
) -> None:
    monkeypatch.setattr(linear, "native", lambda: library)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 96, generator=generator).bfloat16()
    x = torch.randn(rows, 96, generator=generator).bfloat16()
    results = [on_threads(threads, lambda: NativeLinear(weight, bits=bits)(x)) for threads in (1, 2, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_draws_do_not_depend_on_the_number_of_threads() -> None:
    logits = torch.randn(13, 999, generator=torch.Generator().manual_seed(0))
    columns: Any = ([0.7] * 13, [0, 5] * 6 + [3], [0.9] * 13, [0.01] * 13, [i / 13 for i in range(13)])
    drawn = [on_threads(threads, lambda: sample(logits, *columns)) for threads in (1, 2, 5)]
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)


def on_threads(threads: int, compute: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)
