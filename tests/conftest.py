from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-models", help="folder with minilm/, smollm2/, smollm2-offgrid/ and smollm2.gguf")
    group.addoption("--bench-data", help="folder with calibration.txt and evaluation.txt")
