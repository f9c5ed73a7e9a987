"""What the image runs, run here: its command and health check under its environment on a read-only root file system."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from server.engines.embedded.model.loader import default_model_folder
from tests.deploy.conftest import ROOT, free_ports, require, running, wait_until, wait_until_up
from tests.deploy.test_manifests import values

pytestmark = pytest.mark.deploy
SELF = "import sys; from server.cli import main; sys.exit(main(sys.argv[1:]))"


def image_environment() -> dict[str, str]:
    """The ENV of the stages that run, but for what names folders of the image."""
    pairs = [word.split("=", 1) for value in values("ENV") for word in shlex.split(value)]
    return {name: value for name, value in pairs if name not in ("PATH", "RECONTROL_CACHE_DIR")}


def sandboxed(command: list[str]) -> list[str]:
    """The command as the image's user, with the whole file system read-only but for an empty /tmp."""
    bwrap = require("bwrap", "Debian package bubblewrap")
    probe = [bwrap, "--ro-bind", "/", "/", "--unshare-user", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("bubblewrap cannot make user namespaces on this machine")
    (user,) = values("USER")
    uid, gid = user.split(":")
    # This checkout and its interpreter may themselves be below /tmp.
    kept = [word for folder in (str(ROOT), sys.prefix) for word in ("--ro-bind", folder, folder)]
    return [bwrap, "--ro-bind", "/", "/", "--tmpfs", "/tmp", *kept, "--proc", "/proc", "--dev", "/dev",
            "--unshare-user", "--uid", uid, "--gid", gid, "--cap-drop", "ALL", "--die-with-parent",
            "--setenv", "HOME", "/tmp", "--chdir", str(ROOT), *command]  # fmt: skip


def test_the_sandbox_is_read_only() -> None:
    done = subprocess.run(sandboxed(["touch", str(ROOT / "written")]), capture_output=True, text=True, check=False)
    assert "Read-only file system" in done.stderr
    assert subprocess.run(sandboxed(["id", "-u"]), capture_output=True, text=True, check=True).stdout == "10001\n"


@pytest.mark.slow
def test_the_images_command_answers_and_is_healthy_on_a_read_only_root() -> None:
    """With the default model itself, converted beforehand as the image's build does, and its heads."""
    default_model_folder()
    (port,) = free_ports(1)
    program, *arguments = json.loads(values("CMD")[0])
    assert program == "recontrol"
    _, _, health = values("HEALTHCHECK")[0].partition("CMD ")
    health_program, *health_arguments = json.loads(health)
    assert health_program == "python"
    url = f"http://127.0.0.1:{port}"
    env = {**image_environment(), "RECONTROL_PORT": str(port)}
    with running(sandboxed([sys.executable, "-c", SELF, *arguments]), env=env) as process:
        wait_until_up(process, f"{url}/health")
        body = {"model": "SmolLM2-135M-Instruct@positive", "prompt": "Hello", "max_tokens": 3}
        choice = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        assert choice["control"]["value_after"].keys() == {"positive"}
        check = [part.replace(":8000/", f":{port}/") for part in health_arguments]
        assert subprocess.run([sys.executable, *check], check=False).returncode == 0
    wait_until(lambda: process.poll() is not None, "the server is gone")
    gone = subprocess.run([sys.executable, *check], capture_output=True, check=False)
    assert gone.returncode != 0


def test_what_the_dockerfile_copies_makes_a_wheel_with_all_that_the_image_serves(tmp_path: Path) -> None:
    """The image installs the wheel and not the folder, so the shipped heads and cards must be in it."""
    context = tmp_path / "context"
    context.mkdir()
    for name in [word for value in values("COPY") if "--from" not in value for word in value.split()[:-1]]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, context)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(context)]
    subprocess.run(build, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = tmp_path.glob("recontrol-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    heads = [path.parent for path in (ROOT / "value_models/pretrained").glob("*/*/card.json")]
    assert heads
    assert packed >= {
        str((head / name).relative_to(ROOT)) for head in heads for name in ("card.json", "head.safetensors")
    }
