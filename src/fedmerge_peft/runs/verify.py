"""Compare the files of a run directory or an export with their SHA-256 sums."""

from __future__ import annotations

from pathlib import Path

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs import checkpoint, documents
from fedmerge_peft.runs.cleanup import files_in, is_run_file, is_temporary, is_tracked
from fedmerge_peft.runs.directory import RunDirectory, round_of
from fedmerge_peft.util import checked
from fedmerge_peft.util.folders import SUMS, faults

_ALWAYS = ("environment.json", "clients.json", "task.json", "backbone.json", "adapter_config.json")
"""Documents that every run with a finished round must have."""


def verify(path: Path) -> int:
    """Verify a run directory, including its baselines and exports, or a single export.

    Files of experiment trackers and temporary files of interrupted writes are not verified.

    Args:
        path: A run directory, or a folder that ``fedmerge export`` has written.

    Returns:
        The number of checked files, including each ``SHA256SUMS``.

    Raises:
        RunError: Files are damaged, missing, inconsistent, or not part of the run or export (the
            message has one line for each); the folder contains neither a run nor an export; or a
            run contains links or has another format.
    """
    if not (path / "recipe.yaml").is_file():
        if not (path / SUMS).is_file():
            raise RunError(
                f"{path} holds neither a run (recipe.yaml) nor an export ({SUMS}); give the folder "
                "of a run or of an export"
            )
        problems, count = faults(path), len(files_in(path))
    else:
        RunDirectory.open(path)
        problems, count = _verify_run(path)
    if problems:
        raise RunError("\n".join(problems))
    return count


def _verify_run(path: Path) -> tuple[list[str], int]:
    """Return a sentence for each fault of a run directory, and the number of checked files."""
    problems: list[str] = []
    exports = {file.parent for file in path.rglob(SUMS)}
    exports -= {folder for folder in exports if exports & set(folder.parents)}
    files = [
        file
        for file in sorted(files_in(path))
        if not is_temporary(name := file.relative_to(path).as_posix()) and not is_tracked(name)
    ]
    for file in files:
        if exports & set(file.parents):
            continue
        if not is_run_file(file.relative_to(path).as_posix()):
            problems.append(f"{file} does not belong to the run, and has no SHA-256 sum")
            continue
        try:
            _verify_file(file)
        except RunError as error:
            problems.append(str(error))
    for recipe in path.rglob("recipe.yaml"):
        if not exports & set(recipe.parents):
            problems += _missing(recipe.parent)
    for folder in sorted(exports):
        problems += faults(folder)
    if not problems:
        for recipe in path.rglob("recipe.yaml"):
            if not exports & set(recipe.parents):
                problems += _inconsistent(recipe.parent)
    return problems, len(files)


def _verify_file(file: Path) -> None:
    """Read a file of a run directory. Raises ``RunError`` if it is damaged."""
    if file.name == "recipe.yaml":
        checked.read_text(file)
    elif file.name == "metrics.jsonl":
        RunDirectory(file.parent).records  # noqa: B018 (reading verifies)
    elif file.suffix == ".json":
        documents.read(file)
    elif file.name.endswith("soup.safetensors"):
        AdapterSoup.load(file)
    elif file.parent.name == "checkpoint":
        checkpoint.read(file.parent, round_of(file))
    else:
        checked.read_tensors(file)


def _inconsistent(run: Path) -> list[str]:
    """Return one sentence if files disagree on the number of clients or adapters, else []."""
    directory = RunDirectory(run)
    if not directory.rounds_on_disk:
        return []
    try:
        directory.label_counts  # noqa: B018 (reading verifies)
        for _ in directory.weights_by_round():
            pass
        directory.state()
    except RunError as error:
        return [str(error)]
    return []


def _missing(run: Path) -> list[str]:
    """Return a sentence for each required file that a run with finished rounds lacks."""
    rounds = RunDirectory(run).rounds_on_disk
    if not rounds:
        return []
    weights = [f"weights/round-{number:05}.safetensors" for number in range(1, rounds + 1)]
    names = [*_ALWAYS, "soup.safetensors", "weights.safetensors", *weights]
    return [f"{run / name} is missing" for name in names if not (run / name).is_file()]
