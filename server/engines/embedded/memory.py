"""What is said, when an engine starts, of the memory that it may come to take. Enter at `log_memory`."""

from __future__ import annotations

import logging

import psutil
import torch

from server.engines.embedded.model.pages import PAGE_TOKENS, PagePool
from server.engines.embedded.model.runner import ModelRunner
from server.machine import memory_limit_bytes

_log = logging.getLogger(__name__)
_GIB = 2**30


def log_memory(runner: ModelRunner, pool: PagePool, device: torch.device) -> None:
    """The size of the key-value cache and the threads that compute.

    A warning comes on a CPU where the cache and what this process holds already would be more than there is: it would
    be killed, but only once its pages have been used.
    """
    num_pages = pool.num_pages - 1
    _log.info(
        "Keys and values: up to %.2f GiB, %d pages, %d tokens; beyond %d pages remembered prompts make room first. "
        "%d threads",
        runner.kv_bytes / _GIB, num_pages, num_pages * PAGE_TOKENS, pool.high_water, torch.get_num_threads(),
    )  # fmt: skip
    held_bytes, limit_bytes = psutil.Process().memory_info().rss, memory_limit_bytes()
    if device.type == "cpu" and held_bytes + runner.kv_bytes > limit_bytes:
        _log.warning(
            "kv_cache_gib: keys and values of %.2f GiB and %.2f GiB held already are more than the %.2f GiB that this "
            "process may have; allow it more, or set kv_cache_gib lower",
            runner.kv_bytes / _GIB, held_bytes / _GIB, limit_bytes / _GIB,
        )  # fmt: skip
