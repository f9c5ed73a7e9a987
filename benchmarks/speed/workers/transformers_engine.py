"""transformers' own `generate`: one static batch, rows of equal length."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        dtype = getattr(torch, options["dtype"])
        self._model: Any = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=dtype, use_safetensors=True)
        self._model.to(options["device"]).eval()
        # Without an end-of-sequence token nothing ends early, and nothing is forbidden either.
        self._model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=None, pad_token_id=0
        )

    def facts(self) -> dict[str, Any]:
        return {"device": str(self._model.device), "threads": torch.get_num_threads()}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, seed: int, objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        del objectives
        torch.manual_seed(seed)
        prompts_BT = torch.tensor(prompts, device=self._model.device)
        out_BT = self._model.generate(
            prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=new_tokens
        ).cpu()
        return {"num_tokens": out_BT[:, prompts_BT.shape[1] :].numel()}

    def gpu_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_reserved() if self._model.device.type == "cuda" else None
