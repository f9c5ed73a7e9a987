"""How far what the harness found by a server is from what it found by transformers, and the table of it.

Enter at `measure`, which runs both, or at `table`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import header, row
from benchmarks.speed.process import PeerError

TASKS = Path(__file__).parent / "tasks"
SCORED = ("last_words", "choices", "documents")
WAYS = {
    "token ids, 4 prompts a request": {"batch_size": 4},
    "texts, 4 requests at once": {"tokenized_requests": False, "num_concurrent": 4},
    "the server's tokenizer, 2 requests at once": {"tokenizer_backend": "remote", "num_concurrent": 2},
}
"""In which `local-completions` may ask, and its arguments."""
CHAT = "chats"
SHOWN = {"last_words": "perplexity", "choices": "acc", "documents": "word_perplexity", "answers": "exact_match"}
_WINDOW_TOKENS = 160
"""Of a document; the longest has several. All other prompts are shorter, which would be cut by one side alone."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def measure(python: Path, url: str, model: str, folder: Path, *, dtype: str, work: Path) -> dict[str, Any]:
    """Everything that is asked, by transformers and by the server, compared request by request.

    `python` is of an environment with lm-eval, `folder` has the weights that the server has under the name `model`,
    and `work` is for the harness' caches. Raises PeerError.
    """
    own = {"pretrained": str(folder), "dtype": dtype, "device": "cpu", "max_length": _WINDOW_TOKENS}
    # Of a server's context the harness keeps two tokens for itself.
    common = {"model": model, "tokenizer": str(folder), "tokenizer_backend": "huggingface", "max_retries": 1}
    common |= {"base_url": f"{url}/v1/completions", "max_length": _WINDOW_TOKENS + 2}
    everything = [*SCORED, "answers"]
    runs = [_run("hf", own, everything), _run("hf", own, ["answers"], is_chat=True)]
    runs += [_run("local-completions", _asked(common, way), everything) for way in WAYS.values()]
    chat = {"model": model, "base_url": f"{url}/v1/chat/completions", "max_retries": 1}
    runs.append(_run("local-chat-completions", chat, ["answers"], is_chat=True))
    found = _harness(python, runs, work)
    expected, expected_chat, *by_way, by_chat = found["runs"]
    ways = {way: compared(got, expected) for way, got in zip(WAYS, by_way, strict=True)}
    return {
        "versions": found["versions"],
        "dtype": dtype,
        "transformers": {**_metrics(expected), CHAT: _metrics(expected_chat)["answers"]},
        "server": {**ways, "chats, one at a time": {CHAT: compared(by_chat, expected_chat)["answers"]}},
    }


def compared(got: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Each task's metrics, requests, the largest difference in nats, and how many answers are the same.

    Two log-likelihoods are the same if both are greedy or both not, two texts if they are equal.
    """
    return {
        task: {
            "metrics": got[task]["metrics"],
            "num_requests": len(theirs["answers"]),
            "largest_difference_nats": _largest(got[task]["answers"], theirs["answers"]),
            "num_same": sum(map(_is_same, got[task]["answers"], theirs["answers"])),
        }
        for task, theirs in expected.items()
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each task and way of asking."""
    lines = header(["task", "asked by", "metric", "transformers", "recontrol", "requests alike", "largest difference"])
    for way, tasks in result["server"].items():
        for task, found in tasks.items():
            metric = SHOWN["answers" if task == CHAT else task]
            nats = found["largest_difference_nats"]
            lines.append(
                row([
                    f"`{task}`",
                    way,
                    f"`{metric}`",
                    f"{result['transformers'][task][metric]:.4f}",
                    f"{found['metrics'][metric]:.4f}",
                    f"{found['num_same']} of {found['num_requests']}",
                    "-" if nats is None else f"{nats:.1e} nats",
                ])
            )  # fmt: skip
    names = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    system = result["system"]
    return "\n".join(lines) + (
        f"\n\n`{result['command']}`, {result['model']}, {result['dtype']}, {names}, {system['cpu']}, "
        f"{system['date'][:10]}, commit {system['commit']}."
    )


def _asked(common: Mapping[str, Any], way: Mapping[str, Any]) -> dict[str, Any]:
    asked = {**common, **way}
    if asked["tokenizer_backend"] == "remote":
        del asked["tokenizer"]
    return asked


def _run(model: str, model_args: Mapping[str, Any], tasks: Sequence[str], *, is_chat: bool = False) -> dict[str, Any]:
    return {"model": model, "model_args": dict(model_args), "tasks": list(tasks), "is_chat": is_chat}


def _harness(python: Path, runs: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("harness.py")
    env = {**os.environ, **_OFFLINE, "HF_HOME": str(work.resolve())}
    done = subprocess.run(
        [python, script, json.dumps(runs)], cwd=TASKS, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PeerError(f"lm-eval ended with {done.returncode}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    return {task: values["metrics"] for task, values in found.items()}


def _largest(got: Sequence[Any], expected: Sequence[Any]) -> float | None:
    """Between log-likelihoods; None of texts."""
    pairs = [(_number(mine), _number(theirs)) for mine, theirs in zip(got, expected, strict=True)]
    differences = [abs(mine - theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    return max(differences, default=None)


def _number(answer: Any) -> float | None:
    first = answer[0] if isinstance(answer, list) else answer
    return first if isinstance(first, float) else None


def _is_same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, list):
        return mine[1] == theirs[1]
    return mine == theirs if isinstance(mine, str) else math.isclose(mine, theirs, rel_tol=1e-4)
