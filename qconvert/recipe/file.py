"""The YAML file of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qconvert.errors import UsageError, in_one_line
from qconvert.recipe.yaml_text import TooMuchError, read_yaml


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, paths relative to the working directory.

    Raises UsageError QC-RECIPE-004 if it can't be read or is no mapping, QC-RECIPE-005 if it is too large or deep.
    """
    try:
        settings = read_yaml(path)
        if not isinstance(settings, dict):
            raise ValueError("it holds no mapping of fields")
    except TooMuchError as error:
        raise UsageError(
            "QC-RECIPE-005", f"recipe {path}: {error}", hint="write out what is meant, without aliases of aliases"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(
            "QC-RECIPE-004",
            f"recipe {path}: {in_one_line(error)}",
            hint="give a YAML file with at least 'model:' and 'output:'",
        ) from error
    return settings
