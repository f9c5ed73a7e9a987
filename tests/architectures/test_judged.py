"""A dozen architectures, each for its kind; `make architectures` judges all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels import native
from tests.architectures.verdict import Verdict

_ROOT = Path(__file__).parents[2]
FAST = (
    "llama",
    "llama+yarn",
    "mistral",  # A window.
    "qwen2",  # Biases, and windows in some layers.
    "smollm3",  # Layers that do not rotate.
)
SERVED = (
    "cohere",
    "gemma2",  # Soft caps.
    "gemma3_text",  # Two rotations.
    "gpt2",
    "gpt_neox",
    "gpt_oss",  # Sinks.
    "mixtral",
    "olmo",  # Norms without weights.
    "phi3+longrope",
    "qwen2_moe",  # A dense layer among those with experts.
    "qwen3",
)
REFUSED = (
    "bart",
    "bloom",
    "gemma3_text+bidirectional",
    "jamba",
    "mamba",
)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """In a process of its own, whose children may be forked before anything starts threads."""
    command = [sys.executable, "-m", "tests.architectures", "--json", *FAST, *SERVED, *REFUSED]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    found = [Verdict.from_json(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(FAST) + len(SERVED) + len(REFUSED), done.stderr
    return {verdict.name: verdict for verdict in found}


@pytest.mark.parametrize("name", FAST)
def test_what_the_native_layers_can_do_they_do_as_transformers(verdicts: dict[str, Verdict], name: str) -> None:
    expected = "fast" if native() is not None else "general"
    assert {p: s.outcome for p, s in verdicts[name].served.items()} == {"float32": "general", "bfloat16": expected}, (
        verdicts[name]
    )


@pytest.mark.parametrize("name", SERVED)
def test_other_models_are_served_with_transformers_numbers(verdicts: dict[str, Verdict], name: str) -> None:
    assert all(served.outcome in ("fast", "general") for served in verdicts[name].served.values()), verdicts[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(verdicts: dict[str, Verdict], name: str) -> None:
    assert [served.outcome for served in verdicts[name].served.values()] == ["refused"] * 2, verdicts[name]
    assert all("cannot be served" in served.reason for served in verdicts[name].served.values())
