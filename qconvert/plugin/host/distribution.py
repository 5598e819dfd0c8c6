"""The origin of a plugin: the name and version that messages and the manifest give."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import NamedTuple

GROUP = "qconvert"
FILES = "qconvert_files"  # the package that plugins read from a file, `--plugin FILE`, are modules of


class Distribution(NamedTuple):
    """An installed distribution, or what stands for one; as text "qconvert-kmeans 1.2"."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Code(NamedTuple):
    """Code that a run uses: where it comes from, and what it is, since a version stays the same while its author works on it.

    digest: hex sha256 of the Python files of its package.
    """

    distribution: Distribution
    digest: str


@cache
def builtin() -> Distribution:
    """Return qconvert itself, which brings the built-in plugins."""
    return Distribution("qconvert", version("qconvert"))


def of_file(path: Path) -> Distribution:
    """Return a stand-in for the distribution of a plugin file: its name, and a digest of its code in place of a version."""
    return Distribution(path.name, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}")


def of_entry_point(entry_point: EntryPoint) -> Distribution:
    """Return the distribution that an entry point was installed with; one without metadata goes by the entry point's name."""
    dist = entry_point.dist
    return Distribution(dist.name, dist.version) if dist else Distribution(entry_point.name, "(no version)")


def distribution_of(part: object) -> Distribution:
    """Return the distribution whose entry point names the package that the class of `part` is defined in.

    A class from a file is named by that, one from anywhere else (a test, a notebook) by its module, with "no version".
    """
    return _distribution_of(type(part).__module__)


@cache
def _distribution_of(module: str) -> Distribution:
    package = module.partition(".")[0]
    if package == "qconvert":
        return builtin()
    if package == FILES:
        return of_file(Path(str(sys.modules[module].__file__)))
    for entry_point in entry_points(group=GROUP):
        if entry_point.dist is not None and entry_point.module.partition(".")[0] == package:
            return of_entry_point(entry_point)
    return Distribution(module, "(no version)")


@cache
def code_digest(module: str) -> str:
    """Return the hex sha256 of the Python files of the package that an imported module is part of, or of its own file."""
    top = sys.modules[module if module.startswith(f"{FILES}.") else module.partition(".")[0]]
    file = getattr(top, "__file__", None)
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    if file and not folders:
        files = {"": Path(file)}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def requirements(name: str) -> dict[str, str]:
    """Return the version of each distribution that an installed one says it needs; {} where there is no such distribution."""
    found = {}
    with contextlib.suppress(PackageNotFoundError):
        for text in requires(name) or []:
            needed = re.match(r"[\w.-]+", text)
            if needed and "extra ==" not in text:
                with contextlib.suppress(PackageNotFoundError):
                    found[needed[0]] = version(needed[0])
    return found
