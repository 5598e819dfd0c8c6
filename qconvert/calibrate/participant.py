"""The share that each of several conversions of one model takes of blocks that are calibrated for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qconvert.calibrate.layers import groups_by_unit
from qconvert.errors import PluginError
from qconvert.ir.large_tensors import copied
from qconvert.ir.layer import Block, CalibrationStats, LinearGroup
from qconvert.ir.template import InputGroup
from qconvert.job import Job
from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer


@dataclass(frozen=True)
class Participant:
    """One job, and the units that an earlier run has done for it."""

    job: Job
    done: frozenset[str] = frozenset()

    @cached_property
    def units(self) -> Mapping[str, Sequence[InputGroup]]:
        """The groups of planned layers of each unit that is not done, by the unit's name."""
        every = groups_by_unit(self.job.model, self.job.plan.layers, self.job.template.groups)
        return {unit: groups for unit, groups in every.items() if unit not in self.done}

    @property
    def chooses_scales(self) -> bool:
        """Whether the quantizer may ask for smoothing scales, whose folding is proved on blocks that run."""
        return type(self.job.quantizer).prepare is not Quantizer.prepare

    def part_of(self, block: Block) -> Block:
        """Return the part of a block that this job would be given by `calibrate` if it were the only one.

        It has copies of the statistics, so that a quantizer that writes to its input harms no other.
        """
        layers = {layer.name: layer for layer in block.layers}
        observers = self.job.quantizer.observers
        runs = bool(observers) or self.chooses_scales
        members = []
        for group in self.units[block.name]:
            stats = _narrowed(layers[group.layers[0]].stats, observers)
            own = tuple(replace(layers[name], stats=stats) for name in group.layers)
            members.append(LinearGroup(own, group.producer if runs else None, stats))
        producers = {group.producer.name for group in members if group.producer}
        tensors = {name: value for name, value in block.tensors.items() if name.rpartition(".")[0] in producers}
        return Block(block.name, tuple(members), tensors, block.lane if runs else None)


def observers_of(participants: Sequence[Participant]) -> tuple[type[Observer], ...]:
    """Return the observers of all quantizers, each once. Raises PluginError QC-COMPARE-005 if two have one name."""
    found: dict[str, tuple[type[Observer], Quantizer]] = {}
    for quantizer in (participant.job.quantizer for participant in participants):
        for observer in quantizer.observers:
            known, owner = found.setdefault(observer.name, (observer, quantizer))
            if known is not observer:
                raise PluginError(
                    "QC-COMPARE-005",
                    f"the quantizers {owner.name} and {quantizer.name} both observe something under the name "
                    f"{observer.name!r}, but not the same",
                    hint="compare them one by one, and ask the plugin's author to rename the observer",
                )
    return tuple(observer for observer, _ in found.values())


def _narrowed(stats: CalibrationStats | None, observers: Sequence[type[Observer]]) -> CalibrationStats | None:
    if stats is None or not observers:
        return None
    names = [observer.name for observer in observers if observer.name in stats.values]
    return replace(stats, values={name: copied(stats.values[name]) for name in names})
