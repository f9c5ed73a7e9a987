"""Which engine `--engine auto` comes to: vLLM where there is a GPU for it and nothing speaks against it, else the
embedded one.

Settings that one engine alone has decide first, then pinned control, then the machine, then the model. Nothing is
loaded and no model is looked for; what is asked is what torch sees, which packages are installed, and the configuration
of a model's folder. Enter at `resolved`.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.control.params import ControlParams
from server.engines.checkpoint.json_files import read_object
from server.errors import RecontrolError
from server.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Chosen:
    """An engine, and why it is that one, as the end of a sentence."""

    name: Literal["embedded", "vllm"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name}, since {self.reason}"


@dataclass(slots=True, frozen=True)
class Machine:
    """What this machine has for an engine; each is asked only when it matters."""

    has_gpu: Callable[[], bool]
    lacks_vllm: Callable[[], str | None]
    """Why vLLM cannot run on a GPU here, None where it can."""
    vllm_architectures: Callable[[], frozenset[str]]
    """The names of configurations' `architectures` that vLLM runs."""


def resolved(settings: Settings, machine: Machine | None = None) -> Settings:
    """The settings with an engine that is one; it is logged which was taken for `auto`, and why.

    Raises ConfigurationError as `choose` does.
    """
    if settings.engine != "auto":
        return settings
    chosen = choose(settings, machine)
    _log.info("engine auto: %s", chosen)
    return settings.model_copy(update={"engine": chosen.name})


def choose(settings: Settings, machine: Machine | None = None) -> Chosen:
    """What `auto` comes to. Raises ConfigurationError for pinned control that is none."""
    machine = machine or _this_machine()
    if names := settings.given_for("embedded"):
        return Chosen("embedded", f"vLLM does not have {', '.join(names)}")
    if names := settings.given_for("vllm"):
        return Chosen("vllm", f"only vLLM has {', '.join(names)}")
    if (field := _pinned_beyond_vllm(settings)) is not None:
        return Chosen("embedded", f"vLLM does not serve pinned_control.{field}")
    lack = _lack(settings, machine)
    return Chosen("vllm", "there are a CUDA device and vLLM") if lack is None else Chosen("embedded", lack)


def _pinned_beyond_vllm(settings: Settings) -> str | None:
    """The field of pinned control that only the embedded engine serves, if there is one."""
    if settings.pinned_control is None:
        return None
    pinned = ControlParams.from_json(settings.pinned_control, "pinned_control")
    if pinned.repairs:
        return "on_stop"
    return "over_turns" if pinned.over_turns is not None and pinned.over_turns.held_heads else None


def _lack(settings: Settings, machine: Machine) -> str | None:
    """What speaks against vLLM on a GPU, if anything does."""
    if settings.device == "cpu":
        return "the device is cpu"
    if not machine.has_gpu():
        return "torch sees no CUDA device"
    if (lack := machine.lacks_vllm()) is not None:
        return lack
    names = _architectures(settings.model)
    if names and not machine.vllm_architectures().intersection(names):
        return f"vLLM does not run {', '.join(names)}"
    return None


def _architectures(model: str) -> list[str]:
    """As a folder's configuration names them; none of what is no folder, or cannot be read, which is told later."""
    try:
        names = read_object(Path(model) / "config.json").get("architectures")
    except RecontrolError:
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _this_machine() -> Machine:
    return Machine(_has_gpu, _lacks_vllm, _vllm_architectures)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _lacks_vllm() -> str | None:
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vLLM is not installed"
    return f"vLLM {version} is a build for CPUs" if "cpu" in version else None


def _vllm_architectures() -> frozenset[str]:
    from vllm import ModelRegistry  # pyright: ignore

    return frozenset(ModelRegistry.get_supported_archs())
