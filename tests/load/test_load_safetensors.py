"""Headers are believed only when every byte is accounted for (faults 1 to 7); data is mapped, not copied."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qconvert.errors import InputError
from qconvert.load.safetensors import SafetensorsSource
from qconvert.storage.safetensors import DTYPES, read_header


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, stop: int, *, dtype: str = "F32", shape: object = None, **extra: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop], **extra}


def rejected(path: Path, code: str) -> str:
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert caught.value.code == code
    assert caught.value.hint
    assert path.name in caught.value.message
    return caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model-00002-of-00003.safetensors"


# Fault 1: header lengths that lie


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1], ids=["over-100-MB", "2^63", "2^64-1"])
def test_a_header_length_over_the_limit_is_refused_without_reading_it(path: Path, length: int) -> None:
    assert str(length) in rejected(write(path, b"{}", length=length), "QC-INPUT-005")


@pytest.mark.parametrize("length", [3, 99_000_000], ids=["one-more", "99-MB-in-a-tiny-file"])
def test_a_header_longer_than_the_file_is_a_truncation(path: Path, length: int) -> None:
    message = rejected(write(path, b"{}", length=length), "QC-INPUT-006")
    assert f"a header of {length} bytes, found 2" in message


# Fault 2


def test_a_git_lfs_pointer_is_named(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n")
    assert "Git LFS pointer" in rejected(path, "QC-INPUT-004")


def test_the_hint_for_a_git_lfs_pointer_says_what_to_run(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        read_header(path)


# Fault 3: files that end too early


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_even_a_length_is_refused(path: Path, size: int) -> None:
    path.write_bytes(b"x" * size)
    message = rejected(path, "QC-INPUT-006")
    assert f"found {size}" in message
    assert ("is empty" in message) == (size == 0)


def test_a_truncated_shard_says_how_much_and_which_tensors_are_missing(path: Path) -> None:
    save_file({"first": torch.zeros(8), "cut": torch.zeros(8), "lost": torch.zeros(8)}, path)
    whole = path.stat().st_size
    places = read_header(path)
    lost = sorted(places, key=lambda name: places[name].start)[1:]
    with path.open("r+b") as file:
        file.truncate(whole - 40)
    message = rejected(path, "QC-INPUT-006")
    assert f"a size of {whole} bytes, found {whole - 40}" in message
    assert all(repr(name) in message for name in lost)
    assert message.count("'") == 4  # and no other


# Fault 4: tensors that contradict their bytes


@pytest.mark.parametrize(
    ("header", "nbytes", "said"),
    [
        pytest.param({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "overlaps 'a'", id="overlap"),
        pytest.param({"a": tensor(0, 8), "b": tensor(12, 20)}, 20, "a hole of 4 bytes after 'a'", id="hole"),
        pytest.param({"a": tensor(4, 8)}, 8, "a hole of 4 bytes after the header", id="hole-at-the-start"),
        pytest.param({"a": tensor(0, 8)}, 11, "3 bytes after the last tensor", id="trailing-bytes"),
        pytest.param({}, 3, "3 bytes after the last tensor", id="bytes-of-no-tensor"),
        pytest.param({"a": tensor(0, 8, shape=[3])}, 8, "F32 [3] takes 12 bytes", id="size-mismatch"),
        pytest.param({"a": tensor(0, 8, shape=[-2])}, 8, "shape [-2]", id="negative-shape"),
        pytest.param({"a": tensor(0, 8, shape=[2.0])}, 8, "shape [2.0]", id="fractional-shape"),
        pytest.param({"a": tensor(0, 8, shape=[True, 2])}, 8, "shape [True, 2]", id="boolean-shape"),
        pytest.param({"a": tensor(0, 8, shape="2")}, 8, "shape '2'", id="shape-is-no-list"),
        pytest.param({"a": tensor(0, 0, shape=[2**62, 4])}, 0, f"takes {2**66} bytes", id="product-overflows-64-bits"),
        pytest.param({"a": tensor(0, 0, shape=[0, 2**64])}, 0, "too large", id="overflow-beside-zero"),
        pytest.param({"a": tensor(8, 0, shape=[2])}, 8, "span -8", id="offsets-backwards"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets None", id="no-offsets"),
        pytest.param(
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8, "data_offsets [0, 8, 8]", id="three-offsets"
        ),
    ],
)
def test_tensors_must_cover_the_data_exactly(path: Path, header: object, nbytes: int, said: str) -> None:
    message = rejected(write(path, header, b"\0" * nbytes), "QC-INPUT-007")
    assert said in message


def test_a_dtype_that_torch_can_not_hold_is_refused_by_name(path: Path) -> None:
    message = rejected(write(path, {"w": tensor(0, 8, dtype="F4")}, b"\0" * 8), "QC-INPUT-008")
    assert "'w'" in message
    assert "'F4'" in message


# Fault 5, and other headers that readers understand differently


@pytest.mark.parametrize(
    ("header", "said"),
    [
        pytest.param(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
            "'w' occurs more than once",
            id="tensor-twice",
        ),
        pytest.param(
            b'{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', "'dtype' occurs", id="field-twice"
        ),
        pytest.param(b"[]", "list, not an object", id="a-list"),
        pytest.param(b'{"w": 1}', "no object for tensor 'w'", id="a-number-for-a-tensor"),
        pytest.param(b"{", "not valid", id="no-json"),
        pytest.param(b'{"\xff": 1}', "not valid", id="no-utf-8"),
        pytest.param(b'{"a":' * 100_000, "nested too deeply", id="deep"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", "not valid", id="long-number"),
    ],
)
def test_an_ambiguous_header_is_refused(path: Path, header: bytes, said: str) -> None:
    assert said in rejected(write(path, header, b"\0" * 4), "QC-INPUT-005")


# Faults 6 and 7: what is odd but allowed


@pytest.mark.parametrize("name", ["", "\0", "../../x", "/etc/passwd", "e\u0301", "\u202e", "\ud800"], ids=ascii)
def test_names_are_opaque(path: Path, name: str) -> None:
    write(path, {name: tensor(0, 8)}, bytes(range(8)))
    source = SafetensorsSource({"shard": path})
    assert list(source.tensors) == [name]
    assert source.read(name).view(torch.uint8).tolist() == list(range(8))


def test_odd_names_are_escaped_in_messages(path: Path) -> None:
    message = rejected(write(path, {"\x1b[31m\0": tensor(0, 8, shape=[3])}, b"\0" * 8), "QC-INPUT-007")
    assert r"'\x1b[31m\x00'" in message
    assert message.isprintable()


def test_names_that_look_the_same_are_kept_apart_and_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, {"\u00e9": tensor(0, 4), "e\u0301": tensor(4, 8)}, bytes(8))
    with caplog.at_level(logging.WARNING, "qconvert"):
        source = SafetensorsSource({"shard": path})
    assert len(source.tensors) == 2
    assert r"'\xe9'" in caplog.text
    assert r"'e\u0301'" in caplog.text


def test_further_fields_and_metadata_are_accepted(path: Path) -> None:
    write(path, {"__metadata__": {"format": "pt"}, "w": tensor(0, 8, strides=[1], comment="x")}, bytes(8))
    assert list(read_header(path)) == ["w"]


# Reading


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_survives(path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(16, dtype=torch.uint8)
    stored = (raw % 2 if dtype is torch.bool else raw).view(dtype)
    save_file({"w": stored}, path)
    read = SafetensorsSource({"shard": path}).read("w")
    assert read.dtype is dtype
    assert torch.equal(read.view(torch.uint8), stored.view(torch.uint8))


def test_scalars_and_empty_tensors(path: Path) -> None:
    save_file({"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4, dtype=torch.bfloat16), "w": torch.ones(2)}, path)
    source = SafetensorsSource({"shard": path})
    assert source.read("scalar").shape == ()
    assert source.read("scalar").item() == 3.5
    assert source.read("empty").shape == (0, 4)
    assert source.read("empty").dtype is torch.bfloat16
    assert source.tensors["empty"].nbytes == 0


def test_a_file_of_empty_tensors_only(path: Path) -> None:
    save_file({"empty": torch.empty(0)}, path)
    assert SafetensorsSource({"shard": path}).read("empty").shape == (0,)


def test_reading_shares_the_mapped_file(path: Path) -> None:
    save_file({"w": torch.arange(4.0)}, path)
    source = SafetensorsSource({"shard": path})
    assert source.read("w").data_ptr() == source.read("w").data_ptr()


def test_writing_to_a_read_tensor_does_not_reach_the_file(path: Path) -> None:
    save_file({"w": torch.arange(4.0)}, path)
    before = path.read_bytes()
    source = SafetensorsSource({"shard": path})
    source.read("w").zero_()
    del source
    assert path.read_bytes() == before


def test_unaligned_data_is_read_right(path: Path) -> None:
    text = json.dumps({"w": tensor(0, 8)}).encode()
    text += b" " * (3 - len(text) % 4)  # so that data begins at an odd place
    write(path, text, torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert read_header(path)["w"].start % 4 != 0
    read = SafetensorsSource({"shard": path}).read("w")
    assert read.tolist() == [1.5, -2.0]
    assert read.data_ptr() % 4 == 0


@pytest.mark.filterwarnings("error")
def test_reading_warns_of_nothing(path: Path) -> None:
    save_file({"w": torch.arange(4.0)}, path)
    assert SafetensorsSource({"shard": path}).read("w").sum() == 6
