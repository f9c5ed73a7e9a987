"""What a step tells about its tokens: log-probabilities and edits, from tensors to plain data.

Each function moves what it needs to the host at once. Texts of tokens come last, for one sequence at a time, so that a
tokenizer that fails ends nobody else's. Knows nothing of scheduling or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.control.editor import GroupStats
from server.engines.embedded.model.layout import Segment
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.sequence import PromptGroup, Sequence
from server.engines.text import Detokenizer, as_chosen, with_texts
from server.engines.vocabulary import Vocabulary
from server.types import TokenLogprob, TopLogprob


def token_logprobs(logits_MV: Tensor, token_ids_M: Tensor, num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens [M] under logits [M, V], with the num_top most likely; texts are empty yet."""
    log_probs_MV = logits_MV.log_softmax(dim=-1)
    chosen_M = log_probs_MV.gather(1, token_ids_M[:, None])[:, 0].tolist()
    top = log_probs_MV.topk(num_top, dim=-1)
    return [
        TokenLogprob(
            token_id=token_id,
            text="",
            logprob=chosen,
            top=tuple(TopLogprob(i, "", value) for i, value in zip(ids, values, strict=True)),
        )
        for token_id, chosen, ids, values in zip(
            token_ids_M.tolist(), chosen_M, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


def edits_by_row(stats: list[GroupStats]) -> dict[int, list[float]]:
    """Row of the step -> the numbers of what control did to it."""
    return {
        row: numbers
        for group in stats
        for row, numbers in zip(group.group.rows, group.numbers_RN.tolist(), strict=True)
    }


class Scores:
    """Log-probabilities of drawn tokens and of prompts, for the requests that ask for them."""

    def __init__(self, lm_head: LMHead, vocabulary: Vocabulary) -> None:
        self._lm_head = lm_head
        self._vocabulary = vocabulary

    def of_tokens(self, rows: list[Sequence], logits_BV: Tensor, tokens: list[int]) -> dict[int, TokenLogprob]:
        """By row, of those that ask for them and got a token; their choice adds the texts."""
        wanted = {i: n for i, s in enumerate(rows) if (n := s.request.sampling.logprobs) is not None and tokens[i] >= 0}
        # Log-softmax takes each row alone, and top-k of a row does not depend on how many are asked for elsewhere.
        return {
            i: token_logprobs(logits_BV[i : i + 1], torch.tensor([tokens[i]], device=logits_BV.device), num_top)[0]
            for i, num_top in wanted.items()
        }

    def add_prompt(self, sequence: Sequence, segment: Segment, hidden_TD: Tensor) -> None:
        """Those of the prompt tokens that follow the segment's positions, without control, if they are asked for."""
        following = sequence.group.token_ids[segment.start + 1 : segment.end + 1]
        if not following or not sequence.tells_prompt:
            return
        logits_TV = self._lm_head.logits(hidden_TD)[: len(following)]
        token_ids_T = torch.tensor(following, device=logits_TV.device)
        num_top = sequence.request.sampling.logprobs or 0
        self._add_with_texts(sequence.group, token_logprobs(logits_TV, token_ids_T, num_top))

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
