"""An instruction as the objective, without any head: one prompt and one seed, with rising weights and with a head.

The server reads the text a second time behind the instruction, and moves each token's distribution along what that
changes, within `max_kl`. A weight of 1 goes as far as the instruction itself would, more goes beyond it, and a negative
weight steers away.
"""

from __future__ import annotations

import argparse
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", default="Describe the weather in November.")
    parser.add_argument("--instruction", default="Always answer cheerfully.")
    parser.add_argument("--head", default="positive", help="the head to put beside the instruction")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    instruction = {"type": "instruction", "text": args.instruction}
    objectives = {
        "base": None,
        "weight 1": {**instruction, "weight": 1.0},
        "weight 3": {**instruction, "weight": 3.0},
        "weight -1": {**instruction, "weight": -1.0},
        f"weight 1 and {args.head}": {**instruction, "weight": 1.0, "beside": {"weights": {args.head: 1.0}}},
    }
    for name, objective in objectives.items():
        response = client.chat.completions.create(
            model=args.model,
            messages=[{"role": "user", "content": args.prompt}],
            max_tokens=48,
            temperature=0.7,
            top_p=0.95,
            seed=1,
            extra_body={"control": {"objective": objective, "max_kl": 0.3}} if objective else None,
        )
        choice: Any = response.choices[0]  # `control` is no field of OpenAI's
        print(f"{name}: {' '.join(choice.message.content.split())}")
        if objective:
            print(f"    {choice.control['mean_kl']:.3f} nats a token, at most {choice.control['max_kl']:.3f}")


if __name__ == "__main__":
    main()
