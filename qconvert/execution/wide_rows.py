"""Matrices that are too large to be held in float32: their rows are widened where a model computes with them.

They are the embedding and the head of a large model. Of the embedding a batch looks up a few rows, and the head is multiplied
a tile of rows at a time: the 128256 x 8192 of a model with 70 billion weights take 4.2 GB each in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from qconvert.ir import affine

# In float32, of a matrix that is not held whole, and of the rows of it that are widened at once.
LARGE_BYTES, TILE_BYTES = 200_000_000, 64_000_000


class Rows(Protocol):
    """A matrix that gives some of its rows, in any float type: a tensor, or what dequantizes them."""

    @property
    def shape(self) -> torch.Size:
        """The number of rows, and their length."""

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """Return rows by their range, or by their numbers."""


def is_large(shape: Sequence[int]) -> bool:
    """Return whether something of this shape is a matrix that is not held in float32."""
    return len(shape) == 2 and 4 * torch.Size(shape).numel() > LARGE_BYTES


def tiles(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices over the rows of a matrix: TILE_BYTES in float32 at most, in whole slices of `affine.row_blocks`."""
    rows = affine.rows_at_once(shape[1])
    step = rows * max(1, TILE_BYTES // (4 * rows * shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def as_parameter(value: Tensor | Rows, device: str = "cpu", *, in_rows: bool = True) -> nn.Parameter:
    """Return a parameter in float32, without a copy where it is that already.

    in_rows: whether a large matrix of another type is not held as such (see WideRows), but widened where it is used.
    """
    if in_rows and is_large(value.shape) and getattr(value, "dtype", None) != torch.float32:
        return cast(nn.Parameter, WideRows(value, device))
    tensor = value if isinstance(value, Tensor) else value[:]
    return nn.Parameter(tensor.to(device=device, dtype=torch.float32), requires_grad=False)


class WideRows(Tensor):
    """A parameter in float32 that holds no numbers: a lookup widens the rows that it asks for, a linear a tile of rows at a
    time, and whatever else computes with it the whole matrix.
    """

    rows: Rows
    _is_param: bool

    @staticmethod
    def __new__(cls, rows: Rows, device: str) -> WideRows:
        """Make it on a device, where its rows are put when they are used."""
        made = Tensor._make_wrapper_subclass(cls, rows.shape, dtype=torch.float32, device=torch.device(device))
        made.rows = rows
        made._is_param = True  # torch then takes it for an nn.Parameter
        return made

    def __init__(self, rows: Rows, device: str) -> None:
        """Leave all to `__new__`: a tensor has no other."""

    def widened(self, rows: slice | Tensor) -> Tensor:
        """Return some rows in float32."""
        return self.rows[rows].to(device=self.device, dtype=torch.float32)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute lookups and products by rows, and leave all else to torch, which comes to `__torch_dispatch__`."""
        if len(args) > 1 and isinstance(args[1], WideRows):
            if func is functional.embedding and (kwargs or {}).get("max_norm") is None:
                return _looked_up(*args[:2])
            if func is functional.linear:
                return _product(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is a tensor like any other
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Iterable[type], args: tuple[Any, ...], kwargs: dict[Any, Any]) -> Any:  # type: ignore[override]
        """Compute anything else with the whole matrix."""
        args, kwargs = tree_map_only(WideRows, lambda each: each.widened(slice(None)), (args, kwargs))
        return func(*args, **kwargs)


def _looked_up(ids: Tensor, table: WideRows) -> Tensor:
    return table.widened(ids.flatten().cpu()).reshape(*ids.shape, -1)


def _product(x: Tensor, weight: WideRows, bias: Tensor | None = None) -> Tensor:
    """X @ weight^T + bias, for x [..., in]."""
    product = x.new_empty(*x.shape[:-1], len(weight))
    for rows in tiles(weight.shape):
        product[..., rows] = functional.linear(x, weight.widened(rows), None if bias is None else bias[rows])
    return product
