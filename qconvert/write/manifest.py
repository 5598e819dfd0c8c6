"""qconvert.json: what went in, what came out, and with which versions. The same run gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qconvert.ir.artifact import CARD, MANIFEST, REPORT, Written
from qconvert.ir.reader import read_manifest, tensor_record
from qconvert.output import disk_errors
from qconvert.recipe import Gate, Recipe
from qconvert.workdir import Stage
from qconvert.write.origin import Origin, file_digests

# Fields of a recipe that change no byte of the weights.
AFTERWARDS = ("verify", "evaluation", "gates", "allow_unverified", "plugin_timeout")
FACTORY = "module:"  # followed by FILE.py:FUNCTION, or by a dotted name


def write_manifest(stage: Stage, recipe: Recipe, origin: Origin, written: Written) -> None:
    """Write qconvert.json, after all the files that it digests. report.json and the card hold timings: left out."""
    outputs = {
        path.relative_to(stage.folder).as_posix(): path
        for path in sorted(stage.folder.rglob("*"))
        if path.is_file() and path.relative_to(stage.folder).as_posix() not in (MANIFEST, REPORT, CARD)
    }
    manifest: dict[str, Any] = {
        "schema": 1,
        "recipe": portable_recipe(recipe, stage.output),
        "inputs": dict(origin.inputs),
        "outputs": file_digests(outputs),
        "versions": dict(origin.versions),
        "machine": dict(origin.machine),
        "layers": [layer.model_dump(exclude_none=True) for layer in written.layers],
        "sidecar": {name: tensor_record(tensor) for name, tensor in stage.sidecar.tensors.items()},
    }
    if written.assignment is not None:
        manifest["assignment"] = written.assignment.model_dump(exclude_none=True)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch:
        manifest["created"] = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    path = stage.folder / MANIFEST
    with disk_errors(path):
        path.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def run_digest(recipe: Recipe, origin: Origin) -> str:
    """What names the stage of a run: everything that the bytes of its weights depend on.

    What is only done with them afterwards (verification, gates) is left out: changing it must not quantize again. Evaluation
    samples are among that: what they leave for calibration shows in the samples that were drawn for it.
    """
    settings = portable_recipe(recipe, recipe.output.resolve())
    settings = {key: value for key, value in settings.items() if key not in AFTERWARDS}
    inputs = {name: digest for name, digest in origin.inputs.items() if name.partition(":")[0] != "evaluation"}
    document = [settings, inputs, dict(origin.versions), dict(origin.machine)]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def published_recipe(folder: Path, targets: Sequence[str], evaluation: str | None, gates: Sequence[Gate]) -> Recipe:
    """The recipe to verify a published folder by: that of its manifest, its paths resolved against the folder.

    targets, evaluation, gates: take the place of the recipe's where given.
    """
    settings = read_manifest(folder)["recipe"] | {"output": str(folder), "verify": True, "allow_unverified": False}
    settings["model"] = _resolved(settings["model"], folder)
    for part in ("calibration", "evaluation"):
        if settings[part]["source"] is not None:
            settings[part]["source"] = _resolved(settings[part]["source"], folder)
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
    """The recipe as JSON with every path relative to the output folder, and without `force`, which changes no byte."""

    def relative(value: Any, *, path: bool = False) -> Any:
        if isinstance(value, dict):
            return {key: relative(item, path=key in ("model", "source", "plugins")) for key, item in value.items()}
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
