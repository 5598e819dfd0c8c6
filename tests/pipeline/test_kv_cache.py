"""An int8 KV cache, from a folder to a folder: what it holds, what it computes, what it takes, and who can't have one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from architecture_models import build
from click.testing import CliRunner
from generation import genai_tokens, onnxruntime_logits, onnxruntime_tokens
from tiny_models import tiny_bert, tiny_llama

from qconvert import Recipe, convert
from qconvert.cli import main
from qconvert.errors import UsageError
from qconvert.graph.cache_codes import CachedAttention
from qconvert.ir.artifact import GENAI_CONFIG, GRAPH
from qconvert.load import load
from qconvert.ort.session import file_session
from qconvert.pipeline.preparation import plan
from qconvert.plugin.host.manager import plugin_manager
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index, read_tensor
from qconvert.targets.cpu import CPU
from qconvert.verify import cache_parity
from qconvert.verify.parity import TOLERANCE

# Rotation by the operator, a window, biases, soft caps, rotation by the graph, layers without rotation, learned positions.
KINDS = ("llama", "mistral", "qwen2", "gemma2", "gemma3_text", "smollm3", "gpt2")
DATA = {"samples": 6, "length": 40}
PROMPT, TOKENS = 7, [5, 17, 3, 60, 8, 2, 33, 41, 12, 9, 77, 50, 4, 31, 18, 63]
Folders = Any


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A converted decoder by its architecture and its cache; made once."""
    base = tmp_path_factory.mktemp("caches")

    @cache
    def make(name: str, kv_cache: str) -> ArtifactReader:
        source = build(name).folder
        assert source is not None
        np.savez(base / "ids.npz", input_ids=np.random.default_rng(0).integers(3, 100, (24, DATA["length"])))
        data = {"source": str(base / "ids.npz"), **DATA}
        asked = recipe(source, base / f"{name}-{kv_cache}", kv_cache=kv_cache, calibration=data, evaluation=data)
        asked = asked.model_copy(update={"verify": kv_cache == "int8"})
        assert convert(asked).passed is (True if asked.verify else None)
        return read(asked)

    return make


def recipe(model: Path, output: Path, **settings: Any) -> Recipe:
    return Recipe.from_settings(
        {"model": str(model), "output": output, "scheme": "int8-g16", "kv_cache": "int8", "layout": "onnx", **settings}
    )


def read(asked: Recipe) -> ArtifactReader:
    model = load(asked.model, lambda source: None)
    return ArtifactReader(asked.output, model, plan(asked, plugin_manager()), read_index(asked.output))


@pytest.mark.parametrize("name", KINDS)
def test_step_by_step_it_says_nearly_what_the_float_cache_does(name: str, folders: Folders) -> None:
    """And the same of the prompt, which has no cache to read. The report's parity has held every attention against torch."""
    coded, floats = (onnxruntime_logits(folders(name, kind).folder, TOKENS, prompt=PROMPT) for kind in ("int8", "float"))
    assert np.allclose(coded[:PROMPT], floats[:PROMPT], atol=1e-5)
    assert not np.allclose(coded[PROMPT:], floats[PROMPT:], atol=1e-4)
    assert np.linalg.norm(coded - floats) < 0.1 * np.linalg.norm(floats)


@pytest.mark.parametrize("name", KINDS)
def test_its_codes_are_those_of_numpy(name: str, folders: Folders) -> None:
    """In the first block, which reads what is the same in both; in all, they are a quarter of the bytes."""
    (coded, floats), scales = (_caches(folders(name, kind)) for kind in ("int8", "float")), _scales(folders(name, "int8"))
    for part in ("key", "value"):
        found, scale = coded[f"present.0.{part}"], scales[f"past_key_values.0.{part}"]
        assert found.dtype == np.int8
        assert np.array_equal(found, np.clip(np.rint(floats[f"present.0.{part}"] / scale), -128, 127))
    assert 4 * sum(value.nbytes for value in coded.values()) == sum(value.nbytes for value in floats.values())


def _caches(artifact: ArtifactReader) -> dict[str, np.ndarray[Any, Any]]:
    session = file_session(artifact.folder / GRAPH)
    feeds: dict[str, Any] = {"input_ids": np.array([TOKENS]), "attention_mask": np.ones((1, len(TOKENS)), np.int64)}
    for each in session.get_inputs():
        if each.name.startswith("past"):
            kind = np.int8 if each.type == "tensor(int8)" else np.float32
            feeds[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), kind)
    found = dict(zip((each.name for each in session.get_outputs()), session.run(None, feeds), strict=True))
    return {name: value for name, value in found.items() if name.startswith("present.")}


def _scales(artifact: ArtifactReader) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name.removesuffix(".scale"): read_tensor(artifact.folder, stored).numpy()
        for name, stored in artifact.tensors.items()
        if name.startswith("past_key_values.")
    }


@pytest.mark.parametrize(("name", "alike"), [("llama", 8), ("gemma3_text", 0), ("gpt2", 0)])
def test_channels_that_rotation_turns_into_each_other_have_one_scale(name: str, alike: int, folders: Folders) -> None:
    """alike: how many pairs; where the operator does not rotate, all channels of a head share one."""
    scales = _scales(folders(name, "int8"))
    key, value = scales["past_key_values.1.key"], scales["past_key_values.1.value"]
    if alike:
        assert np.array_equal(key[..., :alike], key[..., alike : 2 * alike])
        assert len(np.unique(key)) == key.size - key.shape[1] * alike
    else:
        assert all(len(np.unique(head)) == 1 for head in key[0])
    assert len(np.unique(value)) == value.size


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_onnxruntime_genai_says_the_same(name: str, folders: Folders) -> None:
    artifact = folders(name, "int8")
    tokens = onnxruntime_tokens(artifact)
    assert len(set(tokens)) > 1
    assert genai_tokens(artifact) == tokens
    assert json.loads((artifact.folder / GENAI_CONFIG).read_text())["search"]["past_present_share_buffer"] is False


def test_report_plan_and_card_say_what_it_takes_and_loses(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    asked = recipe(source, tmp_path / "out", scheme="int4-g32", layout="transformers")
    report = convert(asked)
    part = report.kv_cache
    assert part is not None
    assert (part.bytes_per_token, part.float_bytes_per_token) == (2 * 2 * 2 * 16, 4 * 2 * 2 * 2 * 16)
    loss = part.loss
    assert loss is not None
    assert (loss.context, loss.windows) == (256, 4)
    assert loss.kl is not None
    assert 0 < loss.kl < 0.01
    assert loss.perplexity == pytest.approx(loss.perplexity_float_cache, rel=0.02)
    deployment = plan(asked, plugin_manager()).deployment
    assert deployment is not None
    assert deployment.cache_bytes_per_token == part.bytes_per_token
    document = json.loads((asked.output / "report.json").read_text())
    assert document["kv_cache"] == part.model_dump(mode="json", exclude_none=True)
    card = (asked.output / "README.md").read_text()
    assert "--kv-cache int8" in card
    assert "dtype=np.int8" in card
    assert "128 B per token" in card


def test_calibration_is_drawn_for_quantizers_that_need_none(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    assert plan(recipe(source, tmp_path / "out"), plugin_manager()).calibrated
    assert not plan(recipe(source, tmp_path / "out", kv_cache="float"), plugin_manager()).calibrated


def test_a_cast_model_may_have_one_too(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    report = convert(recipe(source, tmp_path / "out", quantizer="cast", scheme="float16", layout="transformers", logits="last"))
    assert report.passed
    assert report.kv_cache is not None


def test_nothing_of_it_is_in_a_folder_with_a_float_cache(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    report = convert(recipe(source, tmp_path / "out", kv_cache="float", verify=False))
    assert report.kv_cache is None
    assert "kv_cache" not in (tmp_path / "out" / "report.json").read_text() + (tmp_path / "out" / "qconvert.json").read_text()
    graph = onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph
    assert not any(attribute.name == "k_quant_type" for node in graph.node for attribute in node.attribute)


def test_parity_sees_codes_of_other_keys(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch without the rotation, keys and their codes are others."""
    artifact, ids = folders("llama", "int8"), torch.tensor([TOKENS])
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert cache_parity.worst_cache(artifact, CPU, sample)[0] < TOLERANCE
    monkeypatch.setattr(CachedAttention, "rotated_pairs", 0)
    error, what = cache_parity.worst_cache(artifact, CPU, sample)
    assert error > TOLERANCE
    assert "codes of present" in what or "attention" in what


def test_018_there_is_none_without_a_decoder(tmp_path: Path) -> None:
    source = tiny_bert(tmp_path / "model")
    with pytest.raises(UsageError) as error:
        plan(recipe(source, tmp_path / "out"), plugin_manager())
    assert error.value.code == "QC-PLAN-018"


def test_019_there_is_none_on_cuda(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    with pytest.raises(UsageError) as error:
        plan(recipe(source, tmp_path / "out", targets=["cpu", "cuda"]), plugin_manager())
    assert error.value.code == "QC-PLAN-019"


def test_a_flag_asks_for_it_and_no_other_kind_is_known(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    flags = ["plan", "--model", str(source), "--output", str(tmp_path / "out"), "--kv-cache"]
    said = CliRunner().invoke(main, [*flags, "int8"])
    assert "128 B of cache for each token" in said.output
    assert CliRunner().invoke(main, [*flags, "int4"]).exit_code == 2
