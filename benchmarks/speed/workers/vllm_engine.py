"""vLLM's offline engine, with the defaults of its own `LLM` class."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]


class Engine:
    def __init__(self, options: dict[str, Any], **more: Any) -> None:
        """`more` goes to vLLM."""
        self._device = options["device"]
        gpu = {"gpu_memory_utilization": options["gpu_memory_share"]} if self._device == "cuda" else {}
        self._llm = LLM(
            model=options["folder"],
            dtype=options["dtype"],
            max_model_len=options["max_len"],
            max_num_seqs=options["max_batch_size"],
            seed=options["seed"],
            **gpu,
            **more,
        )

    def facts(self) -> dict[str, Any]:
        preloaded = [path.rpartition("/")[2] for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
        return {"device": self._device, "threads": torch.get_num_threads(), "preloaded": preloaded}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, seed: int, objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Drawn from the engine's one stream: a seed of its own for each row would cost vLLM time."""
        del seed, objectives
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=new_tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        return {"num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    def gpu_peak_bytes(self) -> int | None:
        """Not known here: the engine's core is another process."""
        return None
