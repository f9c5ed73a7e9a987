"""Rows that follow an instruction, on tiny models: what they draw, that nothing else can tell, and what is freed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.control.objectives import Instruction
from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.scheduler import Step
from server.engines.embedded.structure import SchemaCompiler
from server.errors import ContextLengthError, InvalidRequestError
from server.types import FinishReason, GenerationChunk, GenerationRequest, SamplingParams
from tests.conftest import CONFIGS, EOS, VOCAB, Results, byte_tokenizer, control, run, waiting_again
from tests.engines.conftest import prompt_tokens_read
from tests.engines.test_laws import requests, tokens
from tests.engines.test_scheduler import MODELS, small_core

BEHIND = tuple((7 * i) % 250 for i in range(70))
"""What is put before a prompt: more than a page."""
FREE = ControlParams.without_limits(Instruction(type="instruction", text="x"), step_size=1.0, steps=1)
"""Weight 1 and no budget: tokens are drawn as after the instruction."""


def following(weight: float = 1.5, **fields: Any) -> ControlParams:
    beside = {"beside": fields.pop("beside")} if "beside" in fields else {}
    objective = {"type": "instruction", "text": "x", "weight": weight, **beside}
    return ControlParams.model_validate({"objective": objective, **fields})


def ask(
    steer: ControlParams | None, *, name: str = "r", prompt: tuple[int, ...] = (5, 6, 7), n: int = 1, **more: Any
) -> GenerationRequest:
    sampling = SamplingParams(**{"max_tokens": 14, "seed": 3, "temperature": 1.3, **more.pop("sampling", {})})
    is_guided = steer is not None and steer.instruction is not None
    return GenerationRequest(
        name, prompt, sampling, steer, num_choices=n, instructed_token_ids=BEHIND + prompt if is_guided else (), **more
    )


def guided_requests() -> list[GenerationRequest]:
    ways = [
        following(),
        following(-1.0, max_kl=0.05),
        following(1.0, beside={"weights": {"line": 1.0, "deep": 0.5}}, step_size=1.0),
        following(2.0, beside={"type": "target", "values": {"good": 0.2}}, window={"start": 2}),
        following(1.5, gate={"head": "good", "below": 0.0}, max_response_kl=1.0),
    ]
    return [
        ask(way, name=f"g{i}", prompt=tuple(range(3 + 20 * i)), n=1 + i % 2, sampling={"seed": i, "top_p": 0.9})
        for i, way in enumerate(ways)
    ]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_with_weight_one_and_no_budget_tokens_are_drawn_as_after_the_instruction_itself(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    core = make_core(architecture)
    for sampling in ({"temperature": 0.0}, {"top_k": 9, "max_tokens": 40}):
        guided = ask(FREE, sampling=sampling)
        instructed = ask(None, prompt=BEHIND + guided.prompt_token_ids, sampling=sampling)
        assert tokens(run(core, [guided])) == tokens(run(core, [instructed]))


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_alone_equals_in_any_batch_and_neighbours_feel_nothing(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    core, others, guided = make_core(model[0], dtype=model[1]), requests(8), guided_requests()
    mixed = [request for pair in zip(others, guided, strict=False) for request in pair] + others[len(guided) :]
    together = tokens(run(core, mixed))
    assert tokens(run(core, mixed[::-1], steps_between=2)) == together
    plain = tokens(run(core, others))
    assert plain == {key: together[key] for key in plain}
    for request in guided:
        alone = tokens(run(core, [request]))
        assert alone == {key: together[key] for key in alone}


@pytest.mark.parametrize("null", [following(0.0), following(steps=0), following(step_size=0.0)])
def test_nothing_to_follow_gives_the_base_models_tokens_in_one_row(core: EngineCore, null: ControlParams) -> None:
    base, same = ask(None, sampling={"max_tokens": 40}), ask(null, sampling={"max_tokens": 40})
    assert tokens(run(core, [same])) == tokens(run(core, [base]))
    assert same.num_rows == 1


def test_beside_heads_an_instruction_of_weight_zero_changes_nothing(core: EngineCore) -> None:
    heads = {"weights": {"line": 1.0, "good": -0.5}}
    both = following(0.0, beside=heads, step_size=1.0)
    assert tokens(run(core, [ask(both)])) == tokens(run(core, [ask(control(heads["weights"], step_size=1.0))]))


def logits_of(core: EngineCore, request: GenerationRequest, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] of the base model and of the instructed one, each text read in one piece."""
    states = [core.states([*ids, *token_ids[:-1]])[-len(token_ids) :]
              for ids in (request.prompt_token_ids, request.instructed_token_ids)]  # fmt: skip
    base_TV, instructed_TV = (core.lm_head.logits(states_TD).double().log_softmax(-1) for states_TD in states)
    return base_TV, instructed_TV


def test_log_probabilities_are_those_of_the_largest_share_of_the_difference_that_the_budget_allows(
    core: EngineCore,
) -> None:
    request = ask(following(2.0, max_kl=0.1), sampling={"logprobs": 20})
    result = run(core, [request])["r", 0]
    base_TV, instructed_TV = logits_of(core, request, result.token_ids)
    for chunk, base_V, instructed_V in zip(result.chunks, base_TV, instructed_TV, strict=True):
        assert chunk.edit is not None
        assert chunk.edit.kl <= 0.1
        shares = torch.linspace(0, 2, 4001)[:, None]
        moved = (base_V + shares * (instructed_V - base_V)).log_softmax(-1)
        kl = (moved.exp() * (moved - base_V)).sum(-1)
        assert chunk.edit.kl >= min(0.96 * 0.1, 0.99 * float(kl[-1]))
        at = int((kl - chunk.edit.kl).abs().argmin())
        shown = {top.token_id: top.logprob for top in chunk.logprobs[0].top}
        assert shown == pytest.approx({token: float(moved[at, token]) for token in shown}, abs=5e-3)


def test_the_budget_holds_together_with_heads_and_a_summary_tells_of_both(core: EngineCore) -> None:
    steer = following(3.0, beside={"weights": {"good": 2.0}}, step_size=2.0, max_kl=0.2)
    result = run(core, [ask(steer)])["r", 0]
    summary = result.chunks[-1].control
    assert all(chunk.edit is not None and 0 < chunk.edit.kl <= 0.2 for chunk in result.chunks)
    assert summary is not None
    assert summary.value_after["good"] > summary.value_before["good"]
    assert (summary.controlled_share, summary.held_share["max_kl"] > 0.5) == (1.0, True)


def test_a_response_has_a_summary_without_values_where_no_head_is_named(core: EngineCore) -> None:
    summary = run(core, [ask(following(max_response_kl=0.5))])["r", 0].chunks[-1].control
    assert summary is not None
    assert (summary.value_before, summary.mean_shift, summary.nonfinite_edits) == ({}, 0.0, 0)
    assert 0 < summary.mean_kl * 14 <= 0.5
    assert summary.held_share["max_response_kl"] > 0


@pytest.mark.parametrize(
    "held",
    [
        {"window": {"start": 99}},
        {"gate": {"head": "good", "below": -1e6}},
        {"schedule": {"type": "linear", "tokens": 1, "to": 0.0}, "window": {"start": 1}},
    ],
)
def test_conditions_hold_an_instruction_back(core: EngineCore, held: dict[str, Any]) -> None:
    result = run(core, [ask(following(**held))])["r", 0]
    assert result.token_ids == run(core, [ask(None)])["r", 0].token_ids
    assert all(chunk.edit is not None and chunk.edit.kl == 0 for chunk in result.chunks)


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_running_out_of_pages_changes_nobodys_tokens(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    architecture, dtype = model
    longer = {"max_tokens": 70, "ignore_eos": True}
    long = [replace(g, sampling=g.sampling.model_copy(update=longer)) for g in guided_requests()]
    tight = small_core(make_core, 9, architecture=architecture, dtype=dtype)
    preempted: set[str] = set()

    def watch(core: EngineCore) -> None:
        preempted.update(s.request.request_id for s in waiting_again(core))

    expected, got = run(make_core(architecture, dtype=dtype), long), run(tight, long, after_step=watch)
    assert preempted
    assert tokens(got) == tokens(expected)
    assert all(len(result.finish_reasons) == 1 for result in got.values())
    assert (tight.page_pool.num_held, tight.status().num_running) == (0, 0)


def test_a_choice_whose_shadow_finds_no_page_computes_nothing_in_pages_that_it_gave_up(
    make_core: Callable[..., EngineCore],
) -> None:
    tight = small_core(make_core, 7)
    schedule, given_up = tight._scheduler.schedule, 0

    def checked(now_s: float) -> Step:
        nonlocal given_up
        step = schedule(now_s)
        given_up += tight.status().num_preemptions > 0
        assert all(row.pages is sequence.pages for sequence, rows in step.decoding for row in rows)
        return step

    tight._scheduler.schedule = checked  # type: ignore[method-assign]
    first = ask(None, name="p", prompt=(1,) * 60, sampling={"max_tokens": 68, "ignore_eos": True})
    # The shadow lacks a page when the choice has just got its row; what it gives up is enough to come in anew at once.
    guided = ask(following(), prompt=(5,) * 60, sampling={"max_tokens": 100, "ignore_eos": True})
    got = run(tight, [first, guided])
    assert given_up
    assert tokens(got) == tokens(run(make_core(), [first, guided]))


def test_choices_share_both_prompts_and_requests_the_instruction(core: EngineCore) -> None:
    read = prompt_tokens_read(core)
    many = run(core, [ask(following(), n=3)])
    assert sum(read) == 3 + 73
    assert many["r", 0].token_ids == run(core, [ask(following())])["r", 0].token_ids
    assert len({tuple(result.token_ids) for result in many.values()}) == 3
    read.clear()
    run(core, [ask(following(), prompt=(9, 9))])
    assert sum(read) == 2 + 72 - 64


def test_each_choice_takes_two_rows_and_all_finish(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_batch_size=3)
    running: list[int] = []
    got = run(core, [ask(following(), n=3), ask(None, name="p")],
              after_step=lambda core: running.append(core.status().num_running))  # fmt: skip
    assert max(running) == 3
    assert tokens(got) == tokens(run(make_core(), [ask(following(), n=3), ask(None, name="p")]))


@pytest.mark.parametrize("num_steps", [0, 1, 2, 6])
def test_an_abort_frees_both_rows_wherever_they_are(make_core: Callable[..., EngineCore], num_steps: int) -> None:
    core, neighbour = make_core(), ask(None, name="p")
    expected = tokens(run(core, [neighbour]))
    told: list[GenerationChunk] = []
    sequences = core.sequences(ask(following()), told.append)
    core.add(sequences)
    for _ in range(num_steps):
        core.step()
    core.abort(sequences)
    assert [chunk.finish_reason for chunk in told if chunk.finish_reason] == [FinishReason.ABORT]
    assert (core.page_pool.num_held, core.status().num_running, core.has_work) == (0, 0, False)
    assert tokens(run(core, [neighbour])) == expected


def test_a_stop_string_ends_both_rows_and_the_prompt_is_scored_as_without_an_instruction(core: EngineCore) -> None:
    scored = {"prompt_logprobs": True, "logprobs": 2}
    plain, guided = (run(core, [ask(way, sampling=scored)])["r", 0] for way in (None, following()))
    assert guided.chunks[0].prompt_logprobs == plain.chunks[0].prompt_logprobs
    stopped = run(core, [ask(following(), sampling={"stop": (guided.text[4:6],)})])["r", 0]
    assert stopped.finish_reasons == [FinishReason.STOP]
    assert stopped.text == guided.text[: guided.text.index(guided.text[4:6])]
    assert core.page_pool.num_held == 0


def test_where_no_token_is_asked_for_the_instruction_is_not_read(core: EngineCore) -> None:
    read = prompt_tokens_read(core)
    result = run(core, [ask(following(), sampling={"max_tokens": 0, "prompt_logprobs": True, "logprobs": 0})])
    assert result["r", 0].finish_reasons == [FinishReason.LENGTH]
    assert sum(read) == 3


def test_a_text_under_an_instruction_holds_its_schema(core: EngineCore) -> None:
    compiler = SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids={EOS})
    structure = compiler.compile_choices(["yes", "no", "maybe"])
    for seed in range(5):
        asked = ask(following(), structure=structure, sampling={"seed": seed})
        assert run(core, [asked])["r", 0].text in ("yes", "no", "maybe")


def test_an_instruction_whose_state_is_not_finite_leaves_the_base_models_tokens_and_is_counted(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(run(core, [ask(None)]))
    forward = core.runner.forward

    def broken(decode: list[Any], segments: list[Any], **options: Any) -> torch.Tensor:
        hidden = forward(decode, segments, **options).clone()
        if not segments and len(decode) == 2:
            hidden[1] = float("nan")
        return hidden

    monkeypatch.setattr(core.runner, "forward", broken)
    result: Results = run(core, [ask(following(weight=1.0, window={"start": 1}))])
    summary = result["r", 0].chunks[-1].control
    assert tokens(result) == expected
    assert summary is not None
    assert summary.nonfinite_edits == 13


def test_a_failed_step_ends_the_choice_once(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "forward", lambda *_, **__: 1 / 0)
        failed = run(core, [ask(following())])["r", 0]
    assert failed.finish_reasons == [FinishReason.ERROR]
    assert (core.page_pool.num_held, core.status().num_running) == (0, 0)


BLOCKS = {"type": "blocks", "candidates": 2, "block_tokens": 4}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (ask(following(search=BLOCKS)), "control.search"),
        (ask(following(0.0, search=BLOCKS)), "control.search"),
        (ask(following(), best_of=2), "best_of"),
    ],
    ids=["search", "search without weight", "best_of"],
)
def test_texts_are_not_compared_by_an_instruction(core: EngineCore, asked: GenerationRequest, param: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{param}: not allowed with") as caught:
        core.check(asked)
    assert caught.value.param == param


def test_what_can_never_fit_is_refused_by_name(make_core: Callable[..., EngineCore]) -> None:
    with pytest.raises(InvalidRequestError, match=r"^control\.objective: .* two rows at once; this server runs 1"):
        make_core(max_batch_size=1).check(ask(following()))
    with pytest.raises(InvalidRequestError, match=r"^control\.objective: .* may take 7 pages .* this server has 5"):
        small_core(make_core, 5).check(ask(following(), sampling={"max_tokens": 150}))
    with pytest.raises(ContextLengthError, match=r"^control\.objective\.text: .* 73 tokens \(without it 3\)"):
        make_core().check(ask(following(), sampling={"max_tokens": 200}))
