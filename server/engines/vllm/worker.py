"""The worker class for `--worker-cls`: whatever worker and model runner the platform has, with control installed.

It runs in vLLM's processes and knows nothing of this program's server. Heads come from `additional_config` when this
program's engine started vLLM, otherwise from the folder in RECONTROL_HEADS_DIR. What cannot be done is refused here, at
start. Enter at `ControlWorker`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from server.control.registry import HeadRegistry
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.heads import HeadSource, with_head, without_head
from server.engines.vllm.limits import check_config, own_config
from server.engines.vllm.phases import PartsReader
from server.engines.vllm.row_control import RowControl
from server.engines.vllm.runners import adapter_for
from server.engines.vllm.unembedding import VllmUnembedding
from server.errors import HeadMismatchError, RecontrolError

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
        config = own_config(self.vllm_config)
        model, model_config = self.model_runner.get_model(), self.vllm_config.model_config
        self._recontrol_heads = HeadSource(
            config["heads_dir"],
            config.get("identity") or ModelFiles.of(model_config.model).identity,
            skip_mismatched=config.get("skip_mismatched", False),
            allow_other_base=config.get("allow_other_base", False),
        )
        registry = self._recontrol_heads.load(self.device)
        _check_same_on_all_ranks(registry, self._recontrol_heads)
        unembedding = VllmUnembedding.of(
            model.compute_logits, model, model_config.get_hidden_size(), model_config.dtype, self.device
        )
        parts = None
        if "reasoning_format" in config:
            parts = PartsReader.of(ModelFiles.find(model_config.model).tokenizer, config["reasoning_format"])
        self.model_runner.install_control(RowControl(registry, unembedding, parts), model)

    def recontrol_read_head(self, name: str, expected_card: dict[str, Any]) -> str | None:
        """Read a head's files, for `recontrol_use_head`. Why that cannot be, in words; None when it is done."""
        if self.model_runner.row_control is None:
            return None
        try:
            offered = self._recontrol_heads.load_one(name, self.device)
        except RecontrolError as error:
            return error.message
        if offered.facts != expected_card:
            return f"The value head {name!r} in {self._recontrol_heads.location} is not the same on every machine."
        self._recontrol_read = offered
        return None

    def recontrol_use_head(self) -> None:
        """The one that was read last, now that every worker has it."""
        control: RowControl | None = self.model_runner.row_control
        if control is not None:
            control.use(with_head(control.registry, self._recontrol_read))

    def recontrol_unload_head(self, name: str) -> None:
        control: RowControl | None = self.model_runner.row_control
        if control is not None and name in control.registry.names:
            control.use(without_head(control.registry, name))


def _check_same_on_all_ranks(registry: HeadRegistry, heads: HeadSource) -> None:
    """Ranks of a tensor-parallel group edit each for itself, and would go on from different tokens if heads differed.

    Raises HeadMismatchError.
    """
    group = get_tp_group()
    # A card has its tensors' checksum, and figures that the editor uses.
    mine = registry.cards()
    found = [mine] * group.world_size
    torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    if any(theirs != mine for theirs in found):
        raise HeadMismatchError(f"The value heads in {heads.location} are not the same on every machine.")
