"""Pages whose home is outside ``docs/``: measured results and the project's own files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINKS = (  # in the repository, on the site
    (r"\]\((?:\.\./)?benchmarks/results/", "](results/"),
    (r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)"),
    (rf"\]\(\.\./({'|'.join(PROJECT)})", r"](\1"),
    (r"\]\(docs/", "]("),
)


def on_files(files: Any, config: Any) -> Any:
    """Add the measured pages with their figures below ``results/``, and the project's files."""
    from properdocs.structure.files import File

    for path in sorted((ROOT / "benchmarks" / "results").glob("*.*")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for name in PROJECT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that hold in the repository at the pages of the site."""
    for pattern, link in LINKS:
        markdown = re.sub(pattern, link, markdown)
    return markdown
