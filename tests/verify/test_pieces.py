"""Models that are too large to be held in float32 are verified piece by piece, with the same findings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import pytest
import torch
from tiny_models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

from qconvert.execution import wide_rows
from qconvert.graph import float_graph, pieces
from qconvert.ir import affine
from qconvert.ort.fed_session import FedSession
from qconvert.ort.large_pieces import TiledSession
from qconvert.ort.session import DEFAULT, SessionSettings
from qconvert.pipeline.conversion import convert
from qconvert.pipeline.verification import verify
from qconvert.recipe import Recipe
from qconvert.report import wording

bfloat16_llama = partial(tiny_llama, dtype=torch.bfloat16)

# Less than one tiny block, so that blocks are cut as well.
TINY_PIECE = 60_000
ROWS = "int8-channel-a8"


@pytest.mark.parametrize(
    ("make", "scheme", "layout"),
    [
        (tiny_llama, "int4-g32", "transformers"),
        (bfloat16_llama, "int8-g32", "transformers"),  # transformers leaves its layers packed until they are called
        (tiny_gpt2, "int8-channel-a8", "onnx"),
        (tiny_bert, "int8-channel-a8", "transformers"),
        (tiny_t5, "int4-g32-asym", "transformers"),
    ],
)
def test_a_model_in_pieces_is_found_to_be_what_it_is_as_a_whole(
    make: Callable[[Path], Path],
    scheme: str,
    layout: Literal["transformers", "onnx"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = make(tmp_path / "source"), tmp_path / "output"
    convert(Recipe(model=str(source), output=output, quantizer="per-channel", scheme=scheme, layout=layout, verify=False))
    whole = verify(output)
    monkeypatch.setattr(pieces, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", TINY_PIECE)
    divided = verify(output)

    assert divided.passed
    assert [part.target for part in divided.parity if part.target != "cpu"] == ["transformers", "float"][layout == "onnx" :]
    assert all(part.status == "passed" for part in divided.parity)
    assert all(part.pieces is None for part in whole.parity)
    for part in divided.parity:
        if part.target == "transformers":  # which loads groups of blocks
            continue
        assert part.pieces is not None
        assert part.pieces > 2
        assert f"run in {part.pieces} pieces" in wording.parity(part)
    (before,), (after,) = whole.fidelity, divided.fidelity
    measures = {"kl", "perplexity_float", "cosine", "max_abs", "top1"}
    found, expected = (part.model_dump(include=measures, exclude_none=True) for part in (after, before))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    (speed,) = divided.latency
    assert speed.float_pieces is not None
    assert speed.float_pieces_measured is not None
    assert 2 < speed.float_pieces_measured <= speed.float_pieces
    assert f", in {speed.float_pieces} pieces, {speed.float_pieces_measured} of them measured)" in wording.latency(speed)
    assert whole.latency[0].float_pieces is None


@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_large_head_in_float_is_multiplied_without_a_copy_of_it(
    logits: Literal["all", "last"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_graph, "LARGE_BYTES", 4 * VOCABULARY * 64 - 1)  # of the head, in float32
    source, output = bfloat16_llama(tmp_path / "source", tie=False), tmp_path / "output"
    recipe = Recipe(model=str(source), output=output, quantizer="absmax", scheme="int4-g32", logits=logits, verify=False)
    convert(recipe)
    nodes = [node.name for node in onnx_ir.load(output / "model.onnx").graph if str(node.name).startswith("lm_head/")]
    assert nodes == ["lm_head/Columns", "lm_head/MatMul", "lm_head/Rows"]
    report = verify(output)
    assert report.passed
    assert all(part.status == "passed" for part in report.parity)


@pytest.mark.parametrize("on_the_left", [False, True])
@pytest.mark.parametrize(("scheme", "of_head"), [("int4-g32", "float"), ("int4-g32", "int8-g32"), (ROWS, ROWS)])
def test_a_large_head_is_compared_with_a_tile_of_it_at_a_time(
    on_the_left: bool, scheme: str, of_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = bfloat16_llama(tmp_path / "source", tie=False), tmp_path / "output"
    rules = [{"pattern": "lm_head", "scheme": of_head}]
    convert(Recipe(model=str(source), output=output, quantizer="absmax", scheme=scheme, rules=rules, verify=False))
    whole = verify(output)
    seen: list[tuple[int, ...]] = []
    own = TiledSession.run_with_ort_values

    def counted(self: TiledSession, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        (found,) = own(self, outputs, feeds)
        seen.append(tuple(found.shape()))
        return [found]

    monkeypatch.setattr(TiledSession, "run_with_ort_values", counted)
    monkeypatch.setattr(pieces, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", TINY_PIECE)
    monkeypatch.setattr(wide_rows, "LARGE_BYTES", 4 * VOCABULARY * 64 - 1)  # of the head, in float32
    monkeypatch.setattr(wide_rows, "TILE_BYTES", TINY_PIECE)
    monkeypatch.setattr(affine, "rows_at_once", lambda columns: 100)
    if on_the_left:
        monkeypatch.setattr(float_graph, "LARGE_BYTES", wide_rows.LARGE_BYTES)
    divided = verify(output)

    assert divided.passed
    assert seen
    assert {shape[-2 if on_the_left else -1] for shape in seen} >= {VOCABULARY}
    (before,), (after,) = whole.fidelity, divided.fidelity
    measures = {"kl", "perplexity_float", "max_abs", "top1"}
    found, expected = (part.model_dump(include=measures) for part in (after, before))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_a_large_embedding_is_looked_up_where_it_lies_and_no_layer_is_slower_for_it(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = bfloat16_llama(tmp_path / "source", tie=False), tmp_path / "output"
    convert(Recipe(model=str(source), output=output, quantizer="absmax", scheme="int4-g32", verify=False))
    opened: list[set[str]] = []

    def seen(model: onnx_ir.Model, read: Callable[[str], torch.Tensor], settings: SessionSettings = DEFAULT) -> FedSession:
        opened.append({node.op_type for node in model.graph})
        return FedSession(model, read, settings)

    monkeypatch.setattr("qconvert.ort.large_pieces.FedSession", seen)
    monkeypatch.setattr(wide_rows, "LARGE_BYTES", 4 * VOCABULARY * 64 - 1)  # of the embedding, in float32
    if not whole:
        monkeypatch.setattr(pieces, "WHOLE_BYTES", 0)
        monkeypatch.setattr(pieces, "PIECE_BYTES", TINY_PIECE)
    assert verify(output).passed
    assert bool(opened) is not whole
    assert all("Gather" in types and "MatMul" not in types for types in opened)
