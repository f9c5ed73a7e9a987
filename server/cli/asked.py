"""Judges by meaning: a second language model is asked about a response, by how it goes on with a sentence about it.

The score is the log-odds of two sets of words right after the response and the beginning of that sentence
(value_models/judges/questions.json), so that one pass over the response is all it takes, and no lexicon decides. The
model is gemma-3-270m, which packages carry: neither the model that is steered nor one that a head was trained by. Enter
at `ASKED`; to add an aim, write its question into the file.

Shapes: M texts, T tokens, D hidden size, W words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from server.engines.embedded.model.loader import LoadedModel, load_model
from value_models.anchors import AIMS
from value_models.reward_models import batches_by_length

ASKED_MODEL = "gemma-3-270m"
_MAX_TOKENS = 256
"""Of a response: what comes after is not read."""


def asked(aim: str, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """How much likelier, in nats, the model finds the words for an aim than those against it.

    The log of the two sets' shares; equal responses are read once. Raises ModelLoadError where the model's packages are
    missing.
    """
    del prompts
    distinct = sorted(set(responses))
    score_of = dict(zip(distinct, _log_odds(_judge(), aim, distinct), strict=True))
    return [score_of[response] for response in responses]


ASKED: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    f"asked_{aim}": functools.partial(asked, aim) for aim in AIMS
}
"""By the judge's name."""


def starts(tokenizer: Any) -> list[int]:
    """The tokens that every text begins with."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


@torch.inference_mode()
def _log_odds(judge: LoadedModel, aim: str, texts: Sequence[str]) -> list[float]:
    question = _questions()[aim]
    tokenizer: Any = judge.tokenizer
    begins, ends = (tokenizer(question[part], add_special_tokens=False)["input_ids"] for part in ("before", "after"))
    before = [*starts(tokenizer), *begins]
    ids = [[*before, *tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_TOKENS], *ends] for text in texts]
    embeddings = judge.model.get_output_embeddings().weight
    sides = [
        embeddings[[tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in question[side]]]
        for side in ("for", "against")
    ]
    scores = [0.0] * len(texts)
    for batch, states_MD in _last_states(judge, ids):
        wanted_M, unwanted_M = ((states_MD @ side_WD.T).float().logsumexp(dim=-1) for side_WD in sides)
        for index, score in zip(batch, (wanted_M - unwanted_M).tolist(), strict=True):
            scores[index] = score
    return scores


def _last_states(judge: LoadedModel, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Texts of like length together, by their places, with the state [M, D] behind each one's last token.

    Padding comes behind a text, where causal attention does not see it.
    """
    lengths = list(map(len, ids))
    for batch in batches_by_length(lengths):
        longest = lengths[batch[0]]
        ids_MT = torch.tensor([[*ids[index], *[0] * (longest - lengths[index])] for index in batch])
        states_MTD: Tensor = judge.model.model(input_ids=ids_MT).last_hidden_state
        last_M = torch.tensor([lengths[index] - 1 for index in batch])
        yield batch, states_MTD[torch.arange(len(batch)), last_M]


@functools.cache
def _judge() -> LoadedModel:
    return load_model(ASKED_MODEL, device="cpu")


@functools.cache
def _questions() -> dict[str, dict[str, Any]]:
    return json.loads(files("value_models").joinpath("judges", "questions.json").read_text(encoding="utf-8"))
