"""Target: what is known of an execution provider of ONNX Runtime without asking it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qconvert.vocabulary import TargetName

if TYPE_CHECKING:
    from qconvert.ir.plan import LayerPlan


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One execution provider that graphs are made for. How a layer is lowered for it is said in qconvert/export.

    name: what users type. provider: ONNX Runtime's name. device: where it keeps values, as ONNX Runtime names it.
    package: the distribution of ONNX Runtime that has it, from the oldest version that runs the graphs.
    variant: what tells its graphs' names from those of others: "model.VARIANT.onnx"; "" for "model.onnx".
    half_precision: whether activations and caches are float16 or bfloat16, as the recipe says; else they are float32.
    takes_zero_points: whether its kernels for packed weights do.
    block_size: of a packed layer, the block in which its kernel takes scales.
    describe: what a layer becomes there, in a few words; None where that goes without saying.
    provider_options: of onnxruntime-genai.
    takes_static: whether there is a graph for static activations. takes_codebooks: for codes that are places in a codebook.
    takes_cache_codes: for a KV cache in int8.
    """

    name: TargetName
    provider: str
    device: str
    package: str
    variant: str
    half_precision: bool
    takes_zero_points: bool
    block_size: Callable[[LayerPlan], int]
    describe: Callable[[LayerPlan], str] | None
    provider_options: tuple[dict[str, Any], ...]
    takes_static: bool = False
    takes_codebooks: bool = False
    takes_cache_codes: bool = False

    def graph_file(self, part: str) -> str:
        """Return the file of the graph of a part of a model (see Task.parts)."""
        return f"{part}.{self.variant}.onnx" if self.variant else f"{part}.onnx"

    def blocks(self, layer: LayerPlan) -> int:
        """Return in how many blocks the kernel takes the scales of one output channel, the last of them perhaps padded."""
        return -(-layer.in_features // self.block_size(layer))

    def is_padded(self, layer: LayerPlan) -> bool:
        """Return whether the shared bytes do not fit the kernel's blocks, so that it needs a padded copy."""
        return layer.in_features % self.block_size(layer) != 0
