"""The pictures that studies keep beside a head: reward against divergence, and step size by steps.

SVG files from plain data. The same data gives the same bytes with one release of matplotlib, which is imported when a
picture is drawn, since only the `benchmarks` extra has it. Knows nothing of models, heads or how a figure was measured.
Enter at `plot_pareto` and `plot_map`.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.quality.rivals import (
    BLOCKWISE,
    CONTRASTIVE,
    CONTROLLED_DECODING,
    END_TOKEN,
    IVR,
    RE_CONTROL,
    REPLACEMENT,
    TOKEN_LOG_ODDS,
    VAS,
    WORD_SCORES,
)
from server.cli.methods import BEST_OF, HEAD, PROMPTING, STATIC_VECTOR
from server.errors import ConfigurationError
from value_models.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure


class _Look(NamedTuple):
    label: str
    colour: str
    marker: str


_BASE, _GOAL = "base", "goal"
_GREY = "#666666"
# Okabe and Ito's palette, which the colour-blind can tell apart.
_PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Later methods are drawn over earlier ones.
_LOOKS = {
    BEST_OF.name: _Look("best of N (KL bound)", "#CC79A7", "v"),
    BLOCKWISE.name: _Look("blockwise best of N (KL bound)", "#56B4E9", "D"),
    CONTROLLED_DECODING.name: _Look("controlled decoding", "#009E73", "^"),
    VAS.name: _Look("VAS", "#1B9E77", "1"),
    IVR.name: _Look("IVR", "#E7298A", "2"),
    STATIC_VECTOR.name: _Look("static vector", "#E69F00", "s"),
    RE_CONTROL.name: _Look("RE-Control", "#D55E00", "P"),
    TOKEN_LOG_ODDS.name: _Look("token log-odds", "#8A8A00", "<"),
    WORD_SCORES.name: _Look("word scores", "#7F3C8D", ">"),
    END_TOKEN.name: _Look("end token", "#999999", "*"),
    CONTRASTIVE.name: _Look("activation steering", "#A6761D", "p"),
    REPLACEMENT.name: _Look("prompt replacement", "#66A61E", "h"),
    HEAD.name: _Look("head", "#0072B2", "o"),
    PROMPTING.name: _Look("prompting", "#000000", "X"),
}
_LEGEND_ORDER = (
    _BASE,
    HEAD.name,
    STATIC_VECTOR.name,
    TOKEN_LOG_ODDS.name,
    WORD_SCORES.name,
    END_TOKEN.name,
    CONTRASTIVE.name,
    REPLACEMENT.name,
    RE_CONTROL.name,
    CONTROLLED_DECODING.name,
    VAS.name,
    IVR.name,
    BLOCKWISE.name,
    BEST_OF.name,
    PROMPTING.name,
)
# Divergences up to the largest budget that is a goal lie on a linear scale, those beyond it on a logarithmic one.
_GOAL_KL = 0.3
_KL_TICKS = (0, 0.1, 0.2, 0.3, 1, 3, 10, 30)
_KL_MINOR_TICKS = (0.05, 0.15, 0.25, 0.5, 2, 5, 20)
_MAP_COLUMNS = (
    ("reward", "reward", "viridis"),
    ("diversity", "diversity (0 to 1)", "viridis"),
    ("kl", "mean KL (nats a token)", "YlOrBr"),
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: a small file whose words can be searched
    "svg.hashsalt": "recontrol",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # as wide as the first, which sets the layout
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def plot_pareto(result: dict[str, Any], path: Path, *, title: str) -> None:
    """Reward, each judge and diversity over mean KL, a line for each method through its strengths.

    `result` is of the methods study: "judges" and "sweep", {method: [{"strength", "figures": {metric: {"mean", "low",
    "high"}}}]}; methods may be absent. Bars are the 95% intervals. Raises ConfigurationError without matplotlib.
    """
    sweep: dict[str, list[dict[str, Any]]] = result["sweep"]
    unknown = sweep.keys() - {_BASE, *_LOOKS}
    assert not unknown, f"no look for {unknown}"
    metrics = list(dict.fromkeys(("reward", *result["judges"], "diversity")))
    with _drawing(path, (12.0, 4.0), title) as figure:
        panels: Sequence[Axes] = figure.subplots(1, len(metrics), sharex=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, metric in zip(panels, metrics, strict=True):
            handles = _draw_panel(axes, sweep, metric)
        _scale_kl(panels, sweep)
        looks: dict[str, _Look] = {**_LOOKS}
        ordered = [method for method in _LEGEND_ORDER if method in handles]
        labels = [look.label if (look := looks.get(method)) else method for method in ordered]
        figure.legend(
            [handles[method] for method in (*ordered, _GOAL)],
            [*labels, f"KL {_GOAL_KL:g} (largest budget goal)"],
            loc="outside lower center",
            ncols=5,
            frameon=False,
        )


def plot_map(result: dict[str, Any], path: Path, *, title: str) -> None:
    """Heat maps of reward, diversity and mean KL over step size and steps: without a budget above, with it below.

    `result` is of the map study: "step_sizes" (A), "steps" (N), "max_kl" in nats a token, and "maps" of the two, [A][N]
    cells of means. A column's two maps share their colours. Raises ConfigurationError without matplotlib.
    """
    rows = (("without budget", "no KL budget"), ("with budget", f"KL budget {result['max_kl']:g}"))
    with _drawing(path, (12.0, 4.8), title) as figure:
        grid = figure.subplots(len(rows), len(_MAP_COLUMNS), sharex=True, sharey=True)
        for column, (metric, name, colours) in enumerate(_MAP_COLUMNS):
            values = [[[cell[metric] for cell in line] for line in result["maps"][key]] for key, _ in rows]
            scale = _colour_scale(metric, [value for table in values for line in table for value in line])
            for row, table in enumerate(values):
                _draw_heat(grid[row][column], table, colours, scale)
            grid[0][column].set_title(name)
            grid[-1][column].set_xlabel("steps n")
        grid[-1][0].set_xticks(range(len(result["steps"])), [str(steps) for steps in result["steps"]])
        grid[0][0].set_yticks(range(len(result["step_sizes"])), [f"{size:g}" for size in result["step_sizes"]])
        for row, (_, name) in enumerate(rows):
            grid[row][0].set_ylabel(f"{name}\nstep size alpha")


def plot_objectives(result: dict[str, Any], path: Path) -> None:
    """The objectives study in four panels: worst case, target, floor, and reward against time for each search.

    Raises ConfigurationError without matplotlib.
    """
    arms = result["arms"]
    with _drawing(path, (12.0, 6.4), "What each objective does to text") as figure:
        grid = figure.subplots(2, 2)
        _draw_worst_case(grid[0][0], result["worst_cases"])
        _draw_target(grid[0][1], result["target"], arms)
        _draw_floor(grid[1][0], result["floor"], arms)
        _draw_search(grid[1][1], result["search"], arms)
        for axes in grid.flat:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#EEEEEE", linewidth=0.7)
            axes.set_axisbelow(True)


def require_matplotlib() -> None:
    """Raises ConfigurationError without it: to be asked before the hours whose result is to be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigurationError("plots: needs matplotlib; run `pip install recontrol[benchmarks]`") from error


@contextmanager
def _drawing(path: Path, inches: tuple[float, float], title: str) -> Iterator[Figure]:
    """A figure to draw on, which then becomes the file. No setting of the user's or of another figure reaches it."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    text = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=inches, layout=ConstrainedLayoutEngine(w_pad=0.09))
        figure.suptitle(title, fontsize=11, fontweight="bold")
        yield figure
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_text(path, text.getvalue())


def _draw_panel(axes: Axes, sweep: dict[str, list[dict[str, Any]]], metric: str) -> dict[str, Any]:
    """One metric over mean KL. Returns what a legend shows: each method, and the line at the goal."""
    handles: dict[str, Any] = {_GOAL: axes.axvline(_GOAL_KL, color=_GREY, linewidth=0.9, linestyle=":", zorder=1)}
    for base in sweep.get(_BASE, []):
        height = base["figures"][metric]["mean"]
        handles[_BASE] = axes.axhline(height, color=_GREY, linewidth=1.1, linestyle="--", zorder=1)
    for order, (method, look) in enumerate(_LOOKS.items()):
        if points := sorted(sweep.get(method, []), key=lambda point: point["strength"]):
            handles[method] = axes.errorbar(
                [point["figures"]["kl"]["mean"] for point in points],
                [point["figures"][metric]["mean"] for point in points],
                yerr=None if metric == "diversity" else _bars([point["figures"][metric] for point in points]),
                color=look.colour, marker=look.marker, markersize=6, markeredgecolor="white", markeredgewidth=0.5,
                linewidth=1.4, elinewidth=0.7, zorder=2 + order / 10,
            )  # fmt: skip
    axes.set_ylabel("diversity (0 to 1)" if metric == "diversity" else metric)
    axes.set_xlabel("mean KL (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.7)
    axes.set_axisbelow(True)
    return handles


def _draw_worst_case(axes: Axes, parts: list[dict[str, Any]]) -> None:
    """Bars of the lowest gain and the lowest reward of each set of heads, a colour an arm."""
    kinds = {"of_the_gains": "lowest gain", "of_the_means": "lowest mean", "of_a_response": "lowest of\na response"}
    groups = [(part, kind) for part in parts for kind in kinds]
    for place, (label, colour) in enumerate(
        zip((_BASE, "equal shares", "worst case"), (_GREY, *_PALETTE), strict=False)
    ):
        figures = [part[kind][part["arms"][place]] for part, kind in groups]
        axes.bar(
            [x + (place - 1) * 0.27 for x in range(len(groups))], [figure["mean"] for figure in figures], 0.27,
            yerr=_bars(figures), color=colour, label=label, error_kw={"elinewidth": 0.7},
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), [kinds[kind] for _, kind in groups])
    axes.set_ylabel("reward (standard deviations)")
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.legend(frameon=False)
    axes.set_title("worst case of " + ", and of ".join(" + ".join(part["heads"]) for part in parts))


def _draw_target(axes: Axes, target: dict[str, Any], arms: dict[str, Any]) -> None:
    levels = list(target["levels"].values())
    axes.plot(levels, levels, color=_GREY, linewidth=0.9, linestyle=":", label="target")
    for (what, label), colour in zip(
        (("steered", "value after control"), ("values", "value at the end"), ("rewards", "reward of the text")),
        _PALETTE,
        strict=False,
    ):
        figures = [arms[name][what][target["head"]] for name in target["levels"]]
        means = [figure["mean"] for figure in figures]
        axes.errorbar(
            levels, means, yerr=_bars(figures), color=colour, marker="o", linewidth=1.4, elinewidth=0.7, label=label
        )
    axes.set_xlabel(f"target for {target['head']}")
    axes.legend(frameon=False)
    axes.set_title("target")


def _draw_floor(axes: Axes, floor: dict[str, Any], arms: dict[str, Any]) -> None:
    axes.axhline(floor["level"], color=_GREY, linewidth=0.9, linestyle=":", label="floor")
    for name, colour in zip(floor["arms"], (_GREY, *_PALETTE), strict=False):
        _draw_point(axes, arms[name]["rewards"][floor["raised"]], arms[name]["rewards"][floor["kept"]], colour, name)
    axes.set_xlabel(f"{floor['raised']}: reward")
    axes.set_ylabel(f"{floor['kept']}: reward")
    axes.legend(frameon=False)
    axes.set_title("floor")


def _draw_search(axes: Axes, search: dict[str, Any], arms: dict[str, Any]) -> None:
    for name, colour in zip(search["arms"], (_GREY, *_PALETTE), strict=False):
        seconds = arms[name]["response_s"]
        figure = {"mean": seconds, "low": seconds, "high": seconds}
        _draw_point(axes, figure, arms[name]["rewards"][search["head"]], colour, name)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("seconds a response")
    axes.set_ylabel(f"{search['head']}: reward")
    axes.legend(frameon=False)
    axes.set_title("search and gradient")


def _draw_point(axes: Axes, x: dict[str, float], y: dict[str, float], colour: str, label: str) -> None:
    axes.errorbar(
        [x["mean"]], [y["mean"]], xerr=_bars([x]), yerr=_bars([y]), color=colour, marker="o", markersize=7,
        linestyle="none", elinewidth=0.7, label=label,
    )  # fmt: skip


def _bars(figures: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Lengths below and above the means."""
    below = [max(figure["mean"] - figure["low"], 0.0) for figure in figures]
    above = [max(figure["high"] - figure["mean"], 0.0) for figure in figures]
    return below, above


def _scale_kl(panels: Sequence[Axes], sweep: dict[str, list[dict[str, Any]]]) -> None:
    """The panels share their axis of KL: with the first one's, all are set."""
    largest = max((point["figures"]["kl"]["mean"] for points in sweep.values() for point in points), default=0.0)
    right = max(1.25 * largest, 1.15 * _GOAL_KL)
    axes = panels[0]
    axes.set_xscale("symlog", linthresh=_GOAL_KL, linscale=2)
    axes.set_xlim(-0.02, right)
    ticks = [tick for tick in _KL_TICKS if tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([tick for tick in _KL_MINOR_TICKS if tick <= right], minor=True)


def _colour_scale(metric: str, values: Sequence[float]) -> Normalize:
    from matplotlib.colors import Normalize, SymLogNorm

    if metric == "kl":
        return SymLogNorm(linthresh=_GOAL_KL, vmin=0.0, vmax=max(*values, _GOAL_KL))
    return Normalize(min(values), max(values))


def _draw_heat(axes: Axes, table: Sequence[Sequence[float]], colours: str, scale: Normalize) -> None:
    from matplotlib import colormaps

    edges_x, edges_y = ([number - 0.5 for number in range(size + 1)] for size in (len(table[0]), len(table)))
    # Cells as vectors, where `imshow` would embed a picture.
    axes.pcolormesh(edges_x, edges_y, table, norm=scale, cmap=colours, edgecolors="white", linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            red, green, blue, _ = colormaps[colours](scale(value))
            is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(x, y, f"{value:z.2f}", ha="center", va="center", color="black" if is_light else "white")
