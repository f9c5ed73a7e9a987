"""The heads a server offers: loaded from a folder or a store, checked against the model, stacked for the editor.

A head computes with states of its own size, so the hidden size must be the model's. Another vocabulary or architecture,
or other weights, keep nothing from being computed, and KL is always that of the model that is served; but what a head
has learnt, and what its card tells, is of the model that it was made for. So such a head is refused unless whoever runs
the server has allowed it: one rule in one set of words, at start, over management, in every worker (`base_warning`).

A stack is a set of heads seen as one: their first layers under each other with the normalisation folded in, and the
Gram matrix between all their ascent and input rows, so that one matrix product a step serves every head of the set.
Knows nothing of requests or rows. Enter at `HeadRegistry.load`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.errors import ConfigurationError, HeadMismatchError, UnknownHeadError
from server.kernels.linear import FrozenLinear, frozen_linear
from value_models.calibration import RewardLevels
from value_models.errors import HeadFileError
from value_models.head_folder import open_heads
from value_models.heads import LinearHead, ValueHead
from value_models.linear import PackedLinear
from value_models.store import HeadCard

_log = logging.getLogger(__name__)
# Callers choose the sets of heads, so what is kept for them is bounded.
MAX_STACKS = 64
_MAX_STACKS_BYTES = 2**30
_LEAST_LENGTH = 1e-9


@dataclass(frozen=True, eq=False)
class HeadStack:
    """K heads seen as one. A stack is equal to itself alone. What an ascent needs, and a reading does not, is made when
    it is first asked for.

    Shapes: U units of all heads together; `spans` are each head's units in that order.
    """

    names: tuple[str, ...]
    heads: tuple[ValueHead, ...]
    spans: tuple[slice, ...]
    inputs_UD: Tensor
    input_bias_U: Tensor
    inputs: FrozenLinear
    """It maps h [R, D] to z [R, U] by the two above."""
    reward_mean_K: Tensor
    reward_scale_K: Tensor
    earned: tuple[float, ...] | None
    """What each head's own ascent of length one adds to a response (`HeadCard.earned`); None unless all are known."""
    earned_K: Tensor | None
    """`earned`, as a tensor."""

    @cached_property
    def ascent(self) -> FrozenLinear:
        """It maps c [R, U] to the change of h [R, D] by a step of size one."""
        return frozen_linear(self.ascent_UD.T)

    @cached_property
    def gram(self) -> FrozenLinear:
        """It maps c [R, U] to the change of z [R, U] by a step of size one."""
        moved_UD = self.inputs_UD * torch.cat([head.moved_units() for head in self.heads])[:, None]
        return frozen_linear(moved_UD @ self.ascent_UD.T)

    @cached_property
    def ascent_gram(self) -> FrozenLinear:
        """It maps c [R, U] to the inner products [R, U] of such a step with the ascent rows."""
        return frozen_linear(self.ascent_UD @ self.ascent_UD.T)

    @property
    def ascent_UD(self) -> Tensor:
        """The heads' ascent rows, of states as the model has them."""
        return torch.cat([head.folded_ascent() for head in self.heads])

    @property
    def num_bytes(self) -> int:
        """About what it takes: rows of inputs and ascents, and the two Gram matrices."""
        num_units, hidden_size = self.inputs_UD.shape
        return 4 * num_units * (3 * hidden_size + 2 * num_units)

    @property
    def is_linear(self) -> bool:
        """Whether every head is linear, so that its ascent is the same in every state."""
        return all(isinstance(head, LinearHead) for head in self.heads)

    @property
    def is_straight(self) -> bool:
        """Whether no head's coefficients change along an ascent, so that n steps are one of n times the size. Such
        heads have few units."""
        return all(head.is_straight for head in self.heads)

    def readout(self, units_RU: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Standardised values [R, K], and each head's own coefficients over its units, K tensors [R, U_k]."""
        if not self.heads:
            return units_RU, []
        parts = [head.readout(units_RU[:, span]) for head, span in zip(self.heads, self.spans, strict=True)]
        return torch.stack([value_R for value_R, _ in parts], dim=1), [slope for _, slope in parts]

    def effects(self, slopes: Sequence[Tensor]) -> Tensor:
        """How a step of length one along each head's ascent moves every value: of value l along head k, [R, K, K].

        `slopes` are the heads' own, as `readout` gives them.
        """
        return self._between(self.gram, slopes)

    def earnings(self, slopes: Sequence[Tensor]) -> Tensor | None:
        """What a step of length one along each head's ascent, at every token of a response, adds to every reward: to
        that of head l by ascent k, [R, K, K], in standard deviations. None where a head's card does not tell.

        An ascent is the way that makes the most of its head's advantages, so another one makes the cosine between the
        two of it. A value cannot say this: as a prediction of what the base model would do it moves by a small part of
        what the text's reward does, and by how small a part differs between heads.
        """
        if self.earned_K is None:
            return None
        inner_RKK = self.inner_products(slopes)
        length_RK = inner_RKK.diagonal(dim1=1, dim2=2).sqrt().clamp(min=_LEAST_LENGTH)
        return inner_RKK / length_RK[:, :, None] / length_RK[:, None, :] * self.earned_K

    def inner_products(self, slopes: Sequence[Tensor]) -> Tensor:
        """Of every two heads' ascents of length one, [R, K, K]: what ascent k makes of head l's advantages."""
        return self._between(self.ascent_gram, slopes)

    def rewards(self, standardised_RK: Tensor) -> Tensor:
        """Standardised values in reward units, [R, K]."""
        if not self.heads:
            return standardised_RK
        return self.reward_mean_K + self.reward_scale_K * standardised_RK

    def _between(self, gram: FrozenLinear, slopes: Sequence[Tensor]) -> Tensor:
        """Each head's slopes with every head's, by a Gram matrix of their units: [R, K, K]."""
        num_rows, num_heads = slopes[0].shape[0], len(self.heads)
        steps_RKU = slopes[0].new_zeros(num_rows, num_heads, self.spans[-1].stop)
        for k, span in enumerate(self.spans):
            steps_RKU[:, k, span] = slopes[k]
        moved_RKU = gram(steps_RKU)
        changes = [(moved_RKU[:, :, span] * slopes[k][:, None]).sum(dim=-1) for k, span in enumerate(self.spans)]
        return torch.stack(changes, dim=2)


class HeadRegistry:
    """Read only after loading; stacks are made on first use and kept."""

    def __init__(
        self,
        heads: Mapping[str, ValueHead],
        cards: Mapping[str, HeadCard] | None = None,
        warnings: Mapping[str, str] | None = None,
    ) -> None:
        """`warnings` holds those of heads that were made for another model, as `base_warning` words them."""
        self._heads = dict(sorted(heads.items()))
        self._cards = dict(cards or {})
        self._warnings = dict(warnings or {})
        self._stacks: dict[tuple[str, ...], HeadStack] = {}
        for head in self._heads.values():
            head.map_with(frozen_linear)

    @classmethod
    def load(
        cls,
        location: str | Path,
        base_model: dict[str, Any],
        *,
        device: torch.device | str = "cpu",
        skip_mismatched: bool = False,
        allow_other_base: bool = False,
    ) -> HeadRegistry:
        """Load every head of a folder, or of a store by its URL.

        One made for another model is loaded with a warning where that is allowed and possible. Else it raises
        HeadMismatchError, or is left out with a warning if told so; then there need not be a folder either. What cannot
        be read raises ConfigurationError.
        """
        if skip_mismatched and not Path(location).is_dir():
            if allow_other_base:
                _log.warning("allow_other_base: no heads are shipped for %r; name a heads_dir", base_model["name"])
            return cls({})
        heads: dict[str, ValueHead] = {}
        cards: dict[str, HeadCard] = {}
        warnings: dict[str, str] = {}
        try:
            folder = open_heads(location)
            names = folder.names()
        except HeadFileError as error:
            raise ConfigurationError(f"heads_dir: {error}") from error
        for name in names:
            try:
                head, card = folder.load(name, device=device)
            except HeadFileError as error:
                raise HeadMismatchError(f"heads_dir: {error}") from error
            try:
                warning = base_warning(card, base_model, location, allow_other_base=allow_other_base)
            except HeadMismatchError as error:
                if not skip_mismatched:
                    raise
                _log.warning("%s", error.message)
                continue
            heads[name], cards[name] = head, card
            if warning is not None:
                warnings[name] = warning
                _log.warning("%s", warning)
        _log.info("Loaded %d value heads from %s: %s", len(heads), location, ", ".join(heads) or "none")
        return cls(heads, cards, warnings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._heads)

    def cards(self) -> dict[str, HeadCard]:
        return dict(self._cards)

    def calibrations(self) -> dict[str, RewardLevels]:
        """What reward each level of a value gives, by name, of the heads whose cards tell."""
        return {name: card.calibration for name, card in self._cards.items() if card.calibration is not None}

    def warnings(self) -> dict[str, str]:
        """The warnings, by name, about heads that were made for another model."""
        return dict(self._warnings)

    def with_head(self, name: str, head: ValueHead) -> HeadRegistry:
        """A registry with one head more, which has no card."""
        return HeadRegistry({**self._heads, name: head}, self._cards, self._warnings)

    def head(self, name: str) -> ValueHead:
        """The head of that name. Raises UnknownHeadError."""
        self.check([name])
        return self._heads[name]

    def check(self, names: Sequence[str], *, param: str = "control.objective.weights") -> None:
        """Refuse names that there is no head of. Raises UnknownHeadError, which names the field and lists the heads."""
        for name in names:
            if name not in self._heads:
                raise UnknownHeadError(name, self._heads, param=param)

    def stack(self, names: tuple[str, ...]) -> HeadStack:
        """The named heads as one, in the order given; of no names a stack whose maps nobody calls.

        Raises UnknownHeadError.
        """
        if names not in self._stacks:
            self.check(names)
            heads = tuple(self._heads[name] for name in names)
            made = _stack(names, heads, self.earned(names))
            while self._stacks and (
                len(self._stacks) >= MAX_STACKS
                or sum(stack.num_bytes for stack in self._stacks.values()) + made.num_bytes > _MAX_STACKS_BYTES
            ):
                del self._stacks[next(iter(self._stacks))]
            self._stacks[names] = made
        return self._stacks[names]

    def earned(self, names: Sequence[str]) -> list[float] | None:
        """What each head's ascent adds to a response (`HeadCard.earned`); None unless all cards tell."""
        figures = [self._cards[name].earned if name in self._cards else None for name in names]
        known = [figure for figure in figures if figure is not None]
        return known if len(known) == len(figures) else None


def base_warning(
    card: HeadCard, identity: Mapping[str, Any], location: str | Path, *, allow_other_base: bool
) -> str | None:
    """What users of the head must know when it was made for another model than the one with this identity.

    None when it was made for this one. Raises HeadMismatchError, which says what differs and what to do, when the head
    cannot be served, or is not allowed to be.
    """
    differences = card.base_model.differences(identity)
    if not differences:
        return None
    told = "; ".join(differences)
    refusal = (
        f"The value head {card.name!r} in {location} was not made for the model {identity.get('name')!r}: {told}. "
        "Train it for this model (`recontrol rollouts`, `recontrol train`), or serve from another --heads-dir"
    )
    if card.base_model.hidden_size != identity.get("hidden_size"):
        raise HeadMismatchError(f"{refusal}; states of another size cannot be read, whatever is allowed.")
    if not allow_other_base:
        raise HeadMismatchError(f"{refusal}, or serve it all the same with --allow-other-base.")
    return (
        f"The value head {card.name!r} was made for the model {card.base_model.name!r}, not for the "
        f"{identity.get('name')!r} that is served: {told}. Its values and its card's figures may not hold here, nor "
        "targets, floors, gates and bounds by them; budgets of KL do."
    )


def _stack(names: tuple[str, ...], heads: tuple[ValueHead, ...], earned: list[float] | None) -> HeadStack:
    if not heads:
        none = torch.empty(0)
        no_map = PackedLinear(torch.empty(0, 0))
        return HeadStack((), (), (), torch.empty(0, 0), none, no_map, none, none, earned=None, earned_K=None)
    folded = [head.folded_inputs() for head in heads]
    inputs_UD = torch.cat([weight for weight, _ in folded])
    bias_U = torch.cat([bias for _, bias in folded])
    ends = itertools.accumulate(head.num_units for head in heads)
    return HeadStack(
        names=names,
        heads=heads,
        spans=tuple(slice(end - head.num_units, end) for end, head in zip(ends, heads, strict=True)),
        inputs_UD=inputs_UD.float().contiguous(),
        input_bias_U=bias_U.float().contiguous(),
        inputs=frozen_linear(inputs_UD, bias_U),
        reward_mean_K=torch.stack([head.reward[0] for head in heads]),
        reward_scale_K=torch.stack([head.reward[1] for head in heads]),
        earned=None if earned is None else tuple(earned),
        earned_K=None if earned is None else torch.tensor(earned, device=inputs_UD.device),
    )
