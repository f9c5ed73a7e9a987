"""Several continuations of one text, compared by what the objective says of them, of which the best is kept.

    blocks     a choice, the leader, keeps the text so far and its pages, while candidates try the next block, each in a
               copy of them; when all have arrived the leader takes over the best one's, and they begin anew
    best_of    candidates are whole responses; when all have ended, the best become the request's choices

A candidate is compared by the state behind its last token, which has to be computed first; the step that does so draws
the next block's first tokens as well. Where a search names a reward, that scores the texts so far instead. Candidates
for a block hold their rows at once and lose their pages together: a leader that gives way drops them, and later they
draw the same tokens anew. Candidates for a whole response run as rows become free. One that breaks the guardrail is
kept only when all do. Where control does not act, a choice that is searched for goes on by itself, as without search.
Where the server pins heads, a caller's search keeps none that those score lower than what there would be without it.

Knows nothing of models: it is told scores. Enter at `with_candidates` and `Candidates.settle`.

Shapes: C candidates, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from server.control.params import ControlParams, UnderPinned
from server.engines.embedded.model.pages import num_pages_for
from server.engines.embedded.scheduler import Scheduler
from server.engines.embedded.sequence import PromptScores, Rivals, Sequence, SequenceState, Trial, with_search
from server.errors import InvalidRequestError
from server.types import FinishReason, GenerationChunk, GenerationRequest, SearchReport

_PARAM = "control.search.candidates"
Rows = list[tuple[Sequence, Tensor]]
"""Sequences, each with the state [D] behind its next token."""


def with_candidates(choices: list[Sequence]) -> list[Sequence]:
    """The choices leading candidates if their request searches, or being candidates themselves with `best_of`."""
    request, emit = choices[0].request, choices[0].emit
    if request.search is not None:
        for choice in choices:
            choice.emit = _keeping_answer(choice)
            choice.candidates = [_candidate(choice, number) for number in range(request.search.candidates)]
    elif request.best_of is not None:
        rivals = Rivals(choices, emit, choices[0].emit_all)
        for choice in choices:
            choice.rivals, choice.trial = rivals, Trial(emit, index=0)
            choice.emit = _taking(rivals, choice)
    return choices


def check_room(request: GenerationRequest, *, max_rows: int, num_pages: int) -> None:
    """Whether a block's candidates fit the engine when they have it for themselves. Raises InvalidRequestError."""
    search = request.search
    if search is None:
        return
    if search.candidates > max_rows:
        raise InvalidRequestError(f"{_PARAM}: this server runs {max_rows} rows at once at most", param=_PARAM)
    max_tokens = request.sampling.max_tokens
    # Each holds the page that its block begins in, and those that the block fills.
    own = num_pages_for(min(search.block_tokens, max_tokens)) + 1
    needed = num_pages_for(len(request.prompt_token_ids) + max_tokens) + search.candidates * own
    if needed > num_pages:
        raise InvalidRequestError(
            f"{_PARAM}: {search.candidates} candidates for blocks of {search.block_tokens} tokens may take "
            f"{needed} pages of keys and values; this server has {num_pages}",
            param=_PARAM,
        )


class Candidates:
    """Follows candidates from step to step. `score` says of states [C, D] what a request's objective does, [C], and
    `score_texts` of a sequence's answers so far what a registered reward does, by its name; `take_scores` gives the
    log-probabilities of a sequence's prompt once; `finish` ends one with its last chunk, and what is raised within
    `failing_alone` ends that sequence and no other."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        score: Callable[[Tensor, ControlParams], Tensor],
        score_texts: Callable[[str, Sequence, list[str]], list[float]],
        take_scores: Callable[[Sequence], PromptScores | None],
        finish: Callable[[Sequence, FinishReason, GenerationChunk | None], None],
        failing_alone: Callable[[Sequence], AbstractContextManager[None]],
    ) -> None:
        self._scheduler = scheduler
        self._score = score
        self._score_texts = score_texts
        self._take_scores = take_scores
        self._finish = finish
        self._failing_alone = failing_alone

    def settle(self, computed: Rows) -> Rows:
        """Of the sequences whose states are computed, those that draw a token now; compares what has to be compared."""
        drawing: Rows = []
        for sequence, hidden_D in computed:
            with self._failing_alone(sequence):
                drawing += self._settle(sequence, hidden_D)
        # Who needed pages may have taken those of candidates; a choice keeps its state and draws all the same.
        return [(sequence, hidden_D) for sequence, hidden_D in drawing if sequence.leader is None or sequence.pages]

    def _settle(self, sequence: Sequence, hidden_D: Tensor) -> Rows:
        if sequence.candidates and sequence.is_controlled:
            return self._begin(sequence, hidden_D)
        trial, leader = sequence.trial, sequence.leader
        if trial is None:
            return [(sequence, hidden_D)]
        if sequence.state is not SequenceState.DECODING:
            # Its leader has just given way, or its rivals have failed.
            return []
        if not _is_at_end(sequence, trial):
            # A copy, here and below: where steps are recorded, the next one's states come to the same place.
            trial.hidden_D = hidden_D.clone()
            return [(sequence, hidden_D)]
        if not bool(hidden_D.isfinite().all()):
            raise FloatingPointError("the model's state is not finite")
        if sequence.token_ids[-1] not in sequence.end_token_ids:
            trial.hidden_D = hidden_D.clone()
        trial.has_arrived = True
        if leader is None:
            self._end(sequence, trial)
        elif all(candidate.own_trial.has_arrived for candidate in leader.candidates):
            return self._keep_best(leader)
        return []

    def _begin(self, leader: Sequence, hidden_D: Tensor) -> Rows:
        """Let the candidates try the next block, if there are pages; else the leader waits for some."""
        if not self._scheduler.spread(leader):
            return []
        for candidate in leader.candidates:
            trial = candidate.own_trial
            trial.chunks, trial.hidden_D, trial.has_arrived = [], hidden_D.clone(), False
            candidate.go_on_from(leader)
            candidate.states, candidate.acted = None if leader.states is None else [], []
        return [(candidate, hidden_D) for candidate in leader.candidates]

    def _keep_best(self, leader: Sequence) -> Rows:
        place, leader.search_report = self._order(leader.candidates)[0]
        winner = leader.candidates[place]
        trial = winner.own_trial
        chunks = trial.chunks
        if not leader.token_ids:
            leader.observe_first_token(time.monotonic())
            chunks[0] = replace(chunks[0], prompt_logprobs=self._take_scores(leader))
        leader.go_on_from(winner)
        if leader.states is not None:
            leader.states += winner.states or []
            leader.acted += winner.acted
        for candidate in leader.candidates:
            candidate.own_trial.num_told = 0
        self._scheduler.gather(leader, winner)
        leader.answer += "".join(chunk.text for chunk in chunks[:-1])
        leader.emit_all(chunks[:-1])
        if trial.reason is not None:
            self._finish(leader, trial.reason, chunks[-1])
            return []
        leader.emit(chunks[-1])
        assert trial.hidden_D is not None
        return self._settle(leader, trial.hidden_D)

    def _end(self, member: Sequence, trial: Trial) -> None:
        """Free a whole response; when it is the last, tell of the best."""
        assert trial.reason is not None
        self._finish(member, trial.reason, trial.chunks.pop())
        rivals = member.rivals
        if rivals is not None and all(rival.finish_reason is not None for rival in rivals.members):
            rivals.tell(self._order(rivals.members), self._take_scores(rivals.members[0]))

    def _order(self, candidates: list[Sequence]) -> list[tuple[int, SearchReport]]:
        """Their places with their scores, best first: a broken guardrail and what is no number last, the first where
        equal."""
        control = candidates[0].request.control
        assert control is not None
        states_CD = torch.stack([hidden_D for c in candidates if (hidden_D := c.own_trial.hidden_D) is not None])
        scores = self._scores_of(candidates, states_CD, control)
        reports = [SearchReport(score if math.isfinite(score) else None) for score in scores]
        if isinstance(control, UnderPinned):
            num_kept = 1 if candidates[0].leader is not None else candidates[0].request.num_choices
            allowed = _not_taken_back(self._score(states_CD, control.pinned).tolist(), num_kept)
            scores = [
                score if is_allowed else pinned for score, (is_allowed, pinned) in zip(scores, allowed, strict=True)
            ]
        else:
            allowed = [(True, 0.0)] * len(scores)

        def rank(place: int) -> tuple[bool, bool, bool, float]:
            is_nan = scores[place] != scores[place]
            return (
                candidates[place].own_trial.reason is FinishReason.GUARDRAIL,
                not allowed[place][0],
                is_nan,
                0.0 if is_nan else -scores[place],
            )

        return [(place, reports[place]) for place in sorted(range(len(candidates)), key=rank)]

    def _scores_of(self, candidates: list[Sequence], states_CD: Tensor, control: ControlParams) -> list[float]:
        """By the objective, or by the reward that the search names."""
        leader = candidates[0].leader
        if leader is None or control.search is None or control.search.reward is None:
            return self._score(states_CD, control).tolist()
        added = ("".join(chunk.text for chunk in candidate.own_trial.chunks) for candidate in candidates)
        return self._score_texts(control.search.reward, leader, [leader.answer + text for text in added])


def _not_taken_back(pinned: list[float], num_kept: int) -> list[tuple[bool, float]]:
    """Which candidates may win by a caller's objective where the server pins heads, with the pinned objective of each:
    those that it scores no lower than any that there would be without a search, which come first. The rest follow by
    that objective, so that what is kept is by its mean no worse than without."""
    bar = max(pinned[:num_kept])
    return [(score >= bar, score) for score in pinned]


def _candidate(leader: Sequence, number: int) -> Sequence:
    """The first draws as the leader itself would."""
    trial, stream = Trial(leader.emit, leader.index), leader.row_sampling.stream
    return replace(
        leader,
        emit=trial.take,
        row_sampling=replace(leader.row_sampling, stream=(*stream, number) if number else stream),
        trial=trial,
        leader=leader,
        candidates=[],
        pages=[],
    )


def _taking(rivals: Rivals, member: Sequence) -> Callable[[GenerationChunk], None]:
    return lambda chunk: rivals.take(member, chunk)


def _keeping_answer(choice: Sequence) -> Callable[[GenerationChunk], None]:
    emit = choice.emit

    def keep(chunk: GenerationChunk) -> None:
        choice.answer += chunk.text
        emit(chunk if choice.search_report is None else with_search(chunk, choice.search_report))

    return keep


def _is_at_end(candidate: Sequence, trial: Trial) -> bool:
    if trial.reason is not None:
        return True
    leader, search = candidate.leader, candidate.request.search
    if leader is None or search is None:
        return False
    # A block ends where control does.
    return not candidate.is_controlled or len(candidate.token_ids) - len(leader.token_ids) >= search.block_tokens
