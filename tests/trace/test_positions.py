"""How many tokens a model takes: what is said of it is what the graph takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from tiny_models import VOCABULARY, save_checkpoint, tiny_gpt2, tiny_llama, tiny_t5
from transformers import RobertaConfig, RobertaModel

from qconvert import Recipe, convert
from qconvert.errors import UsageError
from qconvert.execution.probes import position_limit
from qconvert.ir.artifact import CARD, GENAI_CONFIG, GRAPH, REPORT
from qconvert.ir.report import Report
from qconvert.load.hugging_face import load_folder
from qconvert.ort.compare import feed
from qconvert.ort.session import file_session

POSITIONS = 256  # of the tiny decoders


def converted(source: Path, output: Path, length: int = 32, **settings: Any) -> Report:
    data = {"samples": 4, "length": length}
    named = {"model": str(source), "output": str(output), "scheme": "int8-channel", "calibration": data, "evaluation": data}
    return convert(Recipe.from_settings({**named, **settings}))


@pytest.mark.parametrize(
    ("make", "layout"),
    [pytest.param(tiny_llama, "transformers", id="rotary"), pytest.param(tiny_gpt2, "onnx", id="learned")],
)
def test_the_card_and_genai_config_name_what_a_decoder_takes(make: Callable[[Path], Path], layout: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    converted(make(tmp_path / "source"), output, layout=layout, verify=False)
    words = f"A prompt and its answer together are at most {POSITIONS} tokens, as many as the model has positions."
    assert words in (output / CARD).read_text(encoding="utf-8")
    genai = json.loads((output / GENAI_CONFIG).read_text(encoding="utf-8"))
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == POSITIONS
    assert json.loads((output / REPORT).read_text(encoding="utf-8"))["context_length"] == POSITIONS
    session = file_session(output / GRAPH)
    assert logits_of(session, POSITIONS).shape == (1, POSITIONS, VOCABULARY)
    with pytest.raises(InvalidArgument):
        logits_of(session, POSITIONS + 1)


def logits_of(session: Any, length: int) -> np.ndarray[Any, Any]:
    """Of a prompt of so many tokens."""
    ids = (torch.arange(length) * 7 % VOCABULARY)[None]
    logits: np.ndarray[Any, Any] = session.run(None, feed(session, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))[
        0
    ]
    return logits


@pytest.mark.usefixtures("quick")
def test_positions_that_begin_behind_the_padding_token_are_fewer_than_the_table_has_rows(tmp_path: Path) -> None:
    """RoBERTa of 66 rows, of which the first two are never used."""
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=66,
        pad_token_id=1,
    )
    source = save_checkpoint(RobertaModel(config).eval(), tmp_path / "source", sentence_tokens=True)
    with pytest.raises(UsageError, match=r"is 65 tokens, but 'source' has 64 positions") as caught:
        converted(source, tmp_path / "out", length=65)
    assert caught.value.code == "QC-DATA-005"
    assert converted(source, tmp_path / "out", length=64).passed


def test_relative_positions_have_no_limit(tmp_path: Path) -> None:
    """Though T5's config.json names one."""
    source = tiny_t5(tmp_path / "t5")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"n_positions": 512}), encoding="utf-8")
    assert position_limit(load_folder(source)) is None
