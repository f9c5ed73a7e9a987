"""Whole conversations as prompts: what a line may hold, what the model reads, and what rewards see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.control.registry import HeadRegistry
from server.engines import rollout_prompts
from server.engines.chat_template import encode_chat
from server.engines.embedded.core import EngineCore
from server.engines.embedded.instructed import EngineInstructedSource
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import InvalidRequestError
from value_models.errors import RolloutError
from value_models.generations import GenerationStore
from value_models.prompt_sets import RolloutPrompt, load_prompts
from value_models.rollouts import RolloutSettings, open_rollouts, rollouts_manifest


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TURNS = [message("user", "Hi"), message("assistant", "Hello!"), message("user", "What now?")]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path, line: object) -> RolloutPrompt:
    (prompt,) = load_prompts(write(path / "p.jsonl", line))
    return prompt


def test_a_conversation_is_a_prompt_whose_text_is_its_transcript(tmp_path: Path) -> None:
    prompt = read(tmp_path, {"id": "c", "kind": "talk", "messages": TURNS})
    assert (prompt.id, prompt.kind, prompt.format) == ("c", "talk", "chat")
    assert prompt.turns() == TURNS
    assert prompt.text == "user: Hi\n\nassistant: Hello!\n\nuser: What now?"


def test_one_message_is_the_prompt_that_its_text_is(tmp_path: Path) -> None:
    prompt, plain = read(tmp_path, {"id": "c", "messages": TURNS[:1]}), read(tmp_path, {"id": "c", "prompt": "Hi"})
    assert (prompt.text, prompt.turns("Be kind.")) == (plain.text, plain.turns("Be kind."))


def test_prompts_without_ids_get_one_of_what_they_say(tmp_path: Path) -> None:
    lines = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"prompt": "Hi"}, {"prompt": "Hi", "format": "text"}]
    ids = [prompt.id for prompt in load_prompts(write(tmp_path / "p.jsonl", *lines))]
    assert len(set(ids)) == 4
    assert ids == [prompt.id for prompt in load_prompts(tmp_path / "p.jsonl")]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"messages": []}, "messages: there is no message before the answer"),
        ({"messages": "Hi"}, "messages: a list of messages is needed"),
        ({"messages": TURNS[:2]}, "messages: an answer follows a message of the assistant"),
        ({"messages": [message("robot", "Hi")]}, "messages.0.role: must be one of system, developer, user, assistant"),
        ({"messages": [message("user", " ")]}, "messages.0.content: is empty"),
        ({"messages": [{"role": "user"}]}, "messages.0: a message has the fields role and content and no others"),
        ({"messages": [*TURNS, message("user", 3)]}, "messages.3.content: must be a text"),  # type: ignore[arg-type]
        ({"messages": TURNS, "prompt": "Hi"}, "prompt and messages both hold the prompt"),
        ({"messages": TURNS, "format": "text"}, "format: messages are a chat"),
        ({"messages": TURNS, "id": ""}, "id: String should have at least 1 character"),
        ({"messages": TURNS, "mesages": 1}, "mesages: Extra inputs are not permitted"),
        ({"messages": [message("user", "first")]}, "the same prompt, as in line 1"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"prompt": NaN}', "no JSON object (NaN is not a finite number)"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(line: object, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"messages": [message("user", "first")]}, line)
    with pytest.raises(RolloutError) as raised:
        load_prompts(path)
    assert str(raised.value).startswith(f"prompts: {path}, line 2: ")
    assert why in str(raised.value)


def test_plain_prompts_are_the_run_that_they_were_before_there_were_conversations(tmp_path: Path) -> None:
    prompt = read(tmp_path, {"id": "a", "prompt": "hi", "kind": "k"})
    assert prompt.identity() == '{"id":"a","format":"chat","kind":"k","text":"hi"}'


def test_conversations_that_read_alike_are_other_prompts(tmp_path: Path) -> None:
    """Their transcripts are the same text, but not what the model reads."""
    texts = [message("user", "a\n\nuser: b"), message("user", "c")], [message("user", m) for m in ("a", "b", "c")]
    one, other = (read(tmp_path, {"id": "x", "messages": messages}) for messages in texts)
    assert one.text == other.text
    assert rollouts_manifest({}, [one], RolloutSettings()) != rollouts_manifest({}, [other], RolloutSettings())
    store, asked = GenerationStore(None), list[str]()

    def sampler(prompts: Any, number: int) -> Any:
        asked.extend(prompt.id for prompt in prompts)
        return []

    for prompt in (one, other):
        with pytest.raises(KeyError):
            store.samples({}, [prompt], 1, sampler)
    assert asked == ["x", "x"]


@pytest.fixture
def source(load_tiny: Callable[..., LoadedModel]) -> EngineRolloutSource:
    loaded = load_tiny()
    return EngineRolloutSource(loaded, EngineCore(loaded, HeadRegistry({}), max_batch_size=4))


def test_the_model_reads_a_conversation_through_its_template(source: EngineRolloutSource, tmp_path: Path) -> None:
    prompt = read(tmp_path, {"messages": [message("system", "Be brief."), *TURNS]})
    tokenizer = source.loaded.tokenizer
    assert source.encode(prompt) == encode_chat(tokenizer, prompt.turns())
    last = {**TURNS[-1], "content": "Be kind.\n\nWhat now?"}
    told = [message("system", "Be brief."), *TURNS[:-1], last]
    assert source.encode(prompt, "Be kind.") == encode_chat(tokenizer, told)
    instructed = EngineInstructedSource(source.loaded, source.core).encode(prompt, "Be kind.")
    assert instructed == encode_chat(tokenizer, [message("system", "Be kind.\n\nBe brief."), *TURNS])


def test_a_conversation_that_the_template_refuses_is_told_by_its_id(
    workshop: tuple[list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write(tmp_path / "p.jsonl", {"id": "good", "prompt": "a"}, {"id": "bad", "messages": TURNS})

    def encode(tokenizer: Any, messages: Any) -> list[int]:
        if len(messages) > 1:
            raise InvalidRequestError("Conversation roles must alternate")
        return encode_chat(tokenizer, messages)

    monkeypatch.setattr(rollout_prompts, "encode_chat", encode)
    words = ["rollouts", *workshop[0], "--prompts", str(prompts), "--out", str(tmp_path / "run"), "--max-tokens", "2"]
    assert main(words) == 2
    assert "prompt 'bad': Conversation roles must alternate" in capsys.readouterr().err


def test_rollouts_training_and_evaluation_take_conversations(workshop: tuple[list[str], Path], tmp_path: Path) -> None:
    flags, _ = workshop
    lines = [
        {"id": f"p{i}", "messages": [*TURNS, message("assistant", "Go."), message("user", f"{i}?")]} for i in range(40)
    ]
    prompts, run, heads = write(tmp_path / "p.jsonl", *lines), tmp_path / "run", tmp_path / "heads"
    sampling = ["--num-samples", "2", "--max-tokens", "4"]
    assert main(["rollouts", *flags, "--prompts", str(prompts), "--out", str(run), *sampling]) == 0
    assert [row["prompt_id"] for row in open_rollouts(run).rows(0)][::2] == [f"p{i}" for i in range(32)]
    train = ["train", "--name", "short", "--reward", "brevity", "--rollouts", str(run), "--prompts", str(prompts)]
    assert main([*train, "--out", str(heads)]) == 0
    words = ["eval", "short", *flags, "--heads-dir", str(heads), "--prompts", str(prompts), "--rollouts", str(run)]
    words += ["--methods", "prompting", "--work", str(tmp_path / "eval"), "--out", str(tmp_path / "eval.json")]
    assert main([*words, "--max-prompts", "2", *sampling]) == 0
    assert "user: What now?" in (tmp_path / "eval.json").read_text()
