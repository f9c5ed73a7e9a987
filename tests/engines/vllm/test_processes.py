"""Several worker processes, and vLLM's own HTTP server with control as a plugin: what needs processes of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.wire import SCHEDULER, VALIDATOR, WORKER
from server.errors import ConfigurationError
from server.settings import Settings
from tests.conftest import Collected
from tests.engines.conftest import VLLM_OPTIONS
from tests.engines.vllm.test_laws import (
    CONTROLS,
    TOLERANCE,
    TOLERANCES,
    assert_same_edits,
    collect_all,
    logprobs,
    request,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[3]
_START_TIMEOUT_S = 400


async def answers(settings: Settings) -> list[Collected]:
    engine = VllmEngine(settings)
    await engine.start()
    try:
        return await collect_all(engine, [request(seed, name) for seed, name in enumerate(CONTROLS)])
    finally:
        await engine.stop()


async def test_two_processes_that_share_or_split_the_layers_control_as_one_does(
    vllm_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await answers(vllm_settings)
    # Two ranks on the cores of one socket.
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    # vLLM's runner for CPUs makes the buffers between stages while it warms up, which it does only to compile.
    traced = {"compilation_config": {"mode": 2, "backend": "eager"}, "block_size": 32}
    for size in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "vllm_options": traced}):
        mine = await answers(vllm_settings.model_copy(update=size))
        for name, ours, theirs in zip(CONTROLS, mine, expected, strict=True):
            tolerance = TOLERANCES.get(name, TOLERANCE)
            assert ours.token_ids == theirs.token_ids
            torch.testing.assert_close(logprobs(ours), logprobs(theirs), atol=tolerance, rtol=0)
            assert_same_edits(ours.chunks, theirs.chunks, tolerance)


async def test_what_control_cannot_be_had_with_is_refused_at_start(vllm_settings: Settings) -> None:
    options = {**VLLM_OPTIONS, "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    engine = VllmEngine(vllm_settings.model_copy(update={"vllm_options": options}))
    with pytest.raises(ConfigurationError, match="speculative decoding"):
        await engine.start()
    unknown = VllmEngine(vllm_settings.model_copy(update={"vllm_options": {"no_such_option": 1}}))
    with pytest.raises(ConfigurationError, match="no_such_option"):
        await unknown.start()


def serve(settings: Settings, *flags: str, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """vLLM's own server, not yet ready, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model,
        "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--block-size", "32",
        "--kv-cache-memory-bytes", str(50 * 2**20), "--worker-cls", WORKER, *flags,
    ]  # fmt: skip
    env = {**os.environ, "RECONTROL_HEADS_DIR": str(settings.heads_dir), "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, cwd=log.parent, stdout=out, stderr=out, start_new_session=True)
    return process, port


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def plain_server(vllm_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("plain") / "log.txt"
    process, port = serve(vllm_settings, "--scheduler-cls", SCHEDULER, "--logits-processors", VALIDATOR, log=log)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    deadline = time.monotonic() + _START_TIMEOUT_S
    try:
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield client
    finally:
        client.close()
        end(process)


def complete(client: httpx.Client, control: Any = None, **fields: Any) -> httpx.Response:
    xargs = {} if control is None else {"vllm_xargs": {"recontrol": json.dumps(control)}}
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json={**body, **xargs, **fields})


STRONG = {"objective": {"weights": {"positive": 1.0}}, "step_size": 2.0}


def test_vllms_own_server_controls_through_xargs_and_tells_what_it_did(plain_server: httpx.Client) -> None:
    free, controlled = complete(plain_server), complete(plain_server, STRONG)
    assert free.status_code == controlled.status_code == 200, controlled.text
    assert free.json()["choices"][0]["text"] != controlled.json()["choices"][0]["text"]
    assert free.json()["kv_transfer_params"] is None
    summary = controlled.json()["kv_transfer_params"]["recontrol"]["control"]
    assert summary["value_after"]["positive"] > summary["value_before"]["positive"]
    assert 0 < summary["max_kl"] <= 0.3
    # The shared cache, and the next request without control, hold nothing of it.
    assert complete(plain_server).json()["choices"] == free.json()["choices"]


@pytest.mark.parametrize(
    ("control", "named"),
    [
        ({"objective": {"weights": {"nobody": 1.0}}}, "nobody"),
        ({"objective": {"weights": {"positive": 1.0}}, "steps": -1}, "steps"),
        ({**STRONG, "stop_below": {"positive": 0.0}}, "stop_below"),
        ({**STRONG, "trace": True}, "trace"),
        (7, "recontrol"),
    ],
)
def test_bad_control_is_a_400_of_vllms_own_server(plain_server: httpx.Client, control: Any, named: str) -> None:
    refused = complete(plain_server, control)
    assert refused.status_code == 400, refused.text
    assert named in refused.text
    ours = complete(plain_server, vllm_xargs={"recontrol_id": "recontrol-0"})
    assert ours.status_code == 400
    assert complete(plain_server).status_code == 200


def test_a_plain_server_without_the_validator_does_not_start(vllm_settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    process, _ = serve(vllm_settings, log=log)
    try:
        assert process.wait(_START_TIMEOUT_S) != 0
    finally:
        end(process)
    assert VALIDATOR in log.read_text()
