"""The embedded engine as a reader of given texts: the states behind their tokens, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.given_texts import EngineTextSource
from server.engines.embedded.model.loader import LoadedModel
from value_models.errors import TextsFileError
from value_models.given_texts import GivenText, GivenTexts, Prompt
from value_models.lines import FileOrigin
from value_models.rollouts import Rollout
from value_models.scored_texts import ScoreSettings

SETTINGS = ScoreSettings()
ASKED: Prompt = ({"role": "user", "content": "Hi?"},)
TEXTS = [GivenText(i, "" if i % 2 else f"prompt {i}:", " a text" * (1 + i % 3), float(i)) for i in range(9)]


@pytest.fixture
def source(load_tiny: Callable[..., LoadedModel]) -> EngineTextSource:
    loaded = load_tiny()
    return EngineTextSource(loaded, EngineCore(loaded, HeadRegistry({}), max_batch_size=4))


def given(*texts: GivenText) -> GivenTexts:
    return GivenTexts(FileOrigin(Path("p.jsonl")), "texts", [*texts, *TEXTS[len(texts) :]])


def same(a: Rollout, b: Rollout) -> bool:
    assert a.sampled_grads_TD is not None
    assert b.sampled_grads_TD is not None
    tensors = zip(
        (a.states_TD, a.logp_grads_TD, a.sampled_grads_TD),
        (b.states_TD, b.logp_grads_TD, b.sampled_grads_TD),
        strict=True,
    )
    return a.token_ids == b.token_ids and all(torch.equal(x, y) for x, y in tensors)


def test_a_text_has_the_states_and_gradients_that_its_tokens_have_when_they_are_decoded(
    source: EngineTextSource,
) -> None:
    (read,) = source.score([GivenText(1, "ab", "cd", 1.0)], SETTINGS)
    context = source.loaded.tokenizer("ab")["input_ids"]
    states_TD = source.core.states([*context, *read.token_ids])[len(context) - 1 : -1]
    assert torch.equal(read.states_TD, states_TD)
    grads = source.core.lm_head.logp_grads(states_TD, torch.tensor(read.token_ids))
    assert torch.equal(read.logp_grads_TD, grads)


def test_texts_read_together_are_what_they_are_alone(source: EngineTextSource) -> None:
    together = list(source.score(TEXTS, SETTINGS))
    alone = [rollout for text in TEXTS for rollout in source.score([text], SETTINGS)]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert source.core.page_pool.num_held == 0


def test_the_tokens_that_the_model_draws_depend_on_the_seed_and_have_gradients_without_mean(
    source: EngineTextSource,
) -> None:
    first, again = (next(source.score(TEXTS[:1], SETTINGS)) for _ in range(2))
    other = next(source.score(TEXTS[:1], ScoreSettings(seed=1)))
    assert same(first, again)
    assert not same(first, other)
    drawn = [next(source.score(TEXTS[:1], ScoreSettings(seed=seed))).sampled_grads_TD for seed in range(200)]
    mean = torch.stack([grads for grads in drawn if grads is not None]).mean((0, 1)).norm()
    assert mean < 0.2 * first.logp_grads_TD.norm(dim=1).mean()


def test_a_chats_answer_ends_with_the_templates_end_of_turn_and_a_cut_one_does_not(source: EngineTextSource) -> None:
    tokenizer: Any = source.loaded.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "<eos>\n")
    text = GivenText(1, ASKED, "abcdef", 1.0)
    (whole,) = source.score([text], SETTINGS)
    (cut,) = source.score([text], ScoreSettings(max_tokens=3, cut_long=True))
    (full,) = source.score([text], ScoreSettings(max_tokens=6, cut_long=True))
    assert whole.token_ids[-1] in source.loaded.eos_token_ids
    assert whole.is_finished
    assert (cut.token_ids, cut.is_finished) == (whole.token_ids[:3], False)
    assert (full.token_ids, full.is_finished) == (whole.token_ids[:6], False)


def test_nothing_predicts_the_first_token_of_a_text_without_a_prompt(source: EngineTextSource) -> None:
    (read,) = source.score([GivenText(1, "", "abc", 1.0)], SETTINGS)
    assert (len(read.token_ids), len(read.states_TD)) == (2, 2)


@pytest.mark.parametrize(
    ("text", "settings", "why"),
    [
        (GivenText(7, "a", "b" * 300, 1.0), SETTINGS, "the response has 300 tokens and its prompt 1; it may have 255"),
        (GivenText(7, "a", "b" * 9, 1.0), ScoreSettings(max_tokens=8), "it may have 8, and --cut-long cuts it"),
        (GivenText(7, "a" * 300, "b", 1.0), ScoreSettings(cut_long=True), "the prompt has 300 tokens; there is room"),
        (GivenText(7, "", "a", 1.0), SETTINGS, "the text has no token that something predicts"),
    ],
)
def test_a_text_that_does_not_fit_is_refused_with_its_line(
    source: EngineTextSource, text: GivenText, settings: ScoreSettings, why: str
) -> None:
    with pytest.raises(TextsFileError) as raised:
        source.check(given(text), settings)
    assert str(raised.value).startswith("p.jsonl, line 7: ")
    assert why in str(raised.value)


def test_a_chat_for_a_model_without_a_template_and_pairs_that_are_cut_to_the_same_are_refused(
    source: EngineTextSource,
) -> None:
    pair = [GivenText(7, "p", "same and more", 1.0, 0), GivenText(7, "p", "same and less", -1.0, 1)]
    with pytest.raises(TextsFileError, match="line 7: chosen and rejected are equal, as far as --max-tokens"):
        source.check(given(*pair), ScoreSettings(max_tokens=4, cut_long=True))
    source.loaded.tokenizer.chat_template = None
    with pytest.raises(TextsFileError, match="line 7: messages: this model has no chat template"):
        source.check(given(GivenText(7, ASKED, "a", 1.0)), SETTINGS)
