"""The worker class for `--worker-cls`: whatever worker and model runner the platform has, with control installed.

It runs in vLLM's processes and knows nothing of this program's server. Heads come from `additional_config` when this
program's engine started vLLM, otherwise from the folder in RECONTROL_HEADS_DIR. What cannot be done is refused here, at
start. Enter at `ControlWorker`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.distributed.parallel_state import get_pp_group  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from server.control.registry import HeadRegistry
from server.engines.embedded.heads import load_one_head, with_head, without_head
from server.engines.vllm.model_files import ModelFiles
from server.engines.vllm.row_control import RowControl
from server.engines.vllm.runners import adapter_for
from server.engines.vllm.unembedding import VllmUnembedding
from server.engines.vllm.wire import CONFIG_KEY, HEADS_DIR_VARIABLE, SCHEDULER, VALIDATOR
from server.errors import ConfigurationError, RecontrolError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker  # pyright: ignore[reportMissingImports]
elif current_platform.is_xpu():
    from vllm.v1.worker.xpu_worker import XPUWorker as _Worker  # pyright: ignore[reportMissingImports]
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker  # pyright: ignore[reportMissingImports]


class ControlWorker(_Worker):
    """Methods that begin with `recontrol_` are called on every worker through `collective_rpc`."""

    def init_device(self) -> None:
        check_config(self.vllm_config)
        super().init_device()
        # The class is changed after the fact, so that how each platform makes its runner is left to it.
        self.model_runner.__class__ = adapter_for(self.model_runner, is_v2=self.use_v2_model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_last_rank:
            return
        config = _own_config(self.vllm_config)
        model, model_config = self.model_runner.get_model(), self.vllm_config.model_config
        self._recontrol_folder = Path(config["heads_dir"])
        self._recontrol_identity = config.get("identity") or ModelFiles.of(model_config.model).identity
        registry = HeadRegistry.load(
            self._recontrol_folder,
            self._recontrol_identity,
            device=self.device,
            skip_mismatched=config.get("skip_mismatched", False),
        )
        unembedding = VllmUnembedding.of(
            model.compute_logits, model, model_config.get_hidden_size(), model_config.dtype, self.device
        )
        self.model_runner.install_control(RowControl(registry, unembedding), model)

    def recontrol_load_head(self, name: str) -> str | None:
        """Why it cannot be loaded, in words; None when it is."""
        control: RowControl | None = self.model_runner.row_control
        if control is None:
            return None
        try:
            head, card = load_one_head(self._recontrol_folder, name, self._recontrol_identity, self.device)
        except RecontrolError as error:
            return error.message
        control.use(with_head(control.registry, name, head, card))
        return None

    def recontrol_unload_head(self, name: str) -> None:
        control: RowControl | None = self.model_runner.row_control
        if control is not None and name in control.registry.names:
            control.use(without_head(control.registry, name))


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
    _own_config(vllm_config)
    if CONFIG_KEY in vllm_config.additional_config:
        return
    if VALIDATOR not in (vllm_config.model_config.logits_processors or []):
        raise ConfigurationError(f"Bad control would not be refused: add `--logits-processors {VALIDATOR}`.")
    if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
        raise ConfigurationError(f"Control that fails would go unnoticed: add `--scheduler-cls {SCHEDULER}`.")


def _own_config(vllm_config: Any) -> dict[str, Any]:
    if CONFIG_KEY in vllm_config.additional_config:
        return vllm_config.additional_config[CONFIG_KEY]
    heads_dir = os.environ.get(HEADS_DIR_VARIABLE, "")
    if not heads_dir or not Path(heads_dir).is_dir():
        raise ConfigurationError(f"{HEADS_DIR_VARIABLE}: {heads_dir!r} is not a folder here; name one of value heads")
    return {"heads_dir": heads_dir}
