"""`python -m benchmarks.speed`: this server's engine and its peers, measured by turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from transformers import AutoTokenizer

from benchmarks.speed import long_prompts, neighbours, offline, online, own_engine, report
from benchmarks.speed.measurement import Measurement, Positive
from benchmarks.speed.models import head_names, kv_cache_gib, random_model, text_config
from benchmarks.speed.peers import ARMS, BESIDE_VLLM, PEERS, Found, find, missing
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup, Workload
from server.cli.command import read_prompts
from server.errors import ConfigurationError
from value_models.store import shipped_heads_folder

_PAGE_TOKENS = 128
PartName = Literal["offline", "online", "step", "quantization", "long", "neighbours"]
Part = Callable[[Callable[[dict[str, Any]], object]], dict[str, Any]]
"""Measures, and says after every turn what it has."""
_USUAL_PARTS: list[PartName] = ["offline", "online", "step", "quantization"]
_PROFILED_ROWS = 32
_LEAST_LONG_LEN = 1024


class Speed(Measurement):
    """Measure this server's engine and its peers by turns: tokens a second, and streams over HTTP.

    Every peer gets the same model, prompts, precision, threads and sampling (temperature 1, no filters, no early end)
    in a process of its own, which is frozen while others are measured. `make peers` installs the peers; one that is
    not there is named and left out.
    """

    random_weights: str | None = Field(
        None, description="instead of a model: random weights of a shape, a folder with config.json or a known name"
    )
    heads: list[str] | None = Field(
        None, description="comma-separated heads that controlled rows use; by default the first by name"
    )
    peers: list[str] = Field(
        [name for name in ARMS if name not in BESIDE_VLLM],
        description=f"comma-separated, of: {', '.join(ARMS)}; by default without {', '.join(BESIDE_VLLM)}",
    )
    only: list[PartName] = Field(
        _USUAL_PARTS,
        description=f"comma-separated, of: {', '.join(get_args(PartName))}; by default without the last two",
    )
    batch_sizes: list[Positive] = Field([1, 8, 32, 64], description="comma-separated, of offline batches")
    rates: list[Annotated[float, Field(gt=0)]] = Field([1, 2, 4], description="comma-separated requests a second")
    num_requests: Positive = Field(60, description="of one turn at one rate")
    repeats: Positive = 5
    prompt_tokens: Positive = 32
    new_tokens: Positive = 64
    long_prompts: list[Positive] = Field([512, 2048, 8000], description="comma-separated tokens, for the part `long`")
    neighbour_rows: Positive = Field(32, description="of each batch of the part `neighbours`")
    ttft_objective_ms: float = Field(500, gt=0, description="first text of a good answer")
    itl_objective_ms: float = Field(100, gt=0, description="mean gap between texts of a good answer")
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="that a peer which takes its cache beforehand may have; by default an equal share"
    )
    peers_dir: Path = Field(Path(), description="folder with the environments of `make peers`")

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        if unknown := [name for name in self.peers if name not in ARMS]:
            raise ValueError(f"peers: there is no {unknown[0]!r}; there are {', '.join(ARMS)}")
        if self.random_weights is not None and (given := {"model", "heads_dir"} & self.model_fields_set):
            raise ValueError(f"{min(given)}: --random-weights makes its own; leave it out")
        return self

    def cli_cmd(self) -> None:
        self.carry_out()

    def sections(self, result: Mapping[str, Any]) -> dict[str, str]:
        return report.sections(result)

    def located(self, *, device: str, dtype: str) -> dict[str, Any]:
        if self.random_weights is None:
            return super().located(device=device, dtype=dtype)
        folder = random_model(self.random_weights, self.work, dtype=dtype, device=device, seed=self.seed)
        return {"model": str(folder), "folder": folder.resolve(), "heads_dir": folder / "heads"}

    def measure(self) -> dict[str, Any]:
        setup = self._setup()
        found: dict[str, Found] = {}
        skipped: dict[str, str] = {}
        for arm in self.peers:
            name = ARMS[arm].peer
            here = found.get(name) or find(PEERS[name], self.peers_dir)
            if isinstance(here, Found):
                found[name] = here
            if why := here if isinstance(here, str) else missing(arm, setup):
                skipped[arm] = why
                print(f"left out: {arm}: {why}", flush=True)
        arms = [arm for arm in self.peers if arm not in skipped]
        result: dict[str, Any] = {
            **self.about(),
            "model": setup.model,
            "settings": self._settings(setup),
            "versions": {arm: found[ARMS[arm].peer].versions for arm in arms},
            "skipped": skipped,
        }
        if "online" in self.only:
            result["without_server"] = [arm for arm in arms if not _has_server(arm)]
        for part, measure in self._parts(setup, arms, found).items():
            if part not in self.only:
                continue
            try:
                # What has been measured outlives whatever happens to the rest.
                result[part] = measure(lambda so_far, part=part: self.write({**result, part: so_far}))
            except PeerError as error:
                # Of a look into our own engine; arms that fail say so in their figures.
                result[part] = {"failed": str(error)}
                print(f"{part} failed: {error}", flush=True)
            self.write(result)
        return result

    def _parts(self, setup: Setup, arms: list[str], found: dict[str, Found]) -> dict[str, Part]:
        """What can be measured here, in this order."""
        workload, repeats = self._workload(setup), self.repeats
        serving = [arm for arm in arms if _has_server(arm)]
        parts: dict[str, Part] = {}
        if arms:
            sizes = {"batch_sizes": self.batch_sizes, "repeats": repeats}
            parts["offline"] = lambda keep: offline.measure(setup, arms, found, workload, keep=keep, **sizes)
        if serving:
            parts["online"] = lambda keep: online.measure(setup, serving, found, workload, self._load(), keep=keep)
        parts["step"] = lambda _: own_engine.profile(setup, workload, rows=_PROFILED_ROWS)
        if setup.device == "cpu" and setup.dtype == "bfloat16":
            parts["quantization"] = lambda _: own_engine.quantization_loss(setup, workload)
        if arms and "long" in self.only:
            lengths = {"lengths": self.long_prompts, "repeats": repeats}
            roomy = self._roomy(setup)
            parts["long"] = lambda keep: long_prompts.measure(roomy, arms, found, workload, keep=keep, **lengths)
        if arms:
            rows = self.neighbour_rows
            beside = replace(setup, max_batch_size=rows, kv_cache_gib=self._kv_cache_gib(setup, rows, setup.max_len))
            parts["neighbours"] = lambda keep: neighbours.measure(
                beside, arms, found, workload, rows=rows, repeats=repeats, keep=keep
            )
        return parts

    def _roomy(self, setup: Setup) -> Setup:
        """Few rows, each with room for a long prompt or a long stream beside it. Raises ConfigurationError."""
        longest, positions = max(self.long_prompts), text_config(setup.folder).max_position_embeddings
        if longest + long_prompts.FEW_TOKENS > positions:
            raise ConfigurationError(
                f"long_prompts: {longest} and {long_prompts.FEW_TOKENS} new tokens are more than the {positions} "
                f"positions of {setup.model}"
            )
        length = min(positions, max(_LEAST_LONG_LEN, _whole_pages(longest + self.new_tokens)))
        kv_gib = self._kv_cache_gib(setup, long_prompts.ROWS, length)
        return replace(setup, max_batch_size=long_prompts.ROWS, max_len=length, kv_cache_gib=kv_gib)

    @staticmethod
    def _kv_cache_gib(setup: Setup, rows: int, length: int) -> int:
        return kv_cache_gib(text_config(setup.folder), rows=rows, length=length, dtype=setup.dtype)

    def _setup(self) -> Setup:
        common = self.model_setup()
        known = head_names(common["heads_dir"] or shipped_heads_folder(Path(common["model"]).name))
        rows = max(self.batch_sizes)
        length = _whole_pages(self.prompt_tokens + self.new_tokens)
        return Setup(
            **common,
            heads=self._heads(known),
            max_batch_size=rows,
            max_len=length,
            kv_cache_gib=kv_cache_gib(text_config(common["folder"]), rows=rows, length=length, dtype=common["dtype"]),
            gpu_memory_share=self.gpu_memory_share or round(0.9 / len({ARMS[arm].peer for arm in self.peers}), 3),
            peers_dir=self.peers_dir,
        )

    def _heads(self, known: Sequence[str]) -> tuple[str, ...]:
        """Raises ConfigurationError for a name that is not there."""
        for name in self.heads or ():
            if name not in known:
                raise ConfigurationError(f"heads: there is no {name!r}; there are {', '.join(known) or 'none'}")
        return tuple(self.heads or known)

    def _workload(self, setup: Setup) -> Workload:
        tokenizer: Any = AutoTokenizer.from_pretrained(setup.folder)
        text = "\n\n".join(prompt.text for prompt in read_prompts(None))
        corpus = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Workload(corpus, self.prompt_tokens, self.new_tokens, self.seed)

    def _load(self) -> online.Load:
        ttft_s, itl_s = self.ttft_objective_ms / 1000, self.itl_objective_ms / 1000
        return online.Load(self.rates, self.num_requests, self.repeats, ttft_s=ttft_s, itl_s=itl_s)

    def _settings(self, setup: Setup) -> dict[str, Any]:
        """Everything that the figures depend on, as it was in the end."""
        given = self.model_dump(mode="json", exclude={"out", "render", "into", "model", "device", "dtype"})
        resolved = {"device": setup.device, "dtype": setup.dtype, "heads": list(setup.heads), "max_len": setup.max_len}
        return {**given, **resolved, "kv_cache_gib": setup.kv_cache_gib, "gpu_memory_share": setup.gpu_memory_share}


def _has_server(arm: str) -> bool:
    return PEERS[ARMS[arm].peer].server is not None


def _whole_pages(num_tokens: int) -> int:
    return -(-num_tokens // _PAGE_TOKENS) * _PAGE_TOKENS
