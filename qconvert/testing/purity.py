"""Checks that a result follows from the layer and the options alone, and that nothing else changes on the way."""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qconvert.ir.layer import LinearGroup
from qconvert.plugin.host.process_settings import settings_kept
from qconvert.plugin.quantizer import Quantizer
from qconvert.testing.failure import CheckFailure, place
from qconvert.testing.samples import (
    Outcome,
    Sample,
    difference,
    every_outcome,
    normal,
    quantized,
    returned,
    schemes_of,
    typical,
    with_weight,
)

# Threads only share what is large: torch splits elementwise work from 32,768 numbers on.
LARGE = (264, 128)
THREADS = (1, 2)


def check_deterministic(quantizer: Quantizer) -> None:
    """The same layer gives the same bytes, in one instance and in a copy of it: artifacts can be made again."""
    _require_same(quantizer, typical(), quantizer, typical(), "the second time")
    _require_same(quantizer, typical(), copy.deepcopy(quantizer), typical(), "in a copy of the quantizer")


def check_independent_of_random_state(quantizer: Quantizer) -> None:
    """The state of the global random number generators decides nothing."""
    with _random_states_kept():
        results = []
        for seed in (0, 1):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(list(every_outcome(quantizer, typical())))
    first, second = results
    _compare(first, second, "with other seeds")


def check_leaves_random_state(quantizer: Quantizer) -> None:
    """The global random number generators are as they were: other code draws from them."""
    before = _random_states()
    for outcome in every_outcome(quantizer, typical()):
        for name, state in _random_states().items():
            if state != before[name]:
                raise CheckFailure(f"{outcome.place}: the state of {name} has changed")


def check_independent_of_threads(quantizer: Quantizer) -> None:
    """The number of threads decides nothing in the default scheme: one artifact from a laptop and from a server."""
    sample, scheme = with_weight("large", normal(*LARGE, seed=7)), quantizer.default_scheme
    before = torch.get_num_threads()
    results = []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(list(quantized(quantizer, sample, scheme)))
    finally:
        torch.set_num_threads(before)
    for threads, found in zip(THREADS[1:], results[1:], strict=True):
        _compare(results[0], found, f"with {threads} threads instead of {THREADS[0]}")


def check_independent_of_layer_order(quantizer: Quantizer) -> None:
    """Layers that were quantized before leave no trace: a resumed run begins in the middle."""
    for scheme in schemes_of(quantizer):
        samples = [with_weight(f"order-{seed}", normal(16, 64, seed=seed)) for seed in (10, 11, 12)]
        forward = [quantized(quantizer, sample, scheme)[0] for sample in samples]
        backward = [quantized(quantizer, sample, scheme)[0] for sample in reversed(samples)]
        _compare(forward, backward[::-1], "in another order of layers")


def check_rows_apart(quantizer: Quantizer) -> None:
    """With by_rows, a few rows get what they get in the whole layer: large embeddings and heads come in parts."""
    rows = slice(8, 16)
    for layer, scheme, tensor in returned(quantizer, typical()) if quantizer.by_rows else ():
        if not scheme.joins_rows:
            part = quantizer.quantize(replace(layer, weight=layer.weight[rows].clone(), bias=None), scheme)
            if found := difference(part, tensor.rows(rows)):
                raise CheckFailure(f"{place(layer, scheme)}: of rows {rows.start} to {rows.stop} alone, {found}")


def check_leaves_weight(quantizer: Quantizer) -> None:
    """Weights and biases are as they were: qconvert compares the result with them."""
    _require_unchanged(quantizer, lambda group: {"weight": group.layers[0].weight, "bias": group.layers[0].bias})


def check_leaves_statistics(quantizer: Quantizer) -> None:
    """Statistics are as they were: layers that share an input share them."""
    _require_unchanged(quantizer, lambda group: {} if group.stats is None else group.stats.values)


def check_shares_no_memory(quantizer: Quantizer) -> None:
    """The result shares no memory with the weight: that memory is used again."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        kept = {"q": tensor.q, "scale": tensor.scale, "zero_point": tensor.zero_point}
        if tensor.outliers is not None:
            kept["outliers.weight"] = tensor.outliers.weight
        for name, part in kept.items():
            if part is not None and part.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr():
                raise CheckFailure(
                    f"layer {layer.name!r}, scheme {scheme}: {name} lies in the {layer.weight.nbytes} bytes of weight"
                )


def check_prints_nothing(quantizer: Quantizer) -> None:
    """Nothing goes to sys.stdout: it belongs to --json."""
    for scheme in schemes_of(quantizer):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            outcomes = quantized(quantizer, typical(), scheme)
        if text := printed.getvalue():
            raise CheckFailure(f"{outcomes[0].place}: it printed {len(text)} characters, {text[:40]!r}")


def check_leaves_process_settings(quantizer: Quantizer) -> None:
    """What belongs to the whole process is as it was: umask, signal handlers, torch's threads, its default dtype and so on."""
    for scheme in schemes_of(quantizer):
        group = typical().group(quantizer)
        with settings_kept() as changed:
            quantizer.prepare(group, (scheme,) * len(group.layers))
            quantizer.quantize(group.layers[0], scheme)
        if changed:
            raise CheckFailure(f"layer {group.layers[0].name!r}, scheme {scheme}: it changed {', '.join(changed)}")


def check_results_have_no_gradients(quantizer: Quantizer) -> None:
    """No part of the result wants gradients: it would keep the whole computation in memory."""
    for outcome in every_outcome(quantizer, typical()):
        if outcome.tensor.scale.requires_grad:
            raise CheckFailure(f"{outcome.place}: scale {list(outcome.tensor.scale.shape)} requires gradients")


def _require_same(one: Quantizer, sample: Sample, other: Quantizer, again: Sample, when: str) -> None:
    _compare(list(every_outcome(one, sample)), list(every_outcome(other, again)), when)


def _compare(first: list[Outcome], second: list[Outcome], when: str) -> None:
    for one, other in zip(first, second, strict=True):
        if found := difference(one.tensor, other.tensor):
            raise CheckFailure(f"{one.place}: {when}, {found}")


def _require_unchanged(quantizer: Quantizer, inputs: Callable[[LinearGroup], object]) -> None:
    """Calls `prepare` and `quantize` themselves: their contract sees changes, but not of what."""
    for scheme in schemes_of(quantizer):
        group = typical().group(quantizer)
        watched = inputs(group)
        assert isinstance(watched, dict)
        before = {name: tensor.clone() for name, tensor in watched.items()}
        quantizer.prepare(group, (scheme,) * len(group.layers))
        _compare_inputs(watched, before, group, f"scheme {scheme}: prepare")
        quantizer.quantize(group.layers[0], scheme)
        _compare_inputs(watched, before, group, f"scheme {scheme}: quantize")


def _compare_inputs(after: dict[str, Tensor], before: dict[str, Tensor], group: LinearGroup, what: str) -> None:
    for name, tensor in before.items():
        changed = int((after[name] != tensor).sum())
        if changed:
            raise CheckFailure(
                f"layer {group.layers[0].name!r}, {what} changed {changed} of {tensor.numel()} numbers of {name}"
            )


def _random_states() -> dict[str, bytes | str]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy.random": repr(np.random.get_state(legacy=False)),
        "random": repr(random.getstate()),
    }


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
