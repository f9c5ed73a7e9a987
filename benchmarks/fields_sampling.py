"""Whether text bears out what the gains say of fields: a head with one direction and one that follows the state.

    python -m benchmarks.fields_sampling brevity --out benchmarks/results/fields-sampling.json

Both are fitted to the training prompts of the same rollouts, and answer the same test prompts with the same seeds, at
steps at which they diverge alike. Everything else is as in critic_sampling.py. Enter at `FieldsSampling`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import ClassVar

from benchmarks.critic_sampling import CriticSampling
from server.cli import run
from value_models.fields import AUTO_FEATURES
from value_models.training import TrainSettings


class FieldsSampling(CriticSampling):
    """Sample under heads of one reward with and without a field."""

    section: ClassVar[str] = "bench-fields-sampling"
    heads: ClassVar[Mapping[str, TrainSettings]] = {
        f"field_{count}" if count else "constant": TrainSettings(critic="prefix_reward", field_features=count)
        for count in (0, AUTO_FEATURES)
    }


if __name__ == "__main__":
    raise SystemExit(
        run("benchmarks.fields_sampling:FieldsSampling", "python -m benchmarks.fields_sampling", sys.argv[1:])
    )
