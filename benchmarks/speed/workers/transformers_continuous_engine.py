"""transformers' continuous batching: one manager that lives as long as the process, so its set-up is not measured."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

_PAGE_TOKENS = 256
_RESULT_TIMEOUT_S = 1.0


class Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        dtype = getattr(torch, options["dtype"])
        self._model: Any = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=dtype, use_safetensors=True)
        self._model.to(options["device"]).eval()
        # -1 is no token, so nothing ends early; None would mean the model's own.
        sampling = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=-1)
        rows, pages = options["max_batch_size"], -(-options["max_len"] // _PAGE_TOKENS)
        batching = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=rows * pages,
            max_batch_tokens=max(rows, 512),
            max_requests_per_batch=rows,
            seed=options["seed"],
        )
        self._context = self._model.continuous_batching_context_manager(
            generation_config=sampling, continuous_batching_config=batching
        )
        with torch.inference_mode():
            self._manager: Any = self._context.__enter__()

    def facts(self) -> dict[str, Any]:
        return {
            "device": str(self._model.device),
            "threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
        }

    def generate(
        self, prompts: list[list[int]], new_tokens: int, seed: int, objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The seed was set once, when the manager was made."""
        del seed, objectives
        self._manager.add_requests(inputs=prompts, max_new_tokens=new_tokens)
        num_done = num_tokens = 0
        while num_done < len(prompts):
            result = self._manager.get_result(timeout=_RESULT_TIMEOUT_S)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the generation thread has ended; the log says why")
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            num_done += 1
            num_tokens += len(result.generated_tokens)
        return {"num_tokens": num_tokens}

    def gpu_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_reserved() if self._model.device.type == "cuda" else None
