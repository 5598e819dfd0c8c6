"""Casts to floats of half the width: from a folder to a verified one, and what such a type can't hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from transformers import AutoModel

from qconvert.cli import main
from qconvert.errors import InputError, UsageError
from qconvert.ir.artifact import WEIGHTS
from qconvert.ir.report import Report
from qconvert.ir.rounding import loss_of
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CNN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
    def forward(self, pixels):
        return self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))

def make():
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 1, 8, 8))
    return net.eval(), {"pixels": torch.randn(32, 1, 8, 8)}
"""


def module(folder: Path) -> str:
    folder.mkdir()
    (folder / "cnn.py").write_text(CNN)
    return f"module:{folder / 'cnn.py'}:make"


def cast(source: Path | str, output: Path, scheme: str | None = "float16", **settings: Any) -> Report:
    named = {"model": str(source), "output": str(output), "quantizer": "cast", **({"scheme": scheme} if scheme else {})}
    return convert(Recipe.from_settings({**named, **settings}))


def spoiled(folder: Path, values: dict[str, float]) -> Path:
    """A tiny BERT of which some tensors have one value of another size."""
    tiny_bert(folder)
    tensors = load_file(folder / WEIGHTS)
    for name, value in values.items():
        tensors[name].view(-1)[5] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        *((make, "float16") for make in (tiny_llama, tiny_bert, tiny_t5, module)),
        *((make, "bfloat16") for make in (tiny_llama, module)),
    ],
)
def test_every_float_is_stored_in_half_the_width_and_the_folder_computes_what_it_says(
    make: Callable[[Path], Path | str], scheme: str, tmp_path: Path, quick: None
) -> None:
    source, output = make(tmp_path / "source"), tmp_path / "out"
    report = cast(source, output, scheme)
    assert report.passed
    assert {part.target for part in report.parity} == {"cpu", "float"} | ({"transformers"} if make is not module else set())
    assert report.size.average_bits == 16
    (lost,) = report.fidelity
    assert lost.kl is None or lost.kl < 1e-4
    assert lost.cosine is None or lost.cosine > 0.9999
    with safe_open(output / WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    floats = {name for name, tensor in stored.items() if tensor.is_floating_point()}
    assert {stored[name].dtype for name in floats} == {DTYPES[scheme]}
    assert {layer.name for layer in report.layers} == floats
    assert sum(layer.bytes for layer in report.layers) == sum(2 * stored[name].numel() for name in floats)
    assert all(0 <= layer.relative_error < {"float16": 5e-4, "bfloat16": 4e-3}[scheme] for layer in report.layers)
    if make is not module:
        original = load_file(Path(source) / WEIGHTS)
        assert all(torch.equal(stored[name], original[name].to(DTYPES[scheme])) for name in floats)
        assert json.loads((output / "config.json").read_text())["dtype"] == scheme
        assert AutoModel.from_pretrained(output).dtype == DTYPES[scheme]


def test_without_a_scheme_it_is_float16_and_a_second_run_writes_the_same(tmp_path: Path) -> None:
    source = tiny_bert(tmp_path / "source")
    reports = [cast(source, tmp_path / name, None, verify=False) for name in ("a", "b")]
    assert [report.scheme for report in reports] == ["float16", "float16"]
    files = ("model.safetensors", "model.onnx", "qconvert.bin", "config.json")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_what_is_too_large_is_refused_with_every_name_and_value_and_bfloat16_takes_it(tmp_path: Path, quick: None) -> None:
    query, pooler = "encoder.layer.1.attention.self.query.weight", "pooler.dense.bias"
    source = spoiled(tmp_path / "source", {query: 7e4, pooler: -1e6})
    with pytest.raises(InputError) as refused:
        cast(source, tmp_path / "out")
    assert refused.value.code == "QC-CAST-003"
    assert f"{query} holds 70000" in refused.value.message
    assert f"{pooler} holds -1e+06" in refused.value.message
    assert "65504" in refused.value.message
    assert "bfloat16" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()
    assert cast(source, tmp_path / "out", "bfloat16").passed


def test_the_command_refuses_with_exit_code_3_and_leaves_nothing(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", {"embeddings.LayerNorm.weight": 7e4})
    arguments = ["--model", str(source), "--output", str(tmp_path / "out"), "--quantizer", "cast", "--scheme", "float16"]
    found = CliRunner().invoke(main, ["run", *arguments, "--json"])
    assert found.exit_code == 3
    error = json.loads(found.stdout)["error"]
    assert error["code"] == "QC-CAST-003"
    assert "embeddings.LayerNorm.weight holds 70000" in error["message"]
    assert not (tmp_path / "out").exists()


def test_the_largest_number_and_what_rounds_to_it_are_no_overflow(tmp_path: Path) -> None:
    """65519 is nearer to 65504 than to the next step, 65536."""
    source = spoiled(tmp_path / "source", {"pooler.dense.bias": 65519.0})
    cast(source, tmp_path / "out", verify=False)
    assert float(load_file(tmp_path / "out" / WEIGHTS)["pooler.dense.bias"][5]) == 65504


def test_what_is_too_small_is_named_with_its_number_and_size(tmp_path: Path) -> None:
    name = "pooler.dense.weight"
    source = spoiled(tmp_path / "source", {name: 2e-8})
    layers = {layer.name: layer for layer in cast(source, tmp_path / "out", verify=False).layers}
    assert layers[name].zeroed == 1
    assert layers[name].largest_zeroed == pytest.approx(2e-8)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{name}: 1 value became 0 in float16, the largest was 2e-08" in card
    assert "bfloat16 has numbers that small" in card
    exact = {layer.name: layer for layer in cast(source, tmp_path / "other", "bfloat16", verify=False).layers}
    assert exact[name].zeroed is None


def test_a_loss_is_measured_as_numpy_measures_it() -> None:
    tensor = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 1e-6
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = 1e5, -3e5, -float("inf")  # the last is a mask's
    rounded = tensor.half()
    loss = loss_of(tensor, rounded)
    wanted, found = tensor.double().numpy(), rounded.double().numpy()
    finite = np.isfinite(wanted) & np.isfinite(found)
    gone = (found == 0) & (wanted != 0)
    assert loss.beyond == -3e5
    assert (loss.zeroed, loss.largest_zeroed) == (gone.sum(), np.abs(wanted[gone]).max())
    expected = np.linalg.norm(wanted[finite] - found[finite]) / np.linalg.norm(wanted[finite])
    assert loss.relative_error == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"quantizer": "cast", "scheme": "int8-channel"}, "QC-CAST-001"),
        ({"quantizer": "absmax", "scheme": "float16"}, "QC-CAST-001"),
        ({"scheme": "bfloat16"}, "QC-CAST-001"),
        ({"quantizer": "cast", "rules": [{"pattern": "*", "scheme": "float"}]}, "QC-CAST-002"),
        ({"quantizer": "cast", "options": {"clip": "mse"}}, "QC-CAST-002"),
        ({"quantizer": "cast", "layout": "onnx"}, "QC-CAST-002"),
        ({"quantizer": "cast", "sequential": True}, "QC-CAST-002"),
        ({"quantizer": "cast", "prefill": "int8"}, "QC-CAST-002"),
        ({"quantizer": "cast", "scheme": "float32"}, "QC-RECIPE-001"),
        ({"quantizer": "per-channel", "rules": [{"pattern": "*", "scheme": "float16"}]}, "QC-RECIPE-001"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as refused:
        Recipe.from_settings({"model": "M", "output": "O", **settings})
    assert refused.value.code == code


def test_a_checkpoint_of_that_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="all are bfloat16 already") as refused:
        cast(tiny_llama(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out", "bfloat16")
    assert refused.value.code == "QC-CAST-004"


def test_bfloat16_becomes_float16_at_the_same_size(tmp_path: Path, quick: None) -> None:
    report = cast(tiny_llama(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out")
    assert report.passed
    assert sum(layer.bytes for layer in report.layers) == report.size.source_bytes


def test_the_plan_says_what_would_be_cast(tmp_path: Path) -> None:
    source = tiny_bert(tmp_path / "source")
    arguments = ["plan", "--model", str(source), "--output", str(tmp_path / "out")]
    arguments += ["--quantizer", "cast", "--scheme", "bfloat16"]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.stderr
    assert "tensors to cast to bfloat16" in found.stdout
    document = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    cast(source, tmp_path / "out", "bfloat16", verify=False)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert document["weights_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert document["calibrated"] is False


@pytest.mark.parametrize(("scheme", "number"), [("float16", onnx.TensorProto.FLOAT16), ("bfloat16", onnx.TensorProto.BFLOAT16)])
def test_the_graph_for_cuda_computes_in_that_type_on_the_same_bytes(scheme: str, number: int, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", tie=False)
    cast(source, tmp_path / "out", scheme, targets=("cpu", "cuda"), verify=False)
    graph = onnx.load(tmp_path / "out" / "model.cuda.onnx", load_external_data=False).graph
    weights = {each.name: each for each in graph.initializer if each.name.endswith(".weight")}
    assert weights
    assert {each.data_type for each in weights.values()} == {number}
    places = {entry.value for each in weights.values() for entry in each.external_data if entry.key == "location"}
    assert places == {WEIGHTS}
    assert {each.type.tensor_type.elem_type for each in graph.output} >= {number}
