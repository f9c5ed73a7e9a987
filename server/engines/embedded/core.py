"""The engine without threads: each `step` schedules rows, runs the model, edits, samples and emits.

Used from one thread only. Rollouts and the command line drive it directly; `engine.py` gives it a thread and an async
face. Knows nothing of HTTP. Enter at `EngineCore.step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from server.control.editor import GroupStats, StateEditor
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.engines.base import EngineObserver, EngineStatus, NullObserver
from server.engines.embedded.attention import Segment
from server.engines.embedded.detokenizer import Detokenizer
from server.engines.embedded.loader import LoadedModel
from server.engines.embedded.reports import token_edits, token_logprobs
from server.engines.embedded.runner import DecodeRow, LMHead, ModelRunner
from server.engines.embedded.sampler import sample
from server.engines.embedded.scheduler import Scheduler
from server.engines.embedded.sequence import Sequence, SequenceState
from server.errors import ContextLengthError, InvalidRequestError
from server.types import FinishReason, GenerationChunk, GenerationRequest, TokenEdit, TokenLogprob
from value_models.linear import MIN_ROWS

_log = logging.getLogger(__name__)
_FAILED = "The request failed inside the engine."


class EngineCore:
    def __init__(
        self,
        loaded: LoadedModel,
        registry: HeadRegistry,
        *,
        max_batch_size: int,
        max_model_len: int | None = None,
        prefill_chunk_tokens: int = 256,
        observer: EngineObserver | None = None,
    ) -> None:
        """Raises ModelLoadError when the model cannot be run exactly."""
        self._tokenizer: Any = loaded.tokenizer
        self.registry = registry
        self.max_model_len = min(max_model_len or loaded.max_len, loaded.max_len)
        self.vocab_size: int = loaded.identity["vocab_size"]
        self._eos_token_ids = loaded.eos_token_ids
        self._observer = observer or NullObserver()
        self.max_batch_size = max_batch_size
        # One slot more than rows, the last one: scratch space that holds nothing between steps.
        self.runner = ModelRunner.create(loaded.model, num_slots=max_batch_size + 1, max_len=self.max_model_len)
        self._editor = StateEditor(self.lm_head)
        self._scheduler = Scheduler(
            self.runner.kv,
            max_batch_size=max_batch_size,
            chunk_tokens=prefill_chunk_tokens,
            max_step_prefill_tokens=2 * prefill_chunk_tokens,
        )
        self._plan = EditPlan(())
        self._plan_rows: list[Sequence] = []

    @property
    def lm_head(self) -> LMHead:
        return self.runner.lm_head

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def status(self) -> EngineStatus:
        scheduler = self._scheduler
        capacity = self.max_batch_size * self.max_model_len
        return EngineStatus(
            is_running=True,
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.num_cached_tokens / capacity,
        )

    def check(self, request: GenerationRequest) -> None:
        """Raises UnknownHeadError, InvalidRequestError or ContextLengthError for what could not be run."""
        if request.control is not None:
            self.registry.check(request.control.objective.head_names)
        prompt, max_tokens = request.prompt_token_ids, request.sampling.max_tokens
        if not prompt:
            raise InvalidRequestError("prompt: must hold at least one token", param="prompt")
        if bad := [token for token in prompt if not 0 <= token < self.vocab_size]:
            raise InvalidRequestError(f"prompt: token id {bad[0]} is outside 0..{self.vocab_size - 1}", param="prompt")
        if len(prompt) + max_tokens > self.max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and max_tokens is {max_tokens}: together more than the "
                f"{self.max_model_len} that fit.",
                param="max_tokens",
            )

    def sequences(
        self, request: GenerationRequest, emit: Callable[[GenerationChunk], None], *, keep_states: bool = False
    ) -> list[Sequence]:
        """The request's choices, ready for `add`. The request must have passed `check`."""
        backend = self._tokenizer.backend_tokenizer
        return Sequence.choices(
            request,
            make_detokenizer=lambda: Detokenizer(backend, request.prompt_token_ids),
            emit=emit,
            arrival_s=time.monotonic(),
            keep_states=keep_states,
        )

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def add(self, sequences: list[Sequence]) -> None:
        self._scheduler.waiting.extend(sequences)

    @torch.inference_mode()
    def abort(self, sequences: list[Sequence]) -> None:
        """End these choices wherever they are; each gets its one finish reason, and those that have it keep it."""
        for sequence in sequences:
            self._finish(sequence, FinishReason.ABORT)
        self._observer.on_step(self.status())

    @torch.inference_mode()
    def abort_all(self, reason: FinishReason = FinishReason.ABORT) -> None:
        for sequence in self._scheduler.sequences():
            self._finish(sequence, reason)
        self._observer.on_step(self.status())

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every decoding sequence, and a budget's worth of prompts. Failures end only whom they hit."""
        self._scheduler.admit(time.monotonic())
        try:
            rows, hidden_BD = self._forward()
            if rows:
                self._sample(rows, hidden_BD)
        except Exception:
            _log.exception("A step failed; its sequences end with an error")
            for sequence in [*self._scheduler.decoding, *self._scheduler.prefilling]:
                self._finish(sequence, FinishReason.ERROR)
        self._observer.on_step(self.status())

    def _forward(self) -> tuple[list[Sequence], Tensor]:
        """Run the model; the sequences that get a token now, and the state [B, D] behind each."""
        decoding = list(self._scheduler.decoding)
        chunks, complete = self._scheduler.take_prefill()
        decode = [DecodeRow(s.prompt_len + len(s.token_ids) - 1, s.token_ids[-1]) for s in decoding]
        segments = [segment for _, segment in chunks]
        hidden_TD = self.runner.forward(decode, segments) if decode or segments else torch.empty(0)
        first = len(decode)
        for sequence, segment in chunks:
            end = first + len(segment.token_ids)
            if sequence.request.sampling.prompt_logprobs:
                self._score_prompt(sequence, segment, hidden_TD[first:end])
            if segment.end == sequence.prompt_len:
                sequence.group.last_hidden_D = hidden_TD[end - 1]
            first = end
        states = list(hidden_TD[: len(decode)])
        rows = decoding
        for sequence in complete:
            if sequence.request.sampling.max_tokens == 0:
                scores = self._take_prompt_logprobs(sequence)
                self._finish(
                    sequence, FinishReason.LENGTH, GenerationChunk(index=sequence.index, prompt_logprobs=scores)
                )
                continue
            self._scheduler.start_decoding(sequence)
            assert sequence.group.last_hidden_D is not None
            rows.append(sequence)
            states.append(sequence.group.last_hidden_D)
        return rows, torch.stack(states) if states else torch.empty(0)

    def _sample(self, rows: list[Sequence], hidden_BD: Tensor) -> None:
        """Edit, draw a token for each row, and hand it on."""
        num_rows = len(rows)
        padded = rows * MIN_ROWS if num_rows < MIN_ROWS else rows
        hidden_PD = hidden_BD.expand(len(padded), -1).contiguous()
        logits_PV, stats = self._edited_logits(rows, hidden_PD)
        is_finite_P = logits_PV.amax(dim=-1).isfinite()
        is_finite = is_finite_P.tolist()
        if not all(is_finite):
            # Whatever a broken row would do to the sampler, its neighbours must not feel it; it ends below.
            logits_PV[~is_finite_P] = 0.0
        tokens_P = sample(logits_PV, [s.row_sampling for s in padded], [len(s.token_ids) for s in padded])
        logprobs = self._logprobs(rows, logits_PV, tokens_P)
        edits = token_edits(stats)
        now_s = time.monotonic()
        for i, (sequence, token_id) in enumerate(zip(rows, tokens_P.tolist()[:num_rows], strict=True)):
            if sequence.states is not None:
                sequence.states.append(hidden_BD[i])
            try:
                if not is_finite[i]:
                    raise FloatingPointError("the model's logits are not finite")
                self._grow(sequence, token_id, logprobs.get(i), edits.get(i), now_s)
            except Exception:
                _log.exception("Request %s failed", sequence.request.request_id)
                self._finish(sequence, FinishReason.ERROR)

    def _edited_logits(self, rows: list[Sequence], hidden_BD: Tensor) -> tuple[Tensor, list[GroupStats]]:
        if rows != self._plan_rows:
            controls = [sequence.request.control for sequence in rows]
            self._plan = EditPlan.from_rows(controls, self.registry, device=hidden_BD.device)
            self._plan_rows = rows
        started_s = time.perf_counter()
        logits_BV, stats = self._editor.logits(hidden_BD, self._plan)
        if stats:
            self._observer.on_edit(duration_s=time.perf_counter() - started_s)
        return logits_BV, stats

    def _grow(
        self,
        sequence: Sequence,
        token_id: int,
        logprob: TokenLogprob | None,
        edit: TokenEdit | None,
        now_s: float,
    ) -> None:
        """Append one token to a sequence and emit it; finish the sequence when it ends here."""
        is_first = not sequence.token_ids
        sequence.token_ids.append(token_id)
        if edit is not None and sequence.edits is not None:
            sequence.edits.add(edit)
        self._observe_token(sequence, edit, now_s, is_first=is_first)
        reason: FinishReason | None = None
        text = ""
        if token_id in self._eos_token_ids and not sequence.request.sampling.ignore_eos:
            reason = FinishReason.STOP
        else:
            text = sequence.stop.add(sequence.detokenizer.add(token_id))
            if sequence.stop.has_stopped:
                reason = FinishReason.STOP
            elif len(sequence.token_ids) >= sequence.request.sampling.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None and not sequence.stop.has_stopped:
            text += sequence.stop.flush()
        chunk = GenerationChunk(
            index=sequence.index,
            text=text,
            token_ids=(token_id,),
            logprobs=() if logprob is None else (logprob,),
            edit=edit,
            prompt_logprobs=self._take_prompt_logprobs(sequence) if is_first else None,
        )
        if reason is None:
            sequence.emit(chunk)
        else:
            self._finish(sequence, reason, chunk)

    def _finish(self, sequence: Sequence, reason: FinishReason, chunk: GenerationChunk | None = None) -> None:
        """Free the sequence's slot and emit its last chunk."""
        if sequence.state is SequenceState.FINISHED:
            return
        self._scheduler.remove(sequence, reason)
        sequence.emit(
            replace(
                chunk or GenerationChunk(index=sequence.index),
                finish_reason=reason,
                control=sequence.edits.summary() if sequence.edits is not None else None,
                error=_FAILED if reason is FinishReason.ERROR else None,
            )
        )
        now_s = time.monotonic()
        self._observer.on_finish(
            reason=reason,
            e2e_s=now_s - sequence.arrival_s,
            decode_s=now_s - sequence.first_token_s if sequence.token_ids else None,
            prompt_tokens=sequence.num_prefilled,
            generation_tokens=len(sequence.token_ids),
        )

    def _logprobs(self, rows: list[Sequence], logits_PV: Tensor, tokens_P: Tensor) -> dict[int, TokenLogprob]:
        wanted = {i: n for i, s in enumerate(rows) if (n := s.request.sampling.logprobs) is not None}
        if not wanted:
            return {}
        # Log-softmax takes each row alone, and top-k of a row does not depend on how many are asked for elsewhere.
        return {
            i: token_logprobs(logits_PV[i : i + 1], tokens_P[i : i + 1], num_top, self.token_text)[0]
            for i, num_top in wanted.items()
        }

    def _score_prompt(self, sequence: Sequence, segment: Segment, hidden_TD: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the segment's positions, without control."""
        following = sequence.group.token_ids[segment.start + 1 : segment.end + 1]
        # A prompt is computed again for a choice that waited until its siblings were gone, but told only once.
        if not following or not sequence.group.prompt_logprobs:
            return
        logits_TV = self.lm_head.logits(hidden_TD)[: len(following)]
        token_ids_T = torch.tensor(following, device=logits_TV.device)
        num_top = sequence.request.sampling.logprobs or 0
        sequence.group.prompt_logprobs += token_logprobs(logits_TV, token_ids_T, num_top, self.token_text)

    def _take_prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log-probabilities, for whichever choice comes first."""
        if not sequence.request.sampling.prompt_logprobs or not sequence.group.prompt_logprobs:
            return None
        taken = tuple(sequence.group.prompt_logprobs)
        sequence.group.prompt_logprobs.clear()
        return taken

    def _observe_token(self, sequence: Sequence, edit: TokenEdit | None, now_s: float, *, is_first: bool) -> None:
        if is_first:
            sequence.first_token_s = now_s
            self._observer.on_first_token(
                queue_s=sequence.scheduled_s - sequence.arrival_s,
                prefill_s=now_s - sequence.scheduled_s,
                ttft_s=now_s - sequence.arrival_s,
            )
        inter_token_s = None if is_first else now_s - sequence.last_token_s
        self._observer.on_token(inter_token_s=inter_token_s, edit=edit)
        sequence.last_token_s = now_s
