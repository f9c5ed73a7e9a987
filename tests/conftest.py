"""Tiny random models of several architectures, a byte-level tokenizer, and random heads: all made here, offline."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from server.cli import main
from server.control.ascent import ascend
from server.control.group_edit import GroupStats
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.engines.embedded.sequence import Sequence
from server.types import FinishReason, GenerationChunk, GenerationRequest
from value_models.heads import FieldHead, LinearHead, MLPHead, ValueHead, head_from_tensors
from value_models.store import BaseModelCard, HeadCard, architecture_card, save_head

HIDDEN = 32
VOCAB = 258
EOS = 256
_SHARED = {"vocab_size": VOCAB, "bos_token_id": 257, "eos_token_id": EOS, "pad_token_id": EOS}
_ROPE = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, **_SHARED}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**_ROPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_ROPE, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**_ROPE, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    # Heads wide enough for the native kernels, which take bfloat16 only.
    "wide_llama": lambda: LlamaConfig(**_ROPE, head_dim=32, tie_word_embeddings=True),
    "wide_qwen2": lambda: Qwen2Config(**{**_ROPE, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "gpt2": lambda: GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=256, **_SHARED),
}
LONGEST = [
    "test_real_model.py", "architectures/test_judged.py", "engines/test_levels.py", "api/test_schema.py",
    "pages/test_examples.py", "engines/test_takeover.py", "soak/test_soak.py", "api/test_process_faults.py",
    "test_second_model.py", "engines/checkpoint/test_gguf.py", "clients/test_javascript.py", "clients/test_litellm.py",
    "control/test_steering.py", "benchmarks/speed/test_own_engine.py", "pages/test_site.py",
]  # fmt: skip
"""Files that take half a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that processes that share files out end together.

    Of tests with one id those run only one, and say nothing of the others.
    """
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    twice = [nodeid for nodeid, count in Counter(item.nodeid for item in items).items() if count > 1]
    if twice:
        raise pytest.UsageError(f"several tests have the id {twice[0]}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of vLLM or Triton need it; `make test-vllm` sets RECONTROL_REQUIRE_VLLM, so that nothing there is skipped,
    and `make test-gpu-kernels` RECONTROL_REQUIRE_TRITON."""
    for package, target in (("vllm", "test-vllm"), ("triton", "test-gpu-kernels")):
        if item.get_closest_marker(package) and not importlib.util.find_spec(package):
            if os.environ.get(f"RECONTROL_REQUIRE_{package.upper()}"):
                pytest.fail(f"{package} is not installed; `make {target}` installs it")
            pytest.skip(f"{package} is not installed here; `make {target}` runs this")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 256 ends a text, 257 begins one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def make_model_folder(folder: Path, architecture: str = "llama") -> Path:
    """A random model as any user's folder would be: config, safetensors, tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that tokens differ and attention matters.
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that runs in this process sets logging up anew, on a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = make_model_folder(tmp_path_factory.mktemp("models") / architecture, architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def roomy_folder(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama's folder with room for longer texts, such as what tools are told by."""
    folder = shutil.copytree(model_folder("llama"), tmp_path_factory.mktemp("roomy") / "llama-roomy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="session")
def fine_tune(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama's folder with all weights a little changed, under another name."""
    folder = shutil.copytree(model_folder("llama"), tmp_path_factory.mktemp("tuned") / "llama-tuned")
    weights = {name: tensor * 1.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def load_tiny(model_folder: Callable[[str], Path]) -> Callable[..., LoadedModel]:
    def load(architecture: str = "llama", dtype: str = "float32", device: str = "cpu") -> LoadedModel:
        return load_model(str(model_folder(architecture)), device=device, dtype=dtype)

    return load


@pytest.fixture(scope="session")
def workshop(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Flags that name a tiny model, and a folder with rollouts of it and a head trained on them."""
    folder = tmp_path_factory.mktemp("workshop")
    prompts = folder / "prompts.jsonl"
    lines = [{"id": f"p{i}", "format": "text" if i % 4 else "chat", "prompt": f"prompt {i}"} for i in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--model", str(model_folder("llama")), "--dtype", "float32", "--device", "cpu"]
    common = ["--prompts", str(prompts)]
    out = ["--out", str(folder / "rollouts")]
    assert main(["rollouts", *flags, *common, *out, "--num-samples", "2", "--max-tokens", "8"]) == 0
    train = ["train", "--name", "short", "--reward", "brevity", "--rollouts", str(folder / "rollouts"), *common]
    assert main([*train, "--out", str(folder / "heads")]) == 0
    return flags, folder


def random_head(seed: int, *, widths: tuple[int, ...] = (16,), hidden_size: int = HIDDEN) -> MLPHead:
    """A head with a random metric, strong enough to move a tiny model's distribution."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    inputs = normal(widths[0] + 1, hidden_size) / hidden_size**0.5
    root = normal(hidden_size, hidden_size) / hidden_size**0.5
    return MLPHead(
        mean_D=normal(hidden_size) * 0.1,
        scale_D=normal(hidden_size).abs() + 0.5,
        inputs_UD=inputs,
        input_bias_U=torch.cat([torch.zeros(1), normal(widths[0]) * 0.1]),
        ascent_UD=inputs @ (root @ root.T),
        hidden_weights=[normal(b, a) / a**0.5 for a, b in itertools.pairwise(widths)],
        hidden_biases=[normal(b) * 0.1 for b in widths[1:]],
        out_weight_H=normal(widths[-1]),
        out_bias=normal(1)[0],
        reward_mean=0.3,
        reward_scale=2.0,
    )


def plain_gradient(head: ValueHead, hidden_BD: Tensor) -> Tensor:
    """Of the value by the state, [B, D] in reward units: what a head's closed-form slopes come to."""
    _, slope_BU = head.readout(head.units(hidden_BD))
    return slope_BU @ head.folded_inputs()[0] * head.reward_scale


def edited_states(hidden_BD: Tensor, stats: list[GroupStats]) -> Tensor:
    """The states whose logits an editor gave: each row's ascent, as far as the editor reports that it went."""
    edited_BD = hidden_BD.clone()
    for group_stats in stats:
        ascent, rows = ascend(hidden_BD, group_stats.group), list(group_stats.group.rows)
        whole_R = ascent.shift_ratio_R[: len(rows)]
        share_R = torch.where(whole_R > 0, group_stats.shift_ratio_R[: len(rows)] / whole_R, 0.0)
        edited_BD[rows] += share_R[:, None] * ascent.shift_RD[: len(rows)]
    return edited_BD


def on_device(head: ValueHead, device: str) -> ValueHead:
    """As if it had been loaded there: the layers are packed for their device when a head is made."""
    return head_from_tensors(head.type_name, {name: tensor.to(device) for name, tensor in head.state_dict().items()})


def write_heads(folder: Path, heads: dict[str, ValueHead], identity: dict[str, Any]) -> Path:
    for name, head in heads.items():
        save_head(folder / name, head, card_of(name, head, identity))
    return folder


def card_of(
    name: str, head: ValueHead, identity: dict[str, Any] | None = None, *, ascent_gain: float | None = None
) -> HeadCard:
    """`ascent_gain`, if given, is over responses of 50 tokens."""
    identity = identity or {"name": "tiny", "hidden_size": head.hidden_size}
    data = {"tokens": 200, "responses": {"train": 3, "validation": 1}}
    return HeadCard(
        name=name, description="random", base_model=BaseModelCard(**identity),
        architecture=architecture_card(head), normalisation="random", metric="random", reward="none",
        reward_mean=head.reward_mean, reward_scale=head.reward_scale, targets="none", command="pytest",
        data={} if ascent_gain is None else data,
        validation={} if ascent_gain is None else {"ascent_gain": ascent_gain},
    )  # fmt: skip


def random_linear_head(seed: int) -> LinearHead:
    rng = torch.Generator().manual_seed(seed)
    return LinearHead(
        mean_D=torch.zeros(HIDDEN),
        scale_D=torch.ones(HIDDEN),
        inputs_UD=torch.randn(1, HIDDEN, generator=rng),
        input_bias_U=torch.zeros(1),
    )


def random_field_head(seed: int, *, num_features: int = 3) -> FieldHead:
    """Its features are large enough for some of them to be cut."""
    rng = torch.Generator().manual_seed(seed)
    return FieldHead(
        mean_D=torch.zeros(HIDDEN),
        scale_D=torch.ones(HIDDEN),
        inputs_UD=torch.randn(num_features + 1, HIDDEN, generator=rng) / 2,
        input_bias_U=torch.zeros(num_features + 1),
        ascent_UD=torch.randn(num_features + 1, HIDDEN, generator=rng),
    )


@pytest.fixture(scope="session")
def heads() -> dict[str, ValueHead]:
    return {
        "good": random_head(1),
        "deep": random_head(2, widths=(16, 12)),
        "line": random_linear_head(3),
    }


@pytest.fixture
def make_core(load_tiny: Callable[..., LoadedModel], heads: dict[str, ValueHead]) -> Callable[..., EngineCore]:
    def make(architecture: str = "llama", *, dtype: str = "float32", device: str = "cpu", **options: Any) -> EngineCore:
        options = {"max_batch_size": 8, "prefill_chunk_tokens": 64, **options}
        registry = HeadRegistry({name: on_device(head, device) for name, head in heads.items()})
        return EngineCore(load_tiny(architecture, dtype, device), registry, **options)

    return make


@pytest.fixture
def core(make_core: Callable[..., EngineCore]) -> EngineCore:
    return make_core()


class Collected:
    """What one choice gave."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.chunks: list[GenerationChunk] = []
        self.finish_reasons: list[FinishReason] = []

    def add(self, chunk: GenerationChunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.chunks.append(chunk)
        if chunk.finish_reason is not None:
            self.finish_reasons.append(chunk.finish_reason)


Results = dict[tuple[str, int], Collected]


def run(
    core: EngineCore,
    requests: list[GenerationRequest],
    *,
    steps_between: int = 0,
    after_step: Callable[[EngineCore], object] = lambda _: None,
) -> Results:
    """Drive requests to their end, one joining every `steps_between` steps (0: all at once)."""
    results: Results = {}
    pending = list(requests)
    while pending or core.has_work:
        while pending:
            request = pending.pop(0)

            def emit(chunk: GenerationChunk, request_id: str = request.request_id) -> None:
                results.setdefault((request_id, chunk.index), Collected()).add(chunk)

            core.add(core.sequences(request, emit))
            if steps_between:
                break
        for _ in range(max(steps_between, 1)):
            core.step()
            after_step(core)
    return results


def waiting_again(core: EngineCore) -> list[Sequence]:
    """Sequences that have run and given their pages up."""
    return [sequence for sequence in core._scheduler.waiting if sequence.scheduled_s]


def control(weights: dict[str, float], **options: Any) -> ControlParams:
    return ControlParams.model_validate({"objective": {"weights": weights}, **options})
