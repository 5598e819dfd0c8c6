"""ONNX Runtime sessions, over files or over graphs in memory that are fed from mapped tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from qconvert.errors import is_out_of_memory
from qconvert.graph.float_graph import look_up_narrow
from qconvert.ir.graph_names import CROSS, WHOLE_NAMES, is_cache
from qconvert.targets import TARGETS
from qconvert.targets.cpu import CPU

PROVIDERS: dict[str, str] = {name: target.provider for name, target in TARGETS.items()}
DEVICES = {target.provider: target.device for target in TARGETS.values()}


NARROW = {torch.float16: onnx_ir.DataType.FLOAT16, torch.bfloat16: onnx_ir.DataType.BFLOAT16}

Values = dict[str, np.ndarray[Any, Any]]


def why_unavailable(target: str) -> str | None:
    """Return why this machine can't run a target; None if it can.

    A provider may be installed without a device or driver for it.
    """
    provider = PROVIDERS[target]
    if provider not in onnxruntime.get_available_providers():
        return f"this machine's ONNX Runtime has no provider for {target}"
    node = onnx_ir.node("Identity", [onnx_ir.val("x", onnx_ir.DataType.INT64, (1,))])
    try:
        with redirect_stdout(StringIO()):  # where ONNX Runtime says that it falls back to the CPU
            started = node_session(node, target).get_providers()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"ONNX Runtime's provider for {target} does not start here: {error}"
    return (
        None
        if provider in started
        else f"ONNX Runtime's provider for {target} does not start here: no device, driver or library"
    )


def node_session(node: onnx_ir.Node, target: str = CPU.name) -> Any:
    """Open a session over one node; its inputs are the graph's."""
    for output in node.outputs:
        output.name = output.name or "y"
    graph = onnx_ir.Graph(node.inputs, node.outputs, nodes=[node], opset_imports={"": 21}, name="node")  # type: ignore[arg-type]
    data = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(data, session_options(), providers=[PROVIDERS[target]])


# ONNX Runtime's names of the types that caches have -> their numbers in ONNX.
CACHE_TYPES = {"tensor(float)": 1, "tensor(int8)": 3, "tensor(float16)": 10, "tensor(bfloat16)": 16}


def empty(shape: Sequence[int], kind: str) -> Any:
    """Return a value without elements as a session takes it, of a type that numpy may not have: kind "tensor(bfloat16)"."""
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), CACHE_TYPES[kind])


def ort_value(value: Any) -> Any:
    """Return an array as onnxruntime's own kind of value; one that is that already, as it is."""
    if isinstance(value, np.ndarray):
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
    return value


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """The settings of a session.

    threads: of one op, 0 for as many as there are cores. spinning: idle threads wait in a loop, which is faster unless somebody
        else wants their cores: beside eight others on two cores, parity took seven times the processor time. optimized: whether
        nodes may be fused, or made integer products of.
    """

    threads: int = 0
    spinning: bool = False
    optimized: bool = True


DEFAULT = SessionSettings()


def session_options(settings: SessionSettings = DEFAULT) -> Any:
    """Return ONNX Runtime's options for `settings`, its log silent."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    if not settings.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not settings.optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # fatal: what is logged as an error is raised too
    return options


def file_session(path: Path, target: str = CPU.name, settings: SessionSettings = DEFAULT, profile: Path | None = None) -> Any:
    """Open a session over a model file and the external data beside it; on a device, one that leaves caches there.

    profile: where `end_profiling()` is to write what ran where.
    """
    options = session_options(settings)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[target]])
    return _on(target, session)


def _on(target: str, session: Any) -> Any:
    return session if TARGETS[target] is CPU else DeviceSession(session, DEVICES[PROVIDERS[target]])


class DeviceSession:
    """Runs a session through IOBinding: inputs come from numpy, outputs go there, but for the caches.

    A cache stays on `device`, as the OrtValue that the next run takes: nobody looks into it, and numpy has no bfloat16.
    """

    def __init__(self, session: Any, device: str) -> None:
        self.session, self.device = session, device

    def get_inputs(self) -> Any:
        """Return names, types and shapes of the graph's inputs, as onnxruntime describes them."""
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        """Return names, types and shapes of the graph's outputs, as onnxruntime describes them."""
        return self.session.get_outputs()

    def end_profiling(self) -> str:
        """Write the profile, and return the name of its file."""
        return str(self.session.end_profiling())

    def run(self, names: None, feeds: Mapping[str, Any]) -> list[Any]:
        """Run the graph, and return its outputs in order. feeds: arrays, and caches as an earlier run or `empty` gave them."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort_value(value))
        outputs = [value.name for value in self.session.get_outputs()]
        for name in outputs:
            binding.bind_output(name, self.device if is_cache(name) else "cpu")
        self.session.run_with_iobinding(binding)
        values = zip(outputs, binding.get_outputs(), strict=True)
        return [value if is_cache(name) else value.numpy() for name, value in values]


def memory_session(
    model: onnx_ir.Model,
    read: Callable[[str], Tensor],
    settings: SessionSettings = DEFAULT,
    folder: Path | None = None,
    target: str = CPU.name,
) -> Any:
    """Open a session over a graph in memory.

    Initializers without data (see ir/template.py) are taken from `read(name)` as float32, without a copy where it is
    a mapped tensor of that type, or one of half the width that only lookups read.

    folder: where the graph's external data lies.
    """
    options = session_options(settings)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    clone = model.clone()
    weights = fed_weights(clone.graph, read)
    for name, weight in weights.items():
        initializer = clone.graph.initializers[name]
        dtype, shape = onnx_ir.DataType(weight.element_type()), onnx_ir.Shape(weight.shape())
        initializer.const_value = onnx_ir.ExternalTensor("fed", 0, weight.tensor_size_in_bytes(), dtype, shape=shape, name=name)
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    data = onnx_ir.to_proto(clone).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=[PROVIDERS[target]])
    session.fed = weights  # the session reads them as long as it lives
    return _on(target, session)


def fed_weights(graph: onnx_ir.Graph, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """Return the initializers of a graph that lack data, as `read` gives them, by name; the graph is brought to their types."""
    lacking = [value for value in graph.initializers.values() if isinstance(value.const_value, onnx_ir.LazyTensor)]
    return {str(value.name): _fed(graph, value, read(str(value.name))) for value in lacking}


def _fed(graph: onnx_ir.Graph, initializer: onnx_ir.Value, tensor: Tensor) -> Any:
    assert initializer.shape is not None
    dtype = onnx_ir.DataType.FLOAT
    if tensor.dtype in NARROW and look_up_narrow(graph, initializer, NARROW[tensor.dtype]):
        dtype, tensor = NARROW[tensor.dtype], tensor.view(torch.uint16)  # numpy has no bfloat16
    elif tensor.dtype != torch.float32 and _turned(graph, initializer):  # what is mapped is not copied
        tensor = torch.empty(tensor.shape[::-1]).copy_(tensor.T)
    else:
        tensor = tensor.float()
    array = np.ascontiguousarray(tensor.numpy()).reshape(initializer.shape.numpy())
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, dtype.value)


def _turned(graph: onnx_ir.Graph, initializer: onnx_ir.Value) -> bool:
    """Let a weight [out, in] that is only transposed be [in, out], without the nodes that do it. Returns whether it is so now.

    A session that transposes holds the weight once more.
    """
    nodes = [node for node, _ in initializer.uses()]
    if not nodes or any(node.op_type != "Transpose" or len(node.inputs[0].shape or ()) != 2 for node in nodes):  # type: ignore[union-attr]
        return False
    for node in nodes:
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], initializer)
        graph.remove(node, safe=True)
    assert initializer.shape is not None
    initializer.shape = onnx_ir.Shape(initializer.shape.numpy()[::-1])
    return True


class EncoderDecoderSession:
    """The sessions of an encoder and its decoder, run as one.

    Inputs: "input_ids" and "attention_mask" of the source, "decoder_input_ids", the decoder's caches. A later step takes
    an earlier one's cross_key_values in the place of "input_ids", and does not run the encoder.
    Outputs: the decoder's, then the cross_key_values.
    """

    def __init__(self, encoder: Any, decoder: Any) -> None:
        self.encoder, self.decoder = encoder, decoder

    def get_inputs(self) -> list[Any]:
        """Return the inputs of the encoder, then those of the decoder."""
        return [*self.encoder.get_inputs(), *self.decoder.get_inputs()]

    def get_outputs(self) -> list[Any]:
        """Return the outputs of the decoder, then the keys and values that the encoder gives it."""
        return [*self.decoder.get_outputs(), *self.cross_outputs()]

    def cross_outputs(self) -> list[Any]:
        """Return the keys and values that the encoder gives the decoder."""
        return [value for value in self.encoder.get_outputs() if value.name.startswith(CROSS)]

    def run(self, names: None, inputs: Values) -> list[np.ndarray[Any, Any]]:
        """Return every output of `get_outputs`, in order, of the decoder run after the encoder."""
        values = self.values(inputs)
        found = values["encoder"] | values["decoder"]
        return [found[value.name] for value in self.get_outputs()]

    def values(self, inputs: Values) -> dict[str, Values]:
        """Run both parts, and return of each all values that go into its graph and come out of it, by name."""
        encoded = run_named(self.encoder, inputs) if "input_ids" in inputs else {}
        return {"encoder": encoded, "decoder": run_named(self.decoder, self.decoder_inputs(inputs | encoded))}

    def decoder_inputs(self, known: Values) -> Values:
        """Return the inputs of the decoder. known: values by their names in the whole model."""
        names = [value.name for value in self.decoder.get_inputs()]
        return {name: known[WHOLE_NAMES.get(name, name)] for name in names}


def run_named(session: Any, inputs: Values) -> Values:
    """Run a session, and return all values that go in and come out, by name; inputs that it does not have are left out."""
    taken = {value.name: inputs[value.name] for value in session.get_inputs()}
    return taken | dict(zip((value.name for value in session.get_outputs()), session.run(None, taken), strict=True))


def run_parts(session: Any, inputs: Values) -> dict[str, Values]:
    """Run the session of a whole model, and return of each part all values that go into its graph and come out of it."""
    return session.values(inputs) if isinstance(session, EncoderDecoderSession) else {"model": run_named(session, inputs)}


def joined(sessions: Mapping[str, Any]) -> Any:
    """Return the session of a whole model from those of its parts (see targets.graph_files)."""
    return sessions["model"] if "model" in sessions else EncoderDecoderSession(**sessions)
