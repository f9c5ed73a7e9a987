"""Heads that were made for another model, inside vLLM's processes, with stand-ins for the modules of vLLM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from server.engines.base import EngineInfo
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.heads import HeadSource
from server.engines.vllm import engine as engine_module
from server.engines.vllm.delivery import Delivery
from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.launch import engine_arguments
from server.engines.vllm.row_control import Row, RowControl
from server.engines.vllm.wire import CONFIG_KEY, CONTROL_KEY, OTHER_BASE_VARIABLE, REPORT_KEY, control_args
from server.errors import ConfigurationError, HeadMismatchError
from server.settings import Settings
from tests.conftest import HIDDEN, control, write_heads
from tests.engines.vllm.test_row_control import Model
from tests.engines.vllm.test_sides import EDIT, output
from value_models.heads import ValueHead
from value_models.store import load_card

OURS = ("server.engines.vllm.worker", "server.engines.vllm.limits")
WORDS = "'good' was made for the model 'llama', not for the 'llama-tuned' that is served: fingerprint is"
REFUSED = "'good' in .* was not made for the model 'llama-tuned'.*--allow-other-base"


class Worker:
    """As vLLM's, as far as ours goes."""

    def load_model(self) -> None: ...


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Our modules that import vLLM, by their last name."""
    group = SimpleNamespace(world_size=1, cpu_group=None, is_last_rank=True)
    modules = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"get_pp_group": lambda: group, "get_tp_group": lambda: group},
        "vllm.v1": {},
        "vllm.v1.worker": {},
        "vllm.v1.worker.cpu_worker": {"CPUWorker": Worker},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, mine, **_: found.__setitem__(0, mine))
    yield {name.rsplit(".", 1)[-1]: importlib.import_module(name) for name in OURS}
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture
def heads_dir(heads: dict[str, ValueHead], load_tiny: Callable[..., Any], tmp_path: Path) -> Path:
    return write_heads(tmp_path / "heads", {"good": heads["good"]}, load_tiny().identity)


@pytest.fixture
def files(fine_tune: Path) -> ModelFiles:
    return ModelFiles.of(str(fine_tune))


@pytest.fixture
def start_worker(ours: dict[str, Any], files: ModelFiles) -> Callable[..., Any]:
    """A worker that has loaded the fine-tune; `config` is what this program has told vLLM, if it started it."""

    def start(config: dict[str, Any] | None = None) -> Any:
        model = Model()
        worker = ours["worker"].ControlWorker()
        worker.device = torch.device("cpu")
        worker.vllm_config = SimpleNamespace(
            additional_config={} if config is None else {CONFIG_KEY: config},
            model_config=SimpleNamespace(model=str(files.folder), dtype=torch.float32, get_hidden_size=lambda: HIDDEN),
        )
        worker.model_runner = SimpleNamespace(get_model=lambda: model, row_control=None)

        def install_control(row_control: RowControl, _: Any) -> None:
            worker.model_runner.row_control = row_control

        worker.model_runner.install_control = install_control
        worker.load_model()
        return worker

    return start


def test_this_program_tells_its_workers_what_its_settings_allow(files: ModelFiles) -> None:
    for allow in (False, True):
        settings = Settings(engine="vllm", model=str(files.folder), allow_other_base=allow)
        heads = HeadSource.of("heads", files.identity, allow_other_base=allow)
        arguments = engine_arguments(settings, files, heads, torch.device("cpu"))
        assert arguments["additional_config"][CONFIG_KEY]["allow_other_base"] is allow


def test_a_worker_that_this_program_started_follows_its_settings(
    start_worker: Callable[..., Any], files: ModelFiles, heads_dir: Path
) -> None:
    told = {"heads_dir": str(heads_dir), "identity": files.identity}
    for refusing in (told, {**told, "allow_other_base": False}):
        with pytest.raises(HeadMismatchError, match=REFUSED):
            start_worker(refusing)
    worker = start_worker({**told, "allow_other_base": True})
    assert WORDS in worker.model_runner.row_control.registry.warnings()["good"]


def test_a_worker_of_vllms_own_server_follows_the_environment(
    start_worker: Callable[..., Any], heads_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_HEADS_DIR", str(heads_dir))
    with pytest.raises(HeadMismatchError, match=REFUSED):
        start_worker()
    monkeypatch.setenv(OTHER_BASE_VARIABLE, "true")
    assert WORDS in start_worker().model_runner.row_control.registry.warnings()["good"]
    monkeypatch.setenv(OTHER_BASE_VARIABLE, "perhaps")
    with pytest.raises(ConfigurationError, match="RECONTROL_ALLOW_OTHER_BASE: 'perhaps' is neither true nor false"):
        start_worker()


def test_a_head_that_a_worker_reads_later_follows_the_same_rule(
    start_worker: Callable[..., Any], files: ModelFiles, heads_dir: Path, heads: dict[str, ValueHead]
) -> None:
    told = {"heads_dir": str(heads_dir), "identity": files.identity, "allow_other_base": True}
    worker = start_worker(told)
    for identity, warned in ((files.identity, {}), ({**files.identity, "fingerprint": "b"}, {"good"})):
        write_heads(heads_dir, {"good": heads["line"]}, identity)
        card = load_card(heads_dir / "good").model_dump(mode="json")
        assert worker.recontrol_read_head("good", card) is None
        worker.recontrol_use_head()
        assert worker.model_runner.row_control.registry.warnings().keys() == set(warned)
    worker._recontrol_heads = replace(worker._recontrol_heads, allow_other_base=False)
    assert "--allow-other-base" in worker.recontrol_read_head("good", card)


def test_the_engine_starts_with_another_models_heads_or_refuses_them_before_vllm_starts(
    files: ModelFiles, heads_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "launch", lambda *_: None)
    settings = Settings(engine="vllm", model=str(files.folder), heads_dir=str(heads_dir))
    with pytest.raises(HeadMismatchError, match=REFUSED):
        VllmEngine(settings)._launch()
    engine = VllmEngine(settings.model_copy(update={"allow_other_base": True}))
    engine._launch()
    assert WORDS in engine.info.head_warnings["good"]


async def test_the_engine_in_front_of_the_workers_follows_the_same_rule(files: ModelFiles, heads_dir: Path) -> None:
    async def collective_rpc(*_: Any, **__: Any) -> list[None]:
        return [None]

    for allow in (False, True):
        engine = VllmEngine(Settings(engine="vllm", allow_other_base=allow))
        engine._files, engine._heads = files, HeadSource.of(heads_dir, files.identity, allow_other_base=allow)
        engine._info = EngineInfo(model_id="tiny", max_model_len=256, vocab_size=258)
        engine._llm = SimpleNamespace(errored=False, collective_rpc=collective_rpc)
        if not allow:
            with pytest.raises(HeadMismatchError, match=REFUSED):
                await engine.load_head("good")
            continue
        await engine.load_head("good")
        assert WORDS in engine.info.head_warnings["good"]
        await engine.unload_head("good")
        assert engine.info.head_warnings == {}


def test_a_plain_servers_summary_warns_of_the_heads_that_its_request_names(
    start_worker: Callable[..., Any], files: ModelFiles, heads_dir: Path
) -> None:
    told = {"heads_dir": str(heads_dir), "identity": files.identity, "allow_other_base": True}
    row_control: RowControl = start_worker(told).model_runner.row_control
    args = {CONTROL_KEY: control_args(control({"good": 1.0}), "")[CONTROL_KEY]}
    row_control.add("r", args, prompt_len=1)
    row_control.logits(torch.zeros(1, HIDDEN), [Row("r", 0)])
    report = row_control.take_report()
    assert report is not None
    delivery, last = Delivery(), output(finish_reason="stop")
    delivery.expect("r", args)
    delivery.fill(last, report.as_plain_data())
    assert WORDS in last.kv_transfer_params[REPORT_KEY]["control"]["warnings"][0]


def test_heads_of_the_model_itself_are_reported_on_without_a_word_more() -> None:
    delivery, last = Delivery(), output(finish_reason="stop")
    delivery.expect("r", {CONTROL_KEY: control_args(control({"good": 1.0}), "")[CONTROL_KEY]})
    delivery.fill(last, {"edits": {"r": EDIT}, "edit_s": 0.0, "faults": {}, "warnings": {"s": ["made elsewhere"]}})
    assert "warnings" not in last.kv_transfer_params[REPORT_KEY]["control"]
