"""Options: the fields of what a plugin brings as the user sees them, with types, defaults and the words of its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# "name: what it is", or "name, other: ..."; the lines that go on are indented.
_DOCUMENTED = re.compile(r"(\w+(?:, \w+)*): +(\S.*)")


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a quantizer. kind: its type in words. default: None together with `required` where there is none."""

    name: str
    kind: str
    default: object
    required: bool
    doc: str


def options_of(kind: type[Any]) -> tuple[Option, ...]:
    """In the order of the fields."""
    documented = dict(_documented(kind))
    schema = options_schema(kind)
    required = schema.get("required", ())
    return tuple(
        Option(name, _words(part), part.get("default"), name in required, documented.get(name, ""))
        for name, part in schema.get("properties", {}).items()
    )


def options_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON schema of the `options` that a recipe gives this quantizer, tuner or range estimator."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(kind).json_schema() | {"additionalProperties": False}
    documented = dict(_documented(kind))
    for name, part in schema.get("properties", {}).items():
        if documented.get(name):
            part["description"] = documented[name]
    return schema


def summary(kind: type[Any]) -> str:
    """The first paragraph of its docstring, in one line; "" without one of its own."""
    text = kind.__doc__ or ""
    if text.startswith(f"{kind.__name__}("):  # what dataclass puts in for none
        return ""
    return first_paragraph(text)


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph of a text in one line."""
    return " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())


def _documented(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """(option, its words), those of base classes first."""
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    for base in reversed(kind.__mro__):
        names: tuple[str, ...] = ()
        words: list[str] = []
        for line in [*inspect.cleandoc(base.__doc__ or "").splitlines(), ""]:
            match = _DOCUMENTED.fullmatch(line)
            if names and line.startswith(" "):
                words.append(line.strip())
                continue
            yield from ((name, " ".join(words)) for name in names if name in fields)
            names, words = (tuple(match[1].split(", ")), [match[2]]) if match else ((), [])


def _words(schema: dict[str, Any]) -> str:
    """Word the values that an option may have: "integer", "number or null", "one of none, mse"."""
    if "anyOf" in schema:
        return " or ".join(map(_words, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_words(schema['items'])}"
    return str(schema.get("const", schema.get("type", "any")))
