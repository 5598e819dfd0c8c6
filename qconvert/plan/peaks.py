"""The most memory that each stage of a run holds at once, from shapes alone.

It is anonymous memory: pages of mapped files (the checkpoint, the artifact's weights, statistics and hidden states that lie in
files) are given back when others want them. What is added up are the few things that are large, each said where it is counted;
tests/bench/sizes.py measures what a run takes, and the estimates are held to that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from qconvert.execution.materialize import LARGE_BLOCK
from qconvert.execution.probes import position_limit
from qconvert.execution.wide_rows import TILE_BYTES, is_large
from qconvert.graph.float_graph import LARGE_BYTES
from qconvert.graph.pieces import PIECE_BYTES, WHOLE_BYTES
from qconvert.ir.batch import BATCH_ROWS, BATCH_TOKENS, windows_at_once
from qconvert.ir.large_tensors import LARGE
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.template import InputGroup
from qconvert.plugin.observer import Gram
from qconvert.plugin.quantizer import Quantizer
from qconvert.recipe import Recipe
from qconvert.recipe.fields import DataSpec

FLOAT = 4
# A process with its libraries and a model's headers; and what traces, graphs, and an allocator that keeps some of it add.
PROCESS_BYTES, GRAPHS_BYTES = 380_000_000, 150_000_000
# Of a batch: what a feed-forward layer holds at once of gate, up, their product and what observers are shown.
ACTIVATIONS = 4
# Of a block that is tuned: its weights in float32, their gradients, and what is learned.
TUNED = 3
# How often a session of ONNX Runtime holds float weights while it is opened: as they were widened, as it reads them and packed
# for its kernels. Those that are stored in float32 stay where they are mapped, and fewer copies are made.
SESSION, MAPPED_SESSION = 3, 1.5
# How often a session holds the codes of an artifact: as its kernels order them, and in part as they are stored.
LOADED = 1.7
# Logits of one sample that a comparison holds: of both models, as the session and as the caller has them, and in float64; and
# of each further sample at the same time.
LOGITS, MORE_LOGITS = 8, 5


@dataclass(frozen=True, slots=True)
class _Weights:
    """Sizes in float32.

    block: of the largest block. traced: of one block of each stack, whose large matrices are read some rows at a time.
        outside: of what lies outside the blocks, where torch runs it (execution/wide_rows.py). multiplied: of that which graphs
        multiply with: embeddings are looked up as they are stored.
    largest: of one tensor that graphs multiply with. total: of all of them.
    """

    block: int
    traced: int
    outside: int
    multiplied: int
    largest: int
    total: int


def trace_peak(model: Model) -> int:
    """Return the peak of the trace: the traced blocks run in torch, then in ONNX Runtime, whole or a piece at a time."""
    weights = _weights(model, widened=True)
    graph = weights.traced + weights.multiplied
    piece = graph if graph <= WHOLE_BYTES else PIECE_BYTES
    return PROCESS_BYTES + GRAPHS_BYTES + max(weights.traced + weights.outside, piece)


def peaks(
    model: Model, groups: Sequence[InputGroup], layers: Mapping[str, LayerPlan], recipe: Recipe, quantizer: Quantizer
) -> dict[str, int]:
    """Return the peak of each stage of a run by the stage's name."""
    found = {"trace": trace_peak(model), "quantize": _quantize_peak(model, groups, layers, recipe, quantizer)}
    if recipe.loss_budget is not None:
        found["allocate"] = _allocate_peak(model, layers, quantizer)
    return found | ({"verify": _verify_peak(model, layers, recipe)} if recipe.verify else {})


def _quantize_peak(
    model: Model, groups: Sequence[InputGroup], layers: Mapping[str, LayerPlan], recipe: Recipe, quantizer: Quantizer
) -> int:
    """The samples on their way through the blocks, and with them what a block is run with, or quantized with."""
    weights = _weights(model)
    sizes = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
    largest = max((_in_float(model, layer, quantizer) for layer in layers.values()), default=weights.largest)
    codes: dict[str, int] = defaultdict(int)  # of a block, a byte each
    for name, size in sizes.items():
        codes[model.block_of(name)] += size
    statistics, copied = _statistics(model, groups, layers) if Gram in quantizer.observers else (0, 0)
    together = [FLOAT * sum(sizes.get(name, 0) for name in group.layers) for group in groups]
    prepares = type(quantizer).prepare is not Quantizer.prepare
    in_float = max([largest, *together]) if prepares else largest
    # Beside its own float32, a layer is compared with what its codes stand for.
    quantizing = statistics + copied + max(codes.values(), default=0) + in_float + largest
    if not (quantizer.observers or recipe.tuning):
        return PROCESS_BYTES + GRAPHS_BYTES + quantizing
    hidden, activations = _samples(model, layers, recipe.calibration)
    running = weights.outside + _held_of_block(model, layers, weights) + statistics + activations
    tuning = TUNED * weights.block if recipe.tuning else 0
    return PROCESS_BYTES + GRAPHS_BYTES + _in_memory(hidden) + max(running, quantizing + tuning)


def _allocate_peak(model: Model, layers: Mapping[str, LayerPlan], quantizer: Quantizer) -> int:
    """The codes of all layers on trial, where scales are folded also their weights in float, and a session of the float graph,
    whole or a piece, none of whose weights is mapped.
    """
    codes = sum(layer.out_features * layer.in_features for layer in layers.values())
    folded = FLOAT * codes if type(quantizer).prepare is not Quantizer.prepare else 0
    whole = FLOAT * sum(map(prod, model.parameter_shapes.values()))
    return PROCESS_BYTES + GRAPHS_BYTES + codes + folded + SESSION * (whole if whole <= WHOLE_BYTES else PIECE_BYTES)


def _in_float(model: Model, layer: LayerPlan, quantizer: Quantizer) -> int:
    """The weights of a layer that are in float32 at once while it is quantized: of a large embedding or head some rows."""
    shape = (layer.out_features, layer.in_features)
    if layer.kind == "embedding":
        by_rows = quantizer.by_rows or bool(quantizer.observers)
    else:
        by_rows = quantizer.by_rows and type(quantizer).prepare is Quantizer.prepare
    outside = is_large(shape) and not model.block_of(layer.name)
    in_tiles = outside and by_rows and not layer.scheme.joins_rows
    return TILE_BYTES if in_tiles else FLOAT * prod(shape)


def _held_of_block(model: Model, layers: Mapping[str, LayerPlan], weights: _Weights) -> int:
    """The weights of a block that runs: of a large one a layer at a time, as it is read and as it is scaled."""
    inside: dict[str, list[int]] = defaultdict(list)
    for name, layer in layers.items():
        if unit := model.block_of(name):
            inside[unit].append(FLOAT * layer.out_features * layer.in_features)
    if weights.block <= LARGE_BLOCK or not inside:
        return weights.block
    return weights.block - max(map(sum, inside.values())) + 2 * max(map(max, inside.values()))


def _statistics(model: Model, groups: Sequence[InputGroup], layers: Mapping[str, LayerPlan]) -> tuple[int, int]:
    """The Gram matrices of one block, and the largest of them, which is copied when it is divided or inverted; those that are
    large lie in files.
    """
    units: dict[str, int] = defaultdict(int)
    largest = 0
    for group in groups:
        for name in [name for name in group.layers if name in layers and not layers[name].form.is_embedding][:1]:
            size = _in_memory(FLOAT * layers[name].in_features ** 2)
            units[model.block_of(name)] += size
            largest = max(largest, size)
    return max(units.values(), default=0), largest


def _samples(model: Model, layers: Mapping[str, LayerPlan], data: DataSpec) -> tuple[int, int]:
    """(hidden states of all samples, what a feed-forward layer makes of a batch of them)."""
    length = min(data.length, position_limit(model) or data.length) if model.task.takes_text else 1
    batch = length * min(data.samples, BATCH_ROWS, max(1, BATCH_TOKENS // length))
    narrow = min((layer.in_features for layer in layers.values()), default=0)
    inside = [layer for name, layer in layers.items() if model.block_of(name)]
    wide = max((max(layer.in_features, layer.out_features) for layer in inside), default=0)
    return FLOAT * data.samples * length * narrow, ACTIVATIONS * FLOAT * batch * wide


def _verify_peak(model: Model, layers: Mapping[str, LayerPlan], recipe: Recipe) -> int:
    """A process beside the one that waits for it. What takes most there is one of three: fidelity, with the artifact, whose
    kernels pack their weights anew, the float model, whole or a piece of it, and the logits of a sample; the time of the piece
    with the largest weight, which is not divided then; or embedding and head, as transformers loads them.
    """
    weights = _weights(model)
    copies = SESSION if _weights(model, widened=True).total else MAPPED_SESSION
    # A graph has a weight under each of its names, and looks up embeddings, too.
    whole = FLOAT * sum(map(prod, model.parameter_shapes.values())) <= WHOLE_BYTES
    packed = sum(layer.nbytes for layer in layers.values())
    coded = [layer for layer in layers.values() if layer.form is LayerForm.CODEBOOK_WEIGHTS]
    # MatMulBnb4 holds the weight of the layer that runs in float32.
    unpacked = max((FLOAT * layer.out_features * layer.in_features for layer in coded), default=0)
    artifact = int(LOADED * packed) + _copied(_head_bytes(model, layers), copies) + unpacked
    hidden, _ = _samples(model, layers, recipe.evaluation)
    logits = _compared_logits(model, recipe.evaluation) if model.task.generates else 0
    fidelity = artifact + hidden + int(copies * (weights.total if whole else PIECE_BYTES)) + logits
    apart = 0 if whole else max(_copied(weights.largest, copies), _loaded_outside(model, layers, recipe))
    return 2 * (PROCESS_BYTES + GRAPHS_BYTES) + max(fidelity, apart)


def _compared_logits(model: Model, data: DataSpec) -> int:
    """The logits of the windows that are compared at once. Measured with SmolLM2: four more windows took 0.87 GB."""
    vocabulary = _vocabulary(model)
    at_once = min(data.samples, windows_at_once(data.length, vocabulary)) if vocabulary else 0
    return (LOGITS + (at_once - 1) * MORE_LOGITS) * FLOAT * data.length * vocabulary


def _loaded_outside(model: Model, layers: Mapping[str, LayerPlan], recipe: Recipe) -> int:
    """What transformers holds of embedding and head, in the type of the model, and the codes of the larger, a byte each."""
    if recipe.layout != "transformers" or model.config is None:
        return 0
    infos = {model.stored_name(name): model.source.tensors[model.stored_name(name)] for name in model.parameter_shapes}
    outside = sum(info.nbytes for name, info in infos.items() if not model.block_of(name))
    codes = (layer.out_features * layer.in_features for name, layer in layers.items() if not model.block_of(name))
    # bitsandbytes holds all codes, where compressed-tensors is shown a group of blocks at a time.
    coded = sum(layer.nbytes for layer in layers.values() if layer.form is LayerForm.CODEBOOK_WEIGHTS)
    return outside + max(codes, default=0) + coded


def _copied(weight: int, copies: float) -> int:
    """Return what a session holds of one weight; it copies none that is multiplied from the left (graph/float_graph.py)."""
    return weight if weight > LARGE_BYTES else int(copies * weight)


def _vocabulary(model: Model) -> int:
    head = model.output_head
    return 0 if head is None else model.parameter_shapes[f"{head}.weight"][0]


def _head_bytes(model: Model, layers: Mapping[str, LayerPlan]) -> int:
    """The output head in float32, where the artifact has it in float."""
    head = model.output_head
    quantized = head is None or any(
        model.stored_name(f"{head}.weight") == model.stored_name(f"{name}.weight") for name in layers
    )
    return 0 if head is None or quantized else FLOAT * prod(model.parameter_shapes[f"{head}.weight"])


def _weights(model: Model, *, widened: bool = False) -> _Weights:
    """widened: whether only those count that are stored in another type; a model in float32 is mapped."""
    units: dict[str, int] = defaultdict(int)
    whole: dict[str, int] = defaultdict(int)  # of a unit, what is no large matrix
    outside, largest = 0, 0
    uses = Counter(map(model.stored_name, model.parameter_shapes))
    for name, shape in model.parameter_shapes.items():
        unit, size = model.block_of(name), FLOAT * prod(shape)
        if name in model.tied or (widened and model.source.tensors[name].dtype == torch.float32):
            continue
        outside += 0 if unit else TILE_BYTES if is_large(shape) else size
        whole[unit] += 0 if is_large(shape) else size
        looked_up = uses[name] == 1 and isinstance(model.module.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        if not looked_up:
            units[unit] += size
            largest = max(largest, size)
    largest_block = max((units[block] for block in model.blocks), default=0)
    traced = sum(max(min(units[block], whole[block] + TILE_BYTES) for block in stack) for stack in model.stacks)
    return _Weights(largest_block, traced, outside, units[""], largest, sum(units.values()))


def _in_memory(nbytes: int) -> int:
    """Return what is in memory of tensors that lie in files where they are large."""
    return 0 if nbytes > LARGE else nbytes
