"""`python -m benchmarks.quality.report`: heads' cards as the Markdown that the pages show.

Enter at SECTIONS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.markdown import header, replace_sections, row
from benchmarks.quality import PROGRAM
from benchmarks.quality.objectives import OBJECTIVES_FILE
from benchmarks.quality.objectives_report import objectives_tables
from benchmarks.quality.tables import TITLES, command, interval, share, signed
from server.cli import run
from server.cli.heads import HeadsCommand
from server.cli.methods import HEAD
from value_models.claims import holm
from value_models.store import HeadCard

_SURE = 0.05
"""After Holm's correction."""
_NOT_YET = "None of the results above is of a study that tells them."
TRANSCRIPT_FILE = "transcript.json"
"""In a folder of heads: the output of `recontrol compare` that the pages show."""


class Report(HeadsCommand):
    """Print the heads' figures and an example as Markdown, or bring a file's sections up to date."""

    into: Path | None = Field(None, description="Markdown file whose sections are rewritten")

    def cli_cmd(self) -> None:
        cards, folder = self.cards(), Path(self.location)
        transcripts, objectives = folder / TRANSCRIPT_FILE, folder / OBJECTIVES_FILE
        sections = {name: render(cards) for name, render in SECTIONS.items()}
        sections["transcript"] = transcript(transcripts) if transcripts.exists() else ""
        sections["objectives"] = objectives_tables(json.loads(objectives.read_text())) if objectives.exists() else ""
        if self.into is None:
            print("\n\n".join(sections.values()))
            return
        replace_sections(self.into, sections)


def summary_table(cards: Sequence[HeadCard]) -> str:
    """A row for each head and test set: rewards, votes of the judges, and what the head costs, all against the base."""
    titles = ["head", "test set", *(f"reward: {arm}" for arm in ("base", *_SUMMARY_ARMS))]
    titles += [f"votes: {arm}" for arm in _SUMMARY_ARMS] + ["diversity", "added nats/token", "mean KL"]
    lines = header(titles)
    for card in cards:
        for result in (card.evaluation or {}).values():
            arms = result["arms"]
            base, head = arms["base"], arms["head"]
            rewards = [f"{arms[arm]['reward']['mean']:.2f}" if arm in arms else "" for arm in ("base", *_SUMMARY_ARMS)]
            votes = [share(arms.get(arm, {}).get("win_over_base")) for arm in _SUMMARY_ARMS]
            costs = [
                f"{head['diversity']['mean'] / base['diversity']['mean']:.2f}",
                f"{head['nll']['mean'] - base['nll']['mean']:+.2f}",
                f"{head['kl']['mean']:.2f}",
            ]
            lines.append(row([f"`{card.name}`", result["test_set"], *rewards, *votes, *costs]))
    return "\n".join(lines)


def evaluation_tables(cards: Sequence[HeadCard]) -> str:
    """Every method on every test set, and each head's plot of reward against divergence."""
    parts: list[str] = []
    for card in cards:
        parts += [f"### {card.name}", card.description]
        parts += [_table(card, result) for result in (card.evaluation or {}).values()]
        if card.evaluation:
            parts.append(f"![reward and judges against divergence, on validation prompts]({card.name}/sweep.svg)")
    return "\n\n".join(parts)


def stress_tables(cards: Sequence[HeadCard]) -> str:
    return "\n\n".join(_table(card, card.stress) for card in cards if card.stress is not None)


def cost_table(cards: Sequence[HeadCard]) -> str:
    """What a response of each method takes, with the hardware."""
    tables = []
    for card in cards:
        if card.cost is not None:
            lines = header(["method", "seconds a response", "over base"])
            lines += [
                row([name, f"{figures['response_s']:.2f}", f"{figures['over_base']:.2f}"])
                for name, figures in card.cost["arms"].items()
            ]
            tables.append("\n".join([*lines, "", f"`{command(card.cost)}`, {card.cost['hardware']}"]))
    return "\n\n".join(tables)


def commands(cards: Sequence[HeadCard]) -> str:
    """What made and measured each head."""
    lines: list[str] = []
    for card in cards:
        results = [
            *(card.evaluation or {}).values(),
            *(result for result in (card.stress, card.cost, card.seeds) if result),
        ]
        added = [each for result in (card.evaluation or {}).values() for each in result.get("added_by", ())]
        lines += [card.command, *(command(result) for result in results), *added]
    return "\n".join(f"    {line}" for line in lines)


def claims_table(cards: Sequence[HeadCard]) -> str:
    """Each head over every rival, test set and judge, with p-values corrected for all of them together, and which of
    the two is ahead after that, if either is.

    Of results that have p-values, which older ones have not.
    """
    made = [
        (card.name, result["test_set"], claim)
        for card in cards
        for result in (card.evaluation or {}).values()
        for claim in result.get("claims", ())
    ]
    lines = header(["head", "test set", "over", "by", "gain", "p", "p after Holm", "ahead"])
    for (name, test_set, claim), corrected in zip(made, holm([claim["p"] for *_, claim in made]), strict=True):
        ahead = "" if corrected > _SURE else "head" if claim["mean"] > 0 else claim["over"]
        cells = [signed(claim), f"{claim['p']:.5f}", f"{corrected:.5f}", ahead]
        lines.append(row([f"`{name}`", test_set, claim["over"], claim["metric"], *cells]))
    return "\n".join(lines) if made else _NOT_YET


def areas_table(cards: Sequence[HeadCard]) -> str:
    """The mean gain of reward over all divergences up to a bound, on validation prompts, by head and method.

    Results on several test sets may be of one sweep, which is shown once.
    """
    lines = header(["head", "with test set", "method", "up to KL", "mean gain", "head over it", "p"])
    is_measured = False
    for card in cards:
        shown: list[Mapping[str, Any]] = []
        for result in (card.evaluation or {}).values():
            areas = result.get("areas") or {"gain": {}}
            if areas in shown:
                continue
            shown.append(areas)
            for method, figure in areas["gain"].items():
                is_measured, over = True, areas["head_over"].get(method)
                more = [signed(over), f"{over['p']:.5f}"] if over else ["", ""]
                cells = [method, f"{figure.get('max_kl', areas['max_kl']):.2f}", signed(figure), *more]
                lines.append(row([f"`{card.name}`", result["test_set"], *cells]))
    return "\n".join(lines) if is_measured else _NOT_YET


def compute_table(cards: Sequence[HeadCard]) -> str:
    """The mean gain of reward over all compute up to some times the base model's, on validation prompts.

    Of results that count the tokens that the model is run over, which older ones do not.
    """
    lines = header(["head", "test set", "method", "tokens run over, of the base's", "mean gain", "head over it", "p"])
    is_measured = False
    for card in cards:
        for result in (card.evaluation or {}).values():
            for method, figure in (areas := result.get("compute_areas") or {"gain": {}})["gain"].items():
                is_measured, over = True, areas["head_over"].get(method)
                more = [signed(over), f"{over['p']:.5f}"] if over else ["", ""]
                times = ", ".join(dict.fromkeys(f"{one:.1f}" for one in areas["times"][method])) or "no sound text"
                lines.append(row([f"`{card.name}`", result["test_set"], method, times, signed(figure), *more]))
    return "\n".join(lines) if is_measured else _NOT_YET


def seeds_table(cards: Sequence[HeadCard]) -> str:
    """Each measured head's seeds: the gains over the base model and over the static vector of the same seed."""
    titles = ["head", "test set", "by", "by seed", "over the base model", "over the static vector"]
    lines = header(titles)
    measured = [(card.name, card.seeds) for card in cards if card.seeds is not None]
    for name, result in measured:
        for metric in ("reward", *result["judges"]):
            means = ", ".join(f"{result['arms'][arm][metric]['mean']:.2f}" for arm in result["head_arms"])
            cells = [metric, means, *(signed(result[over][metric]) for over in ("over_base", "over_static_vector"))]
            lines.append(row([f"`{name}`", result["test_set"], *cells]))
    told = "\n".join(f"`{command(result)}`" for _, result in measured)
    return "\n".join([*lines, "", told]) if measured else "No head was measured with several seeds yet."


def kept_table(cards: Sequence[HeadCard]) -> str:
    """What each head loses of the base model's coherence, at its default and at its best strength.

    Of results that tell how strengths were bound, which older ones do not.
    """
    lines = header(["head", "test set", "strength", "coherence lost on test prompts", "allowed on validation prompts"])
    is_measured = False
    for card in cards:
        for result in (card.evaluation or {}).values():
            if "unsound" not in (strengths := result.get("strengths", {})):
                continue
            is_measured = True
            allowed = f"{strengths['max_coherence_loss']:g}"
            if HEAD.name in strengths["unsound"]:
                allowed += ", which no strength satisfies"
            for arm in (HEAD.label, f"{HEAD.label}, best strength"):
                if arm in result["arms"]:
                    which = "default" if arm == HEAD.label else f"best, {strengths['best'][HEAD.name]:.3g}"
                    lost = signed(result["arms"][arm]["coherence_loss"])
                    lines.append(row([f"`{card.name}`", result["test_set"], which, lost, allowed]))
    return "\n".join(lines) if is_measured else _NOT_YET


def transcript(path: Path) -> str:
    """What `recontrol compare --out` wrote: one prompt, the base model's response, and each head's."""
    result = json.loads(path.read_text())
    parts = [("prompt", result["prompt"]), *((f"`{name}`", text) for name, text in result["responses"].items())]
    quotes = [f"> **{who}:** {' '.join(text.split())}" for who, text in parts]
    return "\n>\n".join([*quotes, f"> `{result['command']}`"])


SECTIONS: dict[str, Callable[[Sequence[HeadCard]], str]] = {
    "summary": summary_table,
    "cost": cost_table,
    "heads": evaluation_tables,
    "claims": claims_table,
    "areas": areas_table,
    "compute": compute_table,
    "seeds": seeds_table,
    "kept": kept_table,
    "stress": stress_tables,
    "commands": commands,
}


_SUMMARY_ARMS = ("prompting", "static vector", "best of 4", "head", "head + prompting")


def _table(card: HeadCard, result: dict[str, Any]) -> str:
    """A row for each arm, with 95% intervals over prompts."""
    scores = ["reward", *result["judges"]]
    known = ("win_over_base", "win_over_reference", "failures", "finished")
    rates = [name for name in known if name in result["arms"]["base"]]
    means = [
        name for name in ("diversity", "coherence", "coherence_loss", "nll", "kl") if name in result["arms"]["base"]
    ]
    size = f"{result['num_prompts']} prompts x {result['sampling']['num_samples']}"
    titles = [f"`{card.name}` on {result['test_set']}, {size}", *scores, *(TITLES[name] for name in (*rates, *means))]
    titles += ["largest KL"]
    if any("prompting" in arm for arm in result["arms"]) and result.get("divergence") != "exact":
        # Of figures that are older than exact divergences behind instructions.
        titles[-2:] = [f"{title} (estimated with prompting)" for title in titles[-2:]]
    lines = header(titles)
    for arm, figures in result["arms"].items():
        cells = [interval(figures[name]) for name in scores]
        cells += [share(figures[name]) for name in rates]
        cells += [f"{figures[name]['mean']:.2f}" for name in means]
        lines.append(row([arm, *cells, f"{figures['largest_kl']:.2f}"]))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run("benchmarks.quality.report:Report", f"{PROGRAM}.report", sys.argv[1:]))
