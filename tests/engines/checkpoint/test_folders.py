"""Model folders as users bring them: served rightly, or refused in one line that names the path and what is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from server.cli import main
from server.control.registry import HeadRegistry
from server.engines.checkpoint.inspection import inspect
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.checkpoint.positions import max_len_of
from server.engines.checkpoint.source import find_checkpoint
from server.engines.checkpoint.weights import StoredTensor, refuse_wrong_tensors
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.engines.embedded.structure import SchemaCompiler
from server.errors import ModelLoadError
from server.types import GenerationRequest, SamplingParams
from tests.conftest import CONFIGS, byte_tokenizer, run
from tests.engines.checkpoint.conftest import Folder

POINTER = "version https://git-lfs.example/spec/v1\noid sha256:0\nsize 1\n".replace(".example", ".github.com")
Change = Callable[[Folder], object]


def drop(name: str) -> Change:
    return lambda folder: folder.write_tensors({k: v for k, v in folder.tensors().items() if k != name})


def add(name: str, *shape: int) -> Change:
    return lambda folder: folder.write_tensors({**folder.tensors(), name: torch.zeros(shape)})


def rename(pattern: str, to: str) -> Change:
    return lambda folder: folder.write_tensors({re.sub(pattern, to, k): v for k, v in folder.tensors().items()})


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda folder: folder.write_tensors({**folder.tensors(), name: folder.tensors()[name].to(dtype)})


def config(**values: Any) -> Change:
    return lambda folder: folder.write_json("config.json", **values)


def text(name: str, content: str) -> Change:
    return lambda folder: (folder.path / name).write_text(content)


def unlink(*names: str) -> Change:
    return lambda folder: [(folder.path / name).unlink() for name in names]


def cut(name: str, length: int) -> Change:
    return lambda folder: os.truncate(folder.path / name, length)


def longer(folder: Folder) -> None:
    folder.weights.write_bytes(folder.weights.read_bytes() + b"\0" * 9)


def pickled(folder: Folder) -> None:
    folder.weights.unlink()
    torch.save({"a": torch.zeros(1)}, folder.path / "pytorch_model.bin")


def pickle_by_another_name(folder: Folder) -> None:
    torch.save({"a": torch.zeros(1)}, folder.weights)


def sharded(folder: Folder, *, leave: str = "", extra: str = "", keep_single: bool = False, outside: str = "") -> None:
    tensors = folder.tensors()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    if not keep_single:
        folder.weights.unlink()
    for shard, held in shards.items():
        if shard != leave:
            folder.write_tensors({name: tensors[name] for name in held}, shard)
    if extra:
        weight_map[extra] = "model-1.safetensors"
    if outside:
        weight_map[names[0]] = outside
    folder.write_json("model.safetensors.index.json", metadata={}, weight_map=weight_map)


def not_finite(folder: Folder) -> None:
    tensors = folder.tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    folder.write_tensors(tensors)


def dangling(name: str) -> Change:
    def change(folder: Folder) -> None:
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).unlink(missing_ok=True)
        (folder.path / name).symlink_to("../blobs/gone")

    return change


def leftover_adapter(folder: Folder) -> None:
    folder.write_json("adapter_config.json", peft_type="LORA", base_model_name_or_path="base")


def pointer(name: str) -> Change:
    def change(folder: Folder) -> None:
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text(POINTER)

    return change


def folder_for(name: str) -> Change:
    return lambda folder: ((folder.path / name).unlink(), (folder.path / name).mkdir())


def rotated(**values: Any) -> Change:
    return config(rope_parameters=None, rope_scaling=values)


LAYER = "model.layers.1"
TEXTS = (
    "chat_template.jinja", "additional_chat_templates/tools.jinja", "vocab.json", "merges.txt", "tokenizer.model",
    "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
# What is done to a whole model's folder, and words of the line that refuses it.
REFUSED: dict[str, tuple[Change, str]] = {
    "no lm_head": (drop("lm_head.weight"), r"lacks lm_head\.weight"),
    "no down_proj": (drop(f"{LAYER}.mlp.down_proj.weight"), rf"lacks {LAYER}\.mlp\.down_proj\.weight"),
    "a bias missing": (drop(f"{LAYER}.self_attn.q_proj.bias"), r"q_proj\.bias"),
    "a layer too few in config": (config(num_hidden_layers=1, layer_types=None), rf"does not have: {LAYER}"),
    "a layer too many in config": (config(num_hidden_layers=3, layer_types=None), r"lacks model\.layers\.2"),
    "another width": (config(intermediate_size=96), r"shape \[32, 64\], and config.json asks for \[32, 96\]"),
    "another vocabulary": (config(vocab_size=300), r"shape \[258, 32\].*\[300, 32\]"),
    "TRL's value head": (rename("^", "pretrained_model."), "value head of TRL"),
    "a value head beside": (add("v_head.summary.weight", 1, 32), "value head of TRL"),
    "a reward head": (add("score.weight", 1, 32), "classifier or a reward model"),
    "LoRA beside the weights": (add(f"{LAYER}.self_attn.q_proj.lora_A.weight", 4, 32), "not merged.*--adapter"),
    "PEFT's names": (rename("^", "base_model.model."), "adapter that is not merged"),
    "a wrapper of compile": (rename("^", "_orig_mod."), "inside a wrapper"),
    "packed weights": (add(f"{LAYER}.mlp.up_proj.qweight", 4, 4), "quantized"),
    "scales": (add(f"{LAYER}.mlp.up_proj.weight_scale", 1), "quantized"),
    "integers": (cast(f"{LAYER}.mlp.up_proj.weight", torch.int8), "quantized.*as I8"),
    "a stranger": (add("model.surprise", 3), r"does not have: model\.surprise"),
    "a classifier": (config(architectures=["Qwen2ForSequenceClassification"]), "holds a classifier"),
    "a reward model": (config(architectures=["Qwen2ForRewardModel"]), "holds a reward model"),
    "an embedding": (config(architectures=["Qwen2Model"]), "without a language model's head"),
    "no model_type": (config(model_type=None), "has no model_type"),
    "an unknown model_type": (config(model_type="qwen99"), "does not know the model_type 'qwen99'"),
    "a picture's model": (config(model_type="vit", architectures=None), "no causal language model"),
    "an encoder": (config(model_type="bert", architectures=None), "holds an encoder"),
    "both halves": (config(model_type="bart", architectures=None), "encoder with a decoder"),
    "architectures no list": (config(architectures="Qwen2ForCausalLM"), "architectures must be a list"),
    "a size that is text": (config(hidden_size="big"), r"config\.json"),
    "an end that is text": (config(eos_token_id="</s>"), "eos_token_id is '</s>'"),
    "cut weights": (cut("model.safetensors", 5000), r"model\.safetensors is cut: it has 5000 bytes and should have"),
    "a cut header": (cut("model.safetensors", 100), "is cut"),
    "no byte of weights": (cut("model.safetensors", 0), "it has 0 bytes"),
    "bytes behind the weights": (longer, "is damaged"),
    "weights that are text": (text("model.safetensors", "not found\n" * 9), "not a safetensors file"),
    "a pointer": (text("model.safetensors", POINTER), "only a pointer.*git lfs pull"),
    "a pointer for the config": (text("config.json", POINTER), r"config\.json is only a pointer"),
    "a pointer for the tokenizer": (text("tokenizer.json", POINTER), r"tokenizer\.json is only a pointer"),
    "a pickle only": (pickled, r"pickles only \(pytorch_model\.bin\)"),
    "a pickle by another name": (pickle_by_another_name, "is a pickle"),
    "no weights": (unlink("model.safetensors"), "has no weights"),
    "weights by another name": (lambda f: f.weights.rename(f.path / "model.fp16.safetensors"), r"only model\.fp16"),
    "a shard missing": (lambda f: sharded(f, leave="model-2.safetensors"), r"names model-2\.safetensors, not there"),
    "a tensor in no shard": (lambda f: sharded(f, extra="model.gone"), r"no shard holds: model\.gone"),
    "two sets of weights": (lambda f: sharded(f, keep_single=True), "two sets of weights"),
    "a shard elsewhere": (lambda f: sharded(f, outside="../other.safetensors"), "outside the folder"),
    "an index without a map": (text("model.safetensors.index.json", "{}"), "weight_map"),
    "weights that are not numbers": (not_finite, rf"not finite numbers: {LAYER}\.mlp\.up_proj"),
    "an empty config": (text("config.json", ""), r"config\.json is empty"),
    "a config with a mark": (text("config.json", "\ufeff{}"), "not valid JSON.*BOM"),
    "a config that is a list": (text("config.json", "[1]"), "holds a JSON list"),
    "a config cut off": (text("config.json", '{"model_type": "qwen2"'), "not valid JSON"),
    "a broken generation config": (text("generation_config.json", "{"), r"generation_config\.json is not valid"),
    "code in the generation config": (text("generation_config.json", '{"auto_map": {}}'), "auto_map"),
    "weights named by the config": (config(transformers_weights="other.safetensors"), "transformers_weights"),
    "a link to nowhere": (dangling("model.safetensors"), "link to a file that is not there"),
    "a config that leads nowhere": (dangling("config.json"), "link to a file that is not there"),
    **{f"a pointer for {name}": (pointer(name), rf"{name} is only a pointer") for name in TEXTS},
    **{f"{name} that leads nowhere": (dangling(name), rf"{name} is a link to a file") for name in TEXTS},
    "a template that is a folder": (folder_for("chat_template.jinja"), "jinja cannot be read"),
    "a rotation that is not known": (rotated(type="su", factor=2.0), r"config\.json: rope_type 'su' .*knows default,"),
    "a rotation by 0": (rotated(type="linear", factor=0), "factor of its rotations is 0; it must be a positive number"),
    "a rotation by less": (rotated(type="linear", factor=-2.0), "factor of its rotations is -2"),
    "a rotation by text": (rotated(type="linear", factor="2"), "factor of its rotations is '2'"),
    "a base of 0": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta of its rotations"),
    "a base below 0": (config(rope_parameters=None, rope_theta=-1e4), "rope_theta of its rotations is -10000"),
    "a base of text": (config(rope_parameters=None, rope_theta="1e4"), "rope_theta of its rotations is '1e4'"),
    "an activation of no name": (config(hidden_act="foo"), "KeyError: 'foo'"),
    "a part that the model has not": (config(text_config={"vocab_size": 9}), r"config\.json has a part for the text"),
    "no heads": (config(num_attention_heads=0), "ZeroDivisionError: "),
    **{f"{length} positions": (config(max_position_embeddings=length),
                               r"config\.json: max_position_embeddings is .*must be a whole number from 16 to \d+\.")
       for length in (1e30, 10**30, 0, -1, 1, 15, 1024.0, "1024", True)},
    "no tokenizer": (unlink("tokenizer.json"), "has no tokenizer"),
    "a broken tokenizer": (text("tokenizer.json", "{}"), "its tokenizer cannot be read"),
    "an adapter beside": (leftover_adapter, "both a model and an adapter"),
    "awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), "by awq, which is not served.*--quant"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "by gptq"),
    "bitsandbytes": (config(quantization_config={"load_in_4bit": True}), "by bitsandbytes"),
    "a method of no name": (config(quantization_config={"quant_method": "new"}), "by new"),
    "MLX": (config(quantization={"group_size": 64, "bits": 4}), "by MLX"),
    "compressed tensors": (config(compression_config={"quant_method": "compressed-tensors"}), "by compressed-tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_right_is_refused_in_one_line_that_names_it(
    copied: Callable[..., Folder], case: str
) -> None:
    change, words = REFUSED[case]
    folder = copied("qwen2")
    change(folder)
    with pytest.raises(ModelLoadError, match=words) as caught:
        load_model(str(folder.path), device="cpu", dtype="float32")
    assert str(folder.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("case", REFUSED)
def test_vllm_is_given_no_folder_that_the_embedded_engine_refuses(copied: Callable[..., Folder], case: str) -> None:
    change, words = REFUSED[case]
    folder = copied("qwen2")
    change(folder)
    if case == "weights that are not numbers":
        assert ModelFiles.of(str(folder.path)).identity
        return
    with pytest.raises(ModelLoadError, match=words):
        ModelFiles.of(str(folder.path))


SERVED: dict[str, Change] = {
    "shards": sharded,
    "a pickle beside": lambda folder: torch.save({}, folder.path / "pytorch_model.bin"),
    "tables of rotations": add(f"{LAYER}.self_attn.rotary_emb.inv_freq", 4),
    "scales of cached keys": add(f"{LAYER}.self_attn.k_scale", 1),
    "no architectures": config(architectures=None),
    "an odd dtype": config(dtype="float16"),
    "float16": lambda folder: folder.write_tensors({k: v.half() for k, v in folder.tensors().items()}),
}


@pytest.mark.parametrize("case", SERVED)
def test_what_does_not_matter_changes_nothing(copied: Callable[..., Folder], case: str) -> None:
    folder, plain = copied("qwen2"), copied("qwen2", "plain")
    SERVED[case](folder)
    served, wanted = (
        load_model(str(f.path), device="cpu", dtype="float32").model.state_dict() for f in (folder, plain)
    )
    assert served.keys() == wanted.keys()
    assert all(torch.allclose(served[name], wanted[name], atol=1e-3) for name in wanted)


@pytest.mark.parametrize("key", ["return_dict", "use_return_dict"])
def test_a_model_that_asks_for_tuples_is_served_as_one_that_does_not(
    copied: Callable[..., Folder], key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llama")
    folder.write_json("config.json", **{key: False})
    capfd.readouterr()
    model = load_model(str(folder.path), device="cpu").model
    assert torch.is_tensor(model(torch.tensor([[1, 2]])).logits)
    assert model.name_or_path == str(folder.path)
    assert ModelFiles.of(str(folder.path)).identity
    assert capfd.readouterr().err == ""


def test_transformers_prints_no_configuration_beside_the_line_that_refuses_it(
    copied: Callable[..., Folder], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llama")
    folder.write_json("config.json", name_or_path=3, num_labels="x", use_return_dict=False)
    capfd.readouterr()
    with contextlib.suppress(ModelLoadError):
        load_model(str(folder.path), device="cpu")
    assert capfd.readouterr().err == ""


def test_a_place_in_the_hubs_cache_names_its_newest_snapshot(copied: Callable[..., Folder], tmp_path: Path) -> None:
    snapshots = tmp_path / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    for time, name in ((200, "newer"), (100, "older")):
        os.utime(copied("llama", name).path.rename(snapshots / name), (time, time))
    for folder in (snapshots.parent, snapshots):
        with pytest.raises(ModelLoadError, match=rf"hub's cache\. Give {re.escape(str(snapshots / 'newer'))}\.$"):
            load_model(str(folder))


def test_tied_embeddings_are_not_missing(copied: Callable[..., Folder]) -> None:
    assert "lm_head.weight" not in copied("llama").tensors()
    model = load_model(str(copied("llama", "again").path), device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_text_part_of_a_model_that_sees_is_inspected_as_one(tmp_path: Path) -> None:
    name = "Gemma3ForConditionalGeneration"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "architectures": [name]}))
    with pytest.raises(ModelLoadError, match="has no weights"):
        inspect(tmp_path)


def test_a_mask_is_left_out_and_a_bias_of_that_name_is_not() -> None:
    name, loading = "h.0.attn.bias", {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": ["h.0.attn.bias"]}
    mask, bias = (StoredTensor(Path("x"), "F32", shape) for shape in ((1, 1, 64, 64), (64,)))
    refuse_wrong_tensors(Path("folder"), "Model", loading, {}, {name: mask})
    with pytest.raises(ModelLoadError, match="does not have"):
        refuse_wrong_tensors(Path("folder"), "Model", loading, {}, {name: bias})


def test_what_only_sees_or_hears_is_left_out_of_a_text_model_and_of_no_other() -> None:
    loading = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": ["model.vision_tower.patch.weight"]}
    refuse_wrong_tensors(Path("folder"), "Model", loading, {"vision_config": {}, "text_config": {}}, {})
    with pytest.raises(ModelLoadError, match="does not have"):
        refuse_wrong_tensors(Path("folder"), "Model", loading, {}, {})


def test_a_folder_is_found_by_every_way_of_writing_its_path(
    copied: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied("llama", "model").path
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    (path.parent / "link").symlink_to("model")
    for written in ("model", "model/", "./model", "~/model", "link", str(path)):
        found = find_checkpoint(written)
        assert (found.folder.resolve(), found.name) == (path, "model")


@pytest.mark.parametrize("model", ["./gone", "/gone/model", "~/gone", "a/b/c", "gone.gguf", "gone/"])
def test_a_path_that_is_none_is_not_asked_of_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ModelLoadError, match="there is no such folder or file"):
        find_checkpoint(model)


@pytest.mark.parametrize("model", ["gone", "gone/model", "a b", "-x", "a..b"])
def test_a_hub_that_does_not_give_a_model_is_one_line(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="the hub does not give it") as caught:
        find_checkpoint(model)
    assert "\n" not in str(caught.value)


def test_a_file_a_loop_and_a_folder_of_folders_are_said_to_be_that(
    copied: Callable[..., Folder], tmp_path: Path
) -> None:
    folder = copied("llama", "checkpoint-5")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelLoadError, match="is a file, and no GGUF"):
        find_checkpoint(str(folder.weights))
    with pytest.raises(ModelLoadError, match="no such folder"):
        find_checkpoint(str(tmp_path / "loop"))
    with pytest.raises(ModelLoadError, match="folders in it have: checkpoint-5"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [("model_index.json", {"a": 1}, "pipeline of diffusers"), ("params.json", {"dim": 1}, "maker's own format"),
     ("adapter_config.json", {"base_model_name_or_path": "org/base"}, "--model org/base --adapter")],
)  # fmt: skip
def test_other_kinds_of_folders_are_named(tmp_path: Path, file: str, content: dict[str, Any], words: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=words):
        load_model(str(tmp_path))


@pytest.mark.skipif(bool(importlib.util.find_spec("sentencepiece")), reason="it would be converted")
def test_a_tokenizer_of_sentencepiece_alone_names_the_package(copied: Callable[..., Folder]) -> None:
    folder = copied("llama")
    unlink("tokenizer.json", "tokenizer_config.json")(folder)
    (folder.path / "tokenizer.model").write_bytes(b"\0" * 99)
    with pytest.raises(ModelLoadError, match="pip install sentencepiece"):
        load_model(str(folder.path))


def test_every_end_of_text_counts(copied: Callable[..., Folder]) -> None:
    folder = copied("llama")
    folder.write_json("generation_config.json", eos_token_id=[3, 5])
    loaded = load_model(str(folder.path), device="cpu")
    assert loaded.eos_token_ids == {3, 5, loaded.tokenizer.eos_token_id}
    assert ModelFiles.of(str(folder.path)).eos_token_ids == loaded.eos_token_ids


def test_tokens_without_an_embedding_are_told_of_and_padding_is_not(
    copied: Callable[..., Folder], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("llama")
    assert load_model(str(folder.path), device="cpu")
    assert not caplog.records
    tokenizer = json.loads((folder.path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 258, "content": "<image>"})
    (folder.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = load_model(str(folder.path), device="cpu")
    assert "1 tokens beyond the 258" in caplog.text
    assert "<image>" in caplog.text
    compiler = SchemaCompiler(loaded.tokenizer, vocab_size=258, eos_token_ids=loaded.eos_token_ids)
    assert len(compiler.compile('{"type": "integer"}').start().allowed()) == 258


def test_a_template_that_is_no_jinja_is_told_of_at_start(
    copied: Callable[..., Folder], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("llama")
    (folder.path / "chat_template.jinja").write_text("{% for message in messages %}")
    assert load_model(str(folder.path), device="cpu")
    assert "not valid Jinja" in caplog.text


def test_a_length_is_taken_from_what_the_config_calls_it_or_said_to_be_unknown(
    copied: Callable[..., Folder], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max_len_of(transformers.GPT2Config(n_positions=99)) == 99
    assert max_len_of(transformers.BloomConfig(seq_length=77)) == 77
    folder = copied("llama")
    monkeypatch.setattr("server.engines.checkpoint.positions.max_len_of", lambda _: None)
    assert load_model(str(folder.path), device="cpu").max_len == 2048
    assert "2048 are served" in caplog.text


COMMANDS = (
    ("serve", "--port", "0"),
    ("serve", "--port", "0", "--engine", "vllm"),
    ("generate", "hi"),
    ("compare", "hi"),
    ("rollouts", "--out", "out"),
    ("eval", "x", "--out", "out"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_says_it_in_one_line_and_ends_with_2(
    copied: Callable[..., Folder], command: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = copied("qwen2")
    drop("lm_head.weight")(folder)
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--model", str(folder.path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"recontrol {command[0]}: model: {folder.path} lacks lm_head.weight")


def test_embeddings_padded_beyond_the_tokenizer_are_served_and_padding_is_no_text(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.vocab_size = 320
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    core = EngineCore(load_model(str(tmp_path), device="cpu", dtype="float32"), HeadRegistry({}), max_batch_size=2)
    padding = SamplingParams(max_tokens=4, logit_bias={300: 100.0}, logprobs=2)
    (choice,) = run(core, [GenerationRequest("r", (1, 2, 3), padding)]).values()
    assert (choice.token_ids, choice.text) == ([300] * 4, "")
    assert [chunk.logprobs[0].data for chunk in choice.chunks] == [b""] * 4
    compiler = SchemaCompiler(core._tokenizer, vocab_size=core.vocab_size, eos_token_ids={256})
    mask = compiler.compile('{"type": "integer"}').start().allowed()
    assert (len(mask), bool(mask[300])) == (320, False)
