"""The divergence of responses, on tiny models: exact, and for control behind an instruction as for control alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.control.objectives import Instruction
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.divergence import divergences, kl
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from server.engines.embedded.sequence import Sequence
from server.types import GenerationRequest, SamplingParams
from tests.conftest import CONFIGS
from tests.engines.test_guidance import ask, guided_requests
from value_models.generations import EvalSample
from value_models.heads import ValueHead
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings

FIRST, SECOND = "Be kind.", "Be brief."
PROMPT = RolloutPrompt(id="p", format="text", prompt="abab")
ONE_TOKEN = RolloutSettings(max_tokens=1, top_p=0.9, num_samples=3)


def finished(core: EngineCore, requests: list[GenerationRequest]) -> list[Sequence]:
    """Choices that kept their states, drawn all at once."""
    sequences = [
        sequence for request in requests for sequence in core.sequences(request, lambda _: None, keep_states=True)
    ]
    core.add(sequences)
    while core.has_work:
        core.step()
    return sequences


def controls() -> list[ControlParams]:
    weights = {"objective": {"weights": {"line": 1.0, "good": -0.5}}, "step_size": 1.0}
    target = {"objective": {"type": "target", "values": {"deep": 0.4}}, "step_size": 1.0, "max_kl": 0.2}
    ways: list[dict[str, Any]] = [
        weights,
        target,
        {**weights, "max_response_kl": 0.3},
        {**weights, "window": {"start": 2, "end": 6}, "schedule": {"type": "exponential", "half_life": 3}},
        {**weights, "gate": {"head": "good", "below": 0.1}},
    ]
    return [ControlParams.model_validate(way) for way in ways]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_edits_made_again_have_the_divergence_that_was_told_of_them(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    core = make_core(architecture)
    ways = [ask(way, name=f"r{i}", sampling={"top_p": 0.8}) for i, way in enumerate(controls())]
    for sequence in finished(core, [*ways, *guided_requests()]):
        assert sequence.totals is not None
        told = sequence.totals.summary()
        kl_T = divergences(core, sequence, torch.stack(sequence.states or []))
        assert len(kl_T) == len(sequence.token_ids)
        assert float(kl_T.mean()) == pytest.approx(told.mean_kl, abs=3e-5)
        assert float(kl_T.max()) == pytest.approx(told.max_kl, abs=3e-5)


@pytest.fixture
def source(load_tiny: Callable[..., LoadedModel], heads: dict[str, ValueHead]) -> EngineRolloutSource:
    loaded = load_tiny()
    return EngineRolloutSource(loaded, EngineCore(loaded, HeadRegistry(heads), max_batch_size=8))


@pytest.fixture
def logits(load_tiny: Callable[..., LoadedModel]) -> Callable[..., torch.Tensor]:
    """Of the first token [1, V] behind instructions and the prompt, by transformers alone."""
    loaded = load_tiny()
    tokenizer: Any = loaded.tokenizer

    def read(*instructions: str) -> torch.Tensor:
        ids = tokenizer("\n\n".join([*instructions, PROMPT.text]))["input_ids"]
        return loaded.model(torch.tensor([ids])).logits[:, -1].detach().float()

    return read


def of_one_token(source: EngineRolloutSource, control: ControlParams | None, instruction: str) -> list[EvalSample]:
    return list(source.evaluate([PROMPT], ONE_TOKEN, control=control, instruction=instruction))


def test_an_instructions_divergence_is_exact_and_the_same_whichever_token_was_drawn(
    source: EngineRolloutSource, logits: Callable[..., torch.Tensor]
) -> None:
    expected = float(kl(logits(FIRST), logits()))
    assert expected > 1e-3
    for sample in of_one_token(source, None, FIRST):
        assert (sample.mean_kl, sample.max_kl) == pytest.approx((expected, expected), rel=1e-2)


def test_control_behind_an_instruction_diverges_from_the_model_without_either(
    source: EngineRolloutSource, logits: Callable[..., torch.Tensor]
) -> None:
    follow = ControlParams.without_limits(Instruction(type="instruction", text=SECOND), step_size=1.0, steps=1)
    expected = float(kl(logits(SECOND, FIRST), logits()))
    for sample in of_one_token(source, follow, FIRST):
        assert sample.mean_kl == pytest.approx(expected, rel=1e-2)
    still = ControlParams.for_head("line", step_size=0.0)
    alone, unmoved = (of_one_token(source, control, FIRST) for control in (None, still))
    assert [s.mean_kl for s in alone] == pytest.approx([s.mean_kl for s in unmoved], abs=1e-6)


def test_a_divergence_is_that_of_whole_distributions_and_zero_of_equal_ones() -> None:
    half, skewed = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    assert kl(skewed, half).tolist() == pytest.approx([0.75 * 0.405465 - 0.25 * 0.693147], abs=1e-6)
    assert kl(half, half).tolist() == [0.0]
    assert kl(torch.tensor([[0.0, -torch.inf]]), half).tolist() == pytest.approx([0.693147], abs=1e-6)


def test_a_long_request_keeps_nothing_of_what_acted_without_its_states(core: EngineCore) -> None:
    request = GenerationRequest("r", (5, 6), SamplingParams(max_tokens=5), controls()[0])
    (sequence,) = core.sequences(request, lambda _: None)
    core.add([sequence])
    while core.has_work:
        core.step()
    assert sequence.acted == []
