"""The recipes of a comparison: what they share, and what each is called."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from qconvert.errors import UsageError
from qconvert.recipe import Recipe

# What all recipes of a comparison have in common: they are calibrated, and judged, on the same data.
SHARED = (
    *("model", "adapter", "merge_adapter", "output", "calibration", "evaluation", "seed", "device", "verify"),
    *("timing_seconds", "allow_unverified", "force", "plugins", "plugin_timeout"),
)

# Of a recipe's folder; compare.json and compare.png lie beside it.
NAME = re.compile(r"(?!compare\.)[a-z0-9][a-z0-9._+-]{0,99}", re.IGNORECASE)


def named_recipes(settings: dict[str, Any]) -> dict[str, Recipe]:
    """Return the recipes of settings whose 'recipes' lists several, by name: each has a 'name', and what differs from the rest.

    A recipe's output is the folder of its name in 'output'.

    Raises UsageError QC-COMPARE-001 without such a list, QC-COMPARE-002 for a name that is missing, twice there or no name
    of a folder, QC-COMPARE-003 for a field that can't differ, and QC-RECIPE-001.
    """
    common = {key: value for key, value in settings.items() if key != "recipes"}
    entries = settings.get("recipes")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(
            "QC-COMPARE-001",
            "there is nothing to compare" if not entries else f"'recipes' is {reprlib.repr(entries)}, not a list of recipes",
            hint="list them in the file, 'recipes: [{name: a, quantizer: awq}, ...]', or give --try QUANTIZER:SCHEME for each",
        )
    recipes: dict[str, Recipe] = {}
    for entry in entries:
        name = _name(entry, {known.lower() for known in recipes})
        fixed = [key for key in SHARED if key in entry]
        if fixed:
            raise UsageError(
                "QC-COMPARE-003",
                f"recipe {name!r} has its own {', '.join(map(repr, fixed))}, which all recipes of a comparison share",
                hint="write it beside 'recipes', or run that recipe by itself",
            )
        own = {key: value for key, value in entry.items() if key != "name"}
        try:
            recipes[name] = Recipe.from_settings({**common, **own, "output": f"{common['output']}/{name}"})
        except UsageError as error:
            raise UsageError(error.code, f"recipe {name!r}: {error.message}", hint=error.hint) from error
    trained = next((name for name, recipe in recipes.items() if recipe.trained is not None), None)
    if trained is not None:
        raise UsageError(
            "QC-TRAIN-002",
            f"recipe {trained!r} takes codes that were trained, which belong to weights of their own",
            hint="run that recipe by itself",
        )
    return recipes


def _name(entry: dict[str, Any], taken: set[str]) -> str:
    """The name of an entry of 'recipes': that of a folder, also where the file system ignores case."""
    name = entry.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        given = f"a recipe has the name {reprlib.repr(name)}"
        problem = given if "name" in entry else f"the recipe {reprlib.repr(entry)} has no name"
    elif name.lower() in taken:
        problem = f"two recipes have the name {name!r}"
    else:
        return name
    raise UsageError(
        "QC-COMPARE-002",
        problem,
        hint="give each a 'name' of its own, of letters, digits, '.', '_', '+' and '-': a folder gets it",
    )


def tried(text: str) -> dict[str, Any]:
    """Parse 'QUANTIZER' or 'QUANTIZER:SCHEME' into an entry of 'recipes'. Raises UsageError QC-COMPARE-004."""
    quantizer, separator, scheme = text.partition(":")
    if not quantizer or (separator and not scheme):
        raise UsageError(
            "QC-COMPARE-004", f"'{text}' is no recipe to try", hint="write --try QUANTIZER or --try QUANTIZER:SCHEME"
        )
    return {"name": text.replace(":", "-"), "quantizer": quantizer} | ({"scheme": scheme} if scheme else {})
