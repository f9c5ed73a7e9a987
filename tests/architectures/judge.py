"""Holds this engine to transformers' own numbers on one model folder.

Each text is run alone, beside the others, in one chunk and in several, from the prefix cache, and preempted. In all of
these its numbers must be the same to the bit; and they must be transformers', in float32 to `FLOAT32_NATS`, in bfloat16
to a multiple of what bfloat16 costs transformers itself. Or the model is refused in one line. Enter at `judge`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.layout import PromptChunk
from server.engines.embedded.model.loader import load_model
from server.engines.embedded.model.pages import PAGE_TOKENS, num_pages_for
from server.errors import RecontrolError
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.architectures.reference import Reference
from tests.conftest import Collected, run, waiting_again

FLOAT32_NATS = 1e-3
"""Largest deviation of any log-probability in float32: sums in another order, and no more."""
NOISE_MEAN, NOISE_MAX = 2.0, 3.0
"""In bfloat16 the mean deviation may be so many times transformers' own mean, the largest so many times its largest."""
FLOOR_MEAN, FLOOR_MAX = 0.005, 0.05
"""Nats allowed on top, where transformers' own noise is small by luck."""
_SHARE_WITH_EXPERTS = 0.98
"""Of a model with experts in bfloat16: another rounding sends single tokens to other experts."""
TEXTS = ((126, 10), (62, 10), (190, 8), (5, 16), (230, 6))
"""Prompt and new tokens: beyond windows, across them and ends of pages while decoding, the last beyond switches."""
CACHED, SHORT = 2, 3
"""The text that is asked for once more, and the one that is alone in a brief judgement."""
_TIGHT_PAGES = 8
"""Too few for what all the texts together grow to."""
_NUM_TOP = 5

Scores = list[tuple[int, float, tuple[tuple[int, float], ...]]]


class FaultError(Exception):
    """The engine serves the model wrongly, or fails on it."""


@dataclass(slots=True)
class Served:
    """What one precision came to: fast or general with its deviation in nats, refused with the reason, or a fault."""

    outcome: str
    reason: str = ""
    max_len: int = 0
    largest: float = 0.0
    mean: float = 0.0
    noise_largest: float = 0.0
    noise_mean: float = 0.0

    def __str__(self) -> str:
        numbers = (
            f"{self.largest:.2g} nats off, mean {self.mean:.2g}, noise {self.noise_largest:.2g}, {self.noise_mean:.2g}"
        )
        return f"{self.outcome} ({self.reason or numbers})"


def judge(folder: Path, dtype: torch.dtype, *, is_brief: bool = False) -> Served:
    """Load and run; nothing is raised for what the engine does.

    A brief judgement has the texts beside each other and one of them alone, and bfloat16 by the fast path only.
    """
    failures = _Failures()
    logging.getLogger("server").addHandler(failures)
    try:
        return _Bench(folder, dtype, failures).judge(is_brief=is_brief)
    except RecontrolError as error:
        if "\n" in str(error):
            return Served("fault", f"refused in {len(str(error).splitlines())} lines: {str(error).splitlines()[0]}")
        return Served("refused", str(error))
    except FaultError as error:
        return Served("fault", str(error))
    except Exception as error:
        return Served("fault", f"traceback: {_line(error)}")
    finally:
        logging.getLogger("server").removeHandler(failures)


@dataclass(slots=True)
class _Bench:
    folder: Path
    dtype: torch.dtype
    failures: _Failures
    texts: list[list[int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def judge(self, *, is_brief: bool) -> Served:
        core = self._core()
        rng = torch.Generator().manual_seed(1)
        fitting = [length for length, more in TEXTS if length + more <= core.max_model_len]
        self.texts = [torch.randint(0, 250, (length,), generator=rng).tolist() for length in fitting]
        assert len(fitting) > SHORT, "not even the texts for preemption fit"
        served = Served("fast" if core.runner.is_native else "general", max_len=core.max_model_len)
        if is_brief and self.dtype != torch.float32 and served.outcome == "general":
            return served
        together = self._run(core, self._all, steps_between=1)
        served = self._compared(served, [together[index] for index in self._all])
        for index in [SHORT] if is_brief else self._all:
            self._hold_bits("alone", together, self._run(core, [index]))
        if not is_brief:
            self._hold_other_chunks(core, together)
            self._hold_prefix_cache(core, together)
            self._hold_preemption(core, together)
        return replace(served, outcome="fault", reason="; ".join(self.faults)) if self.faults else served

    @property
    def _all(self) -> range:
        return range(len(self.texts))

    def _core(self, **options: Any) -> EngineCore:
        loaded = load_model(str(self.folder), device="cpu", dtype=str(self.dtype).removeprefix("torch."))
        options = {"max_batch_size": 4, "prefill_chunk_tokens": PAGE_TOKENS, "kv_cache_gib": 0.1, **options}
        return EngineCore(loaded, HeadRegistry({}), **options)

    def _request(self, index: int, *, has_prompt: bool = True) -> GenerationRequest:
        sampling = SamplingParams(
            max_tokens=TEXTS[index][1], temperature=0.0, ignore_eos=True, logprobs=_NUM_TOP, prompt_logprobs=has_prompt
        )
        return GenerationRequest(str(index), tuple(self.texts[index]), sampling)

    def _run(
        self, core: EngineCore, indices: Iterable[int], *, steps_between: int = 0, must_preempt: bool = False
    ) -> dict[int, Scores]:
        preempted: set[str] = set()

        def watch(core: EngineCore) -> None:
            preempted.update(s.request.request_id for s in waiting_again(core))

        results = run(core, [self._request(i) for i in indices], steps_between=steps_between, after_step=watch)
        assert preempted or not must_preempt, "nothing was preempted"
        return {i: self._scores(results[str(i), 0]) for i in indices}

    def _scores(self, result: Collected) -> Scores:
        """Of the prompt from its second token, then of new ones: token, log-probability, the likeliest with theirs."""
        if result.finish_reasons != [FinishReason.LENGTH]:
            raise FaultError(f"a request ended with {result.finish_reasons[-1]}: {self.failures.last}")
        prompt = [score for chunk in result.chunks for score in chunk.prompt_logprobs or () if score is not None]
        found = prompt + [score for chunk in result.chunks for score in chunk.logprobs]
        return [(s.token_id, s.logprob, tuple((t.token_id, t.logprob) for t in s.top)) for s in found]

    def _hold_bits(self, how: str, together: dict[int, Scores], other: dict[int, Scores]) -> None:
        for index, scores in other.items():
            places = [i for i, (a, b) in enumerate(zip(together[index], scores, strict=True)) if a != b]
            if places:
                off = max(abs(together[index][i][1] - scores[i][1]) for i in places)
                self.faults.append(
                    f"other bits {how} than beside others: text {index} from token {places[0] + 1}, by {off:.3g}"
                )
                return

    def _hold_other_chunks(self, core: EngineCore, together: dict[int, Scores]) -> None:
        """Chunks end with a page or with the prompt."""
        text, scores = self.texts[CACHED], together[CACHED]
        for size in (len(text), 2 * PAGE_TOKENS):
            with torch.inference_mode():
                logprobs_TV = core.lm_head.logits(_states(core, text, size)).log_softmax(dim=-1)
            found = [float(row[token]) for row, token in zip(logprobs_TV, text[1:], strict=False)]
            expected = [logprob for _, logprob, _ in scores[: len(found)]]
            if found != expected:
                off = max(abs(a - b) for a, b in zip(found, expected, strict=True))
                self.faults.append(f"other bits in chunks of {size} than of {PAGE_TOKENS}: by {off:.3g}")

    def _hold_prefix_cache(self, core: EngineCore, together: dict[int, Scores]) -> None:
        found = self._scores(run(core, [self._request(CACHED, has_prompt=False)])[str(CACHED), 0])
        self._hold_bits("from the prefix cache", {CACHED: together[CACHED][-len(found) :]}, {CACHED: found})

    def _hold_preemption(self, core: EngineCore, together: dict[int, Scores]) -> None:
        page_gib = core.runner.kv.bytes_per_page / 2**30
        tight = self._core(
            prefill_chunk_tokens=3 * PAGE_TOKENS,
            max_model_len=min(4 * PAGE_TOKENS, core.max_model_len),
            kv_cache_gib=(_TIGHT_PAGES + 1.5) * page_gib,
        )
        self._hold_bits("preempted, in other chunks,", together, self._run(tight, self._all, must_preempt=True))

    def _compared(self, served: Served, alone: list[Scores]) -> Served:
        exact = Reference(self.folder, torch.float32)
        pairs = [
            (text, [token for token, *_ in scores[len(text) - 1 :]])
            for text, scores in zip(self.texts, alone, strict=True)
        ]
        expected = [exact.logprobs_of(*pair) for pair in pairs]
        if not all(bool(logprobs_TV.isfinite().all()) for logprobs_TV in expected):
            raise AssertionError("transformers' own numbers are not finite")
        deviation = torch.cat([_deviation(*both) for both in zip(alone, expected, strict=True)])
        share = 1.0
        if self.dtype != torch.float32:
            rounded = Reference(self.folder, self.dtype)
            noisy = [rounded.logprobs_of(*pair) for pair in pairs]
            triples = zip(alone, noisy, expected, strict=True)
            noise = torch.cat([(_at(scores, a) - _at(scores, b)).abs() for scores, a, b in triples])
            share = _SHARE_WITH_EXPERTS if rounded.has_experts else 1.0
            served = replace(served, noise_largest=_quantile(noise, share), noise_mean=_rounded(noise.mean()))
        served = replace(served, largest=_quantile(deviation, share), mean=_rounded(deviation.mean()))
        largest, mean = allowed(served, self.dtype)
        if not (served.largest <= largest and served.mean <= mean):
            how = f"served by the {served.outcome} path, {served.largest:.3g} nats off (mean {served.mean:.3g})"
            self.faults.append(f"{how}; allowed {largest:.3g} (mean {mean:.3g})")
        return served


def allowed(served: Served, dtype: torch.dtype) -> tuple[float, float]:
    """Largest and mean deviation in nats."""
    if dtype == torch.float32:
        return FLOAT32_NATS, FLOAT32_NATS
    return NOISE_MAX * served.noise_largest + FLOOR_MAX, NOISE_MEAN * served.noise_mean + FLOOR_MEAN


def _states(core: EngineCore, text: list[int], size: int) -> Tensor:
    """[T, D] behind a text that is fed in chunks of one size."""
    pages = core.page_pool.take(num_pages_for(len(text)))
    assert pages is not None
    starts = range(0, len(text), size)
    states = [core.runner.forward([], [PromptChunk(pages, start, text[start : start + size])]) for start in starts]
    core.runner.kv.clear(core.page_pool.release(pages, forget=True))
    return torch.cat(states)


def _quantile(numbers: Tensor, share: float) -> float:
    return _rounded(numbers.flatten().quantile(share))


def _rounded(number: Tensor) -> float:
    """To three digits, as it is told."""
    return float(f"{float(number):.3g}")


def _deviation(scores: Scores, expected_TV: Tensor) -> Tensor:
    said = torch.tensor([[logprob, *(value for _, value in top)] for _, logprob, top in scores])
    return (said - _at(scores, expected_TV)).abs().nan_to_num(nan=torch.inf)


def _at(scores: Scores, logprobs_TV: Tensor) -> Tensor:
    """[T, 1 + top]: what these log-probabilities are for the tokens that the scores speak of."""
    tokens = torch.tensor([[token, *(i for i, _ in top)] for token, _, top in scores])
    return logprobs_TV.gather(1, tokens)


class _Failures(logging.Handler):
    """Remembers the last exception that the engine logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = "no reason logged"

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.last = record.getMessage() if error is None else _line(error)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
