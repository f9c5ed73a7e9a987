"""vLLM as the settings ask for it, with control in its workers, or why it cannot be had.

Enter at `launch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from server.engines.base import EngineStatus
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.devices import resolve_dtype
from server.engines.heads import HeadSource
from server.engines.vllm.wire import CONFIG_KEY, SCHEDULER, WORKER
from server.errors import ConfigurationError, ModelLoadError
from server.machine import SPIN_VARIABLE, memory_limit_bytes
from server.settings import Settings

_DEFAULT_CPU_CACHE_GIB = 4.0
_NO_REPORTS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def launch(settings: Settings, files: ModelFiles, heads: HeadSource, on_status: Callable[[EngineStatus], None]) -> Any:
    """A started AsyncLLM; takes a minute or more. Raises ConfigurationError, ModelLoadError."""
    # Before vLLM is imported: unless an operator says otherwise, nothing is reported to its makers, or to Ray's.
    for name, value in _NO_REPORTS.items():
        os.environ.setdefault(name, value)
    # Of this program's own engine (server/machine.py): nearly all of vLLM's operations on a CPU are OpenMP's.
    if os.environ.get(SPIN_VARIABLE) == "0":
        del os.environ[SPIN_VARIABLE]
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]
        from vllm.v1.metrics.loggers import StatLoggerBase  # pyright: ignore[reportMissingImports]

        from server.engines.vllm.limits import check_config
    except ImportError as error:
        raise ConfigurationError(
            f"engine: vLLM cannot be imported ({error}). On a GPU, `pip install 'recontrol[vllm]'`; on a CPU, see "
            "`make test-vllm`."
        ) from error
    is_cpu = current_platform.is_cpu()
    if settings.device not in ("auto", "cpu" if is_cpu else "cuda"):
        raise ConfigurationError(f"device: this vLLM was built for {current_platform.device_name}; leave device out")

    class StatusLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config, engine_index
            self._num_preemptions = self._num_queries = self._num_hits = 0

        def record(self, scheduler_stats: Any, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
            # What follows is told of a step, and not since the start.
            self._num_preemptions += getattr(iteration_stats, "num_preempted_reqs", 0)
            if scheduler_stats is None:
                return
            cache = getattr(scheduler_stats, "prefix_cache_stats", None)
            self._num_queries += getattr(cache, "queries", 0)
            self._num_hits += getattr(cache, "hits", 0)
            status = EngineStatus(
                is_running=True,
                num_running=scheduler_stats.num_running_reqs,
                num_waiting=scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0),
                kv_cache_usage=scheduler_stats.kv_cache_usage,
                num_preemptions=self._num_preemptions,
                num_cache_queries=self._num_queries,
                num_cache_hits=self._num_hits,
            )
            on_status(status)

        def log_engine_initialized(self) -> None: ...

    device = torch.device("cpu" if is_cpu else "cuda")
    arguments = engine_arguments(settings, files, heads, device)
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"vLLM refuses these settings: {error}") from error
    check_config(config)
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[StatusLogger], disable_log_stats=True)
    except Exception as error:
        # What happened in a worker is in the log above; here it is only known that something did.
        raise ModelLoadError(f"vLLM did not start: {error}") from error


def engine_arguments(settings: Settings, files: ModelFiles, heads: HeadSource, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs. Raises ConfigurationError."""
    kv_cache_gib = settings.kv_cache_gib
    if kv_cache_gib is None and device.type == "cpu" and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        # vLLM takes it at once.
        kv_cache_gib = min(_DEFAULT_CPU_CACHE_GIB, 0.5 * memory_limit_bytes() / 2**30)
    arguments: dict[str, Any] = {
        "model": str(files.folder),
        "dtype": str(resolve_dtype(settings.dtype, device)).removeprefix("torch."),
        "max_model_len": min(settings.max_model_len or files.max_len, files.max_len),
        "max_num_seqs": settings.max_batch_size,
        "enable_prefix_caching": settings.prefix_cache,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "distributed_executor_backend": settings.distributed_executor_backend,
        # Weights that could run code are never read, nor a model's own code run.
        "load_format": "safetensors",
        "trust_remote_code": False,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enable_log_requests": False,
        "disable_log_stats": True,
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "additional_config": {
            CONFIG_KEY: {
                "heads_dir": str(heads.location),
                "identity": heads.identity,
                "skip_mismatched": heads.skip_mismatched,
                "allow_other_base": heads.allow_other_base,
                "reasoning_format": settings.reasoning_format,
            }
        },
    }
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    if taken := sorted(arguments.keys() & settings.vllm_options.keys()):
        raise ConfigurationError(f"vllm_options: {', '.join(taken)} is set by this program; use its own settings")
    return {**arguments, **settings.vllm_options}
