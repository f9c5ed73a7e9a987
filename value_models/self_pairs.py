"""Pairs that nobody labelled: a model's own answers to the same prompts under a good and under a bad instruction.

Knows nothing of engines. Enter at `self_pairs`; `read_pairs` in given_texts.py reads what it makes.

Source: Adila et al. 2024, Is free self-alignment possible? (AlignEZ, arXiv 2406.03642).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt


@dataclass(slots=True)
class SelfPairs:
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """One a pair: the prompt's messages, and both answers."""
    num_left_out: int = 0
    """Pairs that nothing can be learnt from: an empty answer, the same answer twice, or the same pair again."""

    @property
    def num_prompts(self) -> int:
        return len({str(record["messages"]) for record in self.records})


def self_pairs(
    prompts: Sequence[RolloutPrompt],
    good: Sequence[EvalSample],
    bad: Sequence[EvalSample],
    tokens_of: Callable[[str], Sequence[int]],
) -> SelfPairs:
    """Answer i to a prompt after the good instruction beside answer i after the bad one, in the prompts' order.

    `tokens_of` a response are those that will be read of it: texts that differ later are the same.
    """
    turns = {prompt.id: prompt.turns() for prompt in prompts}
    pairs, seen = SelfPairs(), set[tuple[str, frozenset[str]]]()
    for better, worse in zip(good, bad, strict=True):
        assert (better.prompt_id, better.sample) == (worse.prompt_id, worse.sample)
        texts = frozenset({better.response, worse.response})
        key = (str(turns[better.prompt_id]), texts)
        is_same = len({tuple(tokens_of(text)) for text in texts}) < 2
        if is_same or key in seen or not all(text.strip() for text in texts):
            pairs.num_left_out += 1
            continue
        seen.add(key)
        record = {"messages": turns[better.prompt_id], "chosen": better.response, "rejected": worse.response}
        pairs.records.append(record)
    return pairs
