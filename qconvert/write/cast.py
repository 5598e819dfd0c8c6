"""Tensors rounded to floats of half the width, and the refusal of what such a type can't hold."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.report import LayerReport
from qconvert.ir.rounding import loss_of
from qconvert.ir.scheme import Cast

# Names in one message.
NAMED = 20


def cast_tensor(model: Model, plan: Plan, name: str, tensor: Tensor) -> tuple[Tensor, LayerReport]:
    """Return a tensor of the source in the type that the plan casts it to, and what that has lost.

    Raises InputError QC-CAST-003 where a finite value would become infinite, with every tensor that has such values.
    """
    rounded = tensor.to(plan.cast[name])
    loss = loss_of(tensor, rounded)
    if loss.beyond is not None:
        raise _overflow(model, plan)
    report = LayerReport(
        name=name,
        scheme=str(plan.scheme),
        relative_error=loss.relative_error,
        bytes=rounded.nbytes,
        zeroed=loss.zeroed or None,
        largest_zeroed=loss.largest_zeroed,
    )
    return rounded, report


def _overflow(model: Model, plan: Plan) -> InputError:
    assert isinstance(plan.scheme, Cast)
    found = {}
    for name, dtype in plan.cast.items():
        tensor = model.source.read(name)
        beyond = loss_of(tensor, tensor.to(dtype)).beyond
        if beyond is not None:
            found[name] = beyond
    words = [f"{name} holds {value:.6g}" for name, value in found.items()]
    more = [f"and {len(words) - NAMED} more tensors"] if len(words) > NAMED else []
    other = "bfloat16" if str(plan.scheme) == "float16" else "int8-channel, with another quantizer than cast"
    return InputError(
        "QC-CAST-003",
        f"{plan.scheme} ends at {torch.finfo(plan.scheme.dtype).max:.6g}: {', '.join([*words[:NAMED], *more])}",
        hint=f"take --scheme {other}",
    )
