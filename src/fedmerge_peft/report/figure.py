"""A figure of a report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from fedmerge_peft.plotting import svg
from fedmerge_peft.plotting.specs import Drawing


@dataclass(frozen=True)
class Figure:
    """A figure with title and caption."""

    name: str
    """Name of the figure's files, without suffix."""
    title: str
    drawing: Drawing
    caption: str

    @cached_property
    def markup(self) -> Markup:
        """An ``svg`` element in the page's colors; empty if there is nothing to draw."""
        return svg.draw(self.drawing)
