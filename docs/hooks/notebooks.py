"""Notebooks as pages, with the outputs that are stored in them. Nothing is executed."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
OPENING = (
    "*This page is a notebook with its stored outputs. To run it, install the package with the "
    "extra `demo` and Jupyter, and open `notebooks/{name}` from the source.*"
)


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook below ``notebooks/``, and its pictures."""
    from properdocs.structure.files import File

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        page, pictures = markdown(cells, path.stem)
        title, _, rest = page.partition("\n")
        page = f"{title}\n\n{OPENING.format(name=path.name)}\n{rest}"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def markdown(cells: list[dict[str, Any]], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's page, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```python\n{source}\n```")
        for kind, value in outputs(cell):
            if kind == "image/png":
                name = f"{stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(value)
                parts.append(f"![Output of the cell above]({name})")
            else:
                shown = value if kind == "text/html" else f"<pre>{html.escape(value)}</pre>"
                parts.append(f'<div class="output">\n{shown.strip()}\n</div>')
    return "\n\n".join(parts) + "\n", pictures


def outputs(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the richest form of each output, as MIME type and text; one text for a stream."""
    printed = ""
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            printed += "".join(output["text"])
            continue
        data = output.get("data", {})
        kind = next((kind for kind in ("image/png", "text/html", "text/plain") if kind in data), "")
        if kind:
            yield kind, "".join(data[kind])
    if printed:
        yield "text/plain", printed.rstrip("\n")
