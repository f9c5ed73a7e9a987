"""What lies between this program and vLLM's processes: requests, reports, models' files and settings, without vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from server.api.resolution import with_pinned
from server.calls.formats import FORMATS
from server.calls.reader import CallRules
from server.control.params import ControlParams, UnderPinned
from server.control.state import HELD_BY, HeldBy
from server.engines import create_engine
from server.engines.base import EngineInfo, NullObserver
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.embedded.model.loader import LoadedModel
from server.engines.heads import HeadSource
from server.engines.text import Detokenizer
from server.engines.vllm import sampling
from server.engines.vllm.delivery import Delivery
from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.launch import engine_arguments
from server.engines.vllm.outputs import VllmChoice
from server.engines.vllm.wire import CONFIG_KEY, CONTROL_KEY, REPORT_KEY, control_args, parse_control
from server.engines.vocabulary import Vocabulary
from server.errors import (
    ConfigurationError,
    HeadMismatchError,
    InvalidRequestError,
    ModelLoadError,
    UnsupportedFieldError,
)
from server.settings import Settings
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import CONFIGS, byte_tokenizer, control, write_heads
from value_models.heads import ValueHead

EDIT = [0.25, 0.5, 0.125, 0.75, float(HELD_BY.index(HeldBy.MAX_KL)), 0.0, 1.0]


def output(request_id: str = "r", tokens: tuple[int, ...] = (7,), finish_reason: Any = None) -> Any:
    return SimpleNamespace(
        request_id=request_id, new_token_ids=list(tokens), finish_reason=finish_reason, kv_transfer_params=None
    )


def report() -> dict[str, Any]:
    return {"edits": {"r": EDIT, "s": EDIT}, "edit_s": 0.001, "faults": {"bad": "why"}}


def test_control_travels_as_one_flat_string_and_comes_out_the_same() -> None:
    for params in (control({"good": 1.0}, max_response_kl=2.0), ControlParams.for_head("a")):
        args = control_args(params, "c")
        assert all(isinstance(value, str) for value in args.values())
        assert parse_control(args) == params
    assert parse_control(None) is None


@pytest.mark.parametrize(
    ("payload", "named"),
    [(7, "JSON string"), ("{", "body"), ('{"objective": {"weights": {"a": 1}}, "steps": -1}', "steps"), ("[]", "body")],
)
def test_control_that_is_none_is_refused_in_words(payload: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        parse_control({CONTROL_KEY: payload})


def test_an_edit_leaves_with_its_own_token_for_this_programs_engine() -> None:
    delivery, mine = Delivery(), output()
    delivery.expect("r", control_args(control({"good": 1.0}), "choice"))
    assert delivery.fill(mine, report()) is None
    assert mine.kv_transfer_params[REPORT_KEY] == {"id": "choice", "edit": EDIT, "edit_s": 0.001}
    # A token that was thrown away takes its edit with it.
    thrown_away = output(tokens=())
    delivery.fill(thrown_away, report())
    assert thrown_away.kv_transfer_params is None


def test_a_steps_duration_is_told_once() -> None:
    delivery, outputs, of_step = Delivery(), [output("r"), output("s")], report()
    for mine in outputs:
        delivery.expect(mine.request_id, control_args(control({"good": 1.0}), mine.request_id))
        delivery.fill(mine, of_step)
    assert ["edit_s" in mine.kv_transfer_params[REPORT_KEY] for mine in outputs] == [True, False]


def test_a_plain_server_gets_a_summary_with_the_last_token() -> None:
    delivery, args = Delivery(), {CONTROL_KEY: control_args(control({"good": 1.0}), "")[CONTROL_KEY]}
    delivery.expect("r", args)
    first, last = output(), output(finish_reason="stop")
    delivery.fill(first, report())
    delivery.fill(last, report())
    assert first.kv_transfer_params is None
    summary = last.kv_transfer_params[REPORT_KEY]["control"]
    assert summary["value_after"] == {"good": 0.5}
    assert (summary["mean_kl"], summary["max_kl"], summary["mean_shift"]) == (0.125, 0.125, 0.75)
    assert (summary["controlled_share"], summary["nonfinite_edits"]) == (1.0, 0)
    assert summary["held_share"] == {"max_kl": 1.0}
    again = output(finish_reason="stop")
    delivery.fill(again, None)
    assert again.kv_transfer_params is None


def test_a_fault_is_told_for_its_request_and_no_other() -> None:
    delivery = Delivery()
    assert delivery.fill(output("bad"), report()) == "why"
    assert delivery.fill(output("other"), report()) is None


def test_every_field_is_served_or_refused_by_name() -> None:
    assert set(SamplingParams.model_fields) >= sampling.SAMPLING_FIELDS
    assert set(UnderPinned.model_fields) >= sampling.CONTROL_FIELDS
    served = GenerationRequest("r", (1,), SamplingParams(top_k=3), control({"good": 1.0}), num_choices=2)
    sampling.check_served(served)


def test_pinned_control_beneath_a_callers_reaches_the_workers_by_this_program_alone() -> None:
    pinned = control({"good": 1.0}, stop_below={"line": 0.2}, window={"end": 9})
    over = with_pinned(control({"deep": 2.0}, trace=True), pinned)
    assert isinstance(over, UnderPinned)
    sampling.check_served(GenerationRequest("r", (1,), control=over))
    told = control_args(over, "c")
    assert parse_control(told) == over
    with pytest.raises(InvalidRequestError, match="pinned"):
        parse_control({CONTROL_KEY: told[CONTROL_KEY]})


def test_candidates_are_refused_by_name() -> None:
    searching = control({"good": 1.0}, search={"type": "blocks"})
    for options, field in (({"control": searching}, "control.search"), ({"best_of": 3}, "best_of")):
        with pytest.raises(UnsupportedFieldError, match=field):
            sampling.check_served(replace(GenerationRequest("r", (1,), control=control({"good": 1.0})), **options))


def test_control_that_leaves_calls_alone_is_refused_by_name() -> None:
    calls = CallRules(FORMATS["hermes"], {"now": None})
    plain = GenerationRequest("r", (1,), calls=calls)
    sampling.check_served(plain)
    sampling.check_served(replace(plain, control=control({"good": 1.0}, in_calls=True)))
    with pytest.raises(UnsupportedFieldError, match=r"control\.in_calls: the vLLM engine does not serve"):
        sampling.check_served(replace(plain, control=control({"good": 1.0})))


def test_each_token_is_counted_once() -> None:
    vocabulary = Vocabulary(byte_tokenizer().backend_tokenizer)
    request = GenerationRequest("r", (1,), SamplingParams(max_tokens=2))
    detokenizer = Detokenizer(vocabulary, (1,))
    choice = VllmChoice.of(
        request, 0, detokenizer=detokenizer, eos_token_ids=(), observer=NullObserver(), choice_id="c"
    )
    chunks = [choice.take(token) for token in (104, 105)]
    assert [chunk.num_drawn for chunk in chunks] == [1, 1]
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_choices_have_seeds_of_their_own_and_none_without_one() -> None:
    seeded = GenerationRequest("r", (1,), SamplingParams(seed=-5))
    seeds = [sampling.vllm_sampling(seeded, index, ())["seed"] for index in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    free = replace(seeded, sampling=SamplingParams())
    assert sampling.vllm_sampling(free, 0, ())["seed"] is None


def test_ends_of_text_are_passed_as_tokens_and_nothing_else_ends_it() -> None:
    request = GenerationRequest("r", (1,), SamplingParams(max_tokens=0, stop=("x",), prompt_logprobs=True))
    arguments = sampling.vllm_sampling(request, 0, {5, 3})
    assert (arguments["stop_token_ids"], arguments["ignore_eos"]) == ([3, 5], True)
    assert (arguments["max_tokens"], arguments["prompt_logprobs"]) == (1, 0)
    assert "stop" not in arguments
    assert sampling.vllm_sampling(request, 1, ())["prompt_logprobs"] is None


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_models_files_tell_what_loading_it_would(
    load_tiny: Callable[..., LoadedModel], model_folder: Callable[..., Path], architecture: str
) -> None:
    loaded, files = load_tiny(architecture), ModelFiles.of(str(model_folder(architecture)))
    assert files.identity == loaded.identity
    assert files.eos_token_ids == loaded.eos_token_ids
    assert (files.name, files.max_len) == (loaded.name, loaded.max_len)


def test_a_model_folder_that_brings_code_is_refused_before_vllm_sees_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "x.Model"}}')
    with pytest.raises(ModelLoadError, match="auto_map"):
        ModelFiles.of(str(tmp_path))


def test_settings_become_vllms_arguments(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    settings = Settings(
        engine="vllm", model=str(model_folder()), heads_dir=tmp_path, tensor_parallel_size=2, max_model_len=10_000,
        kv_cache_gib=2.0, vllm_options={"enforce_eager": True},
    )  # fmt: skip
    files = ModelFiles.of(settings.model)
    heads = HeadSource.of(tmp_path, files.identity)
    arguments = engine_arguments(settings, files, heads, torch.device("cpu"))
    assert arguments["additional_config"][CONFIG_KEY]["identity"] == files.identity
    assert (arguments["tensor_parallel_size"], arguments["max_model_len"]) == (2, 256)
    assert (arguments["kv_cache_memory_bytes"], arguments["enforce_eager"]) == (2 * 2**30, True)
    assert (arguments["load_format"], arguments["trust_remote_code"]) == ("safetensors", False)
    bold = settings.model_copy(update={"vllm_options": {"trust_remote_code": True}})
    with pytest.raises(ConfigurationError, match="trust_remote_code"):
        engine_arguments(bold, files, heads, torch.device("cpu"))


@pytest.mark.parametrize(
    "options",
    [{"engine": "vllm", "quantization": "int8"}, {"engine": "vllm", "prefill_chunk_tokens": 512},
     {"engine": "vllm", "max_step_stretch": 3.0}, {"tensor_parallel_size": 2},
     {"vllm_options": {"a": 1}}, {"distributed_executor_backend": "ray"}],
)  # fmt: skip
def test_a_setting_that_the_engine_does_not_have_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(options)[-1]):
        Settings(**options)


async def test_where_vllm_is_not_installed_the_engine_says_so(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm.engine.arg_utils", None)
    engine = create_engine(Settings(engine="vllm", model=str(model_folder()), heads_dir=tmp_path))
    with pytest.raises(ConfigurationError, match="vLLM cannot be imported"):
        await engine.start()


async def test_a_head_is_used_by_all_workers_or_by_none(
    model_folder: Callable[..., Path], heads: dict[str, ValueHead], tmp_path: Path
) -> None:
    asked: list[str] = []
    problems: list[str | None] = [None, "the second cannot read it"]

    async def collective_rpc(method: str, **_: Any) -> list[str | None]:
        asked.append(method)
        return problems

    files = ModelFiles.of(str(model_folder()))
    engine = VllmEngine(Settings(engine="vllm"))
    folder = write_heads(tmp_path, {"good": heads["good"]}, files.identity)
    engine._files, engine._heads = files, HeadSource.of(folder, files.identity)
    engine._info = EngineInfo(model_id="tiny", max_model_len=256, vocab_size=258, heads={})
    engine._llm = SimpleNamespace(errored=False, collective_rpc=collective_rpc)
    with pytest.raises(HeadMismatchError, match="the second"):
        await engine.load_head("good")
    assert (asked, engine.info.heads) == (["recontrol_read_head"], {})
    problems[:] = [None, None]
    await engine.load_head("good")
    assert (asked[1:], list(engine.info.heads)) == (["recontrol_read_head", "recontrol_use_head"], ["good"])
