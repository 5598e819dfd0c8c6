"""qconvert.json: what went in, what came out, and with which versions. The same run gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from typing import Any

from qconvert.ir.artifact import CARD, MANIFEST, REPORT
from qconvert.ir.write_result import WriteResult
from qconvert.recipe import Recipe
from qconvert.storage.disk import disk_errors
from qconvert.storage.json_text import format_json
from qconvert.storage.published import portable_recipe
from qconvert.storage.reader import tensor_record
from qconvert.storage.stage import Stage
from qconvert.write.origin import Origin, file_digests

# Fields of a recipe that change no byte of the weights.
AFTERWARDS = ("verify", "evaluation", "gates", "timing_seconds", "allow_unverified", "plugin_timeout")


def write_manifest(stage: Stage, recipe: Recipe, origin: Origin, written: WriteResult) -> None:
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
        manifest["assignment"] = written.assignment.document()
    if written.activations is not None:
        manifest["activations"] = written.activations.document()
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch:
        manifest["created"] = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    path = stage.folder / MANIFEST
    with disk_errors(path):
        path.write_text(format_json(manifest, sort_keys=True), encoding="utf-8")


def run_digest(recipe: Recipe, origin: Origin) -> str:
    """Return the digest that names the stage of a run, of everything that the bytes of its weights depend on.

    What is only done with them afterwards (verification, gates) is left out: changing it must not quantize again. Evaluation
    samples are among that: what they leave for calibration shows in the samples that were drawn for it.
    """
    settings = portable_recipe(recipe, recipe.output.resolve())
    settings = {key: value for key, value in settings.items() if key not in AFTERWARDS}
    inputs = {name: digest for name, digest in origin.inputs.items() if name.partition(":")[0] != "evaluation"}
    document = [settings, inputs, dict(origin.versions), dict(origin.machine)]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
