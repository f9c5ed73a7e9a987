"""How the tokens of prompts are cut into blocks that are attended at once."""

from __future__ import annotations

import torch

from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.layout import DecodeRow, Segment, StepLayout


def blocks(segments: list[Segment], *, num_decode: int = 0, tokens: int = 16) -> list[list[int]] | None:
    decode = [DecodeRow([1], 5, 0)] * num_decode
    made = StepLayout.of(KVCache(12), decode, segments, torch.device("cpu")).prompt_blocks(tokens)
    return None if made is None else made.tolist()


def test_blocks_begin_at_multiples_of_their_size_wherever_a_prompt_was_cut() -> None:
    assert blocks([Segment([1], 10, [0] * 25)]) == [[0, 6], [6, 16], [22, 3]]
    assert blocks([Segment([1], 0, [0] * 16), Segment([2], 15, [0] * 2)]) == [[0, 16], [16, 1], [17, 1]]


def test_they_lie_behind_the_decoding_rows_and_there_are_none_without_a_prompt() -> None:
    assert blocks([Segment([1], 0, [0] * 3)], num_decode=4) == [[4, 3]]
    assert blocks([], num_decode=4) is None
