"""The refusal of NaN and infinity, by name, where they come in: every number made from them would be worthless."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.errors import InputError


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one pass that keeps nothing: NaN comes through a minimum."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def require_finite(name: str, weight: Tensor) -> None:
    """Raise InputError QC-WEIGHT-001 where values of the tensor `name` are not finite; it says how many, and where.

    weight: [channels, ...], of any dtype and size.
    """
    if not weight.is_floating_point() or not weight.numel():
        return
    if weight.dtype.itemsize == 1:  # float8 has no arithmetic
        weight = weight.float()
    if all_finite(weight):
        return
    wrong = ~torch.isfinite(weight)
    count, nans = int(wrong.sum()), int(torch.isnan(weight).sum())
    channels = wrong.reshape(len(weight) if weight.ndim else 1, -1).any(1).nonzero().flatten().tolist()
    raise InputError(
        "QC-WEIGHT-001",
        f"tensor {name} holds {nans} NaN and {count - nans} infinite values among {weight.numel()}, "
        f"first in channel {channels[0]} ({len(channels)} channels in all)",
        hint="the checkpoint is damaged or its training diverged: take an earlier one",
    )


def not_finite(where: str) -> InputError:
    """Return the error QC-FLOAT-001 for a model that computes NaN or infinity from finite weights.

    where: "comes out of the float model for evaluation sample 3".
    """
    return InputError(
        "QC-FLOAT-001",
        f"NaN or infinity {where}, though the weights are finite: something overflows",
        hint="take other data, or another checkpoint; with --no-verify what was quantized is kept, and qconvert verify OUT "
        "takes another --evaluation",
    )
