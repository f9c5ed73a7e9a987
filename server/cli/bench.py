"""`recontrol bench`: this server's engine and its peers, measured by turns in one run."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from transformers import AutoConfig, AutoTokenizer

from server.bench import offline, online, steps, system
from server.bench.models import head_names, kv_cache_gib, model_folder, random_model
from server.bench.peers import ARMS, BESIDE_VLLM, PEERS, Found, find, missing
from server.bench.report import sections
from server.bench.setup import Setup
from server.bench.soak import run as soak
from server.bench.workload import Workload
from server.cli.command import Command, command_line, read_prompts
from server.cli.report import replace_sections
from server.engines.embedded.model.loader import resolve_device, resolve_dtype
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL
from value_models.store import shipped_heads_folder
from value_models.whole_files import write_text

_PAGE_TOKENS = 128
Part = Literal["offline", "online", "step", "quantization"]
_PROFILED_ROWS = 32
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
    only: list[Part] = Field(list(get_args(Part)), description=f"comma-separated, of: {', '.join(get_args(Part))}")
    batch_sizes: list[_Positive] = Field([1, 8, 32, 64], description="comma-separated, of offline batches")
    rates: list[Annotated[float, Field(gt=0)]] = Field([1, 2, 4], description="comma-separated requests a second")
    num_requests: _Positive = Field(60, description="of one turn at one rate")
    repeats: _Positive = 5
    prompt_tokens: _Positive = 32
    new_tokens: _Positive = 64
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
        if self.into is not None and "<!-- bench-" not in self.into.read_text():
            # Said now, and not after an hour.
            raise ConfigurationError(f"into: {self.into} has no section `<!-- bench-...: begin -->`")
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
            if self.out is not None:
                write_text(self.out, json.dumps(result, indent=1) + "\n")
        bodies = sections(result)
        print("\n\n".join(bodies.values()))
        if self.into is not None:
            replace_sections(self.into, bodies)
        if failures := result.get("soak", {}).get("failures"):
            print("\n".join(failures), file=sys.stderr)
            sys.exit(1)

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
        workload = self._workload(setup)
        if arms and "offline" in self.only:
            sizes = {"batch_sizes": self.batch_sizes, "repeats": self.repeats}
            result["offline"] = offline.measure(setup, arms, found, workload, **sizes)
        serving = [arm for arm in arms if PEERS[ARMS[arm].peer].server is not None]
        if serving and "online" in self.only:
            result["online"] = online.measure(setup, serving, found, workload, self._load())
            result["without_server"] = [arm for arm in arms if arm not in serving]
        if "step" in self.only:
            result["step"] = steps.profile(setup, workload, rows=_PROFILED_ROWS)
        if "quantization" in self.only and setup.device == "cpu" and setup.dtype == "bfloat16":
            result["quantization"] = steps.quantization_loss(setup, workload)
        return result

    def _soak(self, setup: Setup, count: int) -> dict[str, Any]:
        texts = [prompt.text for prompt in read_prompts(None)]
        return {
            "command": command_line(),
            "model": setup.model,
            "settings": {name: getattr(setup, name) for name in ("device", "dtype", "threads", "seed")},
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
        length = -(-(self.prompt_tokens + self.new_tokens) // _PAGE_TOKENS) * _PAGE_TOKENS
        config = AutoConfig.from_pretrained(folder).get_text_config()
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
            kv_cache_gib=kv_cache_gib(config, rows=rows, length=length, dtype=dtype),
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
