"""The engine without threads: each `step` schedules rows, runs the model, edits, samples and emits.

Used from one thread only. Rollouts and the command line drive it directly; `engine.py` gives it a thread and an async
face. Knows nothing of HTTP. Enter at `EngineCore.step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from server.control.editor import StateEditor
from server.control.group_edit import GroupStats
from server.control.objective_rows import scores
from server.control.params import ControlParams
from server.control.plan import EditPlan, are_same
from server.control.registry import HeadRegistry
from server.engines.base import EngineObserver, EngineStatus, NullObserver
from server.engines.checks import check_request
from server.engines.embedded.candidates import Candidates, check_room, with_candidates
from server.engines.embedded.drawing import TokenDraw
from server.engines.embedded.guidance import both_read, check_shadows, instructed_states, with_shadows
from server.engines.embedded.model.kv_cache import default_kv_bytes, high_water_pages
from server.engines.embedded.model.layout import PromptChunk, StepWatch
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.pages import PagePool, num_pages_for
from server.engines.embedded.model.runner import ModelRunner
from server.engines.embedded.model.takeover.rotation import text_length
from server.engines.embedded.pace import Pace
from server.engines.embedded.prompt_values import add_token_values, prompt_chunk
from server.engines.embedded.reasoned_structure import check_structure
from server.engines.embedded.reports import Drawn, Scores
from server.engines.embedded.scheduler import Scheduler, Step
from server.engines.embedded.sequence import Sequence, SequenceState, one_by_one
from server.engines.embedded.structure import CompiledSchema
from server.engines.segments import Markup, OutputFormat
from server.engines.text import Detokenizer
from server.engines.vocabulary import Vocabulary
from server.errors import ContextLengthError, InvalidRequestError, RecontrolError
from server.kernels.linear import Bits
from server.types import FinishReason, GenerationChunk, GenerationRequest, TokenLogprob
from value_models.rewards import Reward

_log = logging.getLogger(__name__)


class EngineCore:
    def __init__(
        self,
        loaded: LoadedModel,
        registry: HeadRegistry,
        *,
        max_batch_size: int,
        max_model_len: int | None = None,
        prefill_chunk_tokens: int = 256,
        max_step_stretch: float | None = None,
        kv_cache_gib: float | None = None,
        kv_cache_high_water: float | None = None,
        has_prefix_cache: bool = True,
        bits: Bits = 16,
        output_format: OutputFormat | None = None,
        rewards: Mapping[str, Reward] | None = None,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.perf_counter,
        runs_ahead: bool | None = None,
    ) -> None:
        """With `max_step_stretch`, a step takes so many times as long with prompts as without, as `clock` tells.
        `rewards` are what requests may search by, by name; the thread of the steps calls them.
        With `runs_ahead`, as on a GPU by default, a step is launched before the last one's tokens are read.

        Raises ModelLoadError when the model cannot be run exactly, ConfigurationError when no sequence would fit.
        """
        self._tokenizer: Any = loaded.tokenizer
        self.registry = registry
        self.rewards = dict(rewards or {})
        self.max_model_len = text_length(loaded, max_model_len)
        self.vocab_size: int = loaded.identity["vocab_size"]
        self._eos_token_ids = loaded.eos_token_ids
        self._observer = observer or NullObserver()
        self._clock = clock
        self.max_batch_size = max_batch_size
        self.runner = ModelRunner.create(
            loaded.model,
            max_len=self.max_model_len,
            max_sequences=max_batch_size,
            kv_bytes=default_kv_bytes(loaded.model.device) if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            bits=bits,
        )
        self.editor = StateEditor(self.lm_head)
        self._scheduler = Scheduler(
            self.runner.kv,
            max_batch_size=max_batch_size,
            chunk_tokens=prefill_chunk_tokens,
            has_prefix_cache=has_prefix_cache,
            pace=None if max_step_stretch is None else Pace(max_step_stretch),
        )
        self.page_pool.high_water = high_water_pages(kv_cache_high_water, self.runner.kv.num_pages, loaded.model.device)
        self._vocabulary = Vocabulary(self._tokenizer.backend_tokenizer)
        self._markup = None if output_format is None else Markup(output_format, self._vocabulary)
        self._scores = Scores(self.lm_head, self._vocabulary)
        self._token_draw = TokenDraw()
        self._candidates = Candidates(
            self._scheduler,
            score=lambda hidden_CD, control: scores(hidden_CD, control.objective, self.registry),
            score_texts=self._score_texts,
            take_scores=self._scores.take_prompt,
            finish=self._finish,
            failing_alone=self._failing_alone,
        )
        self._runs_ahead = loaded.model.device.type == "cuda" if runs_ahead is None else runs_ahead
        self._ahead: tuple[Step, Tensor] | None = None
        """A step that the device computes while the host is busy with the one before, and its states [T, D]."""
        self._plan = EditPlan(())
        self._plan_rows: list[Sequence] = []
        self._plan_controls: list[ControlParams | None] = []
        """Of the plan's rows, what acts on their tokens."""

    @property
    def lm_head(self) -> LMHead:
        return self.runner.lm_head

    @property
    def page_pool(self) -> PagePool:
        return self._scheduler.pool

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def status(self) -> EngineStatus:
        scheduler = self._scheduler
        return EngineStatus(
            is_running=True,
            num_running=scheduler.num_rows,
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.num_held / (scheduler.pool.num_pages - 1),
            num_preemptions=scheduler.num_preemptions,
            num_cache_queries=scheduler.num_cache_queries,
            num_cache_hits=scheduler.num_cache_hits,
            num_cache_evictions=scheduler.pool.num_evicted,
        )

    def use(self, registry: HeadRegistry) -> None:
        """The heads from the next step on; those of the rows in progress must be among them."""
        self.registry = registry
        self._plan_rows = []

    def num_users(self, head: str) -> int:
        """How many sequences that are not finished run under this head."""
        return sum(head in sequence.request.named_heads for sequence in self._scheduler.sequences())

    def check(self, request: GenerationRequest) -> None:
        """Raises UnknownHeadError, InvalidRequestError or ContextLengthError for what could not be run."""
        check_request(
            request,
            heads=self.registry.names,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            rewards=self.rewards,
        )
        check_structure(request, self._markup)
        if isinstance(request.structure, CompiledSchema):
            request.structure.check_copies(request.num_sequences, param=request.sequences_param)
        room = {"max_rows": self.max_batch_size, "num_pages": self.page_pool.num_pages - 1}
        check_room(request, **room)
        check_shadows(request, **room)

    def sequences(
        self,
        request: GenerationRequest,
        emit: Callable[[GenerationChunk], None],
        *,
        emit_all: Callable[[Iterable[GenerationChunk]], None] | None = None,
        keep_states: bool = False,
        observer: EngineObserver | None = None,
    ) -> list[Sequence]:
        """The request's choices, ready for `add`. The request must have passed `check`.

        `emit_all` takes many chunks at a time in a moment, where that is less work than one by one.
        """
        choices = Sequence.choices(
            request,
            make_detokenizer=lambda: Detokenizer(self._vocabulary, request.prompt_token_ids),
            emit=emit,
            emit_all=emit_all or one_by_one(emit),
            observer=observer or self._observer,
            eos_token_ids=self._eos_token_ids,
            markup=self._markup,
            keep_states=keep_states,
        )
        return with_candidates(with_shadows(choices))

    def add(self, sequences: list[Sequence]) -> None:
        self._scheduler.add(sequences)

    @torch.inference_mode()
    def abort(self, sequences: list[Sequence]) -> None:
        """End these choices wherever they are; each gets its one finish reason, and those that have it keep it."""
        for sequence in sequences:
            self._finish(sequence, FinishReason.ABORT)
        self._observer.on_step(self.status())

    @torch.inference_mode()
    def abort_all(self, reason: FinishReason = FinishReason.ABORT) -> None:
        for sequence in self._scheduler.sequences():
            with suppress(Exception):  # Of the device: this one has been told by then, and the others must be.
                self._finish(sequence, reason)
        self._observer.on_step(self.status())

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every decoding sequence, and a budget's worth of prompts. Failures end only whom they hit.

        Where it runs ahead, the device has been given the next step before this one's tokens are read, so that it
        computes while the host detokenizes, emits and looks for what ends. The next tokens are drawn only after that.
        """
        started_s = self._clock()
        try:
            step, hidden_TD = self._ahead or self._launch()
            self._ahead = None
            rows, hidden_BD = self._computed(step, hidden_TD)
            while rows:
                drawn = self._draw(rows, hidden_BD)
                if self._runs_ahead and self._ahead is None:
                    self._ahead = self._launch_behind(drawn)
                rows, hidden_BD = self._take_in(drawn)
            self._scheduler.took(step, self._clock() - started_s)
        except Exception:
            _log.exception("A step failed; its sequences end with an error")
            self._ahead = None
            for sequence in list(self._scheduler.running):
                self._finish(sequence, FinishReason.ERROR)
        if not self.has_work:
            self._ahead = None
        self._observer.on_step(self.status())

    @torch.inference_mode()
    def states(self, token_ids: list[int]) -> Tensor:
        """The states [T, D] behind a text, computed in pages of its own and kept nowhere."""
        return self.states_of([token_ids])[0]

    @torch.inference_mode()
    def states_of(self, texts: list[list[int]], watch: StepWatch | None = None) -> list[Tensor]:
        """The states [T, D] behind each of some texts, which the model reads in one pass, perhaps watched.

        Raises ContextLengthError where there is no room for all of them.
        """
        chunks: list[PromptChunk] = []
        try:
            for token_ids in texts:
                pages = self.page_pool.take(num_pages_for(len(token_ids)))
                if pages is None:
                    raise ContextLengthError(f"There is no room for the keys and values of {len(token_ids)} tokens.")
                chunks.append(PromptChunk(pages, 0, token_ids))
            hidden_TD = self.runner.forward([], chunks, watch=watch)
            return list(hidden_TD.split([len(token_ids) for token_ids in texts]))
        finally:
            for chunk in chunks:
                self.runner.kv.clear(self.page_pool.release(chunk.pages, forget=True))

    def _launch(self, drawn_B: Tensor | None = None) -> tuple[Step, Tensor]:
        """Schedule a step and run the model; its states [T, D]. Tokens that have not been read yet are among these."""
        step = self._scheduler.schedule(time.monotonic())
        decode = [row for _, rows in step.decoding for row in rows]
        chunks = [chunk for _, chunk in step.chunks]
        hidden_TD = self.runner.forward(decode, chunks, drawn_B=drawn_B) if decode or chunks else torch.empty(0)
        return step, hidden_TD

    def _launch_behind(self, drawn: Drawn) -> tuple[Step, Tensor] | None:
        """The next step, as if no sequence ended by its token or turned back from it; None if there would be none.

        Who ends or turns back all the same is passed over when the step is computed.
        """
        going_on = [
            (place, one)
            for place, sequence in enumerate(drawn.rows)
            if not sequence.ends_with_next
            for one in sequence.both
        ]
        try:
            for place, sequence in going_on:
                sequence.drawn = place
            step, hidden_TD = self._launch(drawn.tokens_B)
        finally:
            for _, sequence in going_on:
                sequence.drawn = None
        return (step, hidden_TD) if step.decoding or step.chunks or step.complete else None

    def _computed(self, step: Step, hidden_TD: Tensor) -> tuple[list[Sequence], Tensor]:
        """Of a step with these states: the sequences that get a token now, and the state [B, D] behind each."""
        self._scheduler.advance(step)
        computed: list[tuple[Sequence, Tensor]] = []
        first = 0
        for sequence, its_rows in step.decoding:
            first += len(its_rows)
            if sequence.num_computed == sequence.num_tokens:
                computed.append((sequence, hidden_TD[first - 1]))
        for sequence, chunk in step.chunks:
            end = first + len(chunk.token_ids)
            if sequence.shadow_of is None:
                self._scores.add_prompt(sequence, chunk, hidden_TD[first:end])
                add_token_values(sequence, hidden_TD[first:end], self.registry)
            if sequence.prompt_states is not None:
                sequence.prompt_states.append(hidden_TD[first:end])
            if chunk.end == sequence.prompt_len:
                sequence.group.last_hidden_D = hidden_TD[end - 1]
            first = end
        for sequence in step.complete:
            if sequence.state is SequenceState.FINISHED:
                continue
            if sequence.request.sampling.max_tokens == 0:
                with self._failing_alone(sequence):
                    self._finish(sequence, FinishReason.LENGTH, prompt_chunk(sequence, self._scores, self.registry))
                continue
            if not self._scheduler.start_decoding(sequence) or sequence.token_ids:
                continue  # It was preempted: its tokens are fed again from the next step on.
            assert sequence.group.last_hidden_D is not None
            computed.append((sequence, sequence.group.last_hidden_D))
        drawing = self._candidates.settle(both_read(computed))
        return [sequence for sequence, _ in drawing], _stacked(drawing)

    def _draw(self, rows: list[Sequence], hidden_BD: Tensor) -> Drawn:
        """Edit, and draw a token for each row. Nothing here waits for a GPU."""
        logits_BV, stats = self._edited_logits(rows, hidden_BD)
        tokens_B = self._token_draw.tokens(logits_BV, rows)
        return Drawn.of(rows, hidden_BD, tokens_B, stats, self._scores.of_tokens(rows, logits_BV, tokens_B))

    def _take_in(self, drawn: Drawn) -> tuple[list[Sequence], Tensor]:
        """Hand the tokens on; the rows that a guardrail lets draw again, and from what."""
        tokens, logprobs, numbers = drawn.read()
        hidden_BD, now_s = drawn.hidden_BD, time.monotonic()
        again: list[tuple[Sequence, Tensor]] = []
        for i, (sequence, token_id) in enumerate(zip(drawn.rows, tokens, strict=True)):
            if sequence.owner.state is SequenceState.FINISHED:
                continue  # Another candidate has failed.
            with self._failing_alone(sequence):
                if token_id < 0:
                    if (mask := sequence.held_to) is not None:
                        mask.check()
                    raise FloatingPointError("no token has a finite logit")
                if sequence.breaks_guard(numbers.get(i)):
                    again += self._repair(sequence, numbers[i], hidden_BD[i])
                    continue
                sequence.keep(hidden_BD[i])
                if sequence.guard is not None:
                    sequence.hold(hidden_BD[i])
                self._grow(sequence, token_id, logprobs.get(i), numbers.get(i), now_s)
        return [sequence for sequence, _ in again], _stacked(again)

    def _repair(self, sequence: Sequence, numbers: list[float], hidden_D: Tensor) -> list[tuple[Sequence, Tensor]]:
        """After a token from a state below its guardrail's bound: the sequence and the state that it draws from again,
        or neither where it ends. Nothing is computed anew, and its neighbours draw once as ever."""
        assert sequence.guard is not None
        if self._ahead is not None:
            self._ahead[0].void.update(sequence.both)
        sequence.emit(sequence.guard.dropped())
        state_D = sequence.draw_again(numbers, hidden_D)
        if state_D is None:
            self._finish(sequence, FinishReason.GUARDRAIL, sequence.guarded_end())
            return []
        self._scheduler.truncate(sequence)
        return [(sequence, state_D)]

    def _edited_logits(self, rows: list[Sequence], hidden_BD: Tensor) -> tuple[Tensor, list[GroupStats]]:
        controls = [sequence.acting_control for sequence in rows]
        if rows != self._plan_rows or not are_same(controls, self._plan_controls):
            self._plan = self.editor.plan(controls, self.registry, device=hidden_BD.device)
            self._plan_rows, self._plan_controls = rows, controls
        started_s = time.perf_counter()
        plan = self._plan.at(lambda row: rows[row].control_state)
        logits_BV, stats = self.editor.logits(hidden_BD, plan, instructed_states(rows))
        if stats:
            self._observer.on_edit(duration_s=time.perf_counter() - started_s)
        return logits_BV, stats

    def _grow(
        self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None, numbers: list[float] | None, now_s: float
    ) -> None:
        """Append one token to a sequence and emit it; finish the sequence when it ends here.

        Raises SchemaTooComplexError, and GenerationError for a token that its schema does not allow.
        """
        if (mask := sequence.held_to) is not None:
            mask.advance(token_id)
        chunk = sequence.grow(
            token_id,
            numbers,
            logprob=logprob,
            prompt_logprobs=self._scores.take_prompt(sequence) if sequence.trial is None else None,
        )
        sequence.observe_token(chunk.edit, now_s)
        if chunk.finish_reason is None or sequence.trial is not None:
            sequence.emit(chunk)
        else:
            self._finish(sequence, chunk.finish_reason, chunk)

    def _score_texts(self, reward: str, sequence: Sequence, answers: list[str]) -> list[float]:
        """What a registered reward says of answers to the sequence's prompt. Raises RewardError, or what it raises."""
        prompt = self._tokenizer.decode(sequence.group.token_ids, skip_special_tokens=True)
        return self.rewards[reward]([prompt] * len(answers), answers)

    @contextmanager
    def _failing_alone(self, sequence: Sequence) -> Iterator[None]:
        """What is raised within ends this sequence, and no other."""
        try:
            yield
        except InvalidRequestError as error:
            _log.info("Request %s cannot go on: %s", sequence.request.request_id, error.message)
            self._finish(sequence, FinishReason.ERROR, error=error)
        except Exception:
            _log.exception("Request %s failed", sequence.request.request_id)
            self._finish(sequence, FinishReason.ERROR)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        chunk: GenerationChunk | None = None,
        error: RecontrolError | None = None,
    ) -> None:
        """Free the sequence's pages and emit its last chunk; only then what a broken device could make fail.

        A candidate's failure is its choice's or its rivals'.
        """
        sequence = sequence.owner
        if sequence.state is SequenceState.FINISHED:
            return
        forgotten = self._scheduler.remove(sequence, reason)
        sequence.emit(sequence.finish(reason, chunk, error))
        sequence.observe_finish(reason, time.monotonic(), prompt_tokens=sequence.num_prompt_computed)
        self.runner.kv.clear(forgotten)
        if sequence.rivals is not None and reason in (FinishReason.ABORT, FinishReason.ERROR):
            for rival in sequence.rivals.members:
                self._finish(rival, reason)


def _stacked(rows: list[tuple[Sequence, Tensor]]) -> Tensor:
    """The states [B, D] of rows."""
    return torch.stack([hidden_D for _, hidden_D in rows]) if rows else torch.empty(0)
