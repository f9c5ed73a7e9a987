"""Whether directions that follow the state earn more than one: state-linear fields, by exact Fisher information.

    python -m benchmarks.fields brevity,relevance --rollouts runs/rollouts --out benchmarks/results/fields.json

A field's direction at a state h is d(h) = d_0 + sum_k phi_k(h) d_k, with a few features phi that are linear in the
state, standardised and clipped. Its (K + 1) D numbers are fitted jointly, by the natural gradient in the products of
features with gradients; the added ones are damped more, so that a field which the rollouts do not tell falls back to
the constant direction. Directions are fitted to one half of a run's prompts by the critic's advantages (lambda 0.8),
and judged on the other half by its advantages with lambda 1, which are without bias. Features are of the states of both
halves, and know no reward. Enter at `Fields`.

Rollouts must be sampled with top_p 1: a truncated policy's gradients have a mean that depends on the state, which a
field would exploit.

Shapes: N tokens, D hidden size, K features beside the constant, F = (K + 1) D numbers of a field, P prompts.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor

from benchmarks.markdown import header, row
from benchmarks.study import Study
from server.cli import run
from server.cli.command import read_prompts
from server.cli.program import command_line
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL
from value_models.ascent import ADDED_DAMPING
from value_models.critic import PrefixCritic
from value_models.critic_choice import PREFIX_TRACE
from value_models.moments import GramSum, Moments, MomentSums
from value_models.prefix_rewards import PrefixReport
from value_models.sources import FitSource
from value_models.token_blocks import TokenBlock
from value_models.training import TrainSettings
from value_models.training_data import TrainingData, load_training_data

NUM_COMPONENTS = 4
PROBES = ("entropy", "end_of_text", "sentence_end", "position")
_CLIP = 3.0
_AT_ONCE = 2048
"""Tokens whose products with features are in memory."""
_PROBED_EVERY = 16
"""Responses to one that probes are fitted to."""
DAMPINGS = (1.0, 10.0, 100.0)
"""Of the added part, relative to the constant's."""
FAMILIES: dict[str, list[str]] = {
    "constant": [],
    "1 component": ["component 0"],
    **{f"{n} components": [f"component {i}" for i in range(n)] for n in (2, 4)},
    **{probe.replace("_", " "): [probe] for probe in PROBES},
    "all four of these": list(PROBES),
}


@dataclass(slots=True, frozen=True)
class Features:
    """phi [N, 1 + K] of states; the first is 1."""

    names: list[str]
    moments: Moments
    maps_DK: Tensor
    mean_K: Tensor
    scale_K: Tensor

    def of(self, states_ND: Tensor) -> Tensor:
        raw_NK = (self.moments.normalise(states_ND) @ self.maps_DK - self.mean_K) / self.scale_K
        return torch.cat([torch.ones(len(states_ND), 1), raw_NK.clamp(-_CLIP, _CLIP)], dim=1)


@dataclass(slots=True)
class Half:
    """Sums over the tokens of one half of the prompts."""

    fisher_FF: Tensor
    """Mean product of a token's numbers, float64."""
    fit_F: Tensor
    """Mean of advantages by which directions are fitted, times those numbers."""
    judged_PF: Tensor
    """By prompt, sums with the advantages by which they are judged."""
    num_tokens: int

    def judged_F(self) -> Tensor:
        return self.judged_PF.sum(0) / self.num_tokens


class Fields(Study):
    """Fit fields of several families on halves of a run's prompts, and compare their gain with the constant's."""

    section: ClassVar[str] = "bench-fields"

    rewards: CliPositionalArg[str] = Field(description="comma-separated")
    rollouts: Path = Field(Path("runs/rollouts"), description="folder of a complete run with top_p 1")
    prompts: Path | None = Field(None, description="the prompts of that run; by default the project's own")
    model: str = DEFAULT_MODEL
    fisher_tokens: int = Field(100_000, ge=1, description="that the Fisher information is of, about")

    def measure(self) -> dict[str, Any]:
        kept = self._read()["rewards"] if self.out is not None and self.out.exists() else {}
        texts = {prompt.id: prompt.text for prompt in read_prompts(self.prompts)}
        loaded = load_model(self.model)
        sums: dict[str, list[Half]] = {}
        about: dict[str, Any] = {}
        features, fishers = None, list[Tensor]()
        for reward in self.rewards.split(","):
            data = load_training_data(self.rollouts, reward, texts, with_prefixes=True, show_progress=True)
            if not isinstance(data.prefixes, PrefixReport):
                raise ConfigurationError(f"rollouts: {data.prefixes}")
            if features is None:
                features = fitted_features(data, loaded)
                fishers = [fisher(source.data, features, self.fisher_tokens) for source in halves(data)]
                about = {
                    "command": command_line(),
                    "rollouts": data.manifest["settings"],
                    "model": data.base_model["name"],
                    "num_prompts": int(data.prompt_B.max()) + 1,
                    "num_responses": len(data.prompt_B),
                    "num_tokens": int(data.offsets[-1]),
                }
            sums[reward] = [
                half_sums(source, features, matrix) for source, matrix in zip(halves(data), fishers, strict=True)
            ]
        assert features is not None
        found = compared(sums, features.names)
        return {"rewards": kept | {reward: about | {"fields": found[reward]} for reward in found}}

    def body(self, result: Mapping[str, Any]) -> str:
        return table(result)


def halves(data: TrainingData) -> list[FitSource]:
    """The run with every other prompt as its training split."""
    found: list[FitSource] = []
    for half in (0, 1):
        split = ["train" if prompt % 2 == half else "validation" for prompt in data.prompt_B.tolist()]
        found.append(FitSource.of(replace(data, split=split), is_centred=True))
    return found


def fitted_features(data: TrainingData, loaded: LoadedModel) -> Features:
    """Principal components of the normalised states, and ridge fits of what is known of a token's place."""
    sums, probes = MomentSums(), list[MomentSums]()
    weight_VD = loaded.model.get_output_embeddings().weight.float()
    is_end_V = torch.tensor(
        [bool(re.search(r"[.!?\n]\s*$", str(loaded.tokenizer.decode([token])))) for token in range(len(weight_VD))]
    )
    for block in data.blocks(None):
        states_ND = block.states_ND
        sums.add(states_ND, torch.zeros(len(states_ND)))
        kept_N = block.of_tokens(torch.arange(len(data.prompt_B))) % _PROBED_EVERY == 0
        if not kept_N.any():
            continue
        targets_NQ = _probed(block, states_ND, kept_N, weight_VD, is_end_V, loaded)
        probes = probes or [MomentSums() for _ in PROBES]
        for probe, target_N in zip(probes, targets_NQ.unbind(1), strict=True):
            probe.add(states_ND[kept_N], target_N)
    moments = sums.moments()
    _, vectors_DD = torch.linalg.eigh(moments.correlation_DD)
    maps = [vectors_DD.flip(1)[:, :NUM_COMPONENTS]]
    for name, probe in zip(PROBES, probes, strict=True):
        fit = probe.moments()
        w_D = fit.ridge(0.01).double()
        explained = 2 * float(w_D @ fit.product_D) - float(w_D @ fit.correlation_DD @ w_D)
        print(f"probe {name}: R2 {explained / fit.target_variance:.2f}", flush=True)
        maps.append((w_D / fit.scale_D * moments.scale_D)[:, None])
    maps_DK = torch.cat(maps, dim=1)
    scale_K = ((maps_DK.T @ moments.correlation_DD) * maps_DK.T).sum(1).sqrt()
    names = [*(f"component {i}" for i in range(NUM_COMPONENTS)), *PROBES]
    return Features(names, moments, maps_DK.float(), torch.zeros(len(names)), scale_K.float())


def _probed(
    block: TokenBlock, states_ND: Tensor, kept_N: Tensor, weight_VD: Tensor, is_end_V: Tensor, loaded: LoadedModel
) -> Tensor:
    """What probes are fitted to, [N, Q] of the kept tokens: as PROBES names them."""
    position_N = block.position_of_tokens()
    previous_N = block.token_ids_N.long().roll(1)
    is_sentence_end_N = is_end_V[previous_N] & (position_N > 0)
    entropy: list[Tensor] = []
    end: list[Tensor] = []
    stops = sorted(loaded.eos_token_ids)
    for some_MD in states_ND[kept_N].split(256):
        logp_MV = (some_MD @ weight_VD.T).log_softmax(-1)
        entropy.append(-(logp_MV.exp() * logp_MV).sum(-1))
        end.append(logp_MV[:, stops].logsumexp(-1))
    return torch.stack(
        [
            torch.cat(entropy),
            torch.cat(end),
            is_sentence_end_N[kept_N].float(),
            (1.0 + position_N[kept_N]).log(),
        ],
        dim=1,
    )


def _products(data: TrainingData, features: Features) -> Iterator[tuple[TokenBlock, slice, Tensor]]:
    """Of some tokens at once of each block: features times gradients, [N, F]."""
    for block in data.blocks("train"):
        phi_NK, grads_ND = features.of(block.states_ND), block.logp_grads_ND
        for first in range(0, len(phi_NK), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            yield block, some, (phi_NK[some, :, None] * grads_ND[some, None, :]).flatten(1)


def fisher(data: TrainingData, features: Features, num_tokens: int) -> Tensor:
    """The mean product of a token's numbers, of about so many of the training tokens."""
    total = GramSum((1 + len(features.names)) * features.maps_DK.shape[0], torch.device("cpu"))
    every, counted = max(1, data.num_tokens("train") // num_tokens), 0
    for number, (_, _, x_NF) in enumerate(_products(data, features)):
        if number % every == 0:
            total.add(x_NF)
            counted += len(x_NF)
    return total.matrix().div_(counted)


def half_sums(source: FitSource, features: Features, fisher_FF: Tensor) -> Half:
    data = source.data
    critic = PrefixCritic.fit(source, ridge=TrainSettings().ridge)
    num_prompts = int(data.prompt_B.max()) + 1
    fit_F = torch.zeros(len(fisher_FF), dtype=torch.float64)
    judged_PF = torch.zeros(num_prompts, len(fisher_FF), dtype=torch.float64)
    held: TokenBlock | None = None
    fit_N = judged_N = torch.empty(0)
    for block, some, x_NF in _products(data, features):
        if block is not held:
            held, values_N = block, critic.values(block)
            fit_N = block.lambda_returns(source.standard_B, values_N, trace=PREFIX_TRACE) - values_N
            judged_N = block.of_tokens(source.standard_B) - values_N
        fit_F += fit_N[some] @ x_NF
        prompt_N = block.of_tokens(data.prompt_B)[some]
        own_P, place_N = prompt_N.unique(return_inverse=True)
        by_prompt_PN = torch.zeros(len(own_P), len(x_NF))
        by_prompt_PN[place_N, torch.arange(len(x_NF))] = judged_N[some]
        judged_PF[own_P] += by_prompt_PN @ x_NF
    num_tokens = data.num_tokens("train")
    return Half(fisher_FF, fit_F / num_tokens, judged_PF[data.prompts_in("train")], num_tokens)


def compared(sums: Mapping[str, Sequence[Half]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By reward and family: gains on the other half, what they are above the constant's, and split-half S."""
    results: dict[str, dict[str, Any]] = {reward: {} for reward in sums}
    size = len(next(iter(sums.values()))[0].fit_F) // (1 + len(names))
    fishers = [half.fisher_FF for half in next(iter(sums.values()))]
    base: dict[str, list[Tensor]] = {}
    for family, members in FAMILIES.items():
        places = [0, *(1 + names.index(member) for member in members)]
        index_F = torch.cat([torch.arange(place * size, (place + 1) * size) for place in places])
        judges = [fisher_FF[index_F][:, index_F] for fisher_FF in fishers]
        for reward, figures in _split_half(sums, judges, index_F, size).items():
            results[reward][family] = {"split_half_s": figures}
        for damping in DAMPINGS if members else (1.0,):
            factors = [_factor(fisher_FF, size, damping) for fisher_FF in judges]
            for reward, both in sums.items():
                earned = [
                    _by_prompt(both[1 - half], judges[1 - half], index_F, _solved(factor, both[half].fit_F[index_F]))
                    for half, factor in enumerate(factors)
                ]
                if not members:
                    base[reward] = earned
                results[reward][family][f"damping {damping:g}"] = _figures(earned, base[reward])
    return results


def _figures(earned: Sequence[Tensor], base: Sequence[Tensor]) -> dict[str, Any]:
    margins = [one_P - base_P for one_P, base_P in zip(earned, base, strict=True)]
    errors = [float(margin_P.std()) * len(margin_P) ** 0.5 for margin_P in margins]
    return {
        "gains": [round(float(one_P.sum()), 4) for one_P in earned],
        "above_constant": round(sum(float(margin_P.sum()) for margin_P in margins) / 2, 4),
        "error": round(math.hypot(*errors) / 2, 4),
    }


def _factor(fisher_FF: Tensor, size: int, added: float) -> Tensor:
    """Of the matrix with the damping of a head's direction, and `added` times as much of each other feature's."""
    damped_FF = fisher_FF.clone()
    diagonal_F = damped_FF.diagonal()
    for first in range(0, len(fisher_FF), size):
        part_F = diagonal_F[first : first + size]
        part_F += TrainSettings().damping * part_F.mean() * (added if first else 1.0)
    return torch.linalg.cholesky(damped_FF)


def _solved(factor_FF: Tensor, right_F: Tensor) -> Tensor:
    return torch.cholesky_solve(right_F[:, None], factor_FF)[:, 0]


def _by_prompt(judge: Half, fisher_FF: Tensor, index_F: Tensor, u_F: Tensor) -> Tensor:
    """What a field's gain is of each prompt's tokens; see `AscentGain`."""
    paid = 0.5 * float(u_F @ fisher_FF @ u_F)
    return judge.judged_PF[:, index_F] @ u_F / judge.num_tokens / paid**0.5


def _split_half(
    sums: Mapping[str, Sequence[Half]], fishers: Sequence[Tensor], index_F: Tensor, size: int
) -> dict[str, float]:
    """S = g1' F^-1 g2: the squared signal that a family has, without bias by the advantages that judge."""
    factor_FF = _factor(0.5 * (fishers[0] + fishers[1]), size, ADDED_DAMPING)
    found: dict[str, float] = {}
    for reward, both in sums.items():
        first_F, second_F = (half.judged_F()[index_F] for half in both)
        found[reward] = round(float(first_F @ _solved(factor_FF, second_F)), 5)
    return found


def table(result: Mapping[str, Any]) -> str:
    lines = header(["reward", "direction", "S", *(f"gain, damping {damping:g}" for damping in DAMPINGS), "times"])
    told: list[str] = []
    for reward, one in result["rewards"].items():
        constant = sum(one["fields"]["constant"]["damping 1"]["gains"])
        for family, figures in one["fields"].items():
            cells = [f"`{reward}`", family, f"{figures['split_half_s']:.4f}"]
            cells += [_cell(figures.get(f"damping {damping:g}")) for damping in DAMPINGS]
            lines.append(row([*cells, f"{sum(_at_default(figures)['gains']) / constant:.2f}"]))
        told.append(
            f"`{reward}`: {one['num_prompts']:,} prompts, {one['num_responses']:,} responses, {one['num_tokens']:,} "
            f"tokens of {one['model']}, top_p {one['rollouts']['top_p']:g} (`{one['command']}`)."
        )
    return "\n".join([*lines, "", "\n\n".join(told)])


def _at_default(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The gains by the damping that training takes."""
    return figures.get(f"damping {ADDED_DAMPING:g}", figures["damping 1"])


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    gains = ", ".join(f"{gain:.3f}" for gain in figure["gains"])
    return f"{gains} ({figure['above_constant']:+.4f} ± {figure['error']:.4f})" if figure["error"] else gains


if __name__ == "__main__":
    raise SystemExit(run("benchmarks.fields:Fields", "python -m benchmarks.fields", sys.argv[1:]))
