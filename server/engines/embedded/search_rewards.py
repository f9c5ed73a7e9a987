"""The rewards that an operator registers for searches, by the names that requests use. Enter at `registered`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.control.params import MAX_REWARD_CHARS
from server.errors import ConfigurationError
from value_models.errors import ValueModelError
from value_models.rewards import Reward, load_reward

_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_REWARD_CHARS}}}")


def registered(listed: Sequence[str]) -> dict[str, Reward]:
    """What `search_rewards` lists: `NAME` of a built-in reward, or `NAME=REWARD` (value_models/rewards.py).

    Each is asked once. Raises ConfigurationError for one that cannot be had or fails, a name that is no name, and one
    that is given twice.
    """
    rewards: dict[str, Reward] = {}
    for entry in listed:
        name, _, given = entry.partition("=")
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"search_rewards: {entry!r}: a name has up to {MAX_REWARD_CHARS} letters, digits, _ and -; give other "
                "rewards as NAME=REWARD"
            )
        if name in rewards:
            raise ConfigurationError(f"search_rewards: {name} is given twice")
        try:
            rewards[name] = load_reward(given or name)
            # Some need a package, or fail, only when they are asked.
            rewards[name](["A question?"], ["An answer."])
        except ValueModelError as error:
            raise ConfigurationError(f"search_rewards: {error}") from error
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise ConfigurationError(f"search_rewards: {name} fails for a first answer: {told}") from error
    return rewards
