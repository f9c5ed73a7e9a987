"""A head that a running server trains: pairs go in over HTTP, and requests name the head as soon as it is there.

    mkdir -p runs/heads
    recontrol serve --heads-dir runs/heads --management-keys k-manager-0123456789
    python examples/train_over_http.py --management-key k-manager-0123456789

With `--instruction 'Always answer cheerfully.'` the head is made of that sentence, which takes longer.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import httpx

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
""".strip().splitlines()


def finished(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended; tells how far it is."""
    while job["finished_at"] is None:
        progress = job["progress"]
        print(f"{job['status']}: {progress['phase']}, {progress['done']} of {progress['of']} texts", flush=True)
        time.sleep(0.5)
        job = client.get(f"/v1/management/jobs/{job['id']}").raise_for_status().json()
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--management-key", required=True)
    parser.add_argument("--name", default="kind")
    parser.add_argument("--instruction", help="a sentence to make the head of, in place of the pairs")
    args = parser.parse_args()
    pairs = [dict(zip(("prompt", "chosen", "rejected"), line.split("|"), strict=True)) for line in PAIRS]
    source = {"instruction": args.instruction} if args.instruction else {"pairs": pairs, "plain_as_chat": True}
    headers = {"Authorization": f"Bearer {args.management_key}"}
    with httpx.Client(base_url=args.url, timeout=300) as client:
        with httpx.Client(base_url=args.url, timeout=60, headers=headers) as manager:
            started = manager.post("/v1/heads", json={"name": args.name, "replace": True, **source})
            if started.is_error:
                raise SystemExit(started.json()["error"]["message"])
            job = finished(manager, started.json())
        if job["status"] != "succeeded":
            raise SystemExit(f"{job['status']}: {job['error']}")
        print(f"trained in {job['seconds']} s: {job['result']['card']['description']}")
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "seed": 0}
        for side, weight in (("base", 0.0), (args.name, 1.0)):
            control = {"objective": {"weights": {args.name: weight}}}
            answer = client.post("/v1/chat/completions", json={**body, "control": control}).raise_for_status().json()
            print(f"[{side}] {answer['choices'][0]['message']['content']}")


if __name__ == "__main__":
    main()
