"""What scoring promises of a prompt's states, on tiny random models: whose they are, and whom they do not touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.types import FinishReason, GenerationRequest, PromptValues, SamplingParams, ScoringParams
from tests.conftest import Collected, control, random_head, run
from tests.engines.conftest import prompt_tokens_read
from tests.engines.test_scheduler import small_core
from value_models.heads import ValueHead

HEADS = ("good", "deep", "line")
PROMPT = tuple((7 * i + 3) % 250 for i in range(150))


def scored(name: str = "s", prompt: tuple[int, ...] = PROMPT, **options: Any) -> GenerationRequest:
    options = {"heads": HEADS, "per_token": True, "hidden_state": True, **options}
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=0), scoring=ScoringParams(**options))


def values_of(result: Collected) -> PromptValues:
    assert result.finish_reasons == [FinishReason.LENGTH]
    (chunk,) = result.chunks
    assert (chunk.text, chunk.token_ids) == ("", ())
    assert chunk.prompt_values is not None
    return chunk.prompt_values


def told(core: EngineCore, request: GenerationRequest) -> PromptValues:
    return values_of(run(core, [request])[request.request_id, 0])


def state_of(values: PromptValues) -> torch.Tensor:
    assert values.hidden_state is not None
    return torch.from_numpy(np.frombuffer(values.hidden_state, "<f4").copy())


@pytest.mark.parametrize(("architecture", "dtype", "tolerance"), [
    ("llama", "float32", 1e-4), ("gemma2", "float32", 1e-4), ("gpt2", "float32", 1e-4),
    ("wide_llama", "bfloat16", 0.25),
])  # fmt: skip
def test_values_are_those_of_heads_on_the_models_own_last_states(
    load_tiny: Callable[..., LoadedModel],
    make_core: Callable[..., EngineCore],
    heads: dict[str, ValueHead],
    architecture: str,
    dtype: str,
    tolerance: float,
) -> None:
    plain = load_tiny(architecture, dtype).model
    with torch.inference_mode():
        states_TD = plain.get_decoder()(torch.tensor([PROMPT])).last_hidden_state[0].float()
    got = told(make_core(architecture, dtype=dtype), scored())
    assert got.token_values is not None
    for name in HEADS:
        expected_T = heads[name].value(states_TD)
        error_T = (torch.tensor(got.token_values[name]) - expected_T).abs()
        assert error_T.median() < tolerance * expected_T.std()
        assert got.values[name] == got.token_values[name][-1]
    error = (state_of(got) - states_TD[-1]).norm() / states_TD[-1].norm()
    assert error < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_equals_among_neighbours_that_generate(make_core: Callable[..., EngineCore], dtype: str) -> None:
    core = make_core("wide_llama", dtype=dtype)
    readers = [scored(f"s{i}", PROMPT[: 5 + 36 * i], per_token=bool(i % 2)) for i in range(5)]
    writers = [
        GenerationRequest(
            f"g{i}", PROMPT[i : 20 + 9 * i], SamplingParams(max_tokens=12, seed=i),
            control({"good": 1.0}) if i % 2 else None,
        )
        for i in range(5)
    ]  # fmt: skip
    mixed = [request for pair in zip(readers, writers, strict=True) for request in pair]
    together = run(core, mixed, steps_between=1)
    alone = [run(make_core("wide_llama", dtype=dtype), [request]) for request in mixed]
    for i, reader in enumerate(readers):
        assert values_of(together[f"s{i}", 0]) == values_of(alone[2 * i][reader.request_id, 0])
        assert together[f"g{i}", 0].token_ids == alone[2 * i + 1][f"g{i}", 0].token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompts_value_is_the_one_before_control_of_the_first_token_after_it(
    make_core: Callable[..., EngineCore], dtype: str
) -> None:
    core = make_core("wide_llama", dtype=dtype)
    for name in HEADS:
        steer = control({name: 1.0})
        drawn = run(core, [GenerationRequest("g", PROMPT, SamplingParams(max_tokens=1), steer)])["g", 0]
        edit = drawn.chunks[0].edit
        assert edit is not None
        assert told(core, scored(heads=(name,))).values[name] == pytest.approx(edit.value_before[name], rel=1e-5)


def test_a_head_says_the_same_whichever_others_are_asked(core: EngineCore) -> None:
    every = told(core, scored())
    one = told(core, scored(heads=("deep",)))
    assert one.values == {"deep": every.values["deep"]}
    assert (one.token_values or {})["deep"] == (every.token_values or {})["deep"]
    assert told(core, scored(heads=())).values == {}


def test_each_token_is_told_though_the_beginning_is_cached_and_the_last_alone_reuses_it(core: EngineCore) -> None:
    cold = told(core, scored())
    read = prompt_tokens_read(core)
    for per_token, num_cached in ((True, 0), (False, 128)):
        read.clear()
        chunks: list[Any] = []
        sequences = core.sequences(scored(per_token=per_token), chunks.append)
        core.add(sequences)
        while core.has_work:
            core.step()
        assert sum(read) == len(PROMPT) - num_cached
        warm = chunks[0].prompt_values
        assert (warm.values, warm.hidden_state) == (cold.values, cold.hidden_state)
        assert warm.token_values == (cold.token_values if per_token else None)
    assert core.page_pool.num_held == 0


def test_a_scored_prompt_is_a_beginning_that_generation_reuses(core: EngineCore) -> None:
    told(core, scored())
    sequences = core.sequences(GenerationRequest("g", PROMPT, SamplingParams(max_tokens=1)), lambda _: None)
    read = prompt_tokens_read(core)
    core.add(sequences)
    core.step()
    assert sum(read) == len(PROMPT) - 128


def test_a_prompt_that_is_preempted_half_way_tells_each_token_once(make_core: Callable[..., EngineCore]) -> None:
    expected = told(make_core(), scored())
    core, chunks = make_core(), []
    core.add(core.sequences(scored(), chunks.append))
    core.step()
    core._scheduler._preempt(core._scheduler.running[0])
    while core.has_work:
        core.step()
    assert [chunk.prompt_values for chunk in chunks] == [expected]


def test_running_out_of_pages_changes_no_value(make_core: Callable[..., EngineCore]) -> None:
    mixed = [scored(f"s{i}", PROMPT[i:]) for i in range(4)]
    mixed += [GenerationRequest(f"g{i}", PROMPT[:40], SamplingParams(max_tokens=90, seed=i)) for i in range(4)]
    roomy, tight = run(make_core(), mixed), run(small_core(make_core, 5), mixed)
    for i in range(4):
        assert values_of(tight[f"s{i}", 0]) == values_of(roomy[f"s{i}", 0])
        assert tight[f"g{i}", 0].token_ids == roomy[f"g{i}", 0].token_ids


def test_a_head_that_is_not_finite_says_so_and_nobody_else_does(core: EngineCore) -> None:
    broken = random_head(4)
    broken.inputs_UD.fill_(math.nan)
    expected = told(core, scored())
    core.use(core.registry.with_head("broken", broken))
    results = run(core, [scored("bad", heads=("broken", "good")), scored("fine")])
    bad, fine = (values_of(results[name, 0]) for name in ("bad", "fine"))
    assert math.isnan(bad.values["broken"])
    assert all(map(math.isnan, (bad.token_values or {})["broken"]))
    assert bad.values["good"] == expected.values["good"]
    assert fine == expected


@pytest.mark.parametrize("per_token", [False, True])
def test_a_head_that_fails_ends_its_request_alone(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, per_token: bool
) -> None:
    broken = random_head(4)
    neighbour = GenerationRequest("g", PROMPT[:9], SamplingParams(max_tokens=9, seed=1))
    expected_values, expected = told(core, scored("fine")), run(core, [neighbour])["g", 0].token_ids

    def fail(_: object) -> None:
        raise RuntimeError("as told")

    monkeypatch.setattr(broken, "readout", fail)
    core.use(core.registry.with_head("broken", broken))
    results = run(core, [scored("bad", heads=("broken",), per_token=per_token), scored("fine"), neighbour])
    assert results["bad", 0].finish_reasons == [FinishReason.ERROR]
    assert results["bad", 0].chunks[0].prompt_values is None
    assert values_of(results["fine", 0]) == expected_values
    assert results["g", 0].token_ids == expected
    assert core.page_pool.num_held == 0


def test_a_state_that_is_not_finite_is_an_error_of_its_request_alone(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [scored(f"s{i}", PROMPT[i : i + 4]) for i in range(3)]
    expected = [told(core, request) for request in short]
    forward = core.runner.forward

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        hidden_TD = forward(*args, **options).clone()
        hidden_TD[7] = math.nan
        return hidden_TD

    monkeypatch.setattr(core.runner, "forward", broken)
    results = run(core, short)
    assert results["s1", 0].finish_reasons == [FinishReason.ERROR]
    assert [values_of(results[f"s{i}", 0]) for i in (0, 2)] == [expected[0], expected[2]]


def test_a_head_is_in_use_while_a_prompt_is_scored_under_it(core: EngineCore) -> None:
    sequences = core.sequences(scored(heads=("good",)), lambda _: None)
    core.add(sequences)
    assert (core.num_users("good"), core.num_users("deep")) == (1, 0)
    core.abort(sequences)
    assert core.num_users("good") == 0
