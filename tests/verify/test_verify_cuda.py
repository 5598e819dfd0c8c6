"""Verification of the CUDA target: parity by cosine and KL, what ran where, caches that stay on the device.

Where there is no GPU, the CPU provider stands in for it: everything but the kernels is then what runs on one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import publish, quantize_nearest
from narrow_graphs import CUDA_GRAPH
from onnx import TensorProto, helper
from safetensors.torch import load_file
from tiny_models import save_tensors, tiny_llama

from qconvert.errors import ParityError, TargetError, UsageError
from qconvert.execution import probes
from qconvert.ir.artifact import GRAPH, MANIFEST, REPORT
from qconvert.ir.report import Latency, Report
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.task import TASKS
from qconvert.load import load
from qconvert.ort import compare, session
from qconvert.ort.session import DeviceSession, empty, file_session, why_unavailable
from qconvert.pipeline import conversion, preparation, verification
from qconvert.recipe import Recipe
from qconvert.trace import trace
from qconvert.verify.narrow_parity import narrow_parity
from qconvert.verify.placement import Placement, measure_placement, placement

needs_cuda = pytest.mark.skipif(why_unavailable("cuda") is not None, reason="needs a CUDA device and onnxruntime-gpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    return tiny_llama(folder / "llama")


def recipe(source: Path, output: Path, **settings: Any) -> Recipe:
    data = {"source": str(source.parent / "text.txt"), "samples": 4, "length": 32}
    base = {"model": str(source), "output": str(output), "scheme": "int4-g32", "calibration": data, "evaluation": data}
    return Recipe.from_settings({**base, "targets": ["cuda"], **settings})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU provider in the place of CUDA's, unless there is one."""
    if why_unavailable("cuda") is not None:
        monkeypatch.setitem(session.PROVIDERS, "cuda", "CPUExecutionProvider")


# --- parity ---

LOGITS = np.array([[4.0, 1.0, -2.0], [0.5, 3.0, 0.0]], np.float32)


def test_equal_outputs_pass() -> None:
    part = narrow_parity("cuda", TASKS["causal-lm"], lambda: [(LOGITS, LOGITS)])
    assert (part.status, part.cosine, part.kl, part.max_relative_error) == ("passed", 1.0, 0.0, 0.0)


def test_kl_is_the_mean_over_positions_of_all_outputs() -> None:
    shifted = LOGITS + np.array([[0.0, 0.02, 0.0], [0.0, 0.0, 0.0]], np.float32)
    p, q = (torch.from_numpy(x).double().softmax(-1) for x in (LOGITS, shifted))
    expected = float((p * (p / q).log()).sum()) / 4
    part = narrow_parity("cuda", TASKS["causal-lm"], lambda: [(shifted, LOGITS), (LOGITS, LOGITS)])
    assert part.kl == pytest.approx(expected, rel=1e-9)
    assert part.status == "passed"


def test_another_distribution_fails_though_the_cosine_is_high() -> None:
    high = LOGITS + 100  # only differences between logits count
    bumped = high + np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]], np.float32)
    part = narrow_parity("cuda", TASKS["causal-lm"], lambda: [(bumped, high)])
    assert part.cosine is not None
    assert part.cosine > 0.999
    assert part.status == "failed"
    assert part.reason is not None
    assert part.reason.startswith("KL 0.00")
    assert narrow_parity("cuda", TASKS["encoder"], lambda: [(bumped, high)]).status == "passed"  # whose outputs are no logits


def test_the_worst_cosine_counts() -> None:
    turned = np.array([1.0, 0.05], np.float32), np.array([1.0, 0.0], np.float32)
    part = narrow_parity("cuda", TASKS["encoder"], lambda: [(LOGITS, LOGITS), turned])
    assert part.cosine == pytest.approx(1 / np.hypot(1, 0.05))
    assert (part.status, part.reason, part.kl) == ("failed", "cosine 1, the limit is 0.999", None)


@pytest.mark.parametrize("found", [LOGITS[:1], LOGITS * np.nan], ids=["shape", "not-finite"])
def test_outputs_that_can_not_be_compared_fail(found: Any) -> None:
    assert narrow_parity("cuda", TASKS["encoder"], lambda: [(found, LOGITS)]).status == "failed"


def test_what_float16_can_not_hold_is_the_recipes_choice() -> None:
    with pytest.raises(UsageError, match="activations leave the range of float16, which ends at 65504") as caught:
        narrow_parity("cuda", TASKS["encoder"], lambda: [(np.full_like(LOGITS, np.inf), LOGITS)], in_float16=True)
    assert caught.value.code == "QC-CUDA-004"
    for found, wanted in [(LOGITS[:1], LOGITS), (LOGITS * np.nan, LOGITS * np.nan)]:  # another shape; wrong weights
        assert narrow_parity("cuda", TASKS["encoder"], lambda p=(found, wanted): [p], in_float16=True).status == "failed"  # type: ignore[misc]


def test_a_graph_that_can_not_be_run_fails() -> None:
    def compare() -> Any:
        raise RuntimeError("no kernel image")

    part = narrow_parity("cuda", TASKS["encoder"], compare)
    assert (part.status, part.reason) == ("failed", "it can't be run: RuntimeError: no kernel image")


def test_a_lack_of_memory_says_nothing_about_the_graph() -> None:
    def compare() -> Any:
        raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 4096")

    with pytest.raises(RuntimeError, match="requested buffer"):
        narrow_parity("cuda", TASKS["encoder"], compare)


# --- what ran where ---


def event(name: str, op: str, provider: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    types = {"input_type_shape": [{kind: [1]} for kind in inputs], "output_type_shape": [{kind: [1]} for kind in outputs]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": op, "provider": provider, **types}}


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def test_a_profile_says_what_ran_on_the_device_what_on_the_cpu_and_what_was_copied() -> None:
    events = [
        {"cat": "Session", "name": "model_loading"},
        event("mm", "MatMulNBits", CUDA, ["float16", "uint8", "float16"], ["float16"]),
        event("copy", "MemcpyToHost", CUDA, ["int64"], ["int64"]),
        event("len", "Squeeze", CPU, ["int64"], ["int64"]),
        event("elu", "Elu", CPU, ["float16"], ["float16"]),
        event("size", "Shape", CPU, ["float16"], ["int64"]),
    ]
    assert placement(events, "cuda") == Placement(
        nodes=1, cpu_nodes=("Squeeze len", "Elu elu", "Shape size"), misplaced=("Elu elu", "Shape size"), copies=1
    )


def test_a_profile_of_onnx_runtime_is_read(tmp_path: Path) -> None:
    x, y, n = (helper.make_tensor_value_info(*each) for each in (("x", 1, ["rows", 4]), ("y", 1, None), ("n", 7, None)))
    nodes = [helper.make_node("Softmax", ["x"], ["y"], name="soft"), helper.make_node("Shape", ["y"], ["n"], name="size")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y, n]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, tmp_path / "m.onnx")
    found = measure_placement({"model": tmp_path / "m.onnx"}, "cpu", {"x": torch.zeros(2, 4)})
    assert found == Placement(nodes=2, cpu_nodes=(), misplaced=(), copies=0)


# --- sessions on a device ---


def test_a_device_session_gives_what_a_plain_one_gives_and_keeps_caches_to_itself(source: Path, tmp_path: Path) -> None:
    model = load(str(source), lambda _: None)
    tensors = quantize_nearest(model, lambda name, _: QuantScheme.parse("int4-g32"))
    folder = publish(model, trace(model), tensors, tmp_path / "out", ("cuda",)).folder
    plain = file_session(folder / CUDA_GRAPH)
    device = DeviceSession(plain, "cpu")
    inputs = compare.feed(device, probes.padded_batch(model))
    logits, *caches = device.run(None, inputs)
    expected, *arrays = plain.run(None, inputs)
    assert np.array_equal(logits, expected)
    assert {cache.data_type() for cache in caches} == {"tensor(float16)"}
    assert all(np.array_equal(cache.numpy(), array) for cache, array in zip(caches, arrays, strict=True))
    assert compare.relative_error(model, device, [(torch.zeros(1, 10, 384),)] * 2) > 0  # a step on the caches works too


@pytest.mark.parametrize("kind", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"])
def test_empty_caches_have_any_type(kind: str) -> None:
    value = empty((2, 3, 0, 4), kind)
    assert (value.data_type(), list(value.shape())) == (kind, [2, 3, 0, 4])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_installed_but_does_not_start_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu without a device: sessions fall back to the CPU and say nothing."""
    if why_unavailable("cuda") is None:
        pytest.skip("it does start here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    reason = why_unavailable("cuda")
    assert reason is not None
    assert reason.startswith("ONNX Runtime's provider for cuda does not start here")


# --- the whole way ---


@pytest.mark.usefixtures("quick", "stand_in")
def test_the_cuda_target_is_verified_where_it_runs(source: Path, tmp_path: Path) -> None:
    report = conversion.convert(recipe(source, tmp_path / "out", targets=["cpu", "cuda"]))
    assert report.passed is True
    parity = next(part for part in report.parity if part.target == "cuda")
    assert parity.cosine is not None
    assert parity.cosine > 0.9999
    assert parity.kl is not None
    assert parity.kl < 1e-4
    cpu, cuda = report.latency
    assert cuda.decode_tokens_per_s is not None
    assert (cuda.speedup, cuda.copies) == (None, 0)  # there is no float graph for CUDA to compare with
    assert (cpu.device_nodes, cpu.cpu_nodes, cpu.copies) == (None, None, None)
    document = json.loads((tmp_path / "out" / REPORT).read_text())
    assert {"cosine", "kl"} <= document["parity"][-1].keys()
    assert document["parity"][0].keys() == {"target", "status", "max_relative_error", "reason"}


@pytest.mark.usefixtures("quick", "stand_in")
def test_a_node_that_computes_on_the_cpu_instead_is_a_failure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Placement(nodes=60, cpu_nodes=("Shape a", "Elu b"), misplaced=("Elu b",), copies=2)
    monkeypatch.setattr("qconvert.verify.target_check.measure_placement", lambda *_: found)
    report = conversion.convert(recipe(source, tmp_path / "out"))
    latency = report.latency[0]
    assert (latency.status, latency.reason) == ("failed", "these nodes ran on the CPU: Elu b")
    assert (latency.device_nodes, latency.cpu_nodes, latency.copies) == (60, ("Shape a", "Elu b"), 2)
    assert report.passed is False


@pytest.mark.usefixtures("quick", "stand_in")
def test_a_model_whose_activations_leave_float16_needs_bfloat16(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source.parent, tmp_path / "source")
    large = tmp_path / "source" / "llama"
    tensors = {name: tensor.clone() for name, tensor in load_file(large / "model.safetensors").items()}
    for name, factor in (("gate_proj", 300.0), ("up_proj", 300.0), ("down_proj", 1e-3)):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= factor
    save_tensors(tensors, large)
    with pytest.raises(UsageError) as caught:
        conversion.convert(recipe(large, tmp_path / "out", targets=["cpu", "cuda"]))
    assert (caught.value.code, caught.value.exit_code) == ("QC-CUDA-004", 2)
    assert "bfloat16" in caught.value.hint
    assert conversion.convert(recipe(large, tmp_path / "out", targets=["cpu"])).passed


def scaled_attention(graph: bytes) -> bytes:
    """The graph, its first attention with another scale."""
    model = onnx.load_from_string(graph)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.5
    return model.SerializeToString()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("quick", "stand_in")
@pytest.mark.parametrize(
    ("damage", "said"),
    [(scaled_attention, "cuda: "), (lambda graph: b"no graph", "cuda: it can't be run")],
    ids=["computes something else", "can't be run"],
)
def test_a_graph_that_is_wrong_is_never_published(
    source: Path, damage: Callable[[bytes], bytes], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = verification.measure

    def damaged(folder: Path, *rest: Any) -> Report:
        (folder / CUDA_GRAPH).write_bytes(damage((folder / CUDA_GRAPH).read_bytes()))
        return measure(folder, *rest)

    monkeypatch.setattr(verification, "check_digests", lambda folder: None)
    monkeypatch.setattr(verification, "measure", damaged)
    with pytest.raises(ParityError, match=said):
        conversion.convert(recipe(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(why_unavailable("cuda") is None, reason="CUDA runs here")
def test_what_ran_nowhere_has_not_passed_and_verify_does_not_inherit_the_permission(source: Path, tmp_path: Path) -> None:
    report = conversion.convert(recipe(source, tmp_path / "out", layout="onnx", allow_unverified=True))
    assert report.passed is None
    with pytest.raises(TargetError, match="not everything could be run here"):
        verification.verify(tmp_path / "out")


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(why_unavailable("cuda") is None, reason="CUDA runs here")
def test_a_folder_for_cuda_alone_is_complete_and_says_that_it_was_not_run(source: Path, tmp_path: Path) -> None:
    planned = preparation.plan(recipe(source, tmp_path / "out"))
    with pytest.raises(TargetError) as caught:
        conversion.convert(recipe(source, tmp_path / "out"))
    assert caught.value.exit_code == 7
    assert (tmp_path / "out" / CUDA_GRAPH).exists()
    assert not (tmp_path / "out" / GRAPH).exists()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert CUDA_GRAPH in manifest["outputs"]
    sidecar = {name: math.prod(entry["shape"]) * 2 for name, entry in manifest["sidecar"].items()}  # all of it float16
    assert planned.cuda_bytes == sum(size for name, size in sidecar.items() if name.startswith("model."))  # but for constants
    document = json.loads((tmp_path / "out" / REPORT).read_text())
    assert [(part["target"], part["status"]) for part in document["parity"]] == [
        ("transformers", "passed"),
        ("cuda", "not-run"),
        ("float", "passed"),
    ]
    with pytest.raises(TargetError, match=r"the folder holds no model\.onnx: convert with --target cpu"):
        verification.verify(tmp_path / "out", targets=["cpu"])


@needs_cuda
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g16", "int8-channel", "int8-channel-a8"])
def test_on_a_gpu_every_scheme_agrees_with_its_weights(scheme: str, dtype: str, source: Path, tmp_path: Path) -> None:
    report = conversion.convert(recipe(source, tmp_path / "out", scheme=scheme, targets=["cpu", "cuda"], cuda_dtype=dtype))
    assert report.passed is True
    latency: Latency = report.latency[1]
    assert latency.status == "passed"
    assert latency.copies == 0


def test_the_types_of_caches_are_onnxs() -> None:
    assert session.CACHE_TYPES == {
        "tensor(float)": TensorProto.FLOAT,
        "tensor(int8)": TensorProto.INT8,
        "tensor(float16)": TensorProto.FLOAT16,
        "tensor(bfloat16)": TensorProto.BFLOAT16,
    }
