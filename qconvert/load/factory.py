"""module:FACTORY: a PyTorch module that the user's own code builds, with example inputs.

The code is taken from the file or, for a dotted name, from the current folder if it is there. What it imports in turn may lie
beside it: that folder is then added to the end of the import path, where a file of it shadows neither Python's modules nor
installed ones. Nothing else that qconvert does looks for code there.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qconvert.errors import InputError, in_one_line, is_out_of_memory
from qconvert.ir.model import Model, TensorInfo
from qconvert.ir.task import MODULE
from qconvert.plugin.host.process_settings import settings_kept
from qconvert.storage.digest import tensor_bytes

logger = logging.getLogger(__name__)

SCHEME = "module:"

_FORMS = "write module:package.module:function or module:path/to/file.py:function"
_CONTRACT = (
    "FACTORY() must return (module, example_inputs); inputs are a tensor, a tuple of tensors, or a dict from name to tensor; "
    "their first axis counts rows, and what is a scalar, or one row beside many, goes with all of them"
)


def load_factory(source: str) -> Model:
    """Call the factory that `source` names and describe the module that it returns, which is left as it is.

    Forms: module:package.module:function, module:package.module.function, module:path/to/file.py:function.
    Raises InputError: QC-INPUT-021 where the factory can't be found or raises, 022 for what it returns.
    """
    code, returned = _call(source)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        raise _broken(source, f"returned {_kind(returned)}")
    module, inputs = returned
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        inside = "_orig_mod" if hasattr(module, "_orig_mod") else "module"
        raise _broken(source, f"returned {_kind(module)}, a wrapper: return the module inside, its .{inside}")
    example_inputs = _named_inputs(source, module, inputs)
    tensors = MemorySource(module, source)
    return Model(
        name=type(module).__name__,
        task=MODULE,
        module=_skeleton(source, module),
        source=tensors,
        tied=tensors.tied,
        input_names=tuple(example_inputs),
        example_inputs=example_inputs,
        input_files={**_files_of(code), "state_dict": tensors.fingerprint()},
    )


def _call(source: str) -> tuple[ModuleType, Any]:
    """The factory's module and what it returned. Its code may set torch's default dtype and the like, which is put back."""
    with settings_kept() as changed:
        code, factory = _find(source)
        try:
            returned = factory()
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                "QC-INPUT-021",
                f"{source!r} raised {type(error).__name__}: {in_one_line(error)}",
                hint="call the factory in Python and repair it",
            ) from error
    if changed:
        logger.warning("%s changed what belongs to the whole process, and is put back: %s", source, ", ".join(changed))
    return code, returned


def _find(source: str) -> tuple[ModuleType, Callable[[], Any]]:
    target = source.removeprefix(SCHEME)
    place, colon, function = target.rpartition(":")
    if not colon:
        place, _, function = target.rpartition(".")
    if not place or not function.isidentifier():
        raise InputError("QC-INPUT-021", f"{source!r} names no factory", hint=_FORMS)
    try:
        code = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except (Exception, SystemExit) as error:
        raise InputError(
            "QC-INPUT-021", f"{source!r}: {place} can't be imported: {type(error).__name__}: {in_one_line(error)}", hint=_FORMS
        ) from error
    factory = getattr(code, function, None)
    if not callable(factory):
        raise InputError("QC-INPUT-021", f"{source!r}: {place} has no function {function!r}", hint=_FORMS)
    return code, factory


def _import_module(name: str) -> ModuleType:
    top = name.partition(".")[0]
    here = PathFinder.find_spec(top, [str(Path.cwd())])
    if here is not None and top not in sys.modules:
        _search_last(Path.cwd())
        if here.loader is not None:  # a folder without __init__.py gives way to an installed package
            _execute(here)
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    _search_last(path.resolve().parent)
    spec = spec_from_file_location(f"_qconvert_factory_{path.stem}", path)
    assert spec is not None  # for every path that ends in .py
    return _execute(spec)


def _execute(spec: ModuleSpec) -> ModuleType:
    assert spec.loader is not None
    code = module_from_spec(spec)
    sys.modules[spec.name] = code  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(code)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return code


def _search_last(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _files_of(code: ModuleType) -> dict[str, Path | bytes]:
    return {Path(file).name: Path(file)} if (file := getattr(code, "__file__", None)) else {}


class MemorySource:
    """The tensors of a module in memory, by state-dict name. A TensorSource.

    tied: name -> name of the tensor that it shares its memory with.
    """

    def __init__(self, module: nn.Module, source: str) -> None:
        """Raises InputError QC-INPUT-022 for tensors without data (meta device)."""
        owners: dict[tuple[object, ...], str] = {}
        self.tied: dict[str, str] = {}
        self._held: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, Tensor):  # a module's extra state
                continue
            if tensor.is_meta:
                raise _broken(source, f"{name!r} is on the meta device and holds no data")
            owner = owners.setdefault(_memory(tensor), name) if tensor.numel() else name
            if owner == name:
                self._held[name] = tensor.detach()
            else:
                self.tied[name] = owner

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the module's state, by its name there."""
        return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._held.items()}

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU, contiguous."""
        return self._held[name].cpu().contiguous()

    def fingerprint(self) -> bytes:
        """Return the sha256 of all tensors: the factory's code may read its weights from anywhere, or train them."""
        digest = hashlib.sha256()
        for name, tensor in self._held.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.digest()


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors have in common if and only if they are the same view of the same memory."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _skeleton(source: str, module: nn.Module) -> nn.Module:
    """A copy of the module's structure: parameters on meta and in float32 (if floating), other tensors copied."""
    try:
        # deepcopy takes from its memo what was copied before: weights never are. What was computed of them, by a hook of the
        # old weight_norm say, it would refuse.
        attributes = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
        memo: dict[int, Any] = {id(tensor): _in_float32(tensor.detach().clone()) for tensor in attributes}
        memo |= {id(parameter): _on_meta(parameter) for parameter in module.parameters()}
        skeleton = copy.deepcopy(module, memo)
    except Exception as error:  # whatever __deepcopy__ of the user's classes raises
        if is_out_of_memory(error):
            raise
        raise _broken(source, f"the module can't be copied: {type(error).__name__}: {in_one_line(error)}") from error
    for part in skeleton.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, _in_float32(buffer))
    return skeleton.eval()


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad=False)


def _named_inputs(source: str, module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Example inputs by the names of forward's parameters, in the order given."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple | list):
        if len(inputs) > len(names):
            raise _broken(
                source, f"{len(inputs)} example inputs, but forward names {len(names)} ({', '.join(names) or 'none'})"
            )
        inputs = dict(zip(names, inputs, strict=False))
    if not isinstance(inputs, Mapping) or not inputs:
        raise _broken(source, f"example inputs are {_kind(inputs)}")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name, tensor in inputs.items():
        if name not in names and not takes_any:
            raise _broken(source, f"forward has no parameter {name!r}; it has {', '.join(names) or 'none'}")
        if not isinstance(tensor, Tensor):
            raise _broken(source, f"example input {name!r} is {_kind(tensor)}; a tensor is wanted")
    rows = {len(tensor) for tensor in inputs.values() if tensor.ndim}
    if not rows or 0 in rows or len(rows - {1}) > 1:
        found = f"{', '.join(map(str, sorted(rows)))} rows" if rows else "no axis that counts rows"
        raise _broken(source, f"example inputs have {found}; the same number, at least 1, is wanted")
    return {name: tensor.detach().cpu() for name, tensor in inputs.items()}


def _kind(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _broken(source: str, problem: str) -> InputError:
    return InputError("QC-INPUT-022", f"{source!r}: {problem}", hint=_CONTRACT)
