"""The main job end to end, on tiny models: five quantizers, three kinds of model, every way it can end."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tiny_models import save_tensors, tiny_bert, tiny_gpt2, tiny_llama
from tokenizers import Tokenizer
from torch import nn

from qconvert.cli import main
from qconvert.cli.exits import verdict
from qconvert.errors import InputError, ParityError, TargetError, UsageError
from qconvert.ir.artifact import CARD, GRAPH, MANIFEST, REPORT, WEIGHTS
from qconvert.ir.layer import Block
from qconvert.ir.quantized import QuantizedBlock
from qconvert.ir.report import Report
from qconvert.job import Job
from qconvert.ort.session import file_session
from qconvert.pipeline import conversion, preparation, verification
from qconvert.plugin.host.manager import BUILTINS, PluginManager
from qconvert.recipe import Recipe
from qconvert.recipe.gates import Gate
from qconvert.report.plan import document, table
from qconvert.vocabulary import PRESETS

QUANTIZERS = ("absmax", "zero-point", "per-channel", "hqq", "awq", "gptq", "llm-int8", "smoothquant")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints, digits.py and a text for calibration and evaluation."""
    root = tmp_path_factory.mktemp("sources")
    (root / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    tiny_llama(root / "llama")
    tiny_bert(root / "bert")
    tiny_gpt2(root / "gpt2")
    train_digits(root)
    return root


def recipe(source: Path, output: Path, **settings: Any) -> Recipe:
    """Of a checkpoint with the text beside it, or else in the folder of all sources."""
    data = {"source": str(source.parent / "text.txt"), "samples": 4, "length": 32}
    return Recipe.from_settings(
        {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, **settings}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those that hold timings."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if name not in (REPORT, CARD)}


# --- digits: a network that really classifies ---

DIGITS = """
from pathlib import Path
import numpy as np
import torch
from torch import nn

def factory():
    arrays = np.load(Path(__file__).with_name("digits.npz"))
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    module.load_state_dict({name: torch.from_numpy(arrays[name]) for name in module.state_dict()})
    return module, torch.from_numpy(arrays["examples"])
"""


def train_digits(folder: Path) -> None:
    """A 64-128-128-10 network on 1,200 of scikit-learn's digits; the rest is for the tests."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[:1200]), y[:1200]).backward()
            optimizer.step()
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    np.savez(folder / "digits.npz", **weights, examples=x[:200].numpy(), x=x[1200:].numpy(), y=y[1200:].numpy())
    (folder / "digits.py").write_text(DIGITS)


def digits_accuracy(arrays: Any, folder: Path | None = None) -> float:
    """On held-out digits: of the float network, or of an artifact."""
    if folder is None:
        output = arrays["x"]
        for index in (0, 2, 4):
            output = np.maximum(output, 0) if index else output
            output = output @ arrays[f"{index}.weight"].T + arrays[f"{index}.bias"]
    else:
        session = file_session(folder / GRAPH)
        output = session.run(None, {session.get_inputs()[0].name: arrays["x"]})[0]
    return float((output.argmax(1) == arrays["y"]).mean())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_digits_lose_at_most_half_a_point_in_int8_at_a_quarter_of_the_size(
    quantizer: str, sources: Path, tmp_path: Path
) -> None:
    scheme = "int8-channel" if quantizer == "awq" else None  # its default is int4
    settings = {"model": f"module:{sources / 'digits.py'}:factory", "output": str(tmp_path / "out")}
    report = conversion.convert(Recipe.from_settings({**settings, "quantizer": quantizer, "scheme": scheme}))
    assert report.passed
    assert [(part.target, part.status) for part in report.parity] == [("cpu", "passed"), ("float", "passed")]
    arrays = np.load(sources / "digits.npz")
    before = digits_accuracy(arrays)
    assert before > 0.9
    assert digits_accuracy(arrays, tmp_path / "out") >= before - 0.005
    float_bytes = sum(arrays[f"{index}.weight"].nbytes for index in (0, 2, 4))
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    assert sum(layer.bytes for layer in report.layers) <= 0.27 * float_bytes


# --- checkpoints ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_quantizer_turns_a_checkpoint_into_an_artifact_that_agrees_with_its_weights(
    name: str, quantizer: str, sources: Path, tmp_path: Path
) -> None:
    """parity "transformers": the folder was loaded with from_pretrained and gave the dequantized model's outputs."""
    report = conversion.convert(recipe(sources / name, tmp_path / "out", quantizer=quantizer))
    assert report.passed
    assert verdict(report) == 0
    assert [(part.target, part.status) for part in report.parity] == [
        ("cpu", "passed"),
        ("transformers", "passed"),
        ("float", "passed"),
    ]
    assert [layer.name.rpartition(".")[2] for layer in report.layers][:3] in (
        ["q_proj", "k_proj", "v_proj"],
        ["query", "key", "value"],
    )
    (fidelity,) = report.fidelity
    if name == "llama":
        assert 0 < (fidelity.kl or 0) < 0.1
    else:
        assert 0.99 < (fidelity.cosine or 0) < 1
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report.document()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {WEIGHTS, GRAPH, MANIFEST, REPORT, CARD, "config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.usefixtures("quick")
def test_gpt2_needs_the_onnx_layout_and_says_so(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'transformer\.h\.0\.attn\.c_attn' is a conv1d") as caught:
        conversion.convert(recipe(sources / "gpt2", tmp_path / "out"))
    assert (caught.value.code, caught.value.exit_code) == ("QC-PLAN-005", 2)
    assert "--layout onnx" in caught.value.hint
    assert not (tmp_path / "out").exists()
    report = conversion.convert(recipe(sources / "gpt2", tmp_path / "out", layout="onnx"))
    assert [(part.target, part.status) for part in report.parity] == [("cpu", "passed"), ("float", "passed")]


@pytest.mark.usefixtures("quick")
def test_layers_that_the_group_does_not_fit_are_listed_with_what_they_got(sources: Path, tmp_path: Path) -> None:
    asked = recipe(sources / "llama", tmp_path / "out", quantizer="per-channel", scheme="int4-g128")
    report = conversion.convert(asked)
    assert {part.target: part.status for part in report.parity} == dict.fromkeys(("cpu", "transformers", "float"), "passed")
    reason = "its width of 64 is no multiple of 128, the group of int4-g128"
    written = json.loads((tmp_path / "out" / REPORT).read_text())["layers"]
    found = {layer["name"]: (layer["scheme"], layer.get("reason")) for layer in written}
    assert found["model.layers.0.mlp.down_proj"] == ("int4-g128", None)
    assert found["model.layers.0.mlp.up_proj"] == ("int4-g64", reason)
    listed = f"int4-g64: {reason}: model.layers.0.self_attn.q_proj, "
    assert listed in (tmp_path / "out" / CARD).read_text().replace("\\", "")
    planned = preparation.plan(asked)
    assert {layer["name"]: layer.get("reason") for layer in document(planned)["layers"]} == {
        name: why for name, (_, why) in found.items()
    }
    shown = Console(file=io.StringIO(), width=400)
    shown.print(table(planned))
    assert f"12 in {listed}" in shown.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("quick")
def test_awq_scales_that_do_not_fold_stay_in_the_graph_of_the_onnx_layout(sources: Path, tmp_path: Path) -> None:
    """GELU lies between the MLP's linears, so the second one's smoothing scale has nowhere to go."""
    report = conversion.convert(recipe(sources / "gpt2", tmp_path / "out", quantizer="awq", layout="onnx"))
    assert report.passed
    names = [node.name for node in onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph.node]
    assert any(name.endswith("mlp.c_proj/ScaleInput") for name in names)
    assert not any("c_attn/ScaleInput" in name for name in names)  # that one is in the norm


@pytest.mark.usefixtures("quick")
def test_a_bfloat16_checkpoint_in_three_shards_keeps_bfloat16_where_it_is_not_quantized(sources: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama-bfloat16", dtype=torch.bfloat16, shards=3)
    shutil.copy(sources / "text.txt", tmp_path)
    report = conversion.convert(recipe(tmp_path / "llama-bfloat16", tmp_path / "out", quantizer="awq"))
    assert report.passed
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    plain = {name: dtype for name, dtype in dtypes.items() if name.endswith(("norm.weight", "embed_tokens.weight"))}
    assert set(plain.values()) == {torch.bfloat16}
    assert len(plain) == 2 * 2 + 2
    assert "lm_head.weight" not in dtypes  # tied


# --- the same again ---


@pytest.fixture(scope="module")
def uninterrupted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run of AWQ on the llama leaves."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    conversion.convert(recipe(sources / "llama", output, quantizer="awq", verify=False))
    return contents(output)


@pytest.mark.usefixtures("quick")
def test_the_same_run_gives_the_same_bytes(uninterrupted: dict[str, bytes], sources: Path, tmp_path: Path) -> None:
    conversion.convert(recipe(sources / "llama", tmp_path / "out", quantizer="awq", verify=False))
    again = contents(tmp_path / "out")
    assert list(again) == list(uninterrupted)
    assert [name for name in again if again[name] != uninterrupted[name]] == []


KILLED = """
import os, signal, sys
from qconvert.pipeline import conversion, preparation, verification
from qconvert.recipe import Recipe

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

real = conversion.Conversion.take

def first_block_only(self, block):
    real(self, block)
    kill()

if sys.argv[1] == "quantize":
    conversion.Conversion.take = first_block_only
else:
    conversion.write_report = kill
conversion.convert(Recipe.model_validate_json(sys.stdin.read()))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("stage", "left"), [("quantize", ["model.layers.1"]), ("publish", [])])
def test_a_run_that_was_killed_is_resumed_to_the_same_bytes(
    stage: str,
    left: list[str],
    uninterrupted: dict[str, bytes],
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = recipe(sources / "llama", tmp_path / "out", quantizer="awq", verify=False)
    killed = subprocess.run([sys.executable, "-c", KILLED, stage], input=mine.model_dump_json(), text=True)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    quantized: list[str] = []
    real = conversion.quantize  # type: ignore[attr-defined]

    def watched(block: Block, job: Job) -> QuantizedBlock:
        quantized.append(block.name)
        return real(block, job)

    monkeypatch.setattr(conversion, "quantize", watched)
    conversion.convert(mine)
    assert [name for name in quantized if name] == left
    resumed = contents(tmp_path / "out")
    assert list(resumed) == list(uninterrupted)
    assert [name for name in resumed if resumed[name] != uninterrupted[name]] == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick")
def test_a_sequential_and_tuned_run_goes_on_where_it_was_interrupted(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block that is left sees what was written of the first one, whoever wrote it."""
    settings = {"quantizer": "gptq", "scheme": "int4-g16-asym", "sequential": True, "tuning": {"steps": 5}, "verify": False}
    conversion.convert(recipe(sources / "llama", tmp_path / "whole", **settings))
    real = conversion.Conversion.take

    def first_block_only(self: conversion.Conversion, block: Block) -> None:
        real(self, block)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.Conversion, "take", first_block_only)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(recipe(sources / "llama", tmp_path / "resumed", **settings))
    monkeypatch.setattr(conversion.Conversion, "take", real)
    conversion.convert(recipe(sources / "llama", tmp_path / "resumed", **settings))
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "resumed")
    assert [name for name in whole if whole[name] != resumed[name]] == []
    conversion.convert(recipe(sources / "llama", tmp_path / "plain", **{**settings, "sequential": False}))
    assert contents(tmp_path / "plain")[WEIGHTS] != whole[WEIGHTS]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_and_loads_in_transformers(preset: str, sources: Path, tmp_path: Path) -> None:
    report = conversion.convert(recipe(sources / "llama", tmp_path / "out", preset=preset))
    assert report.passed
    assert {part.target: part.status for part in report.parity}["transformers"] == "passed"
    assert f"--preset {preset}" in (tmp_path / "out" / CARD).read_text(encoding="utf-8")


# --- verdicts ---


@pytest.mark.usefixtures("quick")
def test_without_verification_nothing_is_claimed_and_verify_makes_up_for_it(sources: Path, tmp_path: Path) -> None:
    report = conversion.convert(recipe(sources / "llama", tmp_path / "out", verify=False))
    assert report.passed is None
    assert verdict(report) == 0
    assert (report.parity, report.fidelity, report.gates) == ((), (), ())
    assert json.loads((tmp_path / "out" / REPORT).read_text())["passed"] is None
    assert "**Not verified.**" in (tmp_path / "out" / CARD).read_text()
    later = verification.verify(tmp_path / "out")
    assert [part.status for part in later.parity] == ["passed", "passed", "passed"]
    assert later.samples.evaluation == 4
    assert later.passed
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == later.document()
    page = (tmp_path / "out" / CARD).read_text()
    assert page.startswith("# llama, int8-channel-a8")
    assert "**Computes what its weights say; no limits set.** See the evidence" in page
    assert str(tmp_path) not in page

    verification.verify(tmp_path / "out", gates=[Gate.parse("kl<=1e-9")])  # which is not what the folder was made for
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == later.document()


@pytest.mark.usefixtures("quick")
def test_verify_needs_no_calibration_data_where_other_data_judges(sources: Path, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text((sources / "text.txt").read_text())
    data = {"source": str(text), "samples": 3, "length": 32}
    made = conversion.convert(recipe(sources / "llama", tmp_path / "out", quantizer="awq", scheme="int4-g32", calibration=data))
    assert (made.samples.calibration, made.samples.evaluation) == (3, 4)
    text.unlink()
    again = verification.verify(tmp_path / "out")
    assert (again.samples, again.fidelity) == (made.samples, made.fidelity)


@pytest.mark.usefixtures("quick")
def test_the_gates_that_a_folder_is_first_verified_by_are_in_its_report(sources: Path, tmp_path: Path) -> None:
    conversion.convert(recipe(sources / "bert", tmp_path / "out", verify=False))
    report = verification.verify(tmp_path / "out", gates=[Gate.parse("cosine>=0.9999999")])
    assert verdict(report) == 1
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report.document()
    page = (tmp_path / "out" / CARD).read_text()
    assert "> **Failed: 1 of 1 gates missed.**" in page
    assert "--gate 'cosine>=0.9999999'" in page


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("limit", "passed", "exit_code"), [(0.9, None, 0), (0.1, False, 1)])
def test_without_verification_gates_on_size_are_judged(
    limit: float, passed: bool | None, exit_code: int, sources: Path, tmp_path: Path
) -> None:
    report = conversion.convert(recipe(sources / "llama", tmp_path / "out", verify=False, gates=[gate("ratio", limit)]))
    assert report.passed is passed
    assert verdict(report) == exit_code
    (judged,) = report.gates
    assert judged.value == report.size.ratio
    assert judged.passed is (passed is None)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["passed"] is passed
    headline = "Not verified; 1 of 1 gates kept" if passed is None else "Failed: 1 of 1 gates missed; not verified"
    assert f"**{headline}.** Nobody has run" in (tmp_path / "out" / CARD).read_text()


@pytest.mark.usefixtures("quick")
def test_without_limits_the_command_says_what_was_shown_and_not_that_it_passed(sources: Path, tmp_path: Path) -> None:
    asked = recipe(sources / "llama", tmp_path / "out", scheme="int4-channel")
    (tmp_path / "recipe.yaml").write_text(asked.model_dump_json())
    result = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0
    words = " ".join(result.stderr.split())
    assert "computes what its weights say; no limits set - per-channel, int4-channel, causal-lm size" in words
    document = json.loads((tmp_path / "out" / REPORT).read_text())
    assert document["fidelity"][0]["kl"] > 0.01
    assert f"fidelity cpu measured KL {document['fidelity'][0]['kl']:.3g} nats" in words
    assert "> **Computes what its weights say; no limits set.** See the evidence" in (tmp_path / "out" / CARD).read_text()


def gate(metric: str, limit: float, comparison: str = "<=") -> dict[str, Any]:
    return {"metric": metric, "comparison": comparison, "limit": limit}


@pytest.mark.usefixtures("quick")
def test_gates_decide_on_the_verdict_and_the_output_is_there_to_look_at(sources: Path, tmp_path: Path) -> None:
    gates = [gate("kl", 1e-9), gate("ratio", 0.9), gate("top1", 0.5, ">=")]
    report = conversion.convert(recipe(sources / "llama", tmp_path / "out", gates=gates))
    assert report.passed is False
    assert verdict(report) == 1
    assert {result.metric: result.passed for result in report.gates} == {"kl": False, "ratio": True, "top1": True}
    by_metric = {result.metric: result.value for result in report.gates}
    assert by_metric["kl"] == report.fidelity[0].kl
    assert by_metric["ratio"] == report.size.ratio
    assert (tmp_path / "out" / MANIFEST).exists()


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.usefixtures("quick", "no_cuda")
def test_a_target_that_can_not_be_run_here_is_published_and_exit_code_7(sources: Path, tmp_path: Path) -> None:
    settings = {"quantizer": "absmax", "scheme": "int4-g32", "targets": ["cpu", "cuda"]}
    with pytest.raises(TargetError, match="cuda: this machine's ONNX Runtime has no provider for cuda") as caught:
        conversion.convert(recipe(sources / "llama", tmp_path / "out", **settings))
    assert (caught.value.code, caught.value.exit_code) == ("QC-TARGET-001", 7)
    document = json.loads((tmp_path / "out" / REPORT).read_text())
    assert {part["target"]: part["status"] for part in document["parity"]} == {
        "cpu": "passed", "transformers": "passed", "float": "passed", "cuda": "not-run"
    }  # fmt: skip
    report = conversion.convert(recipe(sources / "llama", tmp_path / "allowed", allow_unverified=True, **settings))
    assert verdict(report) == 0
    card = (tmp_path / "allowed" / CARD).read_text()
    assert "not run on cuda" in card
    verification.verify(tmp_path / "allowed", targets=["cpu"])
    assert (tmp_path / "allowed" / CARD).read_text() == card  # it tells of as much, and of cuda


def damaged_graph(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.5
    (folder / GRAPH).write_bytes(model.SerializeToString())


def layer_that_loaders_do_not_find(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dequantize"] = False  # with it, every weight that has a scale is found
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.up_proj")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("quick")
def test_on_a_busy_machine_the_report_says_so_and_calls_nothing_slow(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.verify.latency.others_share", lambda before: 0.6)
    mine = recipe(sources / "llama", tmp_path / "out", scheme="int4-g32")
    (tmp_path / "recipe.yaml").write_text(mine.model_dump_json())
    result = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0
    (latency,) = json.loads((tmp_path / "out" / REPORT).read_text())["latency"]
    assert latency["others_share"] == 0.6
    assert latency["speedup"] == latency["float_processor_ms"] / latency["processor_ms"]
    assert "trials" not in latency
    for text in (result.stderr, (tmp_path / "out" / CARD).read_text()):
        words = " ".join(text.split())
        assert f"{latency['speedup']:.2f} x the speed of float, by processor time, measured while the machine was busy" in words
        assert "slower" not in words


@pytest.mark.usefixtures("quick")
def test_the_recipe_says_how_long_is_measured_and_the_report_how_often(sources: Path, tmp_path: Path) -> None:
    flags = ["--scheme", "int4-g32", "--timing-seconds", "1e-6"]
    mine = recipe(sources / "llama", tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(mine.model_dump_json())
    result = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml"), *flags])
    assert result.exit_code == 0
    (latency,) = json.loads((tmp_path / "out" / REPORT).read_text())["latency"]
    # Each once, whatever the budget.
    assert (latency["repeats"], latency["float_repeats"], latency["decode_repeats"], latency["steady"]) == (1, 1, 1, False)
    assert latency["p25_ms"] == latency["p50_ms"] == latency["p75_ms"]
    for text in (result.stderr, (tmp_path / "out" / CARD).read_text()):
        words = " ".join(text.split())
        assert (
            f"{latency['speedup']:.2f} x the speed of float, but one of them was timed too few times: neither was shown"
            in words
        )
        assert "1 run" in words
        assert "slower" not in words
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["recipe"]["timing_seconds"] == 1e-6
    wrong = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml"), "--timing-seconds", "0", "--force"])
    assert wrong.exit_code == 2
    assert "QC-RECIPE-001" in wrong.stderr


DAMAGES = [
    (damaged_graph, "cpu: outputs, with float activations, differ by"),
    (layer_that_loaders_do_not_find, "transformers: outputs differ by"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=["graph", "config.json"])
def test_an_artifact_that_is_wrong_is_never_published(
    damage: Callable[[Path], None], reason: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conversion.export  # type: ignore[attr-defined]

    def wrong_export(*args: Any, **settings: Any) -> None:
        real(*args, **settings)
        damage(args[-1].folder)

    monkeypatch.setattr(conversion, "export", wrong_export)
    with pytest.raises(ParityError, match=reason) as caught:
        conversion.convert(recipe(sources / "llama", tmp_path / "out", scheme="int8-channel"))
    assert (caught.value.code, caught.value.exit_code) == ("QC-PARITY-001", 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_where_memory_runs_out_in_verification_the_work_is_kept(
    uninterrupted: dict[str, bytes], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> float:
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc")

    mine = recipe(sources / "llama", tmp_path / "out", quantizer="awq")
    (tmp_path / "recipe.yaml").write_text(mine.model_dump_json())
    command = ["run", str(tmp_path / "recipe.yaml"), "--json"]
    with monkeypatch.context() as patched:
        patched.setattr("qconvert.verify.target_check.float_activations_session", no_memory)
        failed = CliRunner().invoke(main, command)
    assert failed.exit_code == 6
    error = json.loads(failed.stdout)["error"]
    assert error["code"] == "QC-MEMORY-001"
    assert "std::bad_alloc" in error["message"]
    assert not (tmp_path / "out").exists()

    real, again = conversion.quantize, []  # type: ignore[attr-defined]

    def watched(block: Block, job: Job) -> QuantizedBlock:
        again.append(block)
        return real(block, job)

    monkeypatch.setattr(conversion, "quantize", watched)
    resumed = CliRunner().invoke(main, command)
    assert resumed.exit_code == 0, resumed.stderr
    assert again == []
    weights = contents(tmp_path / "out")
    assert weights[WEIGHTS] == uninterrupted[WEIGHTS]


@pytest.fixture
def overflowing(sources: Path, tmp_path: Path) -> Path:
    """A BERT whose norms overflow where the text has a tilde, and such a text beside it."""
    shutil.copytree(sources / "bert", tmp_path / "bert")
    shutil.copy(sources / "text.txt", tmp_path)
    (tmp_path / "tilde.txt").write_text((tmp_path / "text.txt").read_text().replace(" has ", " has ~"))
    (tilde,) = Tokenizer.from_file(str(tmp_path / "bert" / "tokenizer.json")).encode("~", add_special_tokens=False).ids
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "bert" / WEIGHTS).items()}
    tensors["embeddings.word_embeddings.weight"][tilde] = torch.finfo(torch.float32).max
    save_tensors(tensors, tmp_path / "bert")
    return tmp_path


@pytest.mark.usefixtures("quick")
def test_a_float_model_that_gives_nan_for_a_token_is_blamed_itself_and_the_work_is_kept(
    overflowing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"source": str(overflowing / "tilde.txt"), "samples": 4, "length": 32}
    mine = recipe(overflowing / "bert", overflowing / "out", evaluation=evaluation)
    (overflowing / "recipe.yaml").write_text(mine.model_dump_json())
    command = ["run", str(overflowing / "recipe.yaml")]
    failed = CliRunner().invoke(main, [*command, "--json"])
    assert failed.exit_code == 3
    error = json.loads(failed.stdout)["error"]
    assert error["code"] == "QC-FLOAT-001"
    assert "NaN or infinity comes out of the float model for evaluation sample 1" in error["message"]
    assert not (overflowing / "out").exists()

    monkeypatch.setattr("qconvert.pipeline.conversion.quantize", None)  # nothing is left to quantize
    assert CliRunner().invoke(main, [*command, "--no-verify"]).exit_code == 0
    verified = CliRunner().invoke(main, ["verify", str(overflowing / "out"), "--evaluation", str(overflowing / "text.txt")])
    assert verified.exit_code == 0, verified.stderr
    assert json.loads((overflowing / "out" / REPORT).read_text())["passed"] is True


def test_a_float_model_that_gives_nothing_but_nan_is_refused_by_the_plan(overflowing: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(overflowing / "bert" / WEIGHTS).items()}
    tensors["embeddings.word_embeddings.weight"][:] = torch.finfo(torch.float32).max
    save_tensors(tensors, overflowing / "bert")
    with pytest.raises(InputError, match="for the inputs that its trace is checked on") as caught:
        preparation.plan(recipe(overflowing / "bert", overflowing / "out"))
    assert caught.value.code == "QC-FLOAT-001"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("quantizer", ["gptq", "smoothquant"])
def test_nan_in_calibration_is_not_blamed_on_the_quantizer(quantizer: str, overflowing: Path) -> None:
    calibration = {"source": str(overflowing / "tilde.txt"), "samples": 4, "length": 32}
    with pytest.raises(InputError, match=r"goes into 'encoder\.layer\.0\.attention\.self\.query' during calibration") as caught:
        conversion.convert(recipe(overflowing / "bert", overflowing / "out", quantizer=quantizer, calibration=calibration))
    assert caught.value.code == "QC-FLOAT-001"


class Spy(PluginManager):
    """Remembers what conversion_finished was told."""

    told: list[tuple[Recipe, Report, bool]]

    def __init__(self) -> None:
        super().__init__(BUILTINS)
        self.told = []

    def conversion_finished(self, recipe: Recipe, report: Report) -> None:
        self.told.append((recipe, report, (recipe.output / MANIFEST).exists()))


@pytest.mark.usefixtures("quick")
def test_plugins_are_told_once_when_the_output_is_there(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    monkeypatch.setattr("qconvert.pipeline.preflight.plugin_manager", lambda _: spy)
    mine = recipe(sources / "bert", tmp_path / "out")
    report = conversion.convert(mine)
    assert spy.told == [(mine, report, True)]
    verification.verify(tmp_path / "out")
    assert len(spy.told) == 1


# --- verify, later ---


@pytest.fixture
def published(quick: None, sources: Path, tmp_path: Path) -> Path:
    """An output beside its own source."""
    shutil.copytree(sources / "bert", tmp_path / "bert")
    shutil.copy(sources / "text.txt", tmp_path)
    conversion.convert(recipe(tmp_path / "bert", tmp_path / "out"))
    return tmp_path / "out"


def test_an_output_is_verified_again_where_it_lies_and_where_it_was_moved_with_its_source(published: Path) -> None:
    first = verification.verify(published)
    assert first.passed
    moved = published.parent / "elsewhere"
    moved.mkdir()
    published.rename(moved / "out")
    for name in ("bert", "text.txt"):
        (published.parent / name).rename(moved / name)
    again = verification.verify(moved / "out")
    assert again.fidelity == first.fidelity


def test_an_output_that_a_killed_run_has_left_under_another_name_is_verified_under_its_own(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without an exchange of two names; the run is stopped between its two renames."""
    before = contents(published)
    real = Path.rename

    def first_only(path: Path, target: Path) -> Path:
        if path.name == "files":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("qconvert.storage.output._exchange", lambda one, other: False)
        patch.setattr(Path, "rename", first_only)
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(recipe(published.parent / "bert", published, quantizer="absmax", force=True, verify=False))
    assert not published.exists()
    assert verification.verify(published).passed
    assert contents(published) == before


def test_without_its_float_source_its_own_files_are_checked_and_the_rest_is_refused_clearly(published: Path) -> None:
    shutil.rmtree(published.parent / "bert")
    with pytest.raises(InputError, match=r"the files of .*out are what was written, but the float model") as caught:
        verification.verify(published)
    assert (caught.value.code, caught.value.exit_code) == ("QC-VERIFY-003", 3)
    assert "does not exist" in caught.value.message
    assert MANIFEST in caught.value.hint
    (published / GRAPH).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        verification.verify(published)
    assert caught.value.code == "QC-VERIFY-001"


def test_another_source_in_the_place_of_its_own_is_refused(published: Path) -> None:
    vocabulary = published.parent / "bert" / "tokenizer_config.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    with pytest.raises(
        InputError, match=r"'bert' is not what .*out was made from: 'tokenizer_config\.json' is another"
    ) as caught:
        verification.verify(published)
    assert caught.value.code == "QC-VERIFY-004"


def test_damage_that_the_manifest_was_made_to_agree_with_fails_parity(quick: None, sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    conversion.convert(recipe(sources / "llama", out, quantizer="absmax", scheme="int4-g32"))
    damaged_graph(out)
    manifest = json.loads((out / MANIFEST).read_text())
    with pytest.raises(InputError) as digest:
        verification.verify(out)
    assert digest.value.code == "QC-VERIFY-001"
    manifest["outputs"][GRAPH] = hashlib.sha256((out / GRAPH).read_bytes()).hexdigest()
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ParityError) as parity:
        verification.verify(out)
    assert parity.value.code == "QC-PARITY-001"


# --- and nothing replaced by anything ---


@pytest.mark.slow
def test_the_command_runs_and_verifies_in_a_fresh_process(sources: Path, tmp_path: Path) -> None:
    factory = f"module:{sources / 'digits.py'}:factory"
    command = [
        sys.executable,
        "-m",
        "qconvert",
        "run",
        "--model",
        factory,
        "--output",
        "out",
        "--gate",
        "cosine>=0.9",
        "--json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["passed"] is True
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["latency"][0]["p50_ms"] > 0
