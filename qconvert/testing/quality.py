"""Checks of what a quantizer loses, and of the memory that it takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qconvert.ir.number_format import INT4
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerChannel, PerGroup
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.testing.failure import CheckFailure, place
from qconvert.testing.robustness import require_covering_error
from qconvert.testing.samples import Outcome, every_outcome, normal, quantized, schemes_of, typical, with_weight
from qconvert.verify.row_emulation import emulate_row_form

# Sums of float32 in another order: 64 terms at 6e-8 each.
ROUNDING = 1 + 64 * 2**-24
# What `qconvert plan` counts for a layer beside its weight (plan/__init__.py): six float32 copies.
WORKING_COPIES = 6
# Which p of sum |error|^p a quantizer without data minimises it does not declare: squares, magnitudes, or HQQ's.
NORMS = (2.0, 1.0, 0.7)


def check_error_within_bound(quantizer: Quantizer) -> None:
    """On normal weights the error is at most that of half a step of a range that covers them, root mean square."""
    for outcome in every_outcome(quantizer, typical()):
        require_covering_error(outcome)


def check_no_worse_than_nearest(quantizer: Quantizer) -> None:
    """Round-to-nearest is not better at what the quantizer is for.

    With observers that is the output on the rows that they saw, as kernels compute it; without, some norm of the weights'
    errors.
    """
    for scheme in schemes_of(quantizer):
        outcomes = quantized(quantizer, typical(), scheme)
        nearest = [replace(outcome, tensor=round_to_nearest(outcome.weight, scheme)) for outcome in outcomes]
        measures = (_output_error,) if quantizer.observers else tuple(map(_weight_error, NORMS))
        pairs = [(sum(map(measure, outcomes)), sum(map(measure, nearest))) for measure in measures]
        if not any(found <= limit * ROUNDING for found, limit in pairs):
            found, limit = pairs[0]
            what = "output" if quantizer.observers else "weights"
            raise CheckFailure(
                f"{outcomes[0].place}: squared error of the {what} {found:.6g}, round-to-nearest has {limit:.6g}"
            )


def check_more_bits_lose_less(quantizer: Quantizer) -> None:
    """8 bits lose less than 4 of the same granularity."""
    for coarse in schemes_of(quantizer):
        fine = replace(coarse, bits=8)
        if coarse.format is INT4 and quantizer.refuses(fine) is None:
            _require_less(quantized(quantizer, typical(), fine), quantized(quantizer, typical(), coarse))


def check_groups_lose_less(quantizer: Quantizer) -> None:
    """A scale per group of inputs loses less than one per channel."""
    for fine in schemes_of(quantizer):
        coarse = replace(fine, granularity=PerChannel())
        if isinstance(fine.granularity, PerGroup) and quantizer.refuses(coarse) is None:
            _require_less(quantized(quantizer, typical(), fine), quantized(quantizer, typical(), coarse))


def check_memory_within_bound(quantizer: Quantizer) -> None:
    """`quantize` holds at most six float32 copies of the weight at once: qconvert plan promises a peak.

    Tensors that torch's operations return are counted, the temporaries within one operation are not.
    """
    weight = normal(4096, 256, seed=40)  # eight blocks of affine.row_blocks: what is held per block hardly counts
    (layer,) = with_weight("large", weight).group(quantizer).layers
    with _Allocations() as allocations:
        quantizer.quantize(layer, quantizer.default_scheme)
    limit = WORKING_COPIES * weight.nbytes
    if allocations.peak > limit:
        where = place(layer, quantizer.default_scheme)
        raise CheckFailure(f"{where}: {allocations.peak:,} bytes at once, at most {limit:,} are allowed")


def _require_less(fine: tuple[Outcome, ...], coarse: tuple[Outcome, ...]) -> None:
    less, more = sum(map(_output_error, fine)), sum(map(_output_error, coarse))
    if less >= more:
        raise CheckFailure(f"{fine[0].place}: squared error of the output {less:.6g}; {coarse[0].tensor.scheme} has {more:.6g}")


def _output_error(outcome: Outcome) -> float:
    """Squared error of the output on the sample's rows."""
    rows, tensor = typical().rows, outcome.tensor
    found = emulate_row_form(rows, tensor, None) if tensor.scheme.activations else rows.double() @ _dequantized(tensor).T
    return float((found - rows.double() @ outcome.weight.double().T).square().sum())


def _weight_error(norm: float) -> Callable[[Outcome], float]:
    return lambda outcome: float((_dequantized(outcome.tensor) - outcome.weight).abs().pow(norm).sum())


def _dequantized(tensor: QuantizedTensor) -> Tensor:
    return tensor.dequantize().double()


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return while they are referenced.

    peak: the largest number of bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._references: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() in self._references or storage.data_ptr() not in given:
                    self._take(storage.data_ptr(), storage.nbytes(), tensor)
        return result

    def _take(self, address: int, size: int, tensor: Tensor) -> None:
        if address not in self._references:
            self._references[address] = 0
            self._now += size
            self.peak = max(self.peak, self._now)
        self._references[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._references[address] -= 1
        if not self._references[address]:
            del self._references[address]
            self._now -= size
