"""Static activations, from a module in a file to an artifact: what integer kernels run, how exact it is, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import static_modules
import torch
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper
from tiny_models import tiny_bert, tiny_llama

from qconvert.cli import main
from qconvert.errors import ParityError, QConvertError
from qconvert.export import export
from qconvert.ir.artifact import GRAPH, WEIGHTS
from qconvert.ir.report import Report
from qconvert.ort.session import session_options
from qconvert.pipeline import conversion
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

A8 = "int8-channel-a8-static"
RESIDUAL = f"module:{static_modules.__file__}:residual"
DIGITS = f"module:{static_modules.__file__}:classifier"
FEW = {"calibration": {"samples": 16, "length": 32}, "evaluation": {"samples": 16, "length": 32}}


def run(model: str, output: Path, scheme: str = A8, **settings: Any) -> Report:
    return convert(Recipe.from_settings({"model": model, "output": str(output), "scheme": scheme, **FEW, **settings}))


def operators(folder: Path, optimized: Path) -> Counter[str]:
    """How many nodes of each type a session of the artifact runs."""
    options = session_options()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)


def constants(folder: Path) -> dict[str, Any]:
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    inside = [each for each in graph.initializer if each.data_location != TensorProto.EXTERNAL]
    return {each.name: numpy_helper.to_array(each) for each in inside}


def test_all_of_a_residual_network_runs_on_codes(tmp_path: Path) -> None:
    """Batch norms are part of convolutions or are some, padding is theirs, activation functions are cut off by codes."""
    report = run(RESIDUAL, tmp_path / "out")
    assert report.passed
    (fidelity,) = report.fidelity
    assert fidelity.cosine is not None
    assert fidelity.cosine > 0.999
    found = operators(tmp_path / "out", tmp_path / "optimized.onnx")
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"], found["NhwcMaxPool"]) == (9, 2, 2, 1)
    assert not found.keys() & {"BatchNormalization", "Conv", "FusedConv", "Relu", "Clip", "Pad", "Gemm", "Add", "If"}
    assert {layer.scheme for layer in report.layers} == {A8}
    assert "late_norm" in {layer.name for layer in report.layers}


def test_a_trained_classifier_keeps_its_accuracy_in_less_than_a_third(tmp_path: Path) -> None:
    report = run(DIGITS, tmp_path / "out")
    pixels, labels = static_modules.digits()
    session = onnxruntime.InferenceSession(tmp_path / "out" / GRAPH, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: pixels[1200:].numpy()})[0].argmax(1)
    wanted = static_modules.trained_digits()(pixels[1200:]).argmax(1).numpy()
    right, right_in_float = (float((each == labels[1200:].numpy()).mean()) for each in (found, wanted))
    assert right_in_float > 0.9
    assert abs(right - right_in_float) <= 0.005
    assert report.size.ratio <= 0.30


@pytest.mark.parametrize(("scheme", "bits"), [(A8, 8), ("int8-tensor-a8-static", 8), ("int8-channel-a16-static", 16)])
def test_ranges_are_those_of_the_calibration_samples(scheme: str, bits: int, tmp_path: Path) -> None:
    """min-max, against numpy: on the weights as they were quantized, the input's range is that of the samples."""
    ranges, quantizer = {"estimator": "min-max"}, "absmax"
    run(DIGITS, tmp_path / "out", scheme, ranges=ranges, quantizer=quantizer, calibration={"samples": 1184})
    found, largest = constants(tmp_path / "out"), 2**bits - 1
    assert found["input/scale"] == pytest.approx(1 / largest, rel=1e-6)  # pixels from 0 to 1
    assert (found["input/zero_point"], found["input/zero_point"].dtype) == (0, np.dtype(f"uint{bits}"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_symmetric_codes_lie_around_zero_unless_nothing_is_negative(symmetric: bool, tmp_path: Path) -> None:
    assert run(RESIDUAL, tmp_path / "out", f"{A8}-sym" if symmetric else A8).passed
    found = constants(tmp_path / "out")
    points = {int(value) for name, value in found.items() if name.endswith("/zero_point")}
    assert points == {0, 128} if symmetric else len(points) > 2
    assert operators(tmp_path / "out", tmp_path / "optimized.onnx")["QLinearConv"] == 9


def test_a_convolution_that_a_rule_keeps_in_float_stays_there(tmp_path: Path) -> None:
    """ONNX Runtime would quantize its weights by itself, with one scale for all of them."""
    rules = [{"pattern": "pointwise", "scheme": "float"}, {"pattern": "blocks.0.first", "scheme": "int4-channel"}]
    assert run(RESIDUAL, tmp_path / "out", rules=rules).passed
    found = operators(tmp_path / "out", tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == 7
    assert found["Conv"] + found["FusedConv"] == 2


@pytest.mark.parametrize("quantizer", ["absmax", "gptq", "smoothquant", "hqq"])
def test_weights_may_come_from_any_quantizer(quantizer: str, tmp_path: Path) -> None:
    assert run(RESIDUAL, tmp_path / "out", quantizer=quantizer).passed


@pytest.mark.parametrize("quantizer", ["per-channel", "awq", "smoothquant"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama], ids=["bert", "llama"])
def test_linears_of_text_models_read_codes(make: Any, quantizer: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    report = run(str(source), tmp_path / "out", layout="onnx", quantizer=quantizer)
    assert report.passed
    found = operators(tmp_path / "out", tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] == len(report.layers)
    assert not found.keys() & {"If", "DequantizeLinear", "DynamicQuantizeMatMul"}


def test_biases_are_int32_in_steps_of_input_times_weight(tmp_path: Path) -> None:
    run(DIGITS, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / GRAPH).graph
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    (name,) = (each for each in tensors if each.startswith("0.bias_codes/") and not each.endswith("/scale/scale"))
    step = tensors["input/scale"] * tensors["0.weight_scale"].ravel()
    assert tensors[name].dtype == np.int32
    bias = static_modules.trained_digits().state_dict()["0.bias"].numpy()
    np.testing.assert_allclose(tensors[name] * step, bias, atol=float(step.max()) / 2 * 1.001)
    np.testing.assert_allclose(tensors[f"{name}/scale"], step, rtol=1e-6)


def test_a_bias_beyond_int32_is_added_in_float(tmp_path: Path) -> None:
    """A channel whose weights are next to nothing beside its bias."""
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))\n"
        "    for layer in (net[0], net[3]):\n"
        "        layer.weight.data[0] *= 1e-12\n"
        "        layer.bias.data[0] = 3\n"
        "    return net.eval(), torch.randn(40, 3, 8, 8)\n"
    )
    assert run(f"module:{tmp_path / 'net.py'}:make", tmp_path / "out").passed


def test_an_artifact_whose_weights_are_read_wrongly_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of one layer, where another one's belong: what parity is for."""
    exported = export

    def wrongly(job: Any, written: Any, stage: Any, **settings: Any) -> None:
        exported(job, written, stage, **settings)
        path = stage.folder / GRAPH
        model = onnx.load(path, load_external_data=False)
        (scale,) = (each for each in model.graph.initializer if each.name == "2.weight_scale")
        (other,) = (each for each in model.graph.initializer if each.name == "0.weight_scale")
        scale.external_data[1].value = other.external_data[1].value
        onnx.save(model, path)

    monkeypatch.setattr(conversion, "export", wrongly)
    with pytest.raises(ParityError, match="outputs, with float activations"):
        run(DIGITS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_shows_the_stage_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    arguments = ["run", "--model", DIGITS, "--scheme", A8, "--ranges", "percentile", "--json"]
    for name in ("one", "two"):
        result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.stderr
        assert "ranges" in result.stderr
    assert json.loads(result.stdout)["scheme"] == A8
    for file in (GRAPH, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("scheme", "settings", "code"),
    [
        ("int8-tensor-asym-a8-static", {}, "QC-PLAN-001"),
        ("int8-g32-a8-static", {}, "QC-PLAN-001"),
        ("int8-channel-asym-a8-static", {}, "QC-PLAN-001"),
        (A8, {"targets": ["cpu", "cuda"]}, "QC-PLAN-012"),
        (A8, {"rules": [{"pattern": "0", "scheme": f"{A8}-sym"}]}, "QC-PLAN-013"),
        (A8, {"quantizer": "llm-int8"}, "QC-PLAN-002"),
        (A8, {"ranges": {"estimator": "nothing"}}, "QC-PLUGIN-002"),
    ],
)
def test_what_has_no_kernel_is_refused(scheme: str, settings: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(QConvertError) as failure:
        run(DIGITS, tmp_path / "out", scheme, **settings)
    assert failure.value.code == code
    assert not (tmp_path / "out").exists()


def test_the_transformers_layout_has_no_place_for_ranges(tmp_path: Path) -> None:
    with pytest.raises(QConvertError, match="only the graph knows") as failure:
        run(str(tiny_bert(tmp_path / "source")), tmp_path / "out")
    assert failure.value.code == "QC-PLAN-005"


def test_a_value_that_overflows_during_calibration_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return self.b(torch.exp(self.a(x)))\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    x = torch.randn(40, 8)\n"
        "    return Net().eval(), x\n"
    )
    pixels = torch.randn(40, 8)
    pixels[:] = 1e4
    np.savez(tmp_path / "data.npz", x=pixels.numpy() * np.arange(1, 41, dtype=np.float32)[:, None])
    data = {"source": str(tmp_path / "data.npz"), "samples": 8}
    with pytest.raises(QConvertError, match="becomes during calibration") as failure:
        run(f"module:{tmp_path / 'net.py'}:make", tmp_path / "out", calibration=data)
    assert failure.value.code == "QC-FLOAT-001"


@pytest.mark.parametrize(("model", "most"), [(RESIDUAL, 4), (DIGITS, 1)], ids=["residual", "digits"])
def test_openvino_reads_the_graph_and_gives_the_codes(model: str, most: int, tmp_path: Path) -> None:
    """But for where it rounds to the other of two neighbours, and what follows from that."""
    openvino = pytest.importorskip("openvino")
    run(model, tmp_path / "out", verify=False)
    path = tmp_path / "out" / GRAPH
    graph = onnx.load(path, load_external_data=False)
    scales = constants(tmp_path / "out")
    shown = {node.output[0]: scales[node.input[1]] for node in graph.graph.node if node.output[0].endswith("/from_codes")}
    for name in shown:
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {"image": static_modules.residual()[1]["image"], "input": static_modules.digits()[0][:200]}
    feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    found = dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    others = {name: value for port, value in compiled(list(feed.values())).items() for name in port.get_names()}
    for name, scale in shown.items():
        off = np.abs(np.rint((found[name] - others[name]) / scale))
        assert off.max() <= most, name
        assert (off > 0).mean() < 0.1, name


FLOWS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.d, self.e, self.leaky = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.1)
    def forward(self, image):
        a = nn.functional.silu(self.a(image))
        b = nn.functional.avg_pool2d(torch.cat([self.leaky(self.b(a)), a], 1), 2)
        c = self.c(b)
        squeezed = torch.sigmoid(self.e(torch.relu(self.d(nn.functional.adaptive_avg_pool2d(c, 1)))))
        return self.d(c * squeezed + c)

def make():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(40, 3, 16, 16)
"""


def test_what_stands_between_convolutions_runs_on_codes(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FLOWS)
    assert run(f"module:{tmp_path / 'net.py'}:make", tmp_path / "out").passed
    found = operators(tmp_path / "out", tmp_path / "optimized.onnx")
    expected = {
        "QLinearConv": 6,
        "QLinearSigmoid": 2,
        "QLinearMul": 2,
        "QLinearAdd": 1,
        "QLinearConcat": 1,
        "QLinearLeakyRelu": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["QLinearAveragePool"] == 1
