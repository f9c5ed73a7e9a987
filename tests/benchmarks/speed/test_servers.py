"""How peers' servers are started and waited for, and what they are given to load."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.speed import servers
from benchmarks.speed.models import LLAMA_CPP_SOURCE, converted_gguf
from benchmarks.speed.process import PeerError
from benchmarks.speed.servers import Server, free_port
from benchmarks.speed.setup import Setup
from server.cli import main
from server.kernels.linear import Bits

PYTHON = Path(sys.executable)
# An HTTP server that answers every GET with a model list, and every POST with the status it is told.
SCRIPT = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, status, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.answer(200, body)
    def do_POST(self): self.rfile.read(int(self.headers["content-length"])); self.answer(status, b"no such field")
    def answer(self, status, text):
        self.send_response(status); self.send_header("content-length", str(len(text))); self.end_headers()
        self.wfile.write(text)
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
MODELS = '{"data": [{"id": "m"}]}'


@pytest.mark.parametrize("bits", get_args(Bits))
def test_our_server_understands_the_flags_it_is_started_with(
    setup: Setup, bits: Bits, capsys: pytest.CaptureFixture[str]
) -> None:
    command = servers.recontrol(bits, setup, PYTHON, 1234, None)
    assert main([*command[command.index("serve") :], "--print-config"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["port"], told["dtype"]) == (setup.model, 1234, "bfloat16")
    assert (told["max_batch_size"], told["max_model_len"]) == (5, 384)
    assert told["quantization"] == {4: "int4", 8: "int8", 16: "none"}[bits]


def test_peers_are_given_as_many_rows_tokens_and_threads(setup: Setup) -> None:
    def flags(command: list[str]) -> dict[str, str]:
        return {a: b for a, b in itertools.pairwise(command) if a.startswith("--")}

    vllm = flags(servers.vllm(setup, PYTHON, 1234, None))
    assert vllm["--model"] == str(setup.folder)
    assert (vllm["--max-num-seqs"], vllm["--max-model-len"], vllm["--port"]) == ("5", "384", "1234")
    assert servers.vllm_env(setup, PYTHON)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    llama_cpp = flags(servers.llama_cpp(setup, PYTHON, 1234, Path("m.gguf")))
    assert (llama_cpp["--model"], llama_cpp["--parallel"], llama_cpp["--threads"]) == ("m.gguf", "5", "3")
    # One context, which the rows share.
    assert llama_cpp["--ctx-size"] == str(5 * 384)


@pytest.mark.parametrize(
    ("status", "models", "what"),
    [
        (400, MODELS, "refused a completion: no such field"),
        (200, '{"models": []}', "answers otherwise than OpenAI's: KeyError"),
        (200, "hello", "answers otherwise than OpenAI's"),
    ],
)
def test_a_server_that_does_not_complete_is_named_with_its_reason(
    tmp_path: Path, status: int, models: str, what: str
) -> None:
    port = free_port()
    server = Server([str(PYTHON), "-c", SCRIPT, str(port), str(status), models], port, env={}, log=tmp_path / "log")
    try:
        with pytest.raises(PeerError, match=what):
            server.wait_until_it_answers({"prompt": "a"}, timeout_s=30)
    finally:
        server.end()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    server = Server([str(PYTHON), "-c", "import time; time.sleep(60)"], free_port(), env={}, log=tmp_path / "log")
    try:
        with pytest.raises(PeerError, match="did not answer within 0 s"):
            server.wait_until_it_answers({"prompt": "a"}, timeout_s=0.2)
    finally:
        server.end()


def test_a_model_is_converted_once_and_a_failed_conversion_leaves_nothing(setup: Setup) -> None:
    with pytest.raises(PeerError, match="make peers"):
        converted_gguf(setup)
    script = setup.peers_dir / LLAMA_CPP_SOURCE / "convert_hf_to_gguf.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; open(sys.argv[3], 'w').write('half'); sys.exit('out of memory')")
    with pytest.raises(PeerError, match="out of memory"):
        converted_gguf(setup)
    script.write_text("import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))")
    made = converted_gguf(setup)
    assert made.read_text().split()[0] == str(setup.folder)
    assert made.read_text().endswith("--outtype bf16")
    script.write_text("raise SystemExit('again')")
    assert converted_gguf(setup) == made
