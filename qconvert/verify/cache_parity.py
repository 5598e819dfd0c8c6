"""A KV cache in codes: what each attention of the graph as it ships makes of its inputs, against torch with the same codes.

The graph is run on rows padded on either side, on a sample of full length, and on what comes after each. In torch, keys are
rotated, keys and values have to lie nearest to their codes, and attention is computed on what these codes stand for, or in
float where a prompt meets an empty cache. The codes are those that the graph has made: of a value on the border of two, either
is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir import Node
from torch import Tensor

from qconvert.execution import probes
from qconvert.graph.cache_codes import LARGEST, SCALES, CachedAttention, cached_attentions, has_cache_codes
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ort import compare
from qconvert.ort.pieces import sized_session
from qconvert.ort.session import Values, memory_session, run_named
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.targets.target import Target
from qconvert.verify.parity import target_graphs, target_phases

# Places among the inputs of the operator: how many tokens a row has, less one; the cosines of its rotation.
LENGTHS, COSINES = 5, 7


def worst_cache(artifact: ArtifactReader, target: Target, sample: Batch) -> tuple[float, str]:
    """Return (how far a code is from being the nearest, or outputs of attentions differ, relative to the largest; what does).

    sample: of evaluation; its first row is run. Of a graph with several bodies, each is run for any number of tokens.
    """
    graphs = (target_graphs(artifact, target, phase).get("model") for phase in target_phases(artifact, target))
    return max(
        (_worst(artifact, target, graph, sample) for graph in graphs if graph is not None and has_cache_codes(graph.graph)),
        default=(0.0, ""),
    )


def _worst(artifact: ArtifactReader, target: Target, graph: onnx_ir.Model, sample: Batch) -> tuple[float, str]:
    attentions = cached_attentions(graph.graph)
    constants = {
        str(value.name): value.const_value.numpy()
        for attention in attentions
        for value in attention.node.inputs
        if value and value.const_value
    }
    shown = {str(value.name) for value in (*graph.graph.inputs, *graph.graph.outputs)} | {*constants}
    for value in [value for each in attentions for value in (*each.node.inputs, each.place.outputs[0]) if value is not None]:
        if str(value.name) not in shown:
            value.type = value.type or onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            graph.graph.outputs.append(value)
            shown.add(str(value.name))
    session = sized_session(graph, partial(memory_session, read=artifact.read, folder=artifact.folder, target=target.name))
    errors = [(0.0, "")]
    for batch, later in _runs(artifact.model, sample):
        inputs = compare.feed(session, batch)
        values = run_named(session, inputs)
        errors += _all_errors(attentions, constants | values)
        found = [values[port.name] for port in session.get_outputs()]
        values = run_named(session, compare.next_inputs(session, inputs, found, later.numpy()))
        errors += _all_errors(attentions, constants | values)
    return max(errors)


def _runs(model: Model, sample: Batch) -> Iterator[tuple[Batch, Tensor]]:
    """Yield (what goes into an empty cache, the tokens [rows, n] of the run after it)."""
    for side in probes.SIDES:
        yield probes.padded_batch(model, side), torch.tensor(probes.NEXT_TOKENS)[:, None] % probes.vocabulary_size(model)
    row = next(model.single_rows([sample]))
    first = -(-row["input_ids"].shape[1] // 2)
    yield {name: value[:, :first] for name, value in row.items()}, row["input_ids"][:, first:]


def _all_errors(attentions: Sequence[CachedAttention], values: Values) -> list[tuple[float, str]]:
    known = {name: torch.from_numpy(_plain(value)) for name, value in values.items()}
    return [error for attention in attentions for error in _errors(attention, known)]


def _plain(value: Any) -> np.ndarray[Any, Any]:
    """A value as numpy has it: what is stored is mapped, and the empty cache is a value of ONNX Runtime."""
    return np.array(value if isinstance(value, np.ndarray) else value.numpy())


def _errors(attention: CachedAttention, known: dict[str, Tensor]) -> Iterator[tuple[float, str]]:
    """The differences of one attention, of what. known: values by their names."""
    node = attention.node
    query, *new = _rotated(attention, known)
    length = query.shape[2]
    before = known[str(node.inputs[LENGTHS].name)] + 1 - length  # type: ignore[union-attr]
    caches = []
    for (past, present), fresh, place in zip(attention.caches, new, SCALES, strict=True):
        scale, made = known[str(node.inputs[place].name)], known[str(present.name)]  # type: ignore[union-attr]
        exact = (fresh.double() / scale.double()).clamp(-LARGEST - 1, LARGEST)
        for row, start in enumerate(before.tolist()):
            kept = torch.equal(made[row, :, :start], known[str(past.name)][row, :, :start])
            beyond = float((made[row, :, start : start + length] - exact[row]).abs().max()) - 0.5
            yield (max(beyond, 0.0) / (2 * LARGEST) if kept else float("inf")), f"codes of {present.name}"
        in_float = attention.begins_in_float and not known[str(past.name)].numel()
        caches.append(fresh.double() if in_float else made.double() * scale.double())
    expected = torch.stack(
        [
            _attended(node, query[row].double(), caches[0][row, :, : start + length], caches[1][row, :, : start + length])
            for row, start in enumerate(before.tolist())
        ]
    )
    found = known[str(attention.place.outputs[0].name)]
    yield compare.largest_difference(found.numpy(), expected.numpy()), f"what attention makes of codes ({node.name})"


def _rotated(attention: CachedAttention, known: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values [batch, heads, sequence, head size] of the run, the first two rotated."""
    node, pairs = attention.node, attention.rotated_pairs
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    given = [known[str(value.name)] for value in node.inputs[:3] if value is not None]
    size = given[0].shape[-1] // (heads if len(given) == 3 else heads + 2 * kv_heads)
    if len(given) == 1:
        given = list(given[0].split([heads * size, kv_heads * size, kv_heads * size], -1))
    query, key, value = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in given)
    if not pairs:
        return query, key, value
    lengths = known[str(node.inputs[LENGTHS].name)]  # type: ignore[union-attr]
    places = (lengths + 1 - query.shape[2])[:, None] + torch.arange(query.shape[2])
    cosine, sine = (known[str(node.inputs[place].name)][places][:, None] for place in (COSINES, COSINES + 1))  # type: ignore[union-attr]

    def rotate(x: Tensor) -> Tensor:
        first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), -1)

    return rotate(query), rotate(key), value


def _attended(node: Node, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[sequence, heads * head size] of one row.

    query: [heads, sequence, head size]; key, value: [kv heads, total, head size].
    """
    group = query.shape[0] // key.shape[0]
    scores = node.attributes["scale"].as_float() * query @ key.repeat_interleave(group, 0).transpose(1, 2)
    if "softcap" in node.attributes:
        cap = node.attributes["softcap"].as_float()
        scores = cap * torch.tanh(scores / cap)
    length, total = scores.shape[1:]
    distance = torch.arange(total - length, total)[:, None] - torch.arange(total)
    hidden = distance < 0
    if "local_window_size" in node.attributes:
        hidden |= distance >= node.attributes["local_window_size"].as_int()
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (shares @ value.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
