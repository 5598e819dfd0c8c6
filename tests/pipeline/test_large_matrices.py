"""Embeddings and heads that are too large to be held in float32: with the limits lowered, every tiny model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor

from qconvert.execution import wide_rows
from qconvert.execution.wide_rows import WideRows
from qconvert.graph import pieces
from qconvert.ir import affine, packing, quantized
from qconvert.ir.quantized import QuantizedTensor
from qconvert.pipeline.conversion import convert
from qconvert.pipeline.verification import verify
from qconvert.quantize import measured
from qconvert.recipe import Recipe

TIMED = ("report.json", "README.md")
TINY_PIECE = 4 * 64 * 50
# How a model is made, and what is asked for: with statistics and folded scales, without either, and an untouched head.
JOBS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llama": (
        partial(tiny_llama, dtype=torch.bfloat16, tie=False),
        {"quantizer": "awq", "scheme": "int4-g32", "rules": {"model.embed_tokens": "int4-g32", "lm_head": "int4-g32"}},
    ),
    "gpt2": (
        partial(tiny_gpt2, dtype=torch.float16),
        {"quantizer": "per-channel", "scheme": "int8-channel-asym-a8", "rules": {"lm_head": "int4-g32-asym"}},
    ),
    "t5": (partial(tiny_t5, dtype=torch.bfloat16), {"quantizer": "awq", "scheme": "int4-g32"}),
}


def converted(source: Path, output: Path, rules: Mapping[str, str] = MappingProxyType({}), **settings: Any) -> dict[str, bytes]:
    """The content of every file of an artifact, but for timings and the manifest."""
    data = {"samples": 4, "length": 16}
    fixed = {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, "layout": "onnx"}
    listed = [{"pattern": pattern, "scheme": scheme} for pattern, scheme in rules.items()]
    convert(Recipe.from_settings({**fixed, "verify": False, "rules": listed, **settings}))
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name not in TIMED)
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files if path.name != "qconvert.json"}


@dataclass
class Seen:
    """How many rows were widened in each tile, and how many rows each matrix had that was quantized in tiles."""

    widened: list[int] = field(default_factory=list)
    quantized: list[int] = field(default_factory=list)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The limits lowered, so that a tile has 50 rows."""
    seen = Seen()
    own_widened, own_stacked = WideRows.widened, quantized.stacked

    def widened(self: WideRows, rows: slice | Tensor) -> Tensor:
        found = own_widened(self, rows)
        seen.widened.extend([len(found)] if isinstance(rows, slice) else [])
        return found

    def stacked(parts: Iterable[QuantizedTensor], rows: int) -> QuantizedTensor:
        seen.quantized.append(rows)
        return own_stacked(parts, rows)

    monkeypatch.setenv("QCONVERT_CACHE", "")  # a trace that is known is not checked again
    monkeypatch.setattr(WideRows, "widened", widened)
    monkeypatch.setattr("qconvert.quantize.stacked", stacked)
    monkeypatch.setattr(wide_rows, "LARGE_BYTES", 0)
    monkeypatch.setattr(wide_rows, "TILE_BYTES", TINY_PIECE)
    monkeypatch.setattr(affine, "rows_at_once", lambda columns: 10)
    monkeypatch.setattr(measured, "COUNTED", 64)  # weights of one row: most tiles have none of those
    monkeypatch.setattr(packing, "CODES_AT_ONCE", TINY_PIECE)
    monkeypatch.setattr(pieces, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", TINY_PIECE)
    return seen


@pytest.mark.parametrize("name", JOBS)
def test_the_same_is_written_if_only_a_few_rows_are_in_float_at_a_time(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make, settings = JOBS[name]
    source = make(tmp_path / "source")
    expected = converted(source, tmp_path / "whole", **settings)
    seen: Seen = request.getfixturevalue("lowered")
    assert converted(source, tmp_path / "large", **settings) == expected
    assert 50 in seen.widened
    assert seen.quantized == [VOCABULARY] * len(settings.get("rules", ()))
    assert verify(tmp_path / "large").passed
