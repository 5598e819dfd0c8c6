"""The CUDA provider's kernels, read out of an onnxruntime-gpu: what qconvert/graph/cuda_kernels.json is made from.

Where onnxruntime-gpu is installed, `python tests/support/cuda_registry.py` writes the file anew for its version.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from qconvert.graph import cuda_kernels
from qconvert.trace.capture import OPSET

PROVIDER = "CUDAExecutionProvider"
# Of the ops of com.microsoft, those that are emitted; what ONNX Runtime makes of a graph by itself, it has kernels for.
EMITTED = (
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "MatMulNBits",
    "MultiHeadAttention",
    "SkipSimplifiedLayerNormalization",
)
# ONNX Runtime's own mark for "and all later versions".
LATEST = 2**31 - 1
Row = tuple[str, str, tuple[int, int], dict[str, list[str]]]


def registered() -> list[Row]:
    """(domain, op, first and last version, type parameter -> types) of every kernel. No kernel is run for that."""
    return [
        (kernel.domain, kernel.op_name, kernel.version_range, dict(kernel.type_constraints))
        for kernel in runtime.get_all_opkernel_def()
        if kernel.provider == PROVIDER
    ]


def operators(kernels: list[Row]) -> list[dict[str, Any]]:
    """One record per op that has a kernel at opset OPSET, as cuda_kernels.json has them."""
    schemas: dict[tuple[str, str], list[Any]] = {}
    for schema in runtime.get_all_operator_schema():
        schemas.setdefault((schema.domain, schema.name), []).append(schema)
    records = []
    for (domain, op), versions in sorted(schemas.items()):
        if domain not in ("", "com.microsoft") or (domain and op not in EMITTED):
            continue
        current = [schema for schema in versions if schema.since_version <= OPSET]
        if not current:
            continue
        schema = max(current, key=lambda schema: schema.since_version)
        later = [other.since_version - 1 for other in versions if other.since_version > schema.since_version]
        types = [
            {name: sorted(text for text in map(_plain, types) if "(" not in text) for name, types in constraints.items()}
            for _, _, (first, last), constraints in (row for row in kernels if row[:2] == (domain, op))
            if _serves(first, last, schema.since_version)
        ]
        types = [row for row in types if all(row.values())]  # without those on sequences and optionals
        if types:
            records.append(
                {
                    "domain": domain,
                    "op": op,
                    "since": schema.since_version,
                    "until": min(later, default=None),
                    "inputs": [_plain(each.typeStr) for each in schema.inputs],
                    "outputs": [_plain(each.typeStr) for each in schema.outputs],
                    "types": _merged(types),
                }
            )
    return records


def _serves(first: int, last: int, version: int) -> bool:
    """ONNX Runtime's rule: an open-ended kernel serves the version of the op that it was written for, and no later one."""
    return first == version or (first < version <= last < LATEST)


def _plain(text: str) -> str:
    """ "tensor(float16)" -> "float16"; a type parameter stays."""
    match = re.fullmatch(r"tensor\((\w+)\)", text)
    return match[1] if match else text


def _merged(rows: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    """The same combinations of types in fewer rows: two that differ in one parameter become one."""
    merged = sorted(rows, key=json.dumps)
    again = True
    while again:
        again = False
        for row in merged:
            for other in merged:
                differing = [name for name in row if row[name] != other.get(name)]
                if other is not row and row.keys() == other.keys() and len(differing) == 1:
                    row[differing[0]] = sorted({*row[differing[0]], *other[differing[0]]})
                    merged = [kept for kept in merged if kept is not other]
                    again = True
                    break
            if again:
                break
    return merged


def main() -> None:
    known = json.loads(cuda_kernels.TABLE.read_text(encoding="utf-8")) if cuda_kernels.TABLE.exists() else {}
    lines = ",\n  ".join(json.dumps(record) for record in operators(registered()))
    known |= {"onnxruntime": onnxruntime.__version__, "opset": OPSET}
    known.pop("operators", None)
    head = json.dumps(known, indent=1)
    Path(cuda_kernels.TABLE).write_text(
        f'{head.removesuffix(chr(10) + "}")},\n "operators": [\n  {lines}\n ]\n}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
