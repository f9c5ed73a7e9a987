"""The hidden layers of a head: a small network that learns, in minibatches, what the linear part has left.

Minibatches are drawn from windows of the stream, each of which is in memory and shuffled as a whole. A run that fits
into one window is shuffled token by token; of a longer one the files come in an order of their own in every epoch, and
windows hold tokens of all sources in proportion. Knows nothing of files or of ways uphill. Enter at `Network` and
`fit`.

Shapes: N tokens, M of a minibatch, D hidden size.
"""

# torch leaves types out of `Tensor.backward` and an optimiser's `step`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from value_models.errors import TrainingDataError
from value_models.heads import MLPHead
from value_models.moments import Moments
from value_models.sources import FitSource, token_weights
from value_models.token_blocks import TokenBlock

WINDOW_NUMBERS = 1 << 27
"""Of states in a window, in the dtype that they are kept in: 256 MiB of bfloat16."""
_log = logging.getLogger(__name__)


class FitSettings(Protocol):
    """The part of `TrainSettings` that is about hidden layers."""

    @property
    def effective_trace(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_epochs(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Network(nn.Module):
    """The trainable twin of `MLPHead`."""

    def __init__(self, linear_D: Tensor | None, hidden_size: int, hidden_widths: tuple[int, ...]) -> None:
        """It starts as the linear part alone, where there is one."""
        super().__init__()
        self.linear_D = nn.Parameter(
            torch.zeros(hidden_size) if linear_D is None else linear_D.clone(), requires_grad=linear_D is not None
        )
        sizes = [hidden_size, *hidden_widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1)
        nn.init.zeros_(self.out.bias)
        if linear_D is not None:
            nn.init.zeros_(self.out.weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        active = x_ND
        for layer in self.layers:
            active = functional.relu(layer(active))
        return x_ND @ self.linear_D + self.out(active)[:, 0]

    def head(self, moments: Moments, mean: float, scale: float) -> MLPHead:
        first: Any = self.layers[0]
        later: list[Any] = list(self.layers[1:])
        return MLPHead(
            mean_D=moments.mean_D,
            scale_D=moments.scale_D,
            inputs_UD=torch.cat([self.linear_D[None], first.weight]).detach(),
            input_bias_U=torch.cat([torch.zeros_like(first.bias[:1]), first.bias]).detach(),
            reward_mean=mean,
            reward_scale=scale,
            hidden_weights=[layer.weight.detach() for layer in later],
            hidden_biases=[layer.bias.detach() for layer in later],
            out_weight_H=self.out.weight.detach()[0],
            out_bias=self.out.bias.detach()[0],
        )


@dataclass(slots=True)
class _Window:
    """Tokens of whole responses, in memory on the CPU."""

    states_ND: Tensor
    target_N: Tensor
    """The reward of a token's response, or its lambda-return."""
    weight_N: Tensor
    is_last_N: Tensor
    """Whether a token is its response's last."""


def fit(network: Network, sources: Sequence[FitSource], moments: Moments, settings: FitSettings) -> None:
    """Minimise the squared error with early stopping; leaves the best weights in the network.

    Raises TrainingDataError when the error is not finite.
    """
    decayed = [p for name, p in network.named_parameters() if name.endswith("weight")]
    others = [p for name, p in network.named_parameters() if not name.endswith("weight")]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    best_loss, best_state, waited = float("inf"), {}, 0
    for epoch in range(settings.max_epochs + 1):
        # Validation is always against the reward itself, so that target types can be compared; first the linear part's.
        validation_loss = _validation_loss(network, sources, moments)
        if not math.isfinite(validation_loss):
            raise TrainingDataError(f"hidden layers: after {epoch} epochs the validation loss is not finite")
        _log.info("after %d epochs: validation loss %.4f", epoch, validation_loss)
        if validation_loss < best_loss:
            best_loss, waited = validation_loss, 0
            best_state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        else:
            waited += 1
        if waited >= settings.patience or epoch == settings.max_epochs:
            break
        for window in _windows(network, sources, moments, settings, epoch):
            for batch in torch.split(torch.randperm(len(window.target_N)), settings.batch_size):
                states_MD, target_M = _minibatch(network, window, batch, moments, settings.effective_trace)
                error_M = network(states_MD) - target_M
                loss = (window.weight_N[batch].to(error_M.device) * error_M.square()).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    network.load_state_dict(best_state)


def _minibatch(
    network: Network, window: _Window, batch: Tensor, moments: Moments, trace: float
) -> tuple[Tensor, Tensor]:
    """Normalised states [M, D] and detached targets [M].

    Lambda-returns take the network's values at the epoch's start; one-step targets take them as it learns, since a
    value that moves back one token an epoch would never reach the first.
    """
    device = moments.mean_D.device
    states_MD = moments.normalise(window.states_ND[batch].to(device))
    target_M = window.target_N[batch].to(device)
    if trace == 0.0:
        following = (batch + 1).clamp(max=len(window.target_N) - 1)
        with torch.no_grad():
            next_M = network(moments.normalise(window.states_ND[following].to(device)))
        target_M = torch.where(window.is_last_N[batch].to(device), target_M, next_M)
    return states_MD, target_M


def _windows(
    network: Network, sources: Sequence[FitSource], moments: Moments, settings: FitSettings, epoch: int
) -> Iterator[_Window]:
    """An epoch's training tokens, in windows."""
    limit = max(1, WINDOW_NUMBERS // len(moments.mean_D))
    fits_in_one = sum(source.data.num_tokens("train") for source in sources) <= limit
    order = None if fits_in_one else torch.Generator().manual_seed(settings.seed * 10_007 + epoch)
    weights = token_weights(sources)
    at_start = copy.deepcopy(network) if 0.0 < settings.effective_trace < 1.0 else None
    parts: list[_Window] = []
    for index, block in _interleaved(sources, order):
        standard_B = sources[index].standard_B
        is_last_N = torch.zeros(block.num_tokens, dtype=torch.bool)
        is_last_N[block.last_tokens()] = True
        target_N = block.of_tokens(standard_B)
        if at_start is not None:
            values_N = _values(at_start, block, moments)
            target_N = block.lambda_returns(standard_B, values_N, trace=settings.effective_trace)
        part = _Window(block.stored_states_ND, target_N, torch.full_like(target_N, weights[index]), is_last_N)
        if parts and sum(len(held.target_N) for held in parts) + len(target_N) > limit:
            window, parts = _joined(parts), []
            yield window
        parts.append(part)
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[_Window]) -> _Window:
    return _Window(
        states_ND=torch.cat([part.states_ND for part in parts]),
        target_N=torch.cat([part.target_N for part in parts]),
        weight_N=torch.cat([part.weight_N for part in parts]),
        is_last_N=torch.cat([part.is_last_N for part in parts]),
    )


def _interleaved(sources: Sequence[FitSource], order: torch.Generator | None) -> Iterator[tuple[int, TokenBlock]]:
    """Training blocks with their source's index; each source comes evenly over the whole."""
    streams = [source.data.blocks("train", order=order) for source in sources]
    totals = [source.data.num_tokens("train") for source in sources]
    num_read = [0] * len(sources)
    remaining = set(range(len(sources)))
    while remaining:
        index = min(remaining, key=lambda i: (num_read[i] / totals[i], i))
        block = next(streams[index], None)
        if block is None:
            remaining.remove(index)
            continue
        num_read[index] += block.num_tokens
        yield index, block


def _validation_loss(network: Network, sources: Sequence[FitSource], moments: Moments) -> float:
    """Mean squared error, in which each source counts by its weight."""
    total_weight, loss = sum(source.weight for source in sources), 0.0
    for source in sources:
        squares = 0.0
        for block in source.data.blocks("validation"):
            error_N = _values(network, block, moments) - block.of_tokens(source.standard_B)
            squares += float(error_N.square().sum(dtype=torch.float64))
        loss += source.weight / total_weight * squares / source.data.num_tokens("validation")
    return loss


@torch.no_grad()
def _values(network: Network, block: TokenBlock, moments: Moments) -> Tensor:
    """[N], on the CPU."""
    return network(moments.normalise(block.states_ND)).cpu()
