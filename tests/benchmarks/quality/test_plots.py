"""The pictures that studies keep: well-formed, complete, and the same for the same figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.quality.plots import plot_map, plot_pareto
from benchmarks.quality.rivals import RE_CONTROL, RIVALS
from server.cli.methods import HEAD
from server.errors import ConfigurationError

METHODS = ("base", *RIVALS, HEAD.name)
JUDGES = ["afinn", "textblob_polarity"]
STEP_SIZES, STEPS = [0.017, 0.17, 1.7], [3, 10, 30, 100]
MAP_METRICS = ("reward", "diversity", "kl", "coherence", "nll")


def sweep_point(strength: float, kl: float) -> dict[str, Any]:
    figure = {"mean": 0.5 + kl, "low": 0.4 + kl, "high": 0.7 + kl}
    figures = dict.fromkeys(("reward", *JUDGES, "diversity", "nll"), figure)
    return {"strength": strength, "figures": {**figures, "kl": {"mean": kl, "low": kl, "high": kl}}}


def methods_result(methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    points = {method: [sweep_point(1.0, 0.01 * number)] for number, method in enumerate(methods)}
    return {"judges": JUDGES, "sweep": {method: [*some, sweep_point(2.0, 4.0)] for method, some in points.items()}}


def map_result() -> dict[str, Any]:
    """Every number of it is another one."""
    numbers = iter(range(10_000))
    maps = {
        name: [[{metric: next(numbers) / 100 for metric in MAP_METRICS} for _ in STEPS] for _ in STEP_SIZES]
        for name in ("without budget", "with budget")
    }
    return {"step_sizes": STEP_SIZES, "steps": STEPS, "max_kl": 0.3, "maps": maps}


def label(method: str) -> str:
    """What a legend begins with."""
    known = {"best-of": "best of N", "blockwise-best-of": "blockwise best of N"}
    known |= {"re-control": "RE-Control", "token-log-odds": "token log-odds", "vas": "VAS", "ivr": "IVR"}
    return known.get(method, method.replace("-", " "))


def texts_of(path: Path) -> list[str]:
    """Raises where the file is not well-formed."""
    return ["".join(text.itertext()) for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_of_a_sweep_names_every_method_and_metric(tmp_path: Path) -> None:
    plot_pareto(methods_result(), tmp_path / "sweep.svg", title="cheerful")
    texts = texts_of(tmp_path / "sweep.svg")
    assert all(any(text.startswith(label(method)) for text in texts) for method in METHODS)
    assert {"cheerful", "reward", *JUDGES, "diversity (0 to 1)", "mean KL (nats a token)"} <= set(texts)
    assert {"best of N (KL bound)", "blockwise best of N (KL bound)"} <= set(texts)
    assert (tmp_path / "sweep.svg").stat().st_size < 200_000


@pytest.mark.parametrize("methods", [(), ("base",), ("base", HEAD.name), (RE_CONTROL.name,)])
def test_methods_that_were_not_swept_are_not_shown(tmp_path: Path, methods: tuple[str, ...]) -> None:
    plot_pareto(methods_result(methods) | {"judges": []}, tmp_path / "sweep.svg", title="cheerful")
    texts = texts_of(tmp_path / "sweep.svg")
    assert [m for m in METHODS if any(text.startswith(label(m)) for text in texts)] == list(methods)


def test_the_map_holds_the_number_of_every_cell(tmp_path: Path) -> None:
    result = map_result()
    plot_map(result, tmp_path / "map.svg", title="cheerful")
    cells = [cell for rows in result["maps"].values() for row in rows for cell in row]
    numbers = {f"{cell[metric]:.2f}" for cell in cells for metric in ("reward", "diversity", "kl")}
    labels = {"cheerful", "steps n", *map(str, STEPS), *map(str, STEP_SIZES)}
    assert numbers | labels <= set(texts_of(tmp_path / "map.svg"))
    assert (tmp_path / "map.svg").stat().st_size < 200_000


@pytest.mark.parametrize(("plot", "result"), [(plot_pareto, methods_result()), (plot_map, map_result())])
def test_the_same_figures_give_the_same_bytes_whatever_the_settings(
    tmp_path: Path, plot: Callable[..., None], result: dict[str, Any]
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plot(result, tmp_path / "first.svg", title="cheerful")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "lines.linewidth": 9}):
        plot(result, tmp_path / "second.svg", title="cheerful")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_without_matplotlib_the_extra_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"needs matplotlib; run `pip install recontrol\[benchmarks\]`"):
        plot_map(map_result(), tmp_path / "map.svg", title="cheerful")
    assert not list(tmp_path.iterdir())
