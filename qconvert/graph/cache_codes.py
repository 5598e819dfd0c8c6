"""A KV cache in int8 codes: GroupQueryAttention writes keys and values as round(x / scale) and reads them back as code * scale.

Scales are one per head and channel, [1, heads, 1, head size], because tokens share them: the operator has no others. Codes
replace the float cache wherever it is read, by the prompt that fills it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir
from onnx_ir import DataType, Node, Value

from qconvert.ir.graph_names import is_cache

ATTENTION = "GroupQueryAttention"
# Places among its inputs: the caches of keys and values, the sines of its rotation, the scales of both caches.
PAST, SINES, SCALES = (3, 4), 8, (12, 13)
# Largest code: they lie around 0 alike.
LARGEST = 127


def cached_attentions(graph: onnx_ir.Graph) -> list[Node]:
    """Return the attentions that read a cache, in the order of the graph."""
    return [node for node in graph if node.op_type == ATTENTION and all(_past(node))]


def is_all_cached(graph: onnx_ir.Graph) -> bool:
    """Return whether the graph has caches, and all of them are read by attentions that may hold them in codes."""
    held = {value for node in cached_attentions(graph) for value in _past(node)}
    caches = {value for value in graph.inputs if is_cache(str(value.name))}
    return bool(caches) and caches == held


def has_cache_codes(graph: onnx_ir.Graph) -> bool:
    """Return whether the caches of a graph are in codes."""
    return any("k_quant_type" in node.attributes for node in cached_attentions(graph))


def write_cache_codes(graph: onnx_ir.Graph, scale_of: Callable[[str], Value]) -> None:
    """Let the caches of a graph be codes, in place. scale_of: gives the scales of a cache by the name of its input."""
    for node in cached_attentions(graph):
        node.resize_inputs(SCALES[-1] + 1)
        for place, value in zip(SCALES, _past(node), strict=True):
            node.replace_input_with(place, scale_of(str(value.name)))
        for name, how in (("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL")):
            node.attributes[name] = onnx_ir.AttrString(name, how)
        node.attributes["kv_cache_bit_width"] = onnx_ir.AttrInt64("kv_cache_bit_width", 8)
        _type_caches(node, DataType.INT8)


def drop_cache_codes(graph: onnx_ir.Graph) -> None:
    """Let caches in codes be float again, in place."""
    for node in cached_attentions(graph):
        if "k_quant_type" in node.attributes:
            for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
                del node.attributes[name]
            node.resize_inputs(SCALES[0])
            _type_caches(node, DataType.FLOAT)


def rotated_pairs(node: Node) -> int:
    """Return how many pairs of a key's channels an attention rotates: channel i goes with i + that number. 0 where it leaves
    that to the graph before it, which may pair them otherwise."""
    sines = node.inputs[SINES] if len(node.inputs) > SINES and "do_rotary" in node.attributes else None
    if sines is None or sines.shape is None:
        return 0
    pairs = sines.shape[1]
    assert isinstance(pairs, int)
    return pairs


def caches_of(node: Node) -> Iterator[tuple[Value, Value]]:
    """Yield the cache that goes into an attention and the one that comes out of it: that of keys, then that of values."""
    yield from zip(_past(node), node.outputs[1:3], strict=True)


def _past(node: Node) -> list[Value]:
    return [value for value in (node.inputs[place] for place in PAST if len(node.inputs) > place) if value is not None]


def _type_caches(node: Node, dtype: DataType) -> None:
    for past, present in caches_of(node):
        past.type = present.type = onnx_ir.TensorType(dtype)
