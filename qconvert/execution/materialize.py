"""The parameters of one unit of a model, real within a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qconvert.ir.model import Model

ReadParameter = Callable[[str], Tensor]


@contextmanager
def materialize(model: Model, unit: str, read: ReadParameter | None = None, device: str = "cpu") -> Iterator[None]:
    """Make the parameters of one unit real float32 tensors within the context; afterwards they are what they were.

    unit: a block, or "" for everything outside the blocks. Its buffers are moved to `device` too.
    read: parameter name (as the module has it) -> tensor; unset: the model's own, each tied tensor read once. float32
        tensors on the CPU are used without a copy, so they are never to be written to.
    """
    with ExitStack() as undo:
        loaded: dict[str, nn.Parameter] = {}
        for prefix, module in list(_modules(model, unit)):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{leaf}" if prefix else leaf
                key = model.stored_name(name) if read is None else name
                if key not in loaded:
                    tensor = (read or model.read)(name).to(device=device, dtype=torch.float32)
                    loaded[key] = nn.Parameter(tensor, requires_grad=False)
                undo.callback(setattr, module, leaf, parameter)
                setattr(module, leaf, loaded[key])
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                undo.callback(setattr, module, leaf, buffer)
                setattr(module, leaf, buffer.to(device))
        yield


def _modules(model: Model, unit: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a unit, each once, by its first name there."""
    root = model.module.get_submodule(unit)
    seen: set[nn.Module] = set()
    for name, module in root.named_modules(prefix=unit, remove_duplicate=False):
        if model.block_of(name) == unit and module not in seen:
            seen.add(module)
            yield name, module
