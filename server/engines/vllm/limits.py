"""What control cannot be had with in vLLM, told at start: where this program launches it, and in every worker.

Enter at `check_config`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from server.engines.vllm.wire import CONFIG_KEY, HEADS_DIR_VARIABLE, OTHER_BASE_VARIABLE, SCHEDULER, VALIDATOR
from server.errors import ConfigurationError


def check_config(vllm_config: Any) -> None:
    """Raises ConfigurationError for what control cannot be had with, saying what to change."""
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding: a drafted token's state is not the one its control was computed for": (
            vllm_config.speculative_config is not None
        ),
        "diffusion models: they draw no tokens from left to right": (
            getattr(vllm_config, "diffusion_config", None) is not None
        ),
        "LoRA: value heads read the states of the base model": vllm_config.lora_config is not None,
        "pooling: there are no tokens to control": vllm_config.model_config.runner_type != "generate",
        "batch-sharded sampling: each rank would see a part of the rows": (
            getattr(parallel, "enable_batch_sharded_sampling", False)
        ),
        "this platform with tensor parallelism: only one rank would see the logits": (
            parallel.tensor_parallel_size > 1 and not current_platform.use_all_gather()
        ),
    }
    for reason in (reason for reason, is_asked in refused.items() if is_asked):
        raise ConfigurationError(f"Control cannot be had with {reason}. Turn that off, or serve without control.")
    own_config(vllm_config)
    if CONFIG_KEY in vllm_config.additional_config:
        return
    if VALIDATOR not in (vllm_config.model_config.logits_processors or []):
        raise ConfigurationError(f"Bad control would not be refused: add `--logits-processors {VALIDATOR}`.")
    if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
        raise ConfigurationError(f"Control that fails would go unnoticed: add `--scheduler-cls {SCHEDULER}`.")


def own_config(vllm_config: Any) -> dict[str, Any]:
    """From this program, or else from the environment. Raises ConfigurationError."""
    if CONFIG_KEY in vllm_config.additional_config:
        return vllm_config.additional_config[CONFIG_KEY]
    heads_dir = os.environ.get(HEADS_DIR_VARIABLE, "")
    if not heads_dir or not Path(heads_dir).is_dir():
        raise ConfigurationError(f"{HEADS_DIR_VARIABLE}: {heads_dir!r} is not a folder here; name one of value heads")
    return {"heads_dir": heads_dir, "allow_other_base": _is_on(OTHER_BASE_VARIABLE)}


def _is_on(variable: str) -> bool:
    """In the words that settings take. Raises ConfigurationError."""
    value = os.environ.get(variable, "false")
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError as error:
        raise ConfigurationError(f"{variable}: {value!r} is neither true nor false") from error
