"""The failure of a check, and the place that it names."""

from __future__ import annotations

from qconvert.ir.layer import Layer
from qconvert.ir.scheme import QuantScheme


class CheckFailure(AssertionError):
    """A quantizer does not conform. The message says what was found and where; `Check` adds the rule that it breaks."""


def place(layer: Layer, scheme: QuantScheme) -> str:
    """Name a layer, its shape and its scheme for a message: "layer 'typical.0' [48, 64], scheme int4-g32"."""
    return f"layer {layer.name!r} {list(layer.weight.shape)}, scheme {scheme}"
