"""Trace: the float graphs of a model, from one block of each kind, checked against the model itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod

from torch import Tensor

from qconvert.errors import InputError, is_out_of_memory
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN, Template, module_of
from qconvert.trace.cache import TraceCache
from qconvert.trace.capture import Captured
from qconvert.trace.check import TOLERANCE, reference, relative_error
from qconvert.trace.cleanup import CLEAN_UPS, CleanUp, cleaned_up
from qconvert.trace.groups import input_groups
from qconvert.trace.opaque import representatives
from qconvert.trace.signature import FORMS, Form
from qconvert.trace.stamp import stamp

logger = logging.getLogger("qconvert")

# Weights that a plan reads to see that a trace is right.
SMALL = 150_000_000
# What can be traced.
TEXT = "the model runs in torch with batches of different length"
MODULE = (
    "the module takes any number of rows, counted by the first axis of its inputs (an LSTM with batch_first=True, say), and "
    "does not branch on values"
)


def trace(model: Model) -> Template:
    """Trace one block of each kind, check it numerically, and stamp out the whole graph (two of an encoder-decoder).

    Raises InputError QC-EXPORT-001 if no way of tracing the model computes what the model computes, QC-INPUT-014 if it has
    outputs that no graph would have.
    """
    kinds = representatives(model)
    return _stamped(model, kinds, *_first_that_is_right(model, list(dict.fromkeys(kinds.values()))))


def sketch(model: Model) -> Template:
    """Trace as `trace` does, but where weights are large without a look at them: in the first form that can be traced. That is
    the right one, unless the weights of a checkpoint need another.

    Raises as `trace` does, but for what is wrong with weights.
    """
    kinds = representatives(model)
    blocks = list(dict.fromkeys(kinds.values()))
    read = sum(prod(shape) for name, shape in model.parameter_shapes.items() if model.block_of(name) in ("", *blocks))
    if read <= SMALL or len(model.task.outputs) != 1:  # what others give is known when they have run
        return trace(model)
    cache, outputs = TraceCache(model, blocks), list(model.task.outputs)
    failures: list[tuple[Form, str]] = []
    for form in FORMS[model.task]:
        with _noted(failures, form, model):
            captured = cache.capture(form, outputs)
            break
    else:
        raise _untraceable(model, failures)
    return _stamped(model, kinds, captured, CLEAN_UPS)


def _stamped(
    model: Model, kinds: Mapping[str, str], captured: Mapping[str, Captured], clean_ups: Sequence[CleanUp]
) -> Template:
    constants: dict[str, Tensor] = {}
    embeddings: list[str] = []
    for traced in captured.values():
        graph = traced.graph.graph
        stamp(graph, kinds)
        cleaned_up(traced.graph, clean_ups)
        constants |= {name: value for name, value in traced.constants.items() if name in graph.initializers}
        embeddings += [module_of(node) for node in graph if node.domain == DOMAIN and node.op_type == "Embedding"]
    weights_read = {name for traced in captured.values() for name in traced.weights_read}
    stamped = (block + name.removeprefix(kind) for block, kind in kinds.items() for name in weights_read if _inside(name, kind))
    graphs = {part: traced.graph for part, traced in captured.items()}
    groups = input_groups([each.graph for each in graphs.values()], model.block_of)
    return Template(graphs, kinds, groups, constants, tuple(dict.fromkeys(embeddings)), frozenset({*weights_read, *stamped}))


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


def _first_that_is_right(model: Model, blocks: list[str]) -> tuple[dict[str, Captured], Sequence[CleanUp]]:
    """The capture in the fastest form that agrees with torch, and the clean-ups after which it still does."""
    cache = TraceCache(model, blocks)
    if (known := cache.right()) is not None:
        return known[0], CLEAN_UPS if known[1] else ()
    expected = _expected(model, blocks)
    outputs = list(expected[0])
    failures: list[tuple[Form, str]] = []
    for form in FORMS[model.task]:
        with _noted(failures, form, model):
            captured = cache.capture(form, outputs)
            for clean_ups in (CLEAN_UPS, ()):
                graphs = {part: cleaned_up(traced.graph.clone(), clean_ups) for part, traced in captured.items()}
                error = relative_error(model, graphs, blocks, expected)
                if error <= TOLERANCE:
                    cache.keep(form, outputs, cleaned=bool(clean_ups))
                    return captured, clean_ups
            failures.append((form, f"differs from the model by {error:.1e} of its largest output"))
            logger.debug("%s traced %s is off by %.1e", model.name, form, error)
    raise _untraceable(model, failures)


@contextmanager
def _noted(failures: list[tuple[Form, str]], form: Form, model: Model) -> Iterator[None]:
    """Note why a form can't be traced: any may meet something that it can't trace, and the exporter raises all kinds of errors.
    The next form is tried, and if none is left, all reasons are told.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        failures.append((form, _first_cause(failure)))
        logger.debug("%s can't be traced %s", model.name, form, exc_info=True)


def _untraceable(model: Model, failures: Sequence[tuple[Form, str]]) -> InputError:
    reasons = [f"{form}: {reason}" if len(failures) > 1 else reason for form, reason in failures]
    return InputError(
        "QC-EXPORT-001",
        f"{model.name} ({type(model.module).__name__}) can't be exported: {'; '.join(reasons)}",
        hint=f"check that {MODULE if not model.task.takes_text else TEXT}; QCONVERT_DEBUG=1 shows the traces",
    )


def _expected(model: Model, blocks: list[str]) -> list[dict[str, Tensor]]:
    try:
        return reference(model, blocks)
    except InputError:
        raise
    except Exception as failure:  # any that the model's own code raises
        if is_out_of_memory(failure):
            raise
        raise InputError(
            "QC-EXPORT-001",
            f"{model.name} ({type(model.module).__name__}) does not run in torch on {', '.join(model.input_names)}: "
            f"{_first_cause(failure)}",
            hint="check that it runs in torch with nothing but these inputs",
        ) from failure


def _first_cause(failure: BaseException) -> str:
    """Return in one line what went wrong at the bottom: the exporter wraps it in pages of advice."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
