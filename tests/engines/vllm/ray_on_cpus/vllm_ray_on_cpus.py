"""vLLM's platform for CPUs, allowed on Ray: for tests, so that vLLM's Ray executors can be run without a GPU.

vLLM refuses Ray where a platform names no resource of Ray's. That name is all that is changed here: a worker asks Ray
for one of the "GPU"s that `ray start --num-gpus` was told of, which need not exist. vLLM finds this platform by the
entry point beside this file, in every process that has this folder on its PYTHONPATH.
"""

from __future__ import annotations

from vllm.platforms import cpu_platform_plugin  # pyright: ignore[reportMissingImports]
from vllm.platforms.cpu import CpuPlatform  # pyright: ignore[reportMissingImports]


class CpuPlatformOnRay(CpuPlatform):
    ray_device_key = "GPU"


def activate() -> str | None:
    """The platform's name, where vLLM was built for CPUs."""
    return None if cpu_platform_plugin() is None else f"{__name__}.{CpuPlatformOnRay.__name__}"
