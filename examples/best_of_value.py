"""The best of several responses by a head's value, without any reward model at serving time.

The server samples `--candidates` responses and returns the best ones first. `"steps": 0` leaves the tokens to the base
model; without it the candidates are steered as well. Then /v1/value scores texts that came from anywhere.
"""

from __future__ import annotations

import argparse

import httpx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--head", default="positive")
    parser.add_argument("--candidates", type=int, default=8)
    args = parser.parse_args()
    prompt = "My review of the new noodle place:"
    with httpx.Client(base_url=args.url, timeout=120) as client:
        body = {
            "model": args.model,
            "prompt": prompt,
            "max_tokens": 32,
            "seed": 0,
            "n": 2,
            "best_of": args.candidates,
            "control": {"objective": {"weights": {args.head: 1.0}}, "steps": 0},
        }
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        texts = [choice["text"] for choice in answer.json()["choices"]]
        scored = client.post(
            "/v1/value",
            json={"model": args.model, "heads": [args.head], "input": [prompt + text for text in texts]},
        )
        scored.raise_for_status()
        for text, datum in zip(texts, scored.json()["data"], strict=True):
            print(f"{datum['values'][args.head]:+.2f} {text.strip()}")


if __name__ == "__main__":
    main()
