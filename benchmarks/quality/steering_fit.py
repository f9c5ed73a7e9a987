"""What activation steering adds, and at which layer, learnt from rollouts or from an instruction.

    contrastive   the mean state of each prompt's best response less that of its worst, over the response's positions
    replacement   what an instruction does to the states of the responses that it brings about: its mean direction, as
                  often as a rectified linear probe of the state without the instruction says

A layer is chosen by validation prompts of the rollouts: how much likelier steering makes the better response of a
prompt against the worse one, in nats, for the root of its divergence, at strengths of about a tenth of a nat a token.
That is what the papers' sweeps over layers ask, and takes no sampling. Enter at `contrastive` and `replacement`.

Shapes: T tokens of a text, N tokens of all, D hidden size, V vocabulary.

Sources: Panickssery et al. 2024 (arXiv 2312.06681) take pairs of answers to one question, mean differences at each
layer, and the layer and multiplier that do best on held-out questions; Heyman and Vandeputte 2026, Steer like the LLM
(arXiv 2605.03907), take coefficients for each token that a rectified probe reads off the state, fitted to what
prompting does to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.steering import Steering, SteeringWatch
from server.cli.methods import FitSources
from server.engines.embedded.core import EngineCore
from server.engines.embedded.divergence import kl
from server.errors import ConfigurationError
from value_models.errors import TrainingDataError
from value_models.kept_fits import fit_key, kept_tensors
from value_models.prompt_sets import in_mixed_order, split_of
from value_models.rollouts import open_rollouts
from value_models.training_data import RunTokens

_log = logging.getLogger(__name__)
# Part of what tells kept ones apart: raise it when the way they are fitted changes.
_VERSION = 1
_NUM_PAIRS = {"train": 192, "validation": 24}
_NUM_INSTRUCTED_PROMPTS = 96
_LAYERS_AT = (0.3, 0.4, 0.5, 0.6, 0.75)
"""Shares of the model's depth that are tried."""
_NUM_SCALING_TEXTS = 16
_WANTED_KL = 0.1
_START_SHARE = 0.05
"""Of a state's length: the first guess of what diverges so far."""
_PROBE_STEPS, _PROBE_RATE, _PROBE_RIDGE = 300, 1e-2, 0.1


@dataclass(slots=True, frozen=True)
class Text:
    """What a model reads: a prompt and a response to it."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def token_ids(self) -> list[int]:
        """Without the last token, behind which nothing is drawn."""
        return [*self.prompt_ids, *self.response_ids[:-1]]

    @property
    def is_steered_T(self) -> Tensor:
        """The positions that tokens of the response are drawn from."""
        return torch.arange(len(self.token_ids)) >= len(self.prompt_ids) - 1


@dataclass(slots=True, frozen=True)
class Pair:
    """The best and the worst response to a prompt."""

    better: Text
    worse: Text


@dataclass(slots=True, frozen=True)
class _HeldOut:
    """A better (sign 1) or worse (-1) response, and the base model's states [T, D] behind its tokens."""

    text: Text
    sign: float
    base_TD: Tensor


@dataclass(slots=True)
class _Recorder:
    """Keeps what some layers get."""

    layers: Sequence[int]
    seen: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def saw(self, layer: int, what: str, given: Tensor) -> Tensor:
        if what == "entered" and layer in self.layers:
            self.seen[layer] = given.float().clone()
        return given


@dataclass(slots=True)
class _Depth:
    """Counts layers."""

    num_layers: int = 0

    def saw(self, layer: int, what: str, given: Tensor) -> Tensor:
        if what == "entered":
            self.num_layers = max(self.num_layers, layer + 1)
        return given


def contrastive(sources: FitSources) -> Steering:
    """Contrastive activation addition. Raises RolloutError, RewardError, TrainingDataError."""

    def fit(core: EngineCore, layers: Sequence[int]) -> list[Steering]:
        sums = {layer: torch.zeros(()) for layer in layers}
        for pair in tqdm(pairs(sources, "train"), desc="contrasts", unit="pair", leave=False):
            better, worse = (_response_states(core, text, layers) for text in (pair.better, pair.worse))
            for layer in layers:
                sums[layer] = sums[layer] + better[layer].mean(0) - worse[layer].mean(0)
        return [Steering(layer, total_D / _NUM_PAIRS["train"]) for layer, total_D in sums.items()]

    return _kept(sources, "contrastive", lambda core: _best(core, fit(core, layers_to_try(core)), sources))


def replacement(sources: FitSources) -> Steering:
    """Prompt steering replacement. Raises RolloutError, RewardError, TrainingDataError."""

    def fit(core: EngineCore, layers: Sequence[int]) -> list[Steering]:
        bare: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        moves: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for plain, instructed in tqdm(_instructed(sources), desc="instructed", unit="text", leave=False):
            without, behind = (_response_states(core, text, layers) for text in (plain, instructed))
            for layer in layers:
                bare[layer].append(without[layer])
                moves[layer].append(behind[layer] - without[layer])
        return [_probed(layer, bare[layer], moves[layer]) for layer in layers]

    return _kept(sources, "replacement", lambda core: _best(core, fit(core, layers_to_try(core)), sources))


def layers_to_try(core: EngineCore) -> list[int]:
    """In order. Raises ConfigurationError for a model whose layers cannot be told apart."""
    depth = _Depth()
    core.states_of([[0, 0]], depth)
    if depth.num_layers == 0:
        raise ConfigurationError("methods: this model's layers cannot be told apart; leave activation steering out")
    return sorted({int(share * depth.num_layers) for share in _LAYERS_AT})


def pairs(sources: FitSources, split: str) -> list[Pair]:
    """Of a split's prompts, in mixed order, those whose responses differ in reward. Raises TrainingDataError."""
    data = sources.training_data()
    assert isinstance(data.tokens, RunTokens)
    texts: dict[str, list[tuple[float, list[int]]]] = {}
    first = 0
    for shard in range(data.tokens.run.num_shards):
        rows, tensors = data.tokens.run.rows(shard), data.tokens.run.tensors(shard)
        for number, row in enumerate(rows):
            if split_of(row["prompt_id"]) == split:
                start, end = tensors.offsets[number : number + 2].tolist()
                token_ids = tensors.by_name["token_ids_N"][start:end].tolist()
                texts.setdefault(row["prompt_id"], []).append((float(data.reward_B[first + number]), token_ids))
        first += len(rows)
    prompts = sources.prompts()
    found: list[Pair] = []
    for prompt in in_mixed_order(prompts[prompt_id] for prompt_id in texts):
        worst, best = (choose(texts[prompt.id], key=lambda scored: scored[0]) for choose in (min, max))
        if worst[0] < best[0] and len(found) < _NUM_PAIRS[split]:
            ids = sources.factory.source.encode(prompt)
            found.append(Pair(Text(ids, best[1]), Text(ids, worst[1])))
    if not found:
        raise TrainingDataError(f"reward: no {split} prompt has responses of different rewards; nothing to contrast")
    return found


def _instructed(sources: FitSources) -> list[tuple[Text, Text]]:
    """Responses that an instruction brought about to training prompts, behind the bare prompt and behind it."""
    assert sources.instruction is not None
    factory, instruction = sources.factory, sources.instruction
    chats = [prompt for prompt in in_mixed_order(sources.prompts().values()) if split_of(prompt.id) == "train"]
    chosen = [prompt for prompt in chats if prompt.format == "chat"][:_NUM_INSTRUCTED_PROMPTS] or chats
    tokenizer: Any = factory.source.loaded.tokenizer
    by_id = {prompt.id: prompt for prompt in chosen}
    texts: list[tuple[Text, Text]] = []
    for sample in factory.prompting(instruction).sampler(chosen[:_NUM_INSTRUCTED_PROMPTS], 1):
        response_ids = list(tokenizer(sample.response, add_special_tokens=False)["input_ids"])
        if response_ids:
            prompt = by_id[sample.prompt_id]
            behind = factory.source_of(instruction).encode(prompt, instruction.text)
            texts.append((Text(factory.source.encode(prompt), response_ids), Text(behind, response_ids)))
    return texts


def _probed(layer: int, bare: Sequence[Tensor], moves: Sequence[Tensor]) -> Steering:
    """The mean move as a direction of length one, and the probe that tells how far along it each token goes.

    Ridge regression begins, and gradient steps on the rectified error go on while every fifth text, which they do not
    see, is told better.
    """
    move_ND = torch.cat(list(moves))
    direction_D = move_ND.mean(0) / move_ND.mean(0).norm().clamp(min=1e-9)
    target_N = move_ND @ direction_D
    states_ND = torch.cat(list(bare))
    mean_D, scale_D = states_ND.mean(0), states_ND.std(0).clamp(min=1e-6)
    inputs_ND = (states_ND - mean_D) / scale_D
    is_held_out_N = torch.cat([torch.full((len(text),), number % 5 == 1) for number, text in enumerate(bare)])
    weights_D = _ridge(inputs_ND[~is_held_out_N], target_N[~is_held_out_N] - target_N.mean())
    start = torch.cat([weights_D, target_N.mean()[None]])
    fitted = _rectified(start, inputs_ND, target_N, is_held_out_N)
    probe_D = fitted[:-1] / scale_D
    return Steering(layer, direction_D, probe_D, float(fitted[-1] - probe_D @ mean_D))


def _ridge(inputs_ND: Tensor, target_N: Tensor) -> Tensor:
    gram_DD = inputs_ND.T @ inputs_ND / len(inputs_ND) + _PROBE_RIDGE * torch.eye(inputs_ND.shape[1])
    return torch.linalg.solve(gram_DD, inputs_ND.T @ target_N / len(inputs_ND))


def _rectified(start: Tensor, inputs_ND: Tensor, target_N: Tensor, is_held_out_N: Tensor) -> Tensor:
    """Weights and offset [D + 1] of lowest held-out error of max(0, w . x + b)."""
    with torch.enable_grad():
        fitted = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([fitted], lr=_PROBE_RATE, weight_decay=1e-3)
        best, best_error = start, float("inf")
        for _ in range(_PROBE_STEPS):
            error_N = ((inputs_ND @ fitted[:-1] + fitted[-1]).clamp(min=0.0) - target_N).square()
            # Of a single text there is none, and the last step is as good as any.
            held_out = float(error_N.detach()[is_held_out_N].mean().nan_to_num(0.0))
            if held_out <= best_error:
                best, best_error = fitted.detach().clone(), held_out
            optimizer.zero_grad()
            error_N[~is_held_out_N].mean().backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()
    return best


def _best(core: EngineCore, candidates: Sequence[Steering], sources: FitSources) -> Steering:
    """The candidate whose layer tells better from worse best for its divergence, with a strength of 1 that diverges
    about a tenth of a nat."""
    held_out = [
        _HeldOut(text, sign, core.states_of([text.token_ids])[0])
        for pair in pairs(sources, "validation")
        for text, sign in ((pair.better, 1.0), (pair.worse, -1.0))
    ]
    tried: list[tuple[float, Steering]] = []
    for candidate in tqdm(candidates, desc="layers", unit="layer", leave=False):
        steering = _in_unit(core, candidate, held_out[:_NUM_SCALING_TEXTS])
        gain, nats = _told_apart(core, steering, held_out)
        tried.append((gain / max(nats, 1e-9) ** 0.5, steering))
        _log.info("layer %d tells better from worse by %.2f a root nat", steering.layer, tried[-1][0])
    return max(tried, key=lambda one: one[0])[1]


def _in_unit(core: EngineCore, steering: Steering, held_out: Sequence[_HeldOut]) -> Steering:
    states_TD = _response_states(core, held_out[0].text, [steering.layer])[steering.layer]
    added_TD = steering.moved(states_TD, 1.0) - states_TD
    if (added := float(added_TD.norm(dim=1).mean())) > 0:
        steering = steering.scaled(_START_SHARE * float(states_TD.norm(dim=1).mean()) / added)
    for _ in range(2):
        _, nats = _told_apart(core, steering, held_out)
        steering = steering.scaled(min(max((_WANTED_KL / max(nats, 1e-9)) ** 0.5, 0.1), 10.0))
    return steering


@torch.inference_mode()
def _told_apart(core: EngineCore, steering: Steering, held_out: Sequence[_HeldOut]) -> tuple[float, float]:
    """By how many nats steering lifts a better response above the worse one, and its divergence a token."""
    lifted, nats, num_tokens = 0.0, 0.0, 0
    for one in held_out:
        watch = SteeringWatch(steering, 1.0, one.text.is_steered_T)
        first = len(one.text.prompt_ids) - 1
        base_TV, steered_TV = (
            core.lm_head.logits(states_TD[first:])
            for states_TD in (one.base_TD, core.states_of([one.text.token_ids], watch)[0])
        )
        drawn_T1 = torch.tensor(one.text.response_ids)[:, None]
        for logits_TV, sign in ((steered_TV, one.sign), (base_TV, -one.sign)):
            lifted += sign * float((logits_TV.gather(1, drawn_T1)[:, 0] - logits_TV.logsumexp(-1)).sum())
        nats += float(kl(steered_TV, base_TV).sum())
        num_tokens += len(one.text.response_ids)
    return 2 * lifted / len(held_out), nats / num_tokens


def _response_states(core: EngineCore, text: Text, layers: Sequence[int]) -> Mapping[int, Tensor]:
    """By layer, the states [T, D] float32 that tokens of the response are drawn from, as they enter it."""
    recorder = _Recorder(layers)
    core.states_of([text.token_ids], recorder)
    return {layer: states_TD[len(text.prompt_ids) - 1 :] for layer, states_TD in recorder.seen.items()}


def _kept(sources: FitSources, name: str, make: Callable[[EngineCore], Steering]) -> Steering:
    """From the folder for such things, or fitted now and put there."""
    core = sources.factory.source.core
    assert isinstance(core, EngineCore)
    told = {
        "version": _VERSION,
        "rollouts": open_rollouts(sources.rollouts).manifest,
        "reward": sources.reward_name,
        "instruction": None if sources.instruction is None else [sources.instruction.text, sources.instruction.place],
    }
    path = sources.folder / f"{fit_key(told)}-{name}.safetensors"
    return Steering.of(kept_tensors(path, lambda: make(core).tensors()))
