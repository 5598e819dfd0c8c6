"""Holds quantizers, their observers, tuners and range estimators to their contract, before anything is written.

What a plugin raises, changes or returns wrongly becomes a PluginError that names plugin, version and layer.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from qconvert.errors import PluginError, QConvertError, in_one_line
from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.ir.layer import CalibrationStats, Layer, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host import calls
from qconvert.plugin.host.discovery import FAILURES
from qconvert.plugin.host.distribution import distribution_of
from qconvert.plugin.host.tensor_problems import smoothing_scale_problem, tensor_problems, tuning_problems
from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer
from qconvert.plugin.range_estimator import RangeEstimator
from qconvert.plugin.tuner import BlockTuner, SampledBlock

Part = Quantizer | Observer | BlockTuner | RangeEstimator

RANGE_SLACK = 1e-6  # of the largest magnitude: how far a range may be beyond it, which is rounding in float32


def refuses(quantizer: Quantizer, scheme: QuantScheme) -> str | None:
    """Call `quantizer.refuses(scheme)`, unless it has a codebook, and the quantizer knows none.

    Raises PluginError QC-PLUGIN-007 if it raises, QC-PLUGIN-008 if it gives no text or None.
    """
    if scheme.codebook is not None and not quantizer.codebooks:
        return f"its codes are integers; the quantizer nf4 makes {scheme.format.name}"
    with _guarded(quantizer, "refuse", str(scheme), ()):
        reason = quantizer.refuses(scheme)
    if reason is not None and not isinstance(reason, str):
        raise _broken(quantizer, str(scheme), f"refuses returned {type(reason).__name__}, neither a text nor None")
    return reason


def prepare(quantizer: Quantizer, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
    """Call `quantizer.prepare(group, schemes)`.

    It must give the same layers, and a smoothing_scale [in] that is finite and positive, or None.

    Raises PluginError QC-PLUGIN-007 if it raises, QC-PLUGIN-008 if it breaks the contract.
    """
    where = ", ".join(layer.name for layer in group.layers)
    with _guarded(quantizer, "prepare", where, _inputs(group.layers, group.stats)):
        prepared = quantizer.prepare(group, schemes)
    if not isinstance(prepared, LinearGroup):
        raise _broken(quantizer, where, f"prepare returned {type(prepared).__name__}, not a LinearGroup")
    kept = len(prepared.layers) == len(group.layers) and all(
        new.name == old.name and new.weight is old.weight for new, old in zip(prepared.layers, group.layers, strict=True)
    )
    if not kept:
        raise _broken(quantizer, where, "prepare returned other layers or weights; it may only set smoothing_scale")
    if prepared.smoothing_scale is not None:
        problem = smoothing_scale_problem(prepared.smoothing_scale, group.layers[0].weight.shape[1])
        if problem:
            raise _broken(quantizer, where, problem)
    return prepared


def quantize(quantizer: Quantizer, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
    """Call `quantizer.quantize(layer, scheme)`, and check what it gives.

    Raises PluginError QC-PLUGIN-007 if it raises, QC-PLUGIN-008 if it breaks the contract.
    """
    with _guarded(quantizer, "quantize", layer.name, _inputs((layer,))):
        tensor = quantizer.quantize(layer, scheme)
    # The scheme as it was asked for: an equal one may lack its scale_bits.
    return dataclasses.replace(checked(tensor, layer, scheme, quantizer), scheme=scheme)


def tune(
    tuner: BlockTuner,
    block: str,
    layers: Mapping[str, Layer],
    tensors: Mapping[str, QuantizedTensor],
    samples: SampledBlock,
    fixed: Mapping[str, Tensor],
) -> dict[str, QuantizedTensor]:
    """`tuner.tune(layers, tensors, samples, fixed)` for the layers of `block`, checked.

    Raises PluginError QC-PLUGIN-007 if it raises, QC-PLUGIN-008 if it breaks the contract.
    """
    inputs = [*_inputs(tuple(layers.values())), *fixed.values(), *samples.targets, *samples.importance]
    inputs += [part for tensor in tensors.values() for part in _parts(tensor)]
    with _guarded(tuner, "tune", block, inputs):
        tuned = tuner.tune(layers, tensors, samples, fixed)
    if not isinstance(tuned, Mapping):
        raise _broken(tuner, block, f"tune returned {type(tuned).__name__}, not a mapping from names to tensors")
    if tuned.keys() != tensors.keys():
        raise _broken(tuner, block, f"tune returned tensors for {sorted(map(str, tuned))}, not for {sorted(tensors)}")
    for name, start in tensors.items():
        for problem in tuning_problems(tuned[name], start, layers[name].weight.shape):
            raise _broken(tuner, block, f"{name!a}: {problem}")
    return {name: dataclasses.replace(tuned[name], scheme=start.scheme) for name, start in tensors.items()}


def choose_range(estimator: RangeEstimator, seen: Distribution, codes: int, symmetric: bool, name: str) -> ValueRange:
    """`estimator.choose(seen, codes, symmetric=symmetric)` for the value `name`, checked, and widened to hold 0.

    A value that was 0 throughout has the range from 0 to 0.

    Raises PluginError QC-PLUGIN-007 if it raises, QC-PLUGIN-008 if it breaks the contract.
    """
    with _guarded(estimator, "choose the range of", name, [seen.counts]):
        chosen = estimator.choose(seen, codes, symmetric=symmetric)
    for problem in _range_problems(chosen, seen, symmetric=symmetric):
        raise _broken(estimator, name, problem)
    return ValueRange(min(0.0, float(chosen.low)), max(0.0, float(chosen.high)))


def update(observer: Observer, rows: Tensor, importance: Tensor, where: str) -> None:
    """Call `observer.update(rows, importance)`, rows [n, in] being inputs of the layer `where`.

    Raises PluginError QC-PLUGIN-007 if it raises.
    """
    with _blamed(observer, "observe", where):
        observer.update(rows, importance)


def merge(observer: Observer, other: Observer, where: str) -> None:
    """Call `observer.merge(other)`, of the same kind. Raises PluginError QC-PLUGIN-007 if it raises."""
    with _blamed(observer, "merge", where):
        observer.merge(other)


def finalize(observer: Observer, where: str) -> Tensor:
    """Call `observer.finalize()`, and return the statistic on the CPU. Raises PluginError QC-PLUGIN-007 if it raises,
    QC-PLUGIN-008 if it gives no tensor.
    """
    with _blamed(observer, "finalize", where):
        statistic = observer.finalize()
    if not isinstance(statistic, Tensor):
        raise _broken(observer, where, f"finalize returned {type(statistic).__name__}, not a tensor")
    return statistic.cpu()


def checked(tensor: QuantizedTensor, layer: Layer, scheme: QuantScheme, quantizer: Quantizer) -> QuantizedTensor:
    """Return `tensor`, if it is what QuantizedTensor promises for this layer [out, in] and scheme.

    Raises PluginError QC-PLUGIN-008 with the first thing that is wrong.
    """
    for problem in tensor_problems(tensor, layer.weight.shape, scheme, may_have_outliers=quantizer.has_outliers):
        raise _broken(quantizer, layer.name, problem)
    return tensor


def _range_problems(chosen: ValueRange, seen: Distribution, *, symmetric: bool) -> Iterator[str]:
    """What is wrong with a range, in the order in which one check relies on those before it."""
    if not isinstance(chosen, ValueRange):
        yield f"choose returned {type(chosen).__name__}, not a ValueRange"
    for end, value in (("low", chosen.low), ("high", chosen.high)):
        if not isinstance(value, Real):
            yield f"{end} is {type(value).__name__}, not a number"
        if not math.isfinite(value):
            yield f"{end} is {value}"
    text = f"the range from {chosen.low:g} to {chosen.high:g}"
    if chosen.low > chosen.high:
        yield f"{text} is reversed"
    if symmetric and chosen.low != -chosen.high:
        yield f"{text} is not symmetric, as was asked for"
    low, high = (-seen.largest, seen.largest) if symmetric else (min(seen.minimum, 0.0), max(seen.maximum, 0.0))
    slack = RANGE_SLACK * seen.largest
    if chosen.low < low - slack or chosen.high > high + slack:
        yield f"{text} reaches beyond what was seen, {low:g} to {high:g}"


def _inputs(layers: Sequence[Layer], shared: CalibrationStats | None = None) -> list[Tensor]:
    """Every tensor of some layers, and of the statistics that they share."""
    statistics = {id(stats): stats for stats in (shared, *(layer.stats for layer in layers)) if stats is not None}
    found = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
    return found + [tensor for stats in statistics.values() for tensor in stats.values.values()]


def _parts(tensor: QuantizedTensor) -> list[Tensor]:
    """Every tensor of a quantized one."""
    outliers = () if tensor.outliers is None else (tensor.outliers.columns, tensor.outliers.weight)
    found = (tensor.q, tensor.scale, tensor.zero_point, tensor.smoothing_scale, *outliers)
    return [part for part in found if part is not None]


@contextmanager
def _guarded(part: Part, method: str, where: str, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Turns what the plugin raises into a PluginError, and sees whether it wrote to its inputs."""
    before = [_checksum(tensor) for tensor in inputs]
    with _blamed(part, method, where):
        yield
    if before != [_checksum(tensor) for tensor in inputs]:
        raise _broken(part, where, f"{method} changed its input in place; it must work on copies")


@contextmanager
def _blamed(part: Part, method: str, where: str) -> Iterator[None]:
    """Raises PluginError QC-PLUGIN-007 for what the plugin raises; its own QConvertErrors pass."""
    try:
        with calls.calling(distribution_of(part), f"{method} {where!a}"):
            yield
    except QConvertError:
        raise
    except FAILURES as error:
        raise PluginError(
            "QC-PLUGIN-007",
            f"{_title(part)} failed to {method} {where!a}: {type(error).__name__}: {in_one_line(error)}",
            hint=_hint(part),
        ) from error


def _checksum(tensor: Tensor) -> int:
    """Return the crc32 of all bytes: as fast as memory (4 GB/s measured), and it sees permutations, which a sum does not."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _broken(part: Part, where: str, problem: str) -> PluginError:
    return PluginError(
        "QC-PLUGIN-008",
        f"{_title(part)} broke its contract at {where!a}: {problem}",
        hint=_hint(part),
    )


def _title(part: Part) -> str:
    match part:
        case Quantizer():
            word = "quantizer"
        case BlockTuner():
            word = "tuner"
        case RangeEstimator():
            word = "range estimator"
        case Observer():
            word = "observer"
    return f"{word} '{part.name}' of {distribution_of(part)}"


def _hint(part: Part) -> str:
    match part:
        case BlockTuner():
            way_out = "leave out tuning"
        case RangeEstimator():
            way_out = "take another one: --ranges min-max"
        case _:
            way_out = "keep the layer in float: --rule 'NAME=float'"
    return f"report it to the plugin's author, or {way_out}"
