"""vLLM's offline engine with this project's control in its workers: what control costs beside `vllm_engine.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

from benchmarks.speed.workers.vllm_engine import Engine as PlainEngine
from server.engines.vllm.model_files import ModelFiles
from server.engines.vllm.wire import CONFIG_KEY, CONTROL_KEY, REPORT_KEY, SCHEDULER, WORKER
from value_models.store import shipped_heads_folder


class Engine(PlainEngine):
    def __init__(self, options: dict[str, Any]) -> None:
        files = ModelFiles.of(options["model"])
        heads_dir = Path(options["heads_dir"]) if options["heads_dir"] else shipped_heads_folder(files.name)
        super().__init__(
            options,
            worker_cls=WORKER,
            scheduler_cls=SCHEDULER,
            additional_config={CONFIG_KEY: {"heads_dir": str(heads_dir.resolve()), "identity": files.identity}},
        )

    def generate(
        self, prompts: list[list[int]], new_tokens: int, seed: int, objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Row i takes objective i, and round again; with objectives, what their edits did comes back too."""
        del seed
        sampling = [
            SamplingParams(
                temperature=1.0,
                top_p=1.0,
                max_tokens=new_tokens,
                ignore_eos=True,
                extra_args={CONTROL_KEY: json.dumps({"objective": objectives[row % len(objectives)]})}
                if objectives
                else None,
            )
            for row in range(len(prompts))
        ]
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"num_tokens": num_tokens, **(_edits(outputs, num_tokens) if objectives else {})}


def _edits(outputs: list[Any], num_tokens: int) -> dict[str, Any]:
    """Means over rows, which are equally long."""
    summaries = [output.kv_transfer_params[REPORT_KEY]["control"] for output in outputs]
    return {
        "edits": {
            "reported": num_tokens,
            "moved_share": sum(summary["controlled_share"] for summary in summaries) / len(summaries),
            "mean_kl": sum(summary["mean_kl"] for summary in summaries) / len(summaries),
            "max_kl": max(summary["max_kl"] for summary in summaries),
            "nonfinite": sum(summary["nonfinite_edits"] for summary in summaries),
        }
    }
