"""A budget on the loss: which layers stay in float beside static activations, and that the artifact keeps what was asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import static_modules
import torch
from click.testing import CliRunner
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from torch import Tensor

from qconvert.allocate import static
from qconvert.allocate.output_loss import OutputLoss
from qconvert.allocate.trials import Trials
from qconvert.cli import main
from qconvert.errors import QConvertError, UsageError
from qconvert.ir.artifact import CARD, GRAPH, MANIFEST
from qconvert.ir.budget import LossBudget, parse_budget
from qconvert.ir.report import Report
from qconvert.pipeline import preparation, verification
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

A8 = "int8-channel-a8-static"
OUTLIERS, RESIDUAL, DIGITS, TRANSFORMER = (
    f"module:{static_modules.__file__}:{factory}" for factory in ("outliers", "residual", "classifier", "transformer")
)
SAMPLES = {"samples": 16, "length": 32}


def recipe(model: str, output: Path, budget: str, **settings: Any) -> Recipe:
    defaults = {"scheme": A8, "calibration": SAMPLES, "evaluation": SAMPLES}
    return Recipe.from_settings({"model": model, "output": str(output), "budget": budget, **defaults, **settings})


def kept_for_the_budget(report: Report) -> dict[str, str]:
    return {each.name: each.reason for each in report.kept_float if "budget" in each.reason}


def outputs(folder: Path, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def cosines(found: list[Tensor], expected: tuple[Tensor, ...]) -> list[float]:
    return [float(torch.cosine_similarity(a, b.detach()).mean()) for a, b in zip(found, expected, strict=True)]


# --- what is written ---


@pytest.mark.parametrize(
    ("text", "metric", "allowed"),
    [("cosine>=0.999", "cosine", 0.001), ("kl<=0.05", "kl", 0.05), (" cosine >= 0.9", "cosine", 0.1), ("kl<=1e-3", "kl", 1e-3)],
)
def test_a_budget_on_the_loss_is_written_like_a_gate(text: str, metric: str, allowed: float) -> None:
    budget = parse_budget(text)
    assert isinstance(budget, LossBudget)
    assert budget.metric == metric
    assert budget.allowed == pytest.approx(allowed)


@pytest.mark.parametrize("text", ["cosine<=0.9", "kl>=0.1", "cosine>=1", "cosine>=0", "kl<=0", "top1>=0.9", "cosine>=x"])
def test_other_limits_are_no_budgets(text: str) -> None:
    with pytest.raises(UsageError, match="is not a budget") as raised:
        parse_budget(text)
    assert raised.value.code == "QC-BUDGET-001"
    assert "cosine>=0.999" in raised.value.hint


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({}, "QC-BUDGET-007"),
        ({"quantizer": "auto"}, "QC-BUDGET-007"),
        ({"scheme": "int8-channel-a8"}, "QC-BUDGET-007"),
        ({"quantizer": "cast", "scheme": "float16"}, "QC-BUDGET-007"),
        ({"scheme": A8, "trained": "module.safetensors"}, "QC-TRAIN-002"),
    ],
)
def test_it_goes_with_static_activations(settings: dict[str, str], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        Recipe.from_settings({"model": "m", "output": "o", "budget": "cosine>=0.999", **settings})
    assert raised.value.code == code


@pytest.mark.parametrize(("quantizer", "worker"), [("awq", "awq"), ("auto", "gptq")])
def test_any_quantizer_works_under_it(quantizer: str, worker: str) -> None:
    asked = recipe("m", Path("o"), "cosine>=0.999", quantizer=quantizer)
    assert asked.worker == worker


# --- what is decided ---


def test_a_layer_whose_input_codes_badly_stays_in_float_and_no_other(tmp_path: Path) -> None:
    """Its weights lose next to nothing: what is measured holds the error of activations. The output that loses most counts."""
    data = {"calibration": {"samples": 40}}
    assert not kept_for_the_budget(convert(recipe(OUTLIERS, tmp_path / "loose", "cosine>=0.9", **data, verify=False)))
    report = convert(recipe(OUTLIERS, tmp_path / "strict", "cosine>=0.999", **data))
    assert report.passed
    assert list(kept_for_the_budget(report)) == ["fine"]
    assert {layer.scheme for layer in report.layers} == {A8}
    network, x = static_modules.outliers()
    loose, strict = (cosines(outputs(tmp_path / name, x), network(x)) for name in ("loose", "strict"))
    assert loose[0] >= 0.999 > loose[1]
    assert min(strict) >= 0.999
    assert report.assignment is not None
    assert report.assignment.schemes == {A8: 3, "float": 1}
    assert (report.assignment.predicted_cosine or 0) >= 0.999


def test_what_was_decided_is_rules_with_what_was_measured(tmp_path: Path) -> None:
    """So that `verify` decides nothing, and report, manifest, card and plan tell which layers stay in float and why."""
    named = [{"pattern": "classes", "scheme": "float"}]
    asked = recipe(RESIDUAL, tmp_path / "out", "cosine>=0.999997", rules=named)
    report = convert(asked)
    reasons = kept_for_the_budget(report)
    assert 0 < len(reasons) < 10
    assert all(reason.startswith("the budget cosine>=0.999997 keeps it in float (cosine 0.9") for reason in reasons.values())
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    written = manifest["recipe"]
    assert (written["quantizer"], written["budget"], written["scheme"]) == ("per-channel", None, A8)
    assert written["rules"][-1:] == named
    assert {rule["pattern"]: rule["reason"] for rule in written["rules"][:-1]} == reasons
    assert {rule["scheme"] for rule in written["rules"]} == {"float"}
    assert report.assignment is not None
    assert manifest["assignment"] == report.assignment.document()
    card = (tmp_path / "out" / CARD).read_text()
    assert f"--budget 'cosine>=0.999997' --scheme {A8} --rule classes=float" in card
    assert f"{len(reasons)} of 10 layers in float for the budget" in card
    again = verification.verify(tmp_path / "out")
    assert (again.assignment, again.kept_float) == (report.assignment, report.kept_float)
    planned = preparation.plan(recipe(RESIDUAL, tmp_path / "plan", "cosine>=0.999997", rules=named))
    assert planned.assignment == report.assignment
    assert planned.kept_float == report.kept_float


@pytest.mark.parametrize("quantizer", ["per-channel", "auto"])
def test_digits_stay_in_codes_everywhere(quantizer: str, tmp_path: Path) -> None:
    report = convert(recipe(DIGITS, tmp_path / "out", "cosine>=0.999", quantizer=quantizer, verify=False))
    assert len(report.layers) == 3
    assert report.assignment is not None
    assert report.assignment.schemes == {A8: 3}


def test_a_vision_transformer_keeps_its_accuracy(tmp_path: Path) -> None:
    convert(recipe(TRANSFORMER, tmp_path / "out", "cosine>=0.9999", calibration={"samples": 32}, verify=False))
    pixels, labels = static_modules.digits()
    network, unseen = static_modules.trained_transformer(), slice(1200, None)
    found, expected = outputs(tmp_path / "out", pixels[unseen])[0], network(pixels[unseen])
    right, right_in_float = (float((each.argmax(1) == labels[unseen]).float().mean()) for each in (found, expected))
    assert right_in_float > 0.88
    assert abs(right - right_in_float) <= 0.005
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert 0 < manifest["assignment"]["schemes"]["float"] < manifest["assignment"]["schemes"][A8]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("make", "quantizer"),
    [(tiny_llama, "smoothquant"), (tiny_t5, "per-channel"), (tiny_bert, "awq")],
    ids=["llama", "t5", "bert"],
)
def test_text_models_take_part_with_the_metric_of_their_task(make: Any, quantizer: str, tmp_path: Path) -> None:
    """With half of what the model loses that has all layers in codes, some of them stay in float."""
    source, settings = str(make(tmp_path / "source")), {"layout": "onnx", "quantizer": quantizer}
    budget = "cosine>={:.9f}" if make is tiny_bert else "kl<={:.3g}"
    every = convert(recipe(source, tmp_path / "loose", budget.format(0.5), **settings))
    predicted, measured = lost(every)
    half = 1 - predicted / 2 if make is tiny_bert else predicted / 2
    some = convert(recipe(source, tmp_path / "strict", budget.format(half), **settings))
    assert every.passed
    assert some.passed
    assert not kept_for_the_budget(every)
    assert 0 < len(kept_for_the_budget(some)) < len(every.layers)
    assert 1 / 3 < predicted / measured < 3
    assert lost(some)[0] <= predicted / 2
    assert lost(some)[1] < measured


def lost(report: Report) -> tuple[float, float]:
    """What was predicted, and what was measured."""
    assert report.assignment is not None
    (fidelity,) = report.fidelity
    if report.assignment.predicted_cosine is not None and fidelity.cosine is not None:
        return 1 - report.assignment.predicted_cosine, 1 - fidelity.cosine
    assert report.assignment.predicted_kl is not None
    assert fidelity.kl is not None
    return report.assignment.predicted_kl, fidelity.kl


@pytest.mark.parametrize("quantizer", ["awq", "smoothquant"])
def test_a_model_on_trial_with_all_layers_in_float_is_the_float_model(
    quantizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(job: Any, weights: Any, codes: Any, progress: Any) -> Any:
        trials = Trials(job, weights, codes)
        seen.append((trials.loss(frozenset(job.plan.layers)), trials.loss(frozenset()), len(weights.floats)))
        return static.keep_within(job, weights, codes, progress)

    monkeypatch.setattr(preparation, "keep_within", look)
    source = str(tiny_llama(tmp_path / "source"))
    preparation.plan(recipe(source, tmp_path / "out", "kl<=1", quantizer=quantizer, layout="onnx"))
    ((none, all_of_them, folded),) = seen
    assert folded
    assert none.bound < 1e-6 < all_of_them.mean


def test_what_is_computed_on_trial_is_what_the_artifact_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same samples, weights and ranges."""
    seen = []

    def look(job: Any, weights: Any, codes: Any, progress: Any) -> Any:
        fitted = replace(job, samples=replace(job.samples, calibration=(job.model.example_inputs,)))
        seen.append(Trials(fitted, weights, codes).loss(frozenset()).mean)
        return static.keep_within(job, weights, codes, progress)

    monkeypatch.setattr(preparation, "keep_within", look)
    data = {"source": str(tmp_path / "images.npz"), "samples": 24}
    network, inputs = static_modules.residual()
    np.savez(tmp_path / "images.npz", image=inputs["image"].numpy())
    calibrated = recipe(RESIDUAL, tmp_path / "out", "cosine>=0.9", calibration=data, evaluation={**data, "samples": 8})
    convert(calibrated.model_copy(update={"verify": False}))
    (cosine,) = cosines(outputs(tmp_path / "out", inputs["image"]), (network(inputs["image"]),))
    assert seen[0] == pytest.approx(1 - cosine, rel=0.05)


def test_few_samples_have_a_margin() -> None:
    losses = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    found, single = OutputLoss.of(losses), OutputLoss.of(losses[:1])
    assert found.mean == pytest.approx(0.2)
    assert found.bound == pytest.approx(0.4)  # two standard errors of 0.1
    assert single.mean == single.bound == pytest.approx(0.1)


# --- what can't be ---


@pytest.mark.parametrize(
    ("model", "budget", "settings", "code"),
    [
        (RESIDUAL, "kl<=0.1", {}, "QC-BUDGET-008"),
        (RESIDUAL, "cosine>=0.9", {"rules": [{"pattern": "*", "scheme": A8}]}, "QC-BUDGET-004"),
        (RESIDUAL, "cosine>=0.999999999", {}, "QC-BUDGET-009"),
        (OUTLIERS, "cosine>=0.999", {"rules": [{"pattern": "fine", "scheme": A8}]}, "QC-BUDGET-009"),
    ],
)
def test_what_can_not_be_kept_is_said(model: str, budget: str, settings: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(QConvertError) as raised:
        convert(recipe(model, tmp_path / "out", budget, **settings))
    assert raised.value.code == code
    assert not (tmp_path / "out").exists()


def test_the_command_takes_it_and_says_what_was_decided(tmp_path: Path) -> None:
    flags = ["--model", OUTLIERS, "--output", str(tmp_path / "out"), "--scheme", A8, "--budget", "cosine>=0.999"]
    shown = CliRunner().invoke(main, ["plan", *flags])
    assert shown.exit_code == 0
    assert "1 of 4 layers in float for the budget cosine>=0.999, predicted cosine 0.99" in " ".join(shown.stdout.split())
    converted = CliRunner().invoke(main, ["run", *flags, "--no-verify", "--json"])
    assert converted.exit_code == 0
    document = json.loads(converted.stdout)
    assert document["assignment"]["schemes"] == {A8: 3, "float": 1}
    assert [each["name"] for each in document["kept_float"] if "(cosine 0." in each["reason"]] == ["fine"]
