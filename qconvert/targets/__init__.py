"""The execution providers that graphs are made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from qconvert.ir.task import Task
from qconvert.targets.cpu import CPU
from qconvert.targets.cuda import CUDA
from qconvert.targets.target import Target

# In the order in which graphs are made: what one target writes into the sidecar comes before what the next one adds.
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in (CPU, CUDA)})


def targets_of(names: Iterable[str]) -> tuple[Target, ...]:
    """Return the targets of these names, in the order of TARGETS."""
    asked = set(names)
    return tuple(target for name, target in TARGETS.items() if name in asked)


def graph_files(task: Task, target: Target = CPU) -> dict[str, str]:
    """Return the file of the graph of each part of a model for a target, in the order in which the parts run."""
    return {part: target.graph_file(part) for part in task.parts}
