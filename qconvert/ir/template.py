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
    """Layers that read the same value, and the producer that a scale can be folded into.

    made_by: ONNX type of the node that gives the value.
    """

    layers: tuple[str, ...]
    producer: Producer | None
    made_by: str | None = None


def module_of(node: onnx_ir.Node) -> str:
    """Return the name of the module that an opaque node stands for."""
    return node.attributes["module"].as_string()


def made_by(value: onnx_ir.Value) -> str | None:
    """Return the ONNX type of the node that gives a value, None for an input of the graph."""
    node = value.producer()
    return node.op_type if node else None


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A traced model.

    graphs: part (see targets.graph_files) -> onnx_ir model. `qconvert::Linear`, `Conv` and `Embedding` nodes carry the
        attribute "module"; `BlockInput` and `BlockOutput` nodes mark where a block begins and ends. Float parameters are
        initializers under their own names without data.
    representatives: block -> the traced block of its kind. A block that was traced itself maps to itself.
    groups: input groups of the whole model, in forward order, block names put in.
    constants: tensors that tracing made (e.g. rotary caches), by initializer name; no two graphs share a name.
    embeddings: modules that look up rows of their weight.
    weights_read: layers whose weight the model's own code looks at, beside calling them.
    """

    graphs: Mapping[str, onnx_ir.Model]
    representatives: Mapping[str, str]
    groups: tuple[InputGroup, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    weights_read: frozenset[str] = frozenset()

    def parameters_read(self) -> set[str]:
        """Return the names of the parameters that the graphs compute with, among names of other initializers."""
        names: set[str] = set()
        for model in self.graphs.values():
            names |= set(model.graph.initializers)
            modules = [module_of(node) for node in model.graph if "module" in node.attributes]
            names |= {f"{module}.{suffix}" for module in modules for suffix in ("weight", "bias")}
        return names
