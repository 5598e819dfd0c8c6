"""One calibration for several conversions of one model: the float blocks run once, under the observers of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from qconvert.calibrate.observe import chooses_scales, groups_by_unit, observe, require_seen
from qconvert.errors import PluginError
from qconvert.ir.layer import Batch, Block, CalibrationStats, Layer, LinearGroup
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.template import InputGroup
from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer


@dataclass(frozen=True)
class Share:
    """What one conversion needs of the blocks that are calibrated for all.

    groups, done: as `calibrate` takes them.
    """

    model: Model
    plan: Plan
    groups: Sequence[InputGroup]
    quantizer: Quantizer
    done: frozenset[str] = frozenset()

    @cached_property
    def units(self) -> Mapping[str, Sequence[InputGroup]]:
        """Unit -> the groups of its planned layers, of the units that are not done."""
        every = groups_by_unit(self.model, self.plan, self.groups)
        return {unit: groups for unit, groups in every.items() if unit not in self.done}

    def of(self, block: Block) -> Block:
        """The part of a block of `calibrate_together` that this conversion needs: what `calibrate` would give it alone.

        It has copies, so that a quantizer that writes to its input harms no other. Raises UsageError QC-CALIB-001.
        """
        layers = {layer.name: layer for layer in block.layers}
        observers = self.quantizer.observers
        runs = bool(observers) or chooses_scales(self.quantizer)
        members = []
        for group in self.units[block.name]:
            stats = _narrowed(layers[group.layers[0]].stats, observers)
            own = tuple(_copy(layers[name], stats) for name in group.layers)
            members.append(LinearGroup(own, group.producer if runs else None, stats))
        producers = {group.producer.name for group in members if group.producer}
        tensors = {name: value for name, value in block.tensors.items() if name.rpartition(".")[0] in producers}
        part = Block(block.name, tuple(members), tensors, block.relative_change if runs else None)
        require_seen(part)
        return part


def calibrate_together(shares: Sequence[Share], batches: Sequence[Batch], device: str = "cpu") -> Iterator[Block]:
    """`calibrate` for all shares of one model at once: every unit that one of them needs, with all that they need of it.

    Raises what `calibrate` raises, but for QC-CALIB-001, and PluginError QC-COMPARE-005.
    """
    first = shares[0]
    layers: dict[str, LayerPlan] = {}
    for share in shares:
        layers |= share.plan.layers
    done = frozenset.intersection(*(share.done for share in shares))
    # Of a plan, only the names and kinds of its layers count here; schemes differ between shares.
    plan = replace(first.plan, layers=layers)
    scaled = any(chooses_scales(share.quantizer) for share in shares)
    yield from observe(first.model, plan, first.groups, _observers(shares), batches, device, done, scaled=scaled)


def _observers(shares: Sequence[Share]) -> tuple[type[Observer], ...]:
    """Those of all quantizers, each once. Raises PluginError QC-COMPARE-005 if two have one name."""
    found: dict[str, tuple[type[Observer], Quantizer]] = {}
    for share in shares:
        for observer in share.quantizer.observers:
            known, owner = found.setdefault(observer.name, (observer, share.quantizer))
            if known is not observer:
                raise PluginError(
                    "QC-COMPARE-005",
                    f"the quantizers {owner.name} and {share.quantizer.name} both observe something under the name "
                    f"{observer.name!r}, but not the same",
                    hint="compare them one by one, and ask the plugin's author to rename the observer",
                )
    return tuple(observer for observer, _ in found.values())


def _narrowed(stats: CalibrationStats | None, observers: Sequence[type[Observer]]) -> CalibrationStats | None:
    if stats is None or not observers:
        return None
    names = [observer.name for observer in observers if observer.name in stats.values]
    return replace(stats, values={name: stats.values[name].clone() for name in names})


def _copy(layer: Layer, stats: CalibrationStats | None) -> Layer:
    return replace(layer, weight=layer.weight.clone(), bias=_clone(layer.bias), stats=stats)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
