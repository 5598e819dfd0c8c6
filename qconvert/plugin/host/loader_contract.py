"""Holds loaders to their contract: what a plugin returns for a source, before anything relies on it, and what it then reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.errors import PluginError, QConvertError
from qconvert.ir.task import TASKS, Task
from qconvert.plugin.host import calls
from qconvert.plugin.host.discovery import FAILURES, reason
from qconvert.plugin.host.distribution import Distribution

if TYPE_CHECKING:
    from torch import Tensor

    from qconvert.ir.model import TensorInfo, TensorSource


class PluginSource:
    """The tensors of a plugin's model: each that is read is a call of the plugin. A TensorSource."""

    def __init__(self, source: TensorSource, distribution: Distribution) -> None:
        self._source = source
        self._distribution = distribution

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor that the plugin's source names."""
        return self._source.tensors

    def read(self, name: str) -> Tensor:
        """Return the tensor that the plugin reads.

        Raises PluginError QC-PLUGIN-006 if the plugin raises, or reads what is not the tensor that it has described.
        """
        from torch import Tensor  # here: who asks for data needs no torch

        try:
            with calls.calling(self._distribution, f"read {name!a}"):
                tensor = self._source.read(name)
        except QConvertError:
            raise
        except FAILURES as error:
            raise self._failure(f"failed to read {name!a}: {reason(error)}") from error
        info = self.tensors[name]
        if not isinstance(tensor, Tensor):
            raise self._failure(f"read {type(tensor).__name__} for the tensor {name!a}")
        if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, tuple(info.shape)):
            raise self._failure(
                f"read {tensor.dtype} {list(tensor.shape)} for the tensor {name!a}, which is {info.dtype} {list(info.shape)}"
            )
        return tensor

    def _failure(self, problem: str) -> PluginError:
        return PluginError(
            "QC-PLUGIN-006",
            f"plugin {self._distribution} {problem}",
            hint="report it to the plugin's author, or uninstall the plugin",
        )


def model_problems(model: object) -> Iterator[str]:
    """Yield what is wrong with what `load_model` returned, in the order in which one check relies on those before it."""
    from qconvert.ir.model import Model  # here: who asks for data needs no torch

    if not isinstance(model, Model):
        yield f"it returned {type(model).__name__}, not a Model"
        return
    if not isinstance(model.task, Task):
        yield f"its task {model.task!r} is none of {', '.join(TASKS)}"
    if model.module.training:
        yield "its module is in training mode; call module.eval()"
    modules = {name for name, _ in model.module.named_modules()}
    for block in model.blocks:
        if block not in modules:
            yield f"its block {block!r} is no module of it"
    stored = getattr(model.source, "tensors", None)
    if stored is None:
        yield f"its source is {type(model.source).__name__}, which has no tensors"
        return
    for name, shape in model.parameter_shapes.items():
        tensor = stored.get(model.stored_name(name))
        if tensor is None:
            yield f"its source has no tensor {model.stored_name(name)!r}, which the parameter {name!r} is read from"
        elif tuple(tensor.shape) != shape:
            yield f"tensor {model.stored_name(name)!r} is {list(tensor.shape)}, but the parameter {name!r} is {list(shape)}"


def data_problems(path: object) -> Iterator[str]:
    """Yield what is wrong with what `find_data` returned."""
    if not isinstance(path, Path):
        yield f"it returned {type(path).__name__}, not a Path"
    elif not path.is_file():
        yield f"it returned {str(path)!r}, which is no file"
