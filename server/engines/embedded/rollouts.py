"""The embedded engine as a source of rollouts: batched sampling with the states that decoding sees.

Implements `value_models.rollouts.RolloutSource`, and gives evaluation its arms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from server.engines.embedded.core import EngineCore
from server.engines.embedded.engine import encode_chat
from server.engines.embedded.loader import LoadedModel
from server.engines.embedded.sequence import Sequence as TokenSequence
from server.errors import InvalidRequestError
from server.types import ControlParams, FinishReason, GenerationChunk, GenerationRequest, SamplingParams
from value_models.evaluation import EvalSample
from value_models.rollouts import Rollout, RolloutError, RolloutPrompt, RolloutSettings


class EngineRolloutSource:
    """Drives an `EngineCore` from the calling thread until all responses are there."""

    def __init__(self, loaded: LoadedModel, core: EngineCore) -> None:
        self._loaded = loaded
        self._core = core

    @property
    def base_model(self) -> dict[str, Any]:
        return self._loaded.identity

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        """Uncontrolled responses with the states behind their tokens.

        Raises RolloutError for a prompt that does not fit, RuntimeError when the engine fails.
        """
        for sequence, response in self._run(prompts, settings, control=None, instruction=None):
            states_TD = torch.stack(sequence.states or [])
            yield Rollout(
                prompt_id=sequence.request.request_id,
                sample=sequence.index,
                response=response,
                token_ids=tuple(sequence.token_ids),
                is_finished=sequence.finish_reason is FinishReason.STOP,
                states_TD=states_TD.cpu(),
                logp_grads_TD=self._logp_grads(states_TD, sequence.token_ids).cpu(),
            )

    def evaluate(
        self,
        prompts: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        control: ControlParams | None = None,
        instruction: str | None = None,
    ) -> Iterator[EvalSample]:
        """Responses under control, or after an instruction put before every prompt, with their figures."""
        for sequence, response in self._run(prompts, settings, control=control, instruction=instruction):
            summary = sequence.edits.summary() if sequence.edits is not None else None
            yield EvalSample(
                prompt_id=sequence.request.request_id,
                sample=sequence.index,
                response=response,
                num_tokens=len(sequence.token_ids),
                nll=self._nll(torch.stack(sequence.states or []), sequence.token_ids),
                mean_kl=summary.mean_kl if summary else 0.0,
                max_kl=summary.max_kl if summary else 0.0,
                is_finished=sequence.finish_reason is FinishReason.STOP,
            )

    def _run(
        self,
        prompts: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        control: ControlParams | None,
        instruction: str | None,
    ) -> Iterator[tuple[TokenSequence, str]]:
        open_sequences: list[TokenSequence] = []
        texts: dict[tuple[str, int], list[str]] = {}
        for prompt in prompts:
            request = GenerationRequest(
                request_id=prompt.id,
                prompt_token_ids=tuple(self._encode(prompt, instruction)),
                sampling=SamplingParams(
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=_seed(settings.seed, prompt.id),
                ),
                control=control,
                num_choices=settings.num_samples,
            )
            try:
                self._core.check(request)
            except InvalidRequestError as error:
                raise RolloutError(f"prompt {prompt.id!r}: {error}") from error

            def emit(chunk: GenerationChunk, prompt_id: str = prompt.id) -> None:
                texts.setdefault((prompt_id, chunk.index), []).append(chunk.text)

            sequences = self._core.sequences(request, emit, keep_states=True)
            open_sequences += sequences
            self._core.add(sequences)
        while open_sequences:
            self._core.step()
            done = [sequence for sequence in open_sequences if sequence.finish_reason is not None]
            open_sequences = [sequence for sequence in open_sequences if sequence.finish_reason is None]
            for sequence in done:
                request_id = sequence.request.request_id
                if sequence.finish_reason is FinishReason.ERROR or not sequence.states:
                    raise RuntimeError(f"the engine failed on prompt {request_id!r}; see the log")
                yield sequence, "".join(texts.pop((request_id, sequence.index)))

    @torch.inference_mode()
    def _logp_grads(self, states_TD: Tensor, token_ids: list[int]) -> Tensor:
        return self._core.lm_head.logp_grads(states_TD, torch.tensor(token_ids, device=states_TD.device))

    @torch.inference_mode()
    def _nll(self, states_TD: Tensor, token_ids: list[int]) -> float:
        """Mean negative log-probability of tokens, in nats, under the base model given the states behind them."""
        log_probs_TV = self._core.lm_head.logits(states_TD).log_softmax(dim=-1)
        return -float(log_probs_TV.gather(1, torch.tensor(token_ids, device=states_TD.device)[:, None]).mean())

    def _encode(self, prompt: RolloutPrompt, instruction: str | None) -> list[int]:
        text = prompt.text if instruction is None else f"{instruction}\n\n{prompt.text}"
        if prompt.format == "chat":
            return encode_chat(self._loaded.tokenizer, [{"role": "user", "content": text}])
        tokenizer: Any = self._loaded.tokenizer
        return tokenizer(text)["input_ids"]


def _seed(seed: int, prompt_id: str) -> int:
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
