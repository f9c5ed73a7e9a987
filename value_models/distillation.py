"""A head from instructions: the shift of a model's states that comes nearest to what a system message does.

Every text is read three times: after nothing, after the instruction and after the contrast, which is nothing where none
is given. With p, q and r the next-token distributions there, and W the rows of the output layer,

    g = E[(q - r) W]        what a shift u of the states gains: the slope of E[KL(r || p_u) - KL(q || p_u)] at u = 0
    F = E[Cov_p(W)]         what it costs: KL(p_u || p) is u F u / 2, to second order
    u = (F + damping)^-1 g  the natural gradient; both expectations are over the whole vocabulary, so they have none of
                            the noise of sampled tokens

The head's value is a reward like any other: how much likelier the response is after the instruction than after the
contrast, in nats a token, as the states without either tell it. Knows nothing of language models; an `InstructedSource`
samples and reads. Enter at `read_texts` and `distil_head`.

Shapes: N tokens of all texts one after the other, B texts, M tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from value_models.errors import InstructionError
from value_models.heads import UNIT_COST_NATS, LinearHead, ValueHead
from value_models.linalg import solve
from value_models.moments import MomentSums
from value_models.prompt_sets import RolloutPrompt, split_of_all
from value_models.rollouts import RolloutSettings

MIN_PROMPTS = 20
"""Different ones; two at least are for validation and two for the test."""
_DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0)
_RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
_CHUNK_NUMBERS = 2**24
"""Of one distribution over the vocabulary for each token of a chunk."""
_MIN_DIVERGENCE = 1e-6
"""Nats a token, below which an instruction does nothing."""
_CORRECTIONS = 2


@dataclass(slots=True, frozen=True)
class InstructedText:
    """A response, and the states behind its tokens after nothing, after the instruction and after the contrast."""

    prompt_id: str
    token_ids_T: Tensor
    bare_TD: Tensor
    instructed_TD: Tensor
    contrasted_TD: Tensor


class OutputLayer(Protocol):
    """From states to logits: `finish(project(h))`, of which `project` is linear."""

    def rows(self) -> Tensor:
        """W [V, D] float32 of project(h) = W h."""
        ...

    def project(self, hidden_MD: Tensor) -> Tensor:
        """[M, V] float32."""
        ...

    def finish(self, projected_MV: Tensor) -> Tensor:
        """Logits [M, V] float32."""
        ...

    def slopes(self, logits_MV: Tensor) -> Tensor | None:
        """What `finish` multiplies small changes by [M, V], at its results; None where that is 1."""
        ...


class InstructedSource(Protocol):
    """Samples from one model and reads texts with it."""

    @property
    def base_model(self) -> dict[str, Any]:
        """Identity as plain data; see `value_models.store.BaseModelCard`."""
        ...

    @property
    def output(self) -> OutputLayer: ...

    def texts(
        self, prompts: Sequence[RolloutPrompt], instruction: str, contrast: str | None, settings: RolloutSettings
    ) -> Iterator[InstructedText]:
        """A response to each prompt after the instruction, and then, in any order again, one after the contrast."""
        ...


class DistilSettings(BaseModel):
    """What `recontrol train --instruction` can vary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_prompts: int = Field(default=200, ge=MIN_PROMPTS)
    """Chat prompts to read the instruction at, the first of the file."""
    max_tokens: int = Field(default=32, ge=1)
    """New tokens of a response."""
    damping: float | None = Field(default=None, ge=0)
    """Relative to the mean eigenvalue of F; None takes what does best on validation prompts."""
    ridge: float | None = Field(default=None, gt=0)
    """Of the value, relative to unit variance; None takes what does best on validation prompts."""
    seed: int = 0


@dataclass(slots=True, frozen=True)
class InstructedTexts:
    """All texts in memory, in the dtype of the model's states; text i has the tokens offsets[i]..offsets[i + 1]."""

    token_ids_N: Tensor
    bare_ND: Tensor
    instructed_ND: Tensor
    contrasted_ND: Tensor
    offsets: Tensor
    split: list[str]
    num_prompts: dict[str, int]
    has_contrast: bool

    def text_of_tokens(self) -> Tensor:
        lengths = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def tokens_of(self, split: str) -> Tensor:
        is_in_B = torch.tensor([name == split for name in self.split])
        return is_in_B[self.text_of_tokens()].nonzero()[:, 0]


@dataclass(slots=True, frozen=True)
class DistilledHead:
    head: ValueHead
    validation: dict[str, Any]
    """For `HeadCard.validation`."""
    distillation: dict[str, Any]
    """For `HeadCard.distillation`: what the direction does on test prompts."""


def read_texts(
    source: InstructedSource,
    prompts: Sequence[RolloutPrompt],
    instruction: str,
    contrast: str | None,
    settings: DistilSettings,
) -> InstructedTexts:
    """Sample and read what a head is distilled from.

    Raises InstructionError for an instruction that says nothing, for two that are the same, and for too few prompts;
    and what the source raises.
    """
    check_instructions(instruction, contrast)
    chats = chat_prompts(prompts, settings)
    splits = split_of_all(chats)
    num_prompts = {name: list(splits.values()).count(name) for name in ("train", "validation", "test")}
    # Everything that the model may say has to be among the texts, also what top_p would cut off.
    sampling = RolloutSettings(num_samples=1, max_tokens=settings.max_tokens, top_p=1.0, seed=settings.seed)
    # Whatever order they came in: sums are rounded by it.
    place = {prompt.id: index for index, prompt in enumerate(chats)}
    texts = sorted(source.texts(chats, instruction, contrast, sampling), key=lambda text: place[text.prompt_id])
    lengths = torch.tensor([0] + [len(text.token_ids_T) for text in texts])
    return InstructedTexts(
        token_ids_N=torch.cat([text.token_ids_T for text in texts]),
        bare_ND=torch.cat([text.bare_TD for text in texts]),
        instructed_ND=torch.cat([text.instructed_TD for text in texts]),
        contrasted_ND=torch.cat([text.contrasted_TD for text in texts]),
        offsets=lengths.cumsum(0),
        split=[splits[text.prompt_id] for text in texts],
        num_prompts=num_prompts,
        has_contrast=contrast is not None,
    )


def chat_prompts(prompts: Sequence[RolloutPrompt], settings: DistilSettings) -> list[RolloutPrompt]:
    """Those that an instruction is read at. Raises InstructionError for too few different ones."""
    chats = [prompt for prompt in prompts if prompt.format == "chat"]
    chosen = chats[: settings.max_prompts]
    num_different, num_of_all = (len({prompt.asked() for prompt in some}) for some in (chosen, chats))
    needed = f"an instruction needs at least {MIN_PROMPTS} different ones"
    if num_of_all < MIN_PROMPTS:
        raise InstructionError(f"prompts: {len(chats)} chat prompts, {num_of_all} of them different; {needed}")
    if num_different < MIN_PROMPTS:
        raise InstructionError(
            f"instruction_prompts: of the first {len(chosen)} prompts {num_different} are different; {needed}"
        )
    return chosen


def check_instructions(instruction: str, contrast: str | None) -> None:
    """Raises InstructionError where nothing can be learnt from them, whatever the model."""
    for name, text in (("instruction", instruction), ("contrast", contrast)):
        if text is not None and not text.strip():
            raise InstructionError(f"{name}: it is empty; say what the answers should be like")
    if contrast is not None and contrast.split() == instruction.split():
        raise InstructionError("contrast: it is the instruction itself, so there is no difference to learn")


def distil_head(texts: InstructedTexts, output: OutputLayer, settings: DistilSettings) -> DistilledHead:
    """Fit one head. The result is deterministic on one machine.

    Raises InstructionError when the instruction changes nothing.
    """
    rows_VD = output.rows()
    train_N, validation_N = texts.tokens_of("train"), texts.tokens_of("validation")
    train, validation = (_Sums.of(texts, tokens_N, output, rows_VD) for tokens_N in (train_N, validation_N))
    if not train.divergence > _MIN_DIVERGENCE:
        raise InstructionError(
            "instruction: it does not change what this model says "
            f"(KL divergence {train.divergence:.1e} nats a token); nothing to learn"
        )
    dampings = _DAMPINGS if settings.damping is None else (settings.damping,)
    directions = [(damping, train.direction(damping)) for damping in dampings]
    damping, shift_D = max(directions, key=lambda direction: validation.explained(direction[1]))
    shift_D = shift_D * (UNIT_COST_NATS / train.cost(shift_D)) ** 0.5

    head, value_figures = _value_head(texts, train, validation, settings)
    head = head.with_ascent((shift_D.cpu() / head.scale_D)[None])
    mean_length = len(texts.token_ids_N) / len(texts.split)
    gained = float(validation.slope_D @ shift_D) / (mean_length * head.reward_scale)
    return DistilledHead(
        head,
        validation={
            "ascent_gain": round(gained / max(validation.cost(shift_D), 1e-12) ** 0.5, 4),
            **value_figures,
            "damping": damping,
            "num_train_tokens": len(train_N),
            "num_validation_tokens": len(validation_N),
        },
        distillation=_nearness(texts, output, rows_VD @ shift_D),
    )


def _value_head(
    texts: InstructedTexts, train: _Sums, validation: _Sums, settings: DistilSettings
) -> tuple[ValueHead, dict[str, Any]]:
    """The head without its way uphill, and what its value explains of validation texts."""
    train_N, validation_N = texts.tokens_of("train"), texts.tokens_of("validation")
    reward_B = _mean_by_text(texts, [(train_N, train), (validation_N, validation)])
    is_train_B = torch.tensor([name == "train" for name in texts.split])
    mean, scale = float(reward_B[is_train_B].mean()), float(reward_B[is_train_B].std())
    target_N = ((reward_B - mean) / scale)[texts.text_of_tokens()]
    sums = MomentSums()
    for chunk in torch.split(train_N, max(_CHUNK_NUMBERS // texts.bare_ND.shape[1], 1)):
        sums.add(texts.bare_ND[chunk].float(), target_N[chunk])
    moments = sums.moments()
    truth_N = target_N[validation_N]
    variance = max(float(truth_N.var(correction=0)), 1e-12)
    fits: list[tuple[float, float, ValueHead]] = []
    for ridge in _RIDGES if settings.ridge is None else (settings.ridge,):
        linear_D = moments.ridge(ridge)
        head = LinearHead(
            mean_D=moments.mean_D,
            scale_D=moments.scale_D,
            inputs_UD=linear_D[None],
            input_bias_U=torch.zeros(1),
            reward_mean=mean,
            reward_scale=scale,
        )
        error_N = truth_N - head.readout(head.units(texts.bare_ND[validation_N]))[0]
        fits.append((1 - float(error_N.square().mean()) / variance, ridge, head))
    r2, ridge, head = max(fits, key=lambda fit: fit[0])
    return head, {"r2": {"all": r2}, "ridge": ridge}


@dataclass(slots=True, frozen=True)
class _Sums:
    """Expectations over the tokens of a split."""

    fisher_DD: Tensor
    gain_D: Tensor
    slope_D: Tensor
    """Of the expected log(q / r) of the next token by the shift, at none."""
    log_ratio_N: Tensor
    """log(q / r) of each token that was drawn."""
    divergence: float
    """KL(q || r) a token, in nats."""

    @classmethod
    def of(cls, texts: InstructedTexts, tokens_N: Tensor, output: OutputLayer, rows_VD: Tensor) -> _Sums:
        """W^T is applied to sums over tokens wherever that will do: only p W is needed for each token."""
        weight_V, moved_V, sloped_V = (torch.zeros(len(rows_VD), device=rows_VD.device) for _ in range(3))
        second_DD = torch.zeros(rows_VD.shape[1], rows_VD.shape[1], device=rows_VD.device)
        log_ratios: list[Tensor] = []
        divergence = 0.0
        for chunk in torch.split(tokens_N, max(_CHUNK_NUMBERS // len(rows_VD), 1)):
            logits_MV, q_MV, r_MV = (
                output.finish(output.project(states_ND[chunk].to(rows_VD.device)))
                for states_ND in (texts.bare_ND, texts.instructed_ND, texts.contrasted_ND)
            )
            log_q_MV, log_r_MV, p_MV = q_MV.log_softmax(dim=-1), r_MV.log_softmax(dim=-1), logits_MV.softmax(dim=-1)
            moves_MV = log_q_MV.exp()
            ratio_MV = log_q_MV - log_r_MV
            divergence += float((moves_MV * ratio_MV).sum())
            moves_MV -= log_r_MV.exp()
            token_ids_M1 = texts.token_ids_N[chunk, None].to(ratio_MV.device)
            log_ratios.append(ratio_MV.gather(1, token_ids_M1)[:, 0].cpu())
            ratio_MV -= (p_MV * ratio_MV).sum(dim=-1, keepdim=True)
            ratio_MV *= p_MV
            slopes_MV = output.slopes(logits_MV)
            mean_MD = (p_MV if slopes_MV is None else p_MV * slopes_MV) @ rows_VD
            second_DD += mean_MD.T @ mean_MD
            weight_V += (p_MV if slopes_MV is None else p_MV * slopes_MV.square()).sum(0)
            moved_V += (moves_MV if slopes_MV is None else moves_MV * slopes_MV).sum(0)
            sloped_V += (ratio_MV if slopes_MV is None else ratio_MV * slopes_MV).sum(0)
        count = len(tokens_N)
        return cls(
            fisher_DD=((rows_VD * weight_V[:, None]).T @ rows_VD - second_DD) / count,
            gain_D=moved_V @ rows_VD / count,
            slope_D=sloped_V @ rows_VD / count,
            log_ratio_N=torch.cat(log_ratios),
            divergence=divergence / count,
        )

    def direction(self, damping: float) -> Tensor:
        """(F + damping * mean eigenvalue * I)^-1 g, [D]."""
        eye_DD = torch.eye(len(self.gain_D), device=self.gain_D.device)
        return solve(self.fisher_DD + damping * self.fisher_DD.diagonal().mean() * eye_DD, self.gain_D)

    def cost(self, shift_D: Tensor) -> float:
        """KL(p_u || p) of a shift, to second order."""
        return 0.5 * float(shift_D @ self.fisher_DD @ shift_D)

    def explained(self, shift_D: Tensor) -> float:
        """Nats a token that the best multiple of a shift comes nearer, to second order; negative for a wrong way."""
        gain = float(self.gain_D @ shift_D)
        return gain * abs(gain) / max(4 * self.cost(shift_D), 1e-12)


def _mean_by_text(texts: InstructedTexts, parts: Sequence[tuple[Tensor, _Sums]]) -> Tensor:
    """Mean log-ratio [B] of each text's tokens; zero for texts of other splits."""
    log_ratio_N = torch.zeros(len(texts.token_ids_N))
    for tokens_N, sums in parts:
        log_ratio_N[tokens_N] = sums.log_ratio_N
    total_B = torch.zeros(len(texts.split)).index_add_(0, texts.text_of_tokens(), log_ratio_N)
    return total_B / (texts.offsets[1:] - texts.offsets[:-1])


def _nearness(texts: InstructedTexts, output: OutputLayer, change_V: Tensor) -> dict[str, Any]:
    """How near two lengths of a shift come to the instruction on test prompts: see `HeadCard.distillation`.

    `change_V` is what a shift of length 1 adds to the projected states.
    """
    tokens_N = texts.tokens_of("test")

    def at(length: float) -> dict[str, float]:
        return {"length": length, **_divergences(texts, tokens_N, output, change_V, length)}

    before = at(0.0)
    price = max(before["to_instructed"], _MIN_DIVERGENCE)
    # The cost is nearly the square of the length, so a few corrections find where it is the instruction's own.
    equal = at((price / UNIT_COST_NATS) ** 0.5)
    for _ in range(_CORRECTIONS):
        equal = at(equal["length"] * (price / max(equal["paid"], _MIN_DIVERGENCE)) ** 0.5)
    half = at(equal["length"] / 2)
    nearest = at(_vertex(half["length"], *(part["to_instructed"] for part in (before, half, equal))))
    figures = {"bare": before, "nearest": nearest, "at_equal_kl": equal}
    gap, way = before["to_instructed"], before["leaning_of_instructed"] - before["leaning"]
    for part in (nearest, equal):
        part["share_closed"] = _share(gap - part["to_instructed"], gap)
        part["share_of_leaning"] = _share(part["leaning"] - before["leaning"], way)
    rounded = {name: {key: round(value, 4) for key, value in part.items()} for name, part in figures.items()}
    return {"prompts": texts.num_prompts["test"], "tokens": len(tokens_N), **rounded}


def _share(part: float, whole: float) -> float:
    """Zero of a whole that is nothing, as when the instruction is the template's own default."""
    return part / whole if whole > _MIN_DIVERGENCE else 0.0


def _vertex(half: float, at_0: float, at_half: float, at_end: float) -> float:
    """Where on [0, 2 half] the parabola through three values is lowest."""
    curvature = at_0 - 2 * at_half + at_end
    slope = 4 * at_half - 3 * at_0 - at_end
    if curvature <= 0:
        return 0.0 if at_0 <= at_end else 2 * half
    return min(max(-slope / (2 * curvature), 0.0), 2.0) * half


def _divergences(
    texts: InstructedTexts, tokens_N: Tensor, output: OutputLayer, change_V: Tensor, length: float
) -> dict[str, float]:
    """Of the shifted model, in nats a token: KL from the bare one (`paid`), and of the two others from it.

    `leaning` is E[log(q / r)] under the shifted model: how much likelier its tokens are after the instruction. Under
    the instructed model itself that is KL(q || r).
    """
    total = dict.fromkeys(["paid", "to_instructed", "to_contrasted", "leaning", "leaning_of_instructed"], 0.0)
    for chunk in torch.split(tokens_N, max(_CHUNK_NUMBERS // len(change_V), 1)):
        projected_MV = output.project(texts.bare_ND[chunk].to(change_V.device))
        log_p_MV = output.finish(projected_MV).log_softmax(dim=-1)
        shifted_MV = output.finish(projected_MV + length * change_V).log_softmax(dim=-1)
        log_q_MV, log_r_MV = (
            output.finish(output.project(states_ND[chunk].to(change_V.device))).log_softmax(dim=-1)
            for states_ND in (texts.instructed_ND, texts.contrasted_ND)
        )
        total["paid"] += _kl(shifted_MV, log_p_MV)
        total["to_instructed"] += _kl(log_q_MV, shifted_MV)
        total["to_contrasted"] += _kl(log_r_MV, shifted_MV)
        total["leaning"] += float((shifted_MV.exp() * (log_q_MV - log_r_MV)).sum())
        total["leaning_of_instructed"] += _kl(log_q_MV, log_r_MV)
    return {name: nats / len(tokens_N) for name, nats in total.items()}


def _kl(log_a_MV: Tensor, log_b_MV: Tensor) -> float:
    """The sum over rows of KL(a || b)."""
    return float((log_a_MV.exp() * (log_a_MV - log_b_MV)).sum())
