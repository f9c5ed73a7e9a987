"""GGUF files: converted to what was written into them, kept, made anew when they change, or refused in one line."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from server.engines.checkpoint import gguf as conversion
from server.engines.checkpoint.manifest import CONVERSION_VERSION
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.checkpoint.packaged import PACKAGED_MODELS, packaged_model_folder
from server.engines.embedded.model.loader import load_model
from server.errors import ModelLoadError
from server.settings import DEFAULT_MODEL
from tests.conftest import CONFIGS
from tests.engines.checkpoint.gguf_files import TEMPLATE, random_model, write_gguf

ROPE: dict[str, Any] = CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": False}
ROPE = {key: ROPE[key] for key in (
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
HEADS_OF_16 = {"attention.key_length": 16, "attention.value_length": 16}
OF_EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}
GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
OF_GEMMA = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 16}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
WINDOWED = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
# The architecture in GGUF, the model, and what the file says beside its sizes.
MODELS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "llama": ("llama", lambda: tf.LlamaConfig(**ROPE), {}),
    "qwen2": ("qwen2", lambda: tf.Qwen2Config(**ROPE), {}),
    "qwen2, yarn": ("qwen2", lambda: tf.Qwen2Config(**ROPE, rope_parameters=YARN),
                    {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                     "rope.scaling.original_context_length": 64}),
    "qwen2, yarn between other lengths": (
        "qwen2", lambda: tf.Qwen2Config(**ROPE, rope_parameters={**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
         "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_ext_factor": 1.0,
         "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0}),
    "qwen2, a factor without a type": (
        "qwen2", lambda: tf.Qwen2Config(**ROPE, rope_parameters={**LINEAR, "factor": 2.0}),
        {"rope.scaling.factor": 2.0}),
    "qwen2, a factor that is not used": (
        "qwen2", lambda: tf.Qwen2Config(**ROPE), {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}),
    "qwen3": ("qwen3", lambda: tf.Qwen3Config(**ROPE, head_dim=16), HEADS_OF_16),
    "qwen2moe": ("qwen2moe", lambda: tf.Qwen2MoeConfig(**ROPE, **EXPERTS, shared_expert_intermediate_size=40),
                 {**OF_EXPERTS, "expert_shared_feed_forward_length": 40}),
    "qwen3moe": ("qwen3moe", lambda: tf.Qwen3MoeConfig(**ROPE, **EXPERTS, head_dim=16, norm_topk_prob=True),
                 {**OF_EXPERTS, **HEADS_OF_16}),
    "gemma2": ("gemma2", lambda: tf.Gemma2Config(**ROPE, **GEMMA, final_logit_softcapping=20.0),
               {**OF_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 20.0}),
    "gemma3": ("gemma3", lambda: tf.Gemma3TextConfig(**{**ROPE, "num_hidden_layers": 7}, **GEMMA,
                                                     rope_parameters=WINDOWED),
               {**OF_GEMMA, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    "phi3": ("phi3", lambda: tf.Phi3Config(**ROPE), {}),
    "starcoder2": ("starcoder2", lambda: tf.Starcoder2Config(**ROPE, rope_parameters={"rope_theta": 5e4}), {}),
    "stablelm": ("stablelm", lambda: tf.StableLmConfig(**ROPE), {"use_parallel_residual": False,
                                                                 "rope.dimension_count": 2}),
    "gpt2": ("gpt2", CONFIGS["gpt2"], {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models" / "gguf"


@pytest.fixture
def llama() -> Any:
    return random_model(AutoModelForCausalLM.from_config(tf.LlamaConfig(**ROPE)))


def loaded(path: Path) -> Any:
    return load_model(str(path), device="cpu", dtype="float32")


@pytest.mark.parametrize("case", MODELS)
def test_a_file_is_served_as_the_model_that_was_written_into_it(case: str, tmp_path: Path) -> None:
    architecture, config, metadata = MODELS[case]
    model = random_model(AutoModelForCausalLM.from_config(config()))
    path = write_gguf(tmp_path / "model.gguf", architecture, model, metadata, ggml__pre="gpt-2")
    token_ids = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(path).model(token_ids).logits, model(token_ids).logits)


def test_llama_3s_rotations_come_out_of_the_factors_that_a_file_has_instead(tmp_path: Path) -> None:
    sizes = {**ROPE, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    rotation = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    smooth = ((8192 / (2 * math.pi * 1e4 ** (np.arange(0, 64, 2) / 64)) - 1) / 3).clip(0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    model = AutoModelForCausalLM.from_config(tf.LlamaConfig(**sizes))
    options = {"ggml__pre": "llama-bpe"}
    path = write_gguf(tmp_path / "a.gguf", "llama", model, more={"rope_freqs.weight": factors}, **options)
    assert loaded(path).model.config.rope_parameters == rotation
    path = write_gguf(tmp_path / "b.gguf", "llama", model, more={"rope_freqs.weight": factors * 1.1}, **options)
    with pytest.raises(ModelLoadError, match="one by one"):
        loaded(path)


def test_a_folder_of_one_file_is_that_file_and_of_several_is_refused_by_their_names(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_gguf(folder / "a-Q8_0.gguf", "llama", llama)
    assert (loaded(folder).name, loaded(path).name) == ("folder", "a-Q8_0")
    assert loaded(folder).identity["fingerprint"] == loaded(path).identity["fingerprint"]
    path.rename(folder / "blob")
    assert loaded(folder / "blob").name == "blob"
    for name in ("b.gguf", "c.gguf"):
        (folder / name).write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"several GGUF files: b\.gguf, c\.gguf"):
        loaded(folder)


def test_a_file_is_converted_once_and_again_when_it_changes(
    llama: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    first = loaded(path).identity["fingerprint"]
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_as_folder", lambda *_: pytest.fail("converted again"))
        assert loaded(path).identity["fingerprint"] == first
        assert ModelFiles.of(str(path)).identity["fingerprint"] == first
    with torch.no_grad():
        llama.model.norm.weight.add_(1)
    write_gguf(path, "llama", llama)
    assert loaded(path).identity["fingerprint"] != first
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 1


def test_a_conversion_that_has_been_changed_is_not_served(llama: Any, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    assert loaded(path)
    (weights,) = cache.glob("*/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, (1.0, 1.0))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is not as it was converted"):
        loaded(path)


def test_a_conversion_that_is_stopped_leaves_nothing(
    llama: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)

    def stopped(file: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_as_folder", stopped)
        with pytest.raises(KeyboardInterrupt):
            loaded(path)
    assert not [folder for folder in cache.iterdir() if folder.is_dir()]
    assert loaded(path)


def test_what_others_may_write_is_not_trusted(llama: Any, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    assert loaded(path)
    (folder,) = (folder for folder in cache.iterdir() if folder.is_dir())
    assert cache.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(ModelLoadError, match="not trusted"):
        loaded(path)
    folder.chmod(0o755)
    (folder / "config.json").chmod(0o664)
    with pytest.raises(ModelLoadError, match=r"config\.json is another user's, or others may write"):
        loaded(path)


def test_a_packaged_models_folder_that_others_may_write_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path))
    packaged = PACKAGED_MODELS[DEFAULT_MODEL]
    folder = tmp_path / "models" / f"{packaged.name}-{packaged.version}-{CONVERSION_VERSION}"
    folder.mkdir(parents=True)
    (folder / "config.json").touch(0o644)
    folder.chmod(0o755)
    assert packaged_model_folder(packaged) == folder
    folder.chmod(0o777)
    with pytest.raises(ModelLoadError, match="not trusted"):
        packaged_model_folder(packaged)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_quantized_and_half_weights_are_what_they_stand_for(kind: str, llama: Any, tmp_path: Path) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, quantization=quantization)
    name, values = "model.layers.1.mlp.up_proj.weight", llama.model.layers[1].mlp.up_proj.weight.detach().numpy()
    due = torch.from_numpy(gguf.dequantize(gguf.quantize(values, quantization), quantization).copy())
    got = loaded(path).model.state_dict()[name]
    assert torch.equal(got, due if kind == "F16" else due.bfloat16().float())


def test_the_tokenizer_has_the_files_tokens_and_no_others(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "model.gguf", "llama", llama, tokens=("<|im_end|>",), chat_template=TEMPLATE,
        ggml__add_bos_token=True, ggml__pre="smollm",
    )  # fmt: skip
    model = loaded(path)
    tokenizer: Any = model.tokenizer
    assert max(tokenizer.get_vocab().values()) == 257
    assert tokenizer.convert_ids_to_tokens(tokenizer("he<|im_end|>")["input_ids"]) == ["<bos>", "he", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE
    assert model.eos_token_ids == {tokenizer.eos_token_id, 250}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts of Mixtral": ({"metadata": {"expert_count": 8}}, "llama.expert_count = 8"),
    "a scaling that is not read": ({"metadata": {"rope.scaling.type": "longrope"}}, "rotations by 'longrope'"),
    "a tensor without a place": ({"more": {"blk.0.extra.weight": np.zeros(3, np.float32)}}, r"holds blk\.0\.extra"),
    "another width": ({"metadata": {"feed_forward_length": 96}}, "has shape"),
    "rules that are not known": ({"ggml__pre": "chameleon"}, "by the rules 'chameleon'"),
    "a tokenizer that is not known": ({"ggml__model": "rwkv"}, "cannot be converted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_followed_is_refused(case: str, llama: Any, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, **options)
    with pytest.raises(ModelLoadError, match=words) as caught:
        loaded(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


YARN_OF_4 = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
LINEAR_OF_4 = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
NOT_COMPUTED: dict[str, tuple[dict[str, Any], str]] = {
    "YaRN's factor of attention": ({**YARN_OF_4, "rope.scaling.yarn_attn_factor": 0.5}, "scaling.yarn_attn_factor = 0"),
    "a factor of attention": ({**YARN_OF_4, "rope.scaling.attn_factor": 2.0}, r"qwen2\.rope\.scaling\.attn_factor = 2"),
    "linear and attention": ({**LINEAR_OF_4, "rope.scaling.attn_factor": 2.0}, "scaling.attn_factor = 2.*linear"),
    "attention and no scaling": ({"rope.scaling.attn_factor": 2.0}, "scaling.attn_factor = 2"),
    "half of YaRN": ({**YARN_OF_4, "rope.scaling.yarn_ext_factor": 0.5}, "scaling.yarn_ext_factor = 0.5"),
    "YaRN mixed into linear": ({**LINEAR_OF_4, "rope.scaling.yarn_ext_factor": 1.0}, "scaling.yarn_ext_factor = 1"),
    "a logarithm": ({**YARN_OF_4, "rope.scaling.yarn_log_multiplier": 0.1}, "scaling.yarn_log_multiplier = 0.1"),
    "a key that is not known": ({**LINEAR_OF_4, "rope.scaling.alpha": 3.0}, "scaling.alpha = 3"),
    "linear by nothing": ({"rope.scaling.type": "linear"}, r"no qwen2\.rope\.scaling\.factor; it must be a positive"),
    "YaRN by nothing": ({"rope.scaling.type": "yarn"}, r"no qwen2\.rope\.scaling\.factor"),
    "linear by 0": ({**LINEAR_OF_4, "rope.scaling.factor": 0.0}, "scaling.factor is 0.0; it must be a positive number"),
    "a factor that is text": ({**LINEAR_OF_4, "rope.scaling.factor": "x"}, "scaling.factor is 'x'; .* number\\.$"),
    "a length that is text": ({**YARN_OF_4, "rope.scaling.original_context_length": "x"}, "original_context_length is"),
    "a beta of 0": ({**YARN_OF_4, "rope.scaling.yarn_beta_fast": 0.0}, "yarn_beta_fast is 0.0"),
    "no heads": ({"attention.head_count": 0}, r"qwen2\.attention\.head_count is 0; it must be a whole number from 1"),
    "no heads of keys": ({"attention.head_count_kv": 0}, "attention.head_count_kv is 0"),
    "no width": ({"embedding_length": 0}, "embedding_length is 0"),
    "layers that are text": ({"block_count": "x"}, "block_count is 'x'"),
    "three positions": ({"context_length": 3}, "context_length is 3; it must be a whole number from 16"),
    "a length of text": ({"context_length": "x"}, "context_length is 'x'"),
    "a base of 0": ({"rope.freq_base": 0.0}, "rope.freq_base is 0.0; it must be a positive number"),
    "a base of text": ({"rope.freq_base": "x"}, "rope.freq_base is 'x'"),
}


@pytest.mark.parametrize("case", NOT_COMPUTED)
def test_a_key_that_cannot_be_followed_is_named_before_anything_is_converted(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata, words = NOT_COMPUTED[case]
    model = AutoModelForCausalLM.from_config(tf.Qwen2Config(**ROPE))
    path = write_gguf(tmp_path / "model.gguf", "qwen2", model, metadata)
    with pytest.raises(ModelLoadError, match=words) as caught:
        loaded(path)
    assert str(path) in str(caught.value)
    assert "Converting" not in caplog.text


def test_a_conversion_draws_no_bars(llama: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    capfd.readouterr()
    conversion.write_as_folder(path, tmp_path / "folder")
    assert "%|" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"split__count": "x"}, "split.count is 'x'; it must be a whole number"),
        ({"general__type": "a" * 10_000}, "type 'a"),
        ({"tokenizer__ggml__eot_token_id": "x"}, r"tokenizer.ggml.eot_token_id is 'x'; it must be a whole number"),
        ({"tokenizer__ggml__eom_token_id": [1]}, r"tokenizer.ggml.eom_token_id is \[1\]; it must be a whole number"),
    ],
)
def test_what_a_file_says_is_checked_and_told_in_part(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        loaded(header_only(tmp_path / "model.gguf", "llama", **metadata))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("alignment", [0, "x"])
def test_a_file_whose_tensors_are_aligned_to_nothing_is_refused(alignment: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="damaged"):
        loaded(header_only(tmp_path / "model.gguf", "llama", general__alignment=alignment))


@pytest.mark.parametrize("length", [0, 10, 100, 3000, 50_000])
def test_a_cut_file_is_refused_before_anything_is_converted(length: int, llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    os.truncate(path, length)
    with pytest.raises(ModelLoadError, match=r"is cut|is not a GGUF file"):
        loaded(path)


def header_only(path: Path, architecture: str, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint16)
        add(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "metadata", "words"),
    [("rwkv7", {}, r"architecture 'rwkv7'.*it reads .*llama"), ("clip", {}, "not of a whole language model"),
     ("llama", {"general__type": "adapter"}, "of the type .adapter"), ("llama", {}, "has no tokenizer"),
     ("llama", {"split__count": 3}, "one of 3 parts.*llama-gguf-split --merge"), ("t5", {}, "has no tokenizer")],
)  # fmt: skip
def test_files_of_other_kinds_say_so(tmp_path: Path, architecture: str, metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        loaded(header_only(tmp_path / "model.gguf", architecture, **metadata))


def test_text_by_the_name_of_a_gguf_a_pointer_and_a_newer_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, words in (
        (b"<html>not found</html>" * 9, "not a GGUF file"),
        (b"version https://git-lfs", "only a pointer"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(64), "version 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=words):
            loaded(path)


def test_a_file_is_read_through_once(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 262,144 takes seconds."""
    reader, read = conversion.QuickReader, list[str]()

    def reading(path: str) -> Any:
        read.append(path)
        return reader(path)

    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    monkeypatch.setattr(conversion, "QuickReader", reading)
    loaded(path)
    assert read == [str(path)]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_the_quick_reader_reads_what_gguf_s_own_reads(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, quantization=gguf.GGMLQuantizationType.Q8_0)
    quick, own = conversion.QuickReader(path), gguf.GGUFReader(path)
    assert {key: field.contents() for key, field in quick.fields.items()} == {
        key: field.contents() for key, field in own.fields.items()
    }
    for mine, theirs in zip(quick.tensors, own.tensors, strict=True):
        assert mine.name == theirs.name
        assert np.array_equal(mine.data, theirs.data)
    assert type(quick.data) is np.ndarray


def test_a_disk_without_room_is_said_before_it_is_full(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ModelLoadError, match="RECONTROL_CACHE_DIR"):
        loaded(path)


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_the_file_in_a_package_is_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's: whichever it is, both ways end in `write_as_folder`."""
    packaged = PACKAGED_MODELS[DEFAULT_MODEL]
    path = tmp_path / f"{packaged.name}.gguf"
    with path.open("wb") as whole:
        for module in packaged.modules:
            folder = Path(str(importlib.util.find_spec(module).origin)).parent  # type: ignore[union-attr]
            for part in sorted(folder.glob(packaged.pattern)):
                whole.write(part.read_bytes())
    mine = loaded(path)
    monkeypatch.delenv("RECONTROL_CACHE_DIR")
    theirs = loaded(packaged_model_folder(packaged))
    assert mine.identity == theirs.identity | {"name": packaged.name}
    assert mine.eos_token_ids == theirs.eos_token_ids
    weights = theirs.model.state_dict()
    assert all(torch.equal(values, weights[key]) for key, values in mine.model.state_dict().items())
    text = "12345 bottles, he said:\n\tüber  <|im_start|>user"
    assert mine.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
