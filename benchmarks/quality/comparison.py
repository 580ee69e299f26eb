"""Settings of the comparison: a recipe, and the methods with the values they may choose from.

A setting is a YAML file beside this program. ``comparison.yaml`` has what all settings have in
common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from ledger import Effective, effective
from search import Axis, Choice

from fedmerge_peft import Recipe

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Method:
    """A method, or a variant of one."""

    name: str
    strategy: str
    overrides: tuple[str, ...] = ()
    """Values that all of its runs in the setting have."""
    axes: tuple[Axis, ...] = ()
    """Axes of its search; none if it is not tuned."""
    seeds: tuple[int, ...] = ()
    """Seeds of the reported runs."""
    revision: int = 0
    core: bool = True

    def settings(self, choice: Choice) -> list[str]:
        """Return the overrides of a candidate."""
        chosen = zip(self.axes, choice, strict=True)
        return [*self.overrides, *(f"{axis.key}={value}" for axis, value in chosen)]


class Setting:
    """A recipe and its methods.

    Args:
        name: A YAML file beside this program, without .yaml.
        data: Folder with the data files; None if no runs are started.
    """

    def __init__(self, name: str, data: Path | None = None) -> None:
        self.name = name
        common, own = _read("comparison"), _read(name)
        self.source: str = own["recipe"]
        self.tuning_seed: int = common["tuning_seed"]
        self.needs_data = "data" in own
        file = data / own["data"] if data and self.needs_data else None
        self.base = [*common["overrides"], *own.get("overrides", [])]
        self.base += [f"data.path={file}"] if file else []
        self.skipped: dict[str, str] = own.get("skipped", {})
        """Reasons of methods that the setting does not have."""
        self.inputs = _digests(file, Recipe.load(self.source, self.base))
        axes = {
            key: {**axis, **own.get("axes", {}).get(key, {})}
            for key, axis in common["axes"].items()
        }
        groups = ["core", "others"] if own.get("methods") == "all" else ["core"]
        methods = (
            [
                Method(variant, "fedmerge", tuple(overrides), seeds=tuple(own["seeds"]))
                for variant, overrides in own["variants"].items()
            ]
            if "variants" in own
            else [
                Method(
                    method,
                    entry.get("strategy", method),
                    (*entry.get("overrides", []), *own.get("overrides_of", {}).get(method, [])),
                    tuple(_axis(**axes[axis]) for axis in entry.get("axes", [])),
                    tuple({**common["seeds"], **own.get("seeds", {})}[group]),
                    {**entry, **own.get("changed", {}).get(method, {})}.get("revision", 0),
                    group == "core",
                )
                for group in groups
                for method, entry in common[group].items()
                if method not in self.skipped
            ]
        )
        self.methods = {method.name: method for method in methods}
        self.reference = methods[0].name
        """Method from which the others' differences are taken."""
        self.recipe = cache(self._recipe)
        self.effective = cache(self._effective)

    def _recipe(self, method: Method, choice: Choice, seed: int) -> Recipe:
        """Return the recipe of a run."""
        named = [f"strategy={method.strategy}", f"seed={seed}"]
        return Recipe.load(self.source, [*self.base, *named, *method.settings(choice)])

    def _effective(self, method: Method, choice: Choice, seed: int) -> Effective:
        """Return the values that decide a run's result."""
        inputs = {**self.inputs, "revision": method.revision}
        return effective(self.recipe(method, choice, seed), inputs)


def settings(names: Iterable[str], data: Path | None = None) -> list[Setting]:
    """Return settings by name; without names, those of ``comparison.yaml``.

    Raises:
        SystemExit: There is no such setting, or its data file does not exist.
    """
    known = sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "comparison")
    names = list(names) or _read("comparison")["settings"]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no setting {', '.join(unknown)}; there are {', '.join(known)}")
    return [Setting(name, data) for name in names]


def _axis(key: str, first: list[Any], values: list[Any]) -> Axis:
    return Axis(key, tuple(values), tuple(first))


def _read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8")))


def _digests(data: Path | None, recipe: Recipe) -> Mapping[str, str]:
    """Return digests of the data file and of a backbone that is a folder, as far as they exist."""
    digests = {}
    if data is not None:
        if not data.is_file():
            raise SystemExit(
                f"{data} does not exist; give the folder of the data files with --data"
            )
        digests["data"] = _digest([data])
    model = Path(recipe.backbone.model)
    if model.is_dir():
        digests["backbone"] = _digest(sorted([*model.glob("*.safetensors"), *model.glob("*.json")]))
    return digests


@cache
def _file_digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _digest(files: list[Path]) -> str:
    return sha256("".join(map(_file_digest, files)).encode()).hexdigest()[:16]
