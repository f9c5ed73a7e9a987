"""The OpenAI SDK with control: one prompt and one seed, without a head, with one and with two."""

from __future__ import annotations

import argparse
from typing import Any

from openai import OpenAI

OBJECTIVES = {
    "base": None,
    "positive": {"weights": {"positive": 1.0}},
    "positive and plain": {"weights": {"positive": 1.0, "plain": 0.5}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", default="Describe the weather in November.")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    for name, objective in OBJECTIVES.items():
        response = client.chat.completions.create(
            model=args.model,
            messages=[{"role": "user", "content": args.prompt}],
            max_tokens=64,
            temperature=0.7,
            top_p=0.95,
            seed=1,
            extra_body={"control": {"objective": objective, "max_kl": 0.3}} if objective else None,
        )
        choice: Any = response.choices[0]  # `control` is no field of OpenAI's
        print(f"{name}: {choice.message.content}")
        if objective:
            # What the edits did: values before and after, KL in nats a token, and what held edits back.
            print(f"    {choice.control}")


if __name__ == "__main__":
    main()
