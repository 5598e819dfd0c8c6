"""docs/recipe.md lists every field of the recipe, as its JSON schema has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qconvert.recipe import Recipe
from qconvert.recipe.fields import DataSpec, Ranges, Rule, Tuning
from qconvert.recipe.gates import Gate

DOCS = Path(__file__).parents[2] / "docs" / "recipe.md"


def table(part: type[Recipe | DataSpec | Gate | Ranges | Rule | Tuning]) -> str:
    """The Markdown table of a part's fields."""
    schema = part.model_json_schema()
    lines = ["| field | kind | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        lines.append(f"| {name} | {kind(field)} | {default} | {field.get('description', '')} |")
    return "\n".join(lines)


def kind(schema: dict[str, Any]) -> str:
    """What a value of the schema is, in a few words."""
    match schema:
        case {"$ref": str(reference)}:
            part = reference.rsplit("/", 1)[1]
            return f"[{(name := {'DataSpec': 'data'}.get(part, part.lower()))}](#{name})"
        case {"anyOf": list(choices)}:
            return " or ".join(map(kind, choices))
        case {"enum": list(choices)}:
            return "one of " + ", ".join(f"`{choice}`" for choice in choices)
        case {"type": "array", "items": dict(items)}:
            return f"list of {kind(items)}"
        case {"type": str(name), "minimum": int(minimum)}:
            return f"{name}, at least {minimum}"
        case {"type": str(name), "exclusiveMinimum": limit}:
            return f"{name} above {limit:g}"
        case {"type": str(name)}:
            return {"object": "mapping", "string": "text"}.get(name, name)
    raise AssertionError(schema)


@pytest.mark.parametrize("part", [Recipe, DataSpec, Rule, Gate, Tuning, Ranges], ids=lambda part: part.__name__)
def test_the_document_has_the_table_of_every_part(part: type[Recipe | DataSpec | Gate | Ranges | Rule | Tuning]) -> None:
    expected = table(part)
    assert expected in DOCS.read_text(encoding="utf-8"), f"docs/recipe.md lacks:\n{expected}"


def test_every_recipe_in_the_document_is_valid() -> None:
    blocks = [block.partition("```")[0] for block in DOCS.read_text(encoding="utf-8").split("```yaml\n")[1:]]
    assert blocks
    for block in blocks:
        Recipe.from_settings(yaml.safe_load(block))
