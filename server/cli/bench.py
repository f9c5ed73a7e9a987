"""`recontrol bench`: this server's engine and its peers, measured by turns in one run."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from transformers import AutoConfig, AutoTokenizer

from benchmarks.sections import replace_sections
from server.bench import long_prompts, neighbours, offline, online, steps, system
from server.bench.models import head_names, kv_cache_gib, model_folder, random_model
from server.bench.peers import ARMS, BESIDE_VLLM, PEERS, Found, find, missing
from server.bench.process import PeerError
from server.bench.report import section_prefix, sections
from server.bench.setup import Setup
from server.bench.soak import run as soak
from server.bench.workload import Workload
from server.cli.command import Command, command_line, read_prompts
from server.engines.embedded.model.loader import resolve_device, resolve_dtype
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL
from value_models.store import shipped_heads_folder
from value_models.whole_files import write_text

_PAGE_TOKENS = 128
Part = Literal["offline", "online", "step", "quantization", "long", "neighbours"]
_USUAL_PARTS: list[Part] = ["offline", "online", "step", "quantization"]
_PROFILED_ROWS = 32
_LEAST_LONG_LEN = 1024
_Positive = Annotated[int, Field(ge=1)]


class Bench(Command):
    """Measure this server's engine and its peers by turns: tokens a second, and streams over HTTP.

    Every peer gets the same model, prompts, precision, threads and sampling (temperature 1, no filters, no early end)
    in a process of its own, which is frozen while others are measured. `make peers` installs the peers; one that is
    not there is named and left out.
    """

    model: str = Field(DEFAULT_MODEL, description="packaged model or local folder")
    random_weights: str | None = Field(
        None, description="instead of a model: random weights of a shape, a folder with config.json or a known name"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    heads_dir: Path | None = Field(None, description="folder of value heads; by default those shipped for the model")
    heads: list[str] | None = Field(
        None, description="comma-separated heads that controlled rows use; by default the first by name"
    )
    peers: list[str] = Field(
        [name for name in ARMS if name not in BESIDE_VLLM],
        description=f"comma-separated, of: {', '.join(ARMS)}; by default without {', '.join(BESIDE_VLLM)}",
    )
    only: list[Part] = Field(
        _USUAL_PARTS,
        description=f"comma-separated, of: {', '.join(get_args(Part))}; by default without the last two",
    )
    batch_sizes: list[_Positive] = Field([1, 8, 32, 64], description="comma-separated, of offline batches")
    rates: list[Annotated[float, Field(gt=0)]] = Field([1, 2, 4], description="comma-separated requests a second")
    num_requests: _Positive = Field(60, description="of one turn at one rate")
    repeats: _Positive = 5
    prompt_tokens: _Positive = 32
    new_tokens: _Positive = 64
    long_prompts: list[_Positive] = Field([512, 2048, 8000], description="comma-separated tokens, for the part `long`")
    neighbour_rows: _Positive = Field(32, description="of each batch of the part `neighbours`")
    ttft_objective_ms: float = Field(500, gt=0, description="first text of a good answer")
    itl_objective_ms: float = Field(100, gt=0, description="mean gap between texts of a good answer")
    threads: _Positive = Field(
        default_factory=system.usable_cores, description="that each peer computes with; by default one a core"
    )
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="that a peer which takes its cache beforehand may have; by default an equal share"
    )
    seed: int = 0
    soak: _Positive | None = Field(
        None,
        description="instead: so many mixed requests and faults at a real server; status 1 if any is lost",
    )
    peers_dir: Path = Field(Path(), description="folder with the environments of `make peers`")
    work: Path = Field(Path("runs/bench"), description="folder for made models, converted files and logs")
    out: Path | None = Field(None, description="JSON file to write, or with --render to read")
    render: bool = Field(False, description="measure nothing: print the tables of --out again")
    into: Path | None = Field(None, description="Markdown file whose bench sections are rewritten")
    label: str | None = Field(
        None,
        pattern="^[a-z0-9]+$",
        description="in the sections' names, bench-LABEL-..., so that a page can show several machines; gpu for a GPU",
    )

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        if unknown := [name for name in self.peers if name not in ARMS]:
            raise ValueError(f"peers: there is no {unknown[0]!r}; there are {', '.join(ARMS)}")
        if self.random_weights is not None and (given := {"model", "heads_dir"} & self.model_fields_set):
            raise ValueError(f"{min(given)}: --random-weights makes its own; leave it out")
        if self.render and self.out is None:
            raise ValueError("render: needs --out, the file to read")
        return self

    def cli_cmd(self) -> None:
        if self.into is not None and f"<!-- {(prefix := self._section_prefix())}-" not in self.into.read_text():
            # Said now, and not after an hour.
            raise ConfigurationError(f"into: {self.into} has no section `<!-- {prefix}-...: begin -->`")
        if self.render:
            assert self.out is not None
            result = json.loads(self.out.read_text())
        else:
            # Peers must not outlive this command, however it is ended.
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            try:
                result = self._measure()
            finally:
                signal.signal(signal.SIGTERM, before)
            self._write(result)
        bodies = sections(result)
        print("\n\n".join(bodies.values()))
        if self.into is not None:
            replace_sections(self.into, bodies)
        if failures := result.get("soak", {}).get("failures"):
            print("\n".join(failures), file=sys.stderr)
            sys.exit(1)

    def _section_prefix(self) -> str:
        """That of the sections to come; `bench` for a file that is rendered again, whose label it holds itself."""
        return "bench" if self.render else section_prefix(self.label, resolve_device(self.device).type)

    def _measure(self) -> dict[str, Any]:
        # A line for each request would take time from what is measured.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        setup = self._setup()
        if self.soak is not None:
            return self._soak(setup, self.soak)
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
            "command": command_line(),
            "model": setup.model,
            "settings": self._settings(setup),
            "system": system.facts(),
            "versions": {arm: found[ARMS[arm].peer].versions for arm in arms},
            "skipped": skipped,
        }
        if "online" in self.only:
            result["without_server"] = [arm for arm in arms if not _has_server(arm)]
        for part, measure in self._parts(setup, arms, found).items():
            if part not in self.only:
                continue
            try:
                result[part] = measure()
            except PeerError as error:
                # Of a look into our own engine; arms that fail say so in their figures.
                result[part] = {"failed": str(error)}
                print(f"{part} failed: {error}", flush=True)
            self._write(result)  # What has been measured outlives whatever happens to the rest.
        return result

    def _parts(self, setup: Setup, arms: list[str], found: dict[str, Found]) -> dict[str, Callable[[], dict[str, Any]]]:
        """What can be measured here, in this order."""
        workload, repeats = self._workload(setup), self.repeats
        serving = [arm for arm in arms if _has_server(arm)]
        parts: dict[str, Callable[[], dict[str, Any]]] = {}
        if arms:
            sizes = {"batch_sizes": self.batch_sizes, "repeats": repeats}
            parts["offline"] = lambda: offline.measure(setup, arms, found, workload, **sizes)
        if serving:
            parts["online"] = lambda: online.measure(setup, serving, found, workload, self._load())
        parts["step"] = lambda: steps.profile(setup, workload, rows=_PROFILED_ROWS)
        if setup.device == "cpu" and setup.dtype == "bfloat16":
            parts["quantization"] = lambda: steps.quantization_loss(setup, workload)
        if arms and "long" in self.only:
            lengths = {"lengths": self.long_prompts, "repeats": repeats}
            roomy = self._roomy(setup)
            parts["long"] = lambda: long_prompts.measure(roomy, arms, found, workload, **lengths)
        if arms:
            rows = self.neighbour_rows
            beside = replace(setup, max_batch_size=rows, kv_cache_gib=self._kv_cache_gib(setup, rows, setup.max_len))
            parts["neighbours"] = lambda: neighbours.measure(beside, arms, found, workload, rows=rows, repeats=repeats)
        return parts

    def _roomy(self, setup: Setup) -> Setup:
        """Few rows, each with room for a long prompt or a long stream beside it. Raises ConfigurationError."""
        longest, positions = max(self.long_prompts), _text_config(setup.folder).max_position_embeddings
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
        return kv_cache_gib(_text_config(setup.folder), rows=rows, length=length, dtype=setup.dtype)

    def _write(self, result: dict[str, Any]) -> None:
        if self.out is not None:
            write_text(self.out, json.dumps(result, indent=1) + "\n")

    def _soak(self, setup: Setup, count: int) -> dict[str, Any]:
        texts = [prompt.text for prompt in read_prompts(None)]
        return {
            "command": command_line(),
            "model": setup.model,
            "settings": {
                "label": self.label,
                **{name: getattr(setup, name) for name in ("device", "dtype", "threads", "seed")},
            },
            "system": system.facts(),
            "soak": soak.measure(setup, count=count, texts=texts),
        }

    def _setup(self) -> Setup:
        device = resolve_device(self.device)
        dtype = str(resolve_dtype(self.dtype, device)).removeprefix("torch.")
        if self.random_weights is not None:
            folder = random_model(self.random_weights, self.work, dtype=dtype, device=device.type, seed=self.seed)
            model, heads_dir = str(folder), folder / "heads"
        else:
            folder = model_folder(self.model)
            model, heads_dir = self.model, self.heads_dir
        known = head_names(heads_dir or shipped_heads_folder(Path(model).name))
        rows = max(self.batch_sizes)
        length = _whole_pages(self.prompt_tokens + self.new_tokens)
        return Setup(
            model=model,
            folder=folder.resolve(),
            heads_dir=heads_dir,
            heads=self._heads(known),
            device=device.type,
            dtype=dtype,
            threads=self.threads,
            max_batch_size=rows,
            max_len=length,
            kv_cache_gib=kv_cache_gib(_text_config(folder), rows=rows, length=length, dtype=dtype),
            gpu_memory_share=self.gpu_memory_share or round(0.9 / len({ARMS[arm].peer for arm in self.peers}), 3),
            seed=self.seed,
            peers_dir=self.peers_dir,
            work=self.work,
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


def _text_config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder).get_text_config()
