"""Wide blocks, large statistics and many hidden states are handled in a way of their own; no byte of an artifact changes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_digests import RECIPES, digests
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor

from qconvert.errors import ResourceError
from qconvert.storage import stage


def use_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Handle every tensor and every block as if it were large. Returns the folder of each file that is made for one."""
    made: list[Path] = []
    in_file = stage.tensor_in_file  # type: ignore[attr-defined]

    def noted(folder: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        made.append(folder)
        return in_file(folder, shape, dtype)

    monkeypatch.setattr(stage, "tensor_in_file", noted)
    monkeypatch.setattr("qconvert.ir.large_tensors.LARGE", 0)
    monkeypatch.setattr("qconvert.execution.materialize.LARGE_BLOCK", 0)
    return made


def settings_of(model: Path, recipe: str) -> dict[str, Any]:
    return {"model": str(model), **RECIPES[recipe], **({"layout": "onnx"} if model.name == "gpt2" else {})}


@pytest.mark.parametrize(
    ("save", "recipe"),
    [
        (tiny_llama, "awq"),
        (tiny_llama, "gptq-tuned"),
        (tiny_bert, "smoothquant"),
        (tiny_gpt2, "awq"),
        (tiny_gpt2, "gptq-tuned"),
    ],
    ids=["awq", "gptq-tuned", "smoothquant", "conv1d", "conv1d-tuned"],
)
def test_what_is_large_gives_the_same_bytes(save: Any, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / save.__name__.removeprefix("tiny_")
    save(model)
    expected = digests(settings_of(model, recipe), tmp_path / "memory")
    made = use_files(monkeypatch)
    assert digests(settings_of(model, recipe), tmp_path / "files") == expected
    assert made
    assert {folder.name for folder in made} == {"scratch"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([model.name, "memory", "files"])


def test_where_the_disk_is_too_small_for_them_the_run_says_so_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "llama")
    settings = settings_of(tmp_path / "llama", "awq")
    expected = digests(settings, tmp_path / "memory")
    made = use_files(monkeypatch)
    reserve = os.posix_fallocate

    def full_disk(descriptor: int, offset: int, length: int) -> None:
        if len(made) > 20:  # in the second block
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full_disk)
        with pytest.raises(ResourceError) as raised:
            digests(settings, tmp_path / "output")
    assert raised.value.code == "QC-DISK-002"
    assert not (tmp_path / "output").exists()
    (left,) = tmp_path.glob(".output.qconvert-*")
    assert (left / "journal").read_text().count("\n") >= 1
    assert digests(settings, tmp_path / "output") == expected
