"""Constant biases on tokens, the plainest way to raise a reward: what is added to every token's logit, in every state.

They are rivals of heads, which add W u instead. A bias comes from responses (`log_odds`), from words that a reward
scores by themselves (`word_scores`), or is of the tokens that end a text (`end_tokens`). Each is in a unit of its own;
whoever uses one looks for its strength. Knows nothing of engines. Enter at one of the three.

Shapes: V vocabulary, B responses.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from value_models.errors import TrainingDataError
from value_models.rewards import Reward
from value_models.targets import better_in_prompt
from value_models.training_data import TrainingData

_PRIORS = (0.01, 0.1, 1.0, 10.0)
"""Strengths of the prior that are tried, in tokens for each entry of the vocabulary."""


def log_odds(data: TrainingData, vocab_size: int) -> Tensor:
    """Log-odds [V] of tokens in the better against the worse responses to the same prompt, float32.

    A response is better or worse than the mean of its prompt's. Counts of training responses are joined by a prior of
    tokens spread as all of them are (Monroe et al. 2008, Fightin' words), whose strength is the one that tells better
    from worse best on validation responses. Tokens that never came have none. Raises TrainingDataError when no prompt
    has responses of different rewards.
    """
    side_B = better_in_prompt(data.reward_B, data.prompt_B)
    counts = _counts(data, "train", side_B, vocab_size)
    held_out = _counts(data, "validation", side_B, vocab_size)
    if not counts[0].sum() or not counts[1].sum():
        raise TrainingDataError("reward: no training prompt has responses of different rewards, so no token tells more")
    tried = [_log_odds(counts, prior * vocab_size) for prior in _PRIORS]
    return max(tried, key=lambda bias_V: _told(bias_V, held_out)).float()


def word_scores(reward: Reward, words: Mapping[int, str], vocab_size: int) -> Tensor:
    """What a reward says of each token's word alone [V], less what it says of the median word, float32.

    `words` are those of tokens that begin a word; the others have none. Raises RewardError.
    """
    scores = reward([""] * len(words), list(words.values()))
    bias_V = torch.zeros(vocab_size)
    if words:
        bias_V[list(words)] = torch.tensor(scores) - statistics.median(scores)
    return bias_V


def end_tokens(token_ids: Iterable[int], vocab_size: int) -> Tensor:
    """One nat [V] for the tokens that end a text, float32."""
    bias_V = torch.zeros(vocab_size)
    bias_V[sorted(token_ids)] = 1.0
    return bias_V


def _counts(data: TrainingData, split: str, side_B: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Of better and worse responses, how often each token came [V], float64."""
    better, worse = torch.zeros(vocab_size, dtype=torch.float64), torch.zeros(vocab_size, dtype=torch.float64)
    for block in data.blocks(split):
        side_N, token_ids_N = block.of_tokens(side_B).cpu(), block.token_ids_N.cpu()
        better += token_ids_N[side_N > 0].bincount(minlength=vocab_size)
        worse += token_ids_N[side_N < 0].bincount(minlength=vocab_size)
    return better, worse


def _log_odds(counts: tuple[Tensor, Tensor], prior: float) -> Tensor:
    """[V] in nats."""
    both_V = counts[0] + counts[1]
    spread_V = prior * both_V / both_V.sum()
    shares = [(count_V + spread_V) / (count_V.sum() + prior) for count_V in counts]
    return torch.where(both_V > 0, (shares[0] / shares[1]).log(), 0.0)


def _told(bias_V: Tensor, counts: tuple[Tensor, Tensor]) -> float:
    """How far better and worse responses lie apart by their tokens' mean bias, in its standard deviations."""
    both_V = counts[0] + counts[1]
    mean = (both_V @ bias_V) / both_V.sum().clamp(min=1.0)
    deviation = ((both_V @ (bias_V - mean).square()) / both_V.sum().clamp(min=1.0)).sqrt().clamp(min=1e-12)
    apart = [count_V @ bias_V / count_V.sum().clamp(min=1.0) for count_V in counts]
    return float((apart[0] - apart[1]) / deviation)
