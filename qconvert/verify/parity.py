"""Parity: the artifact against its own dequantized weights. A gap is a bug of qconvert.

1. The same graph with every int8-activation cluster replaced by its dequantized MatMul, MatMulNBits at accuracy level 1
   (float activations), and no codes of static activations or in caches, against torch on the dequantized weights. Rows
   are padded on the right, and on the left.
2. Each int8-activation cluster of the graph as it ships, on the inputs that it meets there, against an emulation of
   its arithmetic in torch (verify/row_emulation.py); static activations against float kernels on the same codes
   (verify/static_parity.py); each attention whose cache is in codes against torch on such a cache (verify/cache_parity.py).
   A graph that gives the logits of the last position alone is compared at all of them, and then with itself
   (verify/last_position.py). Of a graph with a body for prompts and one for decoding, parts 1 and 2 are made of each, and
   what it chooses is compared with them (verify/phases.py).
3. Where the layout promises it, the folder loaded with transformers, against torch on the dequantized weights.
4. The CUDA provider's graph, which computes in half the width, by cosine and KL against torch on the dequantized weights,
   that is, against what part 1 holds the CPU provider's graph to (verify/narrow_parity.py).
5. The float graph that fidelity and latency compare with, against torch on the float weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from qconvert.execution import probes
from qconvert.execution.block_runner import BlockRunner
from qconvert.execution.materialize import ReadParameter
from qconvert.execution.wide_rows import Rows
from qconvert.graph.cache_codes import drop_cache_codes
from qconvert.graph.float_graph import number_repeated_names, parameter, substitute
from qconvert.graph.last_position import restore_all_positions
from qconvert.graph.phases import Phase, phase_of, phases_of
from qconvert.graph.static_codes import drop_static_codes
from qconvert.ir.artifact import INPUT_KEY, LAYER_KEY, LAYER_SEPARATOR, REST_KEY
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.template import made_by
from qconvert.ort import compare
from qconvert.ort.large_pieces import in_tiles
from qconvert.ort.pieces import sized_session
from qconvert.ort.session import SessionSettings, joined, memory_session, run_parts
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.targets import graph_files
from qconvert.targets.cpu import CPU
from qconvert.targets.target import Target
from qconvert.verify.finite import require_finite_float
from qconvert.verify.row_emulation import Cluster, emulated_cluster

TOLERANCE = 1e-4

# Suffixes of the initializers that are fed with dequantized weights, and with biases that the graph has as codes.
FED, FED_BIAS = "/dequantized", "/float_bias"


def torch_outputs(model: Model, read: ReadParameter, batches: Sequence[Batch] | None = None) -> list[tuple[Tensor, ...]]:
    """Run the model in torch on the weights that `read` gives, one block in memory at a time, and return its outputs.

    batches: unset, `probes.probes`.
    """
    runner = BlockRunner(model, read)
    runner.start(probes.probes(model) if batches is None else batches)
    for index in range(len(model.blocks)):
        runner.run_block(index)
    return list(runner.outputs())


def float_parity(model: Model, session: Any, sample: Batch) -> float:
    """Measure part 5: the largest relative difference of the float graph to torch, on one evaluation sample of full length.

    session: over the float graph. The trace is checked on a few tokens only; what is lost beyond them (a long window, say)
    would be lost in the artifact and in the float graph that it is compared with.

    Raises InputError QC-FLOAT-001 where torch gives no finite numbers either.
    """
    row = next(model.single_rows([sample]))
    found = session.run(None, compare.feed(session, row))
    (expected,) = torch_outputs(model, model.read, [row])
    require_finite_float(expected[0], row, "evaluation")
    # Caches follow a decoder's logits.
    return max(compare.largest_difference(a, b.numpy()) for a, b in zip(found, expected, strict=False))


def target_graphs(artifact: ArtifactReader, target: Target, phase: Phase | None = None) -> dict[str, onnx_ir.Model]:
    """Return the graphs for one target, fresh from disk, by part.

    phase: of graphs that have several bodies, the one that is wanted, in the place of the choice.
    """
    graphs = {part: onnx_ir.load(artifact.folder / file) for part, file in graph_files(artifact.model.task, target).items()}
    return graphs if phase is None else {part: phase_of(model, phase) for part, model in graphs.items()}


def target_phases(artifact: ArtifactReader, target: Target) -> tuple[Phase | None, ...]:
    """Return the phases that the graphs for one target have bodies for; (None,) where one body is for all."""
    return next((found for model in target_graphs(artifact, target).values() if (found := phases_of(model.graph))), (None,))


def graph_parity(artifact: ArtifactReader, expected: Sequence[tuple[Tensor, ...]], target: Target = CPU) -> float:
    """Measure part 1: the largest relative difference of the graphs with float activations to torch.

    expected: `torch_outputs` on the dequantized weights.
    """
    return max(
        compare.relative_error(artifact.model, float_activations_session(artifact, target, phase), expected)
        for phase in target_phases(artifact, target)
    )


def float_activations_session(artifact: ArtifactReader, target: Target, phase: Phase | None = None) -> Any:
    """Open a session over the graphs for one target with float activations, on dequantized weights; large ones in pieces."""
    graphs, shapes = target_graphs(artifact, target, phase), artifact.model.parameter_shapes
    for model in graphs.values():
        restore_all_positions(model.graph)
        for node in list(model.graph):
            if LAYER_KEY in node.metadata_props:
                names = _layer_names(node)
                plans = [layer for name in names if (layer := artifact.plan.layer_of(name))]
                _replace_cluster(model.graph, node, names, plans, f"{names[0]}.bias" in artifact.tensors)
            elif node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", 1)
        drop_cache_codes(model.graph)
        drop_static_codes(model.graph, partial(_float_bias, model.graph, shapes))
        RemoveUnusedNodesPass()(model)
        number_repeated_names(model.graph)

    def read(name: str) -> Tensor:
        if name.endswith(FED_BIAS):
            return artifact.read(f"{name.removesuffix(FED_BIAS)}.bias")
        layers = name.removesuffix(FED).split(LAYER_SEPARATOR)
        return torch.cat([artifact.layer(layer).dequantize() for layer in layers])

    def rows(name: str) -> Tensor | Rows:
        layer = name.removesuffix(FED)
        return read(name) if LAYER_SEPARATOR in layer else artifact.rows(layer)

    # Optimized, codes of weights alone would be an integer product again, with activations quantized on the way.
    settings = SessionSettings(optimized=not artifact.plan.is_static)
    opened = partial(memory_session, read=read, folder=artifact.folder, target=target.name, settings=settings)
    open_piece = in_tiles(rows, opened)
    return joined({part: sized_session(model, open_piece) for part, model in graphs.items()})


def _float_bias(graph: onnx_ir.Graph, shapes: Mapping[str, tuple[int, ...]], layer: str) -> onnx_ir.Value:
    return parameter(graph, layer + FED_BIAS, shapes[f"{layer}.bias"])


def _layer_names(last: onnx_ir.Node) -> list[str]:
    return last.metadata_props[LAYER_KEY].split(LAYER_SEPARATOR)


def _replace_cluster(
    graph: onnx_ir.Graph, last: onnx_ir.Node, names: Sequence[str], plans: Sequence[LayerPlan], has_bias: bool
) -> None:
    """Compute the output of `last` as x @ dequantized^T (+ bias), with the weight fed when the session is made.

    names, plans: of the modules whose channels follow one another in that output, and of what they compute with.
    """
    x = _value(graph, last.metadata_props[INPUT_KEY])
    name = LAYER_SEPARATOR.join(names)
    weight = parameter(graph, name + FED, (sum(plan.out_features for plan in plans), plans[0].in_features))
    transpose = onnx_ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}/DequantizedTranspose")
    nodes = [transpose, onnx_ir.node("MatMul", [x, transpose.outputs[0]], name=f"{name}/DequantizedMatMul")]
    if has_bias:
        nodes.append(onnx_ir.node("Add", [nodes[-1].outputs[0], last.inputs[1]], name=f"{name}/DequantizedBias"))
    substitute(graph, last, nodes, nodes[-1].outputs[0])


def _value(graph: onnx_ir.Graph, name: str) -> onnx_ir.Value:
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.name == name:
            return value
    raise KeyError(name)


def cluster_parity(artifact: ArtifactReader) -> float:
    """Measure part 2: the largest relative difference of an int8-activation cluster to its emulation; 0 where there is none."""
    return max(worst_cluster(artifact, CPU, phase)[0] for phase in target_phases(artifact, CPU))


def worst_cluster(artifact: ArtifactReader, target: Target = CPU, phase: Phase | None = None) -> tuple[float, str]:
    """Part 2: (largest relative difference of an int8-activation cluster to its emulation, what differs by that)."""
    graphs = target_graphs(artifact, target, phase)
    clusters = [(part, cluster) for part, model in graphs.items() for cluster in _shown_clusters(model.graph)]
    if not clusters:
        return 0.0, ""
    open_piece = partial(memory_session, read=artifact.read, folder=artifact.folder, target=target.name)
    session = joined({part: sized_session(model, open_piece) for part, model in graphs.items()})
    inputs = compare.feed(session, probes.padded_batch(artifact.model))
    values = run_parts(session, inputs)
    errors = []
    for part, cluster in clusters:
        seen = values[part]
        expected = emulated_cluster(artifact, cluster, torch.from_numpy(seen[cluster.x]))
        what = f"outputs of {', '.join(cluster.layers)}, with int8 activations,"
        errors.append((compare.largest_difference(seen[cluster.y], expected.numpy()), what))
    return max(errors)


def _shown_clusters(graph: onnx_ir.Graph) -> list[Cluster]:
    """The clusters of a graph, with their inputs and outputs made outputs of the graph."""
    clusters = []
    for last in (node for node in graph if LAYER_KEY in node.metadata_props):
        x = last.metadata_props[INPUT_KEY]
        maker, y = made_by(_value(graph, x)), str(last.outputs[0].name)
        clusters.append(Cluster(_layer_names(last), x, maker, y, with_rest=REST_KEY in last.metadata_props))
    shown = {value.name for value in graph.outputs}
    for name in dict.fromkeys(name for cluster in clusters for name in (cluster.x, cluster.y)):
        value = _value(graph, name)
        if name not in shown and not value.is_graph_input():
            graph.outputs.append(value)
    return clusters
