"""A safetensors file that is written tensor by tensor, with its header put in place last.

Why last: whether a scale is float16 or float32 is known only when it has been computed. The space is reserved from
the plan; the header may be padded with spaces (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.artifact import StoredTensor
from qconvert.ir.model import TensorInfo
from qconvert.storage.digest import tensor_bytes
from qconvert.storage.disk import disk_errors, fsync
from qconvert.storage.git_lfs import refuse_git_lfs_pointer
from qconvert.storage.json_text import parse_json

# One key at most: with more, safetensors 0.8 writes them in random order, so nobody could compare files.
METADATA = {"format": "pt"}


class SafetensorsFile:
    """One file of weights: model.safetensors, or one of its shards.

    largest: what will be appended, in the dtypes that take most space.
    tensors: what an earlier run has appended; the next tensor goes behind it.
    """

    def __init__(self, path: Path, largest: Mapping[str, TensorInfo], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        total = sum(info.nbytes for info in largest.values())
        widest = _header({name: (info.dtype, info.shape, total, total) for name, info in largest.items()})
        self.begin = 8 + len(widest) + -len(widest) % 8  # the data begins at a multiple of 8
        self.end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=self.begin)
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.file = os.fdopen(descriptor, "r+b")
            _allocate(descriptor, self.begin + total)
            self.file.seek(self.end)

    def append(self, tensor: Tensor) -> StoredTensor:
        """Write a tensor behind the last one. Raises ResourceError QC-DISK-002 on a full disk."""
        data = tensor_bytes(tensor)
        stored = StoredTensor(self.path.name, tensor.dtype, tuple(tensor.shape), self.end, data.nbytes)
        with disk_errors(self.path):
            self.file.write(data)
        self.end += data.nbytes
        return stored

    def sync(self) -> None:
        """Put all that was written on disk. Raises ResourceError (disk)."""
        with disk_errors(self.path):
            self.file.flush()
            fsync(self.path)
            fsync(self.path.parent)

    def finish(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Write the header for `tensors`, all of the file's, and cut off what was reserved but not needed."""
        header = _header(
            {
                name: (tensor.dtype, tensor.shape, tensor.offset - self.begin, tensor.offset - self.begin + tensor.nbytes)
                for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset)
            }
        )
        length = self.begin - 8
        with disk_errors(self.path):
            self.file.seek(0)
            self.file.write(length.to_bytes(8, "little") + header.ljust(length))
            self.file.truncate(self.end)
        self.sync()

    def close(self) -> None:
        """Close the file, which need not be complete. Raises ResourceError (disk)."""
        with disk_errors(self.path):
            self.file.close()


def _header(entries: Mapping[str, tuple[Any, tuple[int, ...], int, int]]) -> bytes:
    """JSON header from name -> (dtype, shape, first byte, last byte + 1)."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    for name, (dtype, shape, begin, end) in entries.items():
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(header, separators=(",", ":")).encode()


def _allocate(descriptor: int, size: int) -> None:
    """Take the disk space now, so that a full disk is known before the work is done. Some file systems can't."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


# safetensors' names of the dtypes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

_DOWNLOAD_AGAIN = "download the file again, complete; compare its size and sha256 with the publisher's"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of one file: what it is, and where its bytes lie, counted from the start of the file."""

    info: TensorInfo
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return every tensor of the file, in the order of its header. Only the header is read.

    Raises InputError: QC-INPUT-004 Git LFS pointer, 005 header, 006 empty or truncated, 007 tensors that contradict
    their bytes, 008 a dtype that torch can't hold.
    """
    refuse_git_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise _truncated(path, "a header length of 8", size)
        if length > MAX_HEADER_BYTES:
            raise _bad_header(path, f"claims {length} bytes; the limit is {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise _truncated(path, f"a header of {length}", size - 8)
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _bad_header(path, f"is not valid: {error}") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_coverage(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    """One tensor of the header; further fields are allowed."""
    if not isinstance(value, dict):
        raise _bad_header(path, f"has no object for tensor {name!a}")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _bad_tensor(
            path,
            name,
            f"dtype {_short(dtype)}, shape {_short(shape)}, data_offsets {_short(offsets)} describe no tensor",
        )
    if dtype not in DTYPES:
        raise InputError(
            "QC-INPUT-008",
            f"{path}: tensor {name!a} has dtype {dtype!a}",
            hint=f"convert it to one of {', '.join(DTYPES)}",
        )
    info = TensorInfo(DTYPES[dtype], tuple(shape))
    start, stop = offsets
    # Python's integers don't overflow: a shape whose product exceeds 2^64 simply isn't the number of bytes.
    nbytes = math.prod(shape) * info.dtype.itemsize
    if stop - start != nbytes:
        raise _bad_tensor(path, name, f"{dtype} {shape} takes {nbytes} bytes, but data_offsets {offsets} span {stop - start}")
    if any(length >= 2**63 for length in shape):  # next to a length of 0
        raise _bad_tensor(path, name, f"shape {shape} is too large")
    return Entry(info, data_start + start, data_start + stop)


def _short(value: Any) -> str:
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors must lie back to back from the header to the end of the file."""
    end, previous = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            problem = "overlaps" if entry.start < end else f"leaves a hole of {entry.start - end} bytes after"
            raise _bad_tensor(path, name, f"begins at byte {entry.start} and {problem} {previous}, which ends at {end}")
        end, previous = entry.stop, ascii(name)
    if end > size:
        lost = [ascii(name) for name, entry in entries.items() if entry.stop > size]
        raise _truncated(path, f"{len(entries)} tensors and a size of {end}", size, lost)
    if end < size:
        raise InputError(
            "QC-INPUT-007",
            f"{path}: {size - end} bytes after the last tensor belong to none ({size} bytes, expected {end})",
            hint=_DOWNLOAD_AGAIN,
        )


def _truncated(path: Path, expected: str, actual: int, lost: list[str] | None = None) -> InputError:
    what = "is empty" if path.stat().st_size == 0 else "is truncated"
    message = f"{path} {what}: expected {expected} bytes, found {actual}"
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        message += f"; tensors cut off or missing: {', '.join(lost[:5])}{more}"
    return InputError("QC-INPUT-006", message, hint=_DOWNLOAD_AGAIN)


def _bad_header(path: Path, problem: str) -> InputError:
    return InputError("QC-INPUT-005", f"{path}: the safetensors header {problem}", hint=_DOWNLOAD_AGAIN)


def _bad_tensor(path: Path, name: str, problem: str) -> InputError:
    return InputError("QC-INPUT-007", f"{path}: tensor {name!a}: {problem}", hint=_DOWNLOAD_AGAIN)
