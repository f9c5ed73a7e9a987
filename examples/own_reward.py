"""A reward of your own, from sampled responses to a served head.

The program samples responses with the states behind their tokens, trains a head on the reward below, starts a server
with it and asks the same question with and without control. So small a sample makes a rough head; for one that is worth
keeping, sample as docs/heads.md does. The commands that it runs are printed, so that you can run them by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

QUESTIONS = """How was your day?
Where is the station?
Can you help me?
What is for dinner?
Who are you?
I lost my keys.
It rains again.
We won the game!
My tea is cold.
Tell me a secret.""".splitlines()


def kindness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A score for each response; higher is better."""
    kind = ("thank", "please", "glad", "happy", "help", "welcome", "sorry")
    return [float(sum(response.lower().count(word) for word in kind)) for response in responses]


def run(*words: str) -> list[str]:
    """One `recontrol` command, which finds this file's reward by its module's name."""
    command = [str(Path(sys.executable).with_name("recontrol")), *words]
    print("$", shlex.join(["recontrol", *words]), flush=True)
    return command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own_reward"))
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--num-samples", default="6")
    parser.add_argument("--max-tokens", default="24")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = args.out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"q{i}", "prompt": text}) + "\n" for i, text in enumerate(QUESTIONS)))
    rollouts, heads = str(args.out / "rollouts"), str(args.out / "heads")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}

    sample = ["rollouts", "--model", args.model, "--prompts", str(prompts), "--out", rollouts]
    sample += ["--num-samples", args.num_samples, "--max-tokens", args.max_tokens]
    subprocess.run(run(*sample), check=True, env=here)
    train = ["train", "--name", "kind", "--reward", "own_reward:kindness"]
    train += ["--rollouts", rollouts, "--prompts", str(prompts), "--out", heads]
    subprocess.run(run(*train), check=True, env=here)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = ["serve", "--model", args.model, "--served-model-name", "own", "--heads-dir", heads, "--port", str(port)]
    with subprocess.Popen(run(*serve), env=here) as server:
        try:
            ask(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()


def ask(url: str, server: subprocess.Popen[bytes]) -> None:
    """The same question without the head and with it, once the server is ready."""
    with httpx.Client(base_url=url, timeout=120) as client:
        while not is_ready(client):
            if server.poll() is not None:
                sys.exit("The server ended before it was ready.")
            time.sleep(0.2)
        for control in (None, {"objective": {"weights": {"kind": 1.0}}}):
            body = {"model": "own", "messages": [{"role": "user", "content": "How was your day?"}]}
            answer = client.post(
                "/v1/chat/completions", json={**body, "max_tokens": 32, "seed": 0, "control": control}
            ).json()
            print("with the head:" if control else "base:", answer["choices"][0]["message"]["content"])


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").is_success
    except httpx.ConnectError:
        return False


if __name__ == "__main__":
    main()
