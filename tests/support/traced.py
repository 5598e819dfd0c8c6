"""Templates that several tests of a process take."""

from __future__ import annotations

from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.trace import trace

TEMPLATES: dict[str, Template] = {}


def trace_once(model: Model) -> Template:
    """The template of a model that was traced before, by its name and tensors: most tests use the same few."""
    tensors = {name: (str(info.dtype), info.shape) for name, info in model.source.tensors.items()}
    key = f"{model.name} {sorted(tensors.items())}"
    if key not in TEMPLATES:
        TEMPLATES[key] = trace(model)
    return TEMPLATES[key]
