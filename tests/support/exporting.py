"""Artifacts of tiny models without the pipeline: chosen tensors written, exported and published."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from calibrate_models import job_of
from torch import Tensor
from writing import DIGEST, HISTOGRAM

from qconvert.export import export
from qconvert.ir import activations, affine
from qconvert.ir.layer import LayerKind
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.quantized import QuantizedBlock, QuantizedLayer, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index
from qconvert.storage.stage import open_stage
from qconvert.verify.parity import cluster_parity, graph_parity, torch_outputs
from qconvert.write import write, write_manifest
from qconvert.write.origin import Origin

KINDS: dict[str, LayerKind] = {"Linear": "linear", "Conv1D": "conv1d", "Conv2d": "conv2d", "Embedding": "embedding"}


def nearest(weight: Tensor, scheme: QuantScheme) -> QuantizedTensor:
    scale, zero_point = affine.choose_qparams(weight, scheme)
    return QuantizedTensor(affine.quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)


def matrix(model: Model, name: str) -> Tensor:
    """The weight of a layer as [out, in]."""
    weight = model.read(f"{name}.weight").float()
    return weight.T.contiguous() if kind_of(model, name) == "conv1d" else weight.flatten(1)


def kind_of(model: Model, name: str) -> LayerKind | None:
    return KINDS.get(type(model.module.get_submodule(name)).__name__)


def quantize_nearest(model: Model, scheme_of: Callable[[str, Tensor], QuantScheme | None]) -> dict[str, QuantizedTensor]:
    """Every linear and convolution that `scheme_of` gives a scheme for its name and matrix; tied ones stay in float."""
    names = [
        name
        for name, _ in model.module.named_modules()
        if kind_of(model, name) not in (None, "embedding") and f"{name}.weight" not in model.tied
    ]
    chosen = {name: scheme_of(name, matrix(model, name)) for name in names}
    return {name: nearest(matrix(model, name), scheme) for name, scheme in chosen.items() if scheme is not None}


def publish(  # noqa: PLR0913 - what tests choose
    model: Model,
    template: Template,
    tensors: Mapping[str, QuantizedTensor],
    output: Path,
    targets: tuple[str, ...] = ("cpu",),
    cuda_dtype: torch.dtype = torch.float16,
    shared: Mapping[str, str] | None = None,
) -> ArtifactReader:
    """Write, export and publish `tensors` as the quantized layers of `model`."""
    layers = {}
    for name, tensor in tensors.items():
        kind = kind_of(model, name)
        assert kind is not None
        layers[name] = LayerPlan(name, kind, *tensor.q.shape, tensor.scheme)  # type: ignore[call-arg]
    plan = Plan(QuantScheme.parse("int8"), layers, (), False, 0, {}, shared or {})
    blocks = [
        QuantizedBlock(
            block,
            tuple(
                QuantizedLayer(name, tensor, 0.0, HISTOGRAM)
                for name, tensor in tensors.items()
                if model.block_of(name) == block
            ),
        )
        for block in (*model.blocks, "")
    ]
    settings: dict[str, Any] = {"layout": "onnx", "targets": targets, "cuda_dtype": str(cuda_dtype).removeprefix("torch.")}
    job = replace(job_of(model, plan, **settings), template=template)
    with open_stage(output, DIGEST) as stage:
        written = write(blocks, job, stage)
        export(job, written, stage)
        write_manifest(stage, job.recipe, Origin({}, {}, {}), written)
        stage.publish()
    return ArtifactReader(output, model, plan, read_index(output))


def integer_products(graph: onnx.GraphProto, operators: Container[str] = ("MatMulIntegerToFloat",)) -> list[onnx.NodeProto]:
    """The integer products of a graph and of the branches that it chooses from by processor."""
    branches = [attribute.g for node in graph.node for attribute in node.attribute if node.op_type == "If"]
    own = [node for node in graph.node if node.op_type in operators]
    return own + [node for branch in branches for node in integer_products(branch, operators)]


def parity(artifact: ArtifactReader) -> float:
    """The larger of both parts of the CPU target's parity."""
    return max(graph_parity(artifact, torch_outputs(artifact.model, artifact.read)), cluster_parity(artifact))


def whole_numbers(shape: tuple[int, int], low: int, high: int, seed: int = 0) -> Tensor:
    """Random integers in [low, high] as float32, both ends in every 16 columns."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high + 1, shape, generator=generator)
    values[:, ::16], values[:, 1::16] = low, high
    return values.float()


LARGEST = 2  # column of `lossless_rows` that meets weights of 0


def lossless_rows(shape: tuple[int, int], scheme: QuantScheme, seed: int = 0) -> Tensor:
    """Random whole numbers that the scheme's kernel multiplies without loss, if `without_largest` made the weights.

    Kernels for float activations divide the largest magnitude into 127 steps, those for int8 activations into those of
    SYMMETRIC_ROWS, so that they are exact on rows whose largest magnitude is that.
    """
    x = whole_numbers(shape, -127, 127, seed)
    if scheme.activations:
        x[:, LARGEST] = activations.SYMMETRIC_ROWS.steps
    return x


def without_largest(weight: Tensor) -> Tensor:
    """`weight` with zeros for the column that holds the largest magnitude of `lossless_rows`."""
    weight[:, LARGEST] = 0
    return weight
