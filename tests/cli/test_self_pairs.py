"""`recontrol pairs`: the model's own answers after a good and a bad instruction become pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli import main
from server.engines.embedded.instructed import EngineInstructedSource
from value_models.generations import EvalSample
from value_models.given_texts import read_pairs
from value_models.prompt_sets import RolloutPrompt, split_of
from value_models.self_pairs import self_pairs

INSTRUCTIONS = ["--good", "Be kind.", "--bad", "Be rude.", "--max-tokens", "6"]


def sample(prompt_id: str, number: int, response: str) -> EvalSample:
    return EvalSample(prompt_id, number, response, 3, 0.0, 0.0, 0.0, True)


def test_answers_stand_side_by_side_and_those_that_teach_nothing_are_left_out() -> None:
    prompts = [RolloutPrompt(id=name, prompt=f"ask {name}") for name in ("a", "b")]
    good = [sample("a", 0, "yes"), sample("a", 1, "yes"), sample("b", 0, " "), sample("b", 1, "same")]
    bad = [sample("a", 0, "no"), sample("a", 1, "no"), sample("b", 0, "no"), sample("b", 1, "same")]
    good, bad = [*good, sample("b", 2, "same and more")], [*bad, sample("b", 2, "same again")]
    pairs = self_pairs(prompts, good, bad, lambda text: list(text.encode()[:6]))
    asked = [{"role": "user", "content": "ask a"}]
    assert pairs.records == [{"messages": asked, "chosen": "yes", "rejected": "no"}]
    assert (pairs.num_left_out, pairs.num_prompts) == (4, 1)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"say {i}"}) + "\n" for i in range(30)))
    return str(path)


def test_the_file_is_one_that_training_reads_of_prompts_that_no_evaluation_takes(
    workshop: tuple[list[str], Path], chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["pairs", *workshop[0], *INSTRUCTIONS, "--prompts", chats, "--num-samples", "2", "--out", "p.jsonl"]) == 0
    )
    given = read_pairs(Path("p.jsonl"))
    train = {f"say {i}" for i in range(30) if split_of(f"p{i}") == "train"}
    asked = {text.prompt[0]["content"] for text in given.texts if not isinstance(text.prompt, str)}
    assert 8 <= len(asked) == len(asked & train)
    words = ["train", *workshop[0], "--pairs", "p.jsonl", "--max-tokens", "6", "--cut-long", "--name", "kind"]
    assert main([*words, "--out", "heads"]) == 0


def test_answers_are_kept_so_that_a_run_goes_on_and_the_file_is_written_whole_or_not_at_all(
    workshop: tuple[list[str], Path], chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pairs", *workshop[0], *INSTRUCTIONS, "--prompts", chats, "--out", "p.jsonl"]
    evaluate, calls = EngineInstructedSource.evaluate, list[int]()

    def stopped(self: EngineInstructedSource, prompts: list[RolloutPrompt], *rest: object, **options: object) -> object:
        calls.append(len(prompts))
        for number, answer in enumerate(evaluate(self, prompts, *rest, **options)):  # type: ignore[arg-type]
            if len(calls) == 1 and number == 5:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(EngineInstructedSource, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not Path("p.jsonl").exists()
    assert main(words) == 0
    assert calls[1] == calls[0] - 5
    first = Path("p.jsonl").read_bytes()
    assert main(words) == 0
    assert len(calls) == 3
    assert Path("p.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--good", " "], "good: it is empty"),
        (["--bad", ""], "bad: it is empty"),
        (["--bad", "Be  kind."], "bad: it is the good one itself"),
        (["--num-prompts", "3"], "num_prompts: Input should be greater than or equal to 8"),
        (["--prompts", "nowhere"], "prompts: nowhere cannot be read"),
        ([], None),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    flags: list[str],
    why: str | None,
    workshop: tuple[list[str], Path],
    chats: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if why is None:
        # As of a model that answers the same whatever it is told.
        same = [sample("p1", 0, "same")]
        monkeypatch.setattr("server.cli.pairs.Pairs._answers", lambda *_: same)
        why = "num_prompts: 0 prompts have answers that differ and at least 8 are needed"
    words = ["pairs", *workshop[0], *INSTRUCTIONS, "--prompts", chats, "--out", "p.jsonl", *flags]
    assert main(words) == 2
    assert f"recontrol pairs: {why}" in capsys.readouterr().err
    assert not Path("p.jsonl").exists()
