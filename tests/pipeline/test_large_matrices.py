"""Embeddings and heads that are too large to be held in float32: with the limits lowered, every tiny model has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor

from qconvert.execution import wide_rows
from qconvert.execution.wide_rows import WideRows
from qconvert.ort import pieces
from qconvert.pipeline.conversion import convert
from qconvert.pipeline.verification import verify
from qconvert.recipe import Recipe

TIMED = ("report.json", "README.md")
TINY_TILE = 4 * 64 * 50  # 50 rows of the tiny models' embeddings
MODELS = {
    "llama": partial(tiny_llama, dtype=torch.bfloat16, tie=False),
    "gpt2": partial(tiny_gpt2, dtype=torch.float16),
    "t5": partial(tiny_t5, dtype=torch.bfloat16),
}


def converted(source: Path, output: Path, **settings: Any) -> dict[str, bytes]:
    """The content of every file of an artifact, but for timings."""
    data = {"samples": 4, "length": 16}
    fixed = {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, "layout": "onnx"}
    convert(Recipe.from_settings({**fixed, "verify": False, **settings}))
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.name not in TIMED)
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files if path.name != "qconvert.json"}


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits lowered; how many rows each tile had that was widened."""
    counts: list[int] = []
    own = WideRows.widened

    def counted(self: WideRows, rows: slice | Tensor) -> Tensor:
        found = own(self, rows)
        counts.extend([len(found)] if isinstance(rows, slice) else [])
        return found

    monkeypatch.setenv("QCONVERT_CACHE", "")  # a trace that is known is not checked again
    monkeypatch.setattr(WideRows, "widened", counted)
    monkeypatch.setattr(wide_rows, "LARGE_BYTES", 0)
    monkeypatch.setattr(wide_rows, "TILE_BYTES", TINY_TILE)
    monkeypatch.setattr(pieces, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", TINY_TILE)
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_traced_and_calibrated_on_a_few_rows_at_a_time(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make: Callable[[Path], Path] = MODELS[name]
    source = make(tmp_path / "source")
    expected = converted(source, tmp_path / "whole", quantizer="awq", scheme="int4-g32")
    counts = request.getfixturevalue("widened")
    assert converted(source, tmp_path / "large", quantizer="awq", scheme="int4-g32") == expected
    assert 50 in counts
    assert verify(tmp_path / "large").passed
