"""Rules of rows' logits (logits.py) and masks of their schemas (structure.py) as a GPU's draw has them: tables there.

Tokens with a bias and those of prompts are laid out once for as long as the rows stay the same. How often each token
was drawn, which is counted as tokens come, and what schemas allow travels with each step, without waiting for the
device. Knows nothing of how tokens are drawn. Enter at `RuleRows.tables`.

Shapes: B rows, V vocabulary, N entries of all rows' rules, M masks of W words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from server.engines.embedded.logits import LogitRules
from server.engines.embedded.sequence import Sequence, SequenceState
from server.engines.embedded.structure import TokenMask
from server.errors import GenerationError, SchemaTooComplexError
from server.kernels.gpu.draw import Penalties, RulePlaces, RuleTables
from server.kernels.transfer import on_device, to_device

_WORD_BITS = 32


class OutputCounts:
    """How often a text's tokens were drawn. Those that its prompt has too are counted below zero."""

    def __init__(self, prompt: frozenset[int]) -> None:
        self._prompt = prompt
        self._places: dict[int, int] = {}
        self._counts_2N = np.zeros((2, 64), np.int32)
        self._token_ids: list[int] = []
        self._num_counted = 0

    def of(self, token_ids: list[int]) -> np.ndarray:
        """Tokens and counts [2, N] int32, valid until it is asked again.

        It has to be asked before each token. A list that was cut since is counted anew; one that was cut and has grown
        as far again would not be told from one that only grew.
        """
        if token_ids is not self._token_ids or len(token_ids) < self._num_counted:
            self._token_ids, self._num_counted = token_ids, 0
            self._places.clear()
            self._counts_2N.fill(0)
        for token_id in token_ids[self._num_counted :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == self._counts_2N.shape[1]:
                self._counts_2N = np.concatenate([self._counts_2N, np.zeros_like(self._counts_2N)], axis=1)
            self._counts_2N[0, place] = token_id
            self._counts_2N[1, place] += -1 if token_id in self._prompt else 1
        self._num_counted = len(token_ids)
        return self._counts_2N[:, : len(self._places)]


class RuleRows:
    """The rules of a step's rows, laid out on the device."""

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._counts: dict[Sequence, OutputCounts] = {}
        """Of rows with penalties."""
        self._fixed: list[RulePlaces] = []
        self._penalties_B4 = self._biased_N = self._bias_N = self._prompt_N = torch.empty(0)

    def tables(self, rows: list[Sequence], size_V: int, device: torch.device) -> RuleTables | None:
        """What is to happen to the logits [B, V] of these rows; None where that is nothing."""
        masks = [row.held_to for row in rows]
        if not any(row.logit_rules for row in rows) and not any(masks):
            return None
        if rows != self._rows:
            self._lay_out(rows, device)
        copies, num_masks, num_outputs = itertools.count(), itertools.count(), 0
        places: list[RulePlaces] = []
        outputs: list[np.ndarray] = [np.empty((2, 0), np.int32)]
        for row, fixed, mask in zip(rows, self._fixed, masks, strict=True):
            if row.logit_rules is None and mask is None:
                places.append(fixed)
                continue
            if row in self._counts:
                outputs.append(self._counts[row].of(row.token_ids))
            begin, num_outputs = num_outputs, num_outputs + (outputs[-1].shape[1] if row in self._counts else 0)
            its_mask = -1 if mask is None else next(num_masks)
            places.append(fixed._replace(copy=next(copies), mask=its_mask, output=begin, output_end=num_outputs))
        words = [_words(mask, size_V) for mask in masks if mask is not None]
        return RuleTables(
            places_BP=on_device(places, device, dtype=torch.int32),
            num_copies=next(copies),
            penalties_B4=self._penalties_B4,
            biased_N=self._biased_N,
            bias_N=self._bias_N,
            prompt_N=self._prompt_N,
            outputs_2N=_table(np.concatenate(outputs, axis=1), device),
            masks_MW=_table(np.stack(words) if words else np.empty((0, 0), np.int32), device),
        )

    def _lay_out(self, rows: list[Sequence], device: torch.device) -> None:
        biased: list[int] = []
        bias: list[float] = []
        prompts: list[np.ndarray] = [np.empty(0, np.int32)]
        num_prompt = 0
        self._fixed = []
        self._counts = {row: counts for row, counts in self._counts.items() if row.state is not SequenceState.FINISHED}
        for row in rows:
            if (rules := row.logit_rules) is None:
                self._fixed.append(RulePlaces())
                continue
            prompt = _sorted(rules.prompt_token_ids)
            self._fixed.append(
                RulePlaces(
                    bias=len(biased), bias_end=len(biased) + len(rules.bias), prompt=num_prompt,
                    prompt_end=num_prompt + len(prompt),
                )
            )  # fmt: skip
            biased += rules.bias_token_ids
            bias += rules.bias
            prompts.append(prompt)
            num_prompt += len(prompt)
            if _counts_outputs(rules) and row not in self._counts:
                self._counts[row] = OutputCounts(rules.prompt_token_ids)
        self._penalties_B4 = on_device([_penalties(row.logit_rules) for row in rows], device, dtype=torch.float32)
        self._biased_N = on_device(biased, device, dtype=torch.int32)
        self._bias_N = on_device(bias, device, dtype=torch.float32)
        self._prompt_N = _table(np.concatenate(prompts), device)
        self._rows = rows


def _counts_outputs(rules: LogitRules) -> bool:
    return bool(rules.presence_penalty or rules.frequency_penalty) or rules.repetition_penalty != 1.0


def _penalties(rules: LogitRules | None) -> Penalties:
    if rules is None:
        return Penalties()
    repetition = rules.repetition_penalty
    return Penalties(repetition, 1.0 / repetition, rules.frequency_penalty, rules.presence_penalty)


def _sorted(token_ids: Iterable[int]) -> np.ndarray:
    return np.sort(np.fromiter(token_ids, np.int32))


def _words(mask: TokenMask, size_V: int) -> np.ndarray:
    """A bit for each token that may come next, [W] int32; none of a mask that fails, whose row then ends."""
    words = np.zeros(-(-size_V // _WORD_BITS), np.int32)
    try:
        bits = np.packbits(mask.allowed(), bitorder="little")
        words.view(np.uint8)[: len(bits)] = bits
    except (SchemaTooComplexError, GenerationError):
        pass  # What ends the row asks the mask why.
    return words


def _table(numbers: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(numbers), device)
