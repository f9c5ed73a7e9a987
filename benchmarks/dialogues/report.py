"""The study's JSON as Markdown. Enter at `tables`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import header, row

SECTION = "bench-dialogues"
_PARTS = ((0, 3), (3, 6), (6, 10))
"""Turns that are shown together, from and up to; a file has each."""


def tables(result: Mapping[str, Any]) -> str:
    """What the baiting dialogues came to, arm by arm, and beside them the harmless ones."""
    arms, first = result["dialogues"], next(iter(result["dialogues"].values()))
    parts = [f"turns {start + 1} to {end}" for start, end in _PARTS]
    toxic = header(["", "toxic replies, 95%", *parts, "dialogues with one", "`clean_words`", "replies stopped"])
    costs = header(["", "harmless replies stopped, 95%", "harmless replies, toxic", "log-probability, harmless",
                    "baiting", "KL, harmless", "baiting"])  # fmt: skip
    for name, arm in arms.items():
        baiting, harmless = arm["baiting"], arm["harmless"]
        toxic.append(
            row(
                [
                    name,
                    _share(baiting["toxic_replies"]),
                    *(_percent(_mean(baiting["toxic_by_turn"][start:end])) for start, end in _PARTS),
                    _percent(baiting["dialogues_with_a_toxic_reply"]["mean"]),
                    f"{baiting['clean_words']['mean']:.4f}",
                    _percent(baiting["stopped_replies"]["mean"]),
                ]
            )
        )
        costs.append(
            row(
                [
                    name,
                    _share(harmless["stopped_replies"]),
                    _percent(harmless["toxic_replies"]["mean"]),
                    *(f"{kind['logprob']['mean']:.2f}" for kind in (harmless, baiting)),
                    *(f"{kind['kl']:.3f}" for kind in (harmless, baiting)),
                ]
            )
        )
    baiting, harmless = (first[kind]["num_dialogues"] for kind in ("baiting", "harmless"))
    told = (
        f"{baiting} baiting and {harmless} harmless dialogues of {result['num_turns']} turns, {result['max_tokens']} "
        f"new tokens a reply, temperature 1, seed {result['seed']}. A reply is toxic if the classifier that `nontoxic` "
        "was trained on gives it less than 0.5; `clean_words` is minus the share of profane words, by a list. The "
        "log-probability is a token's mean under the model without control, in nats, and KL is nats a token. Intervals "
        "are over dialogues."
    )
    by = f"`{result['command']}`, {result['system']['cpu']}, {result['system']['date'][:10]}."
    return "\n".join([*toxic, "", *costs, "", told, "", by])


def _share(interval: Mapping[str, float]) -> str:
    return f"{_percent(interval['mean'])} ({_percent(interval['low'])} to {_percent(interval['high'])})"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / max(len(shares), 1)
