"""What the commands that need a model share."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.engines.heads import HeadSource
from server.errors import ConfigurationError
from server.settings import ALLOW_OTHER_BASE, DEFAULT_MODEL, KV_CACHE_GIB, HeadsLocation
from value_models.head_folder import is_url
from value_models.prompt_sets import RolloutPrompt, load_prompts, own_prompts_file
from value_models.rewards import check_built_in
from value_models.store import HeadCard

_WITHOUT_REWARD = frozenset({"given", "instruction", "source"})
"""What the data of cards hold of heads that were made of pairs or texts, of an instruction, or of another's file."""


class Command(BaseSettings):
    """Flags by field name; RECONTROL_<FIELD> in the environment means the same."""

    model_config = SettingsConfigDict(
        env_prefix="RECONTROL_",
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_url_for_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        """A path made of a URL would be a folder called `s3:`."""
        assert info.field_name is not None
        if is_url(value) and Path in _alternatives(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"{value!r} is a URL; name a path on this machine")
        return value

    def refuse_without(self, partner: str, names: Iterable[str]) -> None:
        """Raises ValueError for flags that were given without their partner; a variable may stand for every command."""
        for name in names:
            if name in self.model_fields_set and f"RECONTROL_{name.upper()}" not in os.environ:
                raise ValueError(f"{name}: goes with {partner} alone")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


class ModelCommand(Command):
    """A command that runs the model in this process."""

    model: str = Field(DEFAULT_MODEL, description="folder, GGUF file or hub id of a causal language model")
    adapter: Path | None = Field(None, description="folder of a PEFT LoRA to merge in; needs recontrol[adapters]")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_batch_size: Annotated[int, Field(ge=1, le=512)] = 64
    kv_cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(None, description=KV_CACHE_GIB)

    max_model_len: Annotated[int, Field(ge=16)] | None = Field(
        None, description="prompt and new tokens of one sequence; by default what the model has"
    )

    def load(self) -> LoadedModel:
        return load_model(self.model, device=self.device, dtype=self.dtype, adapter=self.adapter)

    def core(self, loaded: LoadedModel, registry: HeadRegistry) -> EngineCore:
        """An engine to drive from this thread. Raises ModelLoadError, ConfigurationError."""
        return EngineCore(
            loaded,
            registry,
            max_batch_size=self.max_batch_size,
            max_model_len=self.max_model_len,
            kv_cache_gib=self.kv_cache_gib,
        )


class HeadsModelCommand(ModelCommand):
    """A command that runs the model with value heads."""

    heads_dir: HeadsLocation | None = Field(
        None, description="folder of value heads, or a URL of fsspec; by default those shipped for the model"
    )
    allow_other_base: bool = Field(False, description=ALLOW_OTHER_BASE)

    def heads(self, loaded: LoadedModel) -> HeadRegistry:
        """Raises HeadMismatchError, ConfigurationError."""
        source = HeadSource.of(self.heads_dir, loaded.identity, allow_other_base=self.allow_other_base)
        return source.load(loaded.model.device)


def scoring_reward(asked: str | None, card: HeadCard) -> str:
    """The name of the reward that a head's responses are scored with: the one that is asked for, or its card's.

    Raises ConfigurationError for a head that was made without one, RewardError for a card that names code.
    """
    if asked is not None:
        return asked
    if _WITHOUT_REWARD & card.data.keys():
        raise ConfigurationError(
            f"reward: {card.name} was trained by none that scores texts (its card says {card.reward!r}); give one"
        )
    return check_built_in(card.reward, f"the card of {card.name}")


def allow_rewards_of_the_working_folder() -> None:
    """A reward of the user's own may live in the folder the command is run from. It comes last, so that no file there
    takes the place of a library."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)


def read_prompts(path: Path | None, formats: Collection[str] = ("chat", "text")) -> list[RolloutPrompt]:
    """Those of a format, from a file or the project's own. Raises RolloutError, ConfigurationError."""
    prompts = [prompt for prompt in load_prompts(path or own_prompts_file()) if prompt.format in formats]
    if not prompts:
        source = path or "the project's own file"
        raise ConfigurationError(f"formats: {source} holds no {' or '.join(formats)} prompts; see --formats")
    return prompts
