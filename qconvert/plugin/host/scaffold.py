"""Scaffold: the repository of a new plugin, from the copier template in template/."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from qconvert.errors import ResourceError, UsageError
from qconvert.plugin.hookspecs import API_VERSION
from qconvert.plugin.host.distribution import builtin

TEMPLATE = Path(__file__).parent / "template"
PREFIX = "qconvert-"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def new_plugin(folder: Path) -> Path:
    """Make the repository `folder`, whose quantizer has the folder's name without "qconvert-". All of it appears at once.

    Raises UsageError QC-PLUGIN-012 if the folder exists, QC-PLUGIN-013 for a name that is none; ResourceError QC-DISK-003 if it
    can't be written.
    """
    import copier

    folder = folder.absolute()
    name = folder.name.removeprefix(PREFIX)
    if folder.exists():
        raise UsageError("QC-PLUGIN-012", f"{folder.name} exists", hint="name a folder that does not")
    if not NAME.fullmatch(name):
        raise UsageError(
            "QC-PLUGIN-013",
            f"{folder.name!r} names no quantizer",
            hint="take letters, digits and single '-', all in lower case: qconvert plugins new qconvert-kmeans",
        )
    major, minor = builtin().version.split(".")[:2]
    answers = {
        "name": name,
        "api": API_VERSION,
        "requirement": f"qconvert>={major}.{minor},<{major}.{int(minor) + 1}",
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            copier.run_copy(str(TEMPLATE), made, data=answers, defaults=True, quiet=True)
            made.rename(folder)
    except OSError as error:
        raise ResourceError(
            "QC-DISK-003",
            f"{error.filename or folder} can't be written: {error.strerror}",
            hint="give a folder that can be written",
        ) from error
    return folder
