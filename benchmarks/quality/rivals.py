"""The rivals that only a study of a head compares it with, beside those that any head is compared with.

    blockwise best-of     the head's value picks the best of several continuations, block by block
    controlled decoding   the head's value of every likely token is tried by a real forward step
    VAS                   the same with twenty tokens, and values that are trained by temporal differences
    IVR                   the same with values that are trained again on what they guided
    RE-Control            the paper's head: a network of two layers fitted to one-step targets, ascended along its plain
                          gradient without a budget (with the mistakes of the published code mended; see
                          tests/value_models)
    token log-odds        a constant bias on tokens, from better against worse responses to the same prompt
    word scores           one of what the reward says of each word by itself: its lexicon
    end token             one on the tokens that end a response
    activation steering   the difference of better from worse responses, added to the states that enter a middle layer
    prompt replacement    what an instruction does to those states, added as often as a probe of the state says

Enter at RIVALS; to add one, write a `Method` and put it there, and its look into plots.py.

Sources: Kong et al. 2024, Aligning large language models with representation editing (arXiv 2406.05954); Han et al.
2024, Value augmented sampling for language model alignment and personalization (arXiv 2405.06639); Liu et al. 2025,
Iterative value refinement (arXiv 2503.02368). Those two papers train a language model as the value; here it reads the
frozen model's own states, as a head does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from benchmarks.quality.controlled_decoding import ControlledDecoding, controlled_decoding, decoding_by_value
from benchmarks.quality.steering import Steering, activation_steering
from benchmarks.quality.steering_fit import contrastive, replacement
from benchmarks.quality.token_bias import token_bias
from benchmarks.quality.value_refinement import refined_values
from server.cli.arms import ArmFactory
from server.cli.methods import BEST_OF, PROMPTING, STATIC_VECTOR, FitSources, Method, Subject
from server.control.objectives import WeightedSum
from server.control.params import Blocks, ControlParams
from value_models.baselines import Baseline
from value_models.evaluation import Arm
from value_models.heads import ValueHead
from value_models.token_biases import end_tokens, log_odds, word_scores
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData

_PUBLISHED_STEPS = 30
_PUBLISHED_TRAINING = TrainSettings(
    targets="td_one_step",
    center_by_prompt=False,
    hidden_widths=(512,),
    has_linear_part=False,
    metric="identity",
    learning_rate=1e-3,
    max_epochs=6,
)


# Han et al. 2024 take lambda 0.95, the twenty likeliest tokens and a weight of 3 of rewards that spread by about one.
_VAS_TRAINING = TrainSettings(
    targets="td_lambda",
    trace=0.95,
    center_by_prompt=False,
    hidden_widths=(512,),
    metric="identity",
    max_epochs=6,
)
_NUM_GUIDED_TOKENS = 20
_VALUE_WEIGHTS = (3.0, 6.0)


def blockwise(candidates: int = 4, block_tokens: int = 8) -> Blocks:
    return Blocks(type="blocks", candidates=candidates, block_tokens=block_tokens)


def re_control(
    factory: ArmFactory, *, step_size: float, steps: int = _PUBLISHED_STEPS, max_kl: float = math.inf
) -> Arm:
    """Beyond what a request may ask for: steps of any size, and without a budget unless one is given."""
    objective = WeightedSum(weights={RE_CONTROL.name: 1.0})
    return factory.control(ControlParams.without_limits(objective, step_size=step_size, steps=steps, max_kl=max_kl))


def re_control_head(data: TrainingData) -> ValueHead:
    """A head whose step of size a is a times the gradient of the value by the state itself, in standard deviations of
    the reward. Raises TrainingDataError."""
    head = train_head([data], _PUBLISHED_TRAINING).head
    # Rows over the normalised state x = (h - mean) / scale whose shift of h is dV/dh = (dV/dx) / scale.
    return head.with_ascent(head.inputs_UD / head.scale_D.square())


def vas_head(data: TrainingData) -> ValueHead:
    """Values of the base model's rewards as they are, by temporal differences. Raises TrainingDataError."""
    return train_head([data], _VAS_TRAINING).head


def _value_guided(subject: Subject, name: str, head: ValueHead, weight: float) -> Arm:
    params = ControlledDecoding(num_candidates=_NUM_GUIDED_TOKENS, value_weight=weight)
    return decoding_by_value(subject.factory, name, head, params)


def _blockwise_best_of(subject: Subject, number: float) -> Arm:
    return subject.factory.control(ControlParams.for_head(subject.head, steps=0, search=blockwise(int(number))))


def _controlled_decoding(subject: Subject, weight: float) -> Arm:
    return controlled_decoding(subject.factory, subject.head, ControlledDecoding(value_weight=weight))


def _token_bias(
    name: str, label: str, bias: Callable[[FitSources], Tensor], *, rewards: Iterable[str] | None = None
) -> Method:
    """Under the head's budget at every token, and matched to the head's divergence as a static vector is."""

    def arm(subject: Subject, strength: float) -> Arm:
        return token_bias(subject.factory, subject.fitted(method), strength=strength, max_kl=subject.max_kl)

    can_raise = None if rewards is None else frozenset(rewards)
    method = Method(name, label, arm, strengths=(1.0,), is_matched=True, fit=bias, rewards=can_raise)
    return method


def _steering(
    name: str, label: str, fit: Callable[[FitSources], Steering], *, needs_instruction: bool = False
) -> Method:
    """Under the head's budget at every token, and matched to the head's divergence as a static vector is."""

    def arm(subject: Subject, strength: float) -> Arm:
        return activation_steering(subject.factory, subject.fitted(method), strength=strength, max_kl=subject.max_kl)

    method = Method(
        name, label, arm, strengths=(1.0,), is_matched=True, fit=fit, num_rows=2, needs_instruction=needs_instruction
    )
    return method


BLOCKWISE = Method(
    "blockwise-best-of",
    "blockwise best of 4",
    _blockwise_best_of,
    strengths=(4.0,),
    tested_at=4.0,
    num_rows=blockwise().candidates,
)
CONTROLLED_DECODING = Method(
    "controlled-decoding",
    "controlled decoding",
    _controlled_decoding,
    strengths=(2.0, 6.0),
    num_rows=ControlledDecoding().num_candidates,
)
VAS = Method(
    "vas",
    "VAS",
    lambda subject, weight: _value_guided(subject, VAS.name, subject.factory.registry.head(VAS.name), weight),
    strengths=_VALUE_WEIGHTS,
    num_rows=_NUM_GUIDED_TOKENS,
    baseline=Baseline(vas_head, "mlp", settings=_VAS_TRAINING.model_dump()),
)
IVR = Method(
    "ivr",
    "IVR",
    lambda subject, weight: _value_guided(subject, IVR.name, subject.fitted(IVR), weight),
    strengths=_VALUE_WEIGHTS,
    num_rows=_NUM_GUIDED_TOKENS,
    fit=refined_values,
)
RE_CONTROL = Method(
    "re-control",
    "RE-Control",
    lambda subject, step_size: re_control(subject.factory, step_size=step_size),
    strengths=(1.0,),
    is_matched=True,
    baseline=Baseline(re_control_head, "mlp", settings=_PUBLISHED_TRAINING.model_dump()),
)

TOKEN_LOG_ODDS = _token_bias(
    "token-log-odds", "token log-odds", lambda sources: log_odds(sources.training_data(), sources.vocab_size)
)
WORD_SCORES = _token_bias(
    "word-scores",
    "word scores",
    lambda sources: word_scores(sources.reward, sources.words(), sources.vocab_size),
    rewards={"positive", "plain", "neutral", "nontoxic"},
)
END_TOKEN = _token_bias(
    "end-token",
    "end token",
    lambda sources: end_tokens(sources.end_token_ids, sources.vocab_size),
    rewards={"brevity"},
)
CONTRASTIVE = _steering("activation-steering", "activation steering", contrastive)
REPLACEMENT = _steering("prompt-replacement", "prompt replacement", replacement, needs_instruction=True)

RIVALS = {
    method.name: method
    for method in (
        PROMPTING,
        BEST_OF,
        BLOCKWISE,
        CONTROLLED_DECODING,
        VAS,
        IVR,
        RE_CONTROL,
        STATIC_VECTOR,
        TOKEN_LOG_ODDS,
        WORD_SCORES,
        END_TOKEN,
        CONTRASTIVE,
        REPLACEMENT,
    )
}
"""As tables have them."""
