"""The studies end to end on a tiny model: what each keeps with the head, and what the report makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import COMMAND, PROGRAM
from benchmarks.quality.report import SECTIONS
from benchmarks.quality.rivals import RIVALS
from benchmarks.quality.studies import SweptMethodsStudy
from server.cli import main, run
from server.cli.comparison import MethodsStudy

WORK = ["--max-batch-size", "20", "--formats", "text"]


def study(*words: str) -> int:
    return run(COMMAND, PROGRAM, words)


def report(*words: str) -> int:
    return run("benchmarks.quality.report:Report", f"{PROGRAM}.report", words)


@pytest.fixture(scope="module")
def place(workshop: tuple[list[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Flags that name a tiny model and a copy of its heads, and the folder of those heads."""
    folder = tmp_path_factory.mktemp("quality")
    heads = shutil.copytree(workshop[1] / "heads", folder / "heads")
    return [*workshop[0], "--heads-dir", str(heads), "--work", str(folder / "work"), *WORK], heads


def card(heads: Path) -> dict[str, Any]:
    return json.loads((heads / "short" / "card.json").read_text())


@pytest.fixture(scope="module")
def compared(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the comparison of all methods wrote."""
    out = tmp_path_factory.mktemp("compared") / "out.json"
    inputs = ["--rollouts", str(workshop[1] / "rollouts"), "--prompts", str(workshop[1] / "prompts.jsonl")]
    size = ["--num-samples", "1", "--max-tokens", "6"]
    assert study("short", *place[0], *inputs, *size, "--out", str(out), "--update-card") == 0
    return json.loads(out.read_text())


def test_every_rival_is_compared_and_the_sweep_is_kept_with_its_plot(
    compared: dict[str, Any], place: tuple[list[str], Path]
) -> None:
    arms = [name for name in compared["arms"] if not name.endswith("best strength")]
    rivals = {name: method for name, method in RIVALS.items() if "brevity" in (method.rewards or {"brevity"})}
    assert arms == ["base", *(method.label for method in rivals.values()), "head", "head + prompting"]
    assert set(compared["sweep"]) == {"base", "head", *rivals}
    matched = {"head", "static-vector", "re-control", "token-log-odds", "end-token"}
    matched |= {"activation-steering", "prompt-replacement"}
    assert set(compared["strengths"]["equal_divergence"]) == matched
    assert compared["command"].startswith(f"{PROGRAM} ")
    assert json.loads((place[1] / "short" / "sweep.json").read_text())["sweep"] == compared["sweep"]
    assert "<svg" in (place[1] / "short" / "sweep.svg").read_text()


def test_compute_is_of_all_rows_and_responses_that_a_method_takes(compared: dict[str, Any]) -> None:
    def tokens_a_row(arm: str, rows: int) -> bool:
        """Whether as many tokens were run over as so many rows of the response's length."""
        figures = compared["arms"][arm]
        return figures["forwarded"]["mean"] == pytest.approx(rows * figures["tokens"]["mean"], abs=1e-3)

    rows = {"base": 1, "prompting": 1, "VAS": 20, "activation steering": 2, "blockwise best of 4": 4, "head": 1}
    assert all(tokens_a_row(arm, number) for arm, number in rows.items())
    assert 2 < compared["arms"]["best of 4"]["forwarded"]["mean"] / compared["arms"]["base"]["tokens"]["mean"] < 6
    assert set(compared["compute_areas"]["gain"]) == {"head", *compared["sweep"]} - {"base"}


def test_a_rival_that_comes_later_is_added_to_what_the_card_holds(
    compared: dict[str, Any],
    place: tuple[list[str], Path],
    workshop: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = ["--rollouts", str(workshop[1] / "rollouts"), "--prompts", str(workshop[1] / "prompts.jsonl")]
    words = [*place[0], *inputs, "--max-tokens", "6", "--methods", "static-vector", "--update-card", "--add-rows"]
    before = card(place[1])["evaluation"]["prompts"]
    assert study("short", *words, "--num-samples", "1") == 0
    after = card(place[1])["evaluation"]["prompts"]
    assert after["arms"] == before["arms"]
    assert len(after["added_by"]) == 1
    assert set(json.loads((place[1] / "short" / "sweep.json").read_text())["sweep"]) == set(compared["sweep"])
    assert study("short", *words, "--num-samples", "2") == 2
    assert "add_rows: the card's figures of prompts are of other sampling" in capsys.readouterr().err


def test_seeds_are_heads_and_vectors_of_their_own_with_intervals_over_both(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["--rollouts", str(workshop[1] / "rollouts"), "--prompts", str(workshop[1] / "prompts.jsonl")]
    size = ["--num-samples", "1", "--max-tokens", "4", "--num-seeds", "2"]
    assert study("short", *place[0], *inputs, *size, "--study", "seeds", "--update-card") == 0
    found = card(place[1])["seeds"]
    arms = [f"{what}, seed {seed}" for seed in (1, 2) for what in ("head", "static vector")]
    assert list(found["arms"]) == ["base", *arms]
    means = [
        found["arms"][f"head, seed {seed}"]["reward"]["mean"] - found["arms"]["base"]["reward"]["mean"]
        for seed in (1, 2)
    ]
    assert found["over_base"]["reward"]["mean"] == pytest.approx(sum(means) / 2, abs=2e-4)
    assert report("--heads-dir", str(place[1])) == 0
    assert "| `short` | prompts | reward |" in capsys.readouterr().out


@pytest.mark.usefixtures("compared")
def test_responses_longer_than_a_head_was_trained_on_are_a_test_set_of_their_own(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path]
) -> None:
    inputs = ["--rollouts", str(workshop[1] / "rollouts"), "--prompts", str(workshop[1] / "prompts.jsonl")]
    size = ["--num-samples", "1", "--max-tokens", "12", "--max-prompts", "2", "--methods", "static-vector"]
    assert study("short", *place[0], *inputs, *size, "--update-card") == 0
    assert {"prompts", "prompts, 12 tokens"} <= set(card(place[1])["evaluation"])


@pytest.mark.parametrize(("split", "keeps"), [("test", True), ("locked", False), ("all", False)])
def test_the_picture_of_all_methods_is_that_of_the_projects_own_test_set(
    compared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, *, keeps: bool
) -> None:
    scoring = SimpleNamespace(without=lambda _: SimpleNamespace(judges=()))
    setup: Any = SimpleNamespace(folder=tmp_path, split=split, scoring=scoring, subject=SimpleNamespace(head="short"))
    monkeypatch.setattr(MethodsStudy, "save", lambda *_: None)
    SweptMethodsStudy(setup).save(compared)
    assert (tmp_path / "sweep.json").exists() == keeps


def test_the_report_renders_cards_into_the_sections_that_a_page_has(
    compared: dict[str, Any], place: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = ["--heads-dir", str(place[1])]
    row = f"| head | {compared['arms']['head']['reward']['mean']:.2f} ["
    assert report(*heads) == 0
    assert row in capsys.readouterr().out
    page = tmp_path / "page.md"
    markers = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->" for name in SECTIONS]
    page.write_text("\n".join(["title", *markers, "end"]))
    assert report(*heads, "--into", str(page)) == 0
    text = page.read_text()
    assert row in text
    assert f"| `short` | prompts | {compared['arms']['base']['reward']['mean']:.2f} |" in text
    assert (text.startswith("title\n"), text.endswith("\nend"), "\nold\n" in text) == (True, True, False)
    page.write_text("no sections")
    assert report(*heads, "--into", str(page)) == 2
    assert "has no section" in capsys.readouterr().err


def test_the_map_is_kept_with_the_head_and_its_budget_holds(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path]
) -> None:
    inputs = ["--rollouts", str(workshop[1] / "rollouts"), "--tuning-prompts", str(workshop[1] / "prompts.jsonl")]
    assert study("short", *place[0], *inputs, "--max-tokens", "4", "--study", "map", "--update-card") == 0
    maps = json.loads((place[1] / "short" / "map.json").read_text())["maps"]
    assert len(maps["without budget"]) == len(maps["with budget"]) == 4
    assert all(cell["kl"] <= 0.3 for row in maps["with budget"] for cell in row)


def test_the_corners_that_a_request_may_ask_for_stay_within_the_largest_budget(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path]
) -> None:
    prompts = ["--prompts", str(workshop[1] / "prompts.jsonl")]
    assert study("short", *place[0], *prompts, "--max-tokens", "4", "--study", "stress", "--update-card") == 0
    arms = card(place[1])["stress"]["arms"]
    assert next(iter(arms)) == "base"
    assert max(arm["largest_kl"] for arm in arms.values()) <= 0.5


def test_what_a_response_takes_is_told_over_the_base_models(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path]
) -> None:
    inputs = ["--prompts", str(workshop[1] / "prompts.jsonl"), "--methods", "best-of,controlled-decoding"]
    size = ["--num-samples", "1", "--max-tokens", "4"]
    assert study("short", *place[0], *inputs, *size, "--study", "cost", "--update-card") == 0
    cost = {name: figures["over_base"] for name, figures in card(place[1])["cost"]["arms"].items()}
    assert cost["base"] == 1.0
    # How much more a method takes is not for a test to say on a machine that others use.
    assert {"best of 4", "controlled decoding", "head"} <= cost.keys()
    assert all(over_base > 0 for over_base in cost.values())


@pytest.fixture(scope="module")
def objectives(workshop: tuple[list[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a study of objectives with two heads, and the folder that it ran in once."""
    flags, folder = workshop
    place = tmp_path_factory.mktemp("objectives")
    inputs = ["--rollouts", str(folder / "rollouts"), "--prompts", str(folder / "prompts.jsonl")]
    for name, reward in (("short", "brevity"), ("easy", "plain")):
        assert main(["train", "--name", name, "--reward", reward, *inputs, "--out", str(place / "heads")]) == 0
    words = [*flags, "--heads-dir", str(place / "heads"), "--work", str(place / "work"), *WORK, *inputs[2:]]
    words += ["--max-tokens", "10", "--num-samples", "2", "--study", "objectives", "--update-card"]
    assert study("short,easy", *words, "--out", str(place / "first.json")) == 0
    return words, place


def test_the_study_of_objectives_measures_each_of_its_parts(objectives: tuple[list[str], Path]) -> None:
    result = json.loads((objectives[1] / "heads" / "objectives.json").read_text())
    assert "<svg" in (objectives[1] / "heads" / "objectives.svg").read_text()
    arms, (worst,) = result["arms"], result["worst_cases"]
    assert {*result["search"]["arms"], *result["floor"]["arms"], *worst["arms"]} <= set(arms)
    assert (worst["heads"], worst["num_samples"]) == (["short", "easy"], 8)
    assert len(result["target"]["levels"]) == len(result["target"]["missed_by"]) == 5
    assert all(set(arm["rewards"]) == set(arm["values"]) == {"short", "easy"} for arm in arms.values())
    assert arms["base"]["kl"]["mean"] == 0 < arms["blocks of 4"]["kl"]["mean"]


def test_the_study_of_objectives_goes_on_where_it_was(objectives: tuple[list[str], Path]) -> None:
    words, place = objectives
    before = {path: path.stat().st_size for path in (place / "work" / "responses").glob("*.jsonl")}
    assert study("short,easy", *words, "--out", str(place / "second.json")) == 0
    assert {path: path.stat().st_size for path in before} == before
    first, second = (json.loads((place / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["arms"] == second["arms"]


def test_the_study_of_objectives_is_reported(
    objectives: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report("--heads-dir", str(objectives[1] / "heads")) == 0
    text = capsys.readouterr().out
    arms = json.loads((objectives[1] / "first.json").read_text())["arms"]
    assert f"| gradient, blocks of 4 | {arms['gradient, blocks of 4']['rewards']['short']['mean']:.2f} [" in text
    assert "**Floor** of" in text
    assert "**Worst case** of `short` and `easy`" in text


@pytest.mark.parametrize(
    ("heads", "worst_case", "what"),
    [
        ("short", [], "head: the objectives study takes two heads or more"),
        ("short,easy", ["--worst-case", "short"], "worst_case: the objectives study takes two heads or more"),
        ("short,easy", ["--worst-case", "short+easy,short+gone"], "gone"),
    ],
)
def test_too_few_heads_or_unknown_ones_are_one_clear_line(
    objectives: tuple[list[str], Path],
    heads: str,
    worst_case: list[str],
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert study(heads, *objectives[0], *worst_case) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--study", "stress", "--max-kl", "0.1"], "max_kl: the stress study does not use it"),
        (["--study", "map", "--num-samples", "2"], "num_samples: the map study does not use it"),
        (["--study", "map", "--split", "all"], "split: the map study does not use it"),
        (["--split", "all"], "tuning_prompts: needed with --split all"),
        (["--methods", "magic"], "methods: there is no 'magic'; there are prompting, "),
        (["--max-batch-size", "4"], "max_batch_size: controlled-decoding tries 8 continuations at once"),
        (["--max-batch-size", "2", "--methods", "blockwise-best-of"], "max_batch_size: blockwise-best-of tries 4"),
    ],
)
def test_flags_that_mean_nothing_to_a_study_are_one_clear_line(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study("nope", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{PROGRAM}: ")
    assert what in error


def test_a_page_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--into", "/nonexistent.md") == 2
    assert "/nonexistent.md" in capsys.readouterr().err


def test_a_rival_of_other_rewards_is_refused_where_it_is_named(
    place: tuple[list[str], Path], workshop: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompts", str(workshop[1] / "prompts.jsonl"), "--methods", "end-token,word-scores"]
    assert study("short", *place[0], *prompts) == 2
    expected = "word-scores is for the rewards neutral, nontoxic, plain, positive, and not for 'brevity'"
    assert expected in capsys.readouterr().err
