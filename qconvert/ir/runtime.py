"""ONNX Runtime sessions, over files or over graphs in memory that are fed from mapped tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
from torch import Tensor

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def available(target: str) -> bool:
    """Whether this machine's ONNX Runtime has the provider of a target."""
    return PROVIDERS[target] in onnxruntime.get_available_providers()


# ONNX Runtime's names of the types that caches have -> their numbers in ONNX.
FLOATS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}


def empty(shape: Sequence[int], kind: str) -> Any:
    """A value without elements as a session takes it, of a type that numpy may not have: kind "tensor(bfloat16)"."""
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), FLOATS[kind])


def session_options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # fatal: what is logged as an error is raised too
    return options


def file_session(path: Path, target: str = "cpu", threads: int = 0) -> Any:
    """A session over a model file and the external data beside it."""
    return onnxruntime.InferenceSession(str(path), session_options(threads), providers=[PROVIDERS[target]])


def memory_session(
    model: onnx_ir.Model, read: Callable[[str], Tensor], threads: int = 0, folder: Path | None = None, prepack: bool = True
) -> Any:
    """A session over a graph in memory.

    Initializers without data (see ir/template.py) are taken from `read(name)` as float32, without a copy where it is
    a mapped tensor of that type. folder: where the graph's external data lies. prepack: let kernels copy weights into
    faster layouts.
    """
    options = session_options(threads)
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    names, values = [], []
    clone = model.clone()
    for name, initializer in clone.graph.initializers.items():
        tensor = initializer.const_value
        if isinstance(tensor, onnx_ir.LazyTensor):
            assert initializer.shape is not None
            array = np.ascontiguousarray(read(name).float().numpy()).reshape(initializer.shape.numpy())
            names.append(name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.dtype.value))
            initializer.const_value = onnx_ir.ExternalTensor(
                "fed", 0, array.nbytes, tensor.dtype, shape=onnx_ir.Shape(array.shape), name=name
            )
    if names:
        options.add_external_initializers(names, values)
    data = onnx_ir.to_proto(clone).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=[PROVIDERS["cpu"]])
    session.fed = values  # the session reads them as long as it lives
    return session
