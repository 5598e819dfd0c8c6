"""Benchmarks print ratios; they need real models, so they run only where these are given:

pytest tests/bench -s --bench-models DIR --bench-data DIR
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is what a first conversion takes."""
    monkeypatch.setenv("QCONVERT_CACHE", "")


@pytest.fixture(scope="session")
def models(request: pytest.FixtureRequest) -> Path:
    """A folder with minilm/, smollm2/, smollm2-offgrid/ and smollm2.gguf."""
    folder = request.config.getoption("--bench-models")
    if folder is None:
        pytest.skip("needs --bench-models DIR")
    return Path(folder)


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    """A folder with calibration.txt and evaluation.txt."""
    folder = request.config.getoption("--bench-data")
    if folder is None:
        pytest.skip("needs --bench-data DIR")
    return Path(folder)
