"""What fewer bits cost in likelihood: `python quantization_loss.py OPTIONS` prints nats a token by bits as JSON.

The model draws texts in 16 bits. At each of their tokens the distribution in fewer bits is compared with the one in 16:
the divergence KL(16 bits || fewer), and how much less likely the drawn token has become, both in nats.
"""

from __future__ import annotations

import json
import sys
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.kernels.linear import Bits
from server.types import GenerationChunk, GenerationRequest, SamplingParams


def losses(options: dict[str, Any]) -> dict[str, Any]:
    """For 8 and 4 bits: means over all tokens."""
    plain = _core(options, 16)
    texts = [_text(plain, prompt, row, options["new_tokens"]) for row, prompt in enumerate(options["prompts"])]
    pairs = list(zip(options["prompts"], texts, strict=True))
    result: dict[str, Any] = {"num_tokens": sum(map(len, texts))}
    for bits in (8, 4):
        fewer = _core(options, bits)
        kl, loss = [], []
        for prompt, text in pairs:
            before_TV, after_TV = (_log_probs(core, prompt, text) for core in (plain, fewer))
            kl += (before_TV.exp() * (before_TV - after_TV)).sum(dim=-1).tolist()
            drawn_T1 = torch.tensor(text)[:, None]
            loss += (before_TV.gather(1, drawn_T1) - after_TV.gather(1, drawn_T1))[:, 0].tolist()
        result[str(bits)] = {"kl_nats": mean(kl), "nll_increase_nats": mean(loss)}
    return result


def _core(options: dict[str, Any], bits: Bits) -> EngineCore:
    loaded = load_model(options["model"], device="cpu", dtype="bfloat16")
    return EngineCore(loaded, HeadRegistry({}), max_batch_size=1, max_model_len=options["max_len"], bits=bits)


def _text(core: EngineCore, prompt: list[int], seed: int, num_tokens: int) -> list[int]:
    chunks: list[GenerationChunk] = []
    sampling = SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True)
    core.add(core.sequences(GenerationRequest("text", tuple(prompt), sampling), chunks.append))
    while core.has_work:
        core.step()
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


@torch.inference_mode()
def _log_probs(core: EngineCore, prompt: list[int], text: list[int]) -> Tensor:
    """[T, V] float64 behind each of the text's tokens."""
    states_TD = core.states([*prompt, *text[:-1]])[len(prompt) - 1 :]
    return core.lm_head.logits(states_TD).double().log_softmax(dim=-1)


if __name__ == "__main__":
    print(json.dumps(losses(json.loads(sys.argv[1]))))
