"""Every hook of qconvert. A plugin implements any of them with `from qconvert.plugin import hookimpl`.

Nothing heavy is imported here: plugins are found before it is known whether torch is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pluggy import HookspecMarker

if TYPE_CHECKING:
    from qconvert.ir.model import Model
    from qconvert.ir.report import Report
    from qconvert.plugin.quantizer import Quantizer
    from qconvert.plugin.range_estimator import RangeEstimator
    from qconvert.plugin.tuner import BlockTuner
    from qconvert.recipe import Recipe

hookspec = HookspecMarker("qconvert")

# The version of all that plugins rely on: these hooks, and what docs/plugins.md lists. A plugin says with `QCONVERT_API = 1`
# in its module what it was written for; without that, 1 is assumed.
API_VERSION = 1


@hookspec
def register_quantizers() -> list[type[Quantizer]]:  # type: ignore[empty-body]
    """Called once, when a command first needs a quantizer. Returns the Quantizer classes that the plugin brings."""


@hookspec
def register_tuners() -> list[type[BlockTuner]]:  # type: ignore[empty-body]
    """Called once, when a command first needs a quantizer or a tuner of a plugin. Returns the BlockTuner classes that the
    plugin brings."""


@hookspec
def register_range_estimators() -> list[type[RangeEstimator]]:  # type: ignore[empty-body]
    """Called once, when a command first needs a quantizer, a tuner or a range estimator of a plugin. Returns the
    RangeEstimator classes that the plugin brings."""


@hookspec(firstresult=True)
def load_model(source: str) -> Model | None:
    """Called for every `--model SOURCE` once `pkg:` is resolved to a path. Third parties are asked before the built-ins.

    source: what the user wrote, e.g. a path.
    Returns None for a source that is not the plugin's, else a Model whose tensors are read lazily. Raises InputError for
    a source that is the plugin's but damaged.
    """


@hookspec(firstresult=True)
def find_data(source: str) -> Path | None:
    """Called for every source of calibration or evaluation data that the user named. Third parties are asked before the
    built-ins.

    source: what the user wrote, e.g. an id.
    Returns None for a source that is not the plugin's, else a file of a kind that qconvert reads: .txt, .jsonl, .parquet
    or .npz. Raises InputError for a source that is the plugin's but can't be had.
    """


@hookspec
def conversion_finished(recipe: Recipe, report: Report) -> None:
    """Called after the output was published and the report is final, e.g. to log it. Must not change the output."""
