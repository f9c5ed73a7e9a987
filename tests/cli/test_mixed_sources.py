"""`recontrol train` with several sources for one head, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli import main
from tests.cli.test_own_texts import CHAT, LABELLED, write


@pytest.fixture
def sources(workshop: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Flags of each source."""
    monkeypatch.chdir(tmp_path)
    _, folder = workshop
    rollouts = ["--rollouts", str(folder / "rollouts"), "--prompts", str(folder / "prompts.jsonl")]
    return {
        "rollouts": ["--reward", "brevity", *rollouts],
        "pairs": ["--pairs", write(tmp_path / "mine.jsonl", CHAT)],
        "texts": ["--texts", write(tmp_path / "labelled.jsonl", LABELLED)],
    }


@pytest.mark.parametrize(
    ("kinds", "reward"),
    [
        (["rollouts", "pairs"], "brevity"),
        (["rollouts", "pairs", "texts"], "brevity"),
        (["pairs", "texts"], "pairs of mine.jsonl and texts of labelled.jsonl"),
    ],
)
def test_one_head_of_several_sources_has_a_card_that_tells_of_each(
    kinds: list[str], reward: str, sources: dict[str, list[str]], workshop: tuple[list[str], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["train", *workshop[0], *(flag for kind in kinds for flag in sources[kind]), "--name", "mixed"]
    assert main([*words, "--out", "heads", "--source-weights", f"{kinds[1]}=0.5"]) == 0
    card = json.loads((tmp_path / "heads/mixed/card.json").read_text())
    assert card["reward"] == reward
    assert [(part["kind"], part["weight"]) for part in card["data"]["sources"]] == [
        (kind, 0.5 if kind == kinds[1] else 1.0) for kind in kinds
    ]
    assert [part["kind"] for part in card["validation"]["sources"]] == kinds
    assert "added by the sources' weights" in card["metric"]
    assert card["targets"].endswith(
        "centred by prompt" if "texts" not in kinds else f"centred by prompt ({' and '.join(kinds[:-1])})"
    )
    assert f"of {kinds[1]}: R2" in capsys.readouterr().out
    assert main(["generate", "hi", *workshop[0], "--heads-dir", "heads", "--head", "mixed", "--max-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("kinds", "flags", "why"),
    [
        (["pairs"], ["--source-weights", "pairs=2"], "source_weights: goes with two of --reward"),
        (["rollouts", "pairs"], ["--source-weights", "texts=2"], "source_weights: no texts are given; there are"),
        (
            ["rollouts", "pairs"],
            ["--source-weights", "pairs=0"],
            "source_weights.pairs: Input should be greater",
        ),
        (["rollouts", "pairs"], ["--source-weights", "pairs=nan"], "source_weights.pairs: Input should be"),
        (["rollouts", "pairs"], ["--source-weights", "chats=1"], "source_weights.chats"),
        (["pairs", "texts"], ["--rollouts", "run"], "rollouts: pairs and texts are kept in a run each"),
        (["rollouts", "pairs"], ["--good-label", "a"], "good_label: pairs have no labels"),
        (["rollouts", "pairs"], ["--instruction", "Be kind."], "pairs: an instruction does not use it"),
        (["pairs", "texts"], ["--critic", "value"], "critic: pairs and texts have scores for advantages"),
        (["texts"], ["--advantage-trace", "0.9"], "advantage_trace: pairs and texts have scores for advantages"),
        (["pairs"], ["--field-features", "2"], "field_features: goes with --reward alone"),
        (["rollouts"], ["--field-features", "9"], "field_features"),
        (
            ["rollouts"],
            ["--metric", "identity", "--field-features", "2"],
            "field_features: goes with the metric natural",
        ),
        (["rollouts"], ["--hidden-widths", "4", "--field-features", "2"], "field_features: goes without hidden_widths"),
        (["rollouts"], ["--critic", "best"], "critic: Input should be 'auto', 'prefix_reward' or 'value'"),
        (["rollouts"], ["--metric", "identity", "--prefix-stride", "2"], "prefix_stride: goes with the metric natural"),
    ],
)
def test_sources_and_flags_that_do_not_go_together_are_refused_by_name(
    kinds: list[str], flags: list[str], why: str, sources: dict[str, list[str]], workshop: tuple[list[str], Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["train", *workshop[0], *(flag for kind in kinds for flag in sources[kind]), "--name", "mixed"]
    assert main([*words, "--out", "heads", *flags]) == 2
    assert f"recontrol train: {why}" in capsys.readouterr().err
    assert not (tmp_path / "heads").exists()
    assert not (tmp_path / "runs").exists()


def test_sources_of_two_models_are_refused(
    sources: dict[str, list[str]], fine_tune: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(fine_tune), "--dtype", "float32", "--device", "cpu"]
    assert main([*words, *sources["rollouts"], *sources["pairs"], "--name", "mixed", "--out", "heads"]) == 2
    assert "model: the rollouts are of another one (fingerprint is" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
