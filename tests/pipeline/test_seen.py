"""What report.json shows of a run: weights before and after, activations with their ranges, and no more than fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import static_modules
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_models import tiny_llama

from qconvert.cli import main
from qconvert.ir import histogram
from qconvert.ir.artifact import MANIFEST, REPORT, WEIGHTS
from qconvert.ir.layer import Block, Layer
from qconvert.ir.scheme import QuantScheme
from qconvert.pipeline import conversion
from qconvert.pipeline.conversion import convert
from qconvert.plugin.quantizer import round_to_nearest
from qconvert.quantize.measured import COUNTED, Measured
from qconvert.recipe import Recipe
from qconvert.storage.json_text import format_json

DIGITS = f"module:{static_modules.__file__}:classifier"
A8 = "int8-channel-a8-static"


def settings(model: str | Path, output: Path, **others: Any) -> dict[str, Any]:
    quick = {"quantizer": "per-channel", "verify": False}
    return {"model": str(model), "output": str(output), **quick, **others}


def run(model: str | Path, output: Path, **others: Any) -> dict[str, Any]:
    convert(Recipe.from_settings(settings(model, output, **others)))
    return document(output / REPORT)


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def by_hand(values: torch.Tensor, low: float, width: float, count: int) -> list[int]:
    """How many numbers lie in each of `count` bins."""
    bins = np.floor((values.double().numpy().ravel() - low) / width).astype(int)
    assert bins.min() >= 0
    return np.bincount(bins, minlength=count).tolist()  # type: ignore[no-any-return]


# --- weights ---


def test_every_weight_of_a_layer_is_counted_before_and_after(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    layers = run(source, tmp_path / "out", scheme="int8-channel-a8")["layers"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / WEIGHTS)
    assert len(layers) == 14
    for layer in layers:
        name, seen = layer["name"], layer["histogram"]
        weight = before[f"{name}.weight"]
        codes, scale = after[f"{name}.weight"], after[f"{name}.weight_scale"]
        assert sum(seen["before"]) == sum(seen["after"]) == weight.numel()
        place = seen["low"], seen["width"], len(seen["before"])
        assert seen["before"] == by_hand(weight, *place)
        assert seen["after"] == by_hand(codes.float() * scale.float(), *place)
        assert (seen["minimum"], seen["maximum"], seen["step"]) == (float(weight.min()), float(weight.max()), 1)
        assert len(seen["before"]) <= histogram.MOST_BINS


@pytest.mark.parametrize("parts", [1, 3])
def test_of_a_large_layer_every_so_many_rows_are_counted(parts: int) -> None:
    weight = torch.randn(3 * 230, 100, generator=torch.Generator().manual_seed(0))
    weight[1, 1] = 7  # in no row that is counted
    tensor = round_to_nearest(weight, QuantScheme.parse("int4-channel"))
    measured = Measured(weight.shape)
    for part in range(parts):
        rows = slice(part * len(weight) // parts, (part + 1) * len(weight) // parts)
        measured.add(Layer("layer", "linear", weight[rows], None), tensor.rows(rows))
    layer = measured.layer("layer", tensor)
    seen = layer.histogram
    assert seen.step == 3 == -(-weight.numel() // COUNTED)
    place = seen.low, seen.width, len(seen.before)
    assert list(seen.before) == by_hand(weight[::3], *place)
    assert list(seen.after) == by_hand(tensor.dequantize()[::3], *place)
    assert (seen.minimum, seen.maximum) == (float(weight.min()), 7)
    assert layer.relative_error == pytest.approx(float((tensor.dequantize() - weight).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1.0, 3.4e38])
def test_weights_of_any_size_have_bins(size: float) -> None:
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.1]]) * size
    measured = Measured(weight.shape)
    measured.add(Layer("layer", "linear", weight, None), round_to_nearest(weight, QuantScheme.parse("int8-channel")))
    seen = measured.layer("layer", round_to_nearest(weight, QuantScheme.parse("int8-channel"))).histogram
    assert sum(seen.before) == sum(seen.after) == 4
    assert list(seen.before) == by_hand(weight, seen.low, seen.width, len(seen.before))


def test_a_resumed_run_shows_what_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "source")
    whole = run(source, tmp_path / "whole", scheme="int4-g32")
    real, taken = conversion.Conversion.take, list[str]()

    def once(self: conversion.Conversion, block: Block) -> None:
        real(self, block)
        taken.append(block.name)
        if len(taken) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion.Conversion, "take", once)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", scheme="int4-g32")
    assert run(source, tmp_path / "out", scheme="int4-g32")["layers"] == whole["layers"]
    assert taken[:2] == ["model.layers.0", "model.layers.1"]
    assert all(sum(layer["histogram"]["before"]) for layer in whole["layers"])


def test_what_a_cast_makes_of_a_tensor_is_not_drawn(tmp_path: Path) -> None:
    report = run(tiny_llama(tmp_path / "source"), tmp_path / "out", quantizer="cast", scheme="float16")
    assert not any("histogram" in layer for layer in report["layers"])
    assert not report.keys() & {"histograms", "activations"}


# --- how much of it ---


def test_of_many_layers_those_that_lost_most_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "MOST_HISTOGRAMS", 5)
    report = run(tiny_llama(tmp_path / "source"), tmp_path / "out", scheme="int4-g32")
    losses = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    drawn = [layer["name"] for layer in report["layers"] if "histogram" in layer]
    assert sorted(drawn, key=lambda name: -losses[name]) == sorted(losses, key=lambda name: -losses[name])[:5]
    assert report["histograms"] == "5 of 14 layers, those with the largest relative_error"
    assert [layer["name"] for layer in document(tmp_path / "out" / MANIFEST)["layers"] if "histogram" in layer] == drawn


def test_a_thousand_layers_take_half_a_megabyte() -> None:
    kept = histogram.with_histogram([0.1] * 1000)
    assert kept == [True] * 512 + [False] * 488
    counts = tuple(range(400, 400 + histogram.MOST_BINS))
    largest = histogram.WeightHistogram(
        -0.0123456789, 0.0123456789, counts, counts, 12345, -1.2345678901234567, 1.2345678901234567
    )
    entry = {"histogram": {name: getattr(largest, name) for name in largest.__slots__}}
    assert len(format_json([entry])) < 1024


def test_a_list_of_numbers_is_one_line() -> None:
    given = {"a": [1, -2.5e-7, 3], "b": [[1, 2], []], "c": ["x", 1], "d": "[\n  1\n]", "e": [{"f": [0]}]}
    text = format_json(given)
    assert json.loads(text) == given
    assert text.startswith('{\n  "a": [1, -2.5e-07, 3],\n  "b": [\n    [1, 2],\n    []\n  ],\n')


# --- activations ---


def static(output: Path, **others: Any) -> dict[str, Any]:
    return run(DIGITS, output, scheme=A8, calibration={"samples": 1184}, evaluation={"samples": 16}, **others)


def values_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {value["name"]: value for value in report["activations"]["values"]}


def test_a_static_value_shows_what_was_seen_and_what_was_chosen(tmp_path: Path) -> None:
    report = static(tmp_path / "out", ranges={"estimator": "min-max"})
    assert report["activations"]["estimator"] == "min-max"
    pixels = values_of(report)["input"]
    assert (pixels["part"], pixels["layers"], pixels["count"], pixels["bits"]) == ("model", ["0"], 1184 * 64, 8)
    assert (pixels["minimum"], pixels["maximum"], pixels["low"], pixels["high"], pixels["clipped"]) == (0, 1, 0, 1, 0)
    assert (pixels["scale"], pixels["zero_point"]) == (pytest.approx(1 / 255), 0)
    readers = [layer for value in values_of(report).values() for layer in value["layers"]]
    assert readers == ["0", "2", "4"]
    for value in values_of(report).values():
        seen = value["histogram"]
        assert sum(seen["counts"]) == value["count"]
        assert len(seen["counts"]) <= histogram.MOST_BINS
        assert seen["low"] <= value["minimum"]
        assert value["maximum"] < seen["low"] + len(seen["counts"]) * seen["width"]


def test_pixels_are_drawn_as_numpy_counts_them(tmp_path: Path) -> None:
    """All digits that the module gives are samples, but for those that the evaluation takes: of 1200, 1184."""
    seen = values_of(static(tmp_path / "out"))["input"]["histogram"]
    everything = np.array(by_hand(static_modules.digits()[0][:1200], seen["low"], seen["width"], len(seen["counts"])))
    left_out = everything - np.array(seen["counts"])
    assert left_out.min() >= 0
    assert left_out.sum() == 16 * 64


def test_what_lies_beyond_a_range_is_called_clipped(tmp_path: Path) -> None:
    ranges = {"estimator": "percentile", "options": {"percentile": 90.0}}
    value = max(values_of(static(tmp_path / "out", ranges=ranges)).values(), key=lambda value: value["clipped"])
    assert value["high"] < value["maximum"]
    assert value["clipped"] == pytest.approx(0.05, abs=0.01)  # half of it on either side; below there are zeros alone
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert f"in percentile ranges, at most {100 * value['clipped']:.2g} % of one clipped" in " ".join(result.stderr.split())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| static activations |  | percentile | {len(values_of(document(tmp_path / 'out' / REPORT)))} values" in card


@pytest.mark.parametrize("torn", [True, False])
def test_a_verification_keeps_all_of_it(torn: bool, tmp_path: Path) -> None:
    report = static(tmp_path / "out")
    if torn:
        (tmp_path / "out" / REPORT).write_text("{")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.stderr
    verified = document(tmp_path / "out" / REPORT)
    assert verified["passed"]
    assert verified == json.loads(result.stdout)
    assert (verified["layers"], verified["activations"]) == (report["layers"], report["activations"])


def test_of_many_values_those_that_were_clipped_most_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "MOST_HISTOGRAMS", 2)
    report = static(tmp_path / "out")
    assert [len(report["layers"]), sum("histogram" in layer for layer in report["layers"])] == [3, 2]
    values = list(values_of(report).values())
    drawn = [value["clipped"] for value in values if "histogram" in value]
    assert sorted(drawn) == sorted(value["clipped"] for value in values)[-2:]
    layers, activations = report["histograms"].split("; ")
    assert layers == "2 of 3 layers, those with the largest relative_error"
    assert activations == f"2 of {len(values)} values, those with the largest clipped"
