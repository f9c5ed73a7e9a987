"""`recontrol train --instruction`, end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.cli import main
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.instructed import EngineInstructedSource
from server.engines.embedded.model.loader import LoadedModel
from value_models.distillation import DistilSettings, read_texts
from value_models.prompt_sets import load_prompts

INSTRUCTION = ["--instruction", "Be kind.", "--instruction-tokens", "4"]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough chat prompts for all three sides of the split."""
    path = tmp_path_factory.mktemp("chats") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"say {i}"}) + "\n" for i in range(40)))
    return path


@pytest.mark.parametrize("contrast", [None, "Be rude."])
def test_an_instruction_becomes_a_head_that_is_served(
    workshop: tuple[list[str], Path],
    chats: Path,
    tmp_path: Path,
    contrast: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--name", "kind", *workshop[0], *INSTRUCTION, "--prompts", str(chats), "--out", str(tmp_path)]
    assert main([*words, *([] if contrast is None else ["--contrast", contrast])]) == 0
    assert "the head closes" in capsys.readouterr().out
    card = json.loads((tmp_path / "kind" / "card.json").read_text())
    assert (card["reward"], card["data"]["instruction"], card["data"]["contrast"]) == (
        "instruction",
        "Be kind.",
        contrast,
    )
    assert card["distillation"]["at_equal_kl"]["paid"] > 0
    assert card["data"]["responses"] == {side: 2 * count for side, count in card["data"]["prompts"].items()}
    assert (
        main(["generate", "hi", *workshop[0], "--heads-dir", str(tmp_path), "--head", "kind", "--max-tokens", "4"]) == 0
    )


def test_each_text_is_read_after_nothing_and_after_both_instructions(
    load_tiny: Callable[..., LoadedModel], chats: Path
) -> None:
    loaded = load_tiny()
    source = EngineInstructedSource(loaded, EngineCore(loaded, HeadRegistry({}), max_batch_size=8))
    prompts = load_prompts(chats)
    settings = DistilSettings(max_prompts=20, max_tokens=3)
    texts = read_texts(source, prompts, "Be kind.", "Be rude.", settings)
    first, last = texts.offsets[0], texts.offsets[1] - 1
    token_ids = texts.token_ids_N[first : last + 1].tolist()
    for instruction, states_ND in (
        (None, texts.bare_ND), ("Be kind.", texts.instructed_ND), ("Be rude.", texts.contrasted_ND)
    ):  # fmt: skip
        text = [*source.encode(prompts[0], instruction), *token_ids[:-1]]
        assert torch.allclose(states_ND[last].float(), source.core.states(text)[-1], atol=1e-4)


def folder_with_template(folder: Path, template: str | None, to: Path) -> Path:
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((to / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (to / "tokenizer_config.json").write_text(
        json.dumps(config if template is None else {**config, "chat_template": template})
    )
    return to


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (None, "instruction: messages: this model has no chat template"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x",
            "System role not supported",
        ),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            "instruction: this model's chat template leaves system messages out",
        ),
    ],
)
def test_a_model_without_a_place_for_an_instruction_is_refused(
    workshop: tuple[list[str], Path],
    chats: Path,
    tmp_path: Path,
    template: str | None,
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = workshop[0]
    model = folder_with_template(Path(flags[flags.index("--model") + 1]), template, tmp_path / "model")
    words = ["train", "--name", "kind", *flags, "--model", str(model), *INSTRUCTION, "--prompts", str(chats)]
    assert main([*words, "--out", str(tmp_path / "heads")]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert what in error
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "reward: give one, or --pairs FILE, --texts FILE, --instruction"),
        (["--instruction", " "], "instruction: it is empty"),
        (["--instruction", "Be kind.", "--contrast", ""], "contrast: it is empty"),
        (["--instruction", "Be kind.", "--contrast", "Be  kind."], "contrast: it is the instruction itself"),
        (["--contrast", "Be rude.", "--reward", "brevity"], "contrast: goes with --instruction alone"),
        (["--instruction-tokens", "4", "--reward", "brevity"], "instruction_tokens: goes with --instruction alone"),
        (["--instruction", "Be kind.", "--reward", "brevity"], "reward: an instruction does not use it"),
        (["--instruction", "Be kind.", "--metric", "identity"], "metric: an instruction does not use it"),
        (["--instruction", "Be kind.", "--instruction-prompts", "3"], "instruction_prompts"),
    ],
)
def test_flags_that_do_not_go_together_are_one_clear_line(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--name", "x", *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert what in error


def test_too_few_prompts_are_named(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"id": "a", "prompt": "hi"}\n')
    assert main(["train", "--name", "x", *workshop[0], *INSTRUCTION, "--prompts", str(few)]) == 2
    assert "prompts: 1 chat prompts" in capsys.readouterr().err


def test_prompts_of_which_too_few_are_different_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "same.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"say {max(i - 30, 0)}"} for i in range(60)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["train", "--name", "x", "--model", str(tmp_path / "none"), *INSTRUCTION, "--prompts", str(prompts)]
    assert main([*words, "--instruction-prompts", "40"]) == 2
    assert "instruction_prompts: of the first 40 prompts 10 are different" in capsys.readouterr().err
