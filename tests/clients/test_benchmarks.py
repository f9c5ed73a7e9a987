"""The benchmark clients of guidellm and vLLM against the fake engine: all their requests succeed and are counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.api.conftest import serving
from tests.clients.conftest import python_of, run_client
from tests.conftest import byte_tokenizer

pytestmark = pytest.mark.clients
NUM_REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 6, 20, 12
CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3}}
# vLLM's command needs the distribution `vllm`, which has another name on a CPU.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.fixture
def url(make_app: Callable[..., FastAPI]) -> Iterator[str]:
    with serving(make_app(token_delay_s=0.002)) as url:
        yield url


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_measures_every_request(url: str, tokenizer: Path, tmp_path: Path, path: str) -> None:
    guidellm = python_of(".venv-clients", "guidellm").with_name("guidellm")
    backend = {"kind": "openai_http", "target": url, "request_format": path, "extras": {"body": CONTROL}}
    data = {"kind": "synthetic_text", "prompt_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    options: dict[str, Any] = {
        "--backend": backend,
        "--profile": {"kind": "concurrent", "streams": 2},
        "--constraint": {"kind": "max_requests", "count": NUM_REQUESTS},
        "--tokenizer": {"kind": "hf_auto", "model": str(tokenizer)},
        "--data": data,
        "--output": {"kind": "json", "path": str(tmp_path / "report.json")},
    }
    arguments = [word for name, value in options.items() for word in (name, json.dumps(value))]
    run_client([guidellm, "run", *arguments, "--disable-console"], cwd=tmp_path)
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"]) == (NUM_REQUESTS, [])
    for request in requests["successful"]:
        assert request["output_tokens"] == OUTPUT_TOKENS
        assert request["time_to_first_token_ms"] > 0


@pytest.mark.parametrize(("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_vllms_benchmark_measures_every_request(
    url: str, tokenizer: Path, tmp_path: Path, backend: str, path: str
) -> None:
    python = python_of(".venv-vllm", "vllm")
    options = {
        "--backend": backend, "--base-url": url, "--endpoint": path, "--model": "fake", "--tokenizer": str(tokenizer),
        "--dataset-name": "random", "--random-input-len": INPUT_TOKENS, "--random-output-len": OUTPUT_TOKENS,
        "--num-prompts": NUM_REQUESTS, "--extra-body": json.dumps(CONTROL), "--result-filename": "report.json",
    }  # fmt: skip
    arguments = [str(word) for pair in options.items() for word in pair]
    flags = ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
    run_client([python, "-c", VLLM_BENCH, *arguments, *flags], cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["completed"], report["failed"]) == (NUM_REQUESTS, 0)
    assert report["output_lens"] == [OUTPUT_TOKENS] * NUM_REQUESTS
    assert all(seconds > 0 for seconds in report["ttfts"])
