"""Ways to steer as arms of an evaluation: what each does to the engine, and the plain data that tells it apart.

Enter at `ArmFactory`; to add a way to steer, write one method, or build on `ArmFactory.arm` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from value_models.evaluation import Arm
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings
from value_models.store import tensors_digest

# Part of what decides a response and its figures: raise it when a change of the engine changes what is sampled.
_SAMPLING_VERSION = 2
# Of prompting alone: raise it when what is told of such responses changes. 1 is of exact divergences.
_INSTRUCTED_VERSION = 1


class ArmFactory:
    """Arms that share a model, heads and sampling. `sampling.num_samples` is overruled by the evaluation."""

    def __init__(self, loaded: LoadedModel, core: EngineCore, sampling: RolloutSettings) -> None:
        self.registry = core.registry
        self.source = EngineRolloutSource(loaded, core)
        self._sampling = sampling
        self._common = {
            "version": _SAMPLING_VERSION,
            "model": loaded.identity,
            "dtype": str(loaded.model.dtype),
            "device": loaded.model.device.type,
            "threads": torch.get_num_threads(),
            "sampling": sampling.model_dump(exclude={"num_samples", "prompts_per_shard"}),
        }

    def base(self, *, read: Sequence[str] = ()) -> Arm:
        return self._requests({}, read=read)

    def best_of(self, number: int) -> Arm:
        return self._requests({}, best_of=number)

    def prompting(self, instruction: str, control: ControlParams | None = None) -> Arm:
        """An instruction put before every prompt, alone or under control."""
        spec = {"instruction": instruction, "figures": _INSTRUCTED_VERSION}
        return self._requests(spec, instruction=instruction, control=control)

    def control(self, control: ControlParams, *, read: Sequence[str] = ()) -> Arm:
        """With the values, by the heads to be read, of the finished responses."""
        return self._requests({}, control=control, read=read)

    def arm(
        self,
        spec: dict[str, Any],
        sample: Callable[[Sequence[RolloutPrompt], RolloutSettings], Iterable[EvalSample]],
        *,
        best_of: int = 1,
    ) -> Arm:
        """A way to sample that `spec` tells apart from all others of this model and sampling."""

        def sampler(prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
            return sample(prompts, self._sampling.model_copy(update={"num_samples": num_samples}))

        return Arm(self._common | spec, sampler, best_of)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """What tells heads apart from others of the same names."""
        return {name: tensors_digest(self.registry.head(name)) for name in names}

    def _requests(
        self,
        spec: dict[str, Any],
        *,
        control: ControlParams | None = None,
        instruction: str | None = None,
        best_of: int = 1,
        read: Sequence[str] = (),
    ) -> Arm:
        def sample(prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterable[EvalSample]:
            return self.source.evaluate(prompts, settings, control=control, instruction=instruction, read=read)

        if read:
            spec = spec | {"read": self.digests(read)}
        if control is not None:
            # A field that came later and is not used leaves what was sampled before it as good as it was.
            fields = {name: value for name, value in control.model_dump().items() if (name, value) != ("search", None)}
            # Here levels are of the value, whatever it says: whoever asks for rewards has changed them before.
            fields["objective"].pop("unit", None)
            spec = spec | {"control": fields, "heads": self.digests(control.head_names)}
            if control.objective.looks_ahead:
                spec = spec | {"earned": self.registry.earned(control.head_names)}
        return self.arm(spec, sample, best_of=best_of)
