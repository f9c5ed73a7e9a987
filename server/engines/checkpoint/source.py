"""From what a user names as the model to a folder on this machine. Enter at `find_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.engines.checkpoint.inspection import one_line, refuse_other_folders
from server.engines.checkpoint.json_files import listed
from server.engines.checkpoint.packaged import PACKAGED_MODELS, packaged_model_folder
from server.errors import ModelLoadError

_WHAT_TO_GIVE = (
    "Give a local folder with config.json, safetensors weights and a tokenizer, a GGUF file, a hub id that this "
    f"machine can reach, or one of {', '.join(PACKAGED_MODELS)}."
)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_TIMEOUT_S = 5.0


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A folder that holds a model, and the model's short name."""

    folder: Path
    name: str


def find_checkpoint(model: str) -> Checkpoint:
    """By a packaged model's name, a folder, a GGUF file or a hub id, which is downloaded. Raises ModelLoadError."""
    if packaged := PACKAGED_MODELS.get(model):
        return Checkpoint(packaged_model_folder(packaged), packaged.name)
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return _of_folder(path)
        if path.is_file():
            return _of_file(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"Cannot load the model {model!r}: {one_line(error)} {_WHAT_TO_GIVE}") from error
    # No hub has an id like these.
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith((".gguf", "/")):
        raise ModelLoadError(f"Cannot load the model {model!r}: there is no such folder or file. {_WHAT_TO_GIVE}")
    return Checkpoint(_downloaded(model), model.rsplit("/", 1)[-1])


def _of_folder(folder: Path) -> Checkpoint:
    name = folder.resolve().name
    files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    if not files:
        return Checkpoint(folder, name)
    if (folder / "adapter_config.json").exists():
        refuse_other_folders(folder)
    if len(files) > 1:
        raise ModelLoadError(
            f"model: {folder} holds several GGUF files: {listed([file.name for file in files], most=8)}. Name one of "
            "them."
        )
    return Checkpoint(_converted(files[0]), name)


def _of_file(file: Path) -> Checkpoint:
    from server.engines.checkpoint.gguf_header import is_gguf

    if is_gguf(file) or file.suffix == ".gguf":
        return Checkpoint(_converted(file), file.stem if file.suffix == ".gguf" else file.name)
    raise ModelLoadError(f"model: {file} is a file, and no GGUF. {_WHAT_TO_GIVE}")


def _converted(file: Path) -> Path:
    from server.engines.checkpoint.gguf import gguf_folder  # slow to import

    return gguf_folder(file)


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, etag_timeout=_HUB_TIMEOUT_S))
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ModelLoadError(
            f"Cannot load the model {model!r}: there is no such folder, and the hub does not give it ({reason}). "
            f"{_WHAT_TO_GIVE}"
        ) from error
