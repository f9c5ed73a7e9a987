"""Value-guided search, the rival of control by gradients: continuations are tried by real forward steps.

    ControlledDecoding   the K most likely tokens are tried; one is drawn by p(token) exp(w V(state after it))
    BlockwiseBestOf      K continuations of b tokens are sampled; the one whose last state has the highest value goes on

A lane holds one response: K candidates, whose pages of the key-value cache share their beginning. When candidates are
compared, the others go on from the chosen one's pages. A token costs K rows of a step. Knows nothing of requests or
scheduling; evaluation drives it while the engine rests. Enter at `ValueSearch.run`.

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

from server.engines.embedded.model.attention import DecodeRow, Segment
from server.engines.embedded.model.kv_cache import fork_pages
from server.engines.embedded.model.pages import PagePool, num_pages_for
from server.engines.embedded.model.runner import ModelRunner
from server.engines.embedded.sampler import RowSampling, sample, uniform
from value_models.generations import best_of_kl_bound
from value_models.heads import ValueHead

_PREFILL_CHUNK_TOKENS = 256
_NO_ROOM = "the key-value cache has no room for these candidates; set kv_cache_gib higher"


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

    pages: list[int]
    hidden_D: Tensor
    value: float
    token_ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    logp: float = 0.0
    is_ended: bool = False


@dataclass(slots=True)
class _Lane:
    result: SearchResult
    candidates: list[_Candidate]

    @property
    def length(self) -> int:
        """Positions that all candidates share."""
        return len(self.result.job.prompt_token_ids) + len(self.result.token_ids)


class ValueSearch:
    """Uses a runner that nobody else uses meanwhile."""

    def __init__(
        self, runner: ModelRunner, pool: PagePool, head: ValueHead, eos_token_ids: frozenset[int], *, max_rows: int
    ) -> None:
        self._runner = runner
        self._pool = pool
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
        lanes: list[_Lane] = []
        try:
            while queue or lanes:
                started_s = time.perf_counter()
                while queue and len(lanes) < self._max_rows // width:
                    lanes.append(self._open(queue.popleft(), width))
                self._propose(lanes, params)
                self._advance(lanes)
                for lane in lanes:
                    lane.result.wall_s += (time.perf_counter() - started_s) / len(lanes)
                for lane in [lane for lane in lanes if self._is_due(lane, params)]:
                    self._commit(lane, params)
                    if self._is_done(lane):
                        lanes.remove(lane)
                        self._release(lane.candidates)
                        yield lane.result
        finally:
            for lane in lanes:
                self._release(lane.candidates)

    def _open(self, job: SearchJob, width: int) -> _Lane:
        prompt = list(job.prompt_token_ids)
        pages = self._take(num_pages_for(len(prompt)))
        hidden_TD = torch.empty(0)
        for start in range(0, len(prompt), _PREFILL_CHUNK_TOKENS):
            chunk = prompt[start : start + _PREFILL_CHUNK_TOKENS]
            hidden_TD = self._runner.forward([], [Segment(pages, start, chunk)])
        first = _Candidate(pages, hidden_TD[-1], self._values(hidden_TD[-1:])[0])
        return _Lane(SearchResult(job), self._spread(first, len(prompt), width))

    def _spread(self, chosen: _Candidate, length: int, width: int) -> list[_Candidate]:
        """As many candidates that go on from one, the first of them in its pages."""
        pages = [chosen.pages]
        for _ in range(width - 1):
            forked = fork_pages(self._runner.kv, self._pool, chosen.pages, length)
            if forked is None:
                raise RuntimeError(_NO_ROOM)
            pages.append(forked)
        return [_Candidate(its_pages, chosen.hidden_D, chosen.value) for its_pages in pages]

    def _take(self, count: int) -> list[int]:
        pages = self._pool.take(count)
        if pages is None:
            raise RuntimeError(_NO_ROOM)
        return pages

    def _release(self, candidates: Iterable[_Candidate]) -> None:
        for candidate in candidates:
            self._runner.kv.clear(self._pool.release(candidate.pages, forget=True))

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

    def _advance(self, lanes: list[_Lane]) -> None:
        """One step of the model for every candidate that has not ended."""
        placed = [(lane, candidate) for lane in lanes for candidate in lane.candidates if not candidate.is_ended]
        rows: list[DecodeRow] = []
        for lane, candidate in placed:
            length = lane.length + len(candidate.token_ids)
            candidate.pages += self._take(num_pages_for(length) - len(candidate.pages))
            rows.append(DecodeRow(candidate.pages, length - 1, candidate.token_ids[-1]))
        hidden_BD = self._runner.forward(rows, [])
        for (_, candidate), hidden_D, value in zip(placed, hidden_BD, self._values(hidden_BD), strict=True):
            if candidate.token_ids[-1] in self._eos_token_ids:
                candidate.is_ended = True
            else:
                candidate.hidden_D, candidate.value = hidden_D, value

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
        best = lane.candidates[chosen]
        result.token_ids += best.token_ids
        result.states += best.states
        result.kl += [kl / len(best.token_ids)] * len(best.token_ids)
        result.is_finished = best.is_ended
        if not self._is_done(lane):
            self._release(candidate for candidate in lane.candidates if candidate is not best)
            lane.candidates = self._spread(best, lane.length, width)

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
