"""A hook for MkDocs: the pages of benchmarks/results are part of the site, and links to them lead there."""

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Add the measured pages and their figures below ``results/``."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that hold in the repository, such as ../benchmarks/results/speed.md, as they hold in the site."""
    return markdown.replace("](../benchmarks/results/", "](results/")
