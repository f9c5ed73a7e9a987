"""What a step tells about its tokens: log-probabilities and edits, from tensors to plain data.

Of drawn tokens all of it goes to the host together, and is read when the host gets to it (`Drawn`). Texts of tokens
come last, for one sequence at a time, so that a tokenizer that fails ends nobody else's. Knows nothing of scheduling or
models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from server.control.group_edit import GroupStats
from server.engines.embedded.model.layout import PromptChunk
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.sequence import PromptGroup, Sequence
from server.engines.text import Detokenizer, as_chosen, with_texts
from server.engines.vocabulary import Vocabulary
from server.kernels.transfer import Arriving, on_device
from server.types import TokenLogprob, TopLogprob


class Likelihoods(NamedTuple):
    """Of tokens [M]: their log-probabilities, and the most likely tokens [M, N] in their places with those."""

    token_ids_M: Tensor
    chosen_M: Tensor
    top_ids_MN: Tensor
    top_MN: Tensor

    @classmethod
    def of(cls, logits_MV: Tensor, token_ids_M: Tensor, num_top: int) -> Likelihoods:
        log_probs_MV = logits_MV.log_softmax(dim=-1)
        top = log_probs_MV.topk(num_top, dim=-1)
        return cls(token_ids_M, log_probs_MV.gather(1, token_ids_M[:, None])[:, 0], top.indices, top.values)

    def as_data(self) -> list[TokenLogprob]:
        """Texts are empty yet."""
        return [
            TokenLogprob(
                token_id=token_id,
                text="",
                logprob=chosen,
                top=tuple(TopLogprob(i, "", value) for i, value in zip(ids, values, strict=True)),
            )
            for token_id, chosen, ids, values in zip(*(numbers.tolist() for numbers in self), strict=True)
        ]


@dataclass(slots=True)
class Drawn:
    """A token for each row of a step from its state, and what is told of it: on the device, and on its way here."""

    rows: list[Sequence]
    hidden_BD: Tensor
    tokens_B: Tensor
    _edited: list[tuple[int, ...]]
    _scored: list[tuple[int, ...]]
    """The rows of each group of edits, and of each batch of likelihoods."""
    _arriving: Arriving

    @classmethod
    def of(
        cls,
        rows: list[Sequence],
        hidden_BD: Tensor,
        tokens_B: Tensor,
        stats: list[GroupStats],
        scores: dict[tuple[int, ...], Likelihoods],
    ) -> Drawn:
        told = [
            tokens_B,
            *(group.numbers_RN for group in stats),
            *(part for batch in scores.values() for part in batch),
        ]
        return cls(rows, hidden_BD, tokens_B, [group.group.rows for group in stats], list(scores), Arriving(told))

    def read(self) -> tuple[list[int], dict[int, TokenLogprob], dict[int, list[float]]]:
        """Once the device has drawn them: the tokens, and by row log-probabilities and the numbers of edits."""
        tokens_B, *told = self._arriving.read()
        numbers, batches = told[: len(self._edited)], iter(told[len(self._edited) :])
        edits = {
            row: told
            for rows, numbers_RN in zip(self._edited, numbers, strict=True)
            for row, told in zip(rows, numbers_RN.tolist(), strict=True)
        }
        scores: dict[int, TokenLogprob] = {}
        for rows in self._scored:
            for row, score in zip(rows, Likelihoods(*(next(batches) for _ in range(4))).as_data(), strict=True):
                scores[row] = replace(score, top=score.top[: self.rows[row].request.sampling.logprobs or 0])
        return tokens_B.tolist(), scores, edits


class Scores:
    """Log-probabilities of drawn tokens and of prompts, for the requests that ask for them."""

    def __init__(self, lm_head: LMHead, vocabulary: Vocabulary) -> None:
        self._lm_head = lm_head
        self._vocabulary = vocabulary

    def of_tokens(
        self, rows: list[Sequence], logits_BV: Tensor, tokens_B: Tensor
    ) -> dict[tuple[int, ...], Likelihoods]:
        """By the rows that are computed together, of those that ask for them; their choice adds the texts."""
        wanted = {i: n for i, s in enumerate(rows) if (n := s.request.sampling.logprobs) is not None}
        if not wanted:
            return {}
        # On a CPU each row alone, as its bits may depend on others; elsewhere fewer launches are worth more.
        batches = [(i,) for i in wanted] if logits_BV.device.type == "cpu" else [tuple(wanted)]
        return {
            batch: Likelihoods.of(
                _rows(logits_BV, batch), _rows(tokens_B, batch).clamp(min=0), max(wanted[i] for i in batch)
            )
            for batch in batches
        }

    def add_prompt(self, sequence: Sequence, chunk: PromptChunk, hidden_TD: Tensor) -> None:
        """Those of the prompt tokens that follow the chunk's positions, without control, if they are asked for."""
        following = sequence.group.token_ids[chunk.start + 1 : chunk.end + 1]
        if not following or not sequence.tells_prompt:
            return
        logits_TV = self._lm_head.logits(hidden_TD)[: len(following)]
        token_ids_T = torch.tensor(following, device=logits_TV.device)
        num_top = sequence.request.sampling.logprobs or 0
        self._add_with_texts(sequence.group, Likelihoods.of(logits_TV, token_ids_T, num_top).as_data())

    def take_prompt(self, sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log-probabilities with their texts, for whichever choice comes first.

        Raises whatever the tokenizer raised, which concerns the sequence alone.
        """
        group = sequence.group
        if not sequence.request.sampling.prompt_logprobs or not group.prompt_logprobs:
            return None
        if group.text_error is not None:
            raise group.text_error
        taken = tuple(group.prompt_logprobs)
        group.prompt_logprobs.clear()
        return taken

    def _add_with_texts(self, group: PromptGroup, scores: list[TokenLogprob]) -> None:
        """With each chunk of the prompt, since those of a long one together would hold up everybody's next token."""
        if len(group.prompt_logprobs) == 1:
            group.prompt_text = None  # It is computed from the beginning, perhaps again.
        try:
            if group.prompt_text is None:
                group.prompt_text = Detokenizer(self._vocabulary, ())
                group.prompt_text.add(group.token_ids[0])
            for score in scores:
                described = with_texts(score, group.prompt_text)
                group.prompt_logprobs.append(as_chosen(described, group.prompt_text.add(score.token_id)))
        except Exception as error:
            group.text_error = error


def _rows(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    return tensor[rows[0] : rows[0] + 1] if len(rows) == 1 else tensor[on_device(rows, tensor.device)]
