"""Adapters that are not taken: each is refused by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONFIG, FEW, TENSORS, adapted, error, recipe_of
from safetensors.torch import save_file
from tiny_models import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconvert import Recipe, convert, prepare_qat
from qconvert.errors import UsageError

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter)"""
    root = tmp_path_factory.mktemp("llama")
    base = tiny_llama(root / "base")
    adapted(AutoModelForCausalLM.from_pretrained(base), root / "adapter")
    return base, root / "adapter"


def test_what_can_not_be_carried_out_is_refused_by_the_recipe(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama

    def asked(**settings: Any) -> Recipe:
        return Recipe.from_settings({"model": str(base), "output": str(tmp_path / "out"), **FEW, **settings})

    with_codes = {"adapter": str(adapter), "trained": "codes.safetensors"}
    assert "codes that were trained" in error("QC-ADAPTER-006", lambda: asked(**with_codes), UsageError)
    assert "--adapter FOLDER" in error("QC-ADAPTER-006", lambda: asked(merge_adapter=True), UsageError)
    for settings in ({}, {"quantizer": "cast"}):
        said = error("QC-PLAN-017", lambda: convert(asked(adapter=str(adapter), **settings)), UsageError)  # noqa: B023
        assert "--layout onnx" in said
        assert "--merge-adapter" in said
    network = prepare_qat(AutoModelForCausalLM.from_pretrained(base), asked(scheme="int8-channel"))
    recipe = recipe_of(base, adapter, tmp_path / "out", scheme="int8-channel")
    error("QC-ADAPTER-006", lambda: convert(recipe, module=network), UsageError)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def says(**entries: Any) -> Change:
    return lambda config, tensors: config.update(entries)


def holds(name: str, tensor: Tensor) -> Change:
    return lambda config, tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (says(use_dora=True), "002", f"{CONFIG} says use_dora"),
        (says(peft_type="ADALORA"), "002", "peft_type: 'ADALORA'"),
        (says(bias="lora_only"), "002", "bias: 'lora_only'"),
        (says(lora_bias=True), "002", "lora_bias"),
        (says(modules_to_save=["lm_head"]), "002", "modules_to_save: ['lm_head']"),
        (says(init_lora_weights="pissa_niter_4"), "002", "init_lora_weights: 'pissa_niter_4'"),
        (says(trainable_token_indices=[1]), "002", "trainable_token_indices"),
        (says(of_the_future={"a": 1}), "002", "of_the_future"),
        (says(r=0), "001", "ranks"),
        (says(rank_pattern={"q_proj": "4"}), "001", "ranks"),
        (says(lora_alpha=None), "001", "lora_alpha"),
        (says(alpha_pattern={"(": 4}), "001", "'(' is no regular expression"),
        (says(r=5), "003", f"'{Q_PROJ}.lora_A.weight' is [4, 64], and {CONFIG} gives it the rank 5"),
        (holds(f"{Q_PROJ}.lora_magnitude_vector.weight", torch.ones(64)), "002", f"{Q_PROJ}.lora_magnitude_vector.weight"),
        (holds("base_model.model.lm_head.weight", torch.ones(384, 64)), "002", "base_model.model.lm_head.weight"),
        (holds("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 384)), "002", "lora_embedding_A"),
        (holds(f"{Q_PROJ}.lora_B.weight", torch.ones(63, 4)), "003", f"'{Q_PROJ}.lora_B.weight' is [63, 4]"),
        (holds(f"{Q_PROJ}.lora_A.weight", torch.ones(4, 63)), "003", f"'{Q_PROJ}.lora_A.weight' is [4, 63]"),
        (holds(f"{Q_PROJ}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)), "003", "stored as torch.int8"),
        (lambda config, tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"), "003", f"'{Q_PROJ}.lora_B.weight' is missing"),
        (lambda config, tensors: tensors.clear(), "001", "holds no tensor"),
        (
            lambda config, tensors: tensors.update(
                {f"base_model.model.other.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
            ),
            "003",
            "adapts other, and the model base has no other",
        ),
        (
            lambda config, tensors: tensors.update(
                {f"base_model.model.model.norm.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
            ),
            "003",
            "has model.norm as LlamaRMSNorm, which is no linear layer",
        ),
        (holds(f"{Q_PROJ}.lora_B.weight", torch.full((64, 4), torch.nan)), "004", f"'{Q_PROJ}.lora_B.weight' holds NaN"),
    ],
)
@pytest.mark.parametrize("merge_adapter", [False, True], ids=["kept", "merged"])
def test_an_adapter_that_is_not_taken_is_refused_by_name(
    change: Change, code: str, words: str, merge_adapter: bool, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = llama
    folder = tmp_path / "adapter"
    folder.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 64), f"{layer}.lora_B.weight": torch.ones(64, 4)}
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS)
    recipe = recipe_of(base, folder, tmp_path / "out", merge_adapter=merge_adapter)
    assert words in error(f"QC-ADAPTER-{code}", lambda: convert(recipe))
    assert not recipe.output.exists()


def test_folders_without_readable_files_are_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    recipe = recipe_of(base, tmp_path / "adapter", tmp_path / "out")
    assert "there is no folder" in error("QC-ADAPTER-001", lambda: convert(recipe))
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / TENSORS).rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "is a pickle" in error("QC-ADAPTER-001", lambda: convert(recipe))
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    assert f"has no {TENSORS}" in error("QC-ADAPTER-001", lambda: convert(recipe))
    (tmp_path / "adapter" / CONFIG).write_text("[]")
    assert CONFIG in error("QC-ADAPTER-001", lambda: convert(recipe))
