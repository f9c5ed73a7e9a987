"""Ways to steer as arms of an evaluation: what each does to the engine, and the plain data that tells it apart.

Enter at `ArmFactory`; to add a way to steer, write one method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from server.control.objectives import WeightedSum
from server.control.params import Blocks, ControlParams
from server.engines.embedded.controlled_decoding import ControlledDecoding
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from value_models.evaluation import Arm
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings
from value_models.store import tensors_digest

# Part of what decides a response: raise it when a change of the engine changes what is sampled.
_SAMPLING_VERSION = 2


class ArmFactory:
    """Arms that share a model, heads and sampling. `sampling.num_samples` is overruled by the evaluation."""

    def __init__(self, loaded: LoadedModel, core: EngineCore, sampling: RolloutSettings) -> None:
        self._registry = core.registry
        self._sampling = sampling
        self._source = EngineRolloutSource(loaded, core)
        self._common = {
            "version": _SAMPLING_VERSION,
            "model": loaded.identity,
            "dtype": str(loaded.model.dtype),
            "device": loaded.model.device.type,
            "threads": torch.get_num_threads(),
            "sampling": sampling.model_dump(exclude={"num_samples", "prompts_per_shard"}),
        }

    def base(self, *, read: Sequence[str] = ()) -> Arm:
        return self._arm({}, read=read)

    def best_of(self, number: int) -> Arm:
        return self._arm({}, best_of=number)

    def prompting(self, instruction: str, control: ControlParams | None = None) -> Arm:
        """An instruction put before every prompt, alone or under control."""
        return self._arm({"instruction": instruction}, instruction=instruction, control=control)

    def control(self, control: ControlParams, *, read: Sequence[str] = ()) -> Arm:
        """With the values, by the heads to be read, of the finished responses."""
        return self._arm({}, control=control, read=read)

    def control_without_limits(self, head: str, *, step_size: float, steps: int, max_kl: float = math.inf) -> Arm:
        objective = WeightedSum(weights={head: 1.0})
        control = ControlParams.without_limits(objective, step_size=step_size, steps=steps, max_kl=max_kl)
        return self._arm({}, control=control)

    def controlled_decoding(self, head: str, params: ControlledDecoding) -> Arm:
        """Tokens tried and drawn by a head's value."""
        value_head = self._registry.head(head)

        def sampler(prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
            return self._source.decode_by_value(prompts, self._with(num_samples), head=value_head, params=params)

        search = {"type": "controlled_decoding", **params.model_dump()}
        return Arm(self._common | {"search": search, "heads": self._digests([head])}, sampler)

    def _arm(
        self,
        spec: dict[str, Any],
        *,
        control: ControlParams | None = None,
        instruction: str | None = None,
        best_of: int = 1,
        read: Sequence[str] = (),
    ) -> Arm:
        def sampler(prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
            return self._source.evaluate(
                prompts, self._with(num_samples), control=control, instruction=instruction, read=read
            )

        if read:
            spec = spec | {"read": self._digests(read)}

        if control is not None:
            heads = self._digests(control.head_names)
            # A field that came later and is not used leaves what was sampled before it as good as it was.
            fields = {name: value for name, value in control.model_dump().items() if (name, value) != ("search", None)}
            spec = spec | {"control": fields, "heads": heads}
            if control.objective.looks_ahead:
                spec = spec | {"earned": self._registry.earned(control.head_names)}
        return Arm(self._common | spec, sampler, best_of)

    def _with(self, num_samples: int) -> RolloutSettings:
        return self._sampling.model_copy(update={"num_samples": num_samples})

    def _digests(self, names: Iterable[str]) -> dict[str, str]:
        return {name: tensors_digest(self._registry.head(name)) for name in names}


def blockwise(candidates: int = 4, block_tokens: int = 8) -> Blocks:
    return Blocks(type="blocks", candidates=candidates, block_tokens=block_tokens)
