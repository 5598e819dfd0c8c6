"""Weights in shards: a folder of several safetensors files and an index reads and runs as that of a single file does.

The limit is set so low that a tiny model has several shards.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from generation import genai_tokens, onnxruntime_tokens
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_llama

from qconvert.errors import InputError, ResourceError
from qconvert.ir import contents
from qconvert.ir.artifact import CARD, GRAPH, MANIFEST, REPORT, SIDECAR, WEIGHTS, WEIGHTS_INDEX, weight_file_names
from qconvert.ir.layer import Block
from qconvert.load import load
from qconvert.pipeline import conversion, preparation, verification
from qconvert.pipeline.comparison import compare
from qconvert.recipe import Recipe
from qconvert.report.plan import document, table
from qconvert.storage import safetensors
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index

pytestmark = pytest.mark.usefixtures("quick", "quiet")

# A quantized block takes 25 kB, the embedding and the head 49 kB each: blocks are kept whole, or they are not.
LIMITS = {"blocks": 60_000, "tensors": 3_000}
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 in shards of its own, whose names are those of the output's where that has three."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    return tiny_llama(folder / "llama", dtype=torch.bfloat16, tie=False, shards=3)


@pytest.fixture
def recipe(source: Path, tmp_path: Path) -> Make:
    data = {"source": str(source.parent / "text.txt"), "samples": 4, "length": 32}
    common = {"model": str(source), "calibration": data, "evaluation": data, "quantizer": "awq", "scheme": "int4-g32"}

    def make(name: str, **settings: Any) -> Recipe:
        return Recipe.from_settings({**common, "output": str(tmp_path / name), **settings})

    return make


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(contents, "SHARD_BYTES", size)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those that hold timings."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in (REPORT, CARD)}


def shards(folder: Path) -> list[str]:
    return [name for name in files(folder) if name.endswith(".safetensors")]


def external(folder: Path) -> dict[str, bytes]:
    """Initializer of the graph -> the bytes that it points to."""
    found = {}
    for tensor in onnx.load(folder / GRAPH, load_external_data=False).graph.initializer:
        if place := {entry.key: entry.value for entry in tensor.external_data}:
            start = int(place["offset"])
            found[tensor.name] = (folder / place["location"]).read_bytes()[start : start + int(place["length"])]
    return found


# --- what is written ---


@pytest.mark.parametrize("limited", LIMITS)
def test_a_sharded_folder_is_one_of_a_single_file_to_every_reader(
    limited: str, recipe: Make, limit: Callable[[int], None]
) -> None:
    conversion.convert(recipe("whole"))
    limit(LIMITS[limited])
    report = conversion.convert(recipe("sharded"))
    assert {part.target: part.status for part in report.parity} == dict.fromkeys(("cpu", "transformers", "float"), "passed")
    whole, sharded = recipe("whole").output, recipe("sharded").output
    tensors = {name: load_file(sharded / name) for name in shards(sharded)}
    assert list(tensors) == list(weight_file_names(len(tensors)))
    assert len(tensors) == 3 if limited == "blocks" else len(tensors) > 10
    for held in tensors.values():
        assert sum(tensor.nbytes for tensor in held.values()) <= LIMITS[limited] or len(held) == 1
    expected = load_file(whole / WEIGHTS)
    found = {name: tensor for held in tensors.values() for name, tensor in held.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert found["lm_head.weight"].dtype == torch.bfloat16  # as in the source
    assert json.loads((sharded / WEIGHTS_INDEX).read_text()) == {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in expected.values())},
        "weight_map": {name: file for file, held in tensors.items() for name in held},
    }
    ids = torch.tensor([[5, 17, 3, 60, 8, 2]])
    logits = [transformers.AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (whole, sharded)]
    assert torch.equal(*logits)
    artifacts = [artifact(recipe(name)) for name in ("whole", "sharded")]
    texts = [run(each) for each in artifacts for run in (onnxruntime_tokens, genai_tokens)]
    assert len(set(texts[0])) > 1
    assert texts == [texts[0]] * 4


def artifact(mine: Recipe) -> ArtifactReader:
    model = load(mine.model, lambda _: None)
    return ArtifactReader(mine.output, model, preparation.plan(mine), read_index(mine.output))


def test_where_blocks_are_kept_whole_the_graph_points_to_the_same_bytes(recipe: Make, limit: Callable[[int], None]) -> None:
    """Layers that are computed as one lie one behind the other, and need no copy."""
    settings = {"targets": ["cpu", "cuda"], "cuda_dtype": "bfloat16", "verify": False}
    conversion.convert(recipe("whole", **settings))
    limit(LIMITS["blocks"])
    conversion.convert(recipe("sharded", **settings))
    whole, sharded = recipe("whole").output, recipe("sharded").output
    assert len(shards(sharded)) == 3
    assert external(sharded) == external(whole)
    assert files(sharded)[SIDECAR] == files(whole)[SIDECAR]


def test_up_to_the_limit_there_is_one_file_and_no_index(recipe: Make, limit: Callable[[int], None]) -> None:
    conversion.convert(recipe("out", verify=False))
    expected = files(recipe("out").output)
    size = preparation.plan(recipe("out")).weights_bytes
    limit(size)
    conversion.convert(recipe("out", verify=False, force=True))
    assert files(recipe("out").output) == expected
    assert WEIGHTS in expected
    assert WEIGHTS_INDEX not in expected
    limit(size - 1)
    conversion.convert(recipe("out", verify=False, force=True))
    assert shards(recipe("out").output) == list(weight_file_names(2))
    limit(size)
    conversion.convert(recipe("out", verify=False, force=True))
    assert files(recipe("out").output) == expected  # nothing of the shards is left


def test_a_run_that_was_interrupted_in_a_later_shard_gives_the_same_bytes(
    recipe: Make, limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(25_000)
    mine = recipe("out", verify=False)
    conversion.convert(mine)
    expected = files(mine.output)
    taken: list[Any] = []
    real = conversion.Conversion.take

    def interrupted(self: conversion.Conversion, block: Block) -> None:
        if len(taken) == 1:
            taken.append("")
            raise KeyboardInterrupt
        taken.append(block.name)
        real(self, block)

    monkeypatch.setattr(conversion.Conversion, "take", interrupted)
    again = mine.model_copy(update={"force": True})
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(again)
    conversion.convert(again)
    assert taken == ["model.layers.0", "", "model.layers.1"]
    assert files(mine.output) == expected


def test_recipes_that_are_compared_have_the_shards_that_each_has_alone(recipe: Make, limit: Callable[[int], None]) -> None:
    limit(LIMITS["blocks"])
    alone = recipe("alone", verify=False)
    conversion.convert(alone)
    mine, other = recipe("out/mine", verify=False), recipe("out/other", verify=False, scheme="int8-channel")
    compare({"mine": mine, "other": other})
    for name in (*shards(alone.output), WEIGHTS_INDEX, GRAPH):
        assert (mine.output / name).read_bytes() == (alone.output / name).read_bytes()
    assert shards(other.output) == list(weight_file_names(4))


# --- what is said ---


def test_the_plan_names_the_shards(recipe: Make, limit: Callable[[int], None]) -> None:
    def shown() -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(table(preparation.plan(recipe("out"))))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert document(preparation.plan(recipe("out")))["weight_files"] == [WEIGHTS]
    assert f"\n{WEIGHTS}: " in shown()
    limit(LIMITS["blocks"])
    assert document(preparation.plan(recipe("out")))["weight_files"] == list(weight_file_names(3))
    assert "\nmodel-00001-of-00003.safetensors and 2 more: " in shown()


def test_a_full_disk_names_the_shard(recipe: Make, limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        if path.name == "model-00002-of-00003.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")

    limit(LIMITS["blocks"])
    monkeypatch.setattr(safetensors, "fsync", full)
    with pytest.raises(ResourceError, match=r"QC-DISK-002.*model-00002-of-00003\.safetensors"):
        conversion.convert(recipe("out", verify=False))


@pytest.fixture
def published(recipe: Make, limit: Callable[[int], None]) -> Path:
    limit(LIMITS["blocks"])
    conversion.convert(recipe("out", verify=False))
    return recipe("out").output


def test_a_published_folder_is_verified_whatever_the_limit_is_then(published: Path, limit: Callable[[int], None]) -> None:
    limit(10**9)
    assert verification.verify(published).passed


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_damaged_shard_is_named(damage: str, published: Path) -> None:
    path = published / "model-00002-of-00003.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"QC-VERIFY-001.*model-00002-of-00003\.safetensors"):
        verification.verify(published)
    with pytest.raises(InputError, match=r"QC-READ-001.*model-00002-of-00003\.safetensors"):
        read_index(published)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight_map: weight_map | {"lm_head.weight": "model-00001-of-00003.safetensors"},
        lambda weight_map: weight_map | {"other": "model-00001-of-00003.safetensors"},
        lambda weight_map: dict(list(weight_map.items())[1:]),
        lambda weight_map: {name: f"../{file}" for name, file in weight_map.items()},
        lambda weight_map: list(weight_map),
    ],
    ids=["another shard", "no such tensor", "a tensor less", "another folder", "a list"],
)
def test_an_index_that_does_not_say_what_the_shards_hold_is_refused(change: Callable[[Any], Any], published: Path) -> None:
    index = json.loads((published / WEIGHTS_INDEX).read_text())
    (published / WEIGHTS_INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))
    with pytest.raises(InputError, match=rf"QC-READ-001.*{WEIGHTS_INDEX}"):
        read_index(published)


def test_the_manifest_tells_the_source_s_shards_from_those_of_the_output(published: Path) -> None:
    manifest = json.loads((published / MANIFEST).read_text())
    names = {WEIGHTS_INDEX, *weight_file_names(3)}
    assert names <= manifest["inputs"].keys()
    assert names <= manifest["outputs"].keys()
    assert all(manifest["inputs"][name] != manifest["outputs"][name] for name in names)
