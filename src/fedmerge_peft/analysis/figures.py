"""The figure of a comparison."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.analysis.comparison import Comparison
from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.palette import COLORS

if TYPE_CHECKING:
    import pandas

SUFFIXES = (".png", ".svg", ".pdf")


def check_suffix(path: PathLike[str] | str) -> None:
    """Raise ``RunError`` unless ``plot`` supports the file's suffix."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise RunError(
            f"{path}: figures are written as {', '.join(SUFFIXES)}; use one of these suffixes"
        )


def plot(comparison: Comparison, path: PathLike[str] | str) -> None:
    """Draw each setting: the mean score by round, and the final mean and worst tenth per method.

    Bands and error bars are one standard deviation over runs.

    Args:
        comparison: The comparison.
        path: The file; its suffix, one of ``SUFFIXES``, selects the format.

    Raises:
        RunError: The suffix is not supported, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_suffix(path)
    settings = list(comparison.methods.groupby("setting", sort=False))
    height = sum(2.2 + 0.25 * max(4, len(methods)) for _, methods in settings)
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(settings), 2, squeeze=False, width_ratios=[3, 2])
    for (setting, methods), (left, right) in zip(settings, rows, strict=True):
        colors = dict(zip(sorted(methods["method"]), _colors(len(methods)), strict=True))
        score = methods["metric"].iloc[0].replace("_", " ")
        _draw_curves(left, comparison.curves[comparison.curves["setting"] == setting], colors)
        left.set_title(setting, loc="left", fontsize="medium", parse_math=False)
        left.set_ylabel(f"{score}, mean over clients")
        _draw_finals(right, methods.reset_index(drop=True), colors)
        right.set_xlabel(f"final {score}")
    try:
        figure.savefig(path, format=Path(path).suffix.lower().removeprefix("."), dpi=150)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return (
        list(COLORS[:count])
        if count <= len(COLORS)
        else [colormaps["turbo"](number / (count - 1)) for number in range(count)]
    )


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

    The names are also the legend of the curves.
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
