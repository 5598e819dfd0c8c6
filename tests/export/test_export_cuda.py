"""model.cuda.onnx: what it computes, with which kernels and types, and where its data lies.

Here it runs on the CPU provider, which has float16 kernels for most of it: the numbers are those of the graph, not of a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from architecture_models import build
from calibrate_models import InMemory, model_of
from exporting import nearest, publish, quantize_nearest, whole_numbers
from narrow_graphs import CUDA_GRAPH, graph_of, session_of, widened_session
from onnx import TensorProto
from torch import Tensor, nn

from qconvert.errors import UsageError
from qconvert.ir.artifact import GENAI_CONFIG, GRAPH, SIDECAR, WEIGHTS
from qconvert.ir.model import Model
from qconvert.ir.quantized import Outliers
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.ort import compare
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.trace import trace
from qconvert.verify.parity import torch_outputs

# A rounding to float16 is off by up to 2^-11, to bfloat16 by up to 2^-9. Through the blocks of these models lead some sixty
# roundings one behind the other, whose errors are independent and add up like their square root: eight of them.
FLOAT16, BFLOAT16 = 8 * 2**-11, 8 * 2**-9

SCHEMES = ["int4-g32", "int8-channel", "int8-channel-a8"]
# A decoder whose attention rotates, one that computes angles from positions, an encoder with and without fused attention.
MODELS = ["llama", "phi", "bert", "mpnet"]


@cache
def traced(name: str) -> tuple[Model, Template]:
    model = build(name)
    return model, trace(model)


def converted(name: str, scheme: str, output: Path, **settings: Any) -> ArtifactReader:
    model, template = traced(name)
    parsed = QuantScheme.parse(scheme)
    tensors = quantize_nearest(
        model, lambda _, weight: None if weight.shape[1] % parsed.group_size(weight.shape[1]) else parsed
    )
    return publish(model, template, tensors, output, ("cuda",), **settings)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_torch_on_their_dequantized_weights(name: str, scheme: str, tmp_path: Path) -> None:
    artifact = converted(name, scheme, tmp_path / "out")
    expected = torch_outputs(artifact.model, artifact.read)
    assert compare.relative_error(artifact.model, session_of(artifact.folder), expected) < FLOAT16


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_a_graph_of_its_own(name: str, tmp_path: Path) -> None:
    artifact = converted(name, "int4-g32", tmp_path / "out", cuda_dtype=torch.bfloat16)
    types = {tensor.data_type for tensor in graph_of(artifact.folder).initializer}
    assert TensorProto.BFLOAT16 in types
    assert TensorProto.FLOAT16 not in types
    expected = torch_outputs(artifact.model, artifact.read)
    assert compare.relative_error(artifact.model, widened_session(artifact.folder), expected) < BFLOAT16


def test_types_are_those_of_the_contract(tmp_path: Path) -> None:
    """Caches are float16; what is read and written otherwise has the types of model.onnx."""
    graph = graph_of(converted("llama", "int4-g32", tmp_path / "out").folder)
    inputs, outputs = (
        {value.name.split(".")[0]: value.type.tensor_type.elem_type for value in values}
        for values in (graph.input, graph.output)
    )
    int64, half = TensorProto.INT64, TensorProto.FLOAT16
    assert inputs == {"input_ids": int64, "attention_mask": int64, "past_key_values": half}
    assert outputs == {"logits": TensorProto.FLOAT, "present": half}
    onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out" / CUDA_GRAPH), check_type=True, strict_mode=True)


def test_angles_of_positions_are_float32(tmp_path: Path) -> None:
    """2049 and its neighbours are one float16 number; a rotation by it would be wrong by a radian."""
    graph = graph_of(converted("phi", "int4-g32", tmp_path / "out").folder)
    angles = next(node for node in graph.node if node.op_type == "Cos").input[0]
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    assert types[angles] == TensorProto.FLOAT
    rotation = next(node for node in graph.node if node.op_type == "RotaryEmbedding")
    assert {types[name] for name in rotation.input} == {TensorProto.FLOAT16}


# --- exactly: the rows of an identity matrix read out the weights ---


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, 32, bias=False), nn.Linear(width, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


@cache
def pair(width: int) -> tuple[Model, Template]:
    model = model_of(Pair(width), example_inputs={"x": torch.zeros(2, width)}, input_names=("x",))
    return model, trace(model)


def of_whole_numbers(width: int, scheme: str) -> dict[str, Tensor]:
    low, high = (-8, 7) if scheme.startswith("int4") else (-127, 127)
    return {name: whole_numbers((32, width), low, high, seed) for seed, name in enumerate(("one", "other"))}


# A width of 40 is no multiple of 32, so it needs a padded copy; of groups, none divides it.
CASES = [
    (scheme, width)
    for scheme in ("int4-g16", "int4-g32", "int8-g64", "int4-channel", "int8-tensor", "int8-channel-a8", "int8-tensor-a8")
    for width in (64, 40)
    if width == 64 or "-g" not in scheme
]


@pytest.mark.parametrize(("scheme", "width"), CASES)
def test_every_scheme_is_one_matmul_nbits_with_the_weights_that_were_quantized(scheme: str, width: int, tmp_path: Path) -> None:
    model, template = pair(width)
    parsed = QuantScheme.parse(scheme)
    weights = of_whole_numbers(width, scheme)
    artifact = publish(
        model, template, {name: nearest(weight, parsed) for name, weight in weights.items()}, tmp_path / "out", ("cuda",)
    )
    found = session_of(artifact.folder).run(None, {"x": np.eye(width, dtype=np.float32)})
    for name, output in zip(weights, found, strict=True):
        assert np.array_equal(output, weights[name].T.numpy()), name
    kernels = [node for node in graph_of(artifact.folder).node if node.op_type == "MatMulNBits"]
    assert len(kernels) == 2
    for node in kernels:
        assert len(node.input) == 3  # no zero points, no order of groups, no bias
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        size = 16 if scheme == "int4-g16" else 32
        assert attributes == {"K": width, "N": 32, "bits": parsed.bits, "block_size": size}


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-g64", "int4-channel", "int8-channel-a8"])
def test_weights_are_the_bytes_of_model_safetensors(scheme: str, tmp_path: Path) -> None:
    model, template = pair(64)
    parsed = QuantScheme.parse(scheme)
    tensors = {name: nearest(weight, parsed) for name, weight in of_whole_numbers(64, scheme).items()}
    artifact = publish(model, template, tensors, tmp_path / "out", ("cuda",))
    stored = artifact.tensors["one.weight" if parsed.activations else "one.weight_packed"]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph_of(artifact.folder).initializer]
    assert {"location": WEIGHTS, "offset": str(stored.offset), "length": str(stored.nbytes)} in places
    in_sidecar = [tensor for tensor in artifact.tensors.values() if tensor.file == SIDECAR]
    assert all(tensor.dtype == torch.float16 for tensor in in_sidecar)  # scales, but no codes
    assert (scheme == "int4-g32") == (not in_sidecar)  # whose scales serve as they are


def test_outlier_columns_are_float_and_count_once(tmp_path: Path) -> None:
    model, template = pair(64)
    scheme, columns = QuantScheme.parse("int8-channel-a8"), torch.tensor([3, 40])
    tensors, expected = {}, {}
    for name, weight in of_whole_numbers(64, "int8").items():
        weight[:, columns] = torch.arange(64.0).reshape(32, 2) / 4
        tensors[name] = dataclasses.replace(nearest(weight, scheme), outliers=Outliers(columns, weight[:, columns]))
        expected[name] = weight.T
    artifact = publish(model, template, tensors, tmp_path / "out", ("cuda",))
    found = session_of(artifact.folder).run(None, {"x": np.eye(64, dtype=np.float32)})
    for name, output in zip(expected, found, strict=True):
        assert np.array_equal(output, expected[name].numpy()), name
    assert [node.op_type for node in graph_of(artifact.folder).node].count("Gather") == 1  # once for both


def test_an_smoothing_scale_that_could_not_be_folded_is_one_mul(tmp_path: Path) -> None:
    model, template = pair(64)
    smoothing_scale = 2.0 ** (torch.arange(64) % 5 - 2)
    weights = of_whole_numbers(64, "int4-g32")
    tensors = {
        name: dataclasses.replace(nearest(weight, QuantScheme.parse("int4-g32")), smoothing_scale=smoothing_scale)
        for name, weight in weights.items()
    }
    artifact = publish(model, template, tensors, tmp_path / "out", ("cuda",))
    found = session_of(artifact.folder).run(None, {"x": np.eye(64, dtype=np.float32)})
    for name, output in zip(weights, found, strict=True):
        assert np.array_equal(output, (weights[name] / smoothing_scale).T.numpy()), name
    assert [node.op_type for node in graph_of(artifact.folder).node].count("Mul") == 1


# --- the other kinds of layers ---


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(image)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["int4-channel", "int8-tensor"])
def test_a_convolution_is_dequantized_when_the_model_is_loaded(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(Picture(), example_inputs={"image": torch.randn(2, 3, 6, 6)}, input_names=("image",))
    tensors = quantize_nearest(model, lambda name, _: QuantScheme.parse(scheme) if name == "conv" else None)
    artifact = publish(model, trace(model), tensors, tmp_path / "out", ("cuda",))
    expected = torch_outputs(model, artifact.read)
    assert compare.relative_error(model, session_of(artifact.folder), expected) < FLOAT16
    assert {"Conv", "MatMul"} <= {node.op_type for node in graph_of(artifact.folder).node}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "int8-channel-a8"])
def test_a_tied_pair_is_one_tensor(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(Tied(), example_inputs={"ids": torch.tensor([[1, 47], [0, 2]])}, input_names=("ids",))
    weight = model.read("embedding.weight").float()
    artifact = publish(
        model,
        trace(model),
        {"embedding": nearest(weight, QuantScheme.parse(scheme))},
        tmp_path / "out",
        ("cuda",),
        shared={"head": "embedding"},
    )
    expected = torch_outputs(model, artifact.read)
    assert compare.relative_error(model, session_of(artifact.folder), expected) < FLOAT16
    codes = "embedding.weight" if scheme.endswith("a8") else "embedding.weight_packed"
    readers = [
        tensor
        for tensor in graph_of(artifact.folder).initializer
        if tensor.name.startswith(codes) and "scale" not in tensor.name
    ]
    assert len({str(tensor.external_data) for tensor in readers}) == 1
    assert len(readers) == 2  # two shapes of the same bytes


# --- numbers that float16 has not ---


def test_a_float_tensor_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    model, template = traced("llama")
    held = {name: model.source.read(name) for name in model.source.tensors}
    large = held["model.norm.weight"].clone()
    large[5] = -1e5
    changed = dataclasses.replace(model, source=InMemory(held | {"model.norm.weight": large}))
    with pytest.raises(UsageError, match=r"model\.norm\.weight holds 100000, but float16 ends at 65504") as caught:
        publish(changed, template, {}, tmp_path / "out", ("cuda",))
    assert caught.value.code == "QC-CUDA-002"
    assert "cuda_dtype: bfloat16" in caught.value.hint
    publish(changed, template, {}, tmp_path / "wide", ("cuda",), cuda_dtype=torch.bfloat16)


@pytest.mark.parametrize("factor", [1e7, 1e-7])
def test_scales_beyond_float16_are_refused_with_the_layer(factor: float, tmp_path: Path) -> None:
    model, template = pair(64)
    tensors = {"one": nearest(torch.ones(32, 64) * factor, QuantScheme.parse("int8-channel"))}
    with pytest.raises(UsageError, match="one: its largest scale is ") as caught:
        publish(model, template, tensors, tmp_path / "out", ("cuda",))
    assert caught.value.code == "QC-CUDA-003"
    assert "--rule 'one=float'" in caught.value.hint
    publish(model, template, tensors, tmp_path / "wide", ("cuda",), cuda_dtype=torch.bfloat16)


def test_a_convolutions_weight_that_would_become_infinite_is_refused(tmp_path: Path) -> None:
    model = model_of(Picture(), example_inputs={"image": torch.randn(2, 3, 6, 6)}, input_names=("image",))
    tensors = {"conv": nearest(torch.full((8, 27), 1e6), QuantScheme.parse("int8-channel"))}
    with pytest.raises(UsageError, match="conv: its largest scale is ") as caught:
        publish(model, trace(model), tensors, tmp_path / "out", ("cuda",))
    assert caught.value.code == "QC-CUDA-003"


# --- the folder ---


@pytest.mark.parametrize(
    ("targets", "graphs", "named", "options"),
    [
        (("cpu",), {GRAPH}, GRAPH, []),
        (("cuda",), {CUDA_GRAPH}, CUDA_GRAPH, [{"cuda": {}}]),
        (("cuda", "cpu"), {GRAPH, CUDA_GRAPH}, GRAPH, []),
    ],
)
def test_every_target_has_its_graph_and_genai_takes_the_cpus_where_there_is_one(
    targets: tuple[str, ...], graphs: set[str], named: str, options: list[Any], tmp_path: Path
) -> None:
    model, template = traced("llama")
    artifact = publish(model, template, {}, tmp_path / "out", targets)
    assert {path.name for path in artifact.folder.glob("*.onnx")} == graphs
    decoder = json.loads((artifact.folder / GENAI_CONFIG).read_text())["model"]["decoder"]
    assert (decoder["filename"], decoder["session_options"]["provider_options"]) == (named, options)


def test_a_table_that_has_the_type_is_not_copied(tmp_path: Path) -> None:
    """A float16 checkpoint's norms, embedding and head are read where they lie."""
    model, template = traced("llama")
    held = {name: model.source.read(name).half() for name in model.source.tensors}
    half = dataclasses.replace(model, source=InMemory(held))
    artifact = publish(half, template, {}, tmp_path / "out", ("cuda",))
    in_sidecar = {name for name, tensor in artifact.tensors.items() if tensor.file == SIDECAR}
    assert not any(name.startswith("model.") for name in in_sidecar)
    assert all(tensor.dtype == torch.float16 for tensor in artifact.tensors.values())  # rotary caches too


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    once, again = (converted("llama", "int4-g32", tmp_path / name).folder for name in ("once", "again"))
    for name in (CUDA_GRAPH, SIDECAR, WEIGHTS):
        assert (once / name).read_bytes() == (again / name).read_bytes(), name
