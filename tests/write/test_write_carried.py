"""Fault 26: the files that travel with the weights are all there, unchanged, and nothing else is written."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from writing import DIGEST, all_linears, convert, net

from qconvert.errors import InputError
from qconvert.storage.stage import open_stage
from qconvert.write.carried import write_carried


def test_files_and_contents_arrive_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b'{"tokens": "\xc3\xa9"}\r\n')
    (tmp_path / "link").symlink_to("blob")  # as in a Hugging Face cache
    files = {
        "tokenizer.json": tmp_path / "link",
        "chat_template.jinja": b"{{ messages }}",
        "1_Pooling/config.json": b"{}",
        "preprocessor_config.json": b"",
    }
    convert(net(files=files), all_linears("int8"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "blob").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b"{}"
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == b""


@pytest.mark.parametrize("name", ["modeling_x.py", "code/x.pyc", "kernels/fast.so", "x-1.0.dist-info/METADATA"])
def test_code_stays_behind_whoever_loaded_the_model(tmp_path: Path, name: str) -> None:
    with open_stage(tmp_path / "out", DIGEST) as stage:
        write_carried(net(files={name: b"import os"}), stage)
        assert list(stage.folder.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "readme.md", "README.md", "Model.safetensors", "model.safetensors.index.json"),
        *("model-00001-of-00003.safetensors", "Model-00002-of-00002.safetensors"),
    ],
)
def test_the_output_s_own_files_are_not_overwritten(tmp_path: Path, name: str) -> None:
    with open_stage(tmp_path / "out", DIGEST) as stage:
        write_carried(net(files={name: b"of the source"}), stage)
        assert list(stage.folder.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("adapter_config.json", "lora/adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
    ],
)
def test_what_other_tools_would_apply_to_our_weights_stays_behind_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with open_stage(tmp_path / "out", DIGEST) as stage, caplog.at_level(logging.WARNING, "qconvert"):
        write_carried(net(files={name: b"{}"}), stage)
        assert list(stage.folder.iterdir()) == []
    assert f"{name!r} is not carried over" in caplog.text


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "", "nul\0"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with open_stage(tmp_path / "out", DIGEST) as stage:
        with pytest.raises(InputError, match="QC-WRITE-003") as caught:
            write_carried(replace(net(), name="bad model", files={name: b"x"}), stage)
        assert list(stage.folder.iterdir()) == []
    assert "bad model" in caught.value.message
    assert ascii(name) in caught.value.message
