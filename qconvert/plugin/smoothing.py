"""Linears whose input is divided by a scale: what then becomes of their weights and statistics."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qconvert.ir.layer import CalibrationStats, LinearGroup
from qconvert.plugin.observer import Observer


def scaled(group: LinearGroup, scale: Tensor, observers: tuple[type[Observer], ...]) -> LinearGroup:
    """Return the group for inputs divided by `scale` [in]: weights multiplied by it, the layers' statistics divided."""
    layers = tuple(
        dataclasses.replace(layer, weight=layer.weight * scale, stats=divided(layer.stats, scale, observers))
        for layer in group.layers
    )
    return dataclasses.replace(group, layers=layers)


def divided(stats: CalibrationStats | None, scale: Tensor, observers: tuple[type[Observer], ...]) -> CalibrationStats | None:
    """Return what the observers would have seen of inputs divided by `scale` [in]."""
    if stats is None:
        return None
    return CalibrationStats(
        stats.rows, {observer.name: observer.divided(stats.values[observer.name], scale) for observer in observers}
    )
