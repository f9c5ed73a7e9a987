"""A chat with a guardrail: steered towards kind text, and ended where the text turns unkind all the same.

`nontoxic` reads the hidden state and predicts how free of insults the finished response will be, 1 being the best.
Control raises that value at every token. `stop_below` ends the response at the first token whose value is still below
the bound.
"""

from __future__ import annotations

import argparse

from openai import OpenAI

APOLOGY = "I would rather not continue with that."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--bound", type=float, default=0.75, help="end the response below this value")
    parser.add_argument("--prompt", default="Write an angry letter to a neighbour.")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    control = {"objective": {"weights": {"nontoxic": 1.0}}, "stop_below": {"nontoxic": args.bound}}
    response = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": args.prompt}],
        max_tokens=64,
        seed=0,
        extra_body={"control": control},
    )
    choice = response.choices[0]
    was_ended = choice.finish_reason == "content_filter"
    print(APOLOGY if was_ended else choice.message.content)
    print(f"finish reason: {choice.finish_reason}")


if __name__ == "__main__":
    main()
