"""Hooks for MkDocs: measured pages, and equations as MathML with a font to draw them."""

from __future__ import annotations

import html
import re
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Add the measured pages and their figures below ``results/``, and ziamath's font."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    font = str(package_files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")
    files.append(File.generated(config, f"fonts/{Path(font).name}", abs_src_path=font))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that hold in the repository at the pages of the site."""
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_page_content(content: str, **_: Any) -> str:
    """Replace the LaTeX that pymdownx.arithmatex has marked by MathML, which needs no script."""
    from latex2mathml.converter import convert

    def inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]))

    def block(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]), display="block")

    content = re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, content, flags=re.DOTALL
    )
    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.DOTALL
    )
