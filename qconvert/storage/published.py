"""The recipe of a published folder: with paths that hold wherever folder and source are moved together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qconvert.recipe import Recipe
from qconvert.recipe.gates import Gate
from qconvert.storage.manifest import read_manifest

FACTORY = "module:"  # followed by FILE.py:FUNCTION, or by a dotted name

# Fields that name files or folders.
PLACES = ("model", "adapter", "trained", "source", "plugins")


def published_recipe(folder: Path, targets: Sequence[str], evaluation: str | None, gates: Sequence[Gate]) -> Recipe:
    """Return the recipe to verify a published folder by: that of its manifest, its paths resolved against the folder.

    targets, evaluation, gates: take the place of the recipe's where given.
    """
    settings = read_manifest(folder)["recipe"] | {"output": str(folder), "verify": True, "allow_unverified": False}
    settings["model"] = _resolved(settings["model"], folder)
    for part in ("calibration", "evaluation"):
        if settings[part]["source"] is not None:
            settings[part]["source"] = _resolved(settings[part]["source"], folder)
    for part in ("trained", "adapter"):
        if settings.get(part):
            settings[part] = _resolved(settings[part], folder)
    settings["plugins"] = [_resolved(path, folder) for path in settings["plugins"]]
    if targets:
        settings["targets"] = list(targets)
    if evaluation is not None:
        settings["evaluation"]["source"] = evaluation
    if gates:
        settings["gates"] = [gate.model_dump() for gate in gates]
    return Recipe.from_settings(settings)


def _resolved(source: str, folder: Path) -> str:
    if source.startswith(FACTORY) and ".py:" in source:
        file, _, factory = source.removeprefix(FACTORY).rpartition(":")
        return f"{FACTORY}{(folder.resolve() / file).resolve()}:{factory}"
    path = folder.resolve() / source
    return str(path.resolve()) if path.exists() else source


def portable_recipe(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Return the recipe as JSON with every path relative to the output folder, and without `force`, which changes no byte."""

    def relative(value: Any, *, path: bool = False) -> Any:
        if isinstance(value, dict):
            return {key: relative(item, path=key in PLACES) for key, item in value.items()}
        if isinstance(value, list):
            return [relative(item, path=path) for item in value]
        if path and isinstance(value, str) and value.startswith(FACTORY) and ".py:" in value:
            file, _, factory = value.removeprefix(FACTORY).rpartition(":")
            return f"{FACTORY}{os.path.relpath(file, output)}:{factory}"
        if isinstance(value, str) and (Path(value).is_absolute() or (path and Path(value).exists())):
            return os.path.relpath(value, output)
        return value

    document: dict[str, Any] = relative(recipe.model_dump(mode="json", exclude={"force", "output"}))
    return document | {"output": "."}
