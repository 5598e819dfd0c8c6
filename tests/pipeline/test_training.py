"""Quantization-aware training, from a module and a recipe to an artifact with the codes that were trained."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import safetensors.torch
import static_modules
import torch
from click.testing import CliRunner
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from qconvert import Recipe, Report, convert, prepare_qat, save_trained
from qconvert.cli import main
from qconvert.errors import InputError, QConvertError, UsageError
from qconvert.execution.modules import as_matrix
from qconvert.ir.artifact import GRAPH
from qconvert.ir.progress import silent
from qconvert.pipeline import preflight, preparation
from qconvert.pipeline.training import trainable
from qconvert.pipeline.verification import verify
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index
from qconvert.training.inputs import StaticInput
from qconvert.training.layers import FakeQuantized

DIGITS = f"module:{static_modules.__file__}:classifier"
RESIDUAL = f"module:{static_modules.__file__}:residual"
FEW = {"calibration": {"samples": 8, "length": 32}, "evaluation": {"samples": 8, "length": 32}}
STATIC = "int8-channel-a8-static"


def recipe_of(model: str | Path, output: Path, scheme: str | None = None, **settings: Any) -> Recipe:
    named = {} if scheme is None else {"scheme": scheme}
    return Recipe.from_settings({"model": str(model), "output": str(output), **FEW, **named, **settings})


def train(module: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 8, rate: float = 1e-3) -> nn.Module:
    optimizer = torch.optim.Adam(module.parameters(), rate)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
    return module.eval()


def digits_loss(module: nn.Module) -> Tensor:
    pixels, labels = static_modules.digits()
    return nn.functional.cross_entropy(module(pixels[:1200]), labels[:1200])


def trained_digits(recipe: Recipe, **options: Any) -> nn.Module:
    return train(prepare_qat(copy.deepcopy(static_modules.trained_digits()), recipe, **options), digits_loss)


def in_onnxruntime(folder: Path, inputs: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    """The first output."""
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    fed = {
        each.name: np.zeros((len(next(iter(inputs.values()))), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    fed |= {each.name: inputs[each.name].numpy() for each in session.get_inputs() if each.name in inputs}
    first: np.ndarray[Any, Any] = session.run(None, fed)[0]
    return first


def assert_same_codes(module: nn.Module, recipe: Recipe) -> None:
    """Every code, scale, zero point and range of the artifact is the one that a forward of the module computes with."""
    manifest = json.loads((recipe.output / "qconvert.json").read_text(encoding="utf-8"))
    published = trainable(recipe, recipe.output.with_name(f"{recipe.output.name}.trained.safetensors"))
    plan = preparation.plan(published)
    job = preparation.reading_job(published, preflight.plugins_of(published), silent)
    artifact = ArtifactReader(recipe.output, job.model, plan, read_index(recipe.output))
    assert plan.layers
    ranges = {layer: value for value in manifest.get("activations", {"values": []})["values"] for layer in value["layers"]}
    for name in plan.layers:
        layer, found = module.get_submodule(name), artifact.layer(name)
        assert isinstance(layer, FakeQuantized)
        expected = layer.weight_quantizer.quantized(as_matrix(layer))
        assert torch.equal(found.q, expected.q), name
        assert torch.equal(found.scale, expected.scale), name
        assert (found.zero_point is None) == (expected.zero_point is None)
        if found.zero_point is not None and expected.zero_point is not None:
            assert torch.equal(found.zero_point, expected.zero_point)
        if isinstance(layer.input_quantizer, StaticInput):
            codes, value = layer.input_quantizer.codes, ranges[name]
            assert (value["scale"], value["zero_point"], value["bits"]) == (codes.scale, codes.zero_point, codes.bits)


# --- the same codes ---


@pytest.mark.parametrize("learned_steps", [False, True], ids=["covering", "learned"])
@pytest.mark.parametrize("scheme", [STATIC, "int8-tensor-a8-static-sym", "int8-channel-a8", "int4-g32", "int4-channel-asym"])
def test_an_artifact_has_the_codes_of_the_last_forward(scheme: str, learned_steps: bool, tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", scheme)
    module = trained_digits(recipe, learned_steps=learned_steps)
    report = convert(recipe, module=module)
    assert report.passed
    assert report.quantizer == "trained"
    assert_same_codes(module, recipe)
    pixels, _ = static_modules.digits()
    with torch.no_grad():
        expected = module(pixels[1200:]).numpy()
    found = in_onnxruntime(recipe.output, {"input": pixels[1200:]})
    assert float((found.argmax(1) == expected.argmax(1)).mean()) >= 0.99
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("learned_steps", [False, True], ids=["covering", "learned"])
def test_codes_of_codebooks_are_trained_too(learned_steps: bool, tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", "nf4-g64", quantizer="nf4", rules=[{"pattern": "2", "scheme": "float"}])
    module = trained_digits(recipe, learned_steps=learned_steps)
    assert convert(recipe, module=module).passed
    assert_same_codes(module, recipe)


@pytest.mark.parametrize("learned_steps", [False, True], ids=["covering", "learned"])
def test_batch_norms_are_folded_before_a_network_of_convolutions_is_trained(learned_steps: bool, tmp_path: Path) -> None:
    recipe = recipe_of(RESIDUAL, tmp_path / "out", STATIC)
    network, inputs = static_modules.residual()
    module = prepare_qat(copy.deepcopy(network), recipe, learned_steps=learned_steps)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    images = inputs["image"][:8]
    with torch.no_grad():
        before = network(images)
        assert torch.allclose(module.eval()(images), before, atol=0.05 * float(before.abs().max()))
    train(module, lambda each: (each(images) - before).square().mean(), steps=3)
    assert convert(recipe, module=module).passed
    assert_same_codes(module, recipe)
    with torch.no_grad():
        expected = module(inputs["image"]).numpy()
    found = in_onnxruntime(recipe.output, inputs)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_the_trainer_of_transformers_trains_a_decoder_whose_head_shares_the_embedding(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    rules = [{"pattern": "model.embed_tokens", "scheme": "int4-g32"}, {"pattern": "lm_head", "scheme": "int4-g32"}]
    recipe = recipe_of(source, tmp_path / "out", "int4-g32", rules=rules)
    model = prepare_qat(AutoModelForCausalLM.from_pretrained(source), recipe)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    tokens = [{"input_ids": (row := torch.randint(3, 90, (16,))), "labels": row} for _ in range(8)]
    arguments = TrainingArguments(str(tmp_path / "checkpoints"), max_steps=3, learning_rate=1e-3, use_cpu=True, report_to=[])
    Trainer(model, arguments, train_dataset=tokens).train()
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    report = convert(recipe, module=model.eval())
    assert report.passed
    assert {(parity.target, parity.status) for parity in report.parity} >= {("cpu", "passed"), ("transformers", "passed")}
    assert_same_codes(model, recipe)
    loaded = AutoModelForCausalLM.from_pretrained(recipe.output, dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_rows_of_int8_are_trained_in_models_of_other_kinds(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    recipe = recipe_of(source, tmp_path / "out", "int8-channel-a8", layout="onnx")
    kind = AutoModelForCausalLM if make is tiny_gpt2 else AutoModel
    model = prepare_qat(kind.from_pretrained(source), recipe)
    ids = torch.randint(3, 90, (2, 12))
    train(model, lambda each: each(input_ids=ids)[0].square().mean(), steps=3)
    assert convert(recipe, module=model).passed
    assert_same_codes(model, recipe)
    with torch.no_grad():
        expected = model(input_ids=ids)[0].numpy()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    found = in_onnxruntime(recipe.output, inputs)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_an_adapter_that_was_trained_on_prepared_codes_is_merged_into_them(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    recipe = recipe_of(source, tmp_path / "out", "int4-g32")
    prepared = prepare_qat(AutoModelForCausalLM.from_pretrained(source), recipe)
    codes = prepared.model.layers[0].mlp.up_proj.weight_quantizer.quantized(prepared.model.layers[0].mlp.up_proj.weight).q
    model = peft.get_peft_model(prepared, peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear"))
    ids = torch.randint(3, 90, (2, 12))
    train(model, lambda each: each(input_ids=ids, labels=ids).loss, steps=5, rate=1e-2)
    wrapped = recipe.model_copy(update={"output": tmp_path / "wrapped"})
    assert "merge_and_unload" in refused("QC-TRAIN-003", lambda: convert(wrapped, module=model)).hint
    merged = model.merge_and_unload()
    assert convert(recipe, module=merged).passed
    assert_same_codes(merged, recipe)
    layer = merged.model.layers[0].mlp.up_proj
    assert not torch.equal(layer.weight_quantizer.quantized(layer.weight).q, codes)


# --- the file ---


def test_a_saved_file_is_converted_by_the_command_and_verified_later(tmp_path: Path) -> None:
    file = shutil.copy(static_modules.__file__, tmp_path / "network.py")
    model = f"module:{file}:classifier"
    save_trained(trained_digits(recipe_of(model, tmp_path / "unused", STATIC)), tmp_path / "trained.safetensors")
    arguments = ["run", "--model", model, "--scheme", STATIC, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--trained", str(tmp_path / "trained.safetensors")])
    assert done.exit_code == 0, done.output
    assert verify(tmp_path / "out").passed
    inputs = json.loads((tmp_path / "out" / "qconvert.json").read_text(encoding="utf-8"))["inputs"]
    assert "trained:trained.safetensors" in inputs
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("out", "trained.safetensors", "network.py"):
        (tmp_path / name).rename(moved / name)
    assert verify(moved / "out").passed


def test_the_file_beside_an_output_is_not_replaced_without_leave(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC, verify=False)
    module = trained_digits(recipe)
    (tmp_path / "out.trained.safetensors").write_bytes(b"other work")
    with pytest.raises(UsageError, match=r"out\.trained\.safetensors already") as refused:
        convert(recipe, module=module)
    assert refused.value.code == "QC-OUTPUT-004"
    assert (tmp_path / "out.trained.safetensors").read_bytes() == b"other work"
    convert(recipe.model_copy(update={"force": True}), module=module)


# --- what is refused ---


def refused(code: str, action: Callable[[], object]) -> QConvertError:
    with pytest.raises(QConvertError) as found:
        action()
    assert found.value.code == code, found.value
    return found.value


def test_a_module_of_another_kind_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC)
    narrow = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 100), nn.ReLU(), nn.Linear(100, 10))
    assert "out_features=50" in refused("QC-TRAIN-001", lambda: prepare_qat(narrow, recipe)).message
    short = nn.Sequential(*list(copy.deepcopy(static_modules.trained_digits()).children())[:4])
    assert "it has no 4" in refused("QC-TRAIN-001", lambda: prepare_qat(short, recipe)).message
    wrapped = nn.DataParallel(copy.deepcopy(static_modules.trained_digits()))
    assert refused("QC-TRAIN-001", lambda: prepare_qat(wrapped, recipe))
    twice = prepare_qat(copy.deepcopy(static_modules.trained_digits()), recipe)
    assert "before" in refused("QC-TRAIN-001", lambda: prepare_qat(twice, recipe)).message
    unprepared = static_modules.trained_digits()
    assert "prepare_qat" in refused("QC-TRAIN-001", lambda: convert(recipe, module=unprepared)).hint
    assert not list(tmp_path.iterdir())


def test_a_range_that_no_batch_has_set_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC)
    module = prepare_qat(copy.deepcopy(static_modules.trained_digits()), recipe).eval()
    assert "0 reads" in refused("QC-TRAIN-005", lambda: convert(recipe, module=module)).message


def test_what_diverged_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC)
    module = trained_digits(recipe)
    with torch.no_grad():
        module.get_submodule("2").get_parameter("weight")[0, 0] = float("nan")
    assert "2.weight" in refused("QC-FLOAT-001", lambda: convert(recipe, module=module)).message


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quantizer": "auto", "budget": 4.5}, "auto"),
        ({"quantizer": "cast"}, "cast"),
        ({"quantizer": "nf4", "scheme": "nf4-g64-dq"}, "nf4-g64-dq"),
    ],
)
def test_a_recipe_without_schemes_is_refused(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", **settings)
    module = copy.deepcopy(static_modules.trained_digits())
    assert what in refused("QC-TRAIN-002", lambda: prepare_qat(module, recipe)).message


@pytest.mark.parametrize(
    "settings", [{"quantizer": "awq"}, {"tuning": {"steps": 2}}, {"sequential": True}, {"ranges": {"estimator": "kl"}}]
)
def test_what_chooses_other_codes_is_refused_beside_a_trained_file(settings: dict[str, Any], tmp_path: Path) -> None:
    refused("QC-TRAIN-002", lambda: recipe_of(DIGITS, tmp_path / "out", STATIC, trained="trained.safetensors", **settings))


def test_trained_codes_without_their_file_are_refused(tmp_path: Path) -> None:
    refused("QC-TRAIN-002", lambda: recipe_of(DIGITS, tmp_path / "out", STATIC, quantizer="trained"))


def test_a_recipe_with_other_schemes_than_those_of_the_training_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC)
    save_trained(trained_digits(recipe), tmp_path / "trained.safetensors")
    for scheme, rules in (("int8-channel", []), (STATIC, [{"pattern": "0", "scheme": "float"}])):
        other = recipe_of(DIGITS, tmp_path / "out", scheme, rules=rules, trained=tmp_path / "trained.safetensors")
        found = refused("QC-TRAIN-004", partial(convert, other))
        assert "was trained as int8-channel-a8-static" in found.message


@pytest.mark.parametrize("damage", ["absent", "another file", "codes", "scales", "missing", "cut off"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC)
    path = tmp_path / "trained.safetensors"
    save_trained(trained_digits(recipe), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    match damage:
        case "absent":
            path.unlink()
        case "another file":
            safetensors.torch.save_file(tensors, path)
        case "codes":
            safetensors.torch.save_file(tensors | {"2.weight": torch.full_like(tensors["2.weight"], -128)}, path, metadata)
        case "scales":
            safetensors.torch.save_file(tensors | {"2.weight_scale": tensors["2.weight_scale"] * torch.inf}, path, metadata)
        case "missing":
            del tensors["4.bias"]
            safetensors.torch.save_file(tensors, path, metadata)
        case "cut off":
            path.write_bytes(path.read_bytes()[:-5])
    again = recipe_of(DIGITS, tmp_path / "out", STATIC, trained=path)
    with pytest.raises(InputError) as found:
        convert(again)
    assert found.value.code in ("QC-TRAIN-003", "QC-INPUT-005", "QC-INPUT-006", "QC-INPUT-007")
    assert "2.weight" in found.value.message or "trained.safetensors" in found.value.message or "4.bias" in found.value.message
    assert not (tmp_path / "out").exists()


def test_reports_say_what_was_trained(tmp_path: Path) -> None:
    recipe = recipe_of(DIGITS, tmp_path / "out", STATIC)
    report: Report = convert(recipe, module=trained_digits(recipe))
    assert report.activations is not None
    assert report.activations.estimator == "trained"
    assert {value.count for value in report.activations.values} == {0}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "3 values in trained ranges |" in card
    assert "--trained out.trained.safetensors --scheme int8-channel-a8-static" in card
    assert "MatMulNBits" not in card  # no layer has float activations
