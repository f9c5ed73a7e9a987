"""Ways to steer as arms of an evaluation: what each does to the engine, and the plain data that tells it apart.

Enter at `ArmFactory`; to add a way to steer, write one method, or build on `ArmFactory.arm` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from server.engines.instruction import encode_instructed
from value_models.evaluation import Arm
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings
from value_models.store import tensors_digest

# Part of what decides a response and its figures: raise it when a change of the engine changes what is sampled.
_SAMPLING_VERSION = 2
# Of prompting alone: raise it when what is told of such responses changes. 1 is of exact divergences.
_INSTRUCTED_VERSION = 1


Place = Literal["system", "user"]
"""Where an instruction stands: in the system role of a chat, or before what the user says last."""


@dataclass(slots=True, frozen=True)
class Instruction:
    """What prompting tells the model, and where."""

    text: str
    place: Place = "user"


class ArmFactory:
    """Arms that share a model, heads and sampling. `sampling.num_samples` is overruled by the evaluation."""

    def __init__(self, loaded: LoadedModel, core: EngineCore, sampling: RolloutSettings) -> None:
        self.registry = core.registry
        self.source = EngineRolloutSource(loaded, core)
        self._in_system_role = _InSystemRole(loaded, core)
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

    def prompting(self, instruction: Instruction, control: ControlParams | None = None) -> Arm:
        """An instruction before every prompt, alone or under control."""
        spec: dict[str, Any] = {"instruction": instruction.text, "figures": _INSTRUCTED_VERSION}
        if instruction.place != "user":
            spec["place"] = instruction.place
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
        num_rows: int = 1,
    ) -> Arm:
        """A way to sample that `spec` tells apart from all others of this model and sampling; a response takes so many
        rows of a step."""

        def sampler(prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
            return sample(prompts, self._sampling.model_copy(update={"num_samples": num_samples}))

        return Arm(self._common | spec, sampler, best_of, num_rows)

    def source_of(self, instruction: Instruction | None) -> EngineRolloutSource:
        """What puts an instruction where it belongs."""
        return self._in_system_role if instruction is not None and instruction.place == "system" else self.source

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """What tells heads apart from others of the same names."""
        return {name: tensors_digest(self.registry.head(name)) for name in names}

    def _requests(
        self,
        spec: dict[str, Any],
        *,
        control: ControlParams | None = None,
        instruction: Instruction | None = None,
        best_of: int = 1,
        read: Sequence[str] = (),
    ) -> Arm:
        def sample(prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterable[EvalSample]:
            text = None if instruction is None else instruction.text
            source = self.source_of(instruction)
            return source.evaluate(prompts, settings, control=control, instruction=text, read=read)

        if read:
            spec = spec | {"read": self.digests(read)}
        if control is not None:
            # A field that came later and is not used leaves what was sampled before it as good as it was.
            fields = {name: value for name, value in control.model_dump().items() if (name, value) != ("search", None)}
            # Here levels are of the value, whatever it says: whoever asks for rewards has changed them before.
            fields["objective"].pop("unit", None)
            if control.search is not None and control.search.reward is None:
                fields["search"].pop("reward")
            spec = spec | {"control": fields, "heads": self.digests(control.head_names)}
            if control.objective.looks_ahead:
                spec = spec | {"earned": self.registry.earned(control.head_names)}
        return self.arm(spec, sample, best_of=best_of, num_rows=_num_rows(control))


def _num_rows(control: ControlParams | None) -> int:
    """Of a step, which one response takes: its own, its candidates' and that of the text behind an instruction."""
    if control is None:
        return 1
    candidates = 1 if control.search is None else control.search.candidates
    return candidates * (1 if control.instruction is None else 2)


class _InSystemRole(EngineRolloutSource):
    """Puts instructions into the system role of chats, behind what the template says there by itself."""

    def encode(self, prompt: RolloutPrompt, instruction: str | None = None) -> list[int]:
        """Before the user's first message where the model's template has no such role. Raises InvalidRequestError."""
        bare_ids = super().encode(prompt)
        if instruction is None or prompt.format == "text":
            return super().encode(prompt, instruction)
        return encode_instructed(self.loaded.tokenizer, instruction, bare_ids, prompt.turns())
