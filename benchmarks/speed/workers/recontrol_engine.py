"""This project's engine, driven without HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.heads import load_registry
from server.engines.embedded.model.loader import load_model
from server.types import ControlParams, FinishReason, GenerationChunk, GenerationRequest, SamplingParams


class Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        heads_dir = options["heads_dir"]
        loaded = load_model(options["model"], device=options["device"], dtype=options["dtype"])
        registry = load_registry(Path(heads_dir) if heads_dir else None, loaded)
        self._core = EngineCore(
            loaded,
            registry,
            max_batch_size=options["max_batch_size"],
            max_model_len=options["max_len"],
            bits=options["bits"],
        )
        self._device = str(loaded.model.device)

    def facts(self) -> dict[str, Any]:
        return {"device": self._device, "threads": torch.get_num_threads()}

    def generate(
        self, prompts: list[list[int]], new_tokens: int, seed: int, objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Row i takes objective i, and round again; with objectives, what their edits did comes back too."""
        chunks: list[GenerationChunk] = []
        for row, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=new_tokens, temperature=1, top_p=1, seed=seed + row, ignore_eos=True)
            control = _control(objectives[row % len(objectives)]) if objectives else None
            request = GenerationRequest(f"row-{row}", tuple(prompt), sampling, control)
            self._core.check(request)
            self._core.add(self._core.sequences(request, chunks.append))
        while self._core.has_work:
            self._core.step()
        if any(chunk.finish_reason is FinishReason.ERROR for chunk in chunks):
            raise RuntimeError("the engine failed; its log says why")
        return {"num_tokens": sum(len(chunk.token_ids) for chunk in chunks), **_edits(chunks)}

    def gpu_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_reserved() if self._device.startswith("cuda") else None


def _control(objective: dict[str, Any]) -> ControlParams:
    return ControlParams.model_validate({"objective": objective})


def _edits(chunks: list[GenerationChunk]) -> dict[str, Any]:
    edits = [chunk.edit for chunk in chunks if chunk.edit is not None]
    if not edits:
        return {}
    return {
        "edits": {
            "reported": len(edits),
            "moved_share": sum(edit.shift_ratio > 0 for edit in edits) / len(edits),
            "mean_kl": sum(edit.kl for edit in edits) / len(edits),
            "max_kl": max(edit.kl for edit in edits),
            "nonfinite": sum(edit.is_nonfinite for edit in edits),
        }
    }
