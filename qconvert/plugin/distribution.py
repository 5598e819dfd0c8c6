"""Which installed distribution a plugin came from: the name and version that messages and the manifest give."""

from __future__ import annotations

from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qconvert.plugin.quantizer import Quantizer

GROUP = "qconvert"


class Distribution(NamedTuple):
    """str: "qconvert-kmeans 1.2"."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def builtin() -> Distribution:
    """qconvert itself."""
    return Distribution("qconvert", version("qconvert"))


def distribution_of(quantizer: Quantizer) -> Distribution:
    """The distribution whose entry point names the package that the quantizer's class is defined in.

    A class from anywhere else (a test, a notebook) is named by its module, with "no version".
    """
    module = type(quantizer).__module__
    package = module.partition(".")[0]
    if package == "qconvert":
        return builtin()
    for entry_point in entry_points(group=GROUP):
        if entry_point.dist is not None and entry_point.module.partition(".")[0] == package:
            return Distribution(entry_point.dist.name, entry_point.dist.version)
    return Distribution(module, "(no version)")
