"""The direction of imports (lower never imports higher), read from the source; imports inside functions count too."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
# Each package or module, and what of this project it may import.
ALLOWED = {
    "value_models.errors": (),
    "value_models.linear": (),
    "value_models.linalg": (),
    "value_models.heads": ("value_models.errors", "value_models.linear"),
    "value_models.moments": ("value_models.linalg",),
    "value_models.targets": ("value_models.errors",),
    "value_models.packages": ("value_models.errors",),
    "value_models.embeddings": ("value_models.packages",),
    "value_models.reward_models": ("value_models.errors",),
    "value_models.rewards": ("value_models.embeddings", "value_models.errors", "value_models.packages",
                             "value_models.reward_models"),
    "value_models.scores": ("value_models.errors", "value_models.files", "value_models.kept_fits",
                            "value_models.reward_models", "value_models.rewards"),
    "value_models.anchors": ("value_models.embeddings",),
    "value_models.metrics": ("value_models.anchors", "value_models.embeddings", "value_models.errors",
                             "value_models.packages"),
    "value_models.intervals": (),
    "value_models.claims": ("value_models.intervals",),
    "value_models.areas": ("value_models.claims", "value_models.intervals"),
    "value_models.token_biases": ("value_models.errors", "value_models.rewards", "value_models.targets",
                                  "value_models.training_data"),
    "value_models.importer": ("value_models.errors", "value_models.heads", "value_models.linalg"),
    "value_models.files": (),
    "value_models.kept_fits": ("value_models.files",),
    "value_models.calibration": ("value_models.errors",),
    "value_models.expected": ("value_models.calibration",),
    "value_models.head_folder": ("value_models.errors", "value_models.files", "value_models.heads",
                                 "value_models.store"),
    "value_models.store": ("value_models.calibration", "value_models.errors", "value_models.files",
                           "value_models.heads", "value_models.linalg"),
    "value_models.lines": ("value_models.errors",),
    "value_models.messages": ("value_models.errors",),
    "value_models.prompt_sets": ("value_models.errors", "value_models.lines", "value_models.messages",
                                 "value_models.packages"),
    "value_models.given_texts": ("value_models.errors", "value_models.lines", "value_models.messages"),
    "value_models.scored_texts": ("value_models.given_texts", "value_models.rollouts"),
    "value_models.token_blocks": ("value_models.targets",),
    "value_models.shards": ("value_models.errors", "value_models.token_blocks"),
    "value_models.rollouts": ("value_models.errors", "value_models.files", "value_models.prompt_sets",
                              "value_models.shards"),
    "value_models.prefix_rewards": ("value_models.errors", "value_models.files", "value_models.kept_fits",
                                    "value_models.rewards", "value_models.scores"),
    "value_models.training_data": ("value_models.errors", "value_models.given_texts", "value_models.prefix_rewards",
                                   "value_models.prompt_sets",
                                   "value_models.rewards", "value_models.rollouts", "value_models.scores",
                                   "value_models.shards", "value_models.token_blocks"),
    "value_models.resampled": ("value_models.token_blocks", "value_models.training_data"),
    "value_models.sources": ("value_models.errors", "value_models.given_texts", "value_models.targets",
                             "value_models.training_data"),
    "value_models.network": ("value_models.errors", "value_models.heads", "value_models.moments",
                             "value_models.sources", "value_models.token_blocks"),
    "value_models.order": ("value_models.ascent", "value_models.heads", "value_models.linalg",
                           "value_models.training_data"),
    "value_models.critic": ("value_models.errors", "value_models.moments", "value_models.sources",
                            "value_models.token_blocks"),
    "value_models.ascent": ("value_models.critic", "value_models.errors", "value_models.heads", "value_models.linalg",
                            "value_models.moments",
                            "value_models.sources", "value_models.token_blocks", "value_models.training_data"),
    "value_models.critic_choice": ("value_models.ascent", "value_models.critic", "value_models.errors",
                                   "value_models.heads", "value_models.moments", "value_models.sources"),
    "value_models.fields": ("value_models.ascent", "value_models.critic", "value_models.heads", "value_models.linalg",
                            "value_models.moments", "value_models.sources"),
    "value_models.distillation": ("value_models.errors", "value_models.heads", "value_models.linalg",
                                  "value_models.moments", "value_models.prompt_sets", "value_models.rollouts"),
    "value_models.training": ("value_models",),
    "value_models.cards": ("value_models",),
    "value_models.baselines": ("value_models",),
    "value_models.generations": ("value_models.files", "value_models.prompt_sets"),
    "value_models.sampled": ("value_models.errors", "value_models.files", "value_models.prompt_sets"),
    "value_models.self_pairs": ("value_models.generations", "value_models.prompt_sets"),
    "value_models.evaluation": ("value_models",),
    "server.errors": (),
    "server.environment": (),
    "server.unicode": (),
    "server.field_errors": (),
    "server.settings": ("server.environment",),
    "server.machine": (),
    "server.logs": (),
    "server.tracing": ("server.api.gate.context",),
    "server.kernels": ("server.errors", "server.kernels", "value_models.linear"),
    "server.control": ("value_models.calibration", "value_models.errors", "value_models.heads",
                       "value_models.head_folder", "value_models.store",
                       "value_models.linear", "value_models.linalg", "server.errors", "server.control",
                       "server.kernels", "server.field_errors", "server.unicode"),
    "server.calls": ("server.calls",),
    "server.types": ("server.calls", "server.control.params", "server.control.state", "server.errors"),
    "server.telemetry": ("server.types", "server.control.state", "server.engines.base"),
    "server.engines": ("server.engines", "server.calls", "server.control", "server.kernels", "server.types",
                       "server.errors", "server.machine", "server.settings", "server.unicode",
                       "value_models.calibration", "value_models.distillation", "value_models.errors",
                       "value_models.files", "value_models.generations", "value_models.given_texts",
                       "value_models.head_folder", "value_models.heads", "value_models.linear",
                       "value_models.prompt_sets", "value_models.rewards", "value_models.rollouts",
                       "value_models.sampled", "value_models.scored_texts", "value_models.store"),
    "server.training": ("server.training", "server.engines.base", "server.errors", "server.field_errors",
                        "server.telemetry", "server.unicode", "value_models"),
    "server.api": ("server.api", "server.calls", "server.types", "server.control.levels",
                   "server.control.objectives", "server.control.params", "server.control.repair",
                   "server.control.turns", "server.engines.base", "server.errors",
                   "server.field_errors", "server.logs", "server.telemetry", "server.training", "server.unicode"),
    "server.app": ("server.api", "server.control.params", "server.engines", "server.errors", "server.settings",
                   "server.telemetry", "server.tracing", "server.training", "server.types", "server.watch"),
    "server.watch": ("server.engines.base", "server.errors", "server.telemetry", "value_models.errors",
                     "value_models.head_folder"),
    "server.cli": ("server", "value_models"),
    "benchmarks": ("benchmarks", "server", "value_models"),
}  # fmt: skip
PACKAGES = ("server", "value_models", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from server.api import chat` means the module server.api.chat, where there is one.
            found |= {name if (ROOT / (name.replace(".", "/") + ".py")).exists() else node.module for name in names}
    return {name for name in found if name.split(".")[0] in (*PACKAGES, "tests")}


def is_within(name: str, scope: str) -> bool:
    return name == scope or name.startswith(f"{scope}.")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_what_is_below_it(path: Path) -> None:
    name = module_name(path)
    if name in ("server", "value_models"):
        assert not imports_of(path)
        return
    (scope,) = [scope for scope in ALLOWED if is_within(name, scope)]
    wrong = {used for used in imports_of(path) if not any(is_within(used, allowed) for allowed in ALLOWED[scope])}
    assert not wrong


def test_only_what_serves_and_trains_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    installed = find_packages(str(ROOT), **settings)
    assert {name.split(".")[0] for name in installed} == {"server", "value_models"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): imports_of(path) - {module_name(path)} for path in FILES}
    TopologicalSorter(graph).prepare()  # Raises CycleError, which names the circle.


@pytest.mark.parametrize("engine", ["embedded", "fake", "vllm"])
def test_no_engine_imports_another(engine: str) -> None:
    others = {f"server.engines.{name}" for name in ("embedded", "fake", "vllm") if name != engine}
    mine = [path for path in FILES if is_within(module_name(path), f"server.engines.{engine}")]
    assert mine
    assert not {used for path in mine for used in imports_of(path) if any(is_within(used, other) for other in others)}


def test_only_telemetry_knows_prometheus() -> None:
    users = {module_name(path) for path in FILES if "from prometheus_client import" in path.read_text()}
    assert users == {"server.telemetry"}


def test_only_the_importer_unpickles_and_only_the_command_line_reaches_it() -> None:
    loaders = {module_name(path) for path in FILES if "torch.load(" in path.read_text()}
    users = {module_name(path) for path in FILES if "value_models.importer" in imports_of(path)}
    assert loaders == {"value_models.importer"}
    assert users == {"server.cli.heads"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_file_that_a_module_names_exists() -> None:
    names = {path.name for path in FILES} | {"setup.py", "convert_hf_to_gguf.py"}
    for path in FILES:
        source = path.read_text()
        for named in re.findall(
            r"\b(?:server|value_models|benchmarks|tests|docs)/[\w./-]+\.(?:py|cpp|h|md|sh)\b", source
        ):
            assert (ROOT / named).is_file(), (path, named)
        for named in re.findall(r"(?<![\w/*.-])[a-z_]+\.py\b", source):
            assert named in names, (path, named)


def test_the_files_that_are_run_first_are_there() -> None:
    assert all((ROOT / "tests" / file).is_file() for file in LONGEST)
