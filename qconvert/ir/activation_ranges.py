"""The ranges of static activations: what calibration saw of each value, and what was chosen from that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from qconvert.ir.activation_codes import ActivationCodes, GraphCodes
from qconvert.ir.histogram import Histogram, with_histogram


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """One value of a graph that is written as codes, and the range that they stand for.

    part, name: of the graph (see targets.graph_files), and of the value in it.
    layers: the quantized layers that read its codes; none where sums or pools do.
    count: numbers that were seen in calibration; minimum, maximum: of all of them.
    low, high: the range that the estimator chose; what lies beyond is clipped.
    clipped: share of the numbers beyond it, 0 to 1, as far as the bins of a Distribution tell.
    scale, zero_point, bits: of the codes that spread over it.
    histogram: of the numbers; None where too many values were clipped more (qconvert/ir/histogram.py).
    """

    part: str
    name: str
    layers: tuple[str, ...]
    count: int
    minimum: float
    maximum: float
    low: float
    high: float
    clipped: float
    scale: float
    zero_point: int
    bits: int
    histogram: Histogram | None = None


@dataclass(frozen=True, slots=True)
class ActivationRanges:
    """All of them, in the order of the graphs. estimator: the name of the range estimator that chose them."""

    estimator: str
    values: tuple[ActivationRange, ...]

    @property
    def codes(self) -> GraphCodes:
        """The codes that the graphs are exported with."""
        found: dict[str, dict[str, ActivationCodes]] = defaultdict(dict)
        for value in self.values:
            found[value.part][value.name] = ActivationCodes(value.scale, value.zero_point, value.bits)
        return found

    @property
    def bounded(self) -> ActivationRanges:
        """The same with no more histograms than a report holds."""
        kept = with_histogram([value.clipped for value in self.values])
        values = [value if keeps else replace(value, histogram=None) for value, keeps in zip(self.values, kept, strict=True)]
        return replace(self, values=tuple(values))

    def document(self) -> dict[str, Any]:
        """Return the JSON document of it; a value without a histogram has no such key."""
        document = asdict(self)
        values = [{key: part for key, part in value.items() if part is not None} for value in document["values"]]
        return {**document, "values": values}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Undo `document`."""
        return cls(document["estimator"], tuple(map(_value, document["values"])))


def _value(document: Mapping[str, Any]) -> ActivationRange:
    value = ActivationRange(**{**document, "layers": tuple(document["layers"]), "histogram": None})
    if "histogram" not in document:
        return value
    histogram = document["histogram"]
    return replace(value, histogram=Histogram(**{**histogram, "counts": tuple(histogram["counts"])}))
