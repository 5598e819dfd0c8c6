"""One run of torch's ONNX exporter over the shortened skeleton."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from qconvert.ir.forward import tensors_in
from qconvert.ir.garbage import uncollected
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN
from qconvert.trace import opaque as opaque_nodes
from qconvert.trace.attention import DECODER, ENCODER, NoCache, attention_context, rotary_caches, rotation_left_to_attention

OPSET = 23

# Batch and sequence of the example inputs: torch.export specialises dimensions of size 0 and 1.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class Form:
    """One way to trace a task, from the fastest to the safest.

    fused: attention as one ONNX Runtime op. rotary: that op rotates queries and keys too.
    """

    fused: bool
    rotary: bool = False


FORMS: dict[str, tuple[Form, ...]] = {
    "causal-lm": (Form(fused=True, rotary=True), Form(fused=True)),
    "encoder": (Form(fused=True), Form(fused=False)),
    "module": (Form(fused=False),),
}


class _Wrapper(nn.Module):
    """Gives the model the inputs and outputs of the graph. Parameters come in as inputs, so that nothing is folded into
    them and equal ones are not merged: stamping replaces them per block."""

    def __init__(self, model: Model, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.task, self.form, self.input_names = model.task, form, model.input_names
        self.module = module

    def call(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, parameters, args, kwargs)


class _CausalLM(_Wrapper):
    def __init__(self, model: Model, module: nn.Module, form: Form, layer_indices: list[int]) -> None:
        super().__init__(model, module, form)
        self.layer_indices = layer_indices
        if form.rotary:
            positions = int(module.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
            cos, sin = rotary_caches(module, positions)
            self.register_buffer("cos_cache", cos)
            self.register_buffer("sin_cache", sin)

    def forward(
        self, inputs: dict[str, Tensor], past: list[tuple[Tensor, Tensor]], parameters: dict[str, Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        total, sequence = attention_mask.shape[1], input_ids.shape[1]
        with attention_context() as context, contextlib.ExitStack() as stack:
            context.past = dict(zip(self.layer_indices, past, strict=True))
            context.last_token = (attention_mask.sum(1) - 1).to(torch.int32)
            context.total = torch.scalar_tensor(total, dtype=torch.int32)
            if self.form.rotary:
                stack.enter_context(rotation_left_to_attention(self.module))
                context.rotary = self.cos_cache, self.sin_cache  # type: ignore[assignment]
            kwargs: dict[str, Any] = {}
            if "position_ids" in inspect.signature(self.module.forward).parameters:
                # Rows of different length are padded on the right: a token's position is the number of tokens before it.
                kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, total - sequence :]
            logits = self.call(
                parameters, input_ids=input_ids, attention_mask=None, past_key_values=NoCache(), use_cache=True, **kwargs
            ).logits
            return logits, [context.present[index] for index in self.layer_indices]


class _Encoder(_Wrapper):
    def forward(self, inputs: dict[str, Tensor], parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        states: list[Any] = []
        base = self.module.base_model
        hook = base.register_forward_hook(lambda module, args, output: states.append(output))  # type: ignore[union-attr]
        with attention_context() as context:
            if self.form.fused:
                context.padding = inputs["attention_mask"].to(torch.int32)
            try:
                output = self.call(parameters, **inputs)
            finally:
                hook.remove()
        logits = output.get("logits")
        return (states[0][0],) if logits is None else (states[0][0], logits)


class _Module(_Wrapper):
    def forward(self, inputs: dict[str, Tensor], parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.call(parameters, **inputs)))


@dataclass(frozen=True)
class Captured:
    """A traced graph, values and initializers renamed to what the artifact will call them.

    constants: initializers that are no parameters, by name.
    """

    graph: onnx_ir.Model
    constants: dict[str, Tensor]


def capture(model: Model, blocks: list[str], form: Form) -> Captured:
    """Trace the skeleton with only `blocks` kept.

    Raises whatever the exporter raises; the caller decides whether another form is tried.
    """
    module = opaque_nodes.shortened(model, blocks)
    names = {}
    for name, part in list(module.named_modules()):
        full = opaque_nodes.original_name(name, blocks)
        stand_in = opaque_nodes.opaque(full, part)
        if stand_in is not None:
            if name == "":
                module = stand_in
                break
            module.set_submodule(name, stand_in)
    for name, parameter in list(module.named_parameters()):
        names[name] = opaque_nodes.original_name(name, blocks)
        owner, _, leaf = name.rpartition(".")
        # Uninitialised: only shapes matter, and untouched pages cost no memory.
        empty = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, empty)
    for position, block in enumerate(blocks):
        _mark(module.get_submodule(f"{block.rpartition('.')[0]}.{position}"), block)
    if form.fused:
        module.config._attn_implementation = DECODER if model.task == "causal-lm" else ENCODER  # type: ignore[union-attr]
    return _export(model, module, blocks, form, names)


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


def _export(model: Model, module: nn.Module, blocks: list[str], form: Form, names: dict[str, str]) -> Captured:
    parameters = dict(module.named_parameters())
    renamed: list[str] = []
    if model.task == "causal-lm":
        indices = [int(name.rpartition(".")[2]) for name in blocks]
        wrapper: nn.Module = _CausalLM(model, module, form, indices)
        config: Any = module.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inputs = {
            "input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.long),
            "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long),
        }
        past = [(torch.zeros(BATCH, heads, PAST, size), torch.zeros(BATCH, heads, PAST, size)) for _ in indices]
        shapes: dict[str, Any] = {
            "inputs": {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}},
            "past": [({0: "batch", 2: "past"}, {0: "batch", 2: "past"}) for _ in past],
        }
        arguments: dict[str, Any] = {"inputs": inputs, "past": past}
        renamed = ["input_ids", "attention_mask"]
        renamed += [f"past_key_values.{index}.{part}" for index in indices for part in ("key", "value")]
        outputs = ["logits", *(f"present.{index}.{part}" for index in indices for part in ("key", "value"))]
    elif model.task == "encoder":
        wrapper = _Encoder(model, module, form)
        inputs = {name: torch.ones(BATCH, SEQUENCE, dtype=torch.long) for name in model.input_names}
        shapes = {"inputs": {name: {0: "batch", 1: "sequence"} for name in inputs}}
        arguments = {"inputs": inputs}
        renamed = list(inputs)
        outputs = ["last_hidden_state", "logits"]
    else:
        wrapper = _Module(model, module, form)
        inputs = {name: _two_rows(tensor) for name, tensor in model.example_inputs.items()}
        shapes = {"inputs": {name: {0: "batch"} for name in inputs}}
        arguments = {"inputs": inputs}
        renamed = list(inputs)
        outputs = ["output"]
    arguments["parameters"], shapes["parameters"] = parameters, dict.fromkeys(parameters)
    with torch.no_grad(), _quiet(), _layers_called_one_by_one(), uncollected():
        program = torch.onnx.export(
            wrapper.eval(), kwargs=arguments, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    return _renamed(program.model, renamed, outputs, [names[name] for name in parameters])


def _two_rows(example: Tensor) -> Tensor:
    rows = example[:BATCH]
    return rows if rows.shape[0] == BATCH else rows.expand(BATCH, *rows.shape[1:]).contiguous()


def _renamed(graph: onnx_ir.Model, inputs: list[str], outputs: list[str], parameters: list[str]) -> Captured:
    """Give inputs and outputs their public names and turn the parameters from inputs into initializers."""
    core = graph.graph
    values = list(core.inputs)
    assert len(values) == len(inputs) + len(parameters), "the exporter dropped an input"
    for value, name in zip(values, inputs + parameters, strict=True):
        value.name = name
    del core.inputs[len(inputs) :]
    constants = {}
    for name, value in list(core.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > 256:
            constants[name] = torch.from_numpy(value.const_value.numpy().copy())
    for value in values[len(inputs) :]:
        if value.uses():
            core.register_initializer(_as_initializer(value))
    if outputs == ["output"] and len(core.outputs) > 1:
        outputs = [f"output_{i}" for i in range(len(core.outputs))]
    for value, name in zip(core.outputs, outputs, strict=False):
        value.name = name
    return Captured(graph, constants)


def _as_initializer(value: onnx_ir.Value) -> onnx_ir.Value:
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
