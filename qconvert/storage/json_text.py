"""JSON of files that others have written: strict where json is lenient."""

from __future__ import annotations

import json
from typing import Any


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
