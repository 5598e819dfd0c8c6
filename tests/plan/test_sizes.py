"""Bits per weight and the memory of a deployment: by hand, by `qconvert plan`, and as it was written and measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import sizes
from click.testing import CliRunner
from tiny_models import tiny_bert, tiny_llama

from qconvert.cli import main
from qconvert.ir import affine
from qconvert.ir.artifact import GRAPH, REPORT
from qconvert.ir.layer import LayerKind
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ort.footprint import footprint
from qconvert.plan.sizes import NODE_BYTES, ROWS_NODE_BYTES, RUNTIME_BYTES, average_bits
from qconvert.targets.cpu_sidecar import sidecar_infos, sidecar_tensors

DOCS = Path(__file__).parents[2] / "docs" / "sizes.md"
LLAMA = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)  # quantized weights of the tiny one, in 14 layers
HEAD = 384 * 64


def planned(model: Path, *flags: str) -> dict[str, Any]:
    arguments = ["plan", "--model", str(model), "--output", str(model.parent / "out"), "--quantizer", "per-channel", *flags]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def layer(kind: LayerKind, scheme: str, out: int, width: int) -> LayerPlan:
    return LayerPlan("layer", kind, out, width, QuantScheme.parse(scheme))


@pytest.mark.parametrize(
    ("scheme", "width", "bits"),
    [
        ("int4-g32", 2048, 4 + 16 / 32),
        ("int4-g128", 2048, 4 + 16 / 128),
        ("int4-g32-asym", 2048, 4 + (16 + 2 * 4) / 32),
        ("int8-g32", 2048, 8 + 16 / 32),
        ("int8-channel-a8", 2048, 8 + 32 / 2048),
    ],
)
def test_bits_per_weight_are_those_of_the_formula(scheme: str, width: int, bits: float) -> None:
    shape = 0 if scheme.endswith("a8") else 128  # of a packed layer
    assert average_bits([layer("linear", scheme, 2048, width)]) == bits + shape / (2048 * width)
    words = f"{bits:.3f}".rstrip("0")
    assert re.search(rf"^\| {scheme}\b.* = {words} \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def test_layers_count_by_their_weights() -> None:
    layers = [layer("linear", "int8-channel-a8", 64, 1024), layer("linear", "int4-g32", 192, 1024)]
    alone = [average_bits([each]) for each in layers]
    assert average_bits(layers) == pytest.approx((alone[0] + 3 * alone[1]) / 4)  # type: ignore[operator]
    assert average_bits([]) is None


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int4-channel-asym", "int8-channel", "int8-tensor-asym-a8"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize("width", [64, 96, 576])
def test_what_kernels_want_beside_the_codes_is_known_from_the_shapes(scheme: str, kind: LayerKind, width: int) -> None:
    plan = layer(kind, scheme, 24, width)
    if kind == "conv2d":
        plan = dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, activations=None))
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    scale, zero_point = affine.choose_qparams(weight, plan.scheme)
    tensor = QuantizedTensor(affine.quantize(weight, scale, zero_point, plan.scheme), scale, zero_point, plan.scheme)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in sidecar_tensors(plan, tensor).items()}
    assert {name: (info.dtype, info.shape) for name, info in sidecar_infos(plan).items()} == found


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int8-channel-a8"])
def test_the_plan_says_the_bits_that_the_report_will_have(scheme: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    bits = planned(source, "--scheme", scheme)["average_bits"]
    arguments = ["--model", str(source), "--output", str(tmp_path / "out"), "--quantizer", "per-channel", "--no-verify"]
    assert CliRunner().invoke(main, ["run", *arguments, "--scheme", scheme]).exit_code == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8"))
    assert report["size"]["average_bits"] == bits


def test_a_deployment_of_a_decoder_by_hand(tmp_path: Path) -> None:
    found = planned(tiny_llama(tmp_path / "source"), "--scheme", "int4-g32")["deployment"]
    layers = LLAMA * 4 // 8 + LLAMA // 32 * 12
    assert found == {
        "loaded_bytes": RUNTIME_BYTES + 15 * NODE_BYTES + layers + 4 * HEAD,
        "cache_bytes_per_token": 2 * 2 * 2 * 16 * 4,  # layers, key and value heads, head size
        "context_length": 256,
        "cache_bytes": 256 * 512,
    }


def test_a_head_that_shares_a_quantized_embedding(tmp_path: Path) -> None:
    found = planned(tiny_llama(tmp_path / "source"), "--scheme", "int4-g32", "--rule", "lm_head=int4-g32")["deployment"]
    both = (LLAMA + HEAD) * 4 // 8 + (LLAMA + HEAD) // 32 * 12
    assert found["loaded_bytes"] == RUNTIME_BYTES + 16 * NODE_BYTES + both + HEAD // 32 * 4


def test_a_head_in_half_the_width_is_widened(tmp_path: Path) -> None:
    narrow = planned(tiny_llama(tmp_path / "narrow", dtype=torch.bfloat16), "--scheme", "int4-g32")["deployment"]
    wide = planned(tiny_llama(tmp_path / "wide"), "--scheme", "int4-g32")["deployment"]
    assert narrow["loaded_bytes"] - wide["loaded_bytes"] == 4 * HEAD


def test_the_example_in_the_document_is_what_the_plan_says(tmp_path: Path) -> None:
    tokenizer = tiny_llama(tmp_path / "tiny")
    sizes.write(tmp_path / "source", sizes.SHAPES["llama-3.2-1b"], tokenizer, sparse=True)
    document = planned(tmp_path / "source", "--scheme", "int4-g32")
    text = DOCS.read_text(encoding="utf-8")
    numbers = [document["weights_bytes"], *(document["deployment"][name] for name in ("loaded_bytes", "cache_bytes"))]
    numbers.append(document["deployment"]["cache_bytes_per_token"])
    assert [number for number in numbers if f"| **{number:,}** |" not in text] == []


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    document = planned(tiny_bert(tmp_path / "source"), "--scheme", "int8-channel-a8")
    weights = sum(out * width for out, width in (each["shape"] for each in document["layers"]))
    rows = len(document["layers"]) * ROWS_NODE_BYTES
    pooler = NODE_BYTES + 4 * 64 * 64 if any(each["name"] == "pooler.dense" for each in document["kept_float"]) else 0
    assert document["deployment"] == {"loaded_bytes": RUNTIME_BYTES + rows + weights + pooler}


def test_the_words_of_a_plan(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    result = CliRunner().invoke(main, ["plan", "--model", str(source), "--output", "out", "--scheme", "int4-g32"])
    assert "bits: 4.524 per quantized weight, with scales and zero points" in result.stdout  # 14 small layers have shapes, too
    words = r"deployed on the CPU: about 58\.\d MB when loaded, and 512 B of cache for each token, 131\.1 kB for all 256"
    assert re.search(words, result.stdout)


def test_where_the_cpu_is_no_target_nothing_is_said_of_it(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    assert "deployment" not in planned(source, "--scheme", "int4-g32", "--target", "cuda")


@pytest.mark.skipif(footprint([]) is None, reason="this system does not tell the memory of a process")
def test_a_small_model_takes_about_what_is_said(tmp_path: Path) -> None:
    """A tiny one is nearly all process: what larger ones take beside that is in docs/sizes.md."""
    source = tiny_llama(tmp_path / "source")
    expected = planned(source, "--scheme", "int4-g32")["deployment"]["loaded_bytes"]
    arguments = ["--model", str(source), "--output", str(tmp_path / "out"), "--quantizer", "per-channel", "--no-verify"]
    assert CliRunner().invoke(main, ["run", *arguments, "--scheme", "int4-g32"]).exit_code == 0
    measured = footprint([tmp_path / "out" / GRAPH])
    assert measured is not None
    assert measured[0] == pytest.approx(expected, rel=0.25)
