"""The digests of a folder and of its float source: whether they are what was written, and what it was made from."""

from __future__ import annotations

from pathlib import Path

from qconvert.errors import InputError
from qconvert.ir.artifact import is_model_file
from qconvert.ir.model import Model
from qconvert.storage.digest import sha256
from qconvert.storage.manifest import read_manifest


def check_digests(folder: Path) -> None:
    """Raise InputError QC-VERIFY-001 if a file is missing or differs from its digest in qconvert.json."""
    for name, expected in read_manifest(folder)["outputs"].items():
        path = folder / name
        try:
            found = sha256(path)
        except OSError as error:
            raise InputError("QC-VERIFY-001", f"{path} can't be read: {error}", hint="convert again") from error
        if found != expected:
            raise InputError(
                "QC-VERIFY-001",
                f"{path} is not the file that was written: sha256 {found[:12]}…, expected {expected[:12]}…",
                hint="copy the folder again, or convert again",
            )


def check_source(folder: Path, model: Model) -> None:
    """Raise InputError QC-VERIFY-004 where a file of the float model is missing or differs from the manifest's digest."""
    inputs = read_manifest(folder)["inputs"]
    for name, expected in ((name, expected) for name, expected in inputs.items() if is_model_file(name)):
        path = model.input_files.get(name)
        if path is None or sha256(path) != expected:
            raise InputError(
                "QC-VERIFY-004",
                f"the source {model.name!a} is not what {folder} was made from: {name!a} is {'another' if path else 'missing'}",
                hint="put the original source back: compared with another one, the numbers would mean nothing",
            )
