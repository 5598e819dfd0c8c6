"""Template: the float graph of a model, traced once, with every linear an opaque node that names its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir
from torch import Tensor

from qconvert.ir.layer import Producer

# Domain of the opaque nodes and markers; none is left after lowering.
DOMAIN = "qconvert"


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Layers that read the same value, and the producer that a scale can be folded into."""

    layers: tuple[str, ...]
    producer: Producer | None


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A traced model.

    graph: onnx_ir model. `qconvert::Linear`, `Conv` and `Embedding` nodes carry the attribute "module"; `BlockInput` and
        `BlockOutput` nodes mark where a block begins and ends. Float parameters are initializers under their own names
        without data.
    representatives: block -> the traced block of its kind. A block that was traced itself maps to itself.
    groups: input groups of the whole model, in forward order, block names put in.
    constants: tensors that tracing made (e.g. rotary caches), by initializer name.
    """

    graph: onnx_ir.Model
    representatives: Mapping[str, str]
    groups: tuple[InputGroup, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
