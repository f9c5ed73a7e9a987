"""Several worker processes, and vLLM's own HTTP server with control as a plugin: what needs processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.engines.heads import HeadSource
from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.wire import SCHEDULER, VALIDATOR, WORKER
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL, Settings
from server.types import GenerationRequest, SamplingParams
from tests.conftest import Collected, control, run
from tests.engines.conftest import VLLM_OPTIONS
from tests.engines.vllm.test_laws import (
    CONTROLS,
    TOLERANCE,
    TOLERANCES,
    assert_same_edits,
    assert_same_response,
    collect,
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
# Of whatever the tests themselves run with, too.
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# vLLM's runner for CPUs makes the buffers between stages while it warms up, which it does only to compile.
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}, "block_size": 32}
SPLITS = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2, "vllm_options": TRACED},
}
STRONG = {"objective": {"weights": {"positive": 1.0}}, "step_size": 2.0}


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
    for split in SPLITS.values():
        mine = await answers(vllm_settings.model_copy(update=split))
        for name, ours, theirs in zip(CONTROLS, mine, expected, strict=True):
            assert_same_response(ours, theirs, TOLERANCES.get(name, TOLERANCE))


async def test_a_request_that_is_preempted_goes_on_where_it_was(vllm_settings: Settings) -> None:
    """Eight requests begin in two blocks of the cache each, and want three."""
    few = {"prefix_cache": False, "vllm_options": {**VLLM_OPTIONS, "num_gpu_blocks_override": 17}}
    engine = VllmEngine(vllm_settings.model_copy(update={"max_model_len": 128, **few}))
    await engine.start()
    try:
        preempted: list[int] = []
        logger, *_ = engine._llm.logger_manager.stat_loggers
        record = logger.record

        def count(scheduler_stats: Any, iteration_stats: Any, **others: Any) -> None:
            if iteration_stats is not None:
                preempted.append(iteration_stats.num_preempted_reqs)
            record(scheduler_stats, iteration_stats, **others)

        logger.record = count
        names = ["none", "budget", "conditions", "linear", "none", "mixed", "budget", "nonlinear"]
        asked = [request(seed, name, length=40, max_tokens=50) for seed, name in enumerate(names)]
        alone = [await collect(engine, one) for one in asked]
        assert sum(preempted) == 0
        together = await collect_all(engine, asked)
        assert sum(preempted) > 0
    finally:
        await engine.stop()
    for ours, theirs in zip(together, alone, strict=True):
        assert_same_response(ours, theirs)


async def test_what_control_cannot_be_had_with_is_refused_at_start(vllm_settings: Settings) -> None:
    options = {**VLLM_OPTIONS, "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    engine = VllmEngine(vllm_settings.model_copy(update={"vllm_options": options}))
    with pytest.raises(ConfigurationError, match="speculative decoding"):
        await engine.start()
    unknown = VllmEngine(vllm_settings.model_copy(update={"vllm_options": {"no_such_option": 1}}))
    with pytest.raises(ConfigurationError, match="no_such_option"):
        await unknown.start()


async def test_the_default_model_under_its_shipped_heads_answers_as_in_the_embedded_engine() -> None:
    engine = VllmEngine(
        Settings(
            engine="vllm", dtype="float32", max_model_len=512, max_batch_size=8, kv_cache_gib=0.5,
            vllm_options={"enforce_eager": True},
        )
    )  # fmt: skip
    await engine.start()
    try:
        prompt = tuple(engine.encode_chat([{"role": "user", "content": "How was your day at work?"}]))
        asked = [
            GenerationRequest(str(params), prompt, SamplingParams(max_tokens=24, temperature=0.0, logprobs=0), params)
            for params in (None, control({"positive": 1.0}), control({"plain": 1.0, "brevity": 0.5}))
        ]
        mine = await collect_all(engine, asked)
    finally:
        await engine.stop()
    loaded = load_model(DEFAULT_MODEL, device="cpu", dtype="float32")
    core = EngineCore(loaded, HeadSource.of(None, loaded.identity).load(), max_batch_size=8, max_model_len=512)
    expected = run(core, asked)
    for one, ours in zip(asked, mine, strict=True):
        theirs = expected[one.request_id, 0]
        assert ours.text == theirs.text
        torch.testing.assert_close(logprobs(ours), logprobs(theirs), atol=1e-2, rtol=0)
        assert_same_edits(ours.chunks, theirs.chunks, 1e-2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(client: httpx.Client, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        with contextlib.suppress(httpx.TransportError):
            if client.get(path).status_code == 200:
                return
        time.sleep(0.5)


def recontrol_serve(settings: Settings, port: int, *flags: str) -> list[str]:
    """The command of this program's server."""
    return [
        sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main(sys.argv[1:]))", "serve",
        "--engine", "vllm", "--model", settings.model, "--heads-dir", str(settings.heads_dir),
        "--dtype", "float32", "--kv-cache-gib", "0.05", "--port", str(port), "--served-model-name", "tiny",
        "--vllm-options", json.dumps(VLLM_OPTIONS), *flags,
    ]  # fmt: skip


def test_recontrol_serve_with_vllm_answers_traces_measures_and_ends_cleanly(
    vllm_settings: Settings, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log.txt"
    command = recontrol_serve(vllm_settings, port)
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(client, "/ready", process, log)
            body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            done = client.post("/v1/completions", json={**body, "control": {**STRONG, "trace": True}})
            assert done.status_code == 200, done.text
            choice = done.json()["choices"][0]
            assert choice["control"]["max_kl"] <= 0.3
            assert "positive" in json.dumps(choice)
            refused = client.post("/v1/completions", json={**body, "control": {"objective": {"weights": {"no": 1}}}})
            assert refused.status_code == 404
            metrics = client.get("/metrics").text
            assert 'recontrol_controlled_tokens_total{head="positive",model_name="tiny"} 6.0' in metrics
            assert 'recontrol_edit_duration_seconds_count{model_name="tiny"} 6.0' in metrics
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) in (0, -signal.SIGTERM)
        assert not psutil.wait_procs(workers, timeout=30)[1]
    finally:
        end(process)


def serve(
    settings: Settings, *flags: str, log: Path, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """vLLM's own server, not yet ready, and its port."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model,
        "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--block-size", "32",
        "--kv-cache-memory-bytes", str(50 * 2**20), "--worker-cls", WORKER, *flags,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, **(env or {}), "RECONTROL_HEADS_DIR": str(settings.heads_dir)}
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
    try:
        wait_until(client, "/health", process, log)
        yield client
    finally:
        client.close()
        end(process)


def complete(client: httpx.Client, asked: Any = None, **fields: Any) -> httpx.Response:
    xargs = {} if asked is None else {"vllm_xargs": {"recontrol": json.dumps(asked)}}
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json={**body, **xargs, **fields})


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


def test_vllms_own_server_takes_targets_as_rewards_and_says_where_it_cannot(plain_server: httpx.Client) -> None:
    """The head's calibration makes a level of 5 of a reward of 0.5 (`calibrated_card`)."""

    def answer(values: dict[str, float], **others: Any) -> tuple[list[Any], dict[str, Any]]:
        objective = {"type": "target", "values": values, **others}
        done = complete(plain_server, {"objective": objective, "step_size": 2.0})
        assert done.status_code == 200, done.text
        return done.json()["choices"], done.json()["kv_transfer_params"]["recontrol"]["control"]

    assert answer({"measured": 0.5}) == answer({"measured": 5.0}, unit="value")
    (warning,) = answer({"deep": 0.5})[1]["warnings"]
    assert "'deep' is uncalibrated" in warning


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"objective": {"weights": {"nobody": 1.0}}}, "nobody"),
        ({"objective": {"weights": {"positive": 1.0}}, "steps": -1}, "steps"),
        ({**STRONG, "stop_below": {"positive": 0.0}}, "stop_below"),
        (
            {**STRONG, "stop_below": {"positive": 0.0}, "over_turns": {"stop_below": {"positive": {"hold": 0.5}}}},
            "over_turns",
        ),
        ({**STRONG, "trace": True}, "trace"),
        ({**STRONG, "phase": "answer"}, "phase"),
        ({**STRONG, "search": {"type": "blocks"}}, "search"),
        ({"objective": {"type": "target", "values": {"measured": 1.5}}}, "control.objective.values.measured"),
        ({"objective": {"type": "target", "values": {"deep": 0.5}, "unit": "reward"}}, "uncalibrated"),
        (7, "recontrol"),
    ],
)
def test_bad_control_is_a_400_of_vllms_own_server(plain_server: httpx.Client, asked: Any, named: str) -> None:
    refused = complete(plain_server, asked)
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
