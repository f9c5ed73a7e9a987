"""The image: built from the Dockerfile as it is, looked into, and run as it is meant to be run.

No registry of images is asked. Under the name that the Dockerfile asks for stands a Debian with Python 3.11 that
`mmdebstrap` makes, as bare as the real one; what pip is told on this machine is lent to the build, not copied.
`buildah` builds without a daemon. `bwrap` runs the result as a container, without a daemon either: namespaces of its
own, a read-only root but for an empty /tmp, and the image's user, command, environment and health check.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.kernels import LEVELS, machine_levels
from tests.deploy.conftest import ROOT, check, require, wait_until
from tests.deploy.test_manifests import GRACE_S, POD, values

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]
HEADS = {path.parent.name for path in (ROOT / "value_models/pretrained/SmolLM2-135M-Instruct").glob("*/card.json")}


@dataclass(frozen=True, slots=True)
class Image:
    """What was built: its mounted file system, and the configuration that a runtime obeys."""

    root: Path
    config: dict[str, Any]

    def as_user(self, *command: str) -> list[str]:
        """The command as the image's user without rights, in its environment, on one thread; for root in `root`."""
        uid, gid = self.config["User"].split(":")
        users = (line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines())
        home = next(fields[5] for fields in users if fields[2] == uid)
        return ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--bounding-set=-all", "--no-new-privs",
                "env", "-i", f"HOME={home}", "OMP_NUM_THREADS=1", *self.config["Env"], *command]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Container:
    """The image's command that runs as process 1 of its own namespaces; `pid` is its number on this machine."""

    image: Image
    sandbox: subprocess.Popen[bytes]
    pid: int

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A further command in the container, as `docker exec` runs it and as the health check runs."""
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--root"]
        return subprocess.run([*inside, *self.image.as_user(*command)], text=True, capture_output=True, check=False)

    def python(self, code: str) -> Any:
        """What the code prints as JSON."""
        done = self.exec("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def is_healthy(self) -> bool:
        kind, *command = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.exec(*command).returncode == 0

    def has_ended(self) -> bool:
        return self.sandbox.poll() is not None

    def stop(self) -> None:
        os.kill(self.pid, getattr(signal, self.image.config["StopSignal"]))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if not os.environ.get("RECONTROL_REQUIRE_DEPLOY_TOOLS"):
        pytest.skip("building the image takes minutes; `make test-deploy` does")
    if os.geteuid() != 0:
        pytest.skip("the image is built and run by root only")
    require("bwrap", "Debian package bubblewrap")
    folder = tmp_path_factory.mktemp("image")
    store = folder / "store"
    buildah = [require("buildah", "Debian package buildah"), "--root", str(store), "--runroot", str(folder / "run")]
    build = [*buildah, "bud", "--isolation", "chroot", "--quiet"]
    try:
        base = values("ARG")[0].removeprefix("PYTHON_IMAGE=")
        check([*build, "--tag", base, str(stand_in_base(folder))])
        # Docker's format: the other one has no health check.
        target = ["--format", "docker", "--pull-never", "--target", "cpu", "--tag", "cpu"]
        check([*build, *target, *pip_settings(folder), "."])
        container = check([*buildah, "from", "--pull-never", "cpu"]).strip()
        config = json.loads(check([*buildah, "inspect", container]))["Docker"]["config"]
        yield Image(Path(check([*buildah, "mount", container]).strip()), config)
    finally:
        check([*buildah, "rm", "--all"])
        if (store / "overlay").is_mount():
            check(["umount", str(store / "overlay")])
        shutil.rmtree(folder)


def stand_in_base(folder: Path) -> Path:
    """A folder to build an image from that has what the Dockerfile takes for granted: `python`, `pip`, apt-get."""
    context = folder / "base"
    context.mkdir()
    hooks = ('ln -s python3 "$1/usr/bin/python"', 'rm "$1"/usr/lib/python3*/EXTERNALLY-MANAGED')
    check([
        require("mmdebstrap", "Debian package mmdebstrap"), "--variant=minbase", "--dpkgopt=force-unsafe-io",
        "--include=python3-venv,python3-pip,ca-certificates", *(f"--customize-hook={hook}" for hook in hooks),
        "bookworm", str(context / "base.tar"), *apt_sources("bookworm"),
    ])  # fmt: skip
    (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    return context


def apt_sources(release: str) -> list[str]:
    """The files that say where this machine gets that release of Debian from; none where it is another system."""
    if f"VERSION_CODENAME={release}" not in Path("/etc/os-release").read_text().splitlines():
        return []
    files = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources"))
    return [str(file) for file in files if file.is_file()]


def pip_settings(folder: Path) -> list[str]:
    """Volumes for a build: this machine's settings of pip, and the files and folders that they name, read-only."""
    listed = check([sys.executable, "-m", "pip", "config", "list"])
    found = re.findall(r"^(global|:env:)\.([\w-]+)=(.*)$", listed, re.MULTILINE)
    # The environment's last, so that they win.
    settings = {name: ast.literal_eval(value) for _, name, value in sorted(found, reverse=True)}
    file = folder / "pip.conf"
    file.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items())]))
    volumes = {file: "/etc/pip.conf"}
    for word in " ".join(settings.values()).split():
        # An index keeps its files beside its pages.
        path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists():
            volumes[path] = str(path)
    return [f"--volume={path}:{inside}:ro" for path, inside in volumes.items()]


@contextlib.contextmanager
def running(image: Image, log: Path) -> Iterator[Container]:
    bwrap = require("bwrap", "Debian package bubblewrap")
    command = [
        bwrap, "--ro-bind", str(image.root), "/", "--perms", "1777", "--tmpfs", "/tmp", "--proc", "/proc",
        "--dev", "/dev", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--as-pid-1",
        *image.as_user("env", "RECONTROL_ALLOW_PUBLIC_BIND=true", *image.config["Cmd"]),
    ]  # fmt: skip
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as sandbox:
        children = Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children")
        wait_until(lambda: children.read_text() != "" or sandbox.poll() is not None, "the container runs")
        pid = int(children.read_text())
        try:
            yield Container(image, sandbox, pid)
        finally:
            if sandbox.poll() is None:
                os.kill(pid, signal.SIGKILL)


def test_the_image_holds_what_serves_and_nothing_that_built_it(image: Image) -> None:
    files = [path for path in image.root.rglob("*") if not path.is_symlink()]
    names = {path.name for path in files if path.parent.name == "bin"}
    assert "recontrol" in names
    assert not names & {"gcc", "g++", "cc", "c++", "ld", "as", "make"}
    assert not {"src", "wheels"} & {path.name for path in image.root.iterdir()}
    for left in ("root/.cache", "var/cache/apt/archives/*.deb", "var/lib/apt/lists/*Packages*"):
        assert not list(image.root.glob(left))
    packages = image.root / "opt/recontrol/lib/python3.11/site-packages"
    kernels = {path.name.split(".")[0].removeprefix("_native_") for path in (packages / "server/kernels").glob("*.so")}
    assert kernels == set(LEVELS)
    assert not (packages / "tests").exists()
    uid = int(image.config["User"].split(":")[0])
    owned = {path for path in files if uid in (path.stat().st_uid, path.stat().st_gid)}
    open_to_all = {str(path.relative_to(image.root)) for path in files if path.stat().st_mode & 0o002}
    assert not owned
    # The rest is Debian's, and read-only when it runs.
    assert {name for name in open_to_all if not name.startswith("dev/")} <= {"tmp", "var/tmp", "run/lock"}


def test_the_image_is_configured_as_kubernetes_runs_it(image: Image) -> None:
    security = POD["securityContext"]
    assert image.config["User"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert list(image.config["ExposedPorts"]) == ["8000/tcp"]
    assert image.config["Cmd"][0] == "recontrol"
    assert not image.config["Entrypoint"]


def test_a_container_serves_with_control_and_finishes_cleanly_when_stopped(image: Image, tmp_path: Path) -> None:
    """Without a network, with the default model and the heads inside."""
    log = tmp_path / "log"
    with running(image, log) as container:
        serves = "Uvicorn running"
        # By the log, since every health check starts a Python of its own.
        wait_until(lambda: serves in log.read_text() or container.has_ended(), "the server is up", timeout_s=400)
        assert serves in log.read_text(), log.read_text()
        assert container.is_healthy()
        assert container.exec("id", "-u").stdout == f"{POD['securityContext']['runAsUser']}\n"
        for path in ("/opt/recontrol/cache/new", "/var/tmp/new", "/new"):
            assert "Read-only file system" in container.exec("touch", path).stderr
        body = {"model": "SmolLM2-135M-Instruct@positive", "prompt": "Hello", "max_tokens": 3}
        answer = container.python(_asking("/v1/completions", body))
        assert answer["choices"][0]["control"]["value_after"].keys() == {"positive"}
        heads = container.python(_asking("/v1/heads"))
        assert {head["name"] for head in heads["data"]} == HEADS
        loaded = Path(f"/proc/{container.pid}/maps").read_text()
        assert all(f"server/kernels/_native_{level}." in loaded for level in machine_levels()[-1:])
        container.stop()
        assert container.sandbox.wait(GRACE_S) == 0, log.read_text()
    assert "Application shutdown complete" in log.read_text()


def test_a_container_that_is_stopped_while_it_starts_ends_at_once(image: Image, tmp_path: Path) -> None:
    """The first process of a container ignores signals that it does not handle, and a model takes its time to load."""
    log = tmp_path / "log"
    with running(image, log) as container:
        status = Path(f"/proc/{container.pid}/status")

        def handles() -> bool:
            caught = int(re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)[1], 16)
            return bool(caught & 1 << signal.SIGTERM - 1)

        wait_until(lambda: container.has_ended() or handles(), "it handles signals", timeout_s=200)
        container.stop()
        assert container.sandbox.wait(GRACE_S) == 128 + signal.SIGTERM
    assert "Started server process" not in log.read_text()


def _asking(path: str, body: dict[str, Any] | None = None) -> str:
    """Code that prints what the server answers, by Python's own library: the image has no client."""
    request = f"request.Request('http://127.0.0.1:8000{path}', {body and json.dumps(body).encode()!r}, headers)"
    headers = "headers = {'content-type': 'application/json'}"
    return f"from urllib import request; {headers}; print(request.urlopen({request}, timeout=60).read().decode())"


def test_what_the_dockerfile_imports_is_there() -> None:
    codes = re.findall(r'^RUN python -c "(from server[^;"]*)', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert codes
    for code in codes:
        exec(code, {})


def test_what_the_dockerfile_copies_makes_a_wheel_with_all_that_the_image_serves(tmp_path: Path) -> None:
    """The image installs the wheel and not the folder, so the shipped heads and cards must be in it."""
    context = tmp_path / "context"
    context.mkdir()
    for name in {word: None for value in values("COPY") if "--from" not in value for word in value.split()[:-1]}:
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
