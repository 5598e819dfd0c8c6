"""qconvert.json: what went in, what came out, and with which versions. The same run gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qconvert.errors import InputError
from qconvert.ir.artifact import CARD, MANIFEST, REPORT, Written
from qconvert.ir.reader import read_manifest, sha256, tensor_record
from qconvert.output import disk_errors
from qconvert.plugin.distribution import Distribution
from qconvert.recipe import Gate, Recipe
from qconvert.workdir import Stage

# Fields of a recipe that change no byte of the weights.
AFTERWARDS = ("verify", "gates", "allow_unverified", "plugin_timeout")
FACTORY = "module:"  # followed by FILE.py:FUNCTION, or by a dotted name
# The distributions whose version can change the output.
PACKAGES = ("compressed-tensors", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "qconvert", "torch", "transformers")


def file_digests(files: Mapping[str, Path | bytes]) -> dict[str, str]:
    """Name -> hex sha256 of the content. Raises InputError QC-WRITE-005 for a file that can't be read."""

    def digest(path: Path | bytes) -> str:
        try:
            return sha256(path)
        except OSError as error:
            raise InputError(
                "QC-WRITE-005", f"{error.filename} can't be read: {error.strerror}", hint="check the file"
            ) from error

    with ThreadPoolExecutor(2) as pool:  # hashing leaves the GIL, and two saturate most disks
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def write_manifest(stage: Stage, recipe: Recipe, inputs: Mapping[str, str], written: Written, plugin: Distribution) -> None:
    """Write qconvert.json, after all the files that it digests. report.json and the card hold timings: left out.

    inputs: name -> sha256 of every file that was read (`file_digests`).
    plugin: the distribution that the quantizer came from.
    """
    outputs = {
        path.relative_to(stage.folder).as_posix(): path
        for path in sorted(stage.folder.rglob("*"))
        if path.is_file() and path.relative_to(stage.folder).as_posix() not in (MANIFEST, REPORT, CARD)
    }
    manifest: dict[str, Any] = {
        "schema": 1,
        "recipe": portable_recipe(recipe, stage.output),
        "inputs": dict(inputs),
        "outputs": file_digests(outputs),
        "versions": {name: version(name) for name in PACKAGES} | {plugin.name: plugin.version},
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


def run_digest(recipe: Recipe, inputs: Mapping[str, str], plugin: Distribution) -> str:
    """What names the stage of a run: everything that its bytes depend on, recipe, input digests and versions.

    What is only done with the bytes afterwards (verification, gates) is left out: changing it must not quantize again.
    """
    settings = portable_recipe(recipe, recipe.output.resolve())
    settings = {key: value for key, value in settings.items() if key not in AFTERWARDS}
    versions = {name: version(name) for name in PACKAGES} | {plugin.name: plugin.version}
    return hashlib.sha256(json.dumps([settings, dict(inputs), versions], sort_keys=True).encode()).hexdigest()


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
