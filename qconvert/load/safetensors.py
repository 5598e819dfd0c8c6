"""Safetensors files: headers that are checked in full before any tensor is believed, data that is mapped.

Layout: 8 bytes little-endian N, N bytes of JSON, tensor data. The safetensors library takes the last of two equal
keys silently, and says neither which tensors a truncated file lacks nor that it is a Git LFS pointer: hence our own.
"""

from __future__ import annotations

import logging
import math
import mmap
import reprlib
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.model import TensorInfo
from qconvert.load.folder import INDEX, SINGLE, parse_json, read_weight_map, refuse_git_lfs_pointer, weight_files
from qconvert.storage.reader import DTYPES

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

# Linux reserves memory for a private writable mapping unless told not to; the value is not in Python's mmap before 3.13.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0

_DOWNLOAD_AGAIN = "download the file again, complete; compare its size and sha256 with the publisher's"

log = logging.getLogger("qconvert")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of one file: what it is, and where its bytes lie, counted from the start of the file."""

    info: TensorInfo
    start: int
    stop: int


class SafetensorsSource:
    """The tensors of one or more safetensors files, read as views of mapped memory. A TensorSource."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: file name -> path. Reads every header; raises InputError (QC-INPUT-004 to 008, 010)."""
        self._entries: dict[str, tuple[Path, Entry]] = {}
        owner: dict[str, str] = {}
        for file, path in files.items():
            for name, entry in read_header(path).items():
                if name in owner:
                    raise InputError(
                        "QC-INPUT-010",
                        f"tensor {name!a} is in two files: {owner[name]!a} and {file!a}",
                        hint="remove the file that does not belong to this checkpoint",
                    )
                owner[name] = file
                self._entries[name] = (path, entry)
        self.paths = dict(files)
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, (_, entry) in self._entries.items()}
        self.files: Mapping[str, str] = owner
        self._maps: dict[Path, mmap.mmap] = {}
        _warn_of_confusable_names(self.tensors)

    def read(self, name: str) -> Tensor:
        """A view of the mapped file: no byte is read before it is used, and the file can't be changed through it."""
        path, entry = self._entries[name]
        dtype, shape = entry.info.dtype, entry.info.shape
        if entry.start == entry.stop:
            return torch.empty(shape, dtype=dtype)
        mapped = self._map(path)
        if entry.start % dtype.itemsize:  # the format does not promise alignment; kernels want it
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start)
            return raw.clone().view(dtype).reshape(shape)
        return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=entry.start).reshape(shape)

    def _map(self, path: Path) -> mmap.mmap:
        """The whole file, mapped once. Pages are private: a tensor that is written to by mistake neither changes the
        file nor kills the process, as read-only pages would."""
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(
                    file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        return self._maps[path]


def open_folder(folder: Path) -> SafetensorsSource:
    """The weights of a checkpoint folder, sharded or not.

    Raises InputError QC-INPUT-002 to 010; paths are checked before a shard is opened. Warns of other safetensors files.
    """
    weight_map = read_weight_map(folder)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if others := sorted({path.name for path in folder.glob("*.safetensors")} - set(names)):
        log.warning("not read: %s; the model is in %s", ", ".join(map(ascii, others)), SINGLE if weight_map is None else INDEX)
    source = SafetensorsSource(weight_files(folder, names))
    if weight_map is not None:
        _check_index(weight_map, source)
    return source


def _check_index(weight_map: Mapping[str, str], source: SafetensorsSource) -> None:
    for name, file in weight_map.items():
        if source.files.get(name) != file:
            place = f"is in {source.files[name]!a}" if name in source.files else "is in no shard"
            raise InputError(
                "QC-INPUT-010",
                f"{INDEX} says that tensor {name!a} is in {file!a}, but it {place}",
                hint=_DOWNLOAD_AGAIN,
            )
    for name, file in source.files.items():
        if name not in weight_map:
            raise InputError(
                "QC-INPUT-010",
                f"shard {file!a} holds tensor {name!a}, which {INDEX} does not name",
                hint=_DOWNLOAD_AGAIN,
            )


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file, in the order of its header. Only the header is read.

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


def _warn_of_confusable_names(tensors: Mapping[str, TensorInfo]) -> None:
    seen: dict[str, str] = {}
    for name in tensors:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            log.warning("tensor names %s and %s look the same (equal after Unicode normalisation)", ascii(twin), ascii(name))
