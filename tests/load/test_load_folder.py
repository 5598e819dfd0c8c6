"""What belongs to a checkpoint folder, and that nothing outside it is touched (faults 2, 8 and 9)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qconvert.errors import InputError
from qconvert.load import safetensors
from qconvert.load.folder import carried_files
from qconvert.load.safetensors import open_folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in one shard each."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, file in {"a": "1.safetensors", "b": "2.safetensors"}.items():
        save_file({name: torch.ones(2)}, folder / file)
    return write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})


def write_index(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def rejected(folder: Path, code: str) -> str:
    with pytest.raises(InputError) as caught:
        open_folder(folder)
    assert caught.value.code == code
    return caught.value.message


def test_shards_are_one_source(sharded: Path) -> None:
    source = open_folder(sharded)
    assert list(source.tensors) == ["a", "b"]
    assert source.read("b").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("left", "where"), [("model.safetensors", "in model.safetensors"), (None, "in model.safetensors.index")]
)
def test_other_files_of_weights_are_named(
    sharded: Path, caplog: pytest.LogCaptureFixture, left: str | None, where: str
) -> None:
    """Shards of an earlier save, weights in another program's names, an adapter without its settings."""
    save_file({"c": torch.ones(2)}, sharded / (left or "adapter_model.safetensors"))
    with caplog.at_level(logging.WARNING, "qconvert"):
        open_folder(sharded)
    unread = "'1.safetensors', '2.safetensors'" if left else "'adapter_model.safetensors'"
    assert f"not read: {unread}; the model is {where}" in caplog.text


def test_a_checkpoint_without_other_files_of_weights_is_nothing_to_speak_of(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qconvert"):
        open_folder(sharded)
    assert caplog.text == ""


# Fault 8


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/../../x", r"..\x", r"C:\x", r"\\host\x"])
def test_an_index_that_names_a_path_outside_is_refused_before_anything_is_opened(
    sharded: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "read_header", lambda path: pytest.fail(f"{path} was opened"))
    save_file({"b": torch.ones(2)}, sharded.parent / "x.safetensors")
    message = rejected(write_index(sharded, {"a": "1.safetensors", "b": file}), "QC-INPUT-009")
    assert ascii(file) in message


@pytest.mark.parametrize("name", ["2.safetensors", "model.safetensors", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_refused(sharded: Path, name: str) -> None:
    outside = sharded.parent / "outside"
    save_file({"b": torch.ones(2)}, outside)
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(outside)
    assert name in rejected(sharded, "QC-INPUT-009")


def test_a_link_inside_the_folder_is_followed(sharded: Path) -> None:
    (sharded / "2.safetensors").rename(sharded / "real")
    (sharded / "2.safetensors").symlink_to("real")
    assert list(open_folder(sharded).tensors) == ["a", "b"]


def test_a_loop_of_links_is_refused(sharded: Path) -> None:
    (sharded / "2.safetensors").unlink()
    (sharded / "2.safetensors").symlink_to("2.safetensors")
    assert "2.safetensors" in rejected(sharded, "QC-INPUT-009")


def in_hub_cache(folder: Path, root: Path) -> Path:
    """The same checkpoint as the Hugging Face cache keeps it: links from a snapshot to blobs."""
    blobs, snapshot = root / "models--x--y" / "blobs", root / "models--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064}")
    return snapshot


def test_the_hugging_face_cache_works(sharded: Path, tmp_path: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    snapshot = in_hub_cache(sharded, tmp_path)
    assert list(open_folder(snapshot).tensors) == ["a", "b"]
    assert list(carried_files(snapshot)) == ["tokenizer.json"]


def test_the_cache_rule_reaches_no_further_than_the_blobs(sharded: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(sharded, tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / "models--x--y" / "outside")
    (snapshot / "2.safetensors").unlink()
    (snapshot / "2.safetensors").symlink_to("../../outside")
    assert "2.safetensors" in rejected(snapshot, "QC-INPUT-009")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "2.safetensors").unlink()
    assert "'2.safetensors' is missing" in rejected(sharded, "QC-INPUT-010")


def test_a_tensor_in_two_shards_names_both(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, sharded / "2.safetensors")
    assert "'a' is in two files: '1.safetensors' and '2.safetensors'" in rejected(sharded, "QC-INPUT-010")


def test_an_index_that_names_a_tensor_which_its_shard_lacks(sharded: Path) -> None:
    write_index(sharded, {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"})
    assert "'c' is in '2.safetensors', but it is in no shard" in rejected(sharded, "QC-INPUT-010")


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    write_index(sharded, {"a": "2.safetensors", "b": "1.safetensors"})
    assert "'a' is in '2.safetensors', but it is in '1.safetensors'" in rejected(sharded, "QC-INPUT-010")


def test_a_shard_that_holds_a_tensor_which_the_index_lacks(sharded: Path) -> None:
    save_file({"b": torch.ones(2), "extra": torch.ones(2)}, sharded / "2.safetensors")
    assert "'2.safetensors' holds tensor 'extra'" in rejected(sharded, "QC-INPUT-010")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}], ids=str)
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    assert "weight_map" in rejected(write_index(sharded, weight_map), "QC-INPUT-010")


def test_an_index_that_is_a_git_lfs_pointer_is_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in rejected(sharded, "QC-INPUT-004")


# Fault 9


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert name in rejected(tmp_path, "QC-INPUT-003")


def test_the_hint_for_pickles_says_how_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="save_pretrained"):
        open_folder(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "model.safetensors" in rejected(tmp_path, "QC-INPUT-002")


# What travels


def test_files_that_travel_are_neither_weights_nor_code_nor_what_is_written_anew(tmp_path: Path) -> None:
    travelling = ["1_Pooling/config.json", "chat_template.jinja", "tokenizer.json", "vocab.txt"]
    staying = ["README.md", ".gitattributes", ".git/config", "config.json", "model.safetensors", "model.safetensors.index.json"]
    staying += ["pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt", "onnx/model.onnx", "x.gguf", "modeling_x.py"]
    staying += ["openvino/openvino_model.xml", "model.onnx.data", "weights.npz"]
    staying += ["minilm-1.0.dist-info/METADATA", "minilm-1.0.dist-info/RECORD", "kernels/fast.so", "x.egg-info"]
    for name in travelling + staying:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(carried_files(tmp_path)) == travelling


def test_a_travelling_file_that_links_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "notes.txt").symlink_to("../secret")
    with pytest.raises(InputError, match=r"notes\.txt") as caught:
        carried_files(folder)
    assert caught.value.code == "QC-INPUT-009"


def test_linked_folders_stay_behind_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").touch()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "linked").symlink_to("../elsewhere")
    with caplog.at_level(logging.WARNING, "qconvert"):
        assert carried_files(folder) == {}
    assert "linked" in caplog.text
