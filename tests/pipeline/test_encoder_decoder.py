"""Encoder-decoders from a folder to a verified folder: two graphs over one file of weights."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from example_scripts import example, run_alone
from exporting import matrix, nearest, parity, publish, quantize_nearest
from onnx import helper
from tiny_models import tiny_t5
from tokenizers import Tokenizer
from traced import trace_once
from transformers import AutoModelForSeq2SeqLM

from qconvert.errors import TargetError
from qconvert.execution.probes import padded_batch
from qconvert.ir.artifact import CARD, GENAI_CONFIG, SIDECAR, WEIGHTS
from qconvert.ir.graph_names import is_cache
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.task import SEQ2SEQ_LM
from qconvert.load.hugging_face import load_folder
from qconvert.ort.compare import feed, largest_difference, next_inputs
from qconvert.ort.session import EncoderDecoderSession, file_session, why_unavailable
from qconvert.pipeline import conversion, preparation, verification
from qconvert.recipe import Recipe
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.targets import graph_files
from qconvert.targets.cuda import CUDA
from qconvert.verify.parity import TOLERANCE, cluster_parity, graph_parity, torch_outputs

GRAPHS = ("encoder.onnx", "decoder.onnx")
PROMPT = "The class statement"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    (root / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    tiny_t5(root / "t5")
    tiny_t5(root / "t5-untied", gated=True, tie=False, dtype=torch.bfloat16)
    return root


def recipe(source: Path, output: Path, **settings: Any) -> Recipe:
    data = {"source": str(source.parent / "text.txt"), "samples": 4, "length": 32}
    return Recipe.from_settings(
        {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, **settings}
    )


@pytest.fixture(scope="module")
def published(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 without verification, for what runs the graphs alone."""
    output = tmp_path_factory.mktemp("published") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "trace", trace_once)
        conversion.convert(recipe(sources / "t5", output, quantizer="absmax", scheme="int4-g32", verify=False))
    return output


# --- the pipeline ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t5", {"quantizer": "awq"}),
        ("t5", {"quantizer": "llm-int8"}),
        ("t5", {"quantizer": "per-channel", "scheme": "int8-channel"}),
        ("t5", {"quantizer": "zero-point", "scheme": "int8-channel-asym-a8"}),
        (
            "t5-untied",
            {"quantizer": "per-channel", "scheme": "int4-g32", "rules": [{"pattern": "lm_head", "scheme": "int4-g32"}]},
        ),
    ],
    ids=["awq int4", "llm-int8", "int8", "int8 activations", "quantized head of a gated bfloat16 model"],
)
def test_a_folder_becomes_two_graphs_that_agree_with_their_weights(
    name: str, settings: dict[str, Any], sources: Path, tmp_path: Path
) -> None:
    """parity "transformers": the folder was loaded with from_pretrained and gave the dequantized model's logits."""
    report = conversion.convert(recipe(sources / name, tmp_path / "out", **settings))
    assert report.passed
    assert report.task == "seq2seq-lm"
    assert [(part.target, part.status) for part in report.parity] == [
        ("cpu", "passed"),
        ("transformers", "passed"),
        ("float", "passed"),
    ]
    assert report.fidelity[0].kl is not None
    assert 0 < report.fidelity[0].kl < 0.5
    assert report.latency[0].decode_tokens_per_s is not None
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {*GRAPHS, WEIGHTS, CARD, "config.json", "tokenizer.json"} <= files
    assert not files & {"model.onnx", GENAI_CONFIG}
    assert report.size.graph_bytes == sum((tmp_path / "out" / file).stat().st_size for file in GRAPHS)


@pytest.mark.usefixtures("quick")
def test_an_output_is_planned_and_verified_again(sources: Path, tmp_path: Path) -> None:
    mine = recipe(sources / "t5", tmp_path / "out", quantizer="per-channel", verify=False)
    planned = preparation.plan(mine)
    assert next(iter(planned.layers)) == "encoder.block.0.layer.0.SelfAttention.q"
    assert {entry.name: entry.reason for entry in planned.kept_float}["lm_head"].startswith("shares its weight with shared")
    conversion.convert(mine)
    assert verification.verify(tmp_path / "out").passed


# --- what is written ---


def test_both_graphs_point_into_the_same_files(published: Path) -> None:
    for file in GRAPHS:
        graph = onnx.load(published / file, load_external_data=False).graph
        entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
        assert {entry["location"] for entry in entries if entry} <= {WEIGHTS, SIDECAR}
        assert (published / file).stat().st_size < 100_000
        onnx.checker.check_model(str(published / file), skip_opset_compatibility_check=True)


def test_the_cards_code_runs_as_it_is(published: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)\n```", (published / CARD).read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=published)
        assert run.returncode == 0, run.stderr


# --- verification sees what is wrong ---


@pytest.fixture(scope="module")
def artifact_of(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ArtifactReader]:
    model = load_folder(sources / "t5")
    folder = tmp_path_factory.mktemp("artifacts")

    def make(scheme: str) -> ArtifactReader:
        tensors = quantize_nearest(model, lambda name, _: QuantScheme.parse(scheme))
        return publish(model, trace_once(model), tensors, folder / f"{scheme}-{len(list(folder.iterdir()))}")

    return make


def edit(artifact: ArtifactReader, file: str, op_type: str, name: str, value: float) -> None:
    """Set an attribute of the last node of that type."""
    model = onnx.load(artifact.folder / file, load_external_data=False)
    node = [node for node in model.graph.node if node.op_type == op_type][-1]
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    onnx.save(model, artifact.folder / file)


@pytest.mark.parametrize(
    ("file", "op_type", "name", "value"),
    [
        ("encoder.onnx", "MultiHeadAttention", "scale", 0.5),
        ("decoder.onnx", "MultiHeadAttention", "scale", 0.5),
        ("decoder.onnx", "RMSNormalization", "epsilon", 0.1),
    ],
    ids=["encoder", "attention to the source", "decoder"],
)
def test_what_is_wrong_in_either_graph_is_found(
    file: str, op_type: str, name: str, value: float, artifact_of: Callable[[str], ArtifactReader]
) -> None:
    artifact = artifact_of("int4-g32")
    assert parity(artifact) < TOLERANCE / 10
    edit(artifact, file, op_type, name, value)
    assert graph_parity(artifact, torch_outputs(artifact.model, artifact.read)) > 10 * TOLERANCE


def test_smoothing_scales_that_differ_by_block_stay_apart_in_the_graph(sources: Path, tmp_path: Path) -> None:
    """All blocks of the decoder read the encoder's output, and each may want it scaled in its own way."""
    model = load_folder(sources / "t5")
    tensors = {}
    for block in range(2):
        scale = torch.rand(64, generator=torch.Generator().manual_seed(block)) + 0.5
        for name in (f"decoder.block.{block}.layer.1.EncDecAttention.{part}" for part in ("k", "v")):
            scaled = nearest(matrix(model, name) * scale, QuantScheme.parse("int8-channel"))
            tensors[name] = replace(scaled, smoothing_scale=scale)
    artifact = publish(model, trace_once(model), tensors, tmp_path / "out")
    assert parity(artifact) < TOLERANCE / 10
    nodes = onnx.load(tmp_path / "out" / "encoder.onnx", load_external_data=False).graph.node
    assert len([node for node in nodes if node.name.endswith("/ScaleInput")]) == 2


@pytest.mark.parametrize("file", GRAPHS)
def test_a_wrong_int8_cluster_of_either_graph_is_found_on_its_own(
    file: str, artifact_of: Callable[[str], ArtifactReader]
) -> None:
    artifact = artifact_of("int8-channel-a8")
    assert cluster_parity(artifact) < TOLERANCE / 10
    model = onnx.load(artifact.folder / file, load_external_data=False)
    next(node for node in model.graph.node if node.name.endswith("/RestoreRows")).op_type = "Add"
    onnx.save(model, artifact.folder / file)
    assert cluster_parity(artifact) > 10 * TOLERANCE


# --- two sessions as one ---


@pytest.fixture(scope="module")
def session(published: Path) -> EncoderDecoderSession:
    return EncoderDecoderSession(*(file_session(published / file) for file in GRAPHS))


def test_a_later_step_takes_the_earlier_ones_outputs_and_leaves_the_encoder_alone(
    session: EncoderDecoderSession, sources: Path
) -> None:
    inputs = feed(session, padded_batch(load_folder(sources / "t5")))
    tokens = inputs["decoder_input_ids"]
    whole = session.run(None, inputs)[0]
    begun = {**inputs, "decoder_input_ids": tokens[:, :-2]}
    found = session.run(None, begun)
    later = next_inputs(session, begun, found, tokens[:, -2:])
    assert "input_ids" not in later
    assert session.values(later)["encoder"] == {}
    assert largest_difference(session.run(None, later)[0], whole[:, -2:]) < 0.05  # rows are rounded to int8, per run


def test_its_outputs_are_named_in_the_order_in_which_they_come(session: EncoderDecoderSession, sources: Path) -> None:
    names = [value.name for value in session.get_outputs()]
    assert names[0] == "logits"
    assert [name for name in names if name.startswith("cross")] == names[-4:]
    found = dict(zip(names, session.run(None, feed(session, padded_batch(load_folder(sources / "t5")))), strict=True))
    assert found["present.0.key"].shape == (2, 4, 25, 16)
    assert found["cross_key_values.1.value"].shape == (2, 4, 40, 16)


# --- the example ---


def test_the_example_answers_as_transformers_does(published: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(published, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(published / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    with torch.no_grad():
        first = int(model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].argmax())
    pieces = list(example("generate").generate(published, PROMPT, 12))
    assert pieces[0].startswith(tokenizer.decode([first]))
    assert run_alone("generate.py", str(published), PROMPT, "--max-tokens", "12") == "".join(pieces).splitlines()


def test_the_example_reads_the_source_once(published: Path) -> None:
    generate = example("generate")
    tokens = Tokenizer.from_file(str(published / "tokenizer.json")).encode(PROMPT).ids
    kept = generate.encode(published, tokens)
    assert set(kept) == {
        "encoder_attention_mask", *(f"cross_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value"))
    }  # fmt: skip
    assert np.array_equal(kept["encoder_attention_mask"], np.ones((1, len(tokens))))
    assert generate.start_token(published) == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel-a8"])
def test_both_graphs_are_written_for_cuda_too(scheme: str, tmp_path: Path) -> None:
    """Its attention has no float16 kernel on the CPU, so it is planned, checked against CUDA's kernels and written only."""
    source = tiny_t5(tmp_path / "t5")
    settings = {"model": str(source), "output": str(tmp_path / "out"), "scheme": scheme, "targets": ["cpu", "cuda"]}
    data = {"calibration": {"samples": 2, "length": 16}, "evaluation": {"samples": 2, "length": 16}}
    if why_unavailable("cuda") is None:
        pytest.skip("CUDA runs here")
    with pytest.raises(TargetError, match="no provider for cuda"):
        conversion.convert(Recipe.from_settings(settings | data))
    for file in graph_files(SEQ2SEQ_LM, CUDA).values():
        graph = onnx.load(tmp_path / "out" / file, load_external_data=False).graph
        caches = [value for value in (*graph.input, *graph.output) if is_cache(value.name)]
        assert caches
        assert {value.type.tensor_type.elem_type for value in caches} == {onnx.TensorProto.FLOAT16}
        assert "MatMulNBits" in {node.op_type for node in graph.node}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "take `encoder.cuda.onnx` and `decoder.cuda.onnx`; caches are float16 there" in card
