"""Settings that people write as YAML, bounded before anything is built of them.

A few lines with nested aliases (`a: &a [x, x]`, `b: &b [*a, *a]`, ...) can stand for more values than a machine can hold, and a
document of brackets alone for a nesting that ends the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Far above any recipe, and read in a second by the slowest of YAML's readers.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_VALUES = 10_000


class TooMuchError(ValueError):
    """The document is larger or nested deeper than any settings are, or stands for more values."""


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds. Raises what `parse_yaml` does, and OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)  # not the whole of a device or of a file of 100 GB
    if len(content) > MAX_BYTES:
        raise TooMuchError(f"it is larger than {MAX_BYTES} bytes")
    return parse_yaml(content.decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """Return what a YAML document holds. Raises TooMuchError, other ValueErrors, and YAMLError."""
    _check_amount(text)
    return yaml.safe_load(text)


@dataclass(slots=True)
class _Collection:
    """A list or mapping that is being read: how much it stands for so far, and how deep that is nested."""

    anchor: str | None
    values: int = 1
    height: int = 0

    def add(self, values: int, height: int) -> None:
        self.values += values
        self.height = max(self.height, height)


def _check_amount(text: str) -> None:
    """Count what a document stands for, event by event: no value is built, and no alias followed."""
    reading = [_Collection(None)]  # the document, and what is open in it
    anchored: dict[str | None, tuple[int, int]] = {}
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        match event:
            case yaml.CollectionStartEvent(anchor=anchor):
                reading.append(_Collection(anchor))
            case yaml.CollectionEndEvent():
                closed = reading.pop()
                anchored[closed.anchor] = closed.values, closed.height + 1
                reading[-1].add(closed.values, closed.height + 1)
            case yaml.AliasEvent(anchor=name):
                if name not in anchored:
                    raise ValueError(f"the alias *{name} stands for nothing that is complete before it")
                reading[-1].add(*anchored[name])
            case yaml.ScalarEvent(anchor=anchor):
                anchored[anchor] = 1, 0
                reading[-1].add(1, 0)
        if reading[-1].values > MAX_VALUES:
            raise TooMuchError(f"it holds more than {MAX_VALUES} values, aliases written out")
        if len(reading) - 1 + reading[-1].height > MAX_DEPTH:
            raise TooMuchError(f"it is nested more than {MAX_DEPTH} deep, aliases written out")
