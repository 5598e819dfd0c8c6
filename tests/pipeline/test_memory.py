"""Where memory runs out: told as that with the stage, whoever it was that asked for it, and nothing of the work is lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_models import tiny_llama

from qconvert.cli import main
from qconvert.ir.artifact import CARD, MANIFEST, REPORT, WEIGHTS
from qconvert.pipeline.room import SURE_SHARE
from qconvert.supervision import memory

# Memory runs out in it where the file beside it says.
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qconvert.plugin import AbsMax, BlockTuner, Observer, QuantScheme, Quantizer, hookimpl, round_to_nearest

SHORT = Path(__file__).with_name("short.txt")

def take(place):
    if SHORT.exists() and SHORT.read_text() == place:
        raise MemoryError

@hookimpl
def load_model(source):
    take("load_model")

@hookimpl
def find_data(source):
    take("find_data")

@hookimpl
def register_quantizers():
    return [Nearest]

@hookimpl
def register_tuners():
    return [Idle]

class Watching(AbsMax):
    name = "watching"

    def update(self, rows, importance):
        take("update")
        super().update(rows, importance)

    def merge(self, other):
        take("merge")
        super().merge(other)

    def finalize(self):
        take("finalize")
        return super().finalize()

@dataclass(frozen=True)
class Nearest(Quantizer):
    name: ClassVar[str] = "nearest"
    default_scheme: ClassVar[QuantScheme] = QuantScheme.parse("int8-channel")
    observers: ClassVar = (Watching,)

    def prepare(self, group, schemes):
        take(f"prepare {group.layers[0].name}")
        return group

    def quantize(self, layer, scheme):
        take(f"quantize {layer.name}")
        return round_to_nearest(layer.weight, scheme)

@dataclass(frozen=True)
class Idle(BlockTuner):
    name: ClassVar[str] = "idle"

    def tune(self, layers, tensors, samples, fixed):
        take("tune")
        return tensors
"""
PLACES = {
    "load_model": "load",
    "update": "quantize",
    "merge": "quantize",
    "finalize": "quantize",
    "prepare model.layers.1.self_attn.q_proj": "quantize",
    "quantize model.layers.1.mlp.down_proj": "quantize",
    "tune": "quantize",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    tiny_llama(root / "llama")
    (root / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    (root / "nearest.py").write_text(PLUGIN)
    settings = {
        "model": str(root / "llama"),
        "plugins": [str(root / "nearest.py")],
        "quantizer": "nearest",
        "tuning": {"tuner": "idle"},
        "calibration": {"source": str(root / "text.txt"), "samples": 4, "length": 32},
        "evaluation": {"source": str(root / "text.txt"), "samples": 4, "length": 32},
    }
    (root / "recipe.yaml").write_text(json.dumps(settings))
    return root


def arguments(folder: Path, output: Path) -> list[str]:
    return ["run", str(folder / "recipe.yaml"), "--output", str(output), "--json"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those that hold timings, or where it lies."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (REPORT, CARD, MANIFEST)}


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, bytes]:
    done = CliRunner().invoke(main, [*arguments(folder, folder / "whole"), "--no-verify"])
    assert done.exit_code == 0, done.stderr
    return contents(folder / "whole")


@pytest.mark.parametrize("place", PLACES)
def test_a_plugin_that_gets_no_memory_is_named_with_the_stage_and_the_run_resumes(
    place: str, folder: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    command = [*arguments(folder, tmp_path / "out"), "--no-verify"]
    (folder / "short.txt").write_text(place)
    failed = CliRunner().invoke(main, command)
    (folder / "short.txt").unlink()
    assert failed.exit_code == 6, failed.stderr
    error = json.loads(failed.stdout)["error"]
    assert error["code"] == "QC-MEMORY-001"
    assert error["message"].startswith(f"not enough memory in the stage {PLACES[place]!r}: ")
    assert "nearest" in error["message"]
    assert not (tmp_path / "out").exists()
    resumes = "layers.1" in place
    assert any(path.is_dir() for path in tmp_path.iterdir()) == resumes  # the stage with the first block
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    assert contents(tmp_path / "out") == uninterrupted


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process maps")
@pytest.mark.parametrize("megabytes", [100, 500, 1000, 1300])
def test_under_a_limit_of_the_shell_a_run_fails_with_6_or_not_at_all(
    megabytes: int, folder: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "qconvert", *arguments(folder, tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, preexec_fn=limit, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 6), done.stderr
    if done.returncode == 6:
        assert json.loads(done.stdout)["error"]["code"].startswith(("QC-MEMORY-", "QC-VERIFY-002"))
        assert not (tmp_path / "out").exists()
        again = CliRunner().invoke(main, [*command[3:], "--no-verify"])
        assert again.exit_code == 0, again.stderr
    assert contents(tmp_path / "out")[WEIGHTS] == uninterrupted[WEIGHTS]


@pytest.mark.parametrize("stage", ["trace", "quantize", "verify"])
def test_what_will_not_fit_is_told_before_anything_is_written(
    stage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(folder, tmp_path / "out")
    planned = CliRunner().invoke(main, ["plan", *command[1:]])
    peaks = json.loads(planned.stdout)["peaks"]
    assert list(peaks) == ["trace", "quantize", "verify"]
    container = memory.Limit(int(SURE_SHARE * peaks[stage]) - 1, "the control group of /sys/fs/cgroup/memory.max")
    monkeypatch.setattr(memory, "memory_left", lambda root: container)
    monkeypatch.setattr(memory, "_held_and_mapped", lambda root: (0, 0))
    failed = CliRunner().invoke(main, command)
    assert failed.exit_code == 6
    error = json.loads(failed.stdout)["error"]
    assert error["code"] == "QC-MEMORY-003"
    assert error["message"].startswith("the stage '")
    assert error["message"].endswith(", by the limit of the control group of /sys/fs/cgroup/memory.max")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_mapped_count_where_mappings_are_limited(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "mapping_limit", lambda: memory.LIBRARIES_BYTES)
    monkeypatch.setattr(memory, "_held_and_mapped", lambda root: (0, memory.LIBRARIES_BYTES))
    failed = CliRunner().invoke(main, arguments(folder, tmp_path / "out"))
    assert failed.exit_code == 6
    message = json.loads(failed.stdout)["error"]["message"]
    assert "and there are 0 B, by the limit of ulimit -v or -d, beside " in message
    assert list(tmp_path.iterdir()) == []
