"""Responses that another engine sampled, read by the embedded one: the states behind their tokens by teacher forcing.

Implements `value_models.rollouts.RolloutSource`. Enter at `SampledTokensSource`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from server.engines.embedded.core import EngineCore
from server.engines.embedded.given_texts import LOGITS_TOKENS, pages_of_a_pass, passes
from server.engines.embedded.model.loader import LoadedModel
from server.engines.rollout_prompts import encode_prompt
from server.errors import ContextLengthError
from value_models.errors import RolloutError
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import Rollout, RolloutSettings
from value_models.sampled import SampledResponse


class SampledTokensSource:
    """Reads with an `EngineCore` what `responses` gives for some prompts."""

    def __init__(
        self,
        loaded: LoadedModel,
        core: EngineCore,
        responses: Callable[[Sequence[RolloutPrompt]], Sequence[SampledResponse]],
    ) -> None:
        self.loaded = loaded
        self.core = core
        self._responses = responses

    @property
    def base_model(self) -> dict[str, Any]:
        return self.loaded.identity

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        """The responses with the states behind their tokens. Raises RolloutError where there is no room for one."""
        del settings
        contexts = {prompt.id: encode_prompt(self.loaded.tokenizer, prompt) for prompt in prompts}
        responses = self._responses(prompts)
        # No state behind the last token is asked for.
        texts = [[*contexts[response.prompt_id], *response.token_ids[:-1]] for response in responses]
        for group in passes([len(text) for text in texts], pages_of_a_pass(self.core)):
            try:
                states = self.core.states_of([texts[index] for index in group])
            except ContextLengthError as error:
                raise RolloutError(f"prompt {responses[group[0]].prompt_id!r}: {error}; see --kv-cache-gib") from error
            for index, text_TD in zip(group, states, strict=True):
                response = responses[index]
                states_TD = text_TD[len(contexts[response.prompt_id]) - 1 :]
                yield Rollout(
                    prompt_id=response.prompt_id,
                    sample=response.sample,
                    response=response.response,
                    token_ids=response.token_ids,
                    is_finished=response.is_finished,
                    text_ends=response.text_ends,
                    states_TD=states_TD.cpu(),
                    logp_grads_TD=self._logp_grads(states_TD, response.token_ids).cpu(),
                )

    @torch.inference_mode()
    def _logp_grads(self, states_TD: Tensor, token_ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor(token_ids, device=states_TD.device).split(LOGITS_TOKENS)
        parts = zip(states_TD.split(LOGITS_TOKENS), tokens, strict=True)
        return torch.cat([self.core.lm_head.logp_grads(states, drawn) for states, drawn in parts])
