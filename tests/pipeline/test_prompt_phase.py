"""prefill: int8, from a folder to a folder: two bodies in one graph, what each computes, and what is left when it is loaded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architecture_models import build
from click.testing import CliRunner
from generation import genai_tokens, onnxruntime_logits, onnxruntime_tokens
from tiny_models import tiny_bert

from qconvert import Recipe, convert
from qconvert.cli import main
from qconvert.errors import UsageError
from qconvert.graph.phases import CHOICE, MOST_DECODED
from qconvert.ir.artifact import GRAPH
from qconvert.ir.report import Report
from qconvert.load import load
from qconvert.ort.session import file_session
from qconvert.pipeline.preparation import plan
from qconvert.plugin.host.manager import plugin_manager
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index
from qconvert.verify.parity import TOLERANCE, cluster_parity

# Group sizes, zero points, 8 bits, one scale per channel; biases, Conv1D, a window and soft caps; a head in float; int8 caches.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"scheme": "int4-g16"}),
    ("llama", {"scheme": "int4-g16-asym", "logits": "last", "rules": [{"pattern": "lm_head", "scheme": "int4-g16-asym"}]}),
    ("qwen2", {"scheme": "int4-channel-asym"}),
    ("qwen3", {"scheme": "int8-g16-asym"}),
    ("gpt2", {"scheme": "int8-channel"}),
    ("gemma2", {"scheme": "int4-g32", "rules": [{"pattern": "*.mlp.*", "scheme": "int8-channel-a8"}]}),
    ("mistral", {"scheme": "int4-g16", "rules": [{"pattern": "*.up_proj", "scheme": "float"}]}),
    ("llama", {"quantizer": "awq", "scheme": "int4-g16-asym"}),
    ("llama", {"scheme": "int4-g16", "kv_cache": "int8", "rules": [{"pattern": "lm_head", "scheme": "int4-g16"}]}),
    ("qwen2", {"scheme": "int8-channel", "kv_cache": "int8"}),
    ("gemma2", {"scheme": "int4-g32", "kv_cache": "int8", "rules": [{"pattern": "lm_head", "scheme": "int4-g32"}]}),
]
CODED = [number for number, (_, settings) in enumerate(KINDS) if "kv_cache" in settings]
IDS = [str(number) for number in range(len(KINDS))]
TOKENS = [5, 17, 3, 60, 8, 2, 33, 41, 12, 9, 77, 50]
Converted = tuple[Report, Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(Report, folder) of a converted decoder by its number in KINDS and its prefill; made once."""
    base = tmp_path_factory.mktemp("phases")

    @cache
    def make(number: int, prefill: str) -> Converted:
        name, settings = KINDS[number]
        asked = recipe(source(name), base / f"{number}-{prefill}", base, prefill=prefill, verify=prefill == "int8", **settings)
        return convert(asked), asked.output

    return make


def source(name: str) -> Path:
    folder = build(name).folder
    assert folder is not None
    return folder


def recipe(model: Path, output: Path, base: Path, **settings: Any) -> Recipe:
    np.savez(base / "ids.npz", input_ids=np.random.default_rng(0).integers(3, 100, (12, 24)))
    data = {"source": str(base / "ids.npz"), "samples": 4, "length": 24}
    fixed = {"model": str(model), "output": output, "layout": "onnx", "calibration": data, "evaluation": data}
    return Recipe.from_settings({**fixed, "prefill": "int8", **settings})


@pytest.mark.parametrize("number", range(len(KINDS)), ids=IDS)
def test_both_bodies_compute_what_the_weights_say(number: int, converted: Any) -> None:
    """Parity covers each of them, and what the graph chooses; windows are prompts, and have a loss of their own."""
    report, folder = converted(number, "int8")
    assert report.passed is None or report.passed
    assert {part.status for part in report.parity if part.target in ("cpu", "float")} == {"passed"}
    (fidelity,) = report.fidelity
    assert fidelity.kl is not None
    assert fidelity.kl_decode is not None
    assert fidelity.kl != fidelity.kl_decode
    assert fidelity.kl < 2 * fidelity.kl_decode + 0.01
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "token by token" in card
    assert "--prefill int8" in card


@pytest.mark.parametrize("number", range(len(KINDS)), ids=IDS)
def test_decoding_is_what_it_was_and_prompts_are_int8(number: int, converted: Any) -> None:
    """Up to MOST_DECODED new tokens of a row come out bit for bit as from an artifact with one body, beyond that nearly."""
    (_, folder), (_, same) = (converted(number, prefill) for prefill in ("int8", "same"))
    for count in (1, MOST_DECODED, MOST_DECODED + 1, len(TOKENS)):
        found, expected = (logits(each, TOKENS[:count]) for each in (folder, same))
        if count <= MOST_DECODED:
            assert np.array_equal(found, expected)
        else:
            assert not np.array_equal(found, expected)
            assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)


def logits(folder: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    session = file_session(folder / GRAPH)
    feeds: dict[str, Any] = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    for each in session.get_inputs():
        if each.name.startswith("past"):
            kind = np.int8 if each.type == "tensor(int8)" else np.float32
            feeds[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), kind)
    return np.asarray(session.run(["logits"], feeds)[0])


def test_a_report_says_what_int8_caches_lose_beside_int8_prompts(converted: Any) -> None:
    """Against float caches in both bodies: of windows that go in piece after piece, each on the codes of those before."""
    report, folder = converted(8, "int8")
    assert report.kv_cache is not None
    assert report.kv_cache.kind == "int8"
    assert report.kv_cache.loss is not None
    assert 0 < report.kv_cache.loss.kl < 0.01
    assert "--kv-cache int8" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", CODED)
def test_a_prompt_in_pieces_loses_what_its_cache_in_codes_does(number: int, converted: Any) -> None:
    """The second piece, longer than MOST_DECODED, reads codes of the first one: little else than without int8 prompts."""
    assert len(TOKENS) > MOST_DECODED
    lost = []
    for prefill in ("int8", "same"):
        folder = converted(number, prefill)[1]
        whole, pieces = (onnxruntime_logits(folder, 2 * TOKENS, prompt, len(TOKENS)) for prompt in (24, 12))
        assert np.allclose(whole[:12], pieces[:12], atol=1e-4)
        lost.append(np.linalg.norm(whole - pieces) / np.linalg.norm(whole))
    assert 0 < lost[0] < 2 * lost[1]


@pytest.mark.parametrize("number", range(len(KINDS)), ids=IDS)
def test_nothing_is_left_to_derive_once_it_is_loaded(number: int, converted: Any, tmp_path: Path) -> None:
    """All that derives int8 weights is folded when the session is created: what a run computes is the products alone."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    folder = converted(number, "int8")[1]
    onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node] == ["Shape", "Greater", "If"]
    prompt, decode = ([node.op_type for node in each.g.node] for each in graph.node[-1].attribute)
    if graph.node[-1].attribute[0].name != "then_branch":
        prompt, decode = decode, prompt
    assert "MatMulNBits" not in prompt
    assert "MatMulNBits" in decode
    assert {"QLinearConv", "Transpose", "BitwiseXor"}.isdisjoint({*prompt, *decode})
    # What stays is the choice of each attention between an empty cache and codes.
    attentions = sum(op_type in ("If", "GroupQueryAttention") for op_type in decode)
    assert [ops.count("If") for ops in (prompt, decode)] == [attentions if "kv_cache" in KINDS[number][1] else 0] * 2


def test_the_weights_on_disk_are_those_of_one_body(converted: Any) -> None:
    """Both bodies read the same files: the graph alone is larger."""
    (_, folder), (_, same) = (converted(1, prefill) for prefill in ("int8", "same"))
    for name in ("model.safetensors", "qconvert.bin"):
        assert (folder / name).read_bytes() == (same / name).read_bytes()


def test_a_processor_that_saturates_gets_half_the_range(
    converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is told so derives weights in 63 steps; parity, told the same, finds them right, and otherwise wrong."""
    right = logits(converted(0, "int8")[1], TOKENS)
    monkeypatch.setattr("qconvert.export.processors.PROBE_SUM", 1)
    asked = recipe(source("llama"), tmp_path / "out", tmp_path, scheme="int4-g16", verify=False)
    convert(asked)
    half = logits(asked.output, TOKENS)
    assert not np.array_equal(right, half)
    assert np.linalg.norm(right - half) < 0.1 * np.linalg.norm(right)
    found = CliRunner().invoke(main, ["verify", str(asked.output)])
    assert found.exit_code == 5
    assert "of the body for prompts" in found.output or "with int8 activations" in found.output


def test_a_body_that_computes_something_else_is_found(tmp_path: Path) -> None:
    """A zero point of 7 in the place of 8, as another derivation would have it: parity fails."""
    asked = recipe(source("llama"), tmp_path / "out", tmp_path, scheme="int4-g16", verify=False)
    convert(asked)
    model = onnx.load(asked.output / GRAPH, load_external_data=False)
    (zero,) = (each for each in model.graph.initializer if each.name.endswith("/zero_4"))
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(7, np.int8), zero.name))
    artifact = reader(asked)
    (asked.output / GRAPH).write_bytes(model.SerializeToString())
    assert cluster_parity(artifact) > 10 * TOLERANCE


def reader(asked: Recipe) -> ArtifactReader:
    model = load(asked.model, lambda source: None)
    return ArtifactReader(asked.output, model, plan(asked, plugin_manager()), read_index(asked.output))


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_onnxruntime_genai_says_the_same_after_a_long_prompt(kv_cache: str, tmp_path: Path) -> None:
    """The prompt goes through one body, each token after it through the other, caches from one to the other; read in two
    pieces, the second one on the cache of the first, too."""
    asked = recipe(source("llama"), tmp_path / "out", tmp_path, scheme="int4-g16", kv_cache=kv_cache, verify=False)
    convert(asked)
    artifact = reader(asked)
    assert genai_tokens(artifact, TOKENS, 12) == onnxruntime_tokens(artifact, TOKENS, 12)
    piece = len(TOKENS)
    assert genai_tokens(artifact, 2 * TOKENS, 12, piece) == onnxruntime_tokens(artifact, 2 * TOKENS, 12, piece)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scheme": "int8-channel-a8"}, "no linear layer has packed weights"),
        ({"scheme": "int4-g32", "targets": ["cuda"]}, "the artifact is for cuda"),
    ],
)
def test_it_is_refused_where_there_is_nothing_to_derive(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """And an encoder has no prompts."""
    with pytest.raises(UsageError, match=reason) as raised:
        convert(recipe(source("llama"), tmp_path / "out", tmp_path, **settings))
    assert raised.value.code == "QC-PLAN-020"
    with pytest.raises(UsageError, match="is no decoder-only language model"):
        convert(recipe(tiny_bert(tmp_path / "bert"), tmp_path / "out", tmp_path, scheme="int4-g32"))
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_it_takes_to_load(tmp_path: Path) -> None:
    """In words, and with --json in bytes and seconds; without it, neither. A cache in codes goes with it."""
    command = ["plan", "--model", str(source("llama")), "--output", str(tmp_path / "out"), "--scheme", "int4-g16"]
    plain, found = (
        json.loads(CliRunner().invoke(main, [*command, *more, "--json"]).stdout)["deployment"]
        for more in ((), ("--prefill", "int8", "--kv-cache", "int8"))
    )
    assert "loading_bytes" not in plain
    assert found["loading_bytes"] >= found["loaded_bytes"] > plain["loaded_bytes"]
    assert found["deriving_seconds"] > 0
    assert 4 * found["cache_bytes_per_token"] == plain["cache_bytes_per_token"]
    assert "while loading" in CliRunner().invoke(main, [*command, "--prefill", "int8"]).stdout


def test_the_choice_is_by_new_tokens_of_a_row(converted: Any) -> None:
    """A node of the graph itself says so, whatever lies in the cache and however many rows there are."""
    graph = onnx.load(converted(0, "int8")[1] / GRAPH, load_external_data=False).graph
    (choice,) = (node for node in graph.node if node.name == CHOICE)
    (greater,) = (node for node in graph.node if choice.input[0] in node.output)
    (length,) = (node for node in graph.node if greater.input[0] in node.output)
    assert (greater.op_type, length.op_type, list(length.input)) == ("Greater", "Shape", ["input_ids"])
