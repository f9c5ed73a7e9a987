"""`recontrol rollouts`: responses with the states behind their tokens, sampled by this program's engine or by vLLM.

vLLM's workers give tokens and no states, so a run of theirs has two halves: vLLM samples all responses and ends, and
then this program's engine reads them (server/engines/embedded/sampled_tokens.py). Both halves go on where they stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from tqdm import tqdm

from server.cli.command import ModelCommand, read_prompts
from server.control.registry import HeadRegistry
from server.engines import create_engine
from server.engines.base import Engine
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.embedded.rollouts import EngineRolloutSource
from server.engines.embedded.sampled_tokens import SampledTokensSource
from server.engines.rollout_prompts import encode_prompt, rollout_request
from server.errors import ConfigurationError, InvalidRequestError
from server.settings import Settings
from server.types import FinishReason
from value_models.errors import RolloutError
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import (
    RolloutSettings,
    claim_run,
    collect_rollouts,
    prompt_blocks,
    rollouts_manifest,
)
from value_models.sampled import SampledFiles, SampledResponse, StreamedText

_ONLY_WITH_VLLM = ("tensor_parallel_size", "vllm_options")


class Rollouts(ModelCommand, RolloutSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Sample responses with their hidden states; goes on where a killed run stopped."""

    out: Path = Field(Path("runs/rollouts"), description="folder of the run")
    prompts: Path | None = Field(None, description="JSON lines or parquet; by default the project's own prompts")
    formats: list[Literal["chat", "text"]] = Field(["chat", "text"], description="which of them")
    engine: Literal["embedded", "vllm"] = Field(
        "embedded", description="what samples; responses of vllm are read afterwards by this program's own engine"
    )
    tensor_parallel_size: Annotated[int, Field(ge=1)] = Field(1, description="devices that share each layer, with vllm")
    vllm_options: dict[str, Any] = Field({}, description="more of vllm's engine arguments, as JSON")

    @model_validator(mode="after")
    def _fit_the_engine(self) -> Self:
        if self.engine != "vllm":
            self.refuse_without("--engine vllm", _ONLY_WITH_VLLM)
        elif self.adapter is not None:
            raise ValueError("adapter: the engine vllm does not merge one in; merge it first, or leave --engine out")
        return self

    def cli_cmd(self) -> None:
        prompts = read_prompts(self.prompts, self.formats)
        settings = RolloutSettings(**{name: getattr(self, name) for name in RolloutSettings.model_fields})
        if self.engine == "vllm":
            self._sample_with_vllm(prompts, settings)
        else:
            loaded = self.load()
            source = EngineRolloutSource(loaded, self.core(loaded, HeadRegistry({})))
            collect_rollouts(source, prompts, self.out, settings, show_progress=True)
        print(f"{len(prompts) * settings.num_samples} responses are in {self.out}")

    def _sample_with_vllm(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> None:
        """Raises RolloutError, ConfigurationError, ModelLoadError."""
        manifest = rollouts_manifest(ModelFiles.of(self.model).identity, prompts, settings, sampled_by="vllm")
        claim_run(self.out, manifest)
        blocks = prompt_blocks(prompts, settings)
        files = SampledFiles(self.out, blocks)
        if missing := files.missing():
            engine = create_engine(self._engine_settings(settings))
            asyncio.run(_sample_blocks(engine, ModelFiles.of(self.model).tokenizer, blocks, missing, files, settings))
        loaded = self.load()
        source = SampledTokensSource(loaded, self.core(loaded, HeadRegistry({})), files.read)
        collect_rollouts(source, prompts, self.out, settings, sampled_by="vllm", show_progress=True)

    def _engine_settings(self, settings: RolloutSettings) -> Settings:
        """Raises ConfigurationError, also for what the environment sets and this engine does not have."""
        names = ("model", "device", "dtype", "max_batch_size", "max_model_len", "kv_cache_gib", *_ONLY_WITH_VLLM)
        try:
            return Settings(
                engine=self.engine,
                max_waiting=settings.prompts_per_shard * settings.num_samples,
                **{name: getattr(self, name) for name in names},
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigurationError(first["msg"].removeprefix("Value error, ")) from error


async def _sample_blocks(
    engine: Engine,
    tokenizer: Any,
    blocks: Sequence[Sequence[RolloutPrompt]],
    missing: Sequence[int],
    files: SampledFiles,
    settings: RolloutSettings,
) -> None:
    """Start the engine, sample these blocks one after the other, and end it. Raises RolloutError."""
    await engine.start()
    try:
        with tqdm(total=sum(len(blocks[index]) for index in missing) * settings.num_samples, unit="response") as bar:
            for index in missing:
                sampled = await asyncio.gather(
                    *(_responses(engine, tokenizer, prompt, settings) for prompt in blocks[index])
                )
                files.write(index, [response for responses in sampled for response in responses])
                bar.update(sum(map(len, sampled)))
    finally:
        await engine.stop()


async def _responses(
    engine: Engine, tokenizer: Any, prompt: RolloutPrompt, settings: RolloutSettings
) -> list[SampledResponse]:
    """All samples of a prompt. Raises RolloutError, with its id, for one that does not fit."""
    texts = [StreamedText() for _ in range(settings.num_samples)]
    tokens: list[list[int]] = [[] for _ in range(settings.num_samples)]
    reasons: dict[int, FinishReason] = {}
    try:
        stream = engine.generate(rollout_request(prompt, encode_prompt(tokenizer, prompt), settings))
    except InvalidRequestError as error:
        raise RolloutError(f"prompt {prompt.id!r}: {error}") from error
    async for chunk in stream:
        texts[chunk.index].add(chunk.text, len(chunk.token_ids))
        tokens[chunk.index] += chunk.token_ids
        if chunk.finish_reason is not None:
            reasons[chunk.index] = chunk.finish_reason
    if failed := {*reasons.values()} - {FinishReason.STOP, FinishReason.LENGTH}:
        raise RolloutError(f"prompt {prompt.id!r}: the engine ended it with {failed.pop().value}; its log says why")
    return [
        SampledResponse(
            prompt.id, i, texts[i].text, tuple(tokens[i]), reasons[i] is FinishReason.STOP, tuple(texts[i].text_ends)
        )
        for i in range(settings.num_samples)
    ]
