"""What an interrupted run may reuse: what the same run would make again, and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import calibrate_models
import pytest
import torch
from tiny_models import tiny_llama
from writing import DIGEST

from qconvert.ir.artifact import MANIFEST, WEIGHTS
from qconvert.ir.layer import Block
from qconvert.pipeline import conversion, verification
from qconvert.recipe import Recipe
from qconvert.storage.stage import open_stage
from qconvert.write.origin import Origin

TEXT = "".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60))
NET = """
import torch
from torch import nn
from helper import activation

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)
        self.register_buffer("shift", torch.full((64,), 0.5), persistent=False)

    def forward(self, x):
        return self.second(activation(self.first(x + self.shift)))

def factory():
    torch.manual_seed(0)
    net = Net()
    return net, torch.randn(64, 64)
"""
HELPER = "import torch\n\ndef activation(x):\n    return torch.relu(x)\n"
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from qconvert import hookimpl
from qconvert.plugin.observer import AbsMax
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.ir.scheme import QuantScheme

@hookimpl
def register_quantizers():
    return [Nearest]

@dataclass(frozen=True)
class Nearest(Quantizer):
    name: ClassVar[str] = "nearest"
    default_scheme: ClassVar[QuantScheme] = QuantScheme.parse("int8")
    observers: ClassVar = (AbsMax,)
    table: Path = Path("table.txt")

    def quantize(self, layer, scheme):
        return round_to_nearest(layer.weight, scheme)
"""


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that the runs of a test quantize. The first run is interrupted when it has written one."""
    units: list[str] = []
    real = conversion.Conversion.take

    def watched(self: conversion.Conversion, block: Block) -> None:
        first_run = not units
        units.append(block.name)
        real(self, block)
        if first_run:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion.Conversion, "take", watched)
    return units


def interrupt(recipe: Recipe) -> None:
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(recipe)


def test_a_block_is_written_and_counted_before_the_next_one_is_read(tmp_path: Path) -> None:
    model = calibrate_models.llama()[1]
    job = calibrate_models.job_of(model, calibrate_models.plan_of(model))
    events: list[Any] = []

    class Log:
        def stage(self, name: str, total: int | None) -> None:
            events.append((name, total))

        def advance(self, n: int = 1) -> None:
            events.append((n, stage.done_blocks(), any(".2.self_attn.q" in name for name in model.source.reads)))  # type: ignore[attr-defined]

    with (
        open_stage(tmp_path / "out", DIGEST) as stage,
        closing(conversion.Conversion(job, Origin({}, {}, {}), stage)) as taking,
    ):
        conversion.quantize_blocks([taking], Log())
    first, second, third = model.blocks
    assert events == [
        ("quantize", 3),
        (1, (first,), False),
        (1, (first, second), False),
        (1, (first, second, third), True),
        (1, (first, second, third, ""), True),
    ]


# --- a factory's module, a plugin's quantizer ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, content in {"net.py": NET, "helper.py": HELPER, "plugin.py": PLUGIN, "table.txt": "1 2 3"}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second would not be noticed
    yield tmp_path
    sys.modules.pop("helper", None)


def of_module(folder: Path) -> Recipe:
    return Recipe.from_settings(
        {
            "model": f"module:{folder / 'net.py'}:factory",
            "output": str(folder / "out"),
            "quantizer": "nearest",
            "plugins": [str(folder / "plugin.py")],
            "options": {"table": str(folder / "table.txt")},
            "verify": False,
        }
    )


def edited(name: str, old: str, new: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def edit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))
        sys.modules.pop("helper", None)

    return edit


def threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)


def python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.99.1")


def setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")


CHANGES = {
    "nothing": lambda folder, monkeypatch: None,
    "code that the factory imports": edited("helper.py", "torch.relu(x)", "torch.tanh(x)"),
    "a buffer that is not stored": edited("net.py", "0.5", "0.25"),
    "the example inputs": edited("net.py", "torch.randn(64, 64)", "torch.randn(64, 64) * 2"),
    "the plugin": edited("plugin.py", "AbsMax,)", "AbsMax, )"),
    "a file that an option names": edited("table.txt", "3", "4"),
    "the number of threads": threads,
    "the version of Python": python,
    "a setting of a library": setting,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_quantized_before_a_change_is_not_resumed(
    change: str, folder: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(of_module(folder))
    assert quantized == [""]
    CHANGES[change](folder, monkeypatch)
    conversion.convert(of_module(folder))
    assert quantized == ([""] if change == "nothing" else ["", ""])


def test_the_manifest_names_all_of_it(folder: Path) -> None:
    conversion.convert(of_module(folder))
    manifest = json.loads((folder / "out" / MANIFEST).read_text())
    assert sorted(manifest["inputs"]) == [
        *("code:plugin.py", "graph:model", "net.py", "option:table", "samples:calibration", "state_dict")
    ]
    assert manifest["inputs"]["option:table"] == sha256(b"1 2 3").hexdigest()
    assert str(folder) not in json.dumps(manifest)


# --- data ---


def of_llama(folder: Path, output: str, **settings: Any) -> Recipe:
    return Recipe.from_settings(
        {
            "model": str(folder / "llama"),
            "output": str(folder / output),
            "quantizer": "awq",
            "calibration": {"source": str(folder / "text.txt"), "samples": 4, "length": 32},
            "evaluation": {"source": str(folder / "judge.txt"), "samples": 4, "length": 32},
            "verify": False,
            **settings,
        }
    )


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "judge.txt").write_text(TEXT.replace("Sentence", "Phrase"))
    return tmp_path


def tensors(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("quick")
def test_data_that_was_edited_meanwhile_gives_the_bytes_of_a_clean_run(llama: Path, quantized: list[str]) -> None:
    interrupt(of_llama(llama, "out"))
    (llama / "text.txt").write_text(TEXT.replace("words", "lines"))
    conversion.convert(of_llama(llama, "out"))
    conversion.convert(of_llama(llama, "clean"))
    assert tensors(llama / "out") == tensors(llama / "clean")
    inputs = json.loads((llama / "out" / MANIFEST).read_text())["inputs"]
    assert inputs["calibration:text.txt"] == sha256((llama / "text.txt").read_bytes()).hexdigest()
    assert inputs["evaluation:judge.txt"] == sha256((llama / "judge.txt").read_bytes()).hexdigest()
    (llama / "text.txt").write_text(TEXT)
    conversion.convert(of_llama(llama, "before"))
    assert tensors(llama / "before") != tensors(llama / "clean")


@pytest.mark.usefixtures("quick")
def test_so_does_the_text_that_comes_with_python(llama: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"calibration": {"source": "builtin", "samples": 4, "length": 32}}
    interrupt(of_llama(llama, "out", **settings))
    monkeypatch.setattr("pydoc_data.topics.topics", {"other": "\n\n".join(TEXT.splitlines())})
    conversion.convert(of_llama(llama, "out", **settings))
    assert quantized == ["model.layers.0", "model.layers.0", "model.layers.1"]


@pytest.mark.usefixtures("quick")
def test_other_evaluation_data_quantizes_nothing_again(llama: Path, quantized: list[str]) -> None:
    interrupt(of_llama(llama, "out"))
    (llama / "judge.txt").write_text(TEXT.replace("Sentence", "Clause"))
    conversion.convert(of_llama(llama, "out"))
    assert quantized == ["model.layers.0", "model.layers.1"]


@pytest.mark.usefixtures("quick")
def test_data_that_no_quantizer_needs_is_no_input(llama: Path) -> None:
    conversion.convert(of_llama(llama, "out", quantizer="per-channel"))
    inputs = json.loads((llama / "out" / MANIFEST).read_text())["inputs"]
    assert [name for name in inputs if ":" in name] == ["code:qconvert"]


@pytest.mark.usefixtures("quick")
def test_an_artifact_is_verified_whatever_has_become_of_its_data_and_code(llama: Path) -> None:
    conversion.convert(of_llama(llama, "out"))
    (llama / "text.txt").write_text(TEXT.replace("words", "lines"))
    assert verification.verify(llama / "out").passed
