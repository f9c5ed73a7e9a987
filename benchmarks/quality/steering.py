"""Activation steering as a rival: something is added to the states that enter one layer, all through a response.

Its keys and values are those of the steered states, as the method has it. So that its divergence is held to the same
budget as every other method's, the unsteered model runs beside it over the same text: the logits of both are joined as
base + s (steered - base), with the largest s up to 1 whose exact KL from the base model is within the budget. A token
costs two rows of a step. A study drives this while the engine rests. Enter at `activation_steering`; steering_fit.py
finds what to add.

Shapes: M lanes, T rows of a step, D hidden size, V vocabulary.

Source: Panickssery et al. 2024, Steering Llama 2 via contrastive activation addition (arXiv 2312.06681).
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.decoding import DecodingJob, DecodingResult, PagedTexts, eval_samples, jobs_of
from server.cli.arms import ArmFactory
from server.control.budget import largest_linear_scale
from server.engines.embedded.core import EngineCore
from server.engines.embedded.divergence import kl
from server.engines.embedded.model.layout import DecodeRow
from server.engines.embedded.sampler import RowSampling, sample
from value_models.evaluation import Arm
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings


@dataclass(slots=True, frozen=True)
class Steering:
    """What is added to the states that enter a layer: a direction, as often as a probe of the state says.

    Without a probe that is once in every state. With one it is max(0, probe . h + offset).
    """

    layer: int
    direction_D: Tensor
    probe_D: Tensor | None = None
    offset: float = 0.0

    def moved(self, hidden_TD: Tensor, strength: float) -> Tensor:
        """States of a layer [T, D] and what is added at this strength, in their own dtype."""
        states_TD = hidden_TD.float()
        times_T1 = torch.ones_like(states_TD[:, :1])
        if self.probe_D is not None:
            times_T1 = (states_TD @ self.probe_D + self.offset).clamp(min=0.0)[:, None]
        return (states_TD + strength * times_T1 * self.direction_D).to(hidden_TD.dtype)

    def scaled(self, factor: float) -> Steering:
        """In another unit of strength."""
        return Steering(self.layer, factor * self.direction_D, self.probe_D, self.offset)

    def tensors(self) -> dict[str, Tensor]:
        """As files have it; `of` reads it."""
        probe = {} if self.probe_D is None else {"probe": self.probe_D, "offset": torch.tensor(self.offset)}
        return {"layer": torch.tensor(self.layer), "direction": self.direction_D, **probe}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Steering:
        offset = float(tensors["offset"]) if "offset" in tensors else 0.0
        return cls(int(tensors["layer"]), tensors["direction"], tensors.get("probe"), offset)

    def digest(self) -> str:
        """What tells it from any other."""
        parts = (tensor.contiguous().numpy().tobytes() for _, tensor in sorted(self.tensors().items()))
        return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(slots=True, frozen=True)
class SteeringWatch:
    """Steers some rows [T] bool of a step."""

    steering: Steering
    strength: float
    is_steered_T: Tensor

    def saw(self, layer: int, what: str, given: Tensor) -> Tensor:
        if what != "entered" or layer != self.steering.layer:
            return given
        return torch.where(self.is_steered_T[:, None], self.steering.moved(given, self.strength), given)


@dataclass(slots=True)
class _Lane:
    """A response with its two texts, which differ in their keys and values alone."""

    result: DecodingResult
    base_pages: list[int]
    steered_pages: list[int]

    @property
    def token_ids(self) -> list[int]:
        return [*self.result.job.prompt_token_ids, *self.result.token_ids]


class SteeredDecoder:
    """Uses a model that nobody else uses meanwhile."""

    def __init__(self, core: EngineCore, steering: Steering, *, strength: float, max_kl: float) -> None:
        self._core = core
        self._runner, self._texts = core.runner, PagedTexts(core.runner, core.page_pool)
        self._steering, self._strength, self._max_kl = steering, strength, max_kl

    @torch.inference_mode()
    def run(
        self, jobs: Iterable[DecodingJob], settings: RolloutSettings, eos_token_ids: frozenset[int]
    ) -> Iterator[DecodingResult]:
        """Results in the order in which they end; tokens are drawn as the engine draws them."""
        queue = deque(jobs)
        lanes: list[_Lane] = []
        try:
            while queue or lanes:
                started_s = time.perf_counter()
                while queue and len(lanes) < max(self._core.max_batch_size // 2, 1):
                    lanes.append(self._open(queue.popleft()))
                self._step(lanes, settings)
                for lane in lanes:
                    lane.result.wall_s += (time.perf_counter() - started_s) / len(lanes)
                for lane in list(lanes):
                    result = lane.result
                    result.is_finished = result.token_ids[-1] in eos_token_ids
                    if result.is_finished or len(result.token_ids) >= result.job.max_tokens:
                        lanes.remove(lane)
                        self._release(lane)
                        yield result
        finally:
            for lane in lanes:
                self._release(lane)

    def _open(self, job: DecodingJob) -> _Lane:
        """Both texts read the prompt but for its last token, whose state draws the first of the response."""
        read = list(job.prompt_token_ids[:-1])
        pages, _ = self._texts.read(read)
        return _Lane(DecodingResult(job), pages, self._texts.fork(pages, len(read)))

    def _release(self, lane: _Lane) -> None:
        for pages in (lane.steered_pages, lane.base_pages):
            self._texts.release(pages)

    def _step(self, lanes: list[_Lane], settings: RolloutSettings) -> None:
        """A token for every lane."""
        rows: list[DecodeRow] = []
        for pages_of in (lambda lane: lane.base_pages, lambda lane: lane.steered_pages):
            for lane in lanes:
                pages, token_ids = pages_of(lane), lane.token_ids
                self._texts.extend(pages, len(token_ids))
                rows.append(DecodeRow(pages, len(token_ids) - 1, token_ids[-1]))
        is_steered_T = torch.arange(len(rows)) >= len(lanes)
        hidden_TD = self._runner.forward(rows, [], watch=SteeringWatch(self._steering, self._strength, is_steered_T))
        both_TV = self._runner.lm_head.logits(hidden_TD)
        base_MV, steered_MV = both_TV[: len(lanes)], both_TV[len(lanes) :]
        logits_MV = within_budget(base_MV, steered_MV, self._max_kl)
        sampling = [_row_sampling(lane.result.job, settings) for lane in lanes]
        tokens = sample(logits_MV, sampling, [len(lane.result.token_ids) for lane in lanes]).tolist()
        if min(tokens) < 0:
            raise FloatingPointError("no token has a finite logit")
        for lane, state_D, token_id, nats in zip(
            lanes, hidden_TD, tokens, kl(logits_MV, base_MV).tolist(), strict=False
        ):
            lane.result.states.append(state_D)
            lane.result.token_ids.append(token_id)
            lane.result.kl.append(nats)


def within_budget(base_MV: Tensor, steered_MV: Tensor, max_kl: float) -> Tensor:
    """As much of the way from one row of logits to another as the budget allows, in nats."""
    base_MV, delta_MV = base_MV.contiguous(), (steered_MV - base_MV).contiguous()
    max_kl_M = torch.full_like(base_MV[:, 0], max_kl)
    scale_M, _ = largest_linear_scale(base_MV, torch.arange(len(base_MV)), delta_MV, max_kl_M)
    return torch.addcmul(base_MV, scale_M[:, None], delta_MV)


def activation_steering(factory: ArmFactory, steering: Steering, *, strength: float, max_kl: float) -> Arm:
    """`strength` times what a steering adds, within `max_kl` nats at every token."""
    source = factory.source
    core = source.core
    assert isinstance(core, EngineCore)

    def samples(prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterable[EvalSample]:
        decoder = SteeredDecoder(core, steering, strength=strength, max_kl=max_kl)
        jobs = jobs_of(source, prompts, settings)
        return eval_samples(source, decoder.run(jobs, settings, source.loaded.eos_token_ids))

    spec = {"steering": {"tensors": steering.digest(), "strength": strength, "max_kl": max_kl}}
    return factory.arm(spec, samples, num_rows=2)


def _row_sampling(job: DecodingJob, settings: RolloutSettings) -> RowSampling:
    return RowSampling(settings.temperature, settings.top_p, 0, (job.seed, job.index))
