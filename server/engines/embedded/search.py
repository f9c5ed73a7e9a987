"""Value-guided search, the rival of control by gradients: continuations are tried by real forward steps.

    ControlledDecoding   the K most likely tokens are tried; one is drawn by p(token) exp(w V(state after it))
    BlockwiseBestOf      K continuations of b tokens are sampled; the one whose last state has the highest value goes on

A lane holds one response: K neighbouring slots of the key-value cache with the same prefix, one for each candidate.
When candidates are compared, the chosen one's keys and values go to the others. A token costs K rows of a step. Knows
nothing of requests or scheduling; evaluation drives it while the engine rests. Enter at `ValueSearch.run`.

Shapes: K candidates of a lane, B rows of a step, D hidden size, V vocabulary.

Source: Mudgal et al. 2024, Controlled decoding from language models; Khanov et al. 2024, ARGS.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from server.engines.embedded.attention import Segment
from server.engines.embedded.runner import DecodeRow, ModelRunner
from server.engines.embedded.sampler import RowSampling, sample, uniform
from value_models.generations import best_of_kl_bound
from value_models.heads import ValueHead

_PREFILL_CHUNK_TOKENS = 256


class ControlledDecoding(BaseModel):
    """Token by token; the weight is of values in standard deviations of the training reward."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["controlled_decoding"] = "controlled_decoding"
    num_candidates: int = Field(default=8, ge=2)
    value_weight: float = 4.0

    @property
    def block_tokens(self) -> int:
        return 1


class BlockwiseBestOf(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["blockwise_best_of"] = "blockwise_best_of"
    num_candidates: int = Field(default=4, ge=2)
    block_tokens: int = Field(default=8, ge=1)


SearchParams = ControlledDecoding | BlockwiseBestOf


@dataclass(slots=True, frozen=True)
class SearchJob:
    """One response to one prompt; (seed, index) is the key of its random stream."""

    prompt_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(slots=True)
class SearchResult:
    """`kl` is in nats a token: exact for ControlledDecoding, for BlockwiseBestOf the bound log K - (K - 1) / K a block
    (Beirami et al. 2024) spread over its tokens."""

    job: SearchJob
    token_ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    """The state behind each token."""
    kl: list[float] = field(default_factory=list)
    is_finished: bool = False
    wall_s: float = 0.0
    """Each step's seconds, shared by the lanes it served."""


@dataclass(slots=True)
class _Candidate:
    """A continuation since the last comparison; an ended one keeps the value of the state that ended it."""

    hidden_D: Tensor
    value: float
    token_ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    logp: float = 0.0
    is_ended: bool = False


@dataclass(slots=True)
class _Lane:
    first_slot: int
    result: SearchResult
    candidates: list[_Candidate]

    @property
    def length(self) -> int:
        """Positions that all candidates share."""
        return len(self.result.job.prompt_token_ids) + len(self.result.token_ids)


class ValueSearch:
    """Uses all slots of a runner that nobody else uses meanwhile."""

    def __init__(self, runner: ModelRunner, head: ValueHead, eos_token_ids: frozenset[int], *, max_rows: int) -> None:
        self._runner = runner
        self._head = head
        self._eos_token_ids = eos_token_ids
        self._max_rows = max_rows

    @torch.inference_mode()
    def run(self, jobs: Iterable[SearchJob], params: SearchParams) -> Iterator[SearchResult]:
        """Results in the order in which they end. Raises ValueError when the candidates of one job need more rows than
        there are."""
        width = params.num_candidates
        if width > self._max_rows:
            raise ValueError(f"num_candidates is {width}, but only {self._max_rows} rows fit a step")
        queue = deque(jobs)
        lanes: list[_Lane | None] = [None] * min(self._max_rows // width, len(queue))
        try:
            while queue or any(lanes):
                started_s = time.perf_counter()
                for i, lane in enumerate(lanes):
                    if lane is None and queue:
                        lanes[i] = self._open(i * width, queue.popleft(), width)
                while lanes and lanes[-1] is None:
                    lanes.pop()
                running = [lane for lane in lanes if lane is not None]
                self._propose(running, params)
                self._advance(running, len(lanes) * width)
                for lane in running:
                    lane.result.wall_s += (time.perf_counter() - started_s) / len(running)
                for i, lane in enumerate(lanes):
                    if lane is not None and self._is_due(lane, params):
                        self._commit(lane, params)
                        if self._is_done(lane):
                            lanes[i] = None
                            yield lane.result
        finally:
            for slot in range(self._max_rows):
                self._runner.kv.clear(slot, self._runner.kv.capacity)

    def _open(self, first_slot: int, job: SearchJob, width: int) -> _Lane:
        prompt = list(job.prompt_token_ids)
        hidden_TD = torch.empty(0)
        for start in range(0, len(prompt), _PREFILL_CHUNK_TOKENS):
            chunk = prompt[start : start + _PREFILL_CHUNK_TOKENS]
            hidden_TD = self._runner.forward([], [Segment(first_slot, start, chunk)])
        for slot in range(first_slot + 1, first_slot + width):
            self._runner.kv.copy(first_slot, slot, len(prompt))
        value = self._values(hidden_TD[-1:])[0]
        return _Lane(first_slot, SearchResult(job), [_Candidate(hidden_TD[-1], value) for _ in range(width)])

    def _propose(self, lanes: list[_Lane], params: SearchParams) -> None:
        """Give every candidate that has not ended its next token."""
        if isinstance(params, ControlledDecoding):
            hidden_MD = torch.stack([lane.candidates[0].hidden_D for lane in lanes])
            logp_MV = self._runner.lm_head.logits(hidden_MD).log_softmax(dim=-1)
            best = logp_MV.topk(params.num_candidates, dim=-1)
            for lane, logps, tokens in zip(lanes, best.values.tolist(), best.indices.tolist(), strict=True):
                for candidate, logp, token_id in zip(lane.candidates, logps, tokens, strict=True):
                    _extend(candidate, token_id)
                    candidate.logp = logp
            return
        rows = [(lane, k) for lane in lanes for k in range(params.num_candidates)]
        hidden_MD = torch.stack([lane.candidates[k].hidden_D for lane, k in rows])
        sampling = [_row_sampling(lane.result.job, k, params.num_candidates) for lane, k in rows]
        positions = [len(lane.result.token_ids) + len(lane.candidates[k].token_ids) for lane, k in rows]
        tokens_M = sample(self._runner.lm_head.logits(hidden_MD), sampling, positions)
        for (lane, k), token_id in zip(rows, tokens_M.tolist(), strict=True):
            if not lane.candidates[k].is_ended:
                _extend(lane.candidates[k], token_id)

    def _advance(self, lanes: list[_Lane], num_rows: int) -> None:
        """One step of the model for every candidate; row b of the step is slot b, so empty lanes have idle rows."""
        rows = [DecodeRow(0, 0) for _ in range(num_rows)]
        placed = [
            (lane.first_slot + k, lane, candidate) for lane in lanes for k, candidate in enumerate(lane.candidates)
        ]
        for slot, lane, candidate in placed:
            rows[slot] = DecodeRow(lane.length + len(candidate.token_ids) - 1, candidate.token_ids[-1])
        hidden_BD = self._runner.forward(rows, [])
        values = self._values(hidden_BD)
        for slot, _, candidate in placed:
            if candidate.token_ids[-1] in self._eos_token_ids:
                candidate.is_ended = True
            elif not candidate.is_ended:
                candidate.hidden_D, candidate.value = hidden_BD[slot], values[slot]

    def _is_due(self, lane: _Lane, params: SearchParams) -> bool:
        room = min(params.block_tokens, lane.result.job.max_tokens - len(lane.result.token_ids))
        return all(candidate.is_ended or len(candidate.token_ids) >= room for candidate in lane.candidates)

    def _is_done(self, lane: _Lane) -> bool:
        return lane.result.is_finished or len(lane.result.token_ids) >= lane.result.job.max_tokens

    def _commit(self, lane: _Lane, params: SearchParams) -> None:
        """Choose a candidate, and let all go on from it."""
        result, width = lane.result, params.num_candidates
        if isinstance(params, ControlledDecoding):
            chosen, kl = _draw(lane, params.value_weight)
        else:
            chosen = max(range(width), key=lambda k: lane.candidates[k].value)
            kl = best_of_kl_bound(width)
        best, shared = lane.candidates[chosen], lane.length
        result.token_ids += best.token_ids
        result.states += best.states
        result.kl += [kl / len(best.token_ids)] * len(best.token_ids)
        result.is_finished = best.is_ended
        if not self._is_done(lane):
            for slot in range(lane.first_slot, lane.first_slot + width):
                if slot != lane.first_slot + chosen:
                    self._runner.kv.copy(lane.first_slot + chosen, slot, lane.length, start=shared)
            lane.candidates = [_Candidate(best.hidden_D, best.value) for _ in range(width)]

    def _values(self, hidden_BD: Tensor) -> list[float]:
        """In standard deviations of the training reward."""
        return self._head.readout(self._head.units(hidden_BD))[0].tolist()


def _extend(candidate: _Candidate, token_id: int) -> None:
    candidate.states.append(candidate.hidden_D)
    candidate.token_ids.append(token_id)


def _row_sampling(job: SearchJob, k: int, width: int) -> RowSampling:
    return RowSampling(job.temperature, job.top_p, 0, (job.seed, job.index * width + k))


def _draw(lane: _Lane, value_weight: float) -> tuple[int, float]:
    """A candidate by q ~ p exp(w V), and KL(q || p) over the whole vocabulary, which q leaves but for K tokens."""
    scores = [candidate.logp + value_weight * candidate.value for candidate in lane.candidates]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    kl = sum(q * (math.log(q) - c.logp) for q, c in zip(shares, lane.candidates, strict=True) if q > 0)
    job = lane.result.job
    u = uniform((job.seed, job.index), len(lane.result.token_ids))
    for k, share in enumerate(shares):
        u -= share
        if u < 0:
            return k, kl
    return len(shares) - 1, kl
