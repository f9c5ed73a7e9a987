"""The embedded engine as a source of rollouts: batched sampling with the states that decoding sees.

Implements `value_models.rollouts.RolloutSource`, and gives evaluation its samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from server.control.editor import StateEditor
from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.divergence import divergences
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.sequence import Sequence as TokenSequence
from server.engines.embedded.sequence import SequenceState
from server.engines.embedded.spare_rows import SpareRows
from server.engines.instruction import encode_instructed
from server.engines.rollout_prompts import encode_prompt, rollout_request
from server.errors import InvalidRequestError
from server.types import FinishReason, GenerationChunk, GenerationRequest
from value_models.errors import RolloutError
from value_models.generations import EvalSample, best_of_kl_bound
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import Rollout, RolloutSettings
from value_models.sampled import StreamedText


class EngineRolloutSource:
    """Drives an `EngineCore` from the calling thread until all responses are there, or waits for one that runs."""

    def __init__(self, loaded: LoadedModel, core: EngineCore | SpareRows) -> None:
        self.loaded = loaded
        self.core = core

    @property
    def base_model(self) -> dict[str, Any]:
        return self.loaded.identity

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        """Uncontrolled responses with the states behind their tokens.

        Raises RolloutError for a prompt that does not fit, RuntimeError when the engine fails.
        """
        for sequence, streamed, _ in self._run(prompts, settings, control=None, instruction=None):
            states_TD = torch.stack(sequence.states or [])
            yield Rollout(
                prompt_id=sequence.request.request_id,
                sample=sequence.index,
                response=streamed.text,
                token_ids=tuple(sequence.token_ids),
                is_finished=sequence.finish_reason is FinishReason.STOP,
                text_ends=tuple(streamed.text_ends),
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
        read: Sequence[str] = (),
        editor: StateEditor | None = None,
    ) -> Iterator[EvalSample]:
        """Responses under control, or after an instruction put before every prompt, with their figures.

        `read` names heads whose value of the finished response is wanted. `editor` edits in place of the engine's own
        until the last response is there.

        Divergences are exact (divergence.py), from the base model behind the bare prompt, whatever was put before it
        and whatever acted. A search alone is a bound on top of that: log K - (K - 1) / K a block of the best of K
        (Beirami et al. 2024).
        """
        core = self.core
        assert isinstance(core, EngineCore), "an engine that serves meanwhile is not evaluated"
        own_editor, core.editor = core.editor, editor or core.editor
        bare = {prompt.id: prompt for prompt in prompts}
        try:
            for sequence, streamed, wall_s in self._run(prompts, settings, control=control, instruction=instruction):
                bare_TD = torch.stack(sequence.states or [])
                if instruction is not None:
                    bare_TD = self._states(self.encode(bare[sequence.request.request_id]), sequence.token_ids)
                is_told = instruction is None and editor is None
                mean_kl, max_kl = _told_kl(sequence) if is_told else _exact_kl(divergences(core, sequence, bare_TD))
                bound, bound_of_last = _search_kl(control, len(sequence.token_ids))
                yield EvalSample(
                    prompt_id=sequence.request.request_id,
                    sample=sequence.index,
                    response=streamed.text,
                    num_tokens=len(sequence.token_ids),
                    nll=self.nll(bare_TD, sequence.token_ids),
                    mean_kl=mean_kl + bound,
                    max_kl=max_kl + bound_of_last,
                    is_finished=sequence.finish_reason is FinishReason.STOP,
                    wall_s=wall_s,
                    values=self._values(sequence, read),
                    steered=sequence.totals.summary().value_after if sequence.totals else {},
                )
        finally:
            core.editor = own_editor

    def encode(self, prompt: RolloutPrompt, instruction: str | None = None) -> list[int]:
        """Raises InvalidRequestError; see `encode_prompt`."""
        return encode_prompt(self.loaded.tokenizer, prompt, instruction)

    def messages(self, prompt: RolloutPrompt, instruction: str | None) -> list[dict[str, str]]:
        """Those of a chat, with an instruction before what the user says last."""
        return prompt.turns(instruction)

    def guided(self, request: GenerationRequest, prompt: RolloutPrompt, instruction: str | None) -> GenerationRequest:
        """The request with its prompt behind the instruction that its control follows, if it does.

        Raises InvalidRequestError where there is no place for one.
        """
        followed = None if request.control is None else request.control.instruction
        if followed is None:
            return request
        messages = self.messages(prompt, instruction) if prompt.format == "chat" else None
        ids = encode_instructed(self.loaded.tokenizer, followed.text, request.prompt_token_ids, messages)
        return replace(request, instructed_token_ids=tuple(ids))

    @torch.inference_mode()
    def nll(self, states_TD: Tensor, token_ids: list[int]) -> float:
        """Mean negative log-probability of tokens, in nats, under the base model given the states behind them."""
        log_probs_TV = self.core.lm_head.logits(states_TD).log_softmax(dim=-1)
        return -float(log_probs_TV.gather(1, torch.tensor(token_ids, device=states_TD.device)[:, None]).mean())

    def _run(
        self,
        prompts: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        control: ControlParams | None,
        instruction: str | None,
    ) -> Iterator[tuple[TokenSequence, StreamedText, float]]:
        """Finished sequences with their texts and what they took: each step's seconds, shared by those it served."""
        spent_s: dict[TokenSequence, float] = {}
        open_sequences: list[TokenSequence] = []
        texts: dict[tuple[str, int], StreamedText] = {}
        ended: set[tuple[str, int]] = set()
        for prompt in prompts:
            try:
                request = rollout_request(prompt, self.encode(prompt, instruction), settings, control=control)
                request = self.guided(request, prompt, instruction)
                self.core.check(request)
            except InvalidRequestError as error:
                raise RolloutError(f"prompt {prompt.id!r}: {error}") from error

            def emit(chunk: GenerationChunk, prompt_id: str = prompt.id) -> None:
                texts.setdefault((prompt_id, chunk.index), StreamedText()).add(chunk.text, len(chunk.token_ids))
                if chunk.finish_reason is not None:
                    ended.add((prompt_id, chunk.index))

            sequences = self.core.sequences(request, emit, keep_states=True)
            open_sequences += sequences
            self.core.add(sequences)
        while open_sequences:
            started_s = time.perf_counter()
            # An engine that runs goes on meanwhile, and what it gave may have been handed on already.
            if not any(_key(sequence) in ended for sequence in open_sequences):
                self.core.step()
            served = [sequence for sequence in open_sequences if sequence.state is not SequenceState.WAITING]
            for sequence in served:
                spent_s[sequence] = spent_s.get(sequence, 0.0) + (time.perf_counter() - started_s) / len(served)
            # By their chunks, which an engine in another thread may hand on later.
            done = [sequence for sequence in open_sequences if _key(sequence) in ended]
            open_sequences = [sequence for sequence in open_sequences if _key(sequence) not in ended]
            for sequence in done:
                request_id, _ = key = _key(sequence)
                if sequence.finish_reason is FinishReason.ERROR or not sequence.states:
                    raise RuntimeError(f"the engine failed on prompt {request_id!r}; see the log")
                yield sequence, texts.pop(key), spent_s.pop(sequence, 0.0)

    @torch.inference_mode()
    def _logp_grads(self, states_TD: Tensor, token_ids: list[int]) -> Tensor:
        return self.core.lm_head.logp_grads(states_TD, torch.tensor(token_ids, device=states_TD.device))

    def _states(self, prompt_ids: list[int], token_ids: list[int]) -> Tensor:
        """The states [T, D] behind tokens after another prompt than the one they were sampled from."""
        return self.core.states([*prompt_ids, *token_ids[:-1]])[len(prompt_ids) - 1 :]

    @torch.inference_mode()
    def _values(self, sequence: TokenSequence, heads: Sequence[str]) -> dict[str, float]:
        """In reward units, at the state behind its last token."""
        if not heads or not sequence.states:
            return {}
        assert isinstance(self.core, EngineCore), "values are asked for by evaluation alone"
        stack = self.core.registry.stack(tuple(heads))
        values_RK, _ = stack.readout(stack.inputs(sequence.states[-1][None].float()))
        return dict(zip(heads, stack.rewards(values_RK)[0].tolist(), strict=True))


def _key(sequence: TokenSequence) -> tuple[str, int]:
    return sequence.request.request_id, sequence.index


def _told_kl(sequence: TokenSequence) -> tuple[float, float]:
    """The divergence that the engine told of its edits, in nats a token: in the mean, and the largest."""
    if sequence.totals is None:
        return 0.0, 0.0
    summary = sequence.totals.summary()
    return summary.mean_kl, summary.max_kl


def _exact_kl(kl_T: Tensor) -> tuple[float, float]:
    return float(kl_T.mean()), float(kl_T.max())


def _search_kl(control: ControlParams | None, num_tokens: int) -> tuple[float, float]:
    """What a search may diverge at most, in nats a token: in the mean, and in its last, shortest block."""
    search = None if control is None else control.search
    if search is None or num_tokens == 0:
        return 0.0, 0.0
    num_blocks = -(-num_tokens // search.block_tokens)
    bound = best_of_kl_bound(search.candidates)
    return bound * num_blocks / num_tokens, bound / (num_tokens - (num_blocks - 1) * search.block_tokens)
