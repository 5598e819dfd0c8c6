"""Modules as people write them, from a factory to the graph: what their inputs are, and weights that are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qconvert.errors import InputError
from qconvert.ir.report import Report
from qconvert.ort.session import file_session
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

ROWS = 12
DATA = {"samples": 6}


class Step(nn.Module):
    """One step of a diffusion model: all rows share strength and time; the first weight is one of the old weight_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.weight_norm(nn.Linear(16, 32))
        self.second = nn.Linear(32, 4)

    def forward(self, strength: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * strength + time)  # type: ignore[no-any-return]


def step() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    module, inputs = Step(), (torch.tensor(0.5), torch.randn(ROWS, 16), torch.tensor([0.25]))
    module(*inputs)  # which leaves a computed weight behind
    return module, inputs


class BatchFirst(nn.Module):
    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(16, 32, batch_first=self.batch_first), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])  # type: ignore[no-any-return]


class TimeFirst(BatchFirst):
    batch_first = False


def batch_first() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return BatchFirst(), torch.randn(ROWS, 4, 16)


def time_first() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return TimeFirst(), torch.randn(ROWS, 4, 16)


def converted(factory: str, output: Path, **settings: Any) -> Report:
    source = f"module:{__file__}:{factory}"
    given = {"model": source, "output": str(output), "calibration": DATA, "evaluation": DATA, "layout": "onnx"}
    return convert(Recipe.from_settings({**given, **settings}))


def difference(folder: Path, module: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Of the artifact from torch, relative to the largest output."""
    session = file_session(folder / "model.onnx")
    found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
    with torch.no_grad():
        expected = module.eval()(**inputs)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("quantizer", ["per-channel", "awq"])
def test_what_all_rows_share_is_an_input_of_its_own(quantizer: str, tmp_path: Path, quick: None) -> None:
    report = converted("step", tmp_path / "out", quantizer=quantizer, scheme="int8-g16")
    assert report.passed
    assert report.samples.evaluation == 6
    assert [layer.name for layer in report.layers] == ["second"]
    assert {part.name: part.reason for part in report.kept_float} == {"first": "its weight is computed at every call"}
    module, _ = step()
    inputs = {"strength": torch.tensor(2.0), "x": torch.randn(5, 16), "time": torch.tensor([0.75])}
    assert difference(tmp_path / "out", module, inputs) < 0.02


def test_an_lstm_takes_any_number_of_rows(tmp_path: Path, quick: None) -> None:
    assert converted("batch_first", tmp_path / "out", quantizer="per-channel", scheme="int8-channel").passed
    assert difference(tmp_path / "out", batch_first()[0], {"x": torch.randn(7, 4, 16)}) < 0.02


def test_an_lstm_whose_first_axis_is_the_time_is_refused(tmp_path: Path, quick: None) -> None:
    """Its trace holds as many steps as it was made with."""
    with pytest.raises(InputError) as caught:
        converted("time_first", tmp_path / "out", quantizer="per-channel", scheme="int8-channel")
    assert caught.value.code == "QC-EXPORT-001"
    assert "batch_first=True" in caught.value.hint
