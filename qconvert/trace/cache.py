"""What tracing found before: the exporter takes most of the seconds of a short conversion, and is then not needed.

Two things are kept. What the exporter made of a form (capture.py) depends on the model's configuration and on versions alone.
Which form and clean-ups are right (check.py) was seen on weights: where something that a form leaves out is zero in one
checkpoint, it computes what that one computes, and not what another of the same configuration does. So that is known for the
very tensors that the check reads, and other weights are checked anew, on the graphs that are there.

A hit leaves out no proof: the same code found the same graphs right for the same tensors before. All else (stamping, clean-ups,
groups) is done every time.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from functools import cache as once
from functools import cached_property
from importlib.metadata import version
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

from qconvert.execution.adapter_branch import AdapterBranch
from qconvert.ir.model import Model
from qconvert.plugin.host.distribution import code_digest
from qconvert.storage.cache import Cache
from qconvert.storage.digest import tensor_bytes
from qconvert.trace.capture import Captured, as_initializer, capture, constants_of
from qconvert.trace.signature import Form

DISTRIBUTIONS = ("torch", "transformers", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
LIBRARIES = {"torch", "transformers"}
ATTENTIONS = (None, "eager", "sdpa")  # transformers' own; others are looked up among what anybody has registered
RECORD = "record"  # the part of an entry that is JSON; the others are graphs


class TraceCache:
    """What is known of one model, of which `blocks` are traced."""

    def __init__(self, model: Model, blocks: list[str]) -> None:
        self.model, self.blocks = model, blocks
        self.cache = Cache("templates")
        self.key = _key(model, blocks) if self.cache.folder is not None and _is_a_librarys(model) else None

    def right(self) -> tuple[dict[str, Captured], bool] | None:
        """What was right for these very weights, and whether with clean-ups; None where either is not known."""
        if self.key is None or (found := self.cache.get(self._key_of_weights)) is None:
            return None
        record = json.loads(found[RECORD])
        captured = self.cache.get(record["captured"])
        return None if captured is None else (_decoded(captured), record["cleaned"])

    def capture(self, form: Form, outputs: list[str]) -> dict[str, Captured]:
        """`capture`, or what it gave before. Raises what it raises, which is not kept: that may be for want of memory."""
        if self.key is None:
            return capture(self.model, self.blocks, form, outputs)
        key = _digest([self.key, form, outputs])
        found = self.cache.get(key)
        if found is not None:
            return _decoded(found)
        captured = capture(self.model, self.blocks, form, outputs)
        self.cache.put(key, _encoded(captured))
        return captured

    def keep(self, form: Form, outputs: list[str], *, cleaned: bool) -> None:
        """A form is right for these weights."""
        if self.key is not None:
            record = {"captured": _digest([self.key, form, outputs]), "cleaned": cleaned}
            self.cache.put(self._key_of_weights, {RECORD: json.dumps(record).encode()})

    @cached_property
    def _key_of_weights(self) -> str:
        """Digest of the tensors that the check reads: those of the traced blocks, and outside of all blocks."""
        model, digest = self.model, hashlib.sha256()
        names = [name for name in model.parameter_shapes if model.block_of(name) in ("", *self.blocks)]
        for name in dict.fromkeys(model.stored_name(name) for name in names):
            tensor = model.source.read(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return _digest([self.key, digest.hexdigest(), torch.backends.cpu.get_cpu_capability()])


def _is_a_librarys(model: Model) -> bool:
    """Whether a model computes nothing but what its configuration and the versions of libraries tell: a factory's code may lie
    anywhere, and so may what a loader plugin has hung into a module."""
    return model.task.takes_text and all(_is_as_published(module) for module in model.module.modules())


def _is_as_published(module: nn.Module) -> bool:
    packages = {code.__module__.partition(".")[0] for code in (type(module), type(module).forward)}
    hooks = [hook for name, value in vars(module).items() if name.endswith("_hooks") and value for hook in value.values()]
    strange = any(type(hook) is not AdapterBranch for hook in hooks)  # what that computes is told by the module's children
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return packages <= LIBRARIES and not strange and "forward" not in vars(module) and attention in ATTENTIONS


def _key(model: Model, blocks: list[str]) -> str:
    """Digest of all that a capture depends on."""
    return _digest(
        {
            "versions": _versions(),
            "code": code_digest("qconvert"),
            "task": model.task.name,
            "inputs": model.input_names,
            "blocks": [model.blocks, blocks],
            "modules": list(_modules(model.module)),
            "parameters": [[name, str(p.dtype), list(p.shape)] for name, p in model.module.named_parameters()],
            "names": _first_names(model.module),
            "buffers": [
                [name, str(buffer.dtype), list(buffer.shape), hashlib.sha256(tensor_bytes(buffer)).hexdigest()]
                for name, buffer in model.module.named_buffers()
            ],
        }
    )


@once
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        name: version(name) for name in DISTRIBUTIONS
    }


def _modules(module: nn.Module) -> Iterator[list[Any]]:
    """Of each module: name, class, plain attributes, and the config where it is another than the one before."""
    before = None
    for name, part in module.named_modules():
        attributes = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        config = getattr(part, "config", None)
        yield [name, f"{type(part).__module__}.{type(part).__qualname__}", attributes]
        if config is not None and config is not before:
            yield [f"{type(config).__module__}.{type(config).__qualname__}", {**config.to_dict(), "_name_or_path": None}]
            before = config


def _first_names(module: nn.Module) -> dict[str, str]:
    """Parameter -> its first name: tied ones are one tensor under several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


def _digest(document: Any) -> str:
    """Of plain data; repr knows what JSON doesn't, such as the dtype in a config."""
    return hashlib.sha256(repr(document).encode()).hexdigest()


def _encoded(captured: dict[str, Captured]) -> dict[str, bytes]:
    """Graphs as ONNX. Parameters have no data, so they are inputs there, behind the graph's own."""
    record, parts = {}, {}
    for part, traced in captured.items():
        model = traced.graph.clone()
        graph = model.graph
        parameters = [value for value in graph.initializers.values() if isinstance(value.const_value, onnx_ir.LazyTensor)]
        for value in parameters:
            del graph.initializers[value.name]  # type: ignore[arg-type]
            value.const_value = None
            graph.inputs.append(value)
        record[part] = {"parameters": len(parameters), "constants": list(traced.constants), "weights_read": traced.weights_read}
        parts[part] = onnx_ir.to_proto(model).SerializeToString()
    return {RECORD: json.dumps(record).encode(), **parts}


def _decoded(parts: dict[str, bytes]) -> dict[str, Captured]:
    captured = {}
    for part, record in json.loads(parts[RECORD]).items():
        model = onnx_ir.from_proto(onnx.load_model_from_string(parts[part]))
        graph = model.graph
        count = len(graph.inputs) - record["parameters"]
        parameters = list(graph.inputs[count:])
        del graph.inputs[count:]
        for value in parameters:
            graph.register_initializer(as_initializer(value))
        captured[part] = Captured(model, constants_of(graph, record["constants"]), tuple(record["weights_read"]))
    return captured
