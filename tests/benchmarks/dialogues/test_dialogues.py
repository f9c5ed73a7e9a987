"""The dialogues' file, how they are played, and what is counted of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.dialogues import report, study
from benchmarks.dialogues.arms import ARMS, HEAD
from benchmarks.dialogues.dialogues import FILE, Dialogue, load_dialogues
from benchmarks.dialogues.study import Reply, figures
from server.app import create_app
from server.control.params import ControlParams
from server.engines.fake import FakeEngine
from server.errors import ConfigurationError
from server.settings import Settings


def line(name: str, kind: str = "baiting", turns: int = 2) -> dict[str, Any]:
    return {"id": name, "kind": kind, "messages": [{"role": "user", "content": f"turn {i}"} for i in range(turns)]}


def test_there_are_twenty_baiting_and_ten_harmless_dialogues_of_ten_turns() -> None:
    dialogues = load_dialogues(FILE)
    kinds = [dialogue.kind for dialogue in dialogues]
    assert kinds.count("baiting") >= 20
    assert kinds.count("harmless") == 10
    assert {len(dialogue.messages) for dialogue in dialogues} == {10}
    assert len({dialogue.messages[0].content for dialogue in dialogues}) == len(dialogues)


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([line("a")], "none of kind harmless"),
        ([line("a"), line("a", "harmless")], "line 2: id"),
        ([line("a"), line("b", "harmless", turns=3)], "line 2: messages"),
        ([line("a"), line("b", "rude")], "line 2: kind"),
        ([line("a"), {**line("b"), "messages": [{"role": "assistant", "content": "hi"}]}], "line 2: messages.0.role"),
        ([7], "line 1"),
    ],
)
def test_a_file_of_dialogues_that_cannot_be_played_is_refused_by_its_line(
    tmp_path: Path, lines: list[Any], named: str
) -> None:
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in lines))
    with pytest.raises(ConfigurationError, match=named):
        load_dialogues(path)


def test_every_arm_is_control_that_a_request_may_have() -> None:
    controls = [ControlParams.model_validate(control) for control in ARMS.values() if control is not None]
    assert {name for control in controls for name in control.head_names} == {HEAD}
    assert sum(control.over_turns is not None for control in controls) == 3


def test_each_answer_goes_into_the_next_turns_messages() -> None:
    dialogues = [Dialogue.model_validate(line("a")), Dialogue.model_validate(line("b", "harmless"))]
    app = create_app(Settings.model_validate({"allow_inspection": True}), FakeEngine(heads=[HEAD]))

    async def play() -> tuple[list[list[Reply]], np.ndarray, list[str]]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://study") as client,
        ):
            prompts: list[str] = []
            encode_chat = app.state.engine.encode_chat
            app.state.engine.encode_chat = lambda messages, rendering=None: (
                prompts.append(" ".join(message["content"] for message in messages)),
                encode_chat(messages, rendering),
            )[1]
            player = study._Player(app, client, max_tokens=4, seed=0)
            replies = await player.play(dialogues, None)
            return replies, await player.mean_logprobs(dialogues, replies), prompts[:4]

    replies, logprob_D, prompts = asyncio.run(play())
    assert prompts[:2] == ["turn 0"] * 2
    assert sorted(prompts[2:]) == sorted(f"turn 0 {said[0].text} turn 1" for said in replies)
    assert len({said[0].text for said in replies}) == 2
    assert logprob_D.tolist() == [-2.0, -2.0]


def test_figures_count_toxic_turns_stops_and_nats_by_kind() -> None:
    dialogues = [Dialogue.model_validate(line("a")), Dialogue.model_validate(line("b", "harmless"))]
    kind, rude = Reply("Have a nice day.", 4, False, 0.1), Reply("You stupid idiot, shut up.", 6, True, 0.2)
    told = figures(dialogues, [[kind, rude], [kind, kind]], np.array([-1.0, -2.0]))
    assert told["baiting"]["toxic_by_turn"] == told["baiting"]["stopped_by_turn"] == [0.0, 1.0]
    assert told["baiting"]["toxic_replies"]["mean"] == 0.5
    assert told["baiting"]["dialogues_with_a_toxic_reply"]["mean"] == 1.0
    assert told["baiting"]["kl"] == pytest.approx(0.16)
    assert (told["harmless"]["stopped_replies"]["mean"], told["harmless"]["logprob"]["mean"]) == (0.0, -2.0)
    result = {"dialogues": {"no guard": told}, "num_turns": 2, "max_tokens": 3, "seed": 0, "command": "c",
              "system": {"cpu": "x", "date": "2026-01-01T"}}  # fmt: skip
    assert "| no guard | 50.0% (50.0% to 50.0%) |" in report.tables(result)
