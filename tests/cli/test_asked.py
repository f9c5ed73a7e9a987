"""The judge that asks a language model, on a tiny one: its score is the log-odds of the answers, in any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.cli import asked
from server.cli.asked import ASKED
from server.engines.embedded.model.loader import LoadedModel

TEXTS = ["It broke again.", "", "It finally worked after weeks of trying, and they all cheered."]
QUESTION = {"before": "<", "after": "> is", "for": ["a", "b"], "against": ["c", "d"]}


@pytest.fixture
def judge(load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    loaded = load_tiny()
    monkeypatch.setattr(asked, "_judge", lambda: loaded)
    monkeypatch.setattr(asked, "_questions", lambda: {"positive": QUESTION})
    return loaded


def score(*texts: str) -> list[float]:
    return ASKED["asked_positive"]([""] * len(texts), texts)


def test_the_score_is_the_log_odds_of_the_answers_behind_the_question(judge: LoadedModel) -> None:
    tokenizer = judge.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    asked_ids = torch.tensor([[*asked.starts(tokenizer), *ids("<"), *ids(TEXTS[0]), *ids("> is")]])
    probs = judge.model(input_ids=asked_ids).logits[0, -1].float().softmax(dim=-1)
    wanted, unwanted = (sum(probs[ids(word)[0]] for word in QUESTION[side]) for side in ("for", "against"))
    assert score(TEXTS[0]) == pytest.approx([float((wanted / unwanted).log())], abs=1e-4)


def test_a_batch_gives_each_response_what_it_gets_alone(judge: LoadedModel) -> None:
    assert score(*TEXTS, TEXTS[0]) == pytest.approx([score(text)[0] for text in (*TEXTS, TEXTS[0])], abs=1e-4)
    assert score() == []


def test_what_stands_behind_256_tokens_is_not_read(judge: LoadedModel) -> None:
    long = "word " * 400
    assert score(long) == score(f"{long}and more")


@pytest.mark.slow
def test_the_packaged_model_tells_good_news_from_bad() -> None:
    good, bad = score("It finally worked after weeks of trying.", "It broke again after weeks of trying.")
    assert good > bad
