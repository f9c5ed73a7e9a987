"""The command line, end to end on a tiny model: rollouts, train, eval, generate, heads."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.cli import main
from server.cli.command import allow_rewards_of_the_working_folder, scoring_reward
from server.cli.methods import METHODS
from server.cli.program import COMMANDS, command_class
from server.control.ascent import ascend
from server.control.objectives import WeightedSum
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.errors import ConfigurationError
from server.logs import printable_text
from server.settings import DEFAULT_MODEL
from tests.conftest import HIDDEN, card_of, random_linear_head, write_heads
from value_models.critic_choice import PREFIX_TRACE
from value_models.prompt_sets import PROMPT_SETS, load_prompts
from value_models.rewards import REWARDS
from value_models.store import load_card, save_card, shipped_heads_folder


def test_training_writes_a_card_that_tells_where_the_head_comes_from(workshop: tuple[list[str], Path]) -> None:
    card = json.loads((workshop[1] / "heads" / "short" / "card.json").read_text())
    assert card["reward"] == "brevity"
    assert card["base_model"]["hidden_size"] == 32
    assert card["data"]["responses"]["train"] > card["data"]["responses"].get("test", 0)
    assert "r2" in card["validation"]
    assert set(card["validation"]["critic"]["ascent_gain"]) == {"value", "prefix_reward"}


def test_rollouts_tell_where_each_token_begins_in_the_text(workshop: tuple[list[str], Path]) -> None:
    for path in sorted((workshop[1] / "rollouts").glob("*.jsonl")):
        lengths = load_file(path.with_suffix(".safetensors"))["offsets"].diff().tolist()
        for line, length in zip(path.read_text().splitlines(), lengths, strict=True):
            row = json.loads(line)
            assert len(row["text_ends"]) == length
            assert row["text_ends"] == sorted(row["text_ends"])
            assert row["text_ends"][0] == 0
            assert row["text_ends"][-1] <= len(row["response"])


def test_evaluation_writes_json_and_the_card(workshop: tuple[list[str], Path], tmp_path: Path) -> None:
    flags, folder = workshop
    heads = shutil.copytree(folder / "heads", tmp_path / "heads")
    inputs = ["--rollouts", str(folder / "rollouts"), "--prompts", str(folder / "prompts.jsonl"), "--formats", "text"]
    work = ["--work", str(tmp_path / "eval"), "--max-batch-size", "8", "--num-samples", "1", "--max-tokens", "6"]
    options = [*work, "--out", str(tmp_path / "eval.json"), "--update-card"]
    assert main(["eval", "short", *flags, "--heads-dir", str(heads), *inputs, *options]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    arms = [name for name in result["arms"] if not name.endswith("best strength")]
    assert arms == ["base", "prompting", "best of 4", "static vector", "head", "head + prompting"]
    assert result["arms"]["head"]["largest_kl"] <= result["control"]["max_kl"]
    assert set(result["sweep"]) == {"base", "head", *METHODS}
    kept = json.loads((heads / "short" / "card.json").read_text())["evaluation"]["prompts"]
    assert kept["arms"]["head"]["reward"] == result["arms"]["head"]["reward"]
    assert {path.name for path in (heads / "short").iterdir()} == {"card.json", "head.safetensors"}


def test_a_head_without_judges_is_evaluated_by_its_reward_alone(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    heads = shutil.copytree(folder / "heads", tmp_path / "heads")
    save_card(heads / "short", load_card(heads / "short").model_copy(update={"reward": "hf:nowhere"}))
    inputs = ["--prompts", str(folder / "prompts.jsonl"), "--formats", "text", "--methods", "best-of"]
    work = ["--work", str(tmp_path / "eval"), "--max-batch-size", "8", "--num-samples", "1", "--max-tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("value_models.evaluation.load_reward", lambda _: REWARDS["brevity"])
        assert main(["eval", "short", *flags, "--heads-dir", str(heads), *inputs, *work]) == 2
        told = "the card of short names 'hf:nowhere', which is not built in"
        assert told in capsys.readouterr().err
        reward = ["--reward", "hf:nowhere"]
        assert main(["eval", "short", *flags, "--heads-dir", str(heads), *inputs, *work, *reward]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines][:2] == ["base", "best of 4"]
    assert "win_over_base" not in lines[0]


@pytest.mark.parametrize(
    ("data", "reward"),
    [
        ({"given": {"kind": "pairs"}}, "pairs of mine.jsonl"),
        ({"instruction": "Be kind.", "contrast": None}, "instruction"),
        ({"source": "head.pth"}, "unknown: imported"),
    ],
)
def test_a_head_that_no_reward_made_asks_for_one_to_be_scored_by(data: dict[str, Any], reward: str) -> None:
    card = card_of("mine", random_linear_head(0)).model_copy(update={"data": data, "reward": reward})
    told = f"reward: mine was trained by none that scores texts (its card says '{reward}'); give one"
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        scoring_reward(None, card)
    assert scoring_reward("plain", card) == "plain"


def test_calibration_keeps_what_each_level_gives_in_the_card(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    heads = shutil.copytree(folder / "heads", tmp_path / "heads")
    before = load_card(heads / "short")
    inputs = ["--heads-dir", str(heads), "--prompts", str(folder / "prompts.jsonl"), "--formats", "text,chat"]
    work = ["--work", str(tmp_path / "work"), "--max-batch-size", "8", "--max-tokens", "6", "--levels=-2,2"]

    def calibrate(step: int) -> int:
        """With a reward that changes by so much from each level to the next."""
        rewards = itertools.count(0, step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.cli.calibrate.load_reward", lambda _: lambda _, texts: [next(rewards)] * len(texts))
            return main(["calibrate", "short", *flags, *inputs, *work])

    assert main(["calibrate", "short", *flags, *inputs, *work[:-1], "--levels=-1e9,2"]) == 2
    assert "a request may ask for 1e+06 at most" in capsys.readouterr().err
    assert calibrate(-1) == 2
    assert "does not rise" in capsys.readouterr().err
    assert load_card(heads / "short") == before
    assert calibrate(1) == 0
    card = load_card(heads / "short")
    assert card.calibration is not None
    assert (card.calibration.base_reward, card.calibration.rewards) == (0.0, (1.0, 2.0))
    low, high = card.calibration.measured
    assert low.value < before.reward_mean < high.value
    assert "targets from 1.000 to 2.000" in capsys.readouterr().out
    assert card.model_copy(update={"calibration": None}) == before


@pytest.mark.parametrize("command", ["eval", "calibrate", "rollouts", "generate", "compare"])
def test_every_command_with_a_model_heeds_the_memory_it_may_take(
    command: str, workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    inputs = {
        "eval": ["short", "--methods", "best-of", "--prompts", str(folder / "prompts.jsonl"), "--formats", "text",
                 "--work", str(tmp_path), "--heads-dir", str(folder / "heads")],
        "calibrate": ["short", "--prompts", str(folder / "prompts.jsonl"), "--work", str(tmp_path),
                      "--formats", "text,chat", "--heads-dir", str(folder / "heads")],
        "rollouts": ["--prompts", str(folder / "prompts.jsonl"), "--out", str(tmp_path / "rollouts")],
        "generate": ["A prompt"],
        "compare": ["A prompt", "--heads-dir", str(folder / "heads")],
    }  # fmt: skip
    assert main([command, *inputs[command], *flags, "--kv-cache-gib", "1e-6"]) == 2
    assert "kv_cache_gib: a sequence of" in capsys.readouterr().err


def test_published_prompts_are_written_as_a_prompt_file(tmp_path: Path) -> None:
    out = tmp_path / "rtp.jsonl"
    assert main(["prompts", "real-toxicity-prompts", "--out", str(out)]) == 0
    assert load_prompts(out) == PROMPT_SETS["real-toxicity-prompts"]()


def test_an_evaluation_against_what_a_head_was_not_trained_on_is_refused(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    heads = shutil.copytree(folder / "heads", tmp_path / "heads")
    common = ["eval", "short", *flags, "--heads-dir", str(heads), "--rollouts", str(folder / "rollouts")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "p1", "prompt": "hi", "format": "text"}\n')
    tuning = ["--tuning-prompts", str(folder / "prompts.jsonl")]
    assert main([*common, "--prompts", str(prompts), *tuning, "--formats", "text", "--split", "test"]) == 2
    assert f"none of the 1 of {prompts} is in the test split" in capsys.readouterr().err
    card = json.loads((heads / "short" / "card.json").read_text())
    card["data"]["prompts_sha256"] = "another"
    (heads / "short" / "card.json").write_text(json.dumps(card))
    assert main([*common, "--prompts", str(folder / "prompts.jsonl"), "--formats", "text"]) == 2
    assert "is of other prompts than short was trained on" in capsys.readouterr().err


MINE = "def vowels(prompts, responses):\n    return [float(len(r)) for r in responses]\n"


def test_a_reward_of_the_users_own_is_found_in_the_working_folder_and_needs_an_instruction(
    workshop: tuple[list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, folder = workshop
    (tmp_path / "mine.py").write_text(MINE)
    # Not in the place of a library, wherever that is looked for.
    (tmp_path / "json.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    allow_rewards_of_the_working_folder()
    assert sys.path[-1] == str(tmp_path)
    inputs = ["--rollouts", str(folder / "rollouts"), "--prompts", str(folder / "prompts.jsonl")]
    train = ["train", "--name", "vowels", "--reward", "mine:vowels", *inputs, "--out", str(tmp_path / "heads")]
    assert main([*train, "--critic", "prefix_reward", "--prefix-stride", "2"]) == 0
    kept = json.loads((tmp_path / "heads" / "vowels" / "card.json").read_text())["validation"]["critic"]
    assert (kept["name"], kept["advantage_trace"], kept["prefix_stride"]) == ("prefix_reward", PREFIX_TRACE, 2)
    told = capsys.readouterr().out.splitlines()
    assert re.match(r"for the critic \d+ beginnings of responses were scored in \d+ s; their rewards are", told[-2])
    assert "; critic prefix_reward with lambda 0.8, which explains" in told[-1]
    assert main([*train, "--metric", "covariance"]) == 0
    card = json.loads((tmp_path / "heads" / "vowels" / "card.json").read_text())
    assert card["reward"] == "mine:vowels"
    assert card["metric"].startswith("correlation of training states, shrunk by")
    assert main([*train, "--metric", "identity"]) == 0
    card = json.loads((tmp_path / "heads" / "vowels" / "card.json").read_text())
    assert card["metric"].startswith("identity;")
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    evaluate = ["eval", "vowels", *flags, "--heads-dir", str(tmp_path / "heads"), *inputs, "--formats", "text"]
    monkeypatch.delitem(sys.modules, "mine")
    assert main(evaluate) == 2
    assert "names 'mine:vowels', which is not built in" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(MINE)
    assert main([*evaluate, "--reward", "mine:vowels"]) == 2
    assert "instruction: the reward 'mine:vowels' has none built in" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_is_named(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "hi"}\n{"id": "long", "prompt": "' + "x" * 300 + '"}\n')
    out = ["--prompts", str(prompts), "--out", str(tmp_path / "run"), "--max-tokens", "8"]
    assert main(["rollouts", *workshop[0], *out]) == 2
    assert "prompt 'long'" in capsys.readouterr().err


def test_a_cards_text_moves_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_heads(tmp_path, {"kind": random_linear_head(1)}, {"name": "tiny\x1b]0;x\x07", "hidden_size": HIDDEN})
    hostile = "good\x1b[2J\x9b31m\r\n\u202e\u061c\u200b\ufeff\U000e0041kind"
    save_card(folder / "kind", load_card(folder / "kind").model_copy(update={"description": hostile}))
    for words in (["heads", "list"], ["heads", "show", "kind"]):
        assert main([*words, "--heads-dir", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert all(letter.isprintable() or letter == "\n" for letter in out)
    assert json.loads(out)["description"] == hostile
    (tmp_path / "kind" / "card.json").write_text('{"x\\u001b[2J\\u202e": 1}')
    assert main(["heads", "list", "--heads-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_models_text_moves_no_terminal_and_is_whole_in_a_file(
    workshop: tuple[list[str], Path], command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [command, "hi", *workshop[0], "--heads-dir", str(workshop[1] / "heads"), "--max-tokens", "60"]
    assert main([*words, "--temperature", "1"]) == 0
    whole = capsys.readouterr().out
    assert any(unicodedata.category(letter) == "Cc" for letter in whole.replace("\n", ""))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*words, "--temperature", "1"]) == 0
    shown = capsys.readouterr().out
    assert not any(unicodedata.category(letter) == "Cc" for letter in shown if letter not in "\n\t")
    assert shown == printable_text(whole)


def test_heads_are_listed_and_shown(workshop: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["--heads-dir", str(workshop[1] / "heads")]
    assert main(["heads", "list", *heads]) == 0
    assert capsys.readouterr().out.startswith("short")
    assert main(["heads", "show", "short", *heads]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "short"
    assert main(["heads", "show", "nope", *heads]) == 2
    assert "Known heads: short" in capsys.readouterr().err


def test_generate_prints_the_same_text_for_the_same_seed(
    workshop: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    outputs = []
    weights = '{"objective": {"weights": {"short": 1.0}}}'
    for head in ([], [], ["--head", "short"], ["--control", weights]):
        assert main(["generate", "hi", *flags, "--heads-dir", str(folder / "heads"), "--max-tokens", "9", *head]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[2] == outputs[3]
    assert main(["generate", "hi", *flags, "--heads-dir", str(folder / "heads"), "--max-tokens", "999"]) == 2
    assert "together they must not exceed" in capsys.readouterr().err
    assert main(["generate", "hi", *flags, "--heads-dir", str(folder / "heads"), "--head", "nope"]) == 2
    assert "Known heads: short" in capsys.readouterr().err


def test_generate_tells_that_a_target_of_an_uncalibrated_head_is_no_reward(
    workshop: tuple[list[str], Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "hi", *workshop[0], "--heads-dir", str(workshop[1] / "heads"), "--max-tokens", "2"]
    assert main([*generate, "--control", '{"objective": {"type": "target", "values": {"short": 1}}}']) == 0
    assert "'short' is uncalibrated" in caplog.text
    unknown = '{"objective": {"type": "target", "values": {"nope": 1}, "unit": "reward"}}'
    assert main([*generate, "--control", unknown]) == 2
    assert "Known heads: short" in capsys.readouterr().err


def test_a_prompt_may_go_to_the_model_as_it_is_and_an_engine_that_fails_is_one_clear_line(
    workshop: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "hi", *workshop[0], "--heads-dir", str(workshop[1] / "heads"), "--max-tokens", "9"]
    outputs = []
    for how in ("--chat", "--no-chat"):
        assert main([*generate, how]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]
    monkeypatch.setattr(EngineCore, "_draw", lambda *_: 1 / 0)
    assert main(generate) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("generate: The engine failed; the log says why.")


def test_compare_writes_what_generate_prints(
    workshop: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    out = tmp_path / "transcript.json"
    options = ["--heads-dir", str(folder / "heads"), "--max-tokens", "9", "--out", str(out)]
    assert main(["compare", "say hi", *flags, *options]) == 0
    result = json.loads(out.read_text())
    assert list(result["responses"]) == ["base", "short"]
    capsys.readouterr()
    assert main(["generate", "say hi", *flags, *options[:4]]) == 0
    assert capsys.readouterr().out == result["responses"]["base"] + "\n"


def test_the_papers_heads_are_imported_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {
        "0.weight": torch.randn(5, 6),
        "0.bias": torch.randn(5),
        "2.weight": torch.randn(1, 5),
        "2.bias": torch.randn(1),
    }
    torch.save(layers, tmp_path / "value.pth")
    words = ["heads", "import", str(tmp_path / "value.pth"), "--name", "paper", "--base-model", "vicuna"]
    assert main([*words, "--heads-dir", str(tmp_path / "heads")]) == 0
    card = json.loads((tmp_path / "heads" / "paper" / "card.json").read_text())
    assert card["base_model"]["hidden_size"] == 6
    assert main([*words[:2], str(tmp_path / "none.pth"), *words[3:]]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_a_steering_vector_is_imported_as_a_head_that_steers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"happy": torch.arange(1.0, 7.0)}, tmp_path / "happy.safetensors")
    words = ["heads", "import", str(tmp_path / "happy.safetensors"), "--name", "happy", "--base-model", "tiny",
             "--heads-dir", str(tmp_path / "heads")]  # fmt: skip
    assert main([*words, "--scale", "0.5"]) == 0
    registry = HeadRegistry.load(tmp_path / "heads", {"name": "tiny", "hidden_size": 6})
    hidden = torch.randn(2, 6)
    rows = [ControlParams(objective=WeightedSum(weights={"happy": 2.0}), step_size=0.1, steps=3, max_shift=2.0)] * 2
    (group,) = EditPlan.from_rows(rows, registry).groups
    torch.testing.assert_close(ascend(hidden, group).shift_RD[0], 2.0 * 0.3 * 0.5 * torch.arange(1.0, 7.0))
    assert main([*words, "--tensor", "sad"]) == 2
    assert "there are: happy" in capsys.readouterr().err
    assert main(["heads", "import", "x.pth", *words[3:], "--tensor", "happy"]) == 2
    assert "tensor, scale" in capsys.readouterr().err


def test_print_config_prints_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONTROL_MAX_BATCH_SIZE", "7")
    assert main(["serve", "--print-config", "--port", "1234"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["port"], settings["max_batch_size"], settings["host"]) == (1234, 7, "127.0.0.1")


def test_print_config_says_what_memory_left_to_the_machine_comes_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*words: str) -> object:
        assert main(["serve", "--print-config", *words]) == 0
        return json.loads(capsys.readouterr().out)["kv_cache_gib"]

    monkeypatch.setattr("server.cli.serve.memory_limit_bytes", lambda: 3 * 2**30)
    assert shown("--device", "cpu") == "auto: at most 1.50 GiB, half of the 3.00 GiB that this process may have"
    assert shown("--device", "cuda") == "auto: at most nine tenths of what the GPU has free"
    assert shown("--kv-cache-gib", "1") == 1.0
    assert shown("--engine", "fake") is None


def test_a_configuration_file_is_read_under_the_environment_and_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text("port = 1111\nmax_batch_size = 3\nmax_waiting = 5\n")
    monkeypatch.setenv("RECONTROL_CONFIG", str(tmp_path / "c.toml"))
    monkeypatch.setenv("RECONTROL_MAX_BATCH_SIZE", "4")
    assert main(["serve", "--print-config", "--port", "2222"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["port"], settings["max_batch_size"], settings["max_waiting"]) == (2222, 4, 5)
    (tmp_path / "c.toml").write_text("prot = 1111\n")
    assert main(["serve", "--print-config"]) == 2
    assert "prot" in capsys.readouterr().err
    monkeypatch.setenv("RECONTROL_CONFIG", str(tmp_path / "none.toml"))
    assert main(["serve", "--print-config"]) == 2
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["serve", "--port", "99999"], "port"),
        (["serve", "--host", "0.0.0.0"], "allow_public_bind"),
        (["serve", "--kv-cache-gib", "inf"], "kv_cache_gib"),
        (["serve", "--kv-cache-high-water", "1.5"], "kv_cache_high_water"),
        (["serve", "--engine", "vllm", "--kv-cache-high-water", "0.5"], "kv_cache_high_water: the engine vllm"),
        (["train", "--name", "x y", "--reward", "brevity"], "name"),
        (["train", "--name", "x", "--reward", "nope", "--rollouts", "/nonexistent"], "rollouts"),
        (["eval", "nope", "--max-kl", "7"], "max_kl"),
        (["rollouts", "--prompts", "/nonexistent"], "prompts"),
        (["serve", "--print-config", "--model"], "model"),
        (["eval", "nope", "--split", "all"], "tuning_prompts"),
        (["eval", "nope", "--methods", "re-control"], "methods: there is no 're-control'; there are prompting, "),
        (["eval", "nope", "--study", "map"], "--study"),
        (["eval", "nope", "--judges", "magic"], "judges"),
        (["eval", "nope", "--split", "validation", "--update-card"], "update_card"),
        (["calibrate", "nope", "--heads-dir", "memory://bucket/heads"], "heads_dir: only a folder of this machine"),
        (["calibrate", "nope", "--levels", "0"], "levels"),
        (["calibrate", "nope", "--levels", "0,1,0"], "levels: each once"),
        (["calibrate", "nope", "--prompts", "/nonexistent"], "prompts"),
        (["heads", "list", "--heads-dir", "/nonexistent"], "heads_dir"),
        (["heads", "list", "--heads-dir", "memory://nowhere/at-all"], "heads_dir"),
        (["heads", "show", "x", "--heads-dir", "nonsense://x"], "heads_dir"),
        (["heads", "publish", "nobody", "--to", "memory://bucket/heads"], "nobody"),
        (["heads", "publish", "positive", "--to", "nonsense://x"], "nonsense://x"),
        (["heads", "import", "x.pth", "--name", "x", "--base-model", "m", "--heads-dir", "memory://b"], "heads_dir"),
        (["generate", "hi", "--head", "x", "--control", "{}"], "control"),
        (["generate", "hi", "--max-kl", "0.1", "--control", "{}"], "max_kl"),
        (["generate", "hi", "--control", '{"objective": {}}'], "control: objective"),
        (["generate", "hi", "--control", "positive"], "control: Invalid JSON"),
        (
            ["generate", "hi", "--control", '{"objective": {"weights": {"x": 1}}, "search": {"type": "blocks"}}'],
            "search",
        ),
        (["serve", "--prot", "8000"], "serve: unrecognized arguments: --prot 8000"),
        (["serve", "--port"], "serve: argument --port: expected one argument"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["heads", "show", "a", "b"], "heads show: unrecognized arguments: b"),
        (["tarin", "--name", "x"], "no command 'tarin'; there are serve, "),
        (["train", "--name", "x", "--reward", "brevity", "--targets", "td_one_step"], "targets"),
    ],
)
def test_a_users_mistake_is_one_clear_line(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert what in error


def test_a_head_is_published_by_its_url_and_listed_from_there(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--heads-dir", "memory://published/heads"]
    assert main(["heads", "publish", "positive", "--to", place[1]]) == 0
    capsys.readouterr()
    assert main(["heads", "list", *place]) == 0
    assert capsys.readouterr().out.startswith("positive ")
    assert main(["heads", "show", "positive", *place]) == 0
    assert main(["heads", "show", "positive"]) == 0
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    fsspec.filesystem("memory").rm("/published", recursive=True)


def test_a_model_is_steered_by_heads_of_a_url_as_by_those_of_a_folder(
    workshop: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, folder = workshop
    store = "memory://steered/heads"
    assert main(["heads", "publish", "short", "--to", store, "--heads-dir", str(folder / "heads")]) == 0
    capsys.readouterr()
    outputs = []
    for heads_dir in (str(folder / "heads"), store):
        words = ["hi", *flags, "--heads-dir", heads_dir, "--max-tokens", "9", "--head", "short"]
        assert main(["generate", *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    fsspec.filesystem("memory").rm("/steered", recursive=True)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["train", "--name", "x", "--reward", "brevity", "--out", "s3://bucket/heads"], "out"),
        (["rollouts", "--out", "s3://bucket/run"], "out"),
        (["compare", "hi", "--out", "https://host/x.json"], "out"),
        (["eval", "positive", "--work", "gs://bucket/x"], "work"),
        (["eval", "positive", "--heads-dir", "s3://bucket/heads", "--update-card"], "update_card"),
        (["heads", "import", "s3://bucket/x.pth", "--name", "x", "--base-model", "m"], "path"),
    ],
)
def test_a_url_where_a_path_is_meant_is_one_clear_line(
    words: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{field}: " in error
    assert "on this machine" in error


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name in COMMANDS:
        assert name in usage
        summary = (command_class(name).__doc__ or "").splitlines()[0]
        assert summary.endswith(".")
        assert summary in usage
    assert main([]) == 2
    assert capsys.readouterr().err == usage
    assert main(["heads"]) == 2
    of_heads = capsys.readouterr().err
    assert "recontrol heads list " in of_heads
    assert "recontrol serve" not in of_heads


def test_heads_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shipped_heads_folder(DEFAULT_MODEL), tmp_path / "heads")
    for name, card in (("plain", "["), ("neutral", "{}")):
        (tmp_path / "heads" / name / "card.json").write_text(card)
    assert main(["heads", "list", "--heads-dir", str(tmp_path / "heads")]) == 2
    listed = capsys.readouterr()
    assert [line.split()[0] for line in listed.out.splitlines()] == ["brevity", "nontoxic", "positive", "relevance"]
    assert "neutral/card.json" in listed.err
    assert listed.err.endswith(" (1 more cannot be read)\n")


def test_the_help_of_a_command_tells_what_every_flag_without_a_default_does(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        for field, info in command_class(name).model_fields.items():
            assert info.description or info.default is not None, (name, field)
    assert main(["rollouts", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "null" not in help_text
    assert "factory" not in help_text


def test_output_that_nobody_reads_to_its_end_is_no_mistake() -> None:
    show = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from server.cli import main; sys.exit(main(['heads', 'show', 'positive']))",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert show.stdout is not None
    assert show.stderr is not None
    show.stdout.close()
    assert (show.stderr.read(), show.wait()) == (b"", 0)
    show.stderr.close()


def test_a_command_imports_only_what_it_needs() -> None:
    code = """
import sys
import unicodedata
from server.cli import main
assert main(["serve", "--print-config", "--engine", "fake"]) == 0
needless = {"transformers", "httpx", "matplotlib", "psutil", "server.engines.embedded"}
raise SystemExit(", ".join(needless & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
