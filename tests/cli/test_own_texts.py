"""`recontrol score` and `recontrol train` on pairs and texts of one's own, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.engines.embedded.given_texts import EngineTextSource
from value_models.rollouts import open_rollouts

CHAT: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"How was day {i}?"}],
        "chosen": [{"role": "assistant", "content": f"good, thanks {i}"}],
        "rejected": [{"role": "assistant", "content": f"bad {i}"}],
    }
    for i in range(20)
]
LABELLED = [{"text": f"{'good' if i % 2 else 'bad'} text {i}", "label": i % 2 == 1} for i in range(20)]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("kind", "records"), [("pairs", CHAT), ("texts", LABELLED)])
def test_a_file_becomes_a_head_whose_card_tells_where_it_comes_from(
    kind: str, records: list[dict[str, Any]], workshop: tuple[list[str], Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "mine.jsonl", records)
    assert main(["train", *workshop[0], f"--{kind}", file, "--name", "mine", "--out", "heads"]) == 0
    card = json.loads((tmp_path / "heads/mine/card.json").read_text())
    assert card["reward"] == f"{kind} of mine.jsonl"
    assert card["data"]["given"]["kind"] == kind
    assert set(card["data"]["prompts"]) == {"train", "validation"}
    assert card["data"]["prompts"]["validation"] == 4
    assert card["validation"]["order"]["by_value"] == 1.0
    assert main(["generate", "hi", *workshop[0], "--heads-dir", "heads", "--head", "mine", "--max-tokens", "4"]) == 0


def test_scoring_and_then_training_gives_the_head_that_training_alone_gives(
    workshop: tuple[list[str], Path], tmp_path: Path
) -> None:
    pairs = ["--pairs", write(tmp_path / "mine.jsonl", CHAT)]
    assert main(["score", *workshop[0], *pairs, "--out", "run"]) == 0
    assert main(["train", "--rollouts", "run", "--name", "two", "--out", "heads"]) == 0
    assert main(["train", *workshop[0], *pairs, "--name", "one", "--out", "heads"]) == 0
    one, two = ((tmp_path / "heads" / name / "head.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    (kept,) = (tmp_path / "runs/scored").iterdir()
    assert open_rollouts(kept).kind == "pairs"


def test_a_killed_score_goes_on_where_it_stopped(
    workshop: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["score", *workshop[0], "--pairs", write(tmp_path / "mine.jsonl", CHAT), "--out"]
    read, lines = EngineTextSource.score, list[int]()

    def score(self: EngineTextSource, texts: Any, settings: Any) -> Any:
        if len(lines) == 32:
            lines.append(0)
            raise KeyboardInterrupt
        lines.extend(text.line for text in texts)
        return read(self, texts, settings)

    monkeypatch.setattr(EngineTextSource, "score", score)
    with pytest.raises(KeyboardInterrupt):
        main([*words, "run"])
    assert main([*words, "run"]) == 0
    assert lines[33:] == [17, 17, 18, 18, 19, 19, 20, 20]
    assert main([*words, "whole"]) == 0
    run, whole = ({path.name: path.read_bytes() for path in (tmp_path / f).iterdir()} for f in ("run", "whole"))
    assert run == whole


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["score"], "pairs: give --pairs FILE or --texts FILE"),
        (["score", "--pairs", "p", "--texts", "t"], "texts: give either --pairs or --texts"),
        (["score", "--pairs", "p", "--good-label", "a"], "good_label: pairs have no labels"),
        (["score", "--pairs", "nowhere"], "nowhere cannot be read (No such file or directory)"),
        (["train", "--name", "x"], "reward: give one, or --pairs FILE, --texts FILE, --instruction"),
        (["train", "--name", "x", "--cut-long"], "cut_long: goes with --pairs or --texts alone"),
        (["train", "--name", "x", "--pairs", "mine.jsonl", "--reward", "plain"], "runs/rollouts holds no rollouts"),
        (["train", "--name", "x", "--pairs", "mine.jsonl", "--prompts", "p"], "prompts: pairs bring their own"),
        (["train", "--name", "x", "--pairs", "mine.jsonl", "--max-tokens", "2"], "mine.jsonl, line 1: the response"),
        (["train", "--name", "x", "--pairs", "torn.jsonl"], "torn.jsonl, line 3: no JSON object"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str], why: str, workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "mine.jsonl", CHAT)
    (tmp_path / "torn.jsonl").write_text((tmp_path / "mine.jsonl").read_text()[:450])
    flags = workshop[0] if len(words) > 1 else []
    capsys.readouterr()
    assert main([words[0], *flags, *words[1:], "--out", "out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"recontrol {words[0]}: {why}")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jsonl", "torn.jsonl"}


def test_rewards_and_scores_of_ones_own_do_not_mix(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    assert main(["score", *flags, "--pairs", write(tmp_path / "mine.jsonl", CHAT), "--out", "run"]) == 0
    train = ["train", "--name", "x", "--out", "heads", "--rollouts"]
    assert main([*train, "run", "--critic", "auto"]) == 2
    assert "critic: pairs and texts have scores for advantages; leave it out" in capsys.readouterr().err
    assert main([*train, "run", "--reward", "brevity"]) == 2
    assert "run holds pairs with scores of their own; leave --reward out" in capsys.readouterr().err
    assert main([*train, str(folder / "rollouts")]) == 2
    assert "which have no scores of their own; give --reward" in capsys.readouterr().err
    assert main(["score", *flags, "--pairs", "mine.jsonl", "--out", "run", "--seed", "1"]) == 2
    assert "run holds another run; these differ: settings.seed" in capsys.readouterr().err


def test_a_head_of_pairs_is_evaluated_by_a_reward_that_is_named(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    train = ["train", *flags, "--pairs", write(tmp_path / "mine.jsonl", CHAT), "--name", "mine", "--out", "heads"]
    assert main(train) == 0
    words = ["eval", "mine", *flags, "--heads-dir", "heads", "--prompts", str(folder / "prompts.jsonl")]
    words += ["--formats", "text", "--methods", "best-of", "--num-samples", "1", "--max-tokens", "4"]
    assert main(words) == 2
    assert "reward: mine was trained by none that scores texts" in capsys.readouterr().err
    assert main([*words, "--reward", "brevity", "--judges", "few_characters"]) == 0
