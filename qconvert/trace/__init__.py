"""Trace: the float graphs of a model, from one block of each kind, checked against the model itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from qconvert.errors import InputError, is_out_of_memory
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN, Template
from qconvert.trace.cache import TraceCache
from qconvert.trace.capture import Captured
from qconvert.trace.check import TOLERANCE, reference, relative_error
from qconvert.trace.cleanup import CLEAN_UPS, CleanUp, cleaned_up
from qconvert.trace.groups import input_groups
from qconvert.trace.opaque import representatives
from qconvert.trace.signature import FORMS, Form
from qconvert.trace.stamp import stamp

logger = logging.getLogger("qconvert")

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
    blocks = list(dict.fromkeys(kinds.values()))
    captured, clean_ups = _first_that_is_right(model, blocks)
    constants: dict[str, Tensor] = {}
    embeddings: list[str] = []
    for traced in captured.values():
        graph = traced.graph.graph
        stamp(graph, kinds)
        cleaned_up(traced.graph, clean_ups)
        constants |= {name: value for name, value in traced.constants.items() if name in graph.initializers}
        embeddings += [
            node.attributes["module"].as_string() for node in graph if node.domain == DOMAIN and node.op_type == "Embedding"
        ]
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
        try:
            captured = cache.capture(form, outputs)
            for clean_ups in (CLEAN_UPS, ()):
                graphs = {part: cleaned_up(traced.graph.clone(), clean_ups) for part, traced in captured.items()}
                error = relative_error(model, graphs, blocks, expected)
                if error <= TOLERANCE:
                    cache.keep(form, outputs, cleaned=bool(clean_ups))
                    return captured, clean_ups
        except InputError:
            raise
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            # Any form may meet something that it can't trace, and the exporter raises all kinds of errors; the next
            # form is tried, and if none is left, all reasons are told.
            failures.append((form, _first_cause(failure)))
            logger.debug("%s can't be traced %s", model.name, form, exc_info=True)
            continue
        failures.append((form, f"differs from the model by {error:.1e} of its largest output"))
        logger.debug("%s traced %s is off by %.1e", model.name, form, error)
    reasons = [f"{form}: {reason}" if len(failures) > 1 else reason for form, reason in failures]
    raise InputError(
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
    """In one line what went wrong at the bottom: the exporter wraps it in pages of advice."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
