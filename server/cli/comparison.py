"""A head against other methods on test prompts, each at strengths that were set on validation prompts.

A study runs on an `EvalSetup`, gives a result of plain data, saves it with the head, and shows it. Enter at
`MethodsStudy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from server.cli.asked import ASKED
from server.cli.claims import areas, claims, compute_areas, show_claims
from server.cli.methods import HEAD, PROMPTING, Method, Subject
from server.cli.prompting import Choice, best_instruction
from server.cli.strengths import FACTORS, MAX_COHERENCE_LOSS, Point, StrengthSearch, Sweep
from server.errors import ConfigurationError
from value_models.evaluation import Arm, Comparisons, Scoring, evaluate_arms
from value_models.generations import GenerationStore
from value_models.rollouts import RolloutPrompt
from value_models.store import HeadCard, load_card, save_card

_WITH_PROMPTING = f"{HEAD.label} + {PROMPTING.label}"
_NUM_TUNING_PROMPTS = 48


class Study(Protocol):
    """What a command evaluates: `run` gives plain data, `save` keeps it with the head, `show` prints it."""

    def run(self) -> dict[str, Any]: ...

    def save(self, result: dict[str, Any]) -> None: ...

    def show(self, result: dict[str, Any]) -> None: ...


@dataclass(slots=True, frozen=True)
class EvalSetup:
    """A head with everything it is measured with."""

    subject: Subject
    folder: Path
    """Of the head."""
    tensors_sha256: str
    """Of the head that is measured: what is saved must be its own."""
    scoring: Scoring
    store: GenerationStore
    prompts: Sequence[RolloutPrompt]
    tuning_prompts: Sequence[RolloutPrompt]
    split: str
    test_set: str
    num_samples: int
    methods: Sequence[Method]
    """Those that take part, besides the head."""
    max_coherence_loss: float = MAX_COHERENCE_LOSS
    """Of best strengths, against the base model."""
    factors: Sequence[float] = FACTORS
    """See `StrengthSearch`."""
    instructions: Sequence[str] = ()
    """From which prompting's is chosen on the validation prompts, in place of the subject's."""

    def compare(self, arms: Mapping[str, Arm], comparisons: Comparisons | None = None) -> dict[str, Any]:
        """On the test prompts."""
        return self._evaluate(arms, self.prompts, self.num_samples, self.scoring, comparisons or {})

    def tune(self, arms: Mapping[str, Arm], *, num_prompts: int | None = None) -> dict[str, Any]:
        """On validation prompts, one response each, without judges that take long: no strength is chosen by them."""
        return self._evaluate(
            arms, self.tuning_prompts[: num_prompts or _NUM_TUNING_PROMPTS], 1, self.scoring.without(ASKED), {}
        )

    def with_best_instruction(self) -> tuple[EvalSetup, Choice | None]:
        """With the best of the instructions there are to choose from, if a method that needs one takes part."""
        if not self.instructions or not any(method.needs_instruction for method in self.methods):
            return self, None
        has_chats = any(prompt.format == "chat" for prompt in self.tuning_prompts)
        choice = best_instruction(self.instructions, self.subject, self.tune, has_system_role=has_chats)
        return replace(self, subject=replace(self.subject, instruction=choice.instruction)), choice

    def strengths(self) -> StrengthSearch:
        return StrengthSearch(
            self.subject, self.methods, self.tune, max_coherence_loss=self.max_coherence_loss, factors=self.factors
        )

    def arms(self, sweep: Sweep) -> dict[str, Arm]:
        """Base first, then every method at the strengths that the sweep found."""
        arms = {"base": self.subject.factory.base()}
        for method in (*self.methods, HEAD):
            arms |= {name: method.arm(self.subject, strength) for name, strength in sweep.tested(method).items()}
        if PROMPTING in self.methods:
            arms[_WITH_PROMPTING] = self.subject.prompting(self.subject.control(self.subject.step_size))
        return arms

    def card(self) -> HeadCard:
        """As it is now: other figures may have come meanwhile, but no other head. Raises ConfigurationError."""
        card = load_card(self.folder)
        if card.tensors_sha256 != self.tensors_sha256:
            raise ConfigurationError(
                f"{self.folder} holds another head than when the evaluation began; nothing is saved"
            )
        return card

    def describe(self) -> dict[str, Any]:
        return {
            "judges": list(self.scoring.judges),
            "test_set": self.test_set,
            "split": self.split,
            "num_prompts": len(self.prompts),
            "num_tuning_prompts": min(len(self.tuning_prompts), _NUM_TUNING_PROMPTS),
        }

    def _evaluate(
        self,
        arms: Mapping[str, Arm],
        prompts: Sequence[RolloutPrompt],
        num_samples: int,
        scoring: Scoring,
        comparisons: Comparisons,
    ) -> dict[str, Any]:
        with tqdm(unit="response", leave=False) as bar:

            def on_arm(name: str, num_responses: int) -> None:
                bar.set_description(name)
                bar.reset(total=num_responses)

            return evaluate_arms(
                arms,
                prompts,
                scoring,
                num_samples=num_samples,
                store=self.store,
                comparisons=comparisons,
                on_arm=on_arm,
                on_sample=bar.update,
            )


class MethodsStudy:
    """Every method on the test prompts, at strengths that were set on validation prompts."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup = setup

    def run(self) -> dict[str, Any]:
        setup, choice = self.setup.with_best_instruction()
        sweep = setup.strengths().sweep()
        arms = setup.arms(sweep)
        figures = setup.compare(arms, _comparisons(list(arms)))
        return {
            "arms": figures,
            "claims": claims(figures),
            "areas": areas(sweep),
            "compute_areas": compute_areas(sweep),
            **setup.describe(),
            "control": {"step_size": setup.subject.step_size, "max_kl": setup.subject.max_kl},
            # Results without this are older, and behind an instruction theirs are estimates from the tokens drawn.
            "divergence": "exact",
            "strengths": sweep.told(setup.max_coherence_loss),
            **({} if choice is None else {"instruction": choice.told()}),
            "sweep": {name: [_kept(point) for point in points] for name, points in sweep.points.items()},
        }

    def save(self, result: dict[str, Any]) -> None:
        """The table in the card, by test set."""
        card = self.setup.card()
        evaluation = (card.evaluation or {}) | {result["test_set"]: for_card(result)}
        save_card(self.setup.folder, card.model_copy(update={"evaluation": evaluation}))

    def show(self, result: dict[str, Any]) -> None:
        show_arms(result)
        show_claims(result)
        strengths = result["strengths"]
        for name in strengths["unsound"]:
            loss = strengths["max_coherence_loss"]
            print(f"{name}: at no strength that was tried the text is sound and loses at most {loss:g} of coherence")


def for_card(result: dict[str, Any]) -> dict[str, Any]:
    """Without what only the JSON of a run holds."""
    arms = {
        name: {key: value for key, value in figures.items() if key not in ("examples", "by_prompt") and value != {}}
        for name, figures in result["arms"].items()
    }
    return {name: value for name, value in result.items() if name != "sweep"} | {"arms": arms}


def show_arms(result: dict[str, Any]) -> None:
    """A line of mean figures for each arm."""
    shown = ("reward", *result["judges"], "win_over_base", "diversity", "coherence", "coherence_loss", "nll", "kl")
    for name, figures in result["arms"].items():
        values = "  ".join(f"{metric} {figures[metric]['mean']:.3f}" for metric in shown if metric in figures)
        print(f"{name:32}{values}  {figures['wall_s']:.0f} s")


def _comparisons(arms: Sequence[str]) -> Comparisons:
    """The head with all that came before it, and with prompting with either."""
    rivals = arms[: arms.index(HEAD.label)]
    return {HEAD.label: rivals, _WITH_PROMPTING: (PROMPTING.label, HEAD.label)}


def _kept(point: Point) -> dict[str, Any]:
    """As it is written: areas alone need single prompts."""
    return {"strength": point.strength, "figures": {k: v for k, v in point.figures.items() if k != "by_prompt"}}
