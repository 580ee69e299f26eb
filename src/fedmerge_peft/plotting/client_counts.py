"""Picture of the clients' examples: a heat map of labels, and bars of the splits' sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge_peft.data.clients import FederatedData
from fedmerge_peft.data.summary import SPLITS, label_counts, split_sizes
from fedmerge_peft.plotting.palette import COLORMAP, COLORS
from fedmerge_peft.plotting.render import Picture, set_names


@dataclass(frozen=True)
class ClientCounts(Picture):
    """Training examples by client and label, and examples by client and split."""

    data: FederatedData
    column: str | None
    """Column whose values are the labels; None to draw the splits only."""

    def draw(self) -> Any:
        """Return a new ``matplotlib.figure.Figure``.

        Raises:
            DataError: The column cannot be counted (``encode_classes``), such as a column with
                nulls.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        counts, labels = label_counts(self.data, self.column)
        clients = [client.name for client in self.data.clients]
        width = 4 + min(10, 3 + 0.12 * len(labels)) * bool(labels)
        size = (width, min(14, 2.8 + 0.16 * len(clients)))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        ratios = [3, 1] if labels else [1]
        panels = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios, squeeze=False)[0]
        if labels:
            image = panels[0].imshow(
                np.ma.masked_equal(counts, 0),
                cmap=COLORMAP,
                aspect="auto",
                interpolation="nearest",
                vmin=0,
                vmax=max(2, int(counts.max())),
            )
            set_names(panels[0].xaxis, labels, turned=True)
            panels[0].set_xlabel(str(self.column))
            label = "training examples (count), white is none"
            figure.colorbar(image, ax=panels[0], location="top", aspect=40, label=label)
        _draw_sizes(panels[-1], split_sizes(self.data))
        panels[0].set_ylabel("client")
        set_names(panels[0].yaxis, clients)
        panels[0].set_ylim(len(clients) - 0.5, -0.5)
        return figure


def _draw_sizes(axes: Any, sizes: Any) -> None:
    left = np.zeros(len(sizes), dtype=np.int64)
    for split, size, color in zip(SPLITS, sizes.T, COLORS, strict=False):
        axes.barh(np.arange(len(sizes)), size, left=left, height=0.8, color=color, label=split)
        left = left + size
    axes.set_xlabel("examples (count)")
    style = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    axes.legend(fontsize="small", **style)
