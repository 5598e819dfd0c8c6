"""A Plan, as a table and as a JSON document."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qconvert.errors import printable
from qconvert.graph import cuda_kernels
from qconvert.report import wording
from qconvert.targets import targets_of
from qconvert.targets.cuda import CUDA

if TYPE_CHECKING:
    from qconvert.ir.plan import Deployment, LayerPlan, Plan


def table(plan: Plan) -> RenderableType:
    """Return a table of the plan.

    Layers that differ in nothing but a block's number share a row: 'model.layers.*.mlp.up_proj', a pattern for --rule.
    """
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    rows.add_column("layer", overflow="fold")
    for title in ("count", "[out, in]"):
        rows.add_column(Text(title), justify="right", no_wrap=True)  # as str it would be markup
    rows.add_column("scheme", no_wrap=True)
    rows.add_column("bytes", justify="right", no_wrap=True)
    for name, alike in _alike(plan):
        layer = alike[0]
        shape = f"{layer.out_features}, {layer.in_features}"
        rows.add_row(
            Text(name), str(len(alike)), shape, str(layer.scheme), wording.byte_size(sum(each.nbytes for each in alike))
        )
    summary = Text("\n").join(
        Text(line)
        for line in (
            f"{len(plan.cast)} tensors to cast to {plan.scheme}"
            if plan.cast
            else f"{len(plan.layers)} layers to quantize, {plan.scheme} unless a rule says otherwise",
            f"{_weight_files(plan)}: {wording.byte_size(plan.weights_bytes)} of tensors ({plan.weights_bytes} bytes)",
            *(
                [f"bits: {plan.average_bits:.4g} per quantized weight, with scales and zero points"]
                if plan.average_bits
                else []
            ),
            f"memory: {_peaks(plan)}",
            *([_deployment(plan.deployment)] if plan.deployment else []),
            f"calibration data: {'needed' if plan.calibrated else 'not needed'}",
            *([f"budget: {wording.assignment(plan.assignment)}"] if plan.assignment else []),
            *_cuda(plan),
            *(
                f"{len(names)} in {printable(scheme)}: {wording.some(names)}"
                for scheme, names in wording.other_schemes(plan.layers.values())
            ),
            *(
                f"{len(names)} kept in float, {printable(reason)}: {wording.some(names)}"
                for reason, names in wording.reasons(plan.kept_float)
            ),
            *(
                f"{len(names)} stored but not read, {printable(reason)}: {wording.some(names)}"
                for reason, names in wording.by_reason(plan.unread)
            ),
        )
    )
    return Group(rows, Text(), summary)


def _weight_files(plan: Plan) -> str:
    return wording.some(list(plan.weight_files), limit=1)


def _peaks(plan: Plan) -> str:
    """Word what each stage takes: "about 2.1 GB to verify, ..."."""
    return ", ".join(f"about {wording.byte_size(nbytes)} to {stage}" for stage, nbytes in plan.peaks.items())


def _deployment(part: Deployment) -> str:
    """Word what running takes: "deployed on the CPU: about 1.2 GB when loaded, and 65.5 kB of cache for each token"."""
    words = f"deployed on the CPU: about {wording.byte_size(part.loaded_bytes)} when loaded"
    if part.loading_bytes is not None:
        words += (
            f" ({wording.byte_size(part.loading_bytes)} while loading, and {part.deriving_seconds:.2g} s longer, for prompts)"
        )
    if part.cache_bytes_per_token is None:
        return words
    words += f", and {wording.byte_size(part.cache_bytes_per_token)} of cache for each token"
    if part.cache_bytes is None:
        return words
    return f"{words}, {wording.byte_size(part.cache_bytes)} for all {part.context_length}"


def _cuda(plan: Plan) -> list[str]:
    """Say what the table of CUDA kernels tells of the layers."""
    described = [target.describe for target in targets_of(plan.targets) if target.describe is not None]
    if not described:
        return []
    counted = Counter(describe(layer) for describe in described for layer in plan.layers.values())
    return [
        *(
            f"on CUDA, by the kernels of ONNX Runtime {cuda_kernels.version()}: {count} x {what}"
            for what, count in counted.items()
        ),
        f"for CUDA in qconvert.bin: about {wording.byte_size(plan.cuda_bytes)}, float tensors in its own type above all",
    ]


def document(plan: Plan) -> dict[str, Any]:
    """Return the JSON document of `qconvert plan --json` (schema 1): every layer, every number in bytes."""
    return {
        "schema": 1,
        "scheme": str(plan.scheme),
        "calibrated": plan.calibrated,
        "weights_bytes": plan.weights_bytes,
        "weight_files": list(plan.weight_files),
        "peak_bytes": plan.peak_bytes,
        "peaks": dict(plan.peaks),
        **({"average_bits": plan.average_bits} if plan.average_bits is not None else {}),
        **({"deployment": _deployment_document(plan.deployment)} if plan.deployment else {}),
        **({"cuda_bytes": plan.cuda_bytes} if CUDA in targets_of(plan.targets) else {}),
        **({"assignment": plan.assignment.document()} if plan.assignment else {}),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": [layer.out_features, layer.in_features],
                "scheme": str(layer.scheme),
                "bytes": layer.nbytes,
                **({"reason": layer.reason} if layer.reason else {}),
                **{target.name: target.describe(layer) for target in targets_of(plan.targets) if target.describe is not None},
            }
            for layer in plan.layers.values()
        ],
        "kept_float": [{"name": part.name, "reason": part.reason} for part in plan.kept_float],
        "unread": [{"name": name, "reason": reason} for name, reason in plan.unread.items()],
    }


def _deployment_document(part: Deployment) -> dict[str, float]:
    document = asdict(part) | {"cache_bytes": part.cache_bytes}
    return {name: value for name, value in document.items() if value is not None}


def _alike(plan: Plan) -> list[tuple[str, list[LayerPlan]]]:
    """Layers by printable name. A row with one layer keeps its own name."""
    rows: dict[tuple[str, int, int, str], list[LayerPlan]] = {}
    for layer in plan.layers.values():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        rows.setdefault((pattern, layer.out_features, layer.in_features, str(layer.scheme)), []).append(layer)
    return [(printable(key[0] if len(alike) > 1 else alike[0].name), alike) for key, alike in rows.items()]
