"""A head from pairs of answers, of which one is better: written by hand, or kept from what users preferred.

The program writes the pairs below as a file of direct preference optimisation, trains a head on them, and asks the same
question without the head and with it. So few pairs make a rough head; for one that is worth keeping, see docs/heads.md.
The commands that it runs are printed, so that you can run them by hand.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

QUESTION = "How was your day?"
# A question, the answer to prefer, and one to avoid.
PAIRS = """
Where is the station?|It is just around the corner, and I am happy to walk you there!|No idea. Look at a map.
Can you help me?|Of course, I would love to help you! What do you need?|No. I have no time for this.
What is for dinner?|A lovely warm soup, and there is plenty for everyone!|Something boring again, I fear.
I lost my keys.|Oh, I am sorry! Let us look for them together.|That is your own fault.
It rains again.|How wonderful for the garden, and we can have tea inside!|Terrible weather, as always.
We won the game!|Congratulations, that is fantastic news! Well done!|So what. Nobody cares.
My tea is cold.|I will gladly make you a fresh cup!|Then drink it cold.
Tell me a story.|With pleasure! Once there was a happy little fox.|I hate stories. Leave me alone.
How is the new job?|It is great, I enjoy every day with kind people!|It is awful, and I am tired of it.
Is the shop open?|Yes, and they will be glad to see you!|How should I know?
""".strip().splitlines()


def recontrol(*words: str) -> None:
    print("$", shlex.join(["recontrol", *words]), flush=True)
    subprocess.run([str(Path(sys.executable).with_name("recontrol")), *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own_pairs"))
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs, heads = args.out / "pairs.jsonl", str(args.out / "heads")
    with pairs.open("w") as file:
        for line in PAIRS:
            prompt, chosen, rejected = line.split("|")
            messages = [{"role": "user", "content": prompt}]
            print(json.dumps({"messages": messages, "chosen": chosen, "rejected": rejected}), file=file)

    train = ["--pairs", str(pairs), "--rollouts", str(args.out / "scored"), "--name", "kind", "--out", heads]
    recontrol("train", "--model", args.model, *train)
    recontrol("compare", QUESTION, "--model", args.model, "--heads-dir", heads, "--seed", "0", "--max-tokens", "32")


if __name__ == "__main__":
    main()
