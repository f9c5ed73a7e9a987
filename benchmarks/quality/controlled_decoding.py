"""Controlled decoding, the rival of control by gradients that tries every token by a real forward step.

The K most likely tokens are tried; one is drawn by p(token) exp(w V(state after it)). A lane holds one response: K
candidates, whose pages of the key-value cache share all but the last. When one is chosen, the others go on from its
pages. A token costs K rows of a step. Knows nothing of requests or scheduling; a study drives it while the engine
rests, and no request can ask for it. Enter at `controlled_decoding`.

Shapes: K candidates of a lane, M lanes, B rows of a step, D hidden size, V vocabulary.

Source: Mudgal et al. 2024, Controlled decoding from language models; Khanov et al. 2024, ARGS.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from benchmarks.quality.decoding import DecodingJob, DecodingResult, PagedTexts, eval_samples, jobs_of
from server.cli.arms import ArmFactory
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.layout import DecodeRow
from server.engines.embedded.model.pages import PagePool
from server.engines.embedded.model.runner import ModelRunner
from server.engines.embedded.rollouts import EngineRolloutSource
from server.engines.embedded.sampler import uniform
from value_models.evaluation import Arm
from value_models.generations import EvalSample
from value_models.heads import ValueHead
from value_models.rollouts import RolloutPrompt, RolloutSettings
from value_models.store import tensors_digest


class ControlledDecoding(BaseModel):
    """The weight is of values in standard deviations of the training reward."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_candidates: int = Field(default=8, ge=2)
    value_weight: float = 4.0


def controlled_decoding(factory: ArmFactory, head: str, params: ControlledDecoding) -> Arm:
    """Tokens tried and drawn by a head's value; at temperature 1, whatever the factory's sampling says."""
    return decoding_by_value(factory, head, factory.registry.head(head), params)


def decoding_by_value(factory: ArmFactory, name: str, head: ValueHead, params: ControlledDecoding) -> Arm:
    """By a head of that name that no engine knows."""

    def sample(prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterable[EvalSample]:
        jobs = jobs_of(factory.source, prompts, settings)
        return eval_samples(factory.source, decoder_of(factory.source, head).run(jobs, params))

    search = {"type": "controlled_decoding", **params.model_dump()}
    spec = {"search": search, "heads": {name: tensors_digest(head)}}
    return factory.arm(spec, sample, num_rows=params.num_candidates)


def decoder_of(source: EngineRolloutSource, head: ValueHead) -> ControlledDecoder:
    """On the model of an engine that rests."""
    core = source.core
    assert isinstance(core, EngineCore)
    return ControlledDecoder(
        core.runner, core.page_pool, head, source.loaded.eos_token_ids, max_rows=core.max_batch_size
    )


@dataclass(slots=True)
class _Candidate:
    """A token that is tried; one that ends the text keeps the value of the state behind it."""

    pages: list[int]
    hidden_D: Tensor
    value: float
    token_id: int = -1
    logp: float = 0.0


@dataclass(slots=True)
class _Lane:
    result: DecodingResult
    hidden_D: Tensor
    """Behind the next token."""
    candidates: list[_Candidate]

    @property
    def length(self) -> int:
        """Positions that all candidates share."""
        return len(self.result.job.prompt_token_ids) + len(self.result.token_ids)


class ControlledDecoder:
    """Uses a runner that nobody else uses meanwhile."""

    def __init__(
        self, runner: ModelRunner, pool: PagePool, head: ValueHead, eos_token_ids: frozenset[int], *, max_rows: int
    ) -> None:
        self._runner = runner
        self._texts = PagedTexts(runner, pool)
        self._head = head
        self._eos_token_ids = eos_token_ids
        self._max_rows = max_rows

    @torch.inference_mode()
    def run(self, jobs: Iterable[DecodingJob], params: ControlledDecoding) -> Iterator[DecodingResult]:
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
                self._propose(lanes, width)
                self._advance(lanes)
                for lane in lanes:
                    lane.result.wall_s += (time.perf_counter() - started_s) / len(lanes)
                for lane in list(lanes):
                    chosen = self._choose(lane, params)
                    if lane.result.is_finished or len(lane.result.token_ids) >= lane.result.job.max_tokens:
                        lanes.remove(lane)
                        self._release(lane.candidates)
                        yield lane.result
                    else:
                        self._release(candidate for candidate in lane.candidates if candidate is not chosen)
                        lane.hidden_D = chosen.hidden_D
                        lane.candidates = self._spread(chosen, lane.length, width)
        finally:
            for lane in lanes:
                self._release(lane.candidates)

    def _open(self, job: DecodingJob, width: int) -> _Lane:
        prompt = list(job.prompt_token_ids)
        pages, hidden_D = self._texts.read(prompt)
        first = _Candidate(pages, hidden_D, self._values(hidden_D[None])[0])
        return _Lane(DecodingResult(job), hidden_D, self._spread(first, len(prompt), width))

    def _spread(self, chosen: _Candidate, length: int, width: int) -> list[_Candidate]:
        """As many candidates that go on from one, the first of them in its pages."""
        pages = [chosen.pages, *(self._texts.fork(chosen.pages, length) for _ in range(width - 1))]
        return [_Candidate(its_pages, chosen.hidden_D, chosen.value) for its_pages in pages]

    def _release(self, candidates: Iterable[_Candidate]) -> None:
        for candidate in candidates:
            self._texts.release(candidate.pages)

    def _propose(self, lanes: list[_Lane], width: int) -> None:
        """Give the candidates of every lane the tokens that are likeliest next."""
        hidden_MD = torch.stack([lane.hidden_D for lane in lanes])
        best = self._runner.lm_head.logits(hidden_MD).log_softmax(dim=-1).topk(width, dim=-1)
        for lane, logps, tokens in zip(lanes, best.values.tolist(), best.indices.tolist(), strict=True):
            for candidate, logp, token_id in zip(lane.candidates, logps, tokens, strict=True):
                candidate.token_id, candidate.logp = token_id, logp

    def _advance(self, lanes: list[_Lane]) -> None:
        """One step of the model for every candidate."""
        rows: list[DecodeRow] = []
        for lane in lanes:
            for candidate in lane.candidates:
                self._texts.extend(candidate.pages, lane.length + 1)
                rows.append(DecodeRow(candidate.pages, lane.length, candidate.token_id))
        hidden_BD = self._runner.forward(rows, [])
        tried = [candidate for lane in lanes for candidate in lane.candidates]
        for candidate, hidden_D, value in zip(tried, hidden_BD, self._values(hidden_BD), strict=True):
            if candidate.token_id not in self._eos_token_ids:
                candidate.hidden_D, candidate.value = hidden_D, value

    def _choose(self, lane: _Lane, params: ControlledDecoding) -> _Candidate:
        """Draw a candidate, whose token then belongs to the response."""
        result = lane.result
        place, kl = _draw(lane, params.value_weight)
        chosen = lane.candidates[place]
        result.states.append(lane.hidden_D)
        result.token_ids.append(chosen.token_id)
        result.kl.append(kl)
        result.is_finished = chosen.token_id in self._eos_token_ids
        return chosen

    def _values(self, hidden_BD: Tensor) -> list[float]:
        """In standard deviations of the training reward."""
        return self._head.readout(self._head.units(hidden_BD))[0].tolist()


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
