"""Rollouts: responses with the base model's hidden states behind their tokens, kept as shards.

The model sampled them, or they are texts of others that it only read (scored_texts.py). A run is a folder:
`manifest.json` (settings, base model, prompts' digest) and for each block of prompts a pair `shard-00000.safetensors`
(states, gradients, token ids, offsets) and `shard-00000.jsonl` (one line a response). The JSONL is renamed into place
last, so a shard counts only when it is whole; a killed run goes on where it stopped. Knows nothing of models: a
`RolloutSource` samples. Enter at `collect_rollouts` and `open_rollouts`; shards.py reads the files.

State t of a response is the post-norm state that predicts its token t, so the first one has seen the prompt alone.

Shapes: N tokens of a shard's responses one after the other, D hidden size, T tokens of one response.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (a PathLike of what)
from torch import Tensor
from tqdm import tqdm

from value_models.errors import RolloutError, first_problem
from value_models.files import SCRATCH_SUFFIX, write_text, write_whole
from value_models.prompt_sets import RolloutPrompt
from value_models.shards import SAMPLED, ShardTensors, map_tensors, read_rows, shard_path

MANIFEST = "manifest.json"
FORMAT = 2
ROW_FIELDS = ("prompt_id", "sample", "response", "is_finished")
RunKind = Literal["rollouts", "pairs", "texts"]
"""Whether the model sampled the responses, or which kind of given texts they are."""


@dataclass(slots=True, frozen=True)
class Rollout:
    prompt_id: str
    sample: int
    response: str
    token_ids: tuple[int, ...]
    is_finished: bool
    """Whether it ended by itself, not by the token limit."""
    states_TD: Tensor
    logp_grads_TD: Tensor
    """Gradient of each token's log-probability under the base model by the state that predicts it."""
    sampled_grads_TD: Tensor | None = None
    """Where the text is not the model's own: such gradients of a token that the model draws in that state."""
    text_ends: tuple[int, ...] | None = None
    """How many characters of the response stand before each token, where that is known."""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What its line in the JSONL holds besides, as plain data."""


class RolloutSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_samples: int = Field(default=8, ge=1, description="responses for each prompt")
    max_tokens: int = Field(default=64, ge=1, description="new tokens of a response")
    temperature: float = Field(default=1.0, gt=0, le=2)
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="below 1 the mean gradient of log-probabilities is not zero, which misleads training",
    )
    seed: int = 0
    prompts_per_shard: int = Field(default=32, ge=1)


class RolloutSource(Protocol):
    """Samples from one base model."""

    @property
    def base_model(self) -> dict[str, Any]:
        """Identity as plain data; see `value_models.store.BaseModelCard`."""
        ...

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        """settings.num_samples responses to each prompt, in any order. The seed of a response may depend on
        settings.seed, the prompt's id and the sample's number only."""
        ...


@dataclass(slots=True, frozen=True)
class RolloutSet:
    folder: Path
    manifest: dict[str, Any]

    @property
    def base_model(self) -> dict[str, Any]:
        return self.manifest["base_model"]

    @property
    def kind(self) -> RunKind:
        return self.manifest.get("given", {}).get("kind", "rollouts")

    @property
    def num_shards(self) -> int:
        return self.manifest["num_shards"]

    def rows(self, index: int) -> list[dict[str, Any]]:
        """Of a shard: prompt_id, sample, response, is_finished, and of given texts prompt, score and line.

        Raises RolloutError where it is damaged.
        """
        return read_rows(self.folder, index, ROW_FIELDS if self.kind == "rollouts" else (*ROW_FIELDS, "score"))

    def tensors(self, index: int) -> ShardTensors:
        """Of a shard, backed by its file. Raises RolloutError where it is damaged."""
        return map_tensors(self.folder, index, is_given=self.kind != "rollouts")


def collect_rollouts(
    source: RolloutSource,
    prompts: Sequence[RolloutPrompt],
    folder: Path,
    settings: RolloutSettings,
    *,
    sampled_by: str | None = None,
    show_progress: bool | None = None,
) -> RolloutSet:
    """Sample what is missing of a run and return it whole.

    `sampled_by` names the engine whose responses the source only reads, where it does. `show_progress` None shows a bar
    on a terminal. Raises RolloutError when the folder holds another run, when an id occurs twice, or when the source
    does not give exactly the responses asked for.
    """
    manifest = rollouts_manifest(source.base_model, prompts, settings, sampled_by=sampled_by)
    blocks = prompt_blocks(prompts, settings)

    def sample(index: int) -> list[Rollout]:
        return _checked(list(source.sample(blocks[index], settings)), settings, blocks[index])

    sizes = [len(block) * settings.num_samples for block in blocks]
    return collect_shards(folder, manifest, sizes, sample, show_progress=show_progress)


def prompt_blocks(prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> list[list[RolloutPrompt]]:
    """The prompts of each shard."""
    size = settings.prompts_per_shard
    return [list(prompts[first : first + size]) for first in range(0, len(prompts), size)]


def rollouts_manifest(
    base_model: dict[str, Any],
    prompts: Sequence[RolloutPrompt],
    settings: RolloutSettings,
    *,
    sampled_by: str | None = None,
) -> dict[str, Any]:
    """What tells one run from another; see `collect_rollouts`. Raises RolloutError when an id occurs twice."""
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise RolloutError("prompts: an id occurs twice; a response could not be told from another's")
    return {
        "format": FORMAT,
        "base_model": base_model,
        "settings": settings.model_dump(),
        "prompts_sha256": _digest(prompts),
        "num_prompts": len(prompts),
        "num_shards": len(prompt_blocks(prompts, settings)),
        **({} if sampled_by is None else {"sampled_by": sampled_by}),
    }


def collect_shards(
    folder: Path,
    manifest: dict[str, Any],
    sizes: Sequence[int],
    make: Callable[[int], Sequence[Rollout]],
    *,
    show_progress: bool | None = None,
) -> RolloutSet:
    """Let `make` give the responses of each shard that a run lacks, by its index; `sizes` say how many they will be.

    `show_progress` None shows a bar on a terminal. Raises RolloutError when the folder holds another run.
    """
    claim_run(folder, manifest)
    with tqdm(
        total=sum(sizes),
        unit="response",
        disable=not sys.stderr.isatty() if show_progress is None else not show_progress,
    ) as bar:
        for index, size in enumerate(sizes):
            if not shard_path(folder, index, ".jsonl").exists():
                started_s = time.perf_counter()
                num_tokens = _write_shard(folder, index, make(index))
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - started_s):.0f} tokens/s")
            bar.update(size)
    return RolloutSet(folder, manifest)


class _Given(BaseModel):
    kind: str
    file: str


class _Manifest(BaseModel):
    """What is read of a manifest, which may hold more."""

    model_config = ConfigDict(strict=True)

    base_model: dict[str, Any]
    settings: dict[str, Any]
    num_shards: PositiveInt
    prompts_sha256: str | None = None
    given: _Given | None = None

    @model_validator(mode="after")
    def _tells_its_texts(self) -> Self:
        if self.prompts_sha256 is None and self.given is None:
            raise PydanticCustomError("missing", "is missing, as is given; one of them tells what the texts are")
        return self


def open_rollouts(folder: Path) -> RolloutSet:
    """Open a run that is complete. Raises RolloutError."""
    try:
        read: object = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RolloutError(f"{folder} holds no rollouts ({error}); make them with `recontrol rollouts`") from error
    manifest = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    version = manifest.get("format")
    if version != FORMAT:
        raise RolloutError(f"{folder} has format {version}, this version reads {FORMAT}; sample them anew")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise RolloutError(f"{folder / MANIFEST}: {first_problem(error, 'prompts_sha256')}") from error
    missing = [i for i in range(manifest["num_shards"]) if not shard_path(folder, i, ".jsonl").exists()]
    if missing:
        raise RolloutError(
            f"{folder} lacks {len(missing)} of {manifest['num_shards']} shards; the command that began it goes on with "
            "them"
        )
    return RolloutSet(folder, manifest)


def claim_run(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the folder this run's, or check that it is; remove what a killed run left half-written.

    Raises RolloutError when it holds another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{SCRATCH_SUFFIX}"):
        leftover.unlink()
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("shard-*")):
            raise RolloutError(f"{folder} has shards, but no {MANIFEST} that tells what they are; choose another --out")
        write_text(path, json.dumps(manifest, indent=2) + "\n")
        return
    try:
        existing = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RolloutError(f"{path} is no manifest of rollouts ({error}); choose another --out") from error
    # Through JSON, as the one on disk went.
    wanted = _flat(json.loads(json.dumps(manifest)))
    keys = [key for key in {**wanted, **existing} if existing.get(key) != wanted.get(key)]
    if keys:
        differing = ", ".join(f"{key} ({existing.get(key)} there, {wanted.get(key)} asked)" for key in keys)
        raise RolloutError(
            f"{folder} holds another run; these differ: {differing}. Choose another --out, or delete the folder."
        )


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    """{"settings": {"seed": 0}} as {"settings.seed": 0}, so that a difference is named exactly."""
    flat: dict[str, Any] = {}
    for key, value in manifest.items():
        nested = cast("dict[str, Any]", value) if isinstance(value, dict) else None
        flat |= {key: value} if nested is None else {f"{key}.{inner}": x for inner, x in nested.items()}
    return flat


def _write_shard(folder: Path, index: int, rollouts: Sequence[Rollout]) -> int:
    lengths = torch.tensor([0] + [len(rollout.token_ids) for rollout in rollouts])
    tensors = {
        "states_ND": torch.cat([rollout.states_TD for rollout in rollouts]).contiguous(),
        "logp_grads_ND": torch.cat([rollout.logp_grads_TD for rollout in rollouts]).contiguous(),
        "token_ids_N": torch.tensor([token for rollout in rollouts for token in rollout.token_ids]),
        "offsets": lengths.cumsum(0),
    }
    sampled = [rollout.sampled_grads_TD for rollout in rollouts if rollout.sampled_grads_TD is not None]
    if sampled:
        assert len(sampled) == len(rollouts)
        tensors[SAMPLED] = torch.cat(sampled).contiguous()
    write_whole(shard_path(folder, index, ".safetensors"), lambda scratch: save_file(tensors, scratch))
    rows = [_row(rollout) for rollout in rollouts]
    write_text(shard_path(folder, index, ".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    return int(lengths.sum())


def _row(rollout: Rollout) -> dict[str, Any]:
    """A response's line."""
    ends = {} if rollout.text_ends is None else {"text_ends": rollout.text_ends}
    return {name: getattr(rollout, name) for name in ROW_FIELDS} | ends | dict(rollout.about)


def _checked(rollouts: Sequence[Rollout], settings: RolloutSettings, block: Sequence[RolloutPrompt]) -> list[Rollout]:
    """The rollouts in the prompts' order.

    Raises RolloutError unless each sample of each prompt is there once, with a state for each token.
    """
    by_key = {(rollout.prompt_id, rollout.sample): rollout for rollout in rollouts}
    wanted = [(prompt.id, sample) for prompt in block for sample in range(settings.num_samples)]
    if len(by_key) != len(rollouts) or by_key.keys() != set(wanted):
        given = f"{len(rollouts)} responses ({len(by_key)} distinct)"
        raise RolloutError(
            f"the source gave {given}; {settings.num_samples} were asked for each of {len(block)} prompts"
        )
    for (prompt_id, sample), rollout in by_key.items():
        for name, tensor in (("states", rollout.states_TD), ("gradients", rollout.logp_grads_TD)):
            if tensor.dim() != 2 or len(tensor) != len(rollout.token_ids):
                raise RolloutError(
                    f"prompt {prompt_id!r}, sample {sample}: {len(rollout.token_ids)} tokens, but {name} of shape "
                    f"{tuple(tensor.shape)}"
                )
    return [by_key[key] for key in wanted]


def _digest(prompts: Sequence[RolloutPrompt]) -> str:
    lines = "".join(prompt.identity() for prompt in prompts)
    return hashlib.sha256(lines.encode()).hexdigest()
