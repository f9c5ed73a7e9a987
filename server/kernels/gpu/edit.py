"""The kernels of an edit on a GPU for tensors: tables, buffers and launches, without waiting for the device.

Five launches edit any number of rows: `ascend`, `measure`, `probe` twice, and `move`. Five more, `weigh` three times
and `seek` twice, are for rows over pinned control, if there are any. Under a soft cap `seek_alone`, twice, stands in
place of `measure` and `probe`. Which programs run depends on shapes alone, and buffers are kept while shapes last, so a
CUDA graph may record them; what changes from token to token is in the table of rows, which whoever records must keep at
its address. Under Triton's interpreter, and on tensors without values, the same runs without a GPU: the latter only
counts, and needs no Triton. Enter at `EditKernels`.

Shapes: B rows of a step, R edited rows, Q of them over pinned control, K heads of a row, U units, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels.gpu import layout
from server.kernels.gpu.layout import (
    MAX_SPLITS,
    MEASURED_WIDTH,
    NUM_ROUNDS,
    NUM_SOUGHT,
    NUM_WEIGHED,
    PROBED_WIDTH,
    SOUGHT_WIDTH,
    WEIGHED_WIDTH,
)

# Two for each of the 132 multiprocessors of an H100, twice.
_PROGRAMS = 528
_HIDDEN_TILE = 512
# Numbers of a tile times scales are what a program holds at once.
_MEASURED_TILE, _PROBED_TILE, _MOVED_TILE, _WEIGHED_TILE, _SOUGHT_TILE = 1024, 512, 1024, 512, 128
_AIMS = (1.1, 1.03, 1.005, 0.99, 0.975, 0.95, 0.9, 0.8, 0.6, 0.3, *(0.0,) * 6)
"""Of the limit, the divergences that scales are guessed for: around it, since guesses err to both sides."""
_PLACES = (0.5, 0.25, *(2.0**-power for power in range(4, 20, 2)), *(seventh / 7 for seventh in range(1, 7)))
"""Between the two scales known to be around the limit's, where the curve leads nowhere, and where an aim is 0."""
_SOUGHT = (
    (0.0, *(2.0 ** (-quarters / 4) for quarters in range(31))),
    (0.0, 1.05, 1.02, 1.005, *(0.995 - 0.01 * aim for aim in range(6)), 0.92, 0.87, *(0.0,) * 20),
    (0.0, *(2.0**-power for power in range(5, 16)), *(part / 21 for part in range(1, 21))),
)
"""Scales of the first round that seeks one over pinned control or under a soft cap, and of the second aims and places;
the first of each is the base's."""
_SOUGHT_SIZE = (len(_SOUGHT), layout.SOUGHT_POINTS)
assert all(len(numbers) == layout.SOUGHT_POINTS for numbers in _SOUGHT)
REPORT_WIDTH = 2 * layout.SLOTS + layout.NUM_REPORTED


@dataclass(slots=True, frozen=True)
class Bank:
    """The units of straight heads: rows that read and move a state [U, D], `numbers_3U` as layout.py names them, how
    each ascent row moves every unit and its inner product with every ascent row [U, U], and what it does to the logits
    [U, V]. A head's units lie side by side, its value first.

    All are float32 and contiguous.
    """

    inputs_UD: Tensor
    ascent_UD: Tensor
    numbers_3U: Tensor
    effects_UU: Tensor
    inner_UU: Tensor
    basis_UV: Tensor
    feature_limit: float
    """Within which features count."""


@dataclass(slots=True, frozen=True)
class Codes:
    """What a report calls the reasons that the kernels find: `by_level` of a target, and one more of a floor."""

    by_cap: int
    by_gate: int
    by_level: int
    by_pinned: int
    level_tolerance: float


class EditKernels:
    """The launches, and the buffers that they leave numbers for each other in. Used from one thread."""

    def __init__(self) -> None:
        self.num_launches = 0
        """Since it was made."""
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def edit(
        self,
        hidden_BD: Tensor,
        logits_BV: Tensor,
        table_EW: Tensor,
        places_B: Tensor,
        bank: Bank,
        codes: Codes,
        *,
        num_beside: int,
        soft_cap: tuple[float, float] | None,
    ) -> tuple[Tensor, Tensor]:
        """Edit the rows of a table [R + Q, ROW_WIDTH], whose last Q = `num_beside` entries are what callers add to the
        pinned control of as many rows; `places_B`, int32, holds each row's place in it, or -1. With a `soft_cap` of
        width and height, logits will be height x tanh(logit / width).

        Returns logits [B, V] float32 and a report [R, REPORT_WIDTH]: for a row of K heads, values before [K] and after
        [K], and then as layout.NUM_REPORTED says. Float32 logits are moved in place, bfloat16 ones are widened.
        """
        assert logits_BV.stride(1) == 1
        assert hidden_BD.stride(1) == 1
        num_rows, num_units = len(table_EW) - num_beside, len(bank.inputs_UD)
        state = self._buffer("state", hidden_BD.device, len(table_EW), layout.STATE_WIDTH)
        self._launch(
            "ascend", (num_rows,), hidden_BD, hidden_BD.stride(0), hidden_BD.shape[1], table_EW,
            bank.inputs_UD, bank.ascent_UD, bank.numbers_3U, bank.effects_UU, bank.inner_UU, num_units,
            bank.feature_limit, state, TILE=_HIDDEN_TILE,
        )  # fmt: skip
        edit = (logits_BV, logits_BV.stride(0), logits_BV.shape[1], bank.basis_UV, table_EW, state)
        if soft_cap is None:
            measured, probed, splits = self._search(logits_BV, bank.basis_UV, table_EW[:num_rows], state)
        else:
            measured, splits = self._seek_alone(edit, num_rows, soft_cap)
            probed = measured
        alone = (num_rows, measured, probed, splits[0])
        weighed, sought, beside_splits = self._seek_beside(edit, alone, num_beside, soft_cap)
        is_widened = logits_BV.dtype != torch.float32
        out_BV = torch.empty(logits_BV.shape, device=logits_BV.device) if is_widened else logits_BV
        assert out_BV.is_contiguous()
        report_RN = torch.empty(num_rows, REPORT_WIDTH, device=logits_BV.device)
        self._launch(
            "move", (len(places_B), splits[0]), logits_BV, logits_BV.stride(0), out_BV,
            logits_BV.shape[1], places_B, bank.basis_UV, table_EW, state, num_rows, measured, probed, weighed, sought,
            bank.numbers_3U, num_units, report_RN, *splits, beside_splits, HAS_CAP=soft_cap is not None,
            HAS_BESIDE=num_beside > 0, IS_WIDENED=is_widened, TOLERANCE=codes.level_tolerance, BY_CAP=codes.by_cap,
            BY_GATE=codes.by_gate, BY_LEVEL=codes.by_level, BY_PINNED=codes.by_pinned, REPORTED=REPORT_WIDTH,
            TILE=_MOVED_TILE,
        )  # fmt: skip
        return out_BV, report_RN

    def _seek_alone(
        self, edit: tuple[Any, ...], num_rows: int, soft_cap: tuple[float, float]
    ) -> tuple[Tensor, tuple[int, int]]:
        """What `_search` does, under a soft cap. `edit` is logits, their stride and size, basis, table and state."""
        logits_BV, _, size, *_ = edit
        splits = _splits(num_rows, size)
        sought = self._buffer("sought alone", logits_BV.device, num_rows, NUM_SOUGHT, splits[0], SOUGHT_WIDTH)
        scales = self._scales(logits_BV.device)
        for number in range(NUM_SOUGHT):
            self._launch(
                "seek_alone", (num_rows, splits[0]), *edit, *soft_cap, scales, sought, *splits, HAS_CAP=True,
                ROUND=number, TILE=_SOUGHT_TILE,
            )  # fmt: skip
        return sought, splits

    def _seek_beside(
        self,
        edit: tuple[Any, ...],
        alone: tuple[int, Tensor, Tensor, int],
        num_beside: int,
        soft_cap: tuple[float, float] | None,
    ) -> tuple[Tensor, Tensor, int]:
        """What tells how much callers may add to pinned changes, and in how many parts a row's vocabulary is split for
        it. `alone` is the number of rows, what was found of their own changes, and the parts for that."""
        logits_BV, _, size, _, _, state = edit
        if not num_beside:
            return state, state, 0
        device, splits = logits_BV.device, _splits(num_beside, size)
        weighed = self._buffer("weighed", device, num_beside, NUM_WEIGHED, splits[0], WEIGHED_WIDTH)
        sought = self._buffer("sought", device, num_beside, NUM_SOUGHT, splits[0], SOUGHT_WIDTH)
        shared = (*edit, *(soft_cap or (1.0, 1.0)), *alone, weighed)
        grid, has_cap = (num_beside, splits[0]), soft_cap is not None
        for number in range(NUM_WEIGHED):
            self._launch("weigh", grid, *shared, *splits, HAS_CAP=has_cap, ROUND=number, TILE=_WEIGHED_TILE)
        shared = (*shared, self._scales(device), sought)
        for number in range(NUM_SOUGHT):
            self._launch("seek", grid, *shared, *splits, HAS_CAP=has_cap, ROUND=number, TILE=_SOUGHT_TILE)
        return weighed, sought, splits[0]

    def _scales(self, device: torch.device) -> Tensor:
        return self._buffer("scales", device, *_SOUGHT_SIZE, fill=lambda held: held.copy_(torch.tensor(_SOUGHT)))

    def largest_scales(self, base_RV: Tensor, delta_RV: Tensor, limit_R: Tensor) -> tuple[Tensor, Tensor]:
        """The scale [R] in [0, 1] at which base + scale x delta is within each row's limit, and that divergence [R]."""
        num_rows, device = len(base_RV), base_RV.device
        # Each row is its own only unit.
        table_RW = self._buffer("given table", device, num_rows, layout.ROW_WIDTH, fill=_given_rows)
        state = self._buffer("given state", device, num_rows, layout.STATE_WIDTH, fill=_taken_once)
        table_RW[:, layout.LIMIT] = limit_R
        measured, probed, splits = self._search(base_RV, delta_RV.contiguous(), table_RW, state)
        scale_R, kl_R = torch.empty_like(limit_R), torch.empty_like(limit_R)
        self._launch("settle", (num_rows,), table_RW, measured, probed, scale_R, kl_R, splits[0])
        return scale_R, kl_R

    def _search(
        self, logits_BV: Tensor, basis_UV: Tensor, table_RW: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Divergences at the scales that are tried for each row, and how its vocabulary is split: parts, and the size
        of one."""
        (num_rows, _), (_, size), device = table_RW.shape, logits_BV.shape, logits_BV.device
        splits = _splits(num_rows, size)
        measured = self._buffer("measured", device, num_rows, splits[0], MEASURED_WIDTH)
        probed = self._buffer("probed", device, num_rows, NUM_ROUNDS, splits[0], PROBED_WIDTH)
        shared = (logits_BV, logits_BV.stride(0), size, basis_UV, table_RW, state, measured)
        grid = (num_rows, splits[0])
        self._launch("measure", grid, *shared, *splits, TILE=_MEASURED_TILE)
        aims = self._buffer("aims", device, 2, len(_AIMS), fill=lambda aims: aims.copy_(torch.tensor([_AIMS, _PLACES])))
        for number in range(NUM_ROUNDS):
            self._launch("probe", grid, *shared, aims, probed, *splits, ROUND=number, TILE=_PROBED_TILE)
        return measured, probed, splits

    def _buffer(self, name: str, device: torch.device, *shape: int, fill: Any = None) -> Tensor:
        """Float32 memory of this shape, the same for as long as the shape is the same; filled when it is made."""
        key = (name, device, *shape[1:])
        held = self._buffers.get(key)
        if held is None or len(held) < shape[0]:
            held = torch.empty(shape, device=device)
            if fill is not None:
                fill(held)
            self._buffers[key] = held
        return held[: shape[0]]

    def _launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.num_launches += 1
        if not any(isinstance(argument, Tensor) and argument.is_meta for argument in arguments):
            _kernel(name)[grid](*arguments, **constants)


@functools.cache
def _kernel(name: str) -> Any:
    from server.kernels.gpu import ascent_kernel, beside_kernels, budget_kernels, move_kernel

    modules = (ascent_kernel, budget_kernels, beside_kernels, move_kernel)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def _splits(num_rows: int, size: int) -> tuple[int, int]:
    """Parts of each row's vocabulary and the size of one: as many as fill the device, each of whole tiles."""
    num_tiles = -(-size // _MEASURED_TILE)
    wanted = max(1, min(_PROGRAMS // num_rows, MAX_SPLITS, num_tiles))
    chunk = -(-num_tiles // wanted) * _MEASURED_TILE
    return -(-size // chunk), chunk


def _given_rows(table_RW: Tensor) -> None:
    places_R = torch.arange(len(table_RW), device=table_RW.device, dtype=torch.float32)
    table_RW.zero_()
    table_RW[:, layout.ROW] = table_RW[:, layout.PLACES] = places_R
    table_RW[:, layout.COUNT] = table_RW[:, layout.NUM_UNITS] = 1.0


def _taken_once(state: Tensor) -> None:
    state.zero_()
    state[:, layout.COEFFICIENTS] = 1.0
