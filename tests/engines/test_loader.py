import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engines.embedded import loader
from server.engines.embedded.loader import LoadedModel, default_model_folder, load_model
from server.errors import ModelLoadError


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
    if not loader.torch.cuda.is_available():
        with pytest.raises(ModelLoadError, match="CUDA"):
            loader.resolve_device("cuda")


def test_an_interrupted_conversion_leaves_no_cache_and_the_next_one_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            default_model_folder()
        names = [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()]
        assert len(names) == 1
        assert ".part-" in names[0]
