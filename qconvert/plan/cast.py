"""The plan of a cast: nothing is quantized, and every float of the checkpoint is stored in half the width."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qconvert.errors import UsageError
from qconvert.ir.artifact import weight_file_names
from qconvert.ir.contents import float_info, shards
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.template import Template
from qconvert.plan.peaks import peaks
from qconvert.plan.sizes import deployment
from qconvert.plan.targets import check_targets, cuda_bytes
from qconvert.plugin.quantizer import Quantizer
from qconvert.recipe import Recipe


def cast_plan(model: Model, template: Template, recipe: Recipe, quantizer: Quantizer, unread: Mapping[str, str]) -> Plan:
    """Plan to round all floats to the type of the recipe's cast, but for those that are stored in 8 bits, which would grow.

    Raises UsageError QC-CAST-004 where all are of that type already; QC-CUDA-001 and -002 as `check_targets` does.
    """
    scheme = recipe.cast
    assert scheme is not None
    floats = {name: info for name, info in model.source.tensors.items() if info.dtype.is_floating_point}
    cast = {name: scheme.dtype for name, info in floats.items() if info.dtype != scheme.dtype and info.dtype.itemsize > 1}
    if not cast:
        raise UsageError(
            "QC-CAST-004",
            f"no float of {model.name} would become another: all are {scheme} already",
            hint="take a scheme of codes, such as int8-channel, or the other of float16 and bfloat16",
        )
    check_targets(model, template, {}, recipe)
    infos = {name: float_info(model, cast, name) for name in model.source.tensors}
    made = Plan(
        scheme,
        {},
        (),
        calibrated=recipe.kv_cache != "float",
        kv_cache=recipe.kv_cache,
        weights_bytes=sum(info.nbytes for info in infos.values()),
        peaks=peaks(model, template.groups, {}, recipe, quantizer),
        targets=recipe.targets,
        cuda_bytes=cuda_bytes(infos, {}, recipe),
        unread=unread,
        cast=cast,
    )
    return dataclasses.replace(
        made, weight_files=weight_file_names(len(shards(model, made))), deployment=deployment(model, template, made)
    )
