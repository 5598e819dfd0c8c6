"""Safetensors files: headers that are checked in full before any tensor is believed, data that is mapped.

Layout: 8 bytes little-endian N, N bytes of JSON, tensor data. The safetensors library takes the last of two equal
keys silently, and says neither which tensors a truncated file lacks nor that it is a Git LFS pointer: hence our own.
"""

from __future__ import annotations

import logging
import mmap
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.artifact import WEIGHTS, WEIGHTS_INDEX
from qconvert.ir.model import TensorInfo
from qconvert.load.folder import read_weight_map, weight_files
from qconvert.storage.mapped import map_file, mapped_tensor
from qconvert.storage.safetensors import _DOWNLOAD_AGAIN, Entry, read_header

log = logging.getLogger("qconvert")


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
        """Return a view of the mapped file: no byte is read before it is used, and the file can't be changed through it."""
        path, entry = self._entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.info.shape, dtype=entry.info.dtype)
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return mapped_tensor(self._maps[path], entry.start, entry.info.dtype, entry.info.shape)


def open_folder(folder: Path) -> SafetensorsSource:
    """Open the weights of a checkpoint folder, sharded or not.

    Raises InputError QC-INPUT-002 to 010; paths are checked before a shard is opened. Warns of other safetensors files.
    """
    weight_map = read_weight_map(folder)
    names = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    if others := sorted({path.name for path in folder.glob("*.safetensors")} - set(names)):
        log.warning(
            "not read: %s; the model is in %s", ", ".join(map(ascii, others)), WEIGHTS if weight_map is None else WEIGHTS_INDEX
        )
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
                f"{WEIGHTS_INDEX} says that tensor {name!a} is in {file!a}, but it {place}",
                hint=_DOWNLOAD_AGAIN,
            )
    for name, file in source.files.items():
        if name not in weight_map:
            raise InputError(
                "QC-INPUT-010",
                f"shard {file!a} holds tensor {name!a}, which {WEIGHTS_INDEX} does not name",
                hint=_DOWNLOAD_AGAIN,
            )


def _warn_of_confusable_names(tensors: Mapping[str, TensorInfo]) -> None:
    seen: dict[str, str] = {}
    for name in tensors:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            log.warning("tensor names %s and %s look the same (equal after Unicode normalisation)", ascii(twin), ascii(name))
