"""Discovery: third parties' plugins, each by itself, so that one that is broken stops no other.

The loop over the entry-point group "qconvert" is our own: pluggy's stops at the first plugin that fails to import, and doesn't
say whose it is.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from qconvert.errors import UsageError, in_one_line
from qconvert.plugin import hookspecs
from qconvert.plugin.host import calls
from qconvert.plugin.host.distribution import FILES, GROUP, Distribution, of_entry_point, of_file
from qconvert.supervision.messages import SET_ASIDE

# Which distributions' plugins are used: "a,b" those, "" none; unset: all.
SELECTION = "QCONVERT_PLUGINS"

# What a foreign plugin may raise and must not stop us with; sys.exit() must not look like our own exit.
FAILURES = (Exception, SystemExit)


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that could not be used.

    value: the entry point, "qconvert_kmeans:plugin", or the path of its file.
    reason: one line, "ImportError: No module named 'x'".
    location: "FILE:LINE" of the fault in the plugin, "" where it is in none of its lines.
    traceback: its last lines.
    """

    distribution: Distribution
    value: str
    reason: str
    location: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        where = f", at {self.location}" if self.location else ""
        return f"{self.distribution} ({self.value}): {self.reason}{where}"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was imported. implementation: a module, or any object with hook implementations."""

    implementation: Any
    distribution: Distribution
    value: str


def discovered(files: Sequence[Path]) -> Iterator[Plugin | BrokenPlugin]:
    """Yield every plugin of this environment that QCONVERT_PLUGINS allows, by name, and then those of `files`.

    Raises UsageError QC-PLUGIN-009 for a file that does not exist.
    """
    for path in files:  # before anything is imported
        if not path.is_file():
            raise UsageError("QC-PLUGIN-009", f"there is no plugin {str(path)!r}", hint="give the path of a Python file")
    known = {(broken.distribution.name, broken.value): broken for broken in _set_aside()}
    found = sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value))
    chosen, missing = _chosen(found)
    for entry_point in chosen:
        distribution = of_entry_point(entry_point)
        yield known.get((distribution.name, entry_point.value)) or _imported(distribution, entry_point.value, entry_point.load)
    for name in missing:
        yield BrokenPlugin(Distribution(name, "(no version)"), SELECTION, f"{SELECTION} names it, but it is not installed")
    for path in files:
        distribution = of_file(path)
        yield known.get((distribution.name, str(path))) or _imported(distribution, str(path), partial(_module, path))


def broken(distribution: Distribution, value: str, error: BaseException, implementation: object = None) -> BrokenPlugin:
    """Describe a plugin that raised `error`; `implementation`: what was imported, if it came to that."""
    tail = "".join(traceback.format_exception(error, limit=-3))
    return BrokenPlugin(distribution, value, reason(error), _location(error, implementation), tail)


def reason(error: BaseException) -> str:
    """Return the type of an error and what it says, in one line."""
    return f"{type(error).__name__}: {in_one_line(error)}"


def hook_functions(implementation: object) -> dict[str, Callable[..., Any]]:
    """Return the functions of a plugin that @hookimpl marks, by name."""
    found = ((name, getattr(implementation, name, None)) for name in dir(implementation))
    return {name: function for name, function in found if getattr(function, f"{GROUP}_impl", None) and callable(function)}


def check_hooks(implementation: object) -> None:
    """Raise LookupError for an unknown hook, for none at all, and for another version of the plugin API."""
    version = getattr(implementation, "QCONVERT_API", hookspecs.API_VERSION)
    if version != hookspecs.API_VERSION:
        raise LookupError(
            f"it is written for version {version!r} of the plugin API, and this is version {hookspecs.API_VERSION}: "
            f"install a {'newer' if isinstance(version, int) and version > hookspecs.API_VERSION else 'matching'} qconvert"
        )
    functions = hook_functions(implementation)
    if not functions:
        raise LookupError("it implements no hook: decorate its functions with @qconvert.plugin.hookimpl")
    known = [name for name in dir(hookspecs) if hasattr(getattr(hookspecs, name), "qconvert_spec")]
    for name in functions.keys() - set(known):  # a misspelt hook would otherwise never be called, in silence
        close = difflib.get_close_matches(name, known, n=1)
        raise LookupError(f"unknown hook '{name}'; {f'did you mean {close[0]!r}?' if close else f'known are {known}'}")


def _imported(distribution: Distribution, value: str, load: Callable[[], object]) -> Plugin | BrokenPlugin:
    try:
        with calls.calling(distribution, f"import {value}"):
            return Plugin(load(), distribution, value)
    except FAILURES as error:
        return broken(distribution, value, error)


def _module(path: Path) -> object:
    """The module of a file. Another file of the same name is another module, and so is the same file once it was edited."""
    name = f"{FILES}.{path.stem}_{hashlib.sha256(os.fsencode(path.resolve()) + path.read_bytes()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(FILES, ModuleType(FILES))  # pickle imports that first
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _chosen(found: Iterable[EntryPoint]) -> tuple[list[EntryPoint], list[str]]:
    """The entry points that QCONVERT_PLUGINS allows, and the names in it that no distribution has."""
    selection = os.environ.get(SELECTION)
    if selection is None:
        return list(found), []
    wanted = {_normalized(name): name.strip() for name in selection.split(",") if name.strip()}
    chosen = [entry_point for entry_point in found if _normalized(of_entry_point(entry_point).name) in wanted]
    present = {_normalized(of_entry_point(entry_point).name) for entry_point in chosen}
    return chosen, [name for key, name in wanted.items() if key not in present]


def _normalized(name: str) -> str:
    """Return a name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _set_aside() -> Iterator[BrokenPlugin]:
    for name, version, value, why in json.loads(os.environ.get(SET_ASIDE, "[]")):
        yield BrokenPlugin(Distribution(name, version), value, why)


def _location(error: BaseException, implementation: object) -> str:
    """Return where the fault of a plugin is: a line that can't be parsed, the hook that the error names, or the last line that
    ran.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    for name, function in hook_functions(implementation).items():
        code = getattr(function, "__code__", None)
        if code is not None and f"'{name}'" in in_one_line(error):
            return f"{code.co_filename}:{code.co_firstlineno}"
    ours = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen", ours)) and f"{os.sep}pluggy{os.sep}" not in frame.filename
    ]
    foreign = [frame for frame in frames if not frame.filename.startswith(sys.base_prefix) or "site-packages" in frame.filename]
    return f"{foreign[-1].filename}:{foreign[-1].lineno}" if foreign else getattr(implementation, "__file__", "") or ""
