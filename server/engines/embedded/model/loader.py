"""A causal language model with its tokenizer, loaded into this process.

Never runs code of a model folder or a model's package: safetensors only, `trust_remote_code` off, `auto_map` refused.
What may be loaded is known by `server.engines.checkpoint`. Knows nothing of engines. Enter at `load_model`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from server.engines.checkpoint.adapters import Adapter, read_adapter
from server.engines.checkpoint.identity import base_model_identity, refuse_what_is_not_finite
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.checkpoint.quiet import quiet_transformers
from server.engines.checkpoint.tokenizer import eos_token_ids, placeholder_ids, warn_of_tokens_beyond
from server.engines.devices import resolve_device, resolve_dtype
from server.kernels import native

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer. `identity` is what a value head is matched against."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: dict[str, Any]
    eos_token_ids: frozenset[int]
    max_len: int
    placeholder_ids: frozenset[int] = frozenset()
    """Tokens that stand for a picture or a sound, of a model that takes those too."""


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None
) -> LoadedModel:
    """Load by a packaged model's name, folder, GGUF file or hub id, and merge an adapter into it.

    Raises ModelLoadError with what to do about it.
    """
    target = resolve_device(device)
    lora = None if adapter is None else read_adapter(Path(adapter).expanduser())
    with quiet_transformers():
        files = ModelFiles.find(name)
        tokenizer = files.tokenizer
        model = files.load(dtype=resolve_dtype(dtype, target, has_native_kernels=native() is not None))
        identity = base_model_identity(model, files.name)
        if lora is not None:
            model, identity = _with_adapter(lora, model, identity)
    refuse_what_is_not_finite(files.folder, model)
    model.to(target).eval().requires_grad_(False)
    warn_of_tokens_beyond(files.folder, tokenizer, identity["vocab_size"])
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=identity["name"],
        identity=identity,
        eos_token_ids=eos_token_ids(model.generation_config, tokenizer),
        max_len=files.max_len,
        placeholder_ids=placeholder_ids(model.config),
    )


def _with_adapter(lora: Adapter, model: Any, identity: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    made_for = str(lora.config.get("base_model_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    if made_for and made_for != identity["name"]:
        _log.warning(
            "The adapter %s says that it was made for %s; the model is %s", lora.name, made_for, identity["name"]
        )
    merged = lora.merged(model)
    changed = {"name": f"{identity['name']}+{lora.name}", "fingerprint": lora.fingerprint(identity["fingerprint"])}
    return merged, identity | changed
