"""Makes a head by each road, with `recontrol`'s own commands, and notes what they took.

The rollouts of some prompts are sampled once. The pairs are each prompt's best and worst response by the aim's reward,
and the texts are all of them with that reward, so that these three learn from the same responses. Own answers are as
many, half of them after each of two instructions. A command that has been carried out is not run again. Enter at
`Workshop.make`; to add a road, put it in ROADS.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from server.cli import main
from server.errors import ConfigurationError
from value_models.files import write_text
from value_models.prompt_sets import RolloutPrompt
from value_models.rewards import load_reward
from value_models.rollouts import open_rollouts


@dataclass(slots=True, frozen=True)
class Spent:
    """What commands took of this machine."""

    core_s: float
    """Seconds of processor time, of all cores together: other processes do not change it much."""
    wall_s: float
    commands: tuple[str, ...]

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.core_s + other.core_s, self.wall_s + other.wall_s, self.commands + other.commands)


@dataclass(slots=True, frozen=True)
class Aim:
    """What all heads are to raise."""

    reward: str
    instruction: str
    contrast: str
    prompts: Path | None
    """File that instructions are read at; by default the project's own."""
    max_tokens: int
    """New tokens of a response."""


@dataclass(slots=True, frozen=True)
class Road:
    """A way to make a head: `flags` are those of `recontrol train`, given the workshop's folder and the aim."""

    name: str
    given: str
    """What somebody who takes it must have, as the table says it."""
    flags: Callable[[Path, Aim], list[str]]
    samples: str | None = None
    """The command that samples its responses, whose time is this road's; others have theirs already."""


ROADS = (
    Road(
        "rollouts",
        "a reward",
        lambda folder, aim: ["--rollouts", str(folder / "rollouts"), "--prompts", _file(folder, "prompts"),
                             "--reward", aim.reward],
        samples="rollouts",
    ),
    Road(
        "pairs",
        "a better and a worse response a prompt",
        lambda folder, aim: ["--pairs", _file(folder, "pairs"), *_cut(aim)],
    ),
    Road("texts", "responses with a score", lambda folder, aim: ["--texts", _file(folder, "texts"), *_cut(aim)]),
    Road(
        "own answers",
        "two sentences",
        lambda folder, aim: ["--pairs", _file(folder, "own-answers"), *_cut(aim)],
        samples="pairs",
    ),
    Road("instruction", "a sentence", lambda _, aim: _instruction(aim)),
    Road(
        "instruction, contrast",
        "two sentences",
        lambda _, aim: [*_instruction(aim), "--contrast", aim.contrast],
    ),
)  # fmt: skip


def _file(folder: Path, kind: str) -> str:
    return str(folder / f"{kind}.jsonl")


def _cut(aim: Aim) -> list[str]:
    """Where responses end, that is not their own end."""
    return ["--max-tokens", str(aim.max_tokens), "--cut-long"]


def _instruction(aim: Aim) -> list[str]:
    prompts = [] if aim.prompts is None else ["--prompts", str(aim.prompts)]
    return ["--instruction", aim.instruction, *prompts]


class Workshop:
    """A folder with prompts, their rollouts, files of pairs and texts, and the heads that were made of them.

    `model_flags` say which model the commands run.
    """

    def __init__(self, folder: Path, aim: Aim, model_flags: Sequence[str]) -> None:
        self.heads = folder / "heads"
        self._folder, self._aim, self._model_flags = folder, aim, list(model_flags)

    def make(self, prompts: Sequence[RolloutPrompt], *, num_samples: int) -> dict[str, Spent]:
        """By road, what its head took. Raises ConfigurationError when a command fails."""
        lines = [prompt.model_dump_json(by_alias=True, exclude_none=True) for prompt in prompts]
        write_text(Path(_file(self._folder, "prompts")), "".join(f"{line}\n" for line in lines))
        sampled = {
            "rollouts": self._sample("rollouts", num_samples, "--out", str(self._folder / "rollouts")),
            "pairs": self._sample(
                "pairs", max(num_samples // 2, 1), "--good", self._aim.instruction, "--bad", self._aim.contrast,
                "--num-prompts", str(len(prompts)), "--split", "all", "--work", str(self._folder / "answers"),
                "--out", _file(self._folder, "own-answers"),
            ),
        }  # fmt: skip
        self._write_files({prompt.id: prompt for prompt in prompts})
        spent: dict[str, Spent] = {}
        for road in ROADS:
            flags = road.flags(self._folder, self._aim)
            reads_model = "--rollouts" not in flags
            trained = self._run(
                f"train {road.name}",
                "train", "--name", head_name(road), "--out", str(self.heads), *flags,
                *(self._model_flags if reads_model else []),
            )  # fmt: skip
            spent[road.name] = trained if road.samples is None else sampled[road.samples] + trained
        return spent

    def _sample(self, command: str, num_samples: int, *words: str) -> Spent:
        where, size = _file(self._folder, "prompts"), self._aim.max_tokens
        how = ["--prompts", where, "--num-samples", str(num_samples), "--max-tokens", str(size)]
        return self._run(command, command, *words, *how, *self._model_flags)

    def _write_files(self, prompts: dict[str, RolloutPrompt]) -> None:
        """The pairs and the texts, from the rollouts and their rewards."""
        run = open_rollouts(self._folder / "rollouts")
        rows = [row for shard in range(run.num_shards) for row in run.rows(shard)]
        texts = [prompts[row["prompt_id"]].text for row in rows]
        rewards = load_reward(self._aim.reward)(texts, [row["response"] for row in rows])
        scored = [
            {"messages": [{"role": "user", "content": text}], "response": row["response"], "score": reward}
            for text, row, reward in zip(texts, rows, rewards, strict=True)
            if row["response"].strip()
        ]
        pairs: list[dict[str, Any]] = []
        for _, group in groupby(scored, key=lambda line: line["messages"]):
            ordered = sorted(group, key=lambda line: line["score"])
            worst, best = ordered[0], ordered[-1]
            if best["score"] > worst["score"]:
                told = {"chosen": best["response"], "rejected": worst["response"]}
                pairs.append({"messages": best["messages"], **told})
        for kind, lines in (("texts", scored), ("pairs", pairs)):
            write_text(Path(_file(self._folder, kind)), "".join(json.dumps(line) + "\n" for line in lines))

    def _run(self, name: str, *words: str) -> Spent:
        """Carry out a command in this process, unless it was. Raises ConfigurationError when it fails."""
        note = self._folder / "spent" / f"{name.replace(' ', '-')}.json"
        command = shlex.join(["recontrol", *words])
        if note.exists():
            read = json.loads(note.read_text())
            if read["commands"] == [command]:
                return Spent(**{**read, "commands": (command,)})
        print(f"{command}", flush=True)
        cores_before_s, before_s = time.process_time(), time.perf_counter()
        if main(words) != 0:
            raise ConfigurationError(f"`{command}` failed; its reason stands above")
        core_s, wall_s = time.process_time() - cores_before_s, time.perf_counter() - before_s
        spent = Spent(round(core_s, 1), round(wall_s, 1), (command,))
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(asdict(spent)) + "\n")
        return spent


def head_name(road: Road) -> str:
    """Of the head that a road makes."""
    return "by-" + road.name.replace(", ", "-").replace(" ", "-")
