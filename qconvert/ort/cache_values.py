"""What a decoder's float graph puts into its caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from qconvert.graph.cache_codes import cached_attentions
from qconvert.graph.float_graph import float_graph
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.ort.compare import feed
from qconvert.ort.pieces import sized_session
from qconvert.ort.session import memory_session


class CacheValues:
    """The float graph of a decoder as far as its last cache.

    pairs: input that is a cache -> how many pairs of its channels were rotated (see graph.cache_codes.CachedAttention); None
        for a cache of values, which nothing rotates.
    """

    def __init__(self, model: Model, template: Template, read: Callable[[str], Tensor]) -> None:
        """read: gives a parameter, in float32 or narrower."""
        graph = float_graph(template.graphs["model"], model.parameter_shapes)
        attentions = cached_attentions(graph.graph)
        caches = [cache for attention in attentions for cache in attention.caches]
        pairs = [pairs for attention in attentions for pairs in (attention.rotated_pairs, None)]
        self.pairs = {str(past.name): how for (past, _), how in zip(caches, pairs, strict=True)}
        graph.graph.outputs[:] = [present for _, present in caches]
        RemoveUnusedNodesPass()(graph)  # the head among them
        self.session = sized_session(graph, partial(memory_session, read=read))

    def run(self, row: Batch) -> Mapping[str, Tensor]:
        """Run the graph on a prompt: input that is a cache -> what the run put into it, [rows, heads, tokens, head size]."""
        found = self.session.run(None, feed(self.session, row))
        return {name: torch.from_numpy(value) for name, value in zip(self.pairs, found, strict=True)}
