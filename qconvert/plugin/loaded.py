"""Holds loaders to their contract: what a plugin returns for a source, before anything relies on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from qconvert.ir.model import Model
from qconvert.ir.report import Task


def model_problems(model: object) -> Iterator[str]:
    """What is wrong with what `load_model` returned, in the order in which one check relies on those before it."""
    if not isinstance(model, Model):
        yield f"it returned {type(model).__name__}, not a Model"
        return
    if model.task not in get_args(Task):
        yield f"its task {model.task!r} is none of {', '.join(get_args(Task))}"
    if model.module.training:
        yield "its module is in training mode; call module.eval()"
    modules = {name for name, _ in model.module.named_modules()}
    for block in model.blocks:
        if block not in modules:
            yield f"its block {block!r} is no module of it"
    stored = getattr(model.source, "tensors", None)
    if stored is None:
        yield f"its source is {type(model.source).__name__}, which has no tensors"
        return
    for name, shape in model.parameter_shapes.items():
        tensor = stored.get(model.stored_name(name))
        if tensor is None:
            yield f"its source has no tensor {model.stored_name(name)!r}, which the parameter {name!r} is read from"
        elif tuple(tensor.shape) != shape:
            yield f"tensor {model.stored_name(name)!r} is {list(tensor.shape)}, but the parameter {name!r} is {list(shape)}"


def data_problems(path: object) -> Iterator[str]:
    """What is wrong with what `find_data` returned."""
    if not isinstance(path, Path):
        yield f"it returned {type(path).__name__}, not a Path"
    elif not path.is_file():
        yield f"it returned {str(path)!r}, which is no file"
