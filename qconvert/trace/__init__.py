"""Trace: the float graph of a model, from one block of each kind, checked against the model itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qconvert.errors import InputError
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN, Template
from qconvert.trace.capture import FORMS, Captured, capture
from qconvert.trace.check import TOLERANCE, relative_error
from qconvert.trace.cleanup import CLEAN_UPS, CleanUp, cleaned_up
from qconvert.trace.groups import input_groups
from qconvert.trace.opaque import representatives
from qconvert.trace.stamp import stamp

logger = logging.getLogger("qconvert")


def trace(model: Model) -> Template:
    """Trace one block of each kind, check it numerically, and stamp out the whole graph.

    Raises InputError QC-EXPORT-001 if no way of tracing the model computes what the model computes.
    """
    kinds = representatives(model)
    blocks = list(dict.fromkeys(kinds.values()))
    captured, clean_ups = _first_that_is_right(model, blocks)
    graph = captured.graph.graph
    stamp(graph, kinds)
    cleaned_up(captured.graph, clean_ups)
    constants = {name: value for name, value in captured.constants.items() if name in graph.initializers}
    embeddings = [
        node.attributes["module"].as_string() for node in graph if node.domain == DOMAIN and node.op_type == "Embedding"
    ]
    return Template(captured.graph, kinds, input_groups(graph), constants, tuple(dict.fromkeys(embeddings)))


def _first_that_is_right(model: Model, blocks: list[str]) -> tuple[Captured, Sequence[CleanUp]]:
    """The capture in the fastest form that agrees with torch, and the clean-ups after which it still does."""
    failures = []
    for form in FORMS[model.task]:
        try:
            captured = capture(model, blocks, form)
            for clean_ups in (CLEAN_UPS, ()):
                error = relative_error(model, cleaned_up(captured.graph.clone(), clean_ups), blocks)
                if error <= TOLERANCE:
                    return captured, clean_ups
        except InputError:
            raise
        except Exception as failure:
            # Any form may meet something that it can't trace, and the exporter raises all kinds of errors; the next
            # form is tried, and if none is left, all reasons are told.
            failures.append(f"{form}: {_first_cause(failure)}")
            logger.debug("%s can't be traced as %s", model.name, form, exc_info=True)
            continue
        failures.append(f"{form}: differs from the model by {error:.1e} of its largest output")
        logger.debug("%s traced as %s is off by %.1e", model.name, form, error)
    raise InputError(
        "QC-EXPORT-001",
        f"{model.name} ({type(model.module).__name__}) can't be exported: {'; '.join(failures)}",
        hint="check that the model runs in torch with batches of different length; QCONVERT_DEBUG=1 shows the traces",
    )


def _first_cause(failure: BaseException) -> str:
    """In one line what went wrong at the bottom: the exporter wraps it in pages of advice."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
