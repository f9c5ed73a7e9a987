"""The embedded engine as a reader of given texts: the states behind their tokens by teacher forcing.

A text is tokenized as the model would have written it: the prompt as a server encodes it, then the response by itself,
and after a chat's response the token that ends a turn. Implements `value_models.scored_texts.TextSource`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from server.engines.chat_template import encode_chat
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.pages import PAGE_TOKENS, num_pages_for
from server.engines.embedded.spare_rows import SpareRows
from server.engines.rollout_prompts import response_seed
from server.errors import InvalidRequestError
from server.types import ChatRendering
from value_models.errors import TextsFileError
from value_models.given_texts import GivenText, GivenTexts
from value_models.rollouts import Rollout
from value_models.scored_texts import ScoreSettings

_PASS_TOKENS = 1024
"""Texts are read together up to so many tokens; a longer one is read alone."""
LOGITS_TOKENS = 256
"""Of so many tokens at once the logits are in memory."""
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(slots=True, frozen=True)
class _Encoded:
    context: list[int]
    """What is read before the first token that counts."""
    response: list[int]
    is_cut: bool

    @property
    def read(self) -> list[int]:
        """The last token is not: no state behind it is asked for."""
        return [*self.context, *self.response[:-1]]


class EngineTextSource:
    """Reads texts with an `EngineCore` from the calling thread, or with one that runs."""

    def __init__(self, loaded: LoadedModel, core: EngineCore | SpareRows) -> None:
        self.loaded = loaded
        self.core = core

    @property
    def base_model(self) -> dict[str, Any]:
        return self.loaded.identity

    def check(self, given: GivenTexts, settings: ScoreSettings) -> None:
        """Raises TextsFileError, with its line, for a chat without a template, or a text that is too long or short."""
        before: _Encoded | None = None
        for text in given.texts:
            try:
                encoded = self._encode(text, settings)
            except (InvalidRequestError, TextsFileError) as error:
                raise TextsFileError(f"{given.where(text)}: {error}") from error
            if text.sample == 1 and before is not None and before.response == encoded.response:
                cut = ", as far as --max-tokens lets them be read" if encoded.is_cut else " once they are tokenized"
                raise TextsFileError(f"{given.where(text)}: chosen and rejected are equal{cut}")
            before = encoded

    def score(self, texts: Sequence[GivenText], settings: ScoreSettings) -> Iterator[Rollout]:
        """The texts with the states behind their tokens, with the gradients of those and of tokens drawn in them.

        Raises InvalidRequestError or TextsFileError for what `check` refuses.
        """
        encoded = [self._encode(text, settings) for text in texts]
        for group in passes([len(text.read) for text in encoded], pages_of_a_pass(self.core)):
            states = self.core.states_of([encoded[index].read for index in group])
            for index, states_TD in zip(group, states, strict=True):
                yield self._rollout(texts[index], encoded[index], states_TD, settings)

    @torch.inference_mode()
    def _rollout(self, text: GivenText, encoded: _Encoded, states_TD: Tensor, settings: ScoreSettings) -> Rollout:
        states_TD = states_TD[len(encoded.context) - 1 :]
        seed = response_seed(settings.seed, f"{text.prompt_id}:{text.line}:{text.sample}")
        generator = torch.Generator(device=states_TD.device).manual_seed(seed)
        given = torch.tensor(encoded.response, device=states_TD.device)
        grads: list[Tensor] = []
        drawn_grads: list[Tensor] = []
        for states, tokens in zip(states_TD.split(LOGITS_TOKENS), given.split(LOGITS_TOKENS), strict=True):
            probabilities = self.core.lm_head.logits(states).softmax(dim=-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            grads.append(self.core.lm_head.logp_grads(states, tokens))
            drawn_grads.append(self.core.lm_head.logp_grads(states, drawn))
        return Rollout(
            prompt_id=text.prompt_id,
            sample=text.sample,
            response=text.response,
            token_ids=tuple(encoded.response),
            is_finished=not encoded.is_cut,
            states_TD=states_TD.cpu(),
            logp_grads_TD=torch.cat(grads).cpu(),
            sampled_grads_TD=torch.cat(drawn_grads).cpu(),
            about={"prompt": text.prompt, "score": text.score, "line": text.line},
        )

    def _encode(self, text: GivenText, settings: ScoreSettings) -> _Encoded:
        """Raises InvalidRequestError or TextsFileError, neither with the line."""
        tokenizer: Any = self.loaded.tokenizer
        response: list[int] = list(tokenizer(text.response, add_special_tokens=False)["input_ids"])
        if isinstance(text.prompt, str):
            context: list[int] = list(tokenizer(text.prompt)["input_ids"])
            end: list[int] = []
        else:
            context = encode_chat(tokenizer, text.prompt)
            end = self._turn_end
        if not context:
            # Nothing stands before a text without prompt, so nothing predicts its first token.
            context, response = response[:1], response[1:]
        if not response:
            raise TextsFileError("the text has no token that something predicts")
        room = self._room - len(context)
        limit = room if settings.max_tokens is None else min(room, settings.max_tokens)
        if room < 1:
            raise TextsFileError(
                f"the prompt has {len(context)} tokens; there is room for {self._room} with a response"
            )
        if len(response) > limit and not settings.cut_long:
            raise TextsFileError(
                f"the response has {len(response)} tokens and its prompt {len(context)}; it may have {limit}, and "
                "--cut-long cuts it"
            )
        is_cut = len(response) + len(end) > limit
        return _Encoded(context, response[:limit] if is_cut else [*response, *end], is_cut)

    @cached_property
    def _room(self) -> int:
        """Tokens of a prompt and its response."""
        pages = self.core.page_pool.num_pages - 1
        return min(self.core.max_model_len, pages * PAGE_TOKENS)

    @cached_property
    def _turn_end(self) -> list[int]:
        """What the chat template puts behind an answer and the model ends by; empty where there is no such token."""
        rendered = encode_chat(self.loaded.tokenizer, _PROBE, ChatRendering(add_generation_prompt=False))
        ends = [token for token in rendered if token in self.loaded.eos_token_ids]
        return ends[-1:]


def passes(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of texts of so many tokens that are read together, in at most `limit` pages if they are several."""
    group: list[int] = []
    num_pages = 0
    for index, length in enumerate(lengths):
        pages = num_pages_for(length)
        if group and num_pages + pages > limit:
            yield group
            group, num_pages = [], 0
        group.append(index)
        num_pages += pages
    if group:
        yield group


def pages_of_a_pass(core: EngineCore | SpareRows) -> int:
    """How many pages texts that are read together may take."""
    return min(num_pages_for(_PASS_TOKENS), core.page_pool.num_pages - 1)
