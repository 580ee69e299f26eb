"""Reading of local files and folders into data sets by split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedmerge_peft.data import data_cards
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.data.folders import image_labels, split_images, split_tables, walk
from fedmerge_peft.data.tables import TABLES, is_table, read_tables, reading
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.data import DataRecipe

logger = logging.getLogger(__name__)


def read_local(path: Path, recipe: DataRecipe, image: str | None) -> dict[str, Dataset]:
    """Read a table, a folder of tables, a folder of images, or a saved data set.

    Args:
        path: File or folder.
        recipe: Separator, quoting and encoding of text files.
        image: Column with images. Its relative paths are looked for beside the table first.

    Raises:
        DataError: The files cannot be read. The message names the file and, for text, the line.
    """
    import datasets

    with reading(path):
        if path.is_file():
            return _read_tables({"train": [path]}, recipe, image)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return dict(saved) if isinstance(saved, dict) else {"train": saved}
        if data_cards.has_files(path / "README.md"):
            return _read_described(str(path), recipe, image)
        if recipe.config is not None:
            raise DataError(
                f"data.config: {path} has no README.md that names the files of the configuration "
                f"{recipe.config!r}; remove data.config, or name the files in data.path"
            )
        return _read_folder(path, recipe, image)


def read_hub(recipe: DataRecipe, image: str | None) -> dict[str, Dataset]:
    """Read a data set on the hub. Its splits and types follow the rules of folders.

    Raises:
        DataError: The data set cannot be loaded.
    """
    name, revision = recipe.path, recipe.revision
    with reading(f"the hub's data set {name}"):
        card = data_cards.download_card(name, revision) / "README.md"
        if recipe.config is not None or data_cards.has_files(card):
            return _read_described(name, recipe, image)
        folder = data_cards.download_tables(name, revision, sorted(_image_suffixes()))
        saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
        if saved or not any(path.name != "README.md" for path in walk(folder)):
            return data_cards.load_described(name, None, revision)
        return read_local(folder, recipe, image)


def _read_described(source: str, recipe: DataRecipe, image: str | None) -> dict[str, Dataset]:
    """Read the splits that a data set card names."""
    described = data_cards.described_files(source, recipe.config, recipe.revision)
    if described is None:
        return data_cards.load_described(source, recipe.config, recipe.revision)
    recipe = recipe.model_copy(update={"separator": recipe.separator or described.separator})
    features = described.features or {}
    texts = {name for name, kind in features.items() if getattr(kind, "dtype", "") == "string"}
    tables = _read_tables(described.splits, recipe, image, texts)
    if not features:
        return tables
    return {
        split: table.select_columns(list(features)).cast(features)
        for split, table in tables.items()
    }


def _read_folder(folder: Path, recipe: DataRecipe, image: str | None) -> dict[str, Dataset]:
    files = list(walk(folder))
    tables = [path for path in files if is_table(path)]
    pictures = [path for path in files if path.suffix.lower() in _image_suffixes()]
    if tables:
        described = [path for path in tables if _describes_images(path)] if pictures else []
        used = described or tables
        read = _read_tables(split_tables(folder, used), recipe, image)
        used = [*used, *_image_paths(read, "image" if described else image)]
    elif pictures:
        used = pictures
        read = _read_images(folder, split_images(folder, pictures))
    else:
        found = f"; it has {join_values((path.name for path in files), 5)}" if files else ""
        raise DataError(
            f"data.path: {folder} has no table ({join_values(TABLES)}) and no image{found}"
        )
    if others := sorted(set(files) - set(used)):
        names = join_values((path.relative_to(folder) for path in others), 10)
        logger.warning("%s: not read (%d of %d files): %s", folder, len(others), len(files), names)
    return read


def _read_tables(
    splits: Mapping[str, Sequence[Path]],
    recipe: DataRecipe,
    image: str | None,
    texts: Set[str] = frozenset(),
) -> dict[str, Dataset]:
    from datasets import concatenate_datasets

    files = [path for paths in splits.values() for path in paths]
    tables = read_table_files(files, recipe, image, texts)
    return {
        split: concatenate_datasets([tables[path] for path in paths])
        for split, paths in splits.items()
    }


def read_table_files(
    files: Sequence[Path], recipe: DataRecipe, image: str | None, texts: Set[str] = frozenset()
) -> dict[Path, Dataset]:
    """Read tables with types that are inferred from all files. Arguments as in ``read_tables``."""
    from datasets import Dataset

    tables = read_tables(files, recipe, texts)
    return {path: Dataset(_with_images(table, path, image)) for path, table in tables.items()}


# ---- images --------------------------------------------------------------------------------------


def _image_suffixes() -> set[str]:
    from PIL.Image import OPEN, registered_extensions

    return {suffix for suffix, kind in registered_extensions().items() if kind in OPEN}


def _read_images(folder: Path, splits: Mapping[str, Sequence[Path]]) -> dict[str, Dataset]:
    """Read images in one folder per label; all splits have the same list of labels."""
    from datasets import ClassLabel, Dataset, Features, Image

    labels = image_labels(folder, splits)
    names = sorted({label for column in labels.values() for label in column})
    features = Features(image=Image(), label=ClassLabel(names=names))
    return {
        split: Dataset.from_dict(
            {"image": [str(path.absolute()) for path in paths], "label": labels[split]},
            features=features,
        )
        for split, paths in splits.items()
    }


def _describes_images(path: Path) -> bool:
    """Return True for ``metadata.csv`` and the like, whose column ``file_name`` names images."""
    return path.name.partition(".")[0] == "metadata"


def _with_images(table: pa.Table, path: Path, image: str | None) -> pa.Table:
    """Replace relative image paths by those of existing files in the folder of the table."""
    if _describes_images(path) and "file_name" in table.column_names:
        image = "image"
        table = table.rename_columns({"file_name": image})
    if image not in table.column_names or not pa.types.is_string(table.schema.field(image).type):
        return table
    values = [_beside(value, path.parent) for value in table.column(image).to_pylist()]
    number = table.column_names.index(image)
    return table.set_column(number, image, pa.array(values, pa.string()))


def _beside(value: str | None, folder: Path) -> str | None:
    beside = None if not value else (folder / value).absolute()
    return str(beside) if beside is not None and beside.is_file() else value


def _image_paths(splits: Mapping[str, Dataset], image: str | None) -> list[Path]:
    columns: list[Any] = [table[image][:] for table in splits.values() if image in table.features]
    return [Path(value) for column in columns for value in column if isinstance(value, str)]
