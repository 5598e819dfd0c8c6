"""qconvert.json: digests of all that went in and came out, and the same bytes for the same run."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from writing import DIGEST, all_linears, net, plan_of, quantize_layer, quantized_blocks, write_blocks

from qconvert.errors import InputError
from qconvert.ir.artifact import MANIFEST, SIDECAR, WEIGHTS
from qconvert.plugin.host.distribution import Code, Distribution, builtin
from qconvert.recipe import Recipe
from qconvert.storage.digest import CHUNK
from qconvert.storage.published import published_recipe
from qconvert.storage.reader import read_index, read_layer
from qconvert.storage.stage import open_stage
from qconvert.write import run_digest, write_manifest
from qconvert.write.origin import Origin, file_digests, machine, versions

INPUTS = {"model.safetensors": "ab" * 32}
ORIGIN = Origin(INPUTS, versions([Code(builtin(), "cd" * 32)]), machine("cpu"))


def publish(output: Path, recipe: Recipe, origin: Origin = ORIGIN) -> dict[str, Any]:
    model = net(files={"sub/vocab.txt": b"a\n"})
    plan = plan_of(model, all_linears("int4-g32-asym"))
    with open_stage(output, DIGEST) as stage:
        written = write_blocks(quantized_blocks(model, plan), model, plan, stage)
        for timed in ("report.json", "README.md"):
            (stage.folder / timed).write_text("timings")
        write_manifest(stage, recipe, origin, written)
        stage.publish()
    document: dict[str, Any] = json.loads((output / MANIFEST).read_text())
    return document


def recipe(**settings: Any) -> Recipe:
    return Recipe.from_settings({"model": "module:mine", "output": "out", **settings})


def test_every_file_but_the_timed_ones_has_its_digest(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "out", recipe())
    assert manifest["inputs"] == INPUTS
    assert manifest["outputs"] == {
        name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in (WEIGHTS, SIDECAR, "sub/vocab.txt")
    }


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_digests_are_of_all_bytes(size: int, tmp_path: Path) -> None:
    content = b"q" * size
    (tmp_path / "file").write_bytes(content)
    assert file_digests({"file": tmp_path / "file", "bytes": content}) == dict.fromkeys(
        ("file", "bytes"), hashlib.sha256(content).hexdigest()
    )


def test_versions_layers_and_the_machine(tmp_path: Path) -> None:
    plugin = Code(Distribution("qconvert-kmeans", "1.2"), "ef" * 32)
    manifest = publish(tmp_path / "out", recipe(), replace(ORIGIN, versions=versions([plugin])))
    assert manifest["schema"] == 1
    assert {"qconvert", "torch", "transformers", "onnx", "onnxruntime", "tokenizers", "numpy"} <= manifest["versions"].keys()
    assert manifest["versions"]["python"] == platform.python_version()
    assert manifest["versions"]["qconvert-kmeans"] == "1.2"
    assert manifest["machine"]["threads"] == torch.get_num_threads()
    assert torch.backends.cpu.get_cpu_capability() in manifest["machine"]["processor"]
    assert [layer["name"] for layer in manifest["layers"]] == ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"]
    assert manifest["layers"][0]["scheme"] == "int4-g32-asym"


def test_a_plugin_s_version_comes_with_those_of_what_it_needs() -> None:
    found = versions([Code(Distribution("import-linter", "2"), "")])  # any distribution with requirements, one of them click
    assert found["click"] == version("click")


def test_a_finished_folder_reads_back_from_its_own_indexes(tmp_path: Path) -> None:
    publish(tmp_path / "out", recipe())
    model = net()
    index = read_index(tmp_path / "out")
    for layer in plan_of(model, all_linears("int4-g32-asym")).layers.values():
        assert read_layer(tmp_path / "out", layer, index).dequantize().equal(quantize_layer(model, layer).dequantize())
        assert index[f"{layer.name}.kernel_zero_point"].file == SIDECAR


def test_a_folder_without_manifest_is_named(tmp_path: Path) -> None:
    publish(tmp_path / "out", recipe())
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"QC-READ-001.*qconvert\.json"):
        read_index(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]"], ids=["empty", "huge-header", "list"])
def test_a_damaged_header_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=r"QC-READ-001.*model\.safetensors"):
        read_index(tmp_path)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    publish(tmp_path / "one", recipe(output=tmp_path / "one"))
    publish(tmp_path / "two", recipe(output=tmp_path / "two", force=True))
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()
    assert (tmp_path / "one" / MANIFEST).read_bytes().endswith(b"}\n")


def test_paths_are_relative_to_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "corpus.txt").touch()
    manifest = publish(
        tmp_path / "out",
        recipe(
            model=str(tmp_path / "model"),
            calibration={"source": "corpus.txt"},
            evaluation={"source": "builtin"},
            options={"table": str(tmp_path / "table.json"), "alpha": 0.5},
        ),
    )
    assert manifest["recipe"]["model"] == "../model"
    assert manifest["recipe"]["output"] == "."
    assert manifest["recipe"]["calibration"]["source"] == "../corpus.txt"
    assert manifest["recipe"]["evaluation"]["source"] == "builtin"
    assert manifest["recipe"]["options"] == {"table": "../table.json", "alpha": 0.5}
    assert str(tmp_path) not in (tmp_path / "out" / MANIFEST).read_text()


def test_a_published_recipe_runs_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "corpus.txt").touch()
    settings = {
        "scheme": "int4-g32-asym",
        "evaluation": {"source": str(tmp_path / "corpus.txt")},
        "rules": [{"pattern": "*", "scheme": "float"}],
    }
    first = recipe(model=str(tmp_path / "model"), output=tmp_path / "out", **settings)
    publish(tmp_path / "out", first)
    monkeypatch.chdir("/")
    assert published_recipe(tmp_path / "out", (), None, ()) == first
    changed = published_recipe(tmp_path / "out", ["cuda"], "builtin", ())
    assert (changed.targets, changed.evaluation.source) == (("cuda",), "builtin")


def test_a_stage_belongs_to_recipe_and_origin_but_not_to_what_is_done_afterwards() -> None:
    digest = run_digest(recipe(), ORIGIN)
    assert run_digest(recipe(force=True), ORIGIN) == digest
    assert run_digest(recipe(evaluation={"samples": 3}, verify=False), ORIGIN) == digest
    assert run_digest(recipe(), replace(ORIGIN, inputs={**INPUTS, "evaluation:a.txt": "cd" * 32})) == digest
    assert run_digest(recipe(seed=1), ORIGIN) != digest
    for part in ("inputs", "versions", "machine"):
        for name in getattr(ORIGIN, part):
            other = replace(ORIGIN, **{part: {**getattr(ORIGIN, part), name: "other"}})
            assert run_digest(recipe(), other) != digest, name


def test_what_steers_the_libraries_is_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine("cpu") == {**before, "ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_a_factory_s_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert publish(tmp_path / "out", recipe(model="module:nets/mlp.py:make"))["recipe"]["model"] == "module:../nets/mlp.py:make"
    monkeypatch.chdir("/")
    assert published_recipe(tmp_path / "out", (), None, ()).model == f"module:{tmp_path}/nets/mlp.py:make"


@pytest.mark.parametrize("model", ["pkg:demo/model", "module:FACTORY", "org/name"])
def test_sources_that_are_no_path_stay(tmp_path: Path, model: str) -> None:
    assert publish(tmp_path / "out", recipe(model=model))["recipe"]["model"] == model


def test_a_time_is_there_only_if_the_build_gives_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert "created" not in publish(tmp_path / "without", recipe())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert publish(tmp_path / "with", recipe())["created"] == "2023-11-14T22:13:20+00:00"


def test_an_input_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"QC-WRITE-005.*gone\.bin"):
        file_digests({"gone": tmp_path / "gone.bin"})


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": {}}', "[" * 100_000])
def test_a_file_that_is_no_manifest_is_an_input_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "qconvert.json").write_text(content)
    with pytest.raises(InputError, match=r"it h|recursion") as caught:
        published_recipe(tmp_path, (), None, ())
    assert caught.value.code == "QC-READ-001"
