"""JSON as text: strict where json is lenient, of files that others have written; short where json is long, of our own."""

from __future__ import annotations

import json
import re
from typing import Any

# What json.dumps makes of a list of numbers. No text holds it: the line ends of one are escaped.
_NUMBERS = re.compile(r"\[\n\s+(-?[0-9][^\[\]{}\":]*)\n\s+\]")


def format_json(document: Any, *, sort_keys: bool = False) -> str:
    """Return a document as people read it, ending in a line end: indented, but each list of numbers on one line."""
    text = json.dumps(document, indent=2, sort_keys=sort_keys) + "\n"
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice. Raises ValueError: readers disagree on which of two values counts."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"it is a {type(document).__name__}, not an object")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!a} occurs more than once")
    return document
