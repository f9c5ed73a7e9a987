"""Bias and penalties: their formulas, and that they touch nothing but the row that asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.embedded.core import EngineCore
from server.engines.embedded.logits import LogitRules, adjusted
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import EOS, control, run

VOCAB = 12
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=20)
PENALTIES = st.floats(-2, 2)


def rules(prompt: list[int], **options: Any) -> LogitRules | None:
    return LogitRules.of(SamplingParams(**options), prompt)


def expected(logits: list[float], prompt: list[int], output: list[int], sampling: SamplingParams) -> list[float]:
    """vLLM's order, token by token: bias, repetition, frequency, presence."""
    counts, out = Counter(output), []
    for token, given_logit in enumerate(logits):
        logit = given_logit + sampling.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        logit -= sampling.frequency_penalty * counts[token]
        out.append(logit - sampling.presence_penalty * (counts[token] > 0))
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB),
    TOKENS.filter(bool),
    TOKENS,
    st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
    PENALTIES,
    PENALTIES,
    st.floats(0.1, 10),
)
def test_the_formulas_are_vllms(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    bias: dict[int, float],
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    sampling = SamplingParams(
        logit_bias=bias, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    rule, logits_V = LogitRules.of(sampling, prompt), torch.tensor(logits)
    got = logits_V if rule is None else rule.apply(logits_V, output)
    assert got.tolist() == pytest.approx(expected(logits, prompt, output, sampling), rel=1e-4, abs=1e-3)


def test_a_request_that_asks_for_nothing_has_no_rules_and_a_batch_of_such_rows_is_not_even_copied() -> None:
    logits_BV = torch.randn(3, VOCAB)
    assert rules([1, 2]) is None
    assert adjusted(logits_BV, [None] * 3, [[1], [2], [3]]) is logits_BV


def test_rows_without_rules_keep_their_logits_to_the_bit_and_the_given_ones_are_never_changed() -> None:
    logits_BV = torch.randn(3, VOCAB)
    before_BV = logits_BV.clone()
    out_BV = adjusted(logits_BV, [None, rules([1], presence_penalty=1.0, logit_bias={3: 5.0}), None], [[1], [2], [3]])
    assert torch.equal(logits_BV, before_BV)
    assert torch.equal(out_BV[[0, 2]], before_BV[[0, 2]])
    changed = (out_BV[1] != before_BV[1]).nonzero()[:, 0].tolist()
    assert changed == [2, 3]


def test_each_penalty_reads_what_it_is_defined_over() -> None:
    logits_V = torch.ones(VOCAB)

    def touched(**options: float) -> list[int]:
        rule = rules([1, 2], **options)
        assert rule is not None
        return (rule.apply(logits_V, [2, 3]) != logits_V).nonzero()[:, 0].tolist()

    assert touched(repetition_penalty=1.5) == [1, 2, 3]
    assert touched(presence_penalty=1.5) == touched(frequency_penalty=1.5) == [2, 3]


def ask(
    name: str = "r", *, steer: Any = None, prompt: tuple[int, ...] = (5, 6, 7), **options: Any
) -> GenerationRequest:
    sampling = {"max_tokens": 24, "seed": 1, **options}
    return GenerationRequest(name, prompt, SamplingParams(**sampling), steer)


ASKING = [
    {"presence_penalty": 2.0},
    {"frequency_penalty": -1.5, "temperature": 0.0},
    {"repetition_penalty": 1.8, "top_p": 0.9},
    {"logit_bias": {9: 4.0, 10: -100.0}, "min_p": 0.05},
    {"logit_bias": {65: 3.0}, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 0.7},
]


def test_rows_with_rules_and_rows_without_give_the_same_tokens_alone_and_together(core: EngineCore) -> None:
    steered = control({"good": 1.0}, step_size=2.0)
    mixed = [
        ask(f"r{i}", steer=steered if i % 3 else None, seed=i, **(ASKING[i // 2] if i % 2 else {})) for i in range(10)
    ]
    together = run(core, mixed, steps_between=1)
    for request in mixed:
        alone = run(core, [request])
        key = (request.request_id, 0)
        assert alone[key].token_ids == together[key].token_ids


@pytest.mark.parametrize("options", ASKING)
def test_rules_change_what_is_drawn(core: EngineCore, options: dict[str, Any]) -> None:
    plain = {name: value for name, value in options.items() if name in ("temperature", "top_p", "min_p")}
    assert run(core, [ask(**options)])["r", 0].token_ids != run(core, [ask(**plain)])["r", 0].token_ids


def test_reported_log_probabilities_are_those_before_bias_and_penalties(core: EngineCore) -> None:
    steer = control({"good": 1.0}, step_size=3.0)
    base = run(core, [ask(steer=steer, max_tokens=1, logprobs=20)])["r", 0].chunks[0].logprobs[0]
    pushed = base.top[7]
    forced = run(core, [ask(steer=steer, max_tokens=1, logprobs=20, logit_bias={pushed.token_id: 100.0})])["r", 0]
    (score,) = forced.chunks[0].logprobs
    assert score.token_id == pushed.token_id
    assert score.logprob == pushed.logprob
    assert [t.token_id for t in score.top] == [t.token_id for t in base.top]
    assert [t.logprob for t in score.top] == [t.logprob for t in base.top]


def test_a_strong_frequency_penalty_ends_repetition(make_core: Callable[..., EngineCore]) -> None:
    core = make_core()
    greedy = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    looping = Counter(run(core, [ask(**greedy)])["r", 0].token_ids).most_common(1)[0][1]
    varied = Counter(run(core, [ask(**greedy, frequency_penalty=2.0)])["r", 0].token_ids).most_common(1)[0][1]
    assert varied < looping


def test_end_of_sequence_is_passed_over_when_told_so_and_a_stop_token_ends_the_text_without_its_own(
    core: EngineCore,
) -> None:
    push = {"logit_bias": {EOS: 100.0}, "max_tokens": 5, "temperature": 0.0}
    ended = run(core, [ask(**push)])["r", 0]
    assert (ended.token_ids, ended.finish_reasons) == ([EOS], [FinishReason.STOP])
    passed = run(core, [ask(**push, ignore_eos=True)])["r", 0]
    assert (passed.token_ids, passed.text, passed.finish_reasons) == ([EOS] * 5, "", [FinishReason.LENGTH])
    stopped = run(core, [ask(**push, ignore_eos=True, stop_token_ids=(EOS,))])["r", 0]
    assert (stopped.token_ids, stopped.finish_reasons) == ([EOS], [FinishReason.STOP])
    letters = run(core, [ask(logit_bias={65: 100.0}, stop_token_ids=(65,), max_tokens=5)])["r", 0]
    assert (letters.token_ids, letters.text, letters.finish_reasons) == ([65], "", [FinishReason.STOP])
