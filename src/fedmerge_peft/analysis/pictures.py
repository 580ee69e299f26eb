"""Figure and table of a comparison, for notebooks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.plotting.palette import COLORS, method_styles
from fedmerge_peft.plotting.render import Picture
from fedmerge_peft.util.html import page, table, text

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ComparisonPicture(Picture):
    """Two panels per setting: mean scores by round, and final means and worst tenths by method.

    Bands and error bars are one standard deviation over runs.
    """

    methods: pandas.DataFrame
    """``Comparison.methods``."""
    curves: pandas.DataFrame
    """``Comparison.curves``."""

    def draw(self) -> Any:
        return _draw(self.methods, self.curves)


def comparison_html(methods: pandas.DataFrame) -> str:
    """Return an HTML table for each setting, the best method first."""
    parts = []
    for setting, own in methods.groupby("setting", sort=False):
        score = str(own["metric"].iloc[0]).replace("_", " ")
        columns = {
            "method": own["method"],
            "runs": own["runs"],
            score: _with_std(own, "mean", ".3f"),
            "worst tenth": _with_std(own, "worst_tenth", ".3f"),
            "gain over local": _with_std(own, "gain_over_local", "+.3f"),
            "gain over fedavg": _with_std(own, "gain_over_fedavg", "+.3f"),
            "MB down": [f"{count / 1e6:.3g}" for count in own["bytes_down"]],
            "seconds": [f"{seconds:.3g}" for seconds in own["seconds"]],
        }
        shown = {name: list(map(str, cells)) for name, cells in columns.items()}
        shown = {name: cells for name, cells in shown.items() if any(cells)}
        rows = list(zip(*shown.values(), strict=True))
        parts += [f"<p>{text(setting)}</p>", table(list(shown), rows)]
    return page("Final scores of the served models", *parts)


def _with_std(methods: pandas.DataFrame, name: str, form: str) -> list[str]:
    """Format a column with its standard deviation over runs; nan becomes an empty text."""
    pairs = zip(methods[name], methods[f"{name}_std"], strict=True)
    return [
        ""
        if math.isnan(mean)
        else format(mean, form) + ("" if math.isnan(std) else f" ± {std:.3f}")
        for mean, std in pairs
    ]


def _draw(all_methods: pandas.DataFrame, curves: pandas.DataFrame) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(all_methods.groupby("setting", sort=False))
    height = sum(2.2 + 0.25 * max(4, len(methods)) for _, methods in settings)
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(settings), 2, squeeze=False, width_ratios=[3, 2])
    for (setting, methods), (left, right) in zip(settings, rows, strict=True):
        colors = _colors({name: name.split(" ")[0] for name in sorted(methods["method"])})
        score = methods["metric"].iloc[0].replace("_", " ")
        _draw_curves(left, curves[curves["setting"] == setting], colors)
        left.set_title(setting, loc="left", fontsize="medium", parse_math=False)
        left.set_ylabel(f"{score}, mean over clients")
        _draw_finals(right, methods.reset_index(drop=True), colors)
        right.set_xlabel(f"final {score}")
    return figure


def _colors(strategies: dict[str, str]) -> dict[str, Any]:
    """Return a color for each method: from the palette or, if it has too few, from a colormap.

    Args:
        strategies: Strategy of each method by the method's name.
    """
    from matplotlib import colormaps

    styles = method_styles(strategies)
    if len(set(styles.values())) == len(styles):
        return {name: COLORS[style] for name, style in styles.items()}
    last = len(styles) - 1
    return {name: colormaps["turbo"](place / last) for place, name in enumerate(styles)}


def _draw_curves(axis: Any, curves: pandas.DataFrame, colors: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for method, color in colors.items():
        by_round = curves[curves["method"] == method].groupby("rounds")["mean"].agg(["mean", "std"])
        mean, std = by_round["mean"], by_round["std"].fillna(0)
        marker = "o" if len(mean) == 1 else None  # a line of one point would be invisible
        axis.plot(by_round.index, mean, color=color, marker=marker)
        axis.fill_between(
            by_round.index, mean - std, mean + std, color=color, alpha=0.15, linewidth=0
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("rounds completed")
    axis.grid(alpha=0.3)


def _draw_finals(axis: Any, methods: pandas.DataFrame, colors: dict[str, Any]) -> None:
    """Draw one row per method: a filled dot for the mean, a hollow one for the worst tenth.

    The methods' names, in their colors, are also the legend of the curves.
    """
    from matplotlib.lines import Line2D

    for name, face in (("mean", None), ("worst_tenth", "white")):
        for row, method in methods.iterrows():
            style = {
                "color": colors[method["method"]],
                "markerfacecolor": face,
                "markersize": 6,
                "elinewidth": 1.5,
                "capsize": 3,
            }
            axis.errorbar(
                method[name], row, xerr=np.nan_to_num(method[f"{name}_std"]), fmt="o", **style
            )
    axis.set_yticks(methods.index, labels=methods["method"], parse_math=False)
    for label in axis.get_yticklabels():
        label.set_color(colors[label.get_text()])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.grid(alpha=0.3, axis="x")
    keys = [
        Line2D([], [], color="gray", marker="o", linestyle="", markerfacecolor=face)
        for face in ("gray", "white")
    ]
    style = {
        "loc": "lower center",
        "bbox_to_anchor": (0.5, 1.0),
        "ncols": 2,
        "frameon": False,
        "fontsize": "small",
    }
    axis.legend(keys, ["mean over clients", "worst 10 % of clients"], **style)
