"""Find the tables that a data set card names, and download data sets from the hub.

``local_files`` reads these tables like other local tables, so codes with leading zeros stay text.
The package ``datasets`` reads the files instead if one of them is not a supported table, if the
card sets reader options other than the separator, or if it declares column types for a format other
than csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.tables import TABLES, is_table
from fedmerge_peft.data.text_files import COMPRESSIONS

if TYPE_CHECKING:
    from datasets import Dataset, Features

_READERS = {"CsvConfig", "JsonConfig", "ParquetConfig", "ArrowConfig"}
_NO_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
"""Reader options that do not change how rows are read, and the separator, which is supported."""


def has_files(card: Path) -> bool:
    """Return True if a data set card names the files of its splits."""
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return False
    try:
        return "configs" in DatasetCard.load(card).data.to_dict()
    except (ValueError, OSError):  # no valid card
        return False


@dataclass(frozen=True)
class DescribedFiles:
    """Tables that a data set card names."""

    splits: dict[str, list[Path]]
    """Files of each split."""
    separator: str | None
    """Character between fields; None for a comma or a format without separators."""
    features: Features | None
    """Declared types of the columns of csv files; None if the card declares no types."""


def described_files(source: str, config: str | None, revision: str | None) -> DescribedFiles | None:
    """Return the tables that a card names, or None if ``datasets`` must read them.

    Args:
        source: Folder or hub id.
        config: Configuration, or None for the default one.
        revision: Branch, tag or commit on the hub.
    """
    import datasets

    builder = datasets.load_dataset_builder(source, config, revision=revision)
    options = builder.config
    kind, features = type(options).__name__, builder.info.features
    if kind not in _READERS or _changed(options) - _NO_OPTIONS:
        return None
    if features is not None and kind != "CsvConfig":
        return None
    named: Mapping[Any, Sequence[Any]] = options.data_files
    if not all(is_table(Path(str(file))) for files in named.values() for file in files):
        return None
    separator = getattr(options, "sep", ",")
    splits = {str(split): [_local(str(file)) for file in files] for split, files in named.items()}
    return DescribedFiles(splits, None if separator == "," else separator, features)


def load_described(source: str, config: str | None, revision: str | None) -> dict[str, Dataset]:
    """Load all splits of a folder or of a data set on the hub, with the readers of ``datasets``."""
    import datasets

    loaded = datasets.load_dataset(source, config, revision=revision)
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def download_card(name: str, revision: str | None) -> Path:
    """Download the card of a data set on the hub, if there is one, and return its folder."""
    return _download(name, revision, ["README.md"])


def download_tables(name: str, revision: str | None, images: Sequence[str]) -> Path:
    """Download the tables, images and audio of a data set on the hub; return their folder.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.
        images: Suffixes of image and audio files.
    """
    compressed = [f"{suffix}{ending}" for suffix in TABLES for ending in COMPRESSIONS]
    return _download(name, revision, [f"*{end}" for end in (*TABLES, *compressed, *images)])


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    )


def _changed(options: Any) -> set[str]:
    usual = type(options)()
    return {
        field.name
        for field in fields(options)
        if getattr(options, field.name) != getattr(usual, field.name)
    }


def _local(file: str) -> Path:
    """Return the path of a file, downloaded if it is on the hub (``hf://datasets/...``)."""
    if "://" not in file:
        return Path(file)
    from huggingface_hub import HfFileSystem, hf_hub_download

    place: Any = HfFileSystem().resolve_path(file)
    return Path(
        hf_hub_download(
            place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision
        )
    )
