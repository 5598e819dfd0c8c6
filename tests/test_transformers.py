"""An output folder in transformers, loaded with the call that README and card show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_llama, tiny_t5
from torch import Tensor

from qconvert import pipeline
from qconvert.ir.reader import read_index, read_layer
from qconvert.ir.report import Report
from qconvert.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick", "quiet")

MIXED = {"*.down_proj": "int8-g32", "*.up_proj": "int8-channel", "*.gate_proj": "int8-channel-a8"}


def recipe(source: Path, output: Path, rules: dict[str, str] | None = None, **settings: Any) -> Recipe:
    data = {"source": "builtin", "samples": 2, "length": 16}
    listed = [{"pattern": pattern, "scheme": scheme} for pattern, scheme in (rules or {}).items()]
    given = {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, "rules": listed}
    return Recipe.from_settings({**given, **settings})


def dequantized(mine: Recipe) -> dict[str, Tensor]:
    """The weights of the quantized layers as the graphs compute with them, by layer."""
    stored = read_index(mine.output)
    return {name: read_layer(mine.output, layer, stored).dequantize() for name, layer in pipeline.plan(mine).layers.items()}


def parity(report: Report) -> dict[str, str]:
    return {part.target: part.status for part in report.parity}


# --- the dtype of the model ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "rules"),
    [("int8-channel-a8", {}), ("int8-g32", {}), ("int4-g32", MIXED)],
    ids=["int8-channel-a8", "int8-g32", "mixed"],
)
def test_the_weights_are_those_of_the_graph_rounded_once(
    dtype: torch.dtype, scheme: str, rules: dict[str, str], tmp_path: Path
) -> None:
    """Scales are cast to the dtype of the model, where layers stay packed until they are called, and lose nothing."""
    mine = recipe(tiny_llama(tmp_path / "llama", dtype=dtype), tmp_path / "out", rules, scheme=scheme)
    assert parity(pipeline.convert(mine)) == {"cpu": "passed", "transformers": "passed", "float": "passed"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(mine.output)
    assert loaded.dtype == dtype
    loaded(torch.tensor([[5, 6, 7]]))
    for name, weight in dequantized(mine).items():
        assert torch.equal(loaded.get_submodule(name).weight, weight.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_config_names_no_dtype_keeps_that_of_its_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """T5's first tensor, in the order of the names, is the scale of a quantized layer: float16."""
    source = tiny_t5(tmp_path / "t5", dtype=dtype)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    mine = recipe(source, tmp_path / "out", scheme="int4-g32", verify=False)
    pipeline.convert(mine)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(mine.output)
    assert loaded.dtype == transformers.AutoModelForSeq2SeqLM.from_pretrained(source).dtype == dtype
