"""pkg:PACKAGE/PATH: a path inside an installed Python package, found without importing it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qconvert.errors import InputError
from qconvert.load.folder import contained

SCHEME = "pkg:"


def resolve(source: str) -> Path:
    """Return the path that `pkg:PACKAGE/PATH` means. PACKAGE may be dotted; no code of it runs.

    Raises InputError: QC-INPUT-020 for a text that is no such source or a package that is not installed, 009 for a
    path that leaves the package, 001 for one that is not in it.
    """
    package, _, path = source.removeprefix(SCHEME).partition("/")
    top, *inner = package.split(".")
    if not all(part.isidentifier() for part in (top, *inner)):
        raise InputError(
            "QC-INPUT-020", f"{source!r} names no package", hint="write pkg:PACKAGE/PATH, for example pkg:some_model/weights"
        )
    try:
        spec = find_spec(top)  # a top-level name is found without importing anything
    except ValueError:  # e.g. "__main__"
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "QC-INPUT-020",
            f"no package {top!r} is installed in this Python environment (from {source!r})",
            hint=f"install the distribution that brings {top!r}, e.g. with pip, or check the spelling",
        )
    # A namespace package may lie in several folders: the first that has the path counts.
    name = "/".join([*inner, path])
    candidates = [contained(Path(location), name) for location in spec.submodule_search_locations]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise InputError(
        "QC-INPUT-001",
        f"{source!r} does not exist: there is no {name!r} in {', '.join(map(str, spec.submodule_search_locations))}",
        hint="look into that folder for the right path",
    )
