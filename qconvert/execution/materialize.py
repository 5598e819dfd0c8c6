"""The parameters of one unit of a model, real within a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qconvert.execution.modules import layer_kind
from qconvert.execution.wide_rows import Rows, as_parameter
from qconvert.ir.model import Model

ReadParameter = Callable[[str], Tensor | Rows]

# Bytes in float32 of a block whose layers are not held together. Blocks of 8B (0.9 GB) are, those of 70B (3.4 GB) are not.
LARGE_BLOCK = 1_000_000_000


@contextmanager
def materialize(model: Model, unit: str, read: ReadParameter | None = None, device: str = "cpu") -> Iterator[None]:
    """Make the parameters of one unit real float32 tensors within the context; afterwards they are what they were.

    The weights of a LARGE_BLOCK's linear layers are read whenever a layer is run, and let go afterwards: one is in memory at a
    time. Of large matrices outside the blocks a few rows are (see execution/wide_rows.py).

    unit: a block, or "" for everything outside the blocks. Its buffers are moved to `device` too.
    read: parameter name (as the module has it) -> tensor, or what gives its rows; unset: the model's own, each tied tensor
        read once. float32 tensors on the CPU are used without a copy, so they are never to be written to.
    """

    def loaded(name: str) -> nn.Parameter:
        return as_parameter((read or model.read)(name), device, in_rows=not unit)

    modules = list(_modules(model, unit))
    with ExitStack() as undo:
        held: dict[str, nn.Parameter] = {}
        one_by_one = bool(unit) and _float_bytes(modules) > LARGE_BLOCK
        for prefix, module in modules:
            parameters = dict(module.named_parameters(recurse=False))
            if one_by_one and layer_kind(module) in ("linear", "conv1d"):
                del parameters["weight"]
                undo.callback(setattr, module, "_parameters", module._parameters)
                module._parameters = _WeightWhenAsked(module._parameters, partial(loaded, f"{prefix}.weight"))
            for leaf, parameter in parameters.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                key = model.stored_name(name) if read is None else name
                if key not in held:
                    held[key] = loaded(name)
                undo.callback(setattr, module, leaf, parameter)
                setattr(module, leaf, held[key])
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                undo.callback(setattr, module, leaf, buffer)
                setattr(module, leaf, buffer.to(device))
        yield


class _WeightWhenAsked(dict[str, nn.Parameter | None]):
    """The parameters of a module, whose weight is read for each who asks for it, until another is put in its place."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], read: Callable[[], nn.Parameter]) -> None:
        super().__init__(parameters)
        self._read: Callable[[], nn.Parameter] | None = read

    def __getitem__(self, name: str) -> nn.Parameter | None:
        return self._read() if name == "weight" and self._read else super().__getitem__(name)

    def __setitem__(self, name: str, parameter: nn.Parameter | None) -> None:
        if name == "weight":
            self._read = None
        super().__setitem__(name, parameter)


def _float_bytes(modules: Sequence[tuple[str, nn.Module]]) -> int:
    """Return what the parameters of some modules take in float32."""
    return sum(
        torch.float32.itemsize * parameter.numel() for _, module in modules for parameter in module.parameters(recurse=False)
    )


def _modules(model: Model, unit: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a unit, each once, by its first name there."""
    root = model.module.get_submodule(unit)
    seen: set[nn.Module] = set()
    for name, module in root.named_modules(prefix=unit, remove_duplicate=False):
        if model.block_of(name) == unit and module not in seen:
            seen.add(module)
            yield name, module
