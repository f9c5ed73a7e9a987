"""`python -m benchmarks.speed` end to end, with peers made for the test: good ones, and ones that fail in every way."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import COMMAND, PROGRAM, peers
from benchmarks.speed.peers import Arm, Peer
from benchmarks.speed.process import PeerError
from benchmarks.speed.servers import OUR_COMMAND
from server.cli import run as run_command
from tests.benchmarks.speed import fake_engine


def fake_server(setup: Any, python: Path, port: int, gguf: Path | None) -> list[str]:
    return [str(python), "-c", OUR_COMMAND, "serve", "--engine", "fake", "--port", str(port)]


def broken_server(setup: Any, python: Path, port: int, gguf: Path | None) -> list[str]:
    return [str(python), "-c", "print('no such model'); raise SystemExit(3)"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its defaults are the peers that there are when it is first imported, which these must not be.
    importlib.import_module("benchmarks.speed.command")

    def add(name: str, mood: str = "", *, distribution: str = "pytest", server: Any = None) -> None:
        def env(setup: Any, python: Path) -> dict[str, str]:
            return {**peers.PEERS["recontrol"].env(setup, python), "FAKE_ENGINE": mood}

        request = {"ignore_eos": True}
        peer = Peer((distribution,), Path(fake_engine.__file__), env=env, server=server, request=request)
        monkeypatch.setitem(peers.PEERS, name, peer)
        monkeypatch.setitem(peers.ARMS, name, Arm(name))

    add("good", server=fake_server)
    add("gone", distribution="no-such-distribution")
    for mood in ("dies", "illegal", "cannot load", "stops early"):
        add(mood.replace(" ", "-"), mood)
    add("broken", server=broken_server)


@pytest.fixture
def bench(fakes: None, model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        options = ["--model", str(model_folder("llama")), "--dtype", "float32", "--work", str(tmp_path / "work")]
        options += ["--threads", "2", "--prompt-tokens", "5", "--new-tokens", "6", "--out", str(tmp_path / "out.json")]
        assert run_command(COMMAND, PROGRAM, [*options, *words]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_a_peer_that_is_missing_or_fails_is_named_and_the_others_go_on(
    bench: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    names = "dies,gone,illegal,good,cannot-load,stops-early,recontrol-3-heads,llama-cpp-4bit"
    result = bench("--peers", names, "--only", "offline", "--batch-sizes", "1,3", "--repeats", "2")
    arms = result["offline"]
    assert set(result["skipped"]) == {"gone", "recontrol-3-heads", "llama-cpp-4bit"}
    assert "no-such-distribution is not in" in result["skipped"]["gone"]
    assert "needs 3 heads" in result["skipped"]["recontrol-3-heads"]
    assert "failed" not in arms["good"]
    assert [len(arms["good"]["batches"][size]["seconds"]) for size in ("1", "3")] == [2, 2]
    assert arms["good"]["facts"] == {"device": "none", "threads": 2}
    assert arms["good"]["idle_cpu_s"] <= 0.05
    assert arms["good"]["peak_rss_bytes"] > 2**20
    # It answered a start, two warm-ups, and died in its first turn that counts.
    assert "ended with 7" in arms["dies"]["failed"]
    assert arms["dies"]["batches"] == {}
    assert "killed by SIGILL, illegal instruction" in arms["illegal"]["failed"]
    assert "OSError: no such weights" in arms["cannot-load"]["failed"]
    assert "gave 0 tokens where 1 were asked for" in arms["stops-early"]["failed"]
    said = capfd.readouterr()
    assert "left out: gone: not installed" in said.out
    assert "dies failed: generate: the process ended" in said.out + said.err
    assert "Not measured: `gone`" in said.out
    assert "Failed offline: `dies`" in said.out
    assert "| failed: generate: the process ended (killed by SIGILL, illegal instruction) | failed |" in said.out


def test_servers_are_started_loaded_and_measured_and_one_that_ends_is_named(
    bench: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-online: begin -->\nold\n<!-- bench-online: end -->\n")
    words = ["--peers", "good,broken,dies", "--only", "online", "--rates", "50", "--num-requests", "5"]
    result = bench(*words, "--repeats", "2", "--into", str(page))
    arms = result["online"]
    assert result["without_server"] == ["dies"]
    assert "ended with 3" in arms["broken"]["failed"]
    assert "no such model" in arms["broken"]["failed"]
    turns = arms["good"]["rates"]["50"]["repeats"]
    assert [(turn["num_requests"], turn["num_failed"]) for turn in turns] == [(5, 0), (5, 0)]
    assert arms["good"]["startup_s"] > 0
    assert arms["good"]["rates"]["50"]["ttft_s"]["p50"]["low"] > 0
    # Arrivals are the workload's: the same for every server, others in another repeat.
    assert turns[0]["requests"][1][0] != pytest.approx(turns[1]["requests"][1][0], abs=1e-4)
    text = page.read_text()
    assert "| 50 | `good`" in text
    assert "old" not in text
    capfd.readouterr()
    assert run_command(COMMAND, PROGRAM, ["--render", "--out", str(tmp_path / "out.json")]) == 0
    assert text.split("-->\n")[1].split("<!--")[0].strip() in capfd.readouterr().out


def test_what_was_measured_is_written_even_if_a_look_into_our_own_engine_dies(
    bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: Any, **__: Any) -> Any:
        raise PeerError("the look at profile failed: killed")

    monkeypatch.setattr("benchmarks.speed.own_engine.profile", die)
    result = bench("--peers", "good", "--only", "offline,step", "--batch-sizes", "1", "--repeats", "1")
    assert result["offline"]["good"]["batches"]["1"]["tokens_per_s"]["median"] > 0
    assert result["step"] == {"failed": "the look at profile failed: killed"}
    assert "(failed: the look at profile failed: killed)" in capsys.readouterr().out


def test_long_prompts_are_measured_alone_beside_streams_and_before_a_short_one(
    bench: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--peers", "good,dies,broken", "--only", "long", "--long-prompts", "16,64", "--repeats", "2"]
    long = bench(*words)["long"]
    for length in (16, 64):
        alone = long["alone"]["good"]["lengths"][str(length)]
        pairs = zip(alone["ttft_s"]["all"], alone["tokens_per_s"]["all"], strict=True)
        assert all(rate == pytest.approx(length / seconds) for seconds, rate in pairs)
        beside = long["beside"]["good"]["lengths"][str(length)]
        assert set(beside) == {
            "usual_gap_s", "longest_gap_s", "gap_ratio", "ttft_s", "short_alone_s", "short_behind_s",
        }  # fmt: skip
        assert all(len(figure["all"]) == 2 and figure["low"] > 0 for figure in beside.values())
    assert "ended with 7" in long["alone"]["dies"]["failed"]
    assert "ended with 3" in long["beside"]["broken"]["failed"]
    assert "dies" not in long["beside"]
    said = capsys.readouterr().out
    assert "16 tokens: first token, s" in said
    assert "beside 4 streams" in said


def test_neighbours_are_measured_alone_beside_a_busy_core_and_two_at_once(
    bench: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--peers", "good,illegal", "--only", "neighbours", "--neighbour-rows", "3", "--repeats", "2"]
    arms = bench(*words)["neighbours"]
    conditions = arms["good"]["conditions"]
    assert list(conditions) == ["alone", "busy core", "two"]
    assert all(len(condition["tokens_per_s"]["all"]) == 2 for condition in conditions.values())
    # Both engines' tokens count.
    assert {name: condition["num_tokens"] for name, condition in conditions.items()} == {
        "alone": 18, "busy core": 18, "two": 36,
    }  # fmt: skip
    assert "SIGILL" in arms["illegal"]["failed"]
    assert "two at once, together" in capsys.readouterr().out


def test_the_help_tells_what_every_flag_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, PROGRAM, ["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {PROGRAM} ")
    assert "null" not in text
    assert "factory" not in text


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run_command(COMMAND, PROGRAM, ["--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{PROGRAM}: model: {tmp_path}")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--peers", "nobody"], "peers: there is no 'nobody'"),
        (["--render"], "render: needs --out"),
        (["--random-weights", "tiny", "--model", "x"], "model: --random-weights makes its own"),
        (["--random-weights", "nope"], "random_weights: 'nope' is neither"),
        (["--model", "/nonexistent"], "model: '/nonexistent' is no folder"),
        (["--heads", "nope"], "heads: there is no 'nope'"),
        (["--batch-sizes", "0"], "batch_sizes"),
        (["--into", "/nonexistent.md"], "/nonexistent.md"),
        (["--into", "deploy/README.md"], "into: deploy/README.md has no section `<!-- bench-...: begin -->`"),
        (["--into", "README.md", "--label", "x"], "into: README.md has no section `<!-- bench-x-...: begin -->`"),
        (["--label", "A B"], "label"),
        (["--rates", "0"], "rates"),
        (["--only", "long", "--long-prompts", "9000"], "long_prompts: 9000 and 4 new tokens are more than the 8192"),
        (["--long-prompts", "0"], "long_prompts"),
    ],
)
def test_a_users_mistake_is_one_clear_line(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, PROGRAM, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{PROGRAM}: ")
    assert what in line
