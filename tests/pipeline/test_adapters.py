"""LoRA adapters from peft's folders to verified artifacts: kept beside quantized layers, and merged into weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import static_modules
import torch
from adapters import CONFIG, FEW, TENSORS, adapted, error, in_onnxruntime, logits, recipe_of
from click.testing import CliRunner
from generation import onnxruntime_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qconvert import Recipe, convert
from qconvert.cli import main
from qconvert.errors import UsageError
from qconvert.ir.artifact import GRAPH, MANIFEST, WEIGHTS
from qconvert.ir.progress import silent
from qconvert.pipeline import preflight, preparation
from qconvert.pipeline.comparison import compare
from qconvert.pipeline.verification import verify
from qconvert.recipe.comparison import named_recipes
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index
from qconvert.trace.cache import TraceCache

TEXT = "The quick brown fox jumps over the lazy dog, and the dog, who is lazy, lets it pass. " * 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A float Llama and an adapter of all its linears with ranks and alphas of their own: (base, adapter)."""
    root = tmp_path_factory.mktemp("llama")
    base = tiny_llama(root / "base")
    patterns = {"rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 8}, "alpha_pattern": {r".*\.0\.mlp\..*": 3}}
    adapted(AutoModelForCausalLM.from_pretrained(base), root / "adapter", **patterns)
    yield base, root / "adapter"
    shutil.rmtree(root)


def peft_of(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def float_model(recipe: Recipe) -> Any:
    """The model that artifacts are compared with, whole: its module with its tensors."""
    job = preparation.reading_job(recipe, preflight.plugins_of(recipe), silent)
    model = job.model
    weights = {name: model.read(name).float() for name in model.parameter_shapes}
    module = model.module.to_empty(device="cpu")
    fresh = dict(AutoModelForCausalLM.from_pretrained(recipe.model).named_buffers())
    for name, buffer in module.named_buffers():
        buffer.copy_(fresh[name])
    module.load_state_dict(weights, strict=False)
    return module.eval()


def artifact_of(recipe: Recipe) -> ArtifactReader:
    job = preparation.reading_job(recipe, preflight.plugins_of(recipe), silent)
    return ArtifactReader(recipe.output, job.model, job.plan, read_index(recipe.output))


def codes(folder: Path) -> dict[str, Tensor]:
    """What the files hold of quantized layers."""
    tensors = load_file(folder / WEIGHTS)
    floats = ("embed_tokens.weight", "norm.weight", "layernorm.weight", "lora_A.weight", "lora_B.weight")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(floats)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# --- QLoRA ---


def test_qlora_computes_in_onnx_runtime_what_it_computed_in_training(tmp_path: Path) -> None:
    """100 steps on a base of bitsandbytes' nf4 codes; its logits and ONNX Runtime's are one."""
    base = tiny_llama(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids[:, :64]
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-2)
    before = logits(model.train(), ids)  # in eval mode its kernel for some processors computes in bfloat16
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    recipe = recipe_of(base, tmp_path / "adapter", tmp_path / "out", quantizer="nf4")
    assert convert(recipe).passed
    expected, found = logits(model, ids), in_onnxruntime(recipe.output, ids)
    assert np.abs(expected - before).max() > 1
    assert np.abs(found - expected).max() < 1e-3


# --- kept ---


@pytest.mark.parametrize("settings", [{"quantizer": "nf4"}, {"scheme": "int4-g32-asym"}, {"quantizer": "hqq"}], ids=str)
def test_a_kept_adapter_leaves_the_codes_of_the_base_as_they_are(
    settings: dict[str, str], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = llama
    report = convert(recipe_of(base, adapter, tmp_path / "kept", verify=False, **settings))
    alone = {"model": str(base), "output": str(tmp_path / "alone"), "layout": "onnx", "verify": False}
    convert(Recipe.from_settings({**alone, **settings}))
    assert_same(codes(tmp_path / "kept"), codes(tmp_path / "alone"))
    reasons = {entry.name: entry.reason for entry in report.kept_float}
    assert reasons["model.layers.1.mlp.down_proj.lora_B"] == "it belongs to the adapter"
    assert len([name for name in reasons if ".lora_" in name]) == 2 * 7 * 2


def test_the_float_model_is_base_and_adapter_as_peft_computes_them(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    ids = torch.arange(5, 45).reshape(2, 20)
    expected = logits(peft_of(base, adapter), ids)
    assert np.abs(expected - logits(AutoModelForCausalLM.from_pretrained(base), ids)).max() > 0.1
    for merged in (False, True):
        found = logits(float_model(recipe_of(base, adapter, tmp_path / "out", merge_adapter=merged)), ids)
        assert np.abs(found - expected).max() < 1e-5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "settings",
    [
        {"quantizer": "awq", "scheme": "int4-g32"},
        {"quantizer": "smoothquant"},
        {"quantizer": "gptq", "scheme": "int4-g32", "sequential": True},
        {"scheme": "int4-g32", "tuning": {"steps": 4}},
        {"scheme": "int8-channel-a8-static"},
        {"quantizer": "auto", "budget": "5"},
        {"scheme": "int4-g32", "targets": ["cpu", "cuda"], "allow_unverified": True},
        {"scheme": "int8-channel", "logits": "last"},
    ],
    ids=["awq", "smoothquant", "gptq", "tuned", "static", "auto", "cuda", "last"],
)
def test_whatever_quantizes_the_base_the_artifact_is_proven_with_its_adapter(
    settings: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    """Channels are scaled for the base layers alone, and every proof (of folds, of parity) runs the branches."""
    base, adapter = llama
    recipe = recipe_of(base, adapter, tmp_path / "out", **settings)
    report = convert(recipe)
    assert {part.status for part in report.parity if part.target == "cpu"} == {"passed"}
    assert report.fidelity[0].kl is not None
    assert report.fidelity[0].kl < 0.1


@pytest.mark.usefixtures("quick")
def test_a_decoder_generates_with_its_adapter_on_the_cache(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    recipe = recipe_of(base, adapter, tmp_path / "out", scheme="int8-channel")
    convert(recipe)
    expected = logits(peft_of(base, adapter), torch.arange(5, 25)[None])[0]
    found = onnxruntime_logits(recipe.output, list(range(5, 25)), 12)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.usefixtures("quick")
def test_an_encoder_and_a_conv1d_keep_their_adapters(tmp_path: Path) -> None:
    """GPT-2's linears are Conv1D; its adapter is rsLoRA, of one layer of each block alone."""
    gpt2, bert = tiny_gpt2(tmp_path / "gpt2"), tiny_bert(tmp_path / "bert")
    ids = torch.arange(5, 45).reshape(2, 20)
    told: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True}
    model = adapted(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "a", **told, layers_to_transform=[1])
    for merged in (False, True):
        out = tmp_path / f"gpt2-{merged}"
        assert convert(recipe_of(gpt2, tmp_path / "a", out, scheme="int8-g32", merge_adapter=merged, layout="onnx")).passed
        expected = logits(model, ids)
        assert np.abs(in_onnxruntime(out, ids) - expected).max() < 0.05 * np.abs(expected).max()
    encoder = adapted(AutoModel.from_pretrained(bert), tmp_path / "b", task_type="FEATURE_EXTRACTION")
    assert convert(recipe_of(bert, tmp_path / "b", tmp_path / "bert-out", scheme="int8-channel")).passed
    with torch.no_grad():
        hidden = encoder(ids).last_hidden_state.numpy()
    assert np.abs(in_onnxruntime(tmp_path / "bert-out", ids) - hidden).max() < 0.05 * np.abs(hidden).max()


@pytest.mark.usefixtures("quick")
def test_a_module_of_a_factory_keeps_its_adapter_in_any_layout(tmp_path: Path) -> None:
    source = f"module:{static_modules.__file__}:classifier"
    network, pixels = static_modules.classifier()
    linears = [name for name, each in network.named_modules() if isinstance(each, nn.Linear)]
    model = adapted(network, tmp_path / "adapter", target_modules=linears)
    recipe = recipe_of(source, tmp_path / "adapter", tmp_path / "out", layout="transformers", scheme="int8-channel")
    assert convert(recipe).passed
    session = onnxruntime.InferenceSession(recipe.output / GRAPH, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(pixels).numpy()
    found = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_transformers_refuses_the_folder_of_a_kept_adapter(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    convert(recipe_of(base, adapter, tmp_path / "out", quantizer="nf4", verify=False))
    with pytest.raises(Exception, match="load the onnx files instead"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_trace_is_kept_for_one_structure_of_an_adapter(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = llama
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    narrow = tmp_path / "narrow"
    adapted(AutoModelForCausalLM.from_pretrained(base), narrow, target_modules=["q_proj"])
    keys = []
    for each in (adapter, adapter, narrow, None):
        settings = {"adapter": str(each)} if each else {}
        recipe = Recipe.from_settings({"model": str(base), "output": str(tmp_path / "out"), "layout": "onnx", **settings})
        model = preparation.load_model(recipe, preflight.plugins_of(recipe), silent)
        keys.append(TraceCache(model, list(model.blocks)).key)
    assert keys[0] is not None
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


# --- merged ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"quantizer": "nf4"}, {"scheme": "int8-channel"}], ids=str)
def test_a_merged_adapter_gives_the_codes_of_what_peft_merges(
    make: Callable[[Path], Path], settings: dict[str, str], tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    if make is tiny_gpt2:  # whose linears are Conv1D
        settings = {**settings, "layout": "onnx"}
    model = adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", fan_in_fan_out=make is tiny_gpt2)
    recipe = recipe_of(base, tmp_path / "adapter", tmp_path / "merged", merge_adapter=True, **settings)
    report = convert(recipe)
    assert report.passed
    assert (report.transformers_class is None) == (make is tiny_gpt2)
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    convert(Recipe.from_settings({"model": str(tmp_path / "theirs"), "output": str(tmp_path / "expected"), **FEW, **settings}))
    assert_same(load_file(tmp_path / "merged" / WEIGHTS), load_file(tmp_path / "expected" / WEIGHTS))


def test_a_narrow_base_is_merged_in_float32(llama: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = llama
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    recipe = recipe_of(base, adapter, tmp_path / "out", merge_adapter=True, scheme="int4-g32")
    name = "model.layers.0.self_attn.q_proj"
    stored = load_file(base / WEIGHTS)[f"{name}.weight"].float()
    tensors = load_file(adapter / TENSORS)
    change = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
    merged = preparation.load_model(recipe, preflight.plugins_of(recipe), silent).read(f"{name}.weight")
    assert merged.dtype == torch.float32
    assert torch.equal(merged, stored + change * 3)
    assert convert(recipe).passed


# --- the command ---


def test_the_command_takes_an_adapter_and_its_folder_is_an_input(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    moved = tmp_path / "files"
    shutil.copytree(base, moved / "base")
    shutil.copytree(adapter, moved / "adapter")
    asked = ["run", "--model", str(moved / "base"), "--adapter", str(moved / "adapter"), "--quantizer", "nf4"]
    few = tmp_path / "few.yaml"
    few.write_text(json.dumps(FEW))
    run = CliRunner().invoke(main, [*asked, str(few), "--layout", "onnx", "--output", str(moved / "out")])
    assert run.exit_code == 0, run.output
    manifest = json.loads((moved / "out" / MANIFEST).read_text())
    assert manifest["recipe"]["adapter"] == "../adapter"
    assert {f"adapter:{CONFIG}", f"adapter:{TENSORS}"} <= manifest["inputs"].keys()
    shutil.move(moved, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert verify(folder / "out").passed
    inside = [*asked[:2], str(folder / "base"), "--adapter", str(folder / "adapter"), "--layout", "onnx"]
    run = CliRunner().invoke(main, [*inside, "--output", str(folder / "adapter" / "out")])
    assert (run.exit_code, "QC-OUTPUT-001" in run.output) == (2, True)
    run = CliRunner().invoke(main, [*asked[:2], str(folder / "base"), "--adapter", str(folder / "none"), "--output", "out"])
    assert (run.exit_code, "QC-ADAPTER-001" in run.output) == (3, True)
    merged = [*inside, "--merge-adapter", "--no-verify", "--output", str(folder / "merged")]
    assert CliRunner().invoke(main, merged).exit_code == 0
    tensors = load_file(folder / "adapter" / TENSORS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "adapter" / TENSORS)
    assert TENSORS in error("QC-VERIFY-004", lambda: verify(folder / "out"))


def test_recipes_of_a_comparison_share_an_adapter(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    common = {"model": str(base), "adapter": str(adapter), "output": str(tmp_path / "out"), **FEW}
    recipes = [{"name": "nf4", "quantizer": "nf4", "layout": "onnx"}, {"name": "loaded", "scheme": "int8-channel"}]
    found = compare(named_recipes({**common, "recipes": recipes}))
    kept, refused = found.entries
    assert kept.report is not None
    assert kept.report.passed
    assert isinstance(refused.error, UsageError)
    assert refused.error.code == "QC-PLAN-017"
    own = [{"name": "a", "adapter": str(adapter)}]
    assert "'adapter'" in error("QC-COMPARE-003", lambda: named_recipes({**common, "recipes": own}), UsageError)


# --- shared weights ---


@pytest.mark.usefixtures("quick")
def test_a_weight_that_is_shared_keeps_its_adapter_and_is_not_merged_into(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    ids = torch.arange(5, 45).reshape(2, 20)
    kept = recipe_of(base, tmp_path / "adapter", tmp_path / "out", scheme="int8-channel", rules=[rule("lm_head")])
    assert convert(kept).passed
    expected = logits(model, ids)
    assert np.abs(in_onnxruntime(kept.output, ids) - expected).max() < 0.05 * np.abs(expected).max()
    merged = recipe_of(base, tmp_path / "adapter", tmp_path / "merged", merge_adapter=True)
    said = error("QC-ADAPTER-005", lambda: convert(merged))
    assert "lm_head.weight is model.embed_tokens.weight as well" in said


def rule(name: str) -> dict[str, str]:
    return {"pattern": name, "scheme": "int8-channel"}
