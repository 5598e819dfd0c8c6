"""qconvert.json of an output folder, as everyone reads it; qconvert.write.manifest writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qconvert.errors import InputError
from qconvert.ir.artifact import MANIFEST

# What every manifest holds.
KEYS = ("schema", "recipe", "inputs", "outputs", "versions", "layers", "sidecar")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read qconvert.json of an output folder. Raises InputError QC-READ-001 if it can't be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no JSON object")
        missing = [key for key in KEYS if key not in manifest]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "QC-READ-001", f"{path} can't be read: {error}", hint="give a folder that qconvert wrote, or convert again"
        ) from error
