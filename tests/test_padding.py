"""Batches padded on either side: from a folder, through the command's function, to what each row gives.

transformers' generate and the tokenizers of chat models pad on the left. Each architecture is compared with torch on both
sides in test_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_gpt2, tiny_llama, tiny_t5
from trace_models import build
from transformers import AutoTokenizer

from qconvert import Recipe, convert
from qconvert.errors import InputError
from qconvert.ir.artifact import GRAPH
from qconvert.ort.compare import largest_difference
from qconvert.ort.session import file_session
from qconvert.trace import trace
from qconvert.trace.padding import TokensFirst

TEXTS = ["The class", "A lambda expression makes a function without a name"]
STEPS = 4
# What kernels that round activations to int8 may differ by between a row alone and in a batch; a row that attends to its
# padding is off by more than half.
ROUNDING = 0.05

Logits = list[np.ndarray[Any, Any]]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        pytest.param(tiny_llama, "transformers", id="rotary"),
        pytest.param(tiny_gpt2, "onnx", id="learned-positions"),
    ],
)
def test_a_row_of_a_batch_gives_what_it_gives_alone(
    make: Callable[[Path], Path], layout: str, side: str, tmp_path: Path
) -> None:
    settings = {
        "model": str(make(tmp_path / "source")),
        "output": str(tmp_path / "out"),
        "scheme": "int4-g32",
        "layout": layout,
    }
    report = convert(Recipe.from_settings({**settings, "evaluation": {"samples": 4, "length": 32}}))
    assert report.passed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side=side)
    session = file_session(tmp_path / "out" / GRAPH)
    alone = [continued(session, tokenizer([text], return_tensors="np")) for text in TEXTS]
    together = continued(session, tokenizer(TEXTS, padding=True, return_tensors="np"))
    for step in range(STEPS):
        for row, expected in enumerate(alone):
            assert largest_difference(together[step][row], expected[step][0]) < ROUNDING, f"row {row}, step {step}"


def empty_cache(session: Any, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    return {
        each.name: np.zeros((rows, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }


def continued(session: Any, batch: Any) -> Logits:
    """Logits [rows, vocabulary] of each row's last token, and after it of tokens that are the same for all rows."""
    ids, mask = batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)
    last = [int(np.flatnonzero(row)[-1]) for row in mask]
    cache = empty_cache(session, len(ids))
    names = [each.name for each in session.get_outputs()]
    found: Logits = []
    for step in range(STEPS):
        feeds = {"input_ids": ids, "attention_mask": mask, **cache}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        found.append(outputs["logits"][np.arange(len(ids)), last])
        ids, last = np.full((len(ids), 1), 17 + 31 * step), [0] * len(ids)
        mask = np.concatenate((mask, np.ones_like(ids)), 1)
    return found


@pytest.mark.usefixtures("quick")
def test_a_row_padded_on_the_left_may_be_read_in_pieces(tmp_path: Path) -> None:
    """A long prompt is. The first pieces hold padding alone, or padding and tokens."""
    settings = {"model": str(tiny_llama(tmp_path / "source")), "output": str(tmp_path / "out"), "scheme": "int4-g32"}
    convert(Recipe.from_settings({**settings, "verify": False}))
    session = file_session(tmp_path / "out" / GRAPH)
    tokens, padding = 5 + 13 * np.arange(9), 4
    expected = in_pieces(session, tokens, np.ones_like(tokens), len(tokens))
    ids, mask = np.concatenate((np.zeros(padding, int), tokens)), (np.arange(padding + len(tokens)) >= padding).astype(int)
    for size in (1, 3, 6, len(ids)):
        assert largest_difference(in_pieces(session, ids, mask, size)[padding:], expected) < ROUNDING, size


def in_pieces(session: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Logits [tokens, vocabulary] of one row, of which every run reads the next `size` tokens."""
    cache, names = empty_cache(session, 1), [each.name for each in session.get_outputs()]
    found = []
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        feeds = {"input_ids": ids[None, start:end], "attention_mask": mask[None, :end], **cache}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        found.append(outputs["logits"][0])
    return np.concatenate(found)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_source_of_a_batch_gives_what_it_gives_alone(side: str, tmp_path: Path) -> None:
    settings = {"model": str(tiny_t5(tmp_path / "source")), "output": str(tmp_path / "out"), "scheme": "int4-g32"}
    assert convert(Recipe.from_settings({**settings, "evaluation": {"samples": 4, "length": 32}})).passed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side=side)
    encoder, decoder = (file_session(tmp_path / "out" / f"{part}.onnx") for part in ("encoder", "decoder"))

    def answered(batch: Any) -> np.ndarray[Any, Any]:
        """Logits [rows, tokens, vocabulary] of an answer that is the same for all rows."""
        source = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        _, *cross = encoder.run(None, source)
        kept = dict(zip([each.name for each in encoder.get_outputs()][1:], cross, strict=True))
        rows = len(source["input_ids"])
        feeds = {"input_ids": np.tile([[0, 17, 48]], (rows, 1)), "encoder_attention_mask": source["attention_mask"], **kept}
        logits: np.ndarray[Any, Any] = decoder.run(["logits"], {**feeds, **empty_cache(decoder, rows)})[0]
        return logits

    together = answered(tokenizer(TEXTS, padding=True, return_tensors="np"))
    for row, text in enumerate(TEXTS):
        assert largest_difference(together[row], answered(tokenizer([text], return_tensors="np"))[0]) < ROUNDING


@pytest.mark.usefixtures("traced_anew")
def test_a_graph_that_leaves_padding_where_it_is_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokensFirst, "applied", lambda self, ids: ids)
    with pytest.raises(InputError, match=r"as one operator: differs from the model by \d"):
        trace(build("llama")[1])


def test_the_axis_of_the_rows_has_the_name_by_which_transformers_js_makes_empty_caches() -> None:
    (graph,) = (model.graph for model in trace(build("llama")[1]).graphs.values())
    assert {str(value.shape[0]) for value in graph.inputs if value.shape is not None} == {"batch_size"}
