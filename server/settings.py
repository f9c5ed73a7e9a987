"""The server's settings: one class whose fields are the flags, the environment variables and the file's keys.

`--max-batch-size 64`, `RECONTROL_MAX_BATCH_SIZE=64` and `max_batch_size = 64` in the TOML file that RECONTROL_CONFIG
names mean the same; a flag wins over the environment, and that over the file. Read once, at start.
"""

from __future__ import annotations

import os
import re
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from server.environment import service_links

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
KV_CACHE_GIB = (
    "memory for keys and values; by default half of what the machine has or its control group (container) allows, "
    "nine tenths of what a GPU has free"
)
ALLOW_OTHER_BASE = "serve, with a warning, heads made for another model of this hidden size, as a fine-tune's base"
"""What the flags of these names do, for every command that has them."""
PINNED_REFUSES = ("logit_bias", "repetition_penalty", "temperature", "presence_penalty", "frequency_penalty")
"""Fields that choose tokens behind the back of pinned control (server/api/pinned.py)."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VLLM_ONLY = ("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "vllm_options")
_EMBEDDED_ONLY = (
    "quantization", "prefill_chunk_tokens", "max_step_stretch", "kv_cache_high_water", "guardrail_replacement",
    "search_rewards",
)  # fmt: skip
_ONLY_IN = {"embedded": ("adapter", *_EMBEDDED_ONLY), "vllm": _VLLM_ONLY}
"""The settings that only this engine has."""
_NOT_IN = {"embedded": _VLLM_ONLY, "vllm": _EMBEDDED_ONLY, "fake": (*_EMBEDDED_ONLY, *_VLLM_ONLY)}
"""The settings that this engine refuses for no other reason than that it does not have them."""


def _as_text(location: Any) -> Any:
    return str(location) if isinstance(location, Path) else location


ReasoningFormat = Literal["auto", "none", "think", "mistral", "gemma", "granite", "cohere", "seed", "exaone", "kimi"]
HeadsLocation = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
"""A folder of value heads or the URL of one."""


def _split(listed: Any) -> Any:
    return [part.strip() for part in listed.split(",") if part.strip()] if isinstance(listed, str) else listed


def _origin(given: str) -> str:
    """As browsers send it. Raises ValueError for what none would send."""
    if given != "*" and not _ORIGIN.fullmatch(given):
        raise ValueError(f"{given!r} is no origin; allowed are https://host, http://host:port and *, without a path")
    return given


Origin = Annotated[str, AfterValidator(_origin)]


ToolCallFormat = Literal[
    "auto", "hermes", "qwen-xml", "llama", "mistral", "mistral-args", "pythonic", "smollm-python", "gemma",
    "functiongemma", "gemma4",
]  # fmt: skip
"""The names of `server.calls.formats.FORMATS`, and what finds one of them."""


def _address(given: str) -> str:
    """Raises ValueError."""
    try:
        return str(ip_network(given, strict=False)) if "/" in given else str(ip_address(given))
    except ValueError as error:
        raise ValueError(f"{given!r} is no IP address and no network such as 10.0.0.0/8") from error


Address = Annotated[str, AfterValidator(_address)]


def _host_name(given: str) -> str:
    """As in a Host header, without a port. Raises ValueError."""
    if given != "*" and not _HOST_NAME.fullmatch(given):
        raise ValueError(f"{given!r} is no name of a host; allowed are such as api.example, without a port, and *")
    return given.lower()


HostName = Annotated[str, AfterValidator(_host_name)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="RECONTROL_",
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    model: str = Field(DEFAULT_MODEL, description="folder, GGUF file or hub id of a causal language model")
    adapter: Path | None = Field(None, description="folder of a PEFT LoRA to merge in; needs recontrol[adapters]")
    served_model_name: str | None = Field(None, description="id in /v1/models; by default the model's last path part")
    heads_dir: HeadsLocation | None = Field(
        None, description="folder of value heads, or a URL of fsspec; by default those of the model"
    )
    allow_other_base: bool = Field(False, description=ALLOW_OTHER_BASE)
    heads_poll_s: float | None = Field(
        None, ge=1, description="look for changed heads in heads_dir every so many seconds; by default never"
    )
    engine: Literal["embedded", "vllm", "auto", "fake"] = Field(
        "embedded",
        description="vllm is for scale, needs recontrol[vllm]; auto takes it where a GPU, the package and the other "
        "settings allow it; fake answers without a model, for client tests",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto is bfloat16 where it is fast")
    tool_call_format: ToolCallFormat = Field("auto", description="how the model writes calls; auto asks its template")

    reasoning_format: ReasoningFormat = Field(
        "auto", description="how the model marks reasoning; auto reads the chat template, none tells nothing apart"
    )
    quantization: Literal["none", "int8", "int4"] = Field("none", description="bits of the weights, on a CPU")

    host: str = Field("127.0.0.1", description="address to bind; one that is not loopback needs keys")
    allow_public_bind: bool = Field(False, description="bind another address than loopback without keys")
    allowed_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="comma-separated origins whose pages may use the server from a browser, or *; by default none"
    )
    allowed_hosts: Annotated[tuple[HostName, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="comma-separated names by which a server without keys may be called, or *; addresses, names "
        "without a dot and .localhost, .local, .internal and .svc always may",
    )
    port: Annotated[int, Field(ge=0, le=65535, description="0 takes a free port")] = 8000
    max_body_bytes: Annotated[int, Field(ge=1024, description="larger request bodies get a 413")] = 2 * 2**20
    request_timeout_s: float | None = Field(
        None, gt=0, description="most time for a response, beyond it a 504; by default no limit"
    )
    guardrail_finish_reason: Literal["content_filter", "guardrail"] = Field(
        "content_filter", description="of what a guardrail ends; clients that know OpenAI's alone refuse the other"
    )
    search_rewards: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="comma-separated rewards that searches may go by: names of built-in ones, or NAME=REWARD with "
        "hf:FOLDER or module:function",
    )
    guardrail_replacement: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="text with which a guardrail ends responses whose on_stop is replace and has no text of its own",
    )
    stream_ping_s: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="silence on a stream that a comment breaks; 0 sends none"),
    ] = 15.0
    receive_timeout_s: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="most time for a request's headers, and again for its body"),
    ] = 60.0
    send_timeout_s: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="time after which a client that takes nothing is let go"),
    ] = 60.0
    keep_alive_s: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="time that a connection without a request stays open"),
    ] = 75.0
    """Above the 60 s of nginx and of clouds' load balancers: who closes first must not be the server, or a request that
    comes at that moment is lost."""
    max_connections: Annotated[int, Field(ge=1, description="one more closes the longest idle one")] = 2048
    shutdown_grace_s: Annotated[float, Field(ge=0, description="time for what runs when told to stop")] = 30.0

    api_keys: SecretStr | None = Field(None, description="keys, or sha256:<hex> of keys, between commas")
    api_keys_file: Path | None = Field(None, description="file with a key, or sha256:<hex> of one, on each line")
    management_keys: SecretStr | None = Field(None, description="keys for managing and training heads, which need one")
    management_keys_file: Path | None = Field(None, description="the same from a file")
    inspect_keys: SecretStr | None = Field(
        None, description="keys that may also see states and log-probabilities of prompts, from which heads can be read"
    )
    inspect_keys_file: Path | None = Field(None, description="the same from a file")
    allow_inspection: bool = Field(
        False, description="let every caller see those; without keys, on loopback, they do anyway"
    )
    public_metrics: bool = Field(False, description="serve /metrics without a key; else it needs a management key")
    cache_salt_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = Field(
        None,
        description="header in which a gateway names its caller: what is cached of prompts is shared by one name alone",
    )
    trusted_proxies: Annotated[tuple[Address, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="comma-separated addresses or networks whose X-Forwarded-For is believed; by default none"
    )
    playground: bool = Field(True, description="serve the page at / without a key; what it asks for needs one")
    requests_per_minute: int | None = Field(None, ge=1, description="of each key, beyond it a 429; by default no limit")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="of each key, prompt and new tokens; by default no limit"
    )
    concurrent_requests: int | None = Field(None, ge=1, description="of each key, beyond it a 429; by default no limit")
    rate_limit_storage: SecretStr | None = Field(
        None,
        description="redis:// URL where servers count the two rates together, by default each for itself; "
        "needs recontrol[redis]",
    )
    pinned_control: str | None = Field(None, description="control as JSON that callers cannot switch off")
    pinned_refuses: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        PINNED_REFUSES, description="comma-separated fields that a request may not use beside pinned control"
    )

    max_batch_size: Annotated[int, Field(ge=1, le=512, description="sequences decoded at once")] = 32
    max_model_len: int | None = Field(
        None, ge=16, description="prompt and new tokens of one sequence; by default what the model has"
    )
    max_waiting: Annotated[int, Field(ge=1, description="sequences that may wait; beyond it a 429")] = 1024
    prefill_chunk_tokens: Annotated[int, Field(ge=64, description="prompt tokens that a step computes at most")] = 256
    max_step_stretch: Annotated[
        float, Field(gt=1, allow_inf_nan=False, description="times as long as usual that prompts may make a step")
    ] = 2.0
    kv_cache_gib: float | None = Field(None, gt=0, allow_inf_nan=False, description=KV_CACHE_GIB)
    kv_cache_high_water: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of its pages beyond which those of remembered prompts are used again before fresh ones; by "
        "default half, and all on a GPU",
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, description="devices that share each layer, with vllm")] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1, description="devices with some layers each, with vllm")] = 1
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        None, description="how vllm starts its workers: ray for several machines"
    )
    vllm_options: dict[str, Any] = Field({}, description="more of vllm's engine arguments, as JSON")
    prefix_cache: bool = Field(True, description="keep computed prompts for later ones with the same beginning")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe lines that are logged"
    )
    log_format: Literal["text", "json"] = Field("text", description="json writes one object a line")
    otlp_endpoint: str | None = Field(None, description="traces go there, as http://host:4318/v1/traces; extra otel")
    vllm_metrics: bool = Field(False, description="/metrics has vLLM's names (vllm:*) as well")

    @model_validator(mode="after")
    def _bind_loopback_unless_told(self) -> Self:
        if self.has_keys or self.allow_public_bind or self.binds_loopback:
            return self
        raise ValueError(
            f"host: {self.host!r} is not a loopback address, and no keys are set. Set api_keys or api_keys_file, bind "
            "127.0.0.1, or set allow_public_bind where something in front of the server keeps strangers out"
        )

    @model_validator(mode="after")
    def _poll_a_folder_that_may_change(self) -> Self:
        if self.heads_poll_s is not None and self.heads_dir is None:
            raise ValueError("heads_poll_s: set heads_dir too; the heads that are shipped do not change")
        return self

    @model_validator(mode="after")
    def _share_rates_that_there_are(self) -> Self:
        has_rate = self.requests_per_minute is not None or self.tokens_per_minute is not None
        if self.rate_limit_storage is not None and not has_rate:
            raise ValueError("rate_limit_storage: set requests_per_minute or tokens_per_minute, which it is to hold")
        return self

    @model_validator(mode="after")
    def _merge_adapters_where_weights_are(self) -> Self:
        if self.adapter is not None and self.engine == "vllm":
            raise ValueError(
                "adapter: vLLM applies LoRA beside the weights, where value heads would read the states of the base "
                "model. Merge it first (peft's merge_and_unload), or use the engine embedded"
            )
        return self

    @model_validator(mode="after")
    def _fit_the_engine(self) -> Self:
        if self.engine == "auto":
            own, vllms = self.given_for("embedded"), self.given_for("vllm")
            if own and vllms:
                raise ValueError(
                    f"{own[0]}: only the engine embedded has this setting, and only vllm has {vllms[0]}; leave one out"
                )
            return self
        for name in _NOT_IN[self.engine]:
            if self._is_given(name):
                raise ValueError(f"{name}: the engine {self.engine} does not have this setting")
        return self

    def given_for(self, engine: Literal["embedded", "vllm"]) -> tuple[str, ...]:
        """The settings that are not at their defaults and that only this engine has."""
        return tuple(name for name in _ONLY_IN[engine] if self._is_given(name))

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default

    @property
    def has_keys(self) -> bool:
        keys = (self.api_keys, self.api_keys_file, self.inspect_keys, self.inspect_keys_file)
        return any(key is not None for key in keys)

    @property
    def binds_loopback(self) -> bool:
        return self.host == "localhost" or _is_loopback(self.host)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)
        links = {name.lower() for name in service_links(os.environ)}
        env_settings.env_vars = {name: value for name, value in env_settings.env_vars.items() if name not in links}
        file = os.environ.get("RECONTROL_CONFIG")
        return (init_settings, env_settings, *([_file_source(settings_cls, Path(file))] if file else []))


def _file_source(settings_cls: type[BaseSettings], path: Path) -> PydanticBaseSettingsSource:
    """Raises SettingsError."""
    if not path.is_file():
        raise SettingsError(f"RECONTROL_CONFIG: there is no file {path}")
    try:
        return TomlConfigSettingsSource(settings_cls, toml_file=path)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"RECONTROL_CONFIG: {path} is not TOML ({error})") from error


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
