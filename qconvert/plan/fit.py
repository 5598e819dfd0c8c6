"""Layers that their scheme does not fit: the nearest one that does, or float."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from qconvert.errors import UsageError
from qconvert.ir.decision import KeptFloat
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.scheme import Granularity, PerChannel, PerGroup
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import Quantizer
from qconvert.recipe import Recipe
from qconvert.storage import layout
from qconvert.targets import targets_of
from qconvert.targets.cpu import CPU

Layers = dict[str, LayerPlan]


@dataclass(frozen=True)
class _Misfit:
    """A reason why the scheme of a layer does not fit it. hint: what to do where a rule names the layer."""

    code: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True, eq=False)
class Fitting:
    """The layers that fit under one recipe. shared: output head -> the embedding whose tensor it reads too."""

    recipe: Recipe
    quantizer: Quantizer
    model: Model
    shared: Mapping[str, str]

    def fit(self, layers: Layers) -> tuple[Layers, list[KeptFloat]]:
        """Return the layers in schemes that fit, with a reason where it is not the one asked for, and what stays in float.

        1. A group that does not divide the width of a layer gives way to the largest smaller one that does, else to one scale
           per channel. What neither quantizer nor kernels take stays in float.
        2. Where transformers could not load the folder then, because some scheme bears no other beside it, all layers take
           the smaller group, or those that rule 1 has changed stay in float: whatever makes fewer bytes.

        Raises UsageError QC-PLAN-004, -009, -010 or -014 where a rule asks for what does not fit by the very name of a layer.
        """
        misfits = {name: found for name, layer in layers.items() if (found := self._misfit(layer))}
        _refuse({name: misfit for name, misfit in misfits.items() if self._is_named(name)})
        nearest = {name: self._nearest(layers[name], misfit) for name, misfit in misfits.items()}
        fitted = {name: plan for name, layer in layers.items() if (plan := nearest.get(name, layer))}
        if self.layout_refuses(fitted.values()):
            others = [one for one in (_as_asked(fitted), self._in_one_group(fitted)) if not self.layout_refuses(one.values())]
            fitted = min(others, key=lambda one: self._bytes(layers, one), default=fitted)
        reasons = {name: misfit.reason for name, misfit in misfits.items()} | {
            name: f"{plan.reason}; beside other schemes only --layout onnx allows {plan.scheme}"
            for name, plan in nearest.items()
            if plan
        }
        return fitted, [KeptFloat(name=name, reason=reasons[name]) for name in layers if name not in fitted]

    def layout_refuses(self, layers: Iterable[LayerPlan]) -> str | None:
        """Return why transformers can't load these layers from one folder, as half a sentence; None if it can, or need not."""
        if self.recipe.layout == "onnx" or self.model.config is None:
            return None
        return layout.transformers_refuses(layers, outliers=self.quantizer.has_outliers)

    def _misfit(self, layer: LayerPlan) -> _Misfit | None:
        """Why there is no kernel, or the first of what the layer's width has to be a multiple of, and is not."""
        width, scheme, form = layer.in_features, layer.scheme, layer.form
        if scheme.codebook is not None and form is not LayerForm.CODEBOOK_WEIGHTS:
            reason = f"there is no kernel for a layer of kind {layer.kind} in {scheme.format.name}"
            return _Misfit("QC-PLAN-014", reason, f"take int4-g32, or keep it in float: --rule '{layer.name}=float'")
        channel = " or -channel" if scheme.codebook is None else ""
        wanted = [("QC-PLAN-004", scheme.group_size(width), f"the group of {scheme}", f"take a smaller group{channel}, or ")]
        if form is LayerForm.PACKED_EMBEDDING:
            wanted.append(("QC-PLAN-009", CPU.block_size(layer), "the block of the kernel for quantized embeddings", ""))
        others = [target for target in targets_of(self.recipe.targets) if target is not CPU]
        gathered = form is LayerForm.PACKED_EMBEDDING or (form.is_embedding and layer.name in self.shared.values())
        for target in others if gathered else ():
            block = f"the block of the {target.name.upper()} provider's kernel for quantized embeddings"
            wanted.append(("QC-PLAN-010", target.block_size(layer), block, f"leave out --target {target.name}, or "))
        for code, divisor, what, hint in wanted:
            if width % divisor:
                reason = f"its width of {width} is no multiple of {divisor}, {what}"
                return _Misfit(code, reason, f"{hint}keep it in float: --rule '{layer.name}=float'")
        return None

    def _nearest(self, layer: LayerPlan, misfit: _Misfit) -> LayerPlan | None:
        """A grouped layer in the coarsest finer scheme that fits it, None where there is none."""
        possible = (each for each in _finer(layer) if self._misfit(each) is None and self._takes(each))
        return next((dataclasses.replace(each, reason=misfit.reason) for each in possible), None)

    def _takes(self, layer: LayerPlan) -> bool:
        """Return whether the quantizer makes this layer; one with observers has no say in embeddings (qconvert.quantize)."""
        no_say = layer.form.is_embedding and bool(self.quantizer.observers)
        return no_say or contract.refuses(self.quantizer, layer.scheme) is None

    def _in_one_group(self, fitted: Layers) -> Layers:
        """All grouped layers that no rule names in the smallest group that one of them was given, without what has no group."""
        given = [size for layer in fitted.values() if layer.reason is not None and (size := _group(layer))]
        found = {}
        for name, layer in fitted.items():
            size = _group(layer)
            if size and given and not self._is_named(name):
                finest = dataclasses.replace(layer.scheme, granularity=PerGroup(min(size, *given)))
                reason = f"{layer.scheme} does not fit every layer, and beside it transformers loads no other scheme"
                unchanged = finest == layer.scheme
                found[name] = layer if unchanged else dataclasses.replace(layer, scheme=finest, reason=layer.reason or reason)
            elif layer.reason is None:
                found[name] = layer
        return found

    def _is_named(self, name: str) -> bool:
        """Return whether the rule of a layer is for it alone, by its name or that of the head that shares its tensor."""
        names = [name, *(head for head, embedding in self.shared.items() if embedding == name)]
        rule = next((found for each in names if (found := self.recipe.rule_for(each))), None)
        return rule is not None and rule.pattern in {text for each in names for text in (each, glob.escape(each))}

    def _bytes(self, layers: Layers, quantized: Layers) -> int:
        """Return the bytes of all layers on disk, if those of `quantized` are quantized so and the others stay in float."""
        source, stored_name = self.model.source.tensors, self.model.stored_name
        floats = [source[stored_name(f"{name}.weight")].nbytes for name in layers if name not in quantized]
        return sum(floats) + sum(layer.nbytes for layer in quantized.values())


def _as_asked(fitted: Layers) -> Layers:
    return {name: layer for name, layer in fitted.items() if layer.reason is None}


def _group(layer: LayerPlan) -> int | None:
    return layer.scheme.granularity.group_size if isinstance(layer.scheme.granularity, PerGroup) else None


def _finer(layer: LayerPlan) -> Iterator[LayerPlan]:
    """A grouped layer with smaller groups, the largest first, and then with one scale per channel, if its format has that."""
    asked = _group(layer)
    if asked:
        finer: list[Granularity] = [PerGroup(size) for size in reversed(layer.scheme.format.group_sizes) if size < asked]
        if layer.scheme.codebook is None:
            finer.append(PerChannel())
        for granularity in finer:
            yield dataclasses.replace(layer, scheme=dataclasses.replace(layer.scheme, granularity=granularity))


def _refuse(named: Mapping[str, _Misfit]) -> None:
    """Raises UsageError where there is something: what was said of one layer alone is not bent."""
    if named:
        first = next(iter(named.values()))
        listed = "; ".join(f"{name}: {misfit.reason}" for name, misfit in named.items())
        raise UsageError(first.code, f"a rule gives {len(named)} layers what does not fit them: {listed}", hint=first.hint)
