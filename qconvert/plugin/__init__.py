"""The door for plugins: everything that a plugin may use comes from here.

    from qconvert.plugin import QuantizedTensor, Quantizer, QuantScheme, affine, hookimpl

Names are resolved at first use (PEP 562), so that importing this imports neither torch nor pydantic. Where they are defined
may change with any version; what a name means is promised (docs/plugins.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker

if TYPE_CHECKING:
    from qconvert.errors import InputError, PluginError, QConvertError, ResourceError, UsageError, in_one_line
    from qconvert.ir import affine
    from qconvert.ir.distribution import Distribution, ValueRange
    from qconvert.ir.layer import CalibrationStats, Layer, LinearGroup, Producer
    from qconvert.ir.model import Model, TensorInfo, TensorSource
    from qconvert.ir.quantized import Outliers, QuantizedTensor
    from qconvert.ir.report import Fidelity, GateResult, Latency, LayerReport, Parity, Report, SampleCounts, Size
    from qconvert.ir.scheme import Activations, PerChannel, PerGroup, PerTensor, QuantScheme
    from qconvert.ir.task import TASKS, Task
    from qconvert.load.hugging_face import load_folder, model_from_config
    from qconvert.load.skeleton import build_skeleton
    from qconvert.load.tokenizer import text_encoder
    from qconvert.plugin.observer import AbsMax, Gram, Observer, SampledRows
    from qconvert.plugin.quantizer import Quantizer, round_to_nearest
    from qconvert.plugin.range_estimator import RangeEstimator
    from qconvert.plugin.tuner import BlockTuner, SampledBlock
    from qconvert.recipe import Recipe

hookimpl = HookimplMarker("qconvert")

__all__ = [
    "TASKS",
    "AbsMax",
    "Activations",
    "BlockTuner",
    "CalibrationStats",
    "Distribution",
    "Fidelity",
    "GateResult",
    "Gram",
    "InputError",
    "Latency",
    "Layer",
    "LayerReport",
    "LinearGroup",
    "Model",
    "Observer",
    "Outliers",
    "Parity",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PluginError",
    "Producer",
    "QConvertError",
    "QuantScheme",
    "QuantizedTensor",
    "Quantizer",
    "RangeEstimator",
    "Recipe",
    "Report",
    "ResourceError",
    "SampleCounts",
    "SampledBlock",
    "SampledRows",
    "Size",
    "Task",
    "TensorInfo",
    "TensorSource",
    "UsageError",
    "ValueRange",
    "affine",
    "build_skeleton",
    "hookimpl",
    "in_one_line",
    "load_folder",
    "model_from_config",
    "round_to_nearest",
    "text_encoder",
]

# Module -> what of it goes through this door, as the type checker sees it above. The loader's functions lie in a stage, above
# this package: those imports are the exceptions of the layers in pyproject.toml, and happen when a plugin asks for them.
_HOMES = {
    "qconvert.errors": ("InputError", "PluginError", "QConvertError", "ResourceError", "UsageError", "in_one_line"),
    "qconvert.ir": ("affine",),
    "qconvert.ir.distribution": ("Distribution", "ValueRange"),
    "qconvert.ir.layer": ("CalibrationStats", "Layer", "LinearGroup", "Producer"),
    "qconvert.ir.model": ("Model", "TensorInfo", "TensorSource"),
    "qconvert.ir.quantized": ("Outliers", "QuantizedTensor"),
    "qconvert.ir.report": (*("Fidelity", "GateResult", "Latency", "LayerReport", "Parity", "Report", "SampleCounts", "Size"),),
    "qconvert.ir.scheme": ("Activations", "PerChannel", "PerGroup", "PerTensor", "QuantScheme"),
    "qconvert.ir.task": ("TASKS", "Task"),
    "qconvert.load.hugging_face": ("load_folder", "model_from_config"),
    "qconvert.load.skeleton": ("build_skeleton",),
    "qconvert.load.tokenizer": ("text_encoder",),
    "qconvert.plugin.observer": ("AbsMax", "Gram", "Observer", "SampledRows"),
    "qconvert.plugin.quantizer": ("Quantizer", "round_to_nearest"),
    "qconvert.plugin.range_estimator": ("RangeEstimator",),
    "qconvert.plugin.tuner": ("BlockTuner", "SampledBlock"),
    "qconvert.recipe": ("Recipe",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(home)
            return getattr(module, name) if hasattr(module, name) else import_module(f"{home}.{name}")  # affine is a module
    raise AttributeError(f"module 'qconvert.plugin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
