"""Read local files, folders and data sets on the hub into data sets by split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedmerge_peft.data import data_cards
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.data.folders import media_labels, split_media, split_tables, walk
from fedmerge_peft.data.tables import TABLES, is_table, read_tables, reading
from fedmerge_peft.data.text_files import format_suffix
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.data import DataRecipe

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"})
"""Suffixes of audio files. Each task determines which of these formats it decodes."""


def read_local(path: Path, recipe: DataRecipe, media: str | None) -> dict[str, Dataset]:
    """Read a table, a folder of tables, images or audio, or a saved data set; return the splits.

    Args:
        path: File or folder.
        recipe: Configuration name, and separator, quoting and encoding of text files.
        media: Column with images or audio. A relative path in this column is resolved against the
            folder of the table if it leads to a file there.

    Raises:
        DataError: A file cannot be read; the message then names the file and, if a row of text is
            invalid, its line. Or the folder has no suitable files; a table exists in two formats;
            only some files or folders are named as splits (``split_tables``, ``split_media``);
            images or audio have no labels; no card names the files of ``recipe.config``.
    """
    import datasets

    with reading(path):
        if path.is_file():
            return _read_tables({"train": [path]}, recipe, media)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return dict(saved) if isinstance(saved, dict) else {"train": saved}
        if data_cards.has_files(path / "README.md"):
            return _read_described(str(path), recipe, media)
        if recipe.config is not None:
            raise DataError(
                f"data.config: {path} has no README.md that names the files of the configuration "
                f"{recipe.config!r}; remove data.config, or name the files in README.md (configs)"
            )
        return _read_folder(path, recipe, media)


def read_hub(recipe: DataRecipe, media: str | None) -> dict[str, Dataset]:
    """Read a data set on the hub.

    Splits and types are determined as for a local folder, with two exceptions: the package
    ``datasets`` determines them if ``save_to_disk`` wrote the data set, or if the hub has no file
    of it in a supported format.

    Raises:
        DataError: The data set cannot be loaded.
    """
    name, revision = recipe.path, recipe.revision
    with reading(f"the hub's data set {name}"):
        card = data_cards.download_card(name, revision) / "README.md"
        if recipe.config is not None or data_cards.has_files(card):
            return _read_described(name, recipe, media)
        folder = data_cards.download_tables(
            name, revision, sorted(_image_suffixes() | AUDIO_SUFFIXES)
        )
        saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
        if saved or not any(path.name != "README.md" for path in walk(folder)):
            return data_cards.load_described(name, None, revision)
        return read_local(folder, recipe, media)


def _read_described(source: str, recipe: DataRecipe, media: str | None) -> dict[str, Dataset]:
    """Read the splits that a data set card names."""
    described = data_cards.described_files(source, recipe.config, recipe.revision)
    if described is None:
        return data_cards.load_described(source, recipe.config, recipe.revision)
    recipe = recipe.model_copy(update={"separator": recipe.separator or described.separator})
    features = described.features or {}
    texts = {name for name, kind in features.items() if getattr(kind, "dtype", "") == "string"}
    tables = _read_tables(described.splits, recipe, media, texts)
    if not features:
        return tables
    return {
        split: table.select_columns(list(features)).cast(features)
        for split, table in tables.items()
    }


def _read_folder(folder: Path, recipe: DataRecipe, media: str | None) -> dict[str, Dataset]:
    files = list(walk(folder))
    tables = [path for path in files if is_table(path)]
    kind, media_files = _media_files(files)
    if tables:
        described = [path for path in tables if _describes_media(path)] if media_files else []
        used = described or tables
        _reject_copies(used)
        read = _read_tables(split_tables(folder, used), recipe, kind if described else media)
        used = [*used, *_media_paths(read, kind if described else media)]
    elif media_files:
        used = media_files
        read = _read_media(folder, split_media(folder, media_files), kind)
    else:
        others = f"; it has {join_values((path.name for path in files), 5)}" if files else ""
        raise DataError(
            f"data.path: {folder} has no table ({join_values(TABLES)}), no image and no audio"
            f"{others}; set data.path to a folder that has tables, images or audio"
        )
    if unread := sorted(set(files) - set(used)):
        names = join_values((path.relative_to(folder) for path in unread), 10)
        logger.warning("%s: not read (%d of %d files): %s", folder, len(unread), len(files), names)
    return read


def _reject_copies(tables: Sequence[Path]) -> None:
    """Raise ``DataError`` if a table exists in two formats, as its rows might count twice."""
    seen: dict[str, Path] = {}
    for path in tables:
        name = str(path)[: str(path).lower().rindex(format_suffix(path))]
        if (other := seen.setdefault(name, path)) != path:
            raise DataError(
                f"data.path: {other} and {path} have the same name in two formats, so their rows "
                "may count twice; keep one of them, or rename one"
            )


def _read_tables(
    splits: Mapping[str, Sequence[Path]],
    recipe: DataRecipe,
    media: str | None,
    texts: Set[str] = frozenset(),
) -> dict[str, Dataset]:
    from datasets import concatenate_datasets

    files = [path for paths in splits.values() for path in paths]
    tables = read_table_files(files, recipe, media, texts)
    return {
        split: concatenate_datasets([tables[path] for path in paths])
        for split, paths in splits.items()
    }


def read_table_files(
    files: Sequence[Path], recipe: DataRecipe, media: str | None, texts: Set[str] = frozenset()
) -> dict[Path, Dataset]:
    """Read tables with ``read_tables``, and resolve the paths in the column ``media``."""
    from datasets import Dataset

    tables = read_tables(files, recipe, texts)
    return {path: Dataset(_with_media(table, path, media)) for path, table in tables.items()}


# ---- images and audio ----------------------------------------------------------------------------


def _image_suffixes() -> set[str]:
    from PIL.Image import OPEN, registered_extensions

    return {suffix for suffix, kind in registered_extensions().items() if kind in OPEN}


def _media_files(files: Sequence[Path]) -> tuple[str, list[Path]]:
    """Return the images, or the audio if there are no images, after the name of their column."""
    for column, suffixes in (("image", _image_suffixes()), ("audio", AUDIO_SUFFIXES)):
        if matches := [path for path in files if path.suffix.lower() in suffixes]:
            return column, matches
    return "image", []


def _read_media(
    folder: Path, splits: Mapping[str, Sequence[Path]], column: str
) -> dict[str, Dataset]:
    """Read media files in one folder per label; all splits get the same list of labels."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    labels = media_labels(folder, splits)
    names = sorted({label for split_labels in labels.values() for label in split_labels})
    # The type Audio cannot be created without torchcodec.
    kind = Image() if column == "image" else Value("string")
    features = Features({column: kind, "label": ClassLabel(names=names)})
    return {
        split: Dataset.from_dict(
            {column: [str(path.absolute()) for path in paths], "label": labels[split]},
            features=features,
        )
        for split, paths in splits.items()
    }


def _describes_media(path: Path) -> bool:
    """Return True if a table has the name ``metadata``, as it then describes images or audio."""
    return path.name.partition(".")[0] == "metadata"


def _with_media(table: pa.Table, path: Path, media: str | None) -> pa.Table:
    """Resolve relative paths in the media column against the folder of the table.

    A path that leads to no file there is left unchanged.
    In a metadata table, the column ``file_name`` gets the name of the media column.
    """
    if _describes_media(path) and "file_name" in table.column_names:
        media = media or "image"
        table = table.rename_columns({"file_name": media})
    if media not in table.column_names or not _is_text(table.schema.field(media).type):
        return table
    values = [_beside(value, path.parent) for value in table.column(media).to_pylist()]
    number = table.column_names.index(media)
    return table.set_column(number, media, pa.array(values, pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))  # pandas writes both


def _beside(value: str | None, folder: Path) -> str | None:
    beside = None if not value else (folder / value).absolute()
    return str(beside) if beside is not None and beside.is_file() else value


def _media_paths(splits: Mapping[str, Dataset], media: str | None) -> list[Path]:
    columns: list[Any] = [table[media][:] for table in splits.values() if media in table.features]
    return [Path(value) for column in columns for value in column if isinstance(value, str)]
