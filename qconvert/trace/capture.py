"""One run of torch's ONNX exporter over the shortened skeleton."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN
from qconvert.supervision.startup import uncollected
from qconvert.trace import encoder_decoder
from qconvert.trace import opaque as opaque_nodes
from qconvert.trace.signature import FUSED, Form, Signature, signature

OPSET = 23


@dataclass(frozen=True)
class Captured:
    """A traced graph, values and initializers renamed to what the artifact will call them.

    constants: initializers that are no parameters, by name.
    weights_read: layers whose weight the model looks at, beside calling them.
    """

    graph: onnx_ir.Model
    constants: dict[str, Tensor]
    weights_read: tuple[str, ...]


def capture(model: Model, blocks: list[str], form: Form, outputs: list[str]) -> dict[str, Captured]:
    """Trace the skeleton with only `blocks` kept: part (see targets.graph_files) -> graph.

    outputs: names of what the model gives (see execution.outputs.named_outputs).
    Raises whatever the exporter raises; the caller decides whether another form is tried.
    """
    module = _with_opaque_layers(opaque_nodes.shortened(model, blocks), blocks)
    names = _with_empty_parameters(module, blocks)
    for place, block in opaque_nodes.places(blocks).items():
        _mark(module.get_submodule(place), block)
    if form.fused:
        _fuse_attention(module, FUSED[model.task])
    if not model.task.reads_source:
        return {"model": _export(signature(model, module, blocks, form, outputs), names)}
    decoder_blocks = [block for block in blocks if block in model.stacks[-1]]
    encoder = _export(encoder_decoder.encoder(module, decoder_blocks, form), names)
    decoder = _export(encoder_decoder.decoder(module, decoder_blocks, form, encoder.graph.graph), names, prefix="decoder/")
    return {"encoder": encoder, "decoder": decoder}


def _with_opaque_layers(module: nn.Module, blocks: list[str]) -> nn.Module:
    """The skeleton with an opaque node in the place of every layer; that node itself where the skeleton is one layer."""
    stand_ins: dict[nn.Module, opaque_nodes.Opaque | None] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):  # a module may have several names
        if part not in stand_ins:
            stand_ins[part] = opaque_nodes.opaque(opaque_nodes.original_name(name, blocks), part)
        stand_in = stand_ins[part]
        if stand_in is not None:
            if name == "":
                return stand_in
            module.set_submodule(name, stand_in)
    return module


def _with_empty_parameters(module: nn.Module, blocks: list[str]) -> dict[str, str]:
    """Give a skeleton parameters that the exporter takes: name in the shortened model -> name in the full one."""
    names = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        names[name] = opaque_nodes.original_name(name, blocks)
        owner, _, leaf = name.rpartition(".")
        # Uninitialised: only shapes matter, and untouched pages cost no memory.
        empty = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, empty)
    return names


def _fuse_attention(module: nn.Module, implementation: str) -> None:
    """Let all attention of the skeleton become one node each."""
    for part in module.modules():  # the halves of an encoder-decoder have configs of their own
        config: Any = getattr(part, "config", None)
        if config is not None:
            config._attn_implementation = implementation


def _mark(block: nn.Module, name: str) -> None:
    """Make the block's hidden state pass through marker nodes on its way in and out."""

    def marker(kind: str, x: Tensor) -> Tensor:
        marked = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{kind}", (x,), attrs={"block": name}, dtype=torch.float32, shape=x.shape, version=1
        )
        assert isinstance(marked, Tensor)
        return marked

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (marker("BlockInput", args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": marker("BlockInput", kwargs["hidden_states"])}

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return marker("BlockOutput", output)
        return (marker("BlockOutput", output[0]), *output[1:])

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)


def _export(signature: Signature, names: dict[str, str], prefix: str = "") -> Captured:
    """names: parameter of the shortened model -> of the full one. prefix: of the names of constants."""
    parameters = dict(signature.wrapper.module.named_parameters())  # type: ignore[union-attr]
    arguments = {**signature.arguments, "parameters": parameters}
    shapes = {**signature.shapes, "parameters": dict.fromkeys(parameters)}
    with torch.no_grad(), _quiet(), _layers_called_one_by_one(), uncollected():
        program = torch.onnx.export(
            signature.wrapper.eval(), kwargs=arguments, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    opaque = [part for part in signature.wrapper.modules() if isinstance(part, opaque_nodes.Opaque)]
    constants = _rename(program.model, signature.inputs, signature.outputs, [names[name] for name in parameters], prefix)
    return Captured(program.model, constants, tuple(name for part in opaque for name in part.weights_read))


def _rename(
    graph: onnx_ir.Model, inputs: list[str], outputs: list[str], parameters: list[str], prefix: str
) -> dict[str, Tensor]:
    """Give inputs and outputs their public names and turn the parameters from inputs into initializers.

    Returns the constants by name, with the prefix put before it.
    """
    core = graph.graph
    values = list(core.inputs)
    assert len(values) == len(inputs) + len(parameters), "the exporter dropped an input"
    for value, name in zip(values, inputs + parameters, strict=True):
        value.name = name
    del core.inputs[len(inputs) :]
    constants = []
    for name, value in list(core.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > 256:
            value.name = prefix + name
            constants.append(prefix + name)
    for value in values[len(inputs) :]:
        if value.uses():
            core.register_initializer(as_initializer(value))
    for value, name in zip(core.outputs, outputs, strict=True):
        value.name = name
    return constants_of(core, constants)


def constants_of(graph: onnx_ir.Graph, names: Iterable[str]) -> dict[str, Tensor]:
    """Initializers that have data, by name."""
    tensors = {name: graph.initializers[name].const_value for name in names}
    return {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in tensors.items() if tensor is not None}


def as_initializer(value: onnx_ir.Value) -> onnx_ir.Value:
    """An initializer needs a tensor; parameters get one that says where the data will be, not what it is."""
    assert value.name is not None
    assert value.shape is not None
    value.const_value = onnx_ir.LazyTensor(
        _no_data, dtype=onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape(value.shape.numpy()), name=value.name
    )
    return value


def _no_data() -> onnx_ir.TensorProtocol:
    raise AssertionError("a template holds no parameter data")


@contextmanager
def _layers_called_one_by_one() -> Iterator[None]:
    """nn.TransformerEncoder has a fast path that reads the weights of its linears without calling them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about optional packages that nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
