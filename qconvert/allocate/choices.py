"""The choices of an allocation: layers that get one scheme together, and what each scheme costs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.errors import UsageError
from qconvert.ir import affine
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup
from qconvert.recipe import Recipe
from qconvert.storage import layout
from qconvert.targets import targets_of
from qconvert.targets.cpu_sidecar import sidecar_infos

# Weights only, with fast kernels on every target, and a layout whose bytes the kernels read as they are.
SCHEMES = tuple(map(QuantScheme.parse, ("int4-g128", "int4-g64", "int4-g32", "int4-g16", "int8-g128", "int8-g32")))
# Their zero points have no place in a mixed folder for transformers, and no kernel on CUDA.
ASYMMETRIC = tuple(map(QuantScheme.parse, ("int4-g128-asym", "int4-g64-asym", "int4-g32-asym", "int4-g16-asym")))
# For widths that no group divides.
FALLBACK = tuple(map(QuantScheme.parse, ("int4-channel", "int8-channel")))
# The scheme at which losses are measured, where it is possible: in the middle of what is chosen.
REFERENCE = QuantScheme.parse("int4-g32")


@dataclass(frozen=True, slots=True)
class Choice:
    """Layers that get the same scheme: those that read one input and have one shape, such as gate and up, or key and value.

    Of one scheme they are one product in the graph. A large query beside a small key and value is not held to theirs: a bit
    is worth more there, and costs less (SmolLM2 at 4.5 bits: 4 % of the loss).
    """

    layers: tuple[str, ...]
    schemes: tuple[QuantScheme, ...]

    @property
    def reference(self) -> QuantScheme:
        """The scheme whose loss is measured: REFERENCE where the layers may have it, else the first of their schemes."""
        return REFERENCE if REFERENCE in self.schemes else self.schemes[0]


def choices(plan: Plan, groups: Sequence[InputGroup], recipe: Recipe, model: Model) -> list[Choice]:
    """Return the choices among the planned layers that no rule names.

    Raises UsageError QC-BUDGET-004 where there is none, QC-BUDGET-005 for layers that transformers loads only where all
    have one scheme.
    """
    free = {name: layer for name, layer in plan.layers.items() if not layer.form.is_embedding and recipe.rule_for(name) is None}
    if not free:
        raise UsageError(
            "QC-BUDGET-004", "the rules leave no layer whose scheme a budget could decide", hint="take fewer rules"
        )
    group_of = {name: index for index, group in enumerate(groups) for name in group.layers}
    together: dict[tuple[object, int], list[str]] = {}
    for name, layer in free.items():
        together.setdefault((group_of.get(name, name), layer.out_features), []).append(name)
    zero_points = all(target.takes_zero_points for target in targets_of(recipe.targets)) and recipe.layout == "onnx"
    allowed = (*SCHEMES, *ASYMMETRIC) if zero_points else SCHEMES
    found = []
    for names in together.values():
        width = free[names[0]].in_features
        dividing = tuple(scheme for scheme in allowed if width % scheme.group_size(width) == 0)
        found.append(Choice(tuple(names), dividing or FALLBACK))
    if recipe.layout == "transformers" and model.config is not None:
        _check_layout(plan, found)
    return found


def _check_layout(plan: Plan, found: Sequence[Choice]) -> None:
    """Raise QC-BUDGET-005 if transformers could load no folder with mixed schemes.

    Called before losses are measured, which takes minutes.
    """
    mixed = dict(plan.layers)
    for index, choice in enumerate(found):
        scheme = choice.schemes[index % len(choice.schemes)]
        mixed |= {name: dataclasses.replace(mixed[name], scheme=scheme) for name in choice.layers}
    reason = layout.transformers_refuses(mixed.values())
    if reason is not None:
        raise UsageError(
            "QC-BUDGET-005",
            f"a budget is met with several schemes, and transformers could not load such a folder: {reason}",
            hint="add --layout onnx for a folder that serves ONNX Runtime alone, or change what is named here with a --rule",
        )


def cost(plan: LayerPlan, weight: Tensor) -> int:
    """Return the bytes that a layer of weight [out, in] takes on disk: as stored, and what the kernels want beside that."""
    scale, _ = affine.choose_qparams(weight, plan.scheme)
    total = stored_bytes(plan)
    if plan.scheme.scale_dtype == torch.float16 and not affine.fits_float16(affine.round_scale(scale, plan.scheme)):
        total += (torch.float32.itemsize - torch.float16.itemsize) * scale.numel()
    return total


def stored_bytes(plan: LayerPlan) -> int:
    """Return the bytes of a layer as report.json counts them, if its scales fit into their dtype."""
    return plan.nbytes + sum(info.nbytes for info in sidecar_infos(plan).values())


def choice_bytes(plan: Plan, choice: Choice, scheme: QuantScheme) -> int:
    """Return the `stored_bytes` of all layers of a choice."""
    return sum(stored_bytes(dataclasses.replace(plan.layers[name], scheme=scheme)) for name in choice.layers)
