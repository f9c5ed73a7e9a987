"""The laws of design.md that speak of whole requests, on tiny random models of four architectures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engines.base import EngineStatus, NullObserver
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model import attention
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.spans import ALL_BEFORE, AttentionKind
from server.engines.embedded.sequence import Sequence
from server.kernels import native
from server.kernels.linear import Bits
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import CONFIGS, HIDDEN, Results, control, random_head, run

CONTROLS = [
    None,
    control({"good": 1.0}, step_size=2.0),
    control({"line": -1.0, "good": 0.5}, max_kl=0.1),
    control({"deep": 1.0}, steps=3),
    control({"good": 2.0}, steps=0),
]


def requests(count: int = 12, seed: int = 0) -> list[GenerationRequest]:
    """A mix of lengths, temperatures, filters, choices and controls."""
    rng = random.Random(seed)
    return [
        GenerationRequest(
            request_id=f"r{i}",
            prompt_token_ids=tuple(rng.randrange(256) for _ in range(rng.choice([1, 5, 16, 17, 40]))),
            sampling=SamplingParams(
                max_tokens=rng.choice([1, 7, 20]),
                temperature=rng.choice([0.0, 0.7, 1.3]),
                top_p=rng.choice([1.0, 0.8]),
                top_k=rng.choice([0, 20]),
                seed=i,
            ),
            control=CONTROLS[i % len(CONTROLS)],
            num_choices=rng.choice([1, 1, 3]),
        )
        for i in range(count)
    ]


def tokens(results: Results) -> dict[tuple[str, int], list[int]]:
    return {key: result.token_ids for key, result in results.items()}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_and_uncontrolled_gives_the_tokens_of_transformers_generate(
    load_tiny: Callable[..., LoadedModel], make_core: Callable[..., EngineCore], architecture: str
) -> None:
    plain = load_tiny(architecture).model
    core = make_core(architecture)
    for length in (1, 6, 37):
        prompt = [(7 * i + length) % 250 for i in range(length)]
        expected = plain.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=30,
            do_sample=False, pad_token_id=0,
        )[0, length:].tolist()  # fmt: skip
        request = GenerationRequest("r", tuple(prompt), SamplingParams(max_tokens=30, temperature=0.0))
        assert run(core, [request])["r", 0].token_ids == expected


@pytest.mark.parametrize("architecture", CONFIGS)
def test_alone_equals_in_any_batch_in_any_order_at_any_time(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    core, mixed = make_core(architecture), requests()
    together = tokens(run(core, mixed))
    assert tokens(run(core, mixed[::-1])) == together
    assert tokens(run(core, mixed, steps_between=2)) == together
    for request in mixed:
        alone = tokens(run(core, [request]))
        assert alone == {key: together[key] for key in alone}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "wide_llama", "wide_qwen2"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_alone_equals_in_a_batch_in_bfloat16_and_in_fewer_bits_too(
    make_core: Callable[..., EngineCore], architecture: str, bits: Bits
) -> None:
    if bits != 16 and native() is None:
        pytest.skip("no native kernels on this machine")
    core, mixed = make_core(architecture, dtype="bfloat16", bits=bits), requests(seed=1)
    together = tokens(run(core, mixed, steps_between=1))
    for request in mixed:
        alone = tokens(run(core, [request]))
        assert alone == {key: together[key] for key in alone}


@pytest.mark.parametrize("null", [control({"good": 1.0}, steps=0), control({"good": 0.0})])
def test_null_control_gives_the_base_models_tokens(core: EngineCore, null: object) -> None:
    sampling = SamplingParams(max_tokens=40, seed=3)
    base = run(core, [GenerationRequest("r", (1, 2, 3), sampling)])
    same = run(core, [GenerationRequest("r", (1, 2, 3), sampling, control=null)])  # type: ignore[arg-type]
    assert tokens(base) == tokens(same)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_control_moves_tokens_within_its_budget_on_every_architecture(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    core = make_core(architecture)
    steer = control({"good": 1.0}, step_size=5.0, steps=20, max_kl=0.2, max_shift=2.0)
    result = run(core, [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=20, seed=3), control=steer)])
    edits = [chunk.edit for chunk in result["r", 0].chunks]
    assert all(edit is not None and 0 < edit.kl <= 0.2 for edit in edits)
    summary = result["r", 0].chunks[-1].control
    assert summary is not None
    assert summary.value_after["good"] > summary.value_before["good"]
    assert summary.controlled_share == 1.0


def test_choices_of_one_request_differ_and_choice_zero_equals_a_single_one(core: EngineCore) -> None:
    sampling = SamplingParams(max_tokens=20, seed=11)
    many = run(core, [GenerationRequest("r", (5, 6, 7), sampling, num_choices=6)])
    one = run(core, [GenerationRequest("r", (5, 6, 7), sampling)])
    assert many["r", 0].token_ids == one["r", 0].token_ids
    assert len({tuple(result.token_ids) for result in many.values()}) == 6


def test_more_choices_than_slots_all_finish(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_batch_size=2)
    results = run(core, [GenerationRequest("r", (5,) * 40, SamplingParams(max_tokens=9, seed=1), num_choices=5)])
    wide = run(
        make_core(max_batch_size=8),
        [GenerationRequest("r", (5,) * 40, SamplingParams(max_tokens=9, seed=1), num_choices=5)],
    )
    assert tokens(results) == tokens(wide)


def test_every_choice_ends_with_exactly_one_finish_reason_and_frees_its_slot(core: EngineCore) -> None:
    results = run(core, requests(20), steps_between=1)
    assert all(len(result.finish_reasons) == 1 for result in results.values())
    assert all(result.chunks[-1].finish_reason is not None for result in results.values())
    assert core.status().num_running == 0
    assert core.status().kv_cache_usage == 0


def test_the_observer_hears_of_every_token_and_that_nothing_runs_at_the_end(
    make_core: Callable[..., EngineCore],
) -> None:
    class Recorder(NullObserver):
        num_tokens, last = 0, None

        def on_token(self, **_: object) -> None:
            self.num_tokens += 1

        def on_step(self, status: EngineStatus) -> None:
            self.last = status

    recorder = Recorder()
    core = make_core(observer=recorder)
    results = run(core, requests(6))
    assert recorder.num_tokens == sum(len(result.token_ids) for result in results.values())
    assert recorder.last is not None
    assert (recorder.last.num_running, recorder.last.num_waiting) == (0, 0)
    sequences = core.sequences(GenerationRequest("r", (1,), SamplingParams(max_tokens=99)), lambda _: None)
    core.add(sequences)
    core.step()
    core.abort(sequences)
    assert recorder.last.num_running == 0


def test_an_abort_ends_a_request_wherever_it_is_and_spares_the_others(core: EngineCore) -> None:
    mixed = requests(12)
    expected = tokens(run(core, mixed))
    reasons: dict[str, list[FinishReason]] = {}
    received: dict[tuple[str, int], list[int]] = {}
    admitted: dict[str, list[Sequence]] = {}
    for request in mixed:

        def emit(chunk: object, request_id: str = request.request_id) -> None:
            received.setdefault((request_id, chunk.index), []).extend(chunk.token_ids)  # type: ignore[attr-defined]
            if chunk.finish_reason is not None:  # type: ignore[attr-defined]
                reasons.setdefault(request_id, []).append(chunk.finish_reason)  # type: ignore[attr-defined]

        admitted[request.request_id] = core.sequences(request, emit)
        core.add(admitted[request.request_id])
    for victim in ("r1", "r8", "r11"):
        core.step()
        core.abort(admitted[victim])
    while core.has_work:
        core.step()
    survivors = {key: value for key, value in received.items() if FinishReason.ABORT not in reasons[key[0]]}
    assert len(survivors) >= 9
    assert survivors == {key: expected[key] for key in survivors}
    assert all(len(reasons[request.request_id]) == request.num_choices for request in mixed)


def test_a_failed_step_ends_its_sequences_with_an_error_and_the_loop_goes_on(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest("r", (1, 2), SamplingParams(max_tokens=5, seed=0))
    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "forward", lambda *_, **__: 1 / 0)
        failed = run(core, [request])["r", 0]
    assert failed.finish_reasons == [FinishReason.ERROR]
    assert "division" not in str(failed.chunks[-1].error)
    assert run(core, [request])["r", 0].finish_reasons == [FinishReason.LENGTH]


def test_prompt_log_probabilities_are_the_models_own_whatever_the_chunks_and_the_control(
    load_tiny: Callable[..., LoadedModel], make_core: Callable[..., EngineCore]
) -> None:
    prompt = [(11 * i) % 250 for i in range(40)]
    logits = load_tiny().model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(prompt[1:])]
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=True, logprobs=2)
    request = GenerationRequest("r", tuple(prompt), sampling, control=control({"good": 1.0}))
    (chunk,) = run(make_core(), [request])["r", 0].chunks
    assert chunk.prompt_logprobs is not None
    assert chunk.prompt_logprobs[0] is None
    got = [score.logprob for score in chunk.prompt_logprobs if score is not None]
    assert got == pytest.approx(expected, abs=1e-3)
    assert chunk.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_closed_form_gradient_of_a_tokens_log_probability_equals_autograd(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    core = make_core(architecture)
    states, chosen = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)), [3, 0, 255, 17, 17]
    weight = core.lm_head.project(torch.eye(HIDDEN))
    leaf = states.clone().requires_grad_()
    log_probs = core.lm_head.finish(leaf @ weight).log_softmax(-1)
    log_probs[torch.arange(5), chosen].sum().backward()
    grads = core.lm_head.logp_grads(states, torch.tensor(chosen))
    torch.testing.assert_close(grads, leaf.grad, rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_those_after_control(core: EngineCore) -> None:
    steer = control({"good": 1.0}, step_size=5.0, max_kl=0.5, max_shift=2.0)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    base = run(core, [GenerationRequest("r", (9,), sampling)])["r", 0].chunks[0].logprobs[0]
    moved = run(core, [GenerationRequest("r", (9,), sampling, control=steer)])["r", 0].chunks[0].logprobs[0]
    assert base.logprob == base.top[0].logprob
    assert {t.token_id: t.logprob for t in base.top} != {t.token_id: t.logprob for t in moved.top}


def test_a_row_in_float32_does_not_feel_how_far_its_longest_neighbour_attends() -> None:
    rng = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 8, 1024, 64, generator=rng) for _ in range(2))
    query, how = torch.randn(2, 8, 4, 64, generator=rng), AttentionKind(0.125)
    last = torch.tensor([[299], [40]])
    results = [
        attention._attend(
            query,
            keys[:, :, :length],
            values[:, :, :length],
            ALL_BEFORE.visible(torch.arange(length), last)[:, None, None],
            how,
        )
        for length in (320, 384, 448, 512, 640, 1024)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def break_a_row(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the second row of the third step from now is not a number."""
    forward = core.runner.forward
    steps = iter(range(100))

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        hidden = forward(*args, **options)
        if next(steps) == 2:
            hidden = hidden.clone()
            hidden[1] = float("nan")
        return hidden

    monkeypatch.setattr(core.runner, "forward", broken)


def test_a_row_whose_logits_are_not_finite_ends_alone(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [GenerationRequest(f"r{i}", (5, i), SamplingParams(max_tokens=6, top_p=0.8, seed=i)) for i in range(4)]
    expected = tokens(run(core, mixed))
    break_a_row(core, monkeypatch)
    results = run(core, mixed)
    failed = [key for key, result in results.items() if result.finish_reasons == [FinishReason.ERROR]]
    assert len(failed) == 1
    assert {k: r.token_ids for k, r in results.items() if k not in failed} == {
        k: ids for k, ids in expected.items() if k not in failed
    }


def test_keys_and_values_are_the_same_with_control_and_without(make_core: Callable[..., EngineCore]) -> None:
    """Control edits the state in front of the LM head alone, so greedy tokens forced equal leave equal caches."""
    caches = []
    for steer in (None, control({"good": 1.0}, step_size=1e-4)):
        core = make_core()
        sequences = core.sequences(
            GenerationRequest("r", tuple(range(9)), SamplingParams(max_tokens=50, temperature=0.0), steer),
            lambda _: None,
        )
        core.add(sequences)
        for _ in range(5):
            core.step()
        caches.append((sequences[0].token_ids, [keys.clone() for keys, _ in core.runner.kv._layers.values()]))
    assert caches[0][0] == caches[1][0]
    assert all(torch.equal(a, b) for a, b in zip(caches[0][1], caches[1][1], strict=True))


def test_edits_that_are_not_finite_leave_the_base_models_tokens_and_are_counted(core: EngineCore) -> None:
    broken = random_head(4)
    broken.ascent_UD.fill_(float("nan"))
    core.registry = core.registry.with_head("broken", broken)
    sampling = SamplingParams(max_tokens=8, seed=3)
    base = run(core, [GenerationRequest("r", (1, 2), sampling)])["r", 0]
    controlled = run(core, [GenerationRequest("r", (1, 2), sampling, control({"broken": 1.0}))])["r", 0]
    assert controlled.token_ids == base.token_ids
    summary = controlled.chunks[-1].control
    assert summary is not None
    assert summary.nonfinite_edits == len(controlled.token_ids)
    assert summary.max_kl == 0.0
