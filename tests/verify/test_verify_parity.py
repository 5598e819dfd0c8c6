"""Parity is not an opinion: whatever is wrong with the graph or its own data is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from calibrate_models import model_of
from exporting import LARGEST, lossless_rows, nearest, publish, quantize_nearest, whole_numbers, without_largest
from onnx import helper
from trace_models import DECODER, traced

from qconvert.errors import InputError
from qconvert.graph.float_graph import float_graph
from qconvert.ir.artifact import GRAPH, SIDECAR
from qconvert.ir.scheme import QuantScheme
from qconvert.ort import compare
from qconvert.ort.session import memory_session
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.trace import trace
from qconvert.verify import check_digests
from qconvert.verify.parity import (
    TOLERANCE,
    cluster_parity,
    float_parity,
    graph_parity,
    torch_outputs,
)
from qconvert.verify.row_emulation import emulate_row_form

WEIGHT_ONLY, INT8_ACTIVATIONS = "int4-g16-asym", "int8-channel-a8"
LAYER = "model.layers.2.mlp.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ArtifactReader]:
    """A quantized llama of 4 blocks by its scheme, made once."""
    folder = tmp_path_factory.mktemp("artifacts")

    @cache
    def make(scheme: str) -> ArtifactReader:
        llama = traced("llama")
        tensors = quantize_nearest(llama.model, lambda name, _: None if name == "lm_head" else QuantScheme.parse(scheme))
        return publish(llama.model, llama.template, tensors, folder / scheme)

    return make


@pytest.fixture
def copy_of(original: Callable[[str], ArtifactReader], tmp_path: Path) -> Callable[[str], ArtifactReader]:
    """The same, to be damaged."""

    def copy(scheme: str) -> ArtifactReader:
        sound = original(scheme)
        shutil.copytree(sound.folder, tmp_path / scheme)
        return ArtifactReader(tmp_path / scheme, sound.model, sound.plan, sound.tensors)

    return copy


def graph_error(artifact: ArtifactReader) -> float:
    return graph_parity(artifact, torch_outputs(artifact.model, artifact.read))


def edit(artifact: ArtifactReader, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(artifact.folder / GRAPH, load_external_data=False)
    change(model.graph)
    (artifact.folder / GRAPH).write_bytes(model.SerializeToString())


def node_named(graph: onnx.GraphProto, end: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name.endswith(end))  # type: ignore[no-any-return]


def set_attribute(op_type: str, name: str, value: float) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == op_type)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        assert len(kept) < len(node.attribute), f"{op_type} has no {name}"
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def exchange_weights(graph: onnx.GraphProto) -> None:
    """One block projects its attention's output with the weights of another."""
    one, other = (node_named(graph, f"model.layers.{index}.self_attn.o_proj/MatMulNBits") for index in (0, 1))
    one.input[1], other.input[1] = other.input[1], one.input[1]


@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, INT8_ACTIVATIONS])
def test_a_sound_artifact_passes_by_far(original: Callable[[str], ArtifactReader], scheme: str) -> None:
    artifact = original(scheme)
    assert graph_error(artifact) < TOLERANCE / 10
    assert cluster_parity(artifact) < TOLERANCE / 10


@pytest.mark.parametrize(
    "change",
    [
        set_attribute("GroupQueryAttention", "scale", 0.3),
        set_attribute("GroupQueryAttention", "do_rotary", 0),
        set_attribute("RMSNormalization", "epsilon", 0.1),
        exchange_weights,
    ],
    ids=["attention scale", "no rotation", "norm epsilon", "weights of another block"],
)
def test_a_wrong_graph_is_found(copy_of: Callable[[str], ArtifactReader], change: Callable[[onnx.GraphProto], None]) -> None:
    artifact = copy_of(WEIGHT_ONLY)
    edit(artifact, change)
    assert graph_error(artifact) > 10 * TOLERANCE


def test_a_wrong_byte_that_only_the_graph_reads_is_found(copy_of: Callable[[str], ArtifactReader]) -> None:
    artifact = copy_of(WEIGHT_ONLY)
    stored = artifact.tensors[f"{LAYER}.kernel_zero_point"]
    assert stored.file == SIDECAR
    content = bytearray((artifact.folder / SIDECAR).read_bytes())
    content[stored.offset] ^= 0x0F
    (artifact.folder / SIDECAR).write_bytes(content)
    assert graph_error(artifact) > 10 * TOLERANCE


def test_a_wrong_int8_cluster_is_found_on_its_own(copy_of: Callable[[str], ArtifactReader]) -> None:
    """In the graph that is compared as a whole these clusters are replaced, so that part can't see it."""
    artifact = copy_of(INT8_ACTIVATIONS)

    def forget_the_row_scale(graph: onnx.GraphProto) -> None:
        node_named(graph, f"{LAYER}/RestoreRows").op_type = "Add"

    edit(artifact, forget_the_row_scale)
    assert cluster_parity(artifact) > 10 * TOLERANCE
    assert graph_error(artifact) < TOLERANCE


def test_a_graph_whose_outputs_are_not_finite_is_infinitely_wrong(copy_of: Callable[[str], ArtifactReader]) -> None:
    artifact = copy_of(WEIGHT_ONLY)
    edit(artifact, set_attribute("GroupQueryAttention", "scale", float("nan")))
    assert graph_error(artifact) == float("inf")


# --- the emulation of the int8 kernels ---


@pytest.mark.parametrize("scheme", ["int8-channel-a8", "int8-tensor-asym-a8"])
def test_the_emulation_is_exact_where_nothing_is_lost(scheme: str) -> None:
    parsed = QuantScheme.parse(scheme)
    weight = without_largest(whole_numbers((8, 64), *((-127, 127) if parsed.symmetric else (-100, 155))))
    x, bias = lossless_rows((5, 64), parsed, seed=1), torch.arange(8.0)
    assert torch.allclose(emulate_row_form(x, nearest(weight, parsed), bias), x @ weight.T + bias, rtol=1e-6, atol=1e-3)


def test_the_emulation_rounds_activations_to_steps_of_each_rows_largest() -> None:
    identity = nearest(torch.eye(4) * 127, QuantScheme.parse("int8-tensor-a8"))
    x = torch.tensor([[1.0, 0.5, 0.003, -0.26], [100.0, 50.0, 0.3, -26.0]])
    steps = torch.tensor([[127.0, 64.0, 0.0, -33.0], [127.0, 64.0, 0.0, -33.0]])
    expected = steps / 127.49 * torch.tensor([[1.0], [100.0]]) * 127
    assert torch.allclose(emulate_row_form(x, identity, None), expected, rtol=1e-6)


@pytest.mark.parametrize(("made_by", "lowest", "steps"), [("Gelu", -24, 231), ("Relu", 0, 255)])
def test_after_an_activation_function_most_codes_are_for_what_is_positive(made_by: str, lowest: int, steps: int) -> None:
    """Rows of whole numbers of steps are exact; with as many codes for what is negative, the step would be twice as large."""
    weight = without_largest(whole_numbers((8, 64), -127, 127))
    tensor = nearest(weight, QuantScheme.parse("int8-channel-a8"))
    x = whole_numbers((5, 64), lowest, steps, seed=1)
    x[:, LARGEST] = steps + 0.49
    step = 0.125
    found = emulate_row_form(x * step, tensor, None, made_by)
    assert torch.allclose(found, x @ weight.T * step, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(emulate_row_form(x * step, tensor, None), x @ weight.T * step, rtol=1e-2)


def test_after_gelu_a_row_of_small_values_keeps_a_code_for_its_lowest() -> None:
    identity = nearest(torch.eye(4) * 127, QuantScheme.parse("int8-tensor-a8"))
    x = torch.tensor([[-0.17, -0.1, 0.0, 0.02]])
    assert torch.allclose(emulate_row_form(x, identity, None, "Gelu"), x * 127, atol=0.17 / 24 / 2 * 127)


# --- digests ---


def test_files_as_they_were_written_pass(original: Callable[[str], ArtifactReader]) -> None:
    check_digests(original(WEIGHT_ONLY).folder)


def test_one_other_bit_in_any_file_is_found(copy_of: Callable[[str], ArtifactReader]) -> None:
    folder = copy_of(WEIGHT_ONLY).folder
    for name in (GRAPH, SIDECAR, "model.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(InputError, match=rf"{name} is not the file that was written: sha256 [0-9a-f]{{12}}") as caught:
            check_digests(folder)
        assert caught.value.code == "QC-VERIFY-001"
        (folder / name).write_bytes(whole)
    check_digests(folder)


def test_a_missing_file_is_found(copy_of: Callable[[str], ArtifactReader]) -> None:
    folder = copy_of(WEIGHT_ONLY).folder
    (folder / SIDECAR).unlink()
    with pytest.raises(InputError, match=SIDECAR) as caught:
        check_digests(folder)
    assert caught.value.code == "QC-VERIFY-001"


# --- the float graph ---


def test_a_window_that_was_lost_shows_on_a_sample_of_full_length() -> None:
    """A sliding window of 16 tokens: on the probes, which have fewer, nothing differs without it."""
    torch.manual_seed(0)
    settings = {**DECODER, "num_hidden_layers": 2, "sliding_window": 16}
    module = transformers.MistralForCausalLM(transformers.MistralConfig(**settings)).eval()
    blocks = ("model.layers.0", "model.layers.1")
    model = model_of(module, "causal-lm", blocks=blocks, input_names=("input_ids", "attention_mask"))
    graph = trace(model).graphs["model"]
    sample = {"input_ids": torch.arange(40)[None] % 50, "attention_mask": torch.ones(1, 40, dtype=torch.long)}

    def error() -> tuple[float, float]:
        session = memory_session(float_graph(graph, model.parameter_shapes), model.read)
        on_probes = compare.relative_error(model, session, torch_outputs(model, model.read))
        return on_probes, float_parity(model, session, sample)

    assert max(error()) < TOLERANCE
    for node in graph.graph:
        node.attributes.pop("local_window_size", None)
    on_probes, on_sample = error()
    assert on_probes < TOLERANCE
    assert on_sample > 100 * TOLERANCE
