"""Reading data files: records of text, and arrays."""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from qconvert.errors import InputError, in_one_line
from qconvert.ir.data_source import ARRAYS_SUFFIX, BUILTIN, TEXT_SUFFIXES, data_file, unreadable

# How many bytes one byte of a part of an .npz file becomes at most: numpy stores arrays as they are, or deflates them.
LARGEST_EXPANSION = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}

MIN_PROSE_WORDS = 8  # shorter paragraphs of the builtin text are headings and captions


def read_records(source: str) -> Iterator[str]:
    """Yield texts that are never blank: the lines of a .txt, the "text" of each line of a .jsonl, the column "text" of a
    .parquet, or the paragraphs of `builtin`.

    Raises InputError QC-DATA-001 for a file that is missing, unreadable or damaged, QC-DATA-003 for a record without a
    text; UsageError QC-DATA-002 for a source that is none of these.
    """
    if source == BUILTIN:
        yield from _builtin_prose()
        return
    path = data_file(source, TEXT_SUFFIXES)
    readers = {".txt": _lines, ".jsonl": _json_texts, ".parquet": _parquet_texts}
    with _readable(path):
        for text in readers[path.suffix](path):
            if text.strip():
                yield text


def read_arrays(source: str) -> dict[str, Tensor]:
    """Return the arrays of an .npz file, where pickled objects are refused. Raises InputError QC-DATA-001."""
    path = data_file(source, (ARRAYS_SUFFIX,))
    with _readable(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not an archive of named arrays, as numpy.savez writes it")
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _check_sizes(path: Path) -> None:
    """Raises ValueError for an array that claims to be larger than the file can hold: numpy asks for the memory before it
    reads. A part of the archive claims a size, and the array within it claims a shape."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type not in LARGEST_EXPANSION:
                raise ValueError(f"{part.filename!r} is compressed in a way that numpy does not write")
            compressed = min(part.compress_size, path.stat().st_size)
            most = min(part.file_size, LARGEST_EXPANSION[part.compress_type] * compressed)
            with archive.open(part) as file:
                shape, dtype = _array_header(file)
            claimed = max(part.file_size, math.prod(shape) * dtype.itemsize)
            if claimed > most:
                raise ValueError(f"{part.filename!r} claims {claimed} bytes, of which the file holds {most} at most")


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"an array in format {version} is not one of numbers")
    shape, _, dtype = readers[version](file)
    return shape, dtype


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        RuntimeError,  # what zipfile raises where a part is encrypted
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise unreadable(path, in_one_line(error)) from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from file


def _json_texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_record(path, f"line {number} is not JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise _bad_record(path, f'line {number} has no string field "text"')
        yield text


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        if columns.get("text") not in ("string", "large_string", "string_view"):
            raise _bad_record(path, f'it has no column "text" of strings, but {columns}')
        for batch in file.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _builtin_prose() -> Iterator[str]:
    """English technical prose that every Python brings along: paragraphs of the language reference."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = " ".join(paragraph.split())
            is_prose = text[:1].isupper() and text[-1:] in (".", ":") and "::=" not in text and ">>>" not in text
            if is_prose and text.count(" ") >= MIN_PROSE_WORDS - 1:
                yield text


def _bad_record(path: Path, problem: str) -> InputError:
    return InputError("QC-DATA-003", f"{str(path)!r}: {problem}", hint='every record needs a string named "text"')
