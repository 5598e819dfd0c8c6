"""An output folder in transformers, loaded with the call that README and card show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from torch import Tensor, nn

from qconvert.errors import UsageError
from qconvert.ir.report import Report
from qconvert.load.folder import carried_files
from qconvert.pipeline import conversion, preparation
from qconvert.recipe import Recipe
from qconvert.storage import compressed_tensors
from qconvert.storage.reader import read_index, read_layer
from qconvert.write import config

pytestmark = pytest.mark.usefixtures("quick", "quiet")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MIXED = {"*.down_proj": "int8-g32", "*.up_proj": "int8-channel", "*.gate_proj": "int8-channel-a8"}


def recipe(source: Path, output: Path, rules: dict[str, str] | None = None, **settings: Any) -> Recipe:
    data = {"source": "builtin", "samples": 2, "length": 16}
    listed = [{"pattern": pattern, "scheme": scheme} for pattern, scheme in (rules or {}).items()]
    given = {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, "rules": listed}
    return Recipe.from_settings({**given, **settings})


def dequantized(mine: Recipe, *, outliers: bool = True) -> dict[str, Tensor]:
    """The weights of the quantized layers as the graphs compute with them, by layer; or with their codes in every column."""
    stored = read_index(mine.output)
    layers = {name: read_layer(mine.output, layer, stored) for name, layer in preparation.plan(mine).layers.items()}
    return {name: (layer if outliers else replace(layer, outliers=None)).dequantize() for name, layer in layers.items()}


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
    assert parity(conversion.convert(mine)) == {"cpu": "passed", "transformers": "passed", "float": "passed"}
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
    conversion.convert(mine)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(mine.output)
    assert loaded.dtype == transformers.AutoModelForSeq2SeqLM.from_pretrained(source).dtype == dtype


# --- the table of schemes in README.md ---

ROWS: dict[str, list[tuple[str, str]]] = {
    "`int4`, `int8` with float activations": [
        ("per-channel", "int4-g32"),
        ("per-channel", "int4-g32-asym"),
        ("per-channel", "int8-channel"),
    ],
    "`int8-channel-a8`, `int8-tensor-a8`, also `-asym`": [
        ("per-channel", "int8-channel-a8"),
        ("zero-point", "int8-tensor-asym-a8"),
    ],
    "llm-int8": [("llm-int8", "int8-channel-a8")],
}
LOADABLE = [pair for pairs in ROWS.values() for pair in pairs]


def test_every_row_that_transformers_loads_is_tried() -> None:
    table = README.partition("| schemes | in ONNX Runtime | in transformers |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    (packed,) = [schemes for schemes, _, loads in cells if "bitsandbytes" in loads]
    assert packed == "`nf4`, `fp4`"  # tried in tests/pipeline/test_nf4.py
    assert [schemes for schemes, _, loads in cells if loads and schemes != packed] == list(ROWS)
    assert all(loads.startswith("as float layers") for schemes, _, loads in cells if loads and schemes != packed)


@pytest.mark.parametrize(("quantizer", "scheme"), LOADABLE, ids="-".join)
def test_its_layers_are_float_layers_before_anything_is_called(quantizer: str, scheme: str, tmp_path: Path) -> None:
    """Activations are not rounded, and of outlier columns nothing is known."""
    options = {"threshold": 0.01} if quantizer == "llm-int8" else {}
    mine = recipe(tiny_bert(tmp_path / "bert"), tmp_path / "out", quantizer=quantizer, scheme=scheme, options=options)
    conversion.convert(mine.model_copy(update={"verify": False}))
    loaded = transformers.AutoModel.from_pretrained(mine.output)
    rows = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for name, weight in dequantized(mine, outliers=False).items():
        layer = loaded.get_submodule(name)
        x = rows[:, : weight.shape[1]]
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias)), name
    if quantizer == "llm-int8":
        columns = dequantized(mine)
        assert any(not torch.equal(columns[name], weight) for name, weight in dequantized(mine, outliers=False).items())


@pytest.mark.parametrize(("scheme", "rules"), [("int8-channel-a8", {}), ("int4-g32", {})], ids=["int8", "int4"])
def test_sentence_transformers_takes_a_folder_of_one_scheme(scheme: str, rules: dict[str, str], tmp_path: Path) -> None:
    mine = recipe(tiny_bert(tmp_path / "bert"), tmp_path / "out", rules, scheme=scheme, verify=False)
    conversion.convert(mine)
    found = SentenceTransformer(str(mine.output), device="cpu").encode(["A sentence.", "Another one."])
    expected = SentenceTransformer(str(tmp_path / "bert"), device="cpu").encode(["A sentence.", "Another one."])
    assert found.shape == expected.shape
    assert float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)) > 0.95


def test_sentence_transformers_finds_the_layers_behind_the_model(tmp_path: Path) -> None:
    """LaBSE, distiluse, GTR and others have a 2_Dense, whose weights are in a folder of their own."""
    bert = Transformer(str(tiny_bert(tmp_path / "bert")))
    width = bert.get_embedding_dimension()
    source = SentenceTransformer(modules=[bert, Pooling(width, pooling_mode="mean"), Dense(width, 16)], device="cpu")
    source.save(str(tmp_path / "source"))
    mine = recipe(tmp_path / "source", tmp_path / "out", scheme="int8-channel-a8", verify=False)
    conversion.convert(mine)
    expected = source.encode(["A sentence.", "Another one."])
    found = SentenceTransformer(str(mine.output), device="cpu").encode(["A sentence.", "Another one."])
    assert found.shape == expected.shape == (2, 16)
    assert float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)) > 0.95


def test_pickled_layers_behind_the_model_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_bert(tmp_path / "bert")
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"a pickle")
    carried_files(source)
    assert "'2_Dense/pytorch_model.bin' is a pickle, and not carried over" in caplog.text


@pytest.mark.parametrize(
    ("scheme", "rules"), [("int8-g32", {}), ("int8-channel-a8", {"*.output.dense": "int4-g32"})], ids=["int8-g32", "mixed"]
)
def test_what_is_unpacked_by_the_first_call_is_nothing_for_sentence_transformers(
    scheme: str, rules: dict[str, str], tmp_path: Path
) -> None:
    mine = recipe(tiny_bert(tmp_path / "bert"), tmp_path / "out", rules, scheme=scheme, verify=False)
    conversion.convert(mine)
    loaded = transformers.AutoModel.from_pretrained(mine.output)
    with pytest.raises((AttributeError, RuntimeError)):
        loaded.forward(torch.tensor([[5, 6, 7]]))
    loaded(torch.tensor([[5, 6, 7]]))
    rounds = [name for name, module in loaded.named_modules() if rounds_activations(module)]
    assert bool(rounds) is bool(rules)


def rounds_activations(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and scheme.input_activations is not None


# --- what would be read wrongly ---


@pytest.mark.parametrize(
    ("scheme", "rules"),
    [
        ("int4-g32-asym", {"*.up_proj": "int4-g32"}),
        ("int4-g32-asym", {"*.up_proj": "int8-channel-a8"}),
        ("int4-g32", {"lm_head": "int8-channel"}),
        ("int8-channel-a8", {"lm_head": "int4-g32"}),
    ],
    ids=["zero points", "zero points beside int8", "embedding", "embedding in int4"],
)
def test_a_second_scheme_that_is_refused_would_be_read_wrongly(
    scheme: str, rules: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As README and docs/recipe.md say of folders with zero points or a quantized embedding."""
    mine = recipe(tiny_llama(tmp_path / "llama"), tmp_path / "out", rules, scheme=scheme, verify=False)
    with pytest.raises(UsageError, match="QC-PLAN-005"):
        preparation.plan(mine)
    monkeypatch.setattr(compressed_tensors, "transformers_refuses", lambda layers, **_: None)
    monkeypatch.setattr(config, "transformers_refuses", lambda layers, **_: None)
    conversion.convert(mine)
    expected = dequantized(mine)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(mine.output)
        loaded(torch.tensor([[5, 6, 7]]))
        right = [torch.equal(loaded.get_submodule(name).weight, weight) for name, weight in expected.items()]
    except Exception:  # of whatever kind: it is not read
        return
    assert not all(right)
