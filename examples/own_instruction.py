"""A sentence made into a head, and the same question asked without it and with it.

The program distils the instruction, as a system message, into a head, starts a server with it and asks. Nothing of the
instruction is in the prompts that are asked. The commands that it runs are printed, so that you can run them by hand.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx


def command(*words: str) -> list[str]:
    """One `recontrol` command, printed."""
    print("$", shlex.join(["recontrol", *words]), flush=True)
    return [str(Path(sys.executable).with_name("recontrol")), *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instruction", default="Always answer cheerfully.")
    parser.add_argument("--contrast", help="what to lead away from")
    parser.add_argument("--out", default="runs/own_instruction")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", help="JSON lines; by default the project's own")
    parser.add_argument("--max-tokens", default="32")
    args = parser.parse_args()
    train = ["train", "--name", "mine", "--model", args.model, "--out", args.out, "--instruction", args.instruction]
    train += ["--instruction-tokens", args.max_tokens]
    for flag in ("contrast", "prompts"):
        if (given := getattr(args, flag)) is not None:
            train += [f"--{flag}", given]
    subprocess.run(command(*train), check=True)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = ["serve", "--model", args.model, "--served-model-name", "own", "--heads-dir", args.out, "--port", str(port)]
    with subprocess.Popen(command(*serve)) as server:
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
        for control in (None, {"objective": {"weights": {"mine": 1.0}}}):
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
