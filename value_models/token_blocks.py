"""Blocks of tokens: how training reads states and gradients, a bounded piece at a time.

A `TokenSource` gives whole responses, so that what is worked out along a response (returns, advantages) needs one block
alone. A block is as large as BLOCK_NUMBERS allows, whatever the number of tokens, and copies its numbers when they are
asked for. Knows nothing of files, rewards or heads. Enter at `TokenSource` and `blocks_of`; `HeldTokens` are in memory.

Shapes: N tokens of a block's responses one after the other, B responses of a source, D hidden size.
"""

# torch leaves types out of `Tensor.tolist`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from value_models.targets import lambda_returns, terminal_rewards

BLOCK_NUMBERS = 1 << 24
"""Of states in one block: 64 MiB of them in float32. A response that is longer by itself is a block of its own."""


@dataclass(slots=True, frozen=True)
class TokenBlock:
    """Some whole responses. Its tensors are float32 on the device of training, made anew whenever they are read."""

    tensors: Mapping[str, Tensor]
    """`states_ND`, `logp_grads_ND`, of texts that the model did not write `sampled_grads_ND`, where the text so far was
    scored `prefix_rewards_N`; of more tokens than the block's, perhaps in a file."""
    spans: Sequence[tuple[int, int]]
    """Where the block's tokens are in them."""
    responses: Tensor
    """Indices of the responses in their source, [number of responses]."""
    lengths: Tensor
    """Tokens of each."""
    device: str = "cpu"

    @property
    def num_tokens(self) -> int:
        return sum(end - first for first, end in self.spans)

    @property
    def stored_states_ND(self) -> Tensor:
        """The states in the dtype and on the device that they are kept in."""
        return self._rows("states_ND")

    @property
    def states_ND(self) -> Tensor:
        return self._numbers("states_ND")

    @property
    def token_ids_N(self) -> Tensor:
        """The tokens, int64, of runs alone: texts in memory have none."""
        return self._rows("token_ids_N")

    @property
    def logp_grads_ND(self) -> Tensor:
        """Gradient of each token's log-probability by its state; see `value_models.rollouts.Rollout`."""
        return self._numbers("logp_grads_ND")

    @property
    def cost_grads_ND(self) -> Tensor:
        """Gradients whose second moment is the Fisher information: those of tokens that the model itself draws."""
        return self._numbers("sampled_grads_ND" if "sampled_grads_ND" in self.tensors else "logp_grads_ND")

    @property
    def prefix_rewards_N(self) -> Tensor:
        """The reward of the text before each token, NaN where there is none; see prefix_rewards.py."""
        return self._numbers("prefix_rewards_N")

    def of_tokens(self, value_B: Tensor) -> Tensor:
        """A number of each token's response, [N], of numbers for all of the source's responses."""
        return value_B[self.responses].repeat_interleave(self.lengths)

    def position_of_tokens(self) -> Tensor:
        """Each token's place in its response, [N]."""
        ends = self.lengths.cumsum(0)
        return torch.arange(int(ends[-1])) - (ends - self.lengths).repeat_interleave(self.lengths)

    def last_tokens(self) -> Tensor:
        """Index in the block of each response's last token."""
        return self.lengths.cumsum(0) - 1

    def lambda_returns(self, reward_B: Tensor, values_N: Tensor, *, trace: float) -> Tensor:
        """The lambda-returns [N] of each response's terminal reward and its tokens' values; see targets.py."""
        rows_N = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        position_N = self.position_of_tokens()
        shape = (len(self.lengths), int(self.lengths.max()))
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        mask_BT[rows_N, position_N] = True
        values_BT = torch.zeros(shape)
        values_BT[rows_N, position_N] = values_N
        rewards_BT = terminal_rewards(reward_B[self.responses], mask_BT)
        return lambda_returns(rewards_BT, values_BT, mask_BT, trace=trace)[rows_N, position_N]

    def _numbers(self, name: str) -> Tensor:
        return self._rows(name).to(self.device).float()

    def _rows(self, name: str) -> Tensor:
        parts = [self.tensors[name][first:end] for first, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TokenSource(Protocol):
    """Where the states and gradients of some responses are."""

    def blocks(self, is_wanted_B: Tensor, *, device: str, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        """The responses that are wanted, in order, or from files in an order that `order` draws."""
        ...


@dataclass(slots=True)
class HeldTokens:
    """Tokens that are all in memory; response i has those from offsets[i] to offsets[i + 1]."""

    states_ND: Tensor
    logp_grads_ND: Tensor
    offsets: Tensor
    sampled_grads_ND: Tensor | None = None
    prefix_rewards_N: Tensor | None = None

    def blocks(self, is_wanted_B: Tensor, *, device: str, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        del order
        tensors = {"states_ND": self.states_ND, "logp_grads_ND": self.logp_grads_ND}
        if self.sampled_grads_ND is not None:
            tensors["sampled_grads_ND"] = self.sampled_grads_ND
        if self.prefix_rewards_N is not None:
            tensors["prefix_rewards_N"] = self.prefix_rewards_N
        return blocks_of(tensors, self.offsets, is_wanted_B, device=device)


def blocks_of(
    tensors: Mapping[str, Tensor], offsets: Tensor, is_wanted_B: Tensor, *, device: str, first_response: int = 0
) -> Iterator[TokenBlock]:
    """Blocks of the wanted ones of the responses that tensors hold; `first_response` is the first one's index.

    `is_wanted_B` is of these responses alone, and `offsets` are one more than they.
    """
    limit = max(1, BLOCK_NUMBERS // tensors["states_ND"].shape[1])
    wanted = cast("list[int]", is_wanted_B.nonzero()[:, 0].tolist())
    bounds = cast("list[int]", offsets.tolist())
    for group in _groups(wanted, bounds, limit):
        spans: list[tuple[int, int]] = []
        for response in group:
            first, end = bounds[response], bounds[response + 1]
            if spans and spans[-1][1] == first:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((first, end))
        yield TokenBlock(
            tensors=tensors,
            spans=spans,
            responses=torch.tensor(group) + first_response,
            lengths=torch.tensor([bounds[response + 1] - bounds[response] for response in group]),
            device=device,
        )


def _groups(wanted: Sequence[int], bounds: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Responses that fit together into so many tokens."""
    num_tokens, group = 0, list[int]()
    for response in wanted:
        length = bounds[response + 1] - bounds[response]
        if group and num_tokens + length > limit:
            yield group
            num_tokens, group = 0, []
        group.append(response)
        num_tokens += length
    if group:
        yield group


def are_ordered(offsets: Sequence[int]) -> bool:
    """Whether offsets begin at none and every response has a token."""
    return bool(offsets) and offsets[0] == 0 and all(first < end for first, end in itertools.pairwise(offsets))
