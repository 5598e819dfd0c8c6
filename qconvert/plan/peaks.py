"""The most memory that each stage of a run holds at once, from shapes alone.

It is anonymous memory: pages of mapped files (the checkpoint, the artifact's weights, statistics and hidden states that lie in
files) are given back when others want them. What is added up are the few things that are large, each said where it is counted;
tests/bench/sizes.py measures what a run takes, and the estimates are held to that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from qconvert.execution.materialize import LARGE_BLOCK
from qconvert.execution.probes import position_limit
from qconvert.ir.large_tensors import LARGE
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ort.pieces import PIECE_BYTES, WHOLE_BYTES
from qconvert.plugin.observer import Gram
from qconvert.plugin.quantizer import Quantizer
from qconvert.recipe import Recipe
from qconvert.recipe.fields import DataSpec

FLOAT = 4
# A process with its libraries; and what traces, graphs, and memory that an allocator does not give back add to it.
PROCESS_BYTES, GRAPHS_BYTES = 350_000_000, 200_000_000
# Matrices outside the blocks that take more in float32 are widened by so many bytes at a time.
WIDE_BYTES, TILE_BYTES = 200_000_000, 64_000_000
# Copies of a layer's weights in float32 while it is quantized: its own, the candidate's, and what the two are compared in.
COPIES = 6
# Copies of the logits of one sample that a comparison holds: of both models, each as its session and as the caller has it.
LOGITS = 4


@dataclass(frozen=True, slots=True)
class _Weights:
    """Sizes in float32.

    block: of the largest block. traced: of one block of each stack. outside: of what is held outside the blocks.
    largest: of one tensor. total: of all.
    """

    block: int
    traced: int
    outside: int
    largest: int
    total: int


def trace_peak(model: Model) -> int:
    """Return the peak of the trace: the traced blocks run in torch, then in ONNX Runtime, whole or a piece at a time."""
    weights = _weights(model)
    checked = weights.traced + weights.outside
    piece = checked if checked <= WHOLE_BYTES else max(PIECE_BYTES, weights.largest)
    return PROCESS_BYTES + GRAPHS_BYTES + max(checked, piece)


def peaks(model: Model, layers: Mapping[str, LayerPlan], recipe: Recipe, quantizer: Quantizer) -> dict[str, int]:
    """Return the peak of each stage of a run by the stage's name."""
    found = {"trace": trace_peak(model), "quantize": _quantize_peak(model, layers, recipe, quantizer)}
    return found | ({"verify": _verify_peak(model, layers, recipe)} if recipe.verify else {})


def _quantize_peak(model: Model, layers: Mapping[str, LayerPlan], recipe: Recipe, quantizer: Quantizer) -> int:
    """The samples on their way through the blocks, and with them what a block is run with, or quantized with."""
    weights = _weights(model)
    runs = bool(quantizer.observers) or recipe.tuning is not None
    sizes = [layer.out_features * layer.in_features for layer in layers.values()]
    codes: dict[str, int] = defaultdict(int)
    for name, layer in layers.items():
        codes[model.block_of(name)] += layer.out_features * layer.in_features
    statistics = _statistics(model, layers) if Gram in quantizer.observers else 0
    quantizing = statistics + max(codes.values()) + COPIES * FLOAT * max(sizes)
    hidden, activations = _samples(model, layers, recipe.calibration) if runs else (0, 0)
    running = weights.outside + _held_of_block(model, layers, weights) + statistics + activations if runs else 0
    tuning = weights.block * 3 if recipe.tuning is not None else 0  # the weights, their gradients, what is learned
    return PROCESS_BYTES + GRAPHS_BYTES + _in_memory(hidden) + max(running, quantizing + tuning)


def _held_of_block(model: Model, layers: Mapping[str, LayerPlan], weights: _Weights) -> int:
    """The weights of a block that runs: of a large one a layer at a time, as it is read and as it is scaled."""
    inside: dict[str, list[int]] = defaultdict(list)
    for name, layer in layers.items():
        if unit := model.block_of(name):
            inside[unit].append(FLOAT * layer.out_features * layer.in_features)
    if weights.block <= LARGE_BLOCK or not inside:
        return weights.block
    return weights.block - max(map(sum, inside.values())) + 2 * max(map(max, inside.values()))


def _statistics(model: Model, layers: Mapping[str, LayerPlan]) -> int:
    """The Gram matrices of one block: of each width one at least, those that are large in files."""
    widths: dict[str, set[int]] = defaultdict(set)
    for name, layer in layers.items():
        if not layer.form.is_embedding:
            widths[model.block_of(name)].add(layer.in_features)
    return max((sum(_in_memory(FLOAT * width**2) for width in unit) for unit in widths.values()), default=0)


def _samples(model: Model, layers: Mapping[str, LayerPlan], data: DataSpec) -> tuple[int, int]:
    """(hidden states of all samples, activations of the widest layer of a batch)."""
    length = min(data.length, position_limit(model) or data.length) if model.task.takes_text else 1
    narrow = min((layer.in_features for layer in layers.values()), default=0)
    inside = [layer for name, layer in layers.items() if model.block_of(name)]
    wide = max((max(layer.in_features, layer.out_features) for layer in inside), default=0)
    return FLOAT * data.samples * length * narrow, 4 * FLOAT * length * wide


def _verify_peak(model: Model, layers: Mapping[str, LayerPlan], recipe: Recipe) -> int:
    """A process beside the one that waits for it. Parity holds the weights of a piece as torch and as ONNX Runtime have them;
    fidelity a piece of the float model and the artifact, whose kernels pack their weights anew, with the logits of a sample.
    """
    weights = _weights(model)
    piece = weights.total if weights.total <= WHOLE_BYTES else max(PIECE_BYTES, weights.largest)
    parity = max(weights.outside + weights.block, 2 * piece)
    packed = sum(layer.nbytes for layer in layers.values())
    hidden, _ = _samples(model, layers, recipe.evaluation)
    logits = LOGITS * FLOAT * recipe.evaluation.length * _vocabulary(model) if model.task.generates else 0
    fidelity = packed + hidden + max(piece, logits)
    return 2 * (PROCESS_BYTES + GRAPHS_BYTES) + max(parity, fidelity)


def _vocabulary(model: Model) -> int:
    head = model.output_head
    return 0 if head is None else model.parameter_shapes[f"{head}.weight"][0]


def _weights(model: Model) -> _Weights:
    units: dict[str, int] = defaultdict(int)
    outside, largest = 0, 0
    tensors = {model.stored_name(name): (model.block_of(name), shape) for name, shape in model.parameter_shapes.items()}
    for unit, shape in tensors.values():
        size = FLOAT * prod(shape)
        units[unit] += size
        largest = max(largest, size)
        if not unit:
            outside += size if size <= WIDE_BYTES else TILE_BYTES
    blocks = [max((units[block] for block in stack), default=0) for stack in model.stacks]
    return _Weights(max(blocks, default=0), sum(blocks), outside, largest, sum(units.values()))


def _in_memory(nbytes: int) -> int:
    """Return what is in memory of tensors that lie in files where they are large."""
    return 0 if nbytes > LARGE else nbytes
