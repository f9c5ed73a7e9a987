"""A user's mistake is one line and status 2; a mistake of the program's own keeps its traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

import value_models.errors as tree
from server.cli import main
from server.cli.heads import HeadsList
from server.errors import ConfigurationError
from tests.conftest import random_head, write_heads
from value_models.errors import HeadFileError, ValueModelError
from value_models.rollouts import Rollout, RolloutPrompt, RolloutSettings, collect_rollouts

SETTINGS = RolloutSettings(num_samples=1)


class Port(BaseModel):
    number: int


def a_wrong_object() -> None:
    Port.model_validate({"number": "x"})


def raising(error: Exception) -> Callable[[object], None]:
    def fail(_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [HeadFileError("card.json: wrong"), ConfigurationError("card.json: wrong"), OSError("card.json: wrong")]
)
def test_what_is_raised_on_purpose_or_by_the_system_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HeadsList, "cli_cmd", raising(error))
    assert main(["heads", "list"]) == 2
    assert capsys.readouterr().err == "recontrol heads list: card.json: wrong\n"


@pytest.mark.parametrize("error", [ValueError("not a flag's"), KeyError("x"), AssertionError(), TypeError("y")])
def test_a_mistake_of_the_programs_own_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadsList, "cli_cmd", raising(error))
    with pytest.raises(type(error)) as raised:
        main(["heads", "list"])
    assert raised.value is error


def test_an_object_of_the_programs_that_is_wrong_is_no_mistake_in_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadsList, "cli_cmd", lambda _: a_wrong_object())
    with pytest.raises(ValueError, match="Port"):
        main(["heads", "list"])


def test_all_errors_of_value_models_are_in_one_tree_that_is_drawn() -> None:
    errors = [kind for kind in vars(tree).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, ValueModelError) and kind.__name__ in (tree.__doc__ or "") for kind in errors)
    folder = Path(tree.__file__).parent
    others = [path for path in folder.rglob("*.py") if path.name != "errors.py"]
    assert not [path for path in others if "Error(ValueError)" in path.read_text()]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["generate", "hi", "--temperature", "3"], "temperature: Input should be less than or equal to 2"),
        (["generate", "hi", "--top-p", "0"], "top_p"),
        (["generate", "hi", "--max-tokens", "-1"], "max_tokens"),
        (["generate", "hi", "--seed", str(2**63)], "seed"),
        (["generate", "hi", "--head", "a head"], "head: String should match pattern"),
        (["compare", "hi", "--max-kl", "0.6"], "max_kl"),
        (["rollouts", "--temperature", "3"], "temperature"),
        (["heads", "import", "x.gguf", "--name", "a/b", "--base-model", "m"], "name"),
        (["heads", "import", "x.gguf", "--name", "a", "--base-model", "m", "--scale", "inf"], "scale"),
        (["train", "--name", "x", "--reward", "brevity", "--hidden-widths", "[0]"], "hidden_widths.0"),
    ],
)
def test_a_value_out_of_range_is_named_before_any_model_is_loaded(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["train"], "train: name: Field required"),
        (["heads", "nope"], "there is no command 'heads nope'; there are serve, "),
        (["--nope"], "there is no flag '--nope'; there are serve, "),
        (["heads", "list", "--heads-dir", ""], "heads_dir: Value should have at least 1 item"),
        (["heads", "publish", "positive", "--to", ""], "to: String should have at least 1 character"),
    ],
)
def test_mistakes_are_one_line_together(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert what in error


def test_a_message_of_several_lines_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(HeadsList, "cli_cmd", raising(HeadFileError("one of:\n(1) this,\n(2) that")))
    assert main(["heads", "list"]) == 2
    assert capsys.readouterr().err == "recontrol heads list: one of: (1) this, (2) that\n"


@pytest.mark.parametrize("content", [b"port = [", b"\xff\xfe"])
def test_a_settings_file_that_is_no_toml_is_one_line(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.toml"
    path.write_bytes(content)
    monkeypatch.setenv("RECONTROL_CONFIG", str(path))
    assert main(["serve", "--print-config"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"RECONTROL_CONFIG: {path} is not TOML" in error


def test_a_vector_scaled_beyond_numbers_makes_no_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vector = tmp_path / "v.safetensors"
    save_file({"v": torch.full((4,), 2.0)}, vector)
    words = ["heads", "import", str(vector), "--name", "a", "--base-model", "m", "--heads-dir", str(tmp_path)]
    assert main([*words, "--scale", "1e308"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "not finite" in error
    assert not (tmp_path / "a").exists()


class OneToken:
    """A source whose every response is one token."""

    def __init__(self) -> None:
        self.base_model: dict[str, Any] = {"name": "tiny", "hidden_size": 4}

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        return (Rollout(prompt.id, 0, "a", (1,), True, torch.ones(1, 4), torch.ones(1, 4)) for prompt in prompts)


@pytest.mark.parametrize("damage", ["tensors", "lacking", "rows", "manifest"])
def test_a_damaged_run_is_one_line_that_names_the_file(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "hi"}) + "\n")
    collect_rollouts(OneToken(), [RolloutPrompt(id="a", prompt="hi")], tmp_path, SETTINGS)
    tensors = tmp_path / "shard-00000.safetensors"
    if damage == "lacking":
        save_file({"offsets": load_file(tensors)["offsets"]}, tensors)
    else:
        name = {"tensors": tensors.name, "rows": "shard-00000.jsonl", "manifest": "manifest.json"}[damage]
        (tmp_path / name).write_text("[1]" if damage == "manifest" else "{ torn\n")
    words = ["train", "--name", "x", "--reward", "brevity", "--rollouts", str(tmp_path), "--prompts", str(prompts)]
    assert main([*words, "--out", str(tmp_path / "heads")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert error.count("\n") == 1


def test_a_card_that_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = write_heads(tmp_path, {"good": random_head(1)}, {"name": "tiny", "hidden_size": 32})
    card = json.loads((heads / "good" / "card.json").read_text())
    (heads / "good" / "card.json").write_text(json.dumps({**card, "earned": 1.0}))
    assert main(["heads", "list", "--heads-dir", str(heads)]) == 2
    assert "earned" in capsys.readouterr().err
