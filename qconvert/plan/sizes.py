"""What people compute by hand: bits per weight, and the memory that an artifact takes where it runs on the CPU.

docs/sizes.md has both formulas with an example, and how near the second was to report.json's loaded_bytes of real models. What
is not counted there are pages of files that are mapped and can be taken back: embeddings, of which a run reads the rows that it
looks up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from math import prod

import torch

from qconvert.execution.probes import position_limit
from qconvert.ir.graph_names import is_cache
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import Model
from qconvert.ir.plan import Deployment, LayerPlan, Plan
from qconvert.ir.template import Template, module_of
from qconvert.plan.prefill import prompt_weight_count
from qconvert.targets import targets_of
from qconvert.targets.cpu import CPU
from qconvert.targets.cpu_sidecar import sidecar_infos
from qconvert.vocabulary import KVCache

FLOAT = 4
# What a number of a cache takes.
CACHE_BYTES: Mapping[KVCache, int] = {"float": FLOAT, "int8": 1}
# A process of Python that has imported ONNX Runtime, and what the first session adds to it.
RUNTIME_BYTES = 58_000_000
# Of a layer: nodes and constants, and those of rows that are quantized one by one, for two kinds of processors.
NODE_BYTES, ROWS_NODE_BYTES = 25_000, 150_000
# Of each block of MatMulNBits the kernel keeps the scale and the sum of the codes times it, in float32
# (PackedQuantBScale and QuantBBlkSum in onnxruntime/core/mlas/lib/qnbitgemm.h).
BLOCK_BYTES = 2 * FLOAT
# What a convolution takes per weight: dequantized, in the order of its kernel, and what that has left with the allocator, which
# differs: 10 bytes were measured, and 18.
CONVOLUTION_BYTES = 3 * FLOAT
# For each weight that is derived from packed codes for prompts, what is held meanwhile: its kernel's packed codes, and the
# derived ones several times over (export/derived_weights.py). Measured on SmolLM2.
LOADING_BYTES = 3.3
# Of that so many bytes are kept once it is loaded, 2 or 1.15 for each: SmolLM2, and a Llama of 1.2 billion weights.
LARGE_DERIVED = 1 << 22
# And how long one core takes to derive it (AMD EPYC with AVX-512).
DERIVING_SECONDS = 7e-9
# An allocation of at least that is given back to the system when it is freed (the largest M_MMAP_THRESHOLD of mallopt(3)).
GIVEN_BACK = 1 << 25


def average_bits(layers: Iterable[LayerPlan]) -> float | None:
    """Return the bits per weight of all layers on average, as report.json's average_bits: codes, scales and zero points, and
    what kernels need of them once more in another order. None where there are no layers.

    With one group size that is bits + (bits of a scale + bits of a zero point) / group, and 128 bits per layer for its shape.
    Scales beyond float16's range, and outliers, are only known once the weights were read.
    """
    nbytes = weights = 0
    for layer in layers:
        nbytes += layer.nbytes + sum(info.nbytes for info in sidecar_infos(layer).values())
        weights += layer.out_features * layer.in_features
    return 8 * nbytes / weights if weights else None


def deployment(model: Model, template: Template, plan: Plan) -> Deployment | None:
    """Return what a process takes that runs the artifact on the CPU; None where that is no target."""
    if CPU not in targets_of(plan.targets):
        return None
    graphs = [graph.graph for graph in template.graphs.values()]
    nodes = [node for graph in graphs for node in graph if "module" in node.attributes]
    names = [module_of(node) for node in nodes]
    looked_up = [node.op_type == "Embedding" for node in nodes]
    derived = [prompt_weight_count(plan, name) for name in names]
    loaded = RUNTIME_BYTES + sum(
        _node_bytes(model, plan, name, looked_up=each) + _derived_bytes(count)
        for name, each, count in zip(names, looked_up, derived, strict=True)
    )
    caches = [value for graph in graphs for value in graph.inputs if is_cache(str(value.name))]
    if not caches or not model.task.continues_prompts:
        return Deployment(loaded)
    shapes = [value.shape for value in caches if value.shape is not None]  # [rows, heads, tokens, head size]
    cache = CACHE_BYTES[plan.kv_cache] * sum(int(str(shape[1])) * int(str(shape[3])) for shape in shapes)
    made = Deployment(loaded, cache, position_limit(model))
    if not any(derived):
        return made
    peak, seconds = RUNTIME_BYTES + round(LOADING_BYTES * sum(derived)), DERIVING_SECONDS * sum(derived)
    return dataclasses.replace(made, loading_bytes=max(loaded, peak), deriving_seconds=seconds)


def _node_bytes(model: Model, plan: Plan, name: str, *, looked_up: bool) -> int:
    """What a session holds of one use of the layer `name`. looked_up: whether its rows are, where others multiply."""
    layer = plan.layer_of(name)
    if layer is None:
        return 0 if looked_up else NODE_BYTES + _float_bytes(model, plan, f"{name}.weight")
    weights = layer.out_features * layer.in_features
    match plan.form_of(name):
        case LayerForm.PACKED_EMBEDDING:
            return NODE_BYTES + _widened_scales(layer)
        case LayerForm.PACKED_WEIGHTS:
            codes = _blocks(layer) * CPU.block_size(layer) * layer.scheme.bits // 8
            return NODE_BYTES + codes + _blocks(layer) * BLOCK_BYTES + _widened_scales(layer)
        case LayerForm.CONVOLUTION | LayerForm.PACKED_STATIC:
            return NODE_BYTES + CONVOLUTION_BYTES * weights
        case LayerForm.INT8_ROWS:  # a head that shares the codes of an embedding is transposed, and that copy stays
            return ROWS_NODE_BYTES + weights * (2 if name in plan.shared else 1)
        case LayerForm.INT8_STATIC:
            return NODE_BYTES + weights
        case _:
            return NODE_BYTES


def _derived_bytes(weights: int) -> int:
    """int8 weights in the order of their kernel, and what the allocator keeps of deriving them: less of large ones."""
    return round(weights * (1.15 if weights >= LARGE_DERIVED else 2))


def _blocks(layer: LayerPlan) -> int:
    return layer.out_features * CPU.blocks(layer)


def _widened_scales(layer: LayerPlan) -> int:
    """The float32 that scales in float16 are widened to when a session is opened."""
    return FLOAT * _blocks(layer) if layer.scheme.scale_dtype == torch.float16 else 0


def _float_bytes(model: Model, plan: Plan, parameter: str) -> int:
    """A float weight in the order of its kernel; where it was widened, what held it before that stays with the allocator."""
    nbytes, name = FLOAT * prod(model.parameter_shapes[parameter]), model.stored_name(parameter)
    stored = plan.cast.get(name, model.source.tensors[name].dtype)
    return nbytes if stored == torch.float32 or nbytes >= GIVEN_BACK else 2 * nbytes
