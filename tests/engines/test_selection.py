"""What `--engine auto` comes to, on machines that are made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.app import create_app
from server.cli import main
from server.engines import create_engine
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.fake import FakeEngine
from server.engines.selection import Machine, choose, resolved
from server.errors import ConfigurationError
from server.settings import Settings


def machine(*, has_gpu: bool = True, lack: str | None = None, runs: tuple[str, ...] = ("LlamaForCausalLM",)) -> Machine:
    return Machine(lambda: has_gpu, lambda: lack, lambda: frozenset(runs))


def chosen(asked: Machine | None = None, **settings: Any) -> str:
    return str(choose(Settings(engine="auto", **settings), asked or machine()))


def never() -> Any:
    raise AssertionError("this need not be asked")


def test_where_a_gpu_and_vllm_are_there_it_is_vllm(model_folder: Callable[..., Path]) -> None:
    assert chosen() == "vllm, since there are a CUDA device and vLLM"
    assert chosen(model=str(model_folder("llama"))) == "vllm, since there are a CUDA device and vLLM"


def test_without_a_gpu_it_is_the_embedded_engine_and_vllm_is_not_asked_for() -> None:
    asked = Machine(lambda: False, never, never)
    assert chosen(asked) == "embedded, since torch sees no CUDA device"
    assert chosen(Machine(never, never, never), device="cpu") == "embedded, since the device is cpu"


def test_without_vllm_it_is_the_embedded_engine() -> None:
    assert chosen(machine(lack="vLLM is not installed")) == "embedded, since vLLM is not installed"


def test_a_model_that_vllm_does_not_run_is_the_embedded_engines(model_folder: Callable[..., Path]) -> None:
    assert chosen(model=str(model_folder("gpt2"))) == "embedded, since vLLM does not run GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"quantization": "int8"}, "embedded, since vLLM does not have quantization"),
        ({"prefill_chunk_tokens": 512}, "embedded, since vLLM does not have prefill_chunk_tokens"),
        ({"max_step_stretch": 3.0}, "embedded, since vLLM does not have max_step_stretch"),
        ({"kv_cache_high_water": 0.5}, "embedded, since vLLM does not have kv_cache_high_water"),
        ({"guardrail_replacement": "Sorry."}, "embedded, since vLLM does not have guardrail_replacement"),
        ({"adapter": Path("lora")}, "embedded, since vLLM does not have adapter"),
        ({"tensor_parallel_size": 2}, "vllm, since only vLLM has tensor_parallel_size"),
        ({"pipeline_parallel_size": 2}, "vllm, since only vLLM has pipeline_parallel_size"),
        ({"distributed_executor_backend": "ray"}, "vllm, since only vLLM has distributed_executor_backend"),
        ({"vllm_options": {"enforce_eager": True}}, "vllm, since only vLLM has vllm_options"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_one_engine_alone_has_decide_whatever_the_machine_is(
    option: dict[str, Any], expected: str
) -> None:
    assert chosen(Machine(never, never, never), **option) == expected


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"stop_below": {"a": 0.0}, "on_stop": {"type": "retry"}}, "on_stop"),
        ({"stop_below": {"a": 0.0}, "on_stop": {"type": "stop", "hold_tokens": 4}}, "on_stop"),
        ({"stop_below": {"a": 0.0}, "over_turns": {"stop_below": {"a": {"hold": 0.5}}}}, "over_turns"),
    ],
    ids=["retry", "hold_tokens", "hold"],
)
def test_pinned_control_that_vllm_does_not_serve_is_the_embedded_engines(more: dict[str, Any], field: str) -> None:
    pinned = json.dumps({"objective": {"weights": {"a": 1.0}}, **more})
    expected = f"embedded, since vLLM does not serve pinned_control.{field}"
    assert chosen(Machine(never, never, never), pinned_control=pinned) == expected


def test_other_pinned_control_is_left_to_the_machine_and_what_is_none_is_refused() -> None:
    assert chosen(pinned_control='{"objective": {"weights": {"a": 1.0}}, "stop_below": {"a": 0.0}}').startswith("vllm")
    with pytest.raises(ConfigurationError, match="pinned_control: objective"):
        chosen(pinned_control="{}")


def test_where_auto_comes_to_vllm_its_own_limits_on_pinned_control_are_told() -> None:
    pinned = '{"objective": {"weights": {"a": 1.0}}, "stop_below": {"a": 0.0}, "on_stop": {"type": "retry"}}'
    settings = Settings(engine="auto", tensor_parallel_size=2, pinned_control=pinned)
    with pytest.raises(ConfigurationError, match="pinned_control: on_stop: the vLLM engine only stops"):
        create_app(settings, FakeEngine())


def test_settings_of_both_engines_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"quantization: only .* embedded .* only vllm has tensor_parallel_size"):
        Settings(engine="auto", quantization="int8", tensor_parallel_size=2)


def test_the_log_says_in_one_line_which_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="server.engines.selection"):
        assert resolved(Settings(engine="auto"), machine(has_gpu=False)).engine == "embedded"
    assert caplog.messages == ["engine auto: embedded, since torch sees no CUDA device"]


def test_an_engine_that_is_named_is_taken_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(engine="fake")
    assert resolved(settings, Machine(never, never, never)) is settings
    assert not caplog.messages


def test_print_config_shows_what_auto_comes_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engines.selection._this_machine", lambda: machine(has_gpu=False))
    assert main(["serve", "--print-config", "--engine", "auto"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["engine"] == "auto: embedded, since torch sees no CUDA device"
    assert shown["kv_cache_gib"].startswith("auto: at most")
    assert main(["serve", "--print-config", "--engine", "auto", "--tensor-parallel-size", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["engine"], shown["kv_cache_gib"]) == ("auto: vllm, since only vLLM has tensor_parallel_size", None)


def test_the_engine_that_auto_makes_is_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engines.selection._this_machine", lambda: machine(has_gpu=False))
    assert isinstance(create_engine(Settings(engine="auto")), EmbeddedEngine)


@pytest.mark.parametrize(("version", "lack"), [("0.32.0", None), ("0.32.0+cpu", "vLLM 0.32.0+cpu is a build for CPUs")])
def test_a_vllm_for_cpus_is_none_for_a_gpu(version: str, lack: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    monkeypatch.setattr("server.engines.selection._has_gpu", lambda: True)
    monkeypatch.setattr("server.engines.selection._vllm_architectures", lambda: frozenset(["LlamaForCausalLM"]))
    expected = "there are a CUDA device and vLLM" if lack is None else lack
    assert choose(Settings(engine="auto")).reason == expected


@pytest.mark.parametrize(
    ("engine", "given"),
    [
        ("embedded", {"tensor_parallel_size": 2}),
        ("vllm", {"quantization": "int8"}),
        ("fake", {"search_rewards": ("plain",)}),
        ("fake", {"pipeline_parallel_size": 2}),
    ],
)
def test_a_setting_that_the_engine_does_not_have_is_refused(engine: Any, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValidationError, match=f"{name}: the engine {engine} does not have this setting"):
        Settings(engine=engine, **given)
