"""The memory that an artifact takes when it is loaded, as the report says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from qconvert.ort import footprint as footprints
from qconvert.ort.footprint import footprint
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

linux_only = pytest.mark.skipif(not footprints.STATUS.exists(), reason="only Linux tells what a process takes")


@linux_only
def test_the_report_says_what_a_process_takes_that_has_loaded_the_graph(tmp_path: Path) -> None:
    output = tmp_path / "output"
    convert(Recipe(model=str(tiny_llama(tmp_path / "source")), output=output, quantizer="absmax", scheme="int4-g32"))
    (latency,) = json.loads((output / "report.json").read_text())["latency"]
    # The libraries alone are some tens of megabytes, torch would be hundreds.
    assert 10e6 < latency["loaded_bytes"] <= latency["loading_bytes"] < 200e6
    assert "of memory when loaded, " in (output / "README.md").read_text()


@linux_only
def test_what_does_not_load_has_no_footprint(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    assert footprint([tmp_path / "model.onnx"]) is None


def test_a_system_that_does_not_tell_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "STATUS", tmp_path / "missing")
    assert footprint([]) is None
