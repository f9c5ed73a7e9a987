"""What a GPU's attention is given: prompts cut into blocks, and heads that it has room for."""

from __future__ import annotations

import pytest
import torch

from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.layout import DecodeRow, PromptChunk, StepLayout
from server.kernels.gpu.attention import fits


def blocks(chunks: list[PromptChunk], *, num_decode: int = 0, tokens: int = 16) -> list[list[int]] | None:
    decode = [DecodeRow([1], 5, 0)] * num_decode
    made = StepLayout.of(KVCache(12), decode, chunks, torch.device("cpu")).prompt_blocks(tokens)
    return None if made is None else made.tolist()


def test_blocks_begin_at_multiples_of_their_size_wherever_a_prompt_was_cut() -> None:
    assert blocks([PromptChunk([1], 10, [0] * 25)]) == [[0, 6], [6, 16], [22, 3]]
    assert blocks([PromptChunk([1], 0, [0] * 16), PromptChunk([2], 15, [0] * 2)]) == [[0, 16], [16, 1], [17, 1]]


def test_they_lie_behind_the_decoding_rows_and_there_are_none_without_a_prompt() -> None:
    assert blocks([PromptChunk([1], 0, [0] * 3)], num_decode=4) == [[4, 3]]
    assert blocks([], num_decode=4) is None


@pytest.mark.parametrize(
    ("dtype", "size", "expected"),
    [
        (torch.bfloat16, 64, True), (torch.bfloat16, 256, True), (torch.float32, 128, True),
        (torch.float32, 256, False), (torch.bfloat16, 512, False),
    ],
)  # fmt: skip
def test_heads_that_a_multiprocessor_has_no_room_for_are_left_to_torch(
    dtype: torch.dtype, size: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = torch.empty(3, 2, 64, size, dtype=dtype, device="meta")
    assert fits(keys, keys)
    monkeypatch.setattr("server.kernels.gpu.attention._shared_bytes", lambda _: 227 * 1024)  # An H100's.
    assert fits(keys, keys) == expected
