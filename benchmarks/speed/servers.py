"""The peers' own HTTP servers: the command of each, and a process that is watched until it answers."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.speed.process import Child
from benchmarks.speed.setup import Setup

HOST = "127.0.0.1"
LLAMA_CPP_BUILD = ".venv-llama/build/bin"
"""Below --peers-dir: where `make peers` builds llama.cpp's libraries and server."""
_POLL_S = 0.05
END_S = 2.0
"""In which a process whose connection broke has ended, if it does."""
OUR_COMMAND = "from server.cli import main; raise SystemExit(main())"


def recontrol(bits: int, setup: Setup, python: Path, port: int, gguf: Path | None) -> list[str]:
    del gguf
    command = [str(python), "-c", OUR_COMMAND, "serve", "--model", setup.model, "--port", str(port)]
    command += ["--device", setup.device, "--dtype", setup.dtype, "--log-level", "warning"]
    command += ["--max-batch-size", str(setup.max_batch_size), "--max-model-len", str(setup.max_len)]
    command += ["--quantization", {4: "int4", 8: "int8", 16: "none"}[bits]]
    return [*command, "--heads-dir", str(setup.heads_dir)] if setup.heads_dir else command


def vllm(setup: Setup, python: Path, port: int, gguf: Path | None) -> list[str]:
    del gguf
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setup.folder)]
    command += ["--host", HOST, "--port", str(port), "--dtype", setup.dtype, "--seed", str(setup.seed)]
    command += ["--max-model-len", str(setup.max_len), "--max-num-seqs", str(setup.max_batch_size)]
    command += ["--disable-uvicorn-access-log"]
    on_gpu = ["--gpu-memory-utilization", str(setup.gpu_memory_share)]
    return [*command, *on_gpu] if setup.device == "cuda" else command


def vllm_env(setup: Setup, python: Path) -> dict[str, str]:
    """As vLLM's manual advises for a CPU, but all cores compute: by default one would be kept for its scheduler."""
    if setup.device != "cpu":
        return {}
    places = [f"{python.parent.parent}/lib/libiomp5.so", "/usr/lib/*/libtcmalloc_minimal.so.4"]
    preloaded = [os.environ.get("LD_PRELOAD"), *(path for place in places for path in glob.glob(place))]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(setup.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "LD_PRELOAD": ":".join(filter(None, preloaded)),
    }


def llama_cpp(setup: Setup, python: Path, port: int, gguf: Path | None) -> list[str]:
    del python
    rows, threads = str(setup.max_batch_size), str(setup.threads)
    command = [str(setup.peers_dir / LLAMA_CPP_BUILD / "llama-server"), "--model", str(gguf)]
    command += ["--host", HOST, "--port", str(port), "--parallel", rows, "--threads", threads]
    command += ["--ctx-size", str(setup.max_batch_size * setup.max_len), "--seed", str(setup.seed)]
    return [*command, "--n-gpu-layers", "999" if setup.device == "cuda" else "0"]


def llama_cpp_env(setup: Setup, python: Path) -> dict[str, str]:
    """The bindings take the libraries that were built with the server, when they are there."""
    del python
    build = setup.peers_dir / LLAMA_CPP_BUILD
    return {"LLAMA_CPP_LIB_PATH": str(build.resolve())} if build.is_dir() else {}


class Server(Child):
    """A child that serves OpenAI's completions on `url`."""

    def __init__(self, command: Sequence[str], port: int, *, env: Mapping[str, str], log: Path) -> None:
        self.url = f"http://{HOST}:{port}"
        super().__init__(command, env=env, log=log)

    def wait_until_it_answers(self, request: Mapping[str, Any], *, timeout_s: float) -> str:
        """Until one completion of one token has come; the model's id there. Raises PeerError."""
        with httpx.Client(base_url=self.url, timeout=timeout_s) as client:
            self.wait_until(client, "/health", timeout_s=timeout_s)
            try:
                model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
                body = {**request, "model": model, "max_tokens": 1}
                client.post("/v1/completions", json=body).raise_for_status()
            except httpx.HTTPStatusError as error:
                raise self.failure(f"the server refused a completion: {error.response.text[:300]}") from error
            except (ValueError, KeyError, IndexError) as error:
                raise self.failure(f"the server answers otherwise than OpenAI's: {error!r}") from error
            except httpx.TransportError as error:
                self.ends_within(END_S)
                raise self.failure(f"the server's connection broke: {error!r}") from error
        return model

    def wait_until(self, client: httpx.Client, path: str, *, timeout_s: float) -> None:
        """Until this path answers with success. Raises PeerError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.is_running:
                raise self.failure("the server ended before it answered")
            with contextlib.suppress(httpx.TransportError):
                if client.get(path).is_success:
                    return
            time.sleep(_POLL_S)
        raise self.failure(f"the server did not answer within {timeout_s:.0f} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
