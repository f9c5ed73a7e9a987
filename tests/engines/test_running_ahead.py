"""A step that is launched before the tokens of the one before are read: on a CPU, where that is as good as on a GPU.

What comes of it is what an engine gives that reads first, whoever ends, turns back, competes, gives way or fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.structure import CompiledSchema, SchemaCompiler
from server.kernels.transfer import Arriving
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import EOS, VOCAB, Results, byte_tokenizer, control, run
from tests.engines.test_laws import break_a_row
from tests.engines.test_scheduler import small_core

PROMPT = (72, 101, 108, 108, 111)
GOOD = {"good": 1.0}


def ask(name: str, steer: Any = None, *, prompt: tuple[int, ...] = PROMPT, **options: Any) -> GenerationRequest:
    """Fields of the request are told from those of its sampling by name."""
    own = {key: options.pop(key) for key in ("num_choices", "best_of", "structure") if key in options}
    instructed = (9, 8, *prompt) if steer is not None and steer.instruction is not None else ()
    sampling = SamplingParams(**{"max_tokens": 30, "seed": 3, **options})
    return GenerationRequest(name, prompt, sampling, steer, instructed_token_ids=instructed, **own)


@pytest.fixture(scope="module")
def schema() -> CompiledSchema:
    pytest.importorskip("llguidance")
    compiler = SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids={EOS})
    return compiler.compile('{"type": "array", "items": {"enum": ["cat", 12]}, "minItems": 3, "maxItems": 3}')


def everything(schema: CompiledSchema) -> list[GenerationRequest]:
    retry = {"type": "retry", "step_growth": 1.5, "rewind_tokens": 3, "hold_tokens": 4, "max_retries": 6}
    steered = {
        "plain": control(GOOD),
        "paced": control(
            {"line": 1.0}, gate={"head": "good", "below": 0.2, "hysteresis": 0.1}, max_response_kl=0.5,
            schedule={"type": "linear", "tokens": 9, "to": 0.5},
        ),
        "retries": control(GOOD, stop_below={"line": -0.3}, on_stop=retry),
        "stops": control(GOOD, stop_below={"line": -0.8}),
        "search": control(GOOD, search={"type": "blocks", "candidates": 2, "block_tokens": 3}),
        "instruction": control(GOOD).model_validate(
            {"objective": {"type": "instruction", "text": "x", "weight": 0.5, "beside": {"weights": {"line": 1.0}}}}
        ),
    }  # fmt: skip
    return [
        *(ask(name, steer, logprobs=2) for name, steer in steered.items()),
        ask("ends soon", logit_bias={EOS: 4.0}, num_choices=3),
        ask("stop string", stop=("a", "!", "  "), temperature=1.5),
        ask("penalties", presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.3),
        ask("schema", structure=schema, max_tokens=60),
        ask("schema and retries", steered["retries"], structure=schema, max_tokens=60),
        ask("best of", control(GOOD), best_of=3, logit_bias={EOS: 3.0}),
        ask("one token", max_tokens=1),
        ask("long prompt", prompt=tuple(range(150)), prompt_logprobs=True, logprobs=1, num_choices=2),
    ]


def told(results: Results) -> dict[tuple[str, int], Any]:
    return {
        key: (r.text, r.token_ids, r.finish_reasons, [chunk.logprobs for chunk in r.chunks if chunk.logprobs])
        for key, r in results.items()
    }


@pytest.mark.parametrize("steps_between", [0, 2])
def test_what_comes_of_every_kind_of_request_is_what_an_engine_gives_that_reads_first(
    make_core: Callable[..., EngineCore], schema: CompiledSchema, steps_between: int
) -> None:
    core, first = make_core(runs_ahead=True), make_core()
    expected = told(run(first, everything(schema)))
    assert told(run(core, everything(schema), steps_between=steps_between)) == expected
    assert {FinishReason.STOP, FinishReason.LENGTH, FinishReason.GUARDRAIL} <= {r[2][-1] for r in expected.values()}
    assert (core.page_pool.num_held, core.has_work, core._ahead) == (0, False, None)


def test_so_it_is_where_pages_run_out_and_sequences_give_way(
    make_core: Callable[..., EngineCore], schema: CompiledSchema
) -> None:
    core, kinds = small_core(make_core, 8, runs_ahead=True), ("plain", "retries", "search", "penalties", "schema")
    longer = {"max_tokens": 150, "ignore_eos": True}
    asked = [
        replace(r, sampling=r.sampling.model_copy(update=longer)) for r in everything(schema) if r.request_id in kinds
    ]
    assert told(run(core, asked, steps_between=1)) == told(run(make_core(), asked))
    assert core.status().num_preemptions > 0
    assert core.page_pool.num_held == 0


class _Order:
    """Of a core's launches and the reads that wait for a device."""

    def __init__(self, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        forward, read = core.runner.forward, Arriving.read

        def launched(decode: list[DecodeRow], chunks: list[PromptChunk], **options: Any) -> Tensor:
            self.events.append("launch")
            return forward(decode, chunks, **options)

        def awaited(arriving: Arriving) -> list[Tensor]:
            self.events.append("read")
            return read(arriving)

        monkeypatch.setattr(core.runner, "forward", launched)
        monkeypatch.setattr(Arriving, "read", awaited)


def test_the_device_has_its_next_step_before_the_host_waits_for_tokens(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(runs_ahead=True)
    order = _Order(core, monkeypatch)
    run(core, [ask("r", max_tokens=4, ignore_eos=True)])
    assert order.events == ["launch", *["launch", "read"] * 3, "read"]


def test_otherwise_each_token_is_read_before_the_next_step(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    order = _Order(core, monkeypatch)
    run(core, [ask("r", max_tokens=4, ignore_eos=True)])
    assert order.events == ["launch", "read"] * 4


def test_what_a_token_is_fed_as_is_known_to_the_device_alone(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, fed = make_core(runs_ahead=True), []
    forward = core.runner.forward

    def watched(decode: list[DecodeRow], chunks: list[PromptChunk], **options: Any) -> Tensor:
        fed.append([(row.drawn, row.token_id) for row in decode])
        return forward(decode, chunks, **options)

    monkeypatch.setattr(core.runner, "forward", watched)
    run(core, [ask("a", max_tokens=3, ignore_eos=True), ask("b", max_tokens=3, ignore_eos=True)])
    assert fed == [[], [(0, 0), (1, 0)], [(0, 0), (1, 0)]]


def test_a_row_that_is_not_finite_ends_alone(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, asked = make_core(runs_ahead=True), [ask(f"r{i}", seed=i, max_tokens=8) for i in range(4)]
    expected = told(run(core, asked))
    break_a_row(core, monkeypatch)
    got = told(run(core, asked))
    failed = [key for key in got if got[key] != expected[key]]
    assert [got[key][2] for key in failed] == [[FinishReason.ERROR]]
    assert core.page_pool.num_held == 0


def test_a_launch_that_fails_ends_all_with_an_error_and_the_engine_goes_on(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, asked = make_core(runs_ahead=True), [ask("a"), ask("b", num_choices=2)]
    expected = told(run(core, asked))
    with monkeypatch.context() as broken:
        broken.setattr(core.runner, "forward", _failing_at(3, core.runner.forward))
        assert all(r.finish_reasons == [FinishReason.ERROR] for r in run(core, asked).values())
    assert core.page_pool.num_held == 0
    assert told(run(core, asked)) == expected


def _failing_at(launch: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    count = iter(range(1000))

    def failing(*args: Any, **options: Any) -> Tensor:
        if next(count) == launch:
            raise RuntimeError("the device has failed")
        return forward(*args, **options)

    return failing


def test_whoever_is_cancelled_while_a_step_is_on_its_way_is_told_nothing_more_and_nobody_feels_it(
    make_core: Callable[..., EngineCore],
) -> None:
    core, others = make_core(runs_ahead=True), [ask("a", control(GOOD)), ask("b", seed=9)]
    expected = told(run(make_core(), others))
    chunks: list[Any] = []
    given_up = core.sequences(ask("c", max_tokens=40, ignore_eos=True), chunks.append)
    core.add(given_up)
    left = iter(range(100))

    def cancel(_: EngineCore) -> None:
        if next(left) == 5:
            assert core._ahead is not None
            core.abort(given_up)

    assert told(run(core, others, after_step=cancel)) == expected
    assert [chunk.finish_reason for chunk in chunks][-2:] == [None, FinishReason.ABORT]
    assert (core.page_pool.num_held, core.has_work) == (0, False)


def test_a_choice_whose_sibling_ends_with_the_prompt_that_it_was_to_share_reads_it_itself(
    make_core: Callable[..., EngineCore],
) -> None:
    """The second choice comes in for the third one, whose row is free, in the step that the first one ends before."""
    core = make_core(runs_ahead=True, max_batch_size=2)
    asked = [ask("long", max_tokens=20, ignore_eos=True, seed=1), ask("r", num_choices=4, logit_bias={EOS: 3.5})]
    assert told(run(core, asked)) == told(run(make_core(), asked))


def test_rows_that_are_not_the_devices_own_are_fed_as_ever(make_core: Callable[..., EngineCore]) -> None:
    """Tokens that are drawn stand at their place, whichever rows of a step they are for."""
    core = make_core()
    pages = core.page_pool.take(2) or []
    rows = [DecodeRow([page], 0, 11 + i) for i, page in enumerate(pages)]
    with torch.inference_mode():
        expected = core.runner.forward(rows, [])
        drawn = [replace(rows[0], token_id=0, drawn=2), rows[1]]
        got = core.runner.forward(drawn, [], drawn_B=torch.tensor([-1, 5, 11]))
    assert torch.equal(got, expected)
