"""Distilling made-up instructions, each a known shift of the states, through an output layer of a few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from value_models.distillation import (
    DistilledHead,
    DistilSettings,
    InstructedText,
    InstructedTexts,
    distil_head,
    read_texts,
)
from value_models.errors import InstructionError
from value_models.heads import UNIT_COST_NATS
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings

SIZE, VOCAB = 6, 11
PROMPTS = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}") for i in range(80)]
SETTINGS = DistilSettings(max_prompts=80)
SHIFT = torch.tensor([0.8, -0.4, 0.0, 0.2, 0.0, 0.0])


class SmallOutput:
    """Logits W h + b of random W and b, with a soft cap where one is given."""

    def __init__(self, softcap: float | None = None) -> None:
        self._rows = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(1))
        self._softcap = softcap

    def rows(self) -> Tensor:
        return self._rows

    def project(self, hidden_MD: Tensor) -> Tensor:
        return hidden_MD.float() @ self._rows.T

    def finish(self, projected_MV: Tensor) -> Tensor:
        projected_MV = projected_MV + 0.1
        return projected_MV if self._softcap is None else self._softcap * torch.tanh(projected_MV / self._softcap)

    def slopes(self, logits_MV: Tensor) -> Tensor | None:
        return None if self._softcap is None else 1 - (logits_MV / self._softcap).square()


class ShiftingSource:
    """An instruction moves every state by its shift, and tokens are drawn from what comes of it."""

    base_model = {"name": "m", "hidden_size": SIZE}  # noqa: RUF012

    def __init__(self, shift_D: Tensor = SHIFT, output: SmallOutput | None = None) -> None:
        self._shift_D = shift_D
        self.output = output or SmallOutput()

    def texts(
        self, prompts: Sequence[RolloutPrompt], instruction: str, contrast: str | None, settings: RolloutSettings
    ) -> Iterator[InstructedText]:
        shifts = {None: torch.zeros(SIZE), "good": self._shift_D, "bad": -self._shift_D}
        rng = torch.Generator().manual_seed(settings.seed)
        for side in (instruction, contrast):
            for prompt in prompts:
                bare_TD = 0.5 * torch.randn(settings.max_tokens, SIZE, generator=rng)
                logits_TV = self.output.finish(self.output.project(bare_TD + shifts[side]))
                token_ids_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=rng)[:, 0]
                instructed_TD, contrasted_TD = (bare_TD + shifts[after] for after in (instruction, contrast))
                yield InstructedText(prompt.id, token_ids_T, bare_TD, instructed_TD, contrasted_TD)


def distilled(source: ShiftingSource, contrast: str | None = None, **settings: Any) -> DistilledHead:
    chosen = SETTINGS.model_copy(update=settings)
    return distil_head(read_texts(source, PROMPTS, "good", contrast, chosen), source.output, chosen)


def cosine(a_D: Tensor, b_D: Tensor) -> float:
    return float(torch.cosine_similarity(a_D, b_D, dim=0))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("contrast", [None, "bad"])
def test_a_small_shift_of_the_states_is_found_and_all_of_it_is_closed(
    contrast: str | None, softcap: float | None
) -> None:
    result = distilled(ShiftingSource(0.1 * SHIFT, SmallOutput(softcap)), contrast)
    assert cosine(result.head.folded_ascent()[0], SHIFT) > 0.99
    assert result.distillation["at_equal_kl"]["share_closed"] > 0.9


def test_an_ascent_of_length_one_costs_what_it_does_for_every_head() -> None:
    source = ShiftingSource()
    texts = read_texts(source, PROMPTS, "good", None, SETTINGS)
    shift_D = 0.1 * distil_head(texts, source.output, SETTINGS).head.folded_ascent()[0]
    bare_ND = texts.bare_ND[texts.tokens_of("train")]
    before, after = (
        source.output.finish(source.output.project(s)).log_softmax(-1) for s in (bare_ND, bare_ND + shift_D)
    )
    paid = (after.exp() * (after - before)).sum(-1).mean()
    assert float(paid) == pytest.approx(0.01 * UNIT_COST_NATS, rel=0.05)


def test_the_figures_are_the_divergences_of_the_shifted_model() -> None:
    source = ShiftingSource()
    texts = read_texts(source, PROMPTS, "good", "bad", SETTINGS)
    result = distil_head(texts, source.output, SETTINGS)
    tokens_N = texts.tokens_of("test")
    figures = result.distillation["at_equal_kl"]
    shifted_ND = texts.bare_ND[tokens_N] + figures["length"] * result.head.folded_ascent()[0]
    q, r, p, bare = (
        source.output.finish(source.output.project(states_ND)).log_softmax(-1)
        for states_ND in (
            texts.instructed_ND[tokens_N],
            texts.contrasted_ND[tokens_N],
            shifted_ND,
            texts.bare_ND[tokens_N],
        )
    )
    expected = {"to_instructed": (q, p), "to_contrasted": (r, p), "paid": (p, bare)}
    for name, (a, b) in expected.items():
        assert figures[name] == pytest.approx(float((a.exp() * (a - b)).sum(-1).mean()), abs=2e-4)
    assert figures["leaning"] == pytest.approx(float((p.exp() * (q - r)).sum(-1).mean()), abs=2e-4)
    assert figures["paid"] == pytest.approx(result.distillation["bare"]["to_instructed"], rel=0.02)


def test_an_instruction_that_is_what_the_model_does_anyway_still_differs_from_its_contrast() -> None:
    source = ShiftingSource(0.1 * SHIFT)
    texts = read_texts(source, PROMPTS, "good", "bad", SETTINGS)
    result = distil_head(replace(texts, instructed_ND=texts.bare_ND), source.output, SETTINGS)
    assert cosine(result.head.folded_ascent()[0], SHIFT) > 0.99
    assert result.distillation["at_equal_kl"]["share_closed"] == 0.0


def test_the_value_says_how_much_likelier_the_instruction_makes_the_text() -> None:
    source = ShiftingSource()
    texts = read_texts(source, PROMPTS, "good", None, SETTINGS)
    head = distil_head(texts, source.output, SETTINGS).head
    q, r = (
        source.output.finish(source.output.project(states_ND)).log_softmax(-1)
        for states_ND in (texts.instructed_ND, texts.contrasted_ND)
    )
    ratio_N = (q - r).gather(1, texts.token_ids_N[:, None])[:, 0]
    train_N = texts.tokens_of("train")
    assert head.reward_mean == pytest.approx(float(ratio_N[train_N].mean()), abs=1e-5)
    assert float(head.value(texts.bare_ND[train_N]).mean()) == pytest.approx(head.reward_mean, abs=1e-3)


def test_the_same_seed_gives_the_same_head() -> None:
    first, second = (distilled(ShiftingSource(), seed=3).head.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damping_that_is_given_is_taken() -> None:
    assert distilled(ShiftingSource(), damping=0.3).validation["damping"] == 0.3


@pytest.mark.parametrize(
    ("instruction", "contrast", "what"),
    [
        (" \n", None, "instruction: it is empty"),
        ("good", "", "contrast: it is empty"),
        ("good", " good ", "contrast: it is the instruction itself"),
    ],
)
def test_instructions_that_say_nothing_are_refused(instruction: str, contrast: str | None, what: str) -> None:
    with pytest.raises(InstructionError, match=what):
        read_texts(ShiftingSource(), PROMPTS, instruction, contrast, SETTINGS)


def test_too_few_chat_prompts_are_refused() -> None:
    texts_only = [prompt.model_copy(update={"format": "text"}) for prompt in PROMPTS]
    for prompts, count in ((PROMPTS[:19], 19), (texts_only, 0)):
        with pytest.raises(InstructionError, match=f"prompts: {count} chat prompts, .* at least 20"):
            read_texts(ShiftingSource(), prompts, "good", None, SETTINGS)


def test_an_instruction_that_changes_nothing_is_refused() -> None:
    with pytest.raises(InstructionError, match="does not change what this model says"):
        distilled(ShiftingSource(torch.zeros(SIZE)))


def test_texts_are_split_by_prompt() -> None:
    texts: InstructedTexts = read_texts(ShiftingSource(), PROMPTS, "good", None, SETTINGS)
    assert sum(texts.num_prompts.values()) == len(PROMPTS)
    assert texts.split[::2] == texts.split[1::2]
    assert replace(texts, split=["test"] * 160).tokens_of("train").numel() == 0
