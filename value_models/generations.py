"""Responses sampled for an evaluation, kept by what decides them, so that a run that was stopped goes on where it was.

A file holds the responses of one way to sample (`spec`: model, sampling, control, all as plain data), one JSON line
each; a response depends on the spec, its prompt and its number alone, so different runs share what they have in common.
Knows nothing of engines or scores. Enter at `GenerationStore.samples`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from value_models.files import write_text
from value_models.prompt_sets import RolloutPrompt


@dataclass(slots=True, frozen=True)
class EvalSample:
    """One response and what it cost.

    nll: mean negative log-probability of its tokens under the base model given the bare prompt, nats a token.
    mean_kl, max_kl: KL of the distributions that its tokens were drawn from, from those of that model behind the same
        text, nats a token: exact, at temperature 1 and before top-p or top-k cut them short. Where the best of several
        texts is kept, a bound on that is added.
    wall_s: its share of the time that sampling took.
    """

    prompt_id: str
    sample: int
    response: str
    num_tokens: int
    nll: float
    mean_kl: float
    max_kl: float
    is_finished: bool
    wall_s: float = 0.0
    values: dict[str, float] = field(default_factory=dict[str, float])
    """By head, for those that were asked for: the value at the state behind its last token, in reward units."""
    steered: dict[str, float] = field(default_factory=dict[str, float])
    """By head, for those that control names: the mean value after control of the states that tokens were drawn from."""


Sampler = Callable[[Sequence[RolloutPrompt], int], Iterable[EvalSample]]
"""Prompts and a number of responses to each -> responses 0..number-1 of every prompt, in any order."""


def best_of_kl_bound(number: int) -> float:
    """What keeping the best of so many samples can diverge from the sampler at most, in nats (Beirami et al. 2024)."""
    return math.log(number) - (number - 1) / number


class GenerationStore:
    """Generations below a folder, or in memory alone without one.

    Processes may share a folder: who samples a spec holds its lock, and the others wait and find the responses there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, dict[tuple[str, int], EvalSample]] = {}

    def samples(
        self,
        spec: dict[str, Any],
        prompts: Sequence[RolloutPrompt],
        num_samples: int,
        sampler: Sampler,
        *,
        on_sample: Callable[[], object] = lambda: None,
    ) -> list[EvalSample]:
        """Responses 0..num_samples-1 to each prompt, in that order; samples what is not there yet.

        `on_sample` is called for every one, also for those that were there.
        """
        key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:24]
        with self._lock(key):
            return self._samples(key, spec, prompts, num_samples, sampler, on_sample)

    def _samples(
        self,
        key: str,
        spec: dict[str, Any],
        prompts: Sequence[RolloutPrompt],
        num_samples: int,
        sampler: Sampler,
        on_sample: Callable[[], object],
    ) -> list[EvalSample]:
        known = self._known(key, spec)
        digests = {prompt.id: _digest(prompt) for prompt in prompts}
        wanted = [(digests[prompt.id], sample) for prompt in prompts for sample in range(num_samples)]
        missing = [p for p in prompts if any((digests[p.id], sample) not in known for sample in range(num_samples))]
        for _ in range(sum(item in known for item in wanted)):
            on_sample()
        for sample in sampler(missing, num_samples) if missing else ():
            item = (digests[sample.prompt_id], sample.sample)
            if item not in known:
                known[item] = sample
                self._append(key, item[0], sample)
                on_sample()
        return [known[item] for item in wanted]

    def _lock(self, key: str) -> AbstractContextManager[object]:
        if self._folder is None:
            return nullcontext()
        self._folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path(key).with_suffix(".lock"))

    def _known(self, key: str, spec: dict[str, Any]) -> dict[tuple[str, int], EvalSample]:
        """By the prompt's digest and the response's number, read anew: another process may have added some."""
        if self._folder is None:
            return self._memory.setdefault(key, {})
        path = self._path(key)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, torn = text.rpartition("\n")
        whole = whole or json.dumps(spec, sort_keys=True)
        if torn or not text:
            # A new file, or a killed run's last line.
            write_text(path, whole + "\n")
        known: dict[tuple[str, int], EvalSample] = {}
        for line in whole.split("\n")[1:]:
            try:
                fields = json.loads(line)
            except ValueError:
                # Not a whole line, whatever became of it: that response is sampled again.
                continue
            sample = EvalSample(**{name: value for name, value in fields.items() if name != "prompt"})
            known[fields["prompt"], sample.sample] = sample
        return known

    def _append(self, key: str, digest: str, sample: EvalSample) -> None:
        if self._folder is not None:
            with self._path(key).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": digest, **asdict(sample)}) + "\n")

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.jsonl"


def _digest(prompt: RolloutPrompt) -> str:
    """Of what a response depends on: the id keys its random stream."""
    asked = prompt.text if prompt.messages is None else json.dumps(prompt.messages)
    return hashlib.sha256(f"{prompt.id}\n{prompt.format}\n{asked}".encode()).hexdigest()[:24]
