"""Template: the float graph of a model, traced once, with every linear an opaque node that names its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qconvert.ir.layer import LayerKind, Producer

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


def made_by(value: onnx_ir.Value) -> str | None:
    """ONNX type of the node that gives a value, None for an input of the graph."""
    node = value.producer()
    return node.op_type if node else None


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A traced model.

    graphs: part (see ir.artifact.graph_files) -> onnx_ir model. `qconvert::Linear`, `Conv` and `Embedding` nodes carry the
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
        """Names of the parameters that the graphs compute with, and others that are no parameters."""
        names: set[str] = set()
        for model in self.graphs.values():
            names |= set(model.graph.initializers)
            modules = [node.attributes["module"].as_string() for node in model.graph if "module" in node.attributes]
            names |= {f"{module}.{suffix}" for module in modules for suffix in ("weight", "bias")}
        return names


def layer_kind(module: nn.Module) -> LayerKind | None:
    """What kind of layer a module is; None for what is traced as it is, and never quantized.

    Only a forward that we know, on a weight of the module's own, is a layer: a subclass may compute something else, a
    parametrized weight is computed at every call, and nn.MultiheadAttention reads out_proj's weight without calling it.
    """
    if "weight" not in module._parameters or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    match module:
        case nn.Linear() if type(module).forward is nn.Linear.forward:
            return "linear"
        case Conv1D():
            return "conv1d"
        case nn.Conv2d() if type(module).forward is nn.Conv2d.forward:
            return "conv2d" if module.padding_mode == "zeros" and not isinstance(module.padding, str) else None
        case nn.Embedding() if type(module).forward is nn.Embedding.forward and module.max_norm is None:
            return "embedding"
    return None


def in_own_shape(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight [out, in] in the shape of the module's parameter: Conv1D [in, out], kernels not flattened."""
    return weight.T if isinstance(module, Conv1D) else weight.reshape(module.get_parameter("weight").shape)
