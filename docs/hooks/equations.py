"""Equations as MathML, which needs no script, and a font to draw them."""

from __future__ import annotations

import html
import re
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Add ziamath's font below ``fonts/``."""
    from properdocs.structure.files import File

    font = str(package_files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")
    files.append(File.generated(config, f"fonts/{Path(font).name}", abs_src_path=font))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Replace the LaTeX that pymdownx.arithmatex has marked."""
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
