"""Whether a change left every token as it was: 200 seeded requests of every kind, in both precisions, over HTTP.

Run it at the commit before a refactoring and at the one after it, on one machine (kinds of processor differ in last
bits), and compare:

    python -m tests.same_tokens before.json
    python -m tests.same_tokens after.json --like before.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

NUM_REQUESTS = 200
NUM_AT_ONCE = 16
START_LIMIT_S = 180
OBJECTIVES: list[dict[str, Any]] = [
    {"weights": {"positive": 1.0}},
    {"weights": {"positive": 1.0, "plain": 0.5, "brevity": -0.5}},
    {"type": "worst_case", "weights": {"neutral": 1.0, "plain": 1.0}},
    {"type": "worst_case", "weights": {"neutral": 1.0, "plain": 1.0, "relevance": 1.0}},
    {"type": "target", "values": {"positive": 0.5}},
    {"type": "floor", "floors": {"nontoxic": 0.8}, "weights": {"positive": 1.0}},
]
CONTROLS: list[dict[str, Any]] = [
    {},
    {"max_kl": 0.05},
    {"gate": {"head": "positive", "below": 0.3}},
    {"window": {"start": 4, "end": 20}},
    {"schedule": {"type": "cosine", "to": 0.2, "tokens": 16}},
    {"max_response_kl": 1.0},
    {"stop_below": {"nontoxic": 0.2}},
    {"search": {"type": "blocks", "candidates": 2, "block_tokens": 8}},
]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "min_p": 0.02},
    {"temperature": 1.2, "repetition_penalty": 1.1, "presence_penalty": 0.2},
    {"logprobs": 3},
]
TOPICS = ("a river", "tax law", "my neighbour's dog", "quantum physics", "breakfast", "a lost letter", "the moon")


def request_body(number: int) -> dict[str, Any]:
    """The completion request of this number; every third one is uncontrolled."""
    body: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "prompt": f"Number {number}. Tell me about {TOPICS[number % len(TOPICS)]}. " + "Be brief. " * (number % 40),
        "max_tokens": 8 + number % 33,
        "seed": number,
        **SAMPLING[number % len(SAMPLING)],
    }
    if number % 3:
        body["control"] = {
            "objective": OBJECTIVES[number % len(OBJECTIVES)],
            **CONTROLS[number // 3 % len(CONTROLS)],
            "trace": True,
        }
    return body


def ask(client: httpx.Client, number: int) -> Any:
    """What the server answers to a request, less its id and time; an error's body where it refuses."""
    answer = client.post("/v1/completions", json=request_body(number), timeout=600).json()
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def answers(dtype: str, port: int) -> list[Any]:
    """What a server of this precision answers to all requests, many at once."""
    command = ["serve", "--dtype", dtype, "--port", str(port), "--kv-cache-gib", "1", "--log-level", "warning"]
    with (
        subprocess.Popen([sys.executable, "-c", "from server.cli import main; main()", *command]) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
        ThreadPoolExecutor(NUM_AT_ONCE) as pool,
    ):
        try:
            wait_until_ready(client)
            return list(pool.map(lambda number: ask(client, number), range(NUM_REQUESTS)))
        finally:
            server.terminate()


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        try:
            if client.get("/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the server was not ready within {START_LIMIT_S} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write the answers to")
    parser.add_argument("--like", type=Path, help="file of an earlier run that these must equal")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    found = {dtype: answers(dtype, options.port) for dtype in ("bfloat16", "float32")}
    options.out.write_text(json.dumps(found, indent=1))
    served = sum("choices" in answer for each in found.values() for answer in each)
    print(f"{served} of {2 * NUM_REQUESTS} requests served")
    if options.like is None:
        return 0
    before = json.loads(options.like.read_text())
    differing = [
        f"{dtype} {number}"
        for dtype, each in found.items()
        for number, answer in enumerate(each)
        if answer != before[dtype][number]
    ]
    print(f"{len(differing)} differ: {', '.join(differing[:20])}" if differing else "all equal")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
