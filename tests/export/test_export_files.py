"""model.onnx of a bfloat16 decoder with tied embeddings: where its data lies, and that nothing of the machine is in it."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import onnx
import pytest
import torch
from exporting import parity, publish, quantize_nearest
from onnx import TensorProto
from tiny_models import tiny_llama

from qconvert.ir.artifact import GRAPH, INPUT_KEY, LAYER_KEY, SIDECAR, WEIGHTS
from qconvert.ir.scheme import QuantScheme
from qconvert.load import load
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.trace import trace

EMBEDDING = "model.embed_tokens.weight"


def converted(dtype: torch.dtype, folder: Path, scheme: str = "int4-g32-asym") -> ArtifactReader:
    source = folder / "source"
    if not source.exists():
        tiny_llama(source, dtype=dtype, tie=True)
    model = load(str(source), lambda _: None)
    tensors = quantize_nearest(model, lambda name, weight: None if name == "lm_head" else QuantScheme.parse(scheme))
    return publish(model, trace(model), tensors, folder / f"out-{len(list(folder.iterdir()))}")


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> ArtifactReader:
    return converted(torch.bfloat16, tmp_path_factory.mktemp("bfloat16"))


def graph_of(artifact: ArtifactReader) -> onnx.ModelProto:
    return onnx.load(artifact.folder / GRAPH, load_external_data=False)


def places(artifact: ArtifactReader) -> dict[str, dict[str, str]]:
    """Initializer -> its external data's location, offset and length."""
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph_of(artifact).graph.initializer
        if tensor.external_data
    }


def test_every_tensor_lies_in_the_two_files_within_their_bounds(bfloat16: ArtifactReader) -> None:
    found = places(bfloat16)
    assert {place["location"] for place in found.values()} == {WEIGHTS, SIDECAR}
    for name, place in found.items():
        end = int(place["offset"]) + int(place["length"])
        assert end <= (bfloat16.folder / place["location"]).stat().st_size, name
    inline = {tensor.name: len(tensor.raw_data) for tensor in graph_of(bfloat16).graph.initializer if tensor.name not in found}
    assert sum(inline.values()) < 500, inline


def test_packed_weights_are_the_bytes_of_model_safetensors(bfloat16: ArtifactReader) -> None:
    name = "model.layers.1.mlp.down_proj.weight_packed"
    stored = bfloat16.tensors[name]
    assert places(bfloat16)[name] == {"location": WEIGHTS, "offset": str(stored.offset), "length": str(stored.nbytes)}


def test_a_narrow_embedding_is_cast_after_its_rows_are_gathered_and_a_tied_head_reads_it_too(bfloat16: ArtifactReader) -> None:
    graph = graph_of(bfloat16).graph
    table = next(tensor for tensor in graph.initializer if tensor.name == EMBEDDING)
    assert table.data_type == TensorProto.BFLOAT16
    assert "lm_head.weight" not in {tensor.name for tensor in graph.initializer}
    readers = {node.op_type: node for node in graph.node if EMBEDDING in node.input}
    assert set(readers) == {"Gather", "Cast"}  # the head needs the table in float32: that cast folds at load
    assert [node.op_type for node in graph.node if readers["Gather"].output[0] in node.input] == ["Cast"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_checkpoints_in_narrow_floats_agree_with_their_dequantized_weights(
    dtype: torch.dtype, bfloat16: ArtifactReader, tmp_path: Path
) -> None:
    artifact = bfloat16 if dtype == torch.bfloat16 else converted(dtype, tmp_path, "int8-channel-a8")
    assert parity(artifact) < 1e-5


def test_nothing_of_the_machine_is_in_the_graph(bfloat16: ArtifactReader) -> None:
    proto = graph_of(bfloat16)
    text = (bfloat16.folder / GRAPH).read_bytes()
    for trace_of_the_machine in (str(bfloat16.folder), str(Path(torch.__file__).parent), str(Path.cwd()), socket.gethostname()):
        assert trace_of_the_machine.encode() not in text
    assert (proto.producer_name, proto.producer_version, proto.doc_string) == ("qconvert", "", "")
    assert not proto.metadata_props
    properties = {entry.key for node in proto.graph.node for entry in node.metadata_props}
    assert properties <= {LAYER_KEY, INPUT_KEY}
    assert not any(node.doc_string for node in proto.graph.node)
    assert {entry.domain for entry in proto.opset_import} == {"", "com.microsoft"}


def test_the_same_conversion_gives_the_same_bytes(bfloat16: ArtifactReader) -> None:
    again = converted(torch.bfloat16, bfloat16.folder.parent)
    assert again.folder != bfloat16.folder
    for name in (GRAPH, SIDECAR, WEIGHTS):
        assert (again.folder / name).read_bytes() == (bfloat16.folder / name).read_bytes(), name


def test_the_folder_can_be_moved(bfloat16: ArtifactReader, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(bfloat16.folder, moved)
    onnx.checker.check_model(str(moved / GRAPH), skip_opset_compatibility_check=True)
    assert parity(ArtifactReader(moved, bfloat16.model, bfloat16.plan, bfloat16.tensors)) < 1e-5
