"""What several test files share: the options of the benchmarks, and verification without a process of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest

# What takes seconds to import is imported where it is used: the process that hands out the tests needs none of it.
PYTHON = sys.executable
STAND_IN = pytest.StashKey[str]()  # what tests start in its place


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-models", help="folder with minilm/, smollm2/, smollm2-offgrid/ and smollm2.gguf")
    group.addoption("--bench-data", help="folder with calibration.txt and evaluation.txt")
    group.addoption("--bench-peer", help="Python interpreter of an environment with llmcompressor")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none for what was named, which is done before they have started, or is a benchmark."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_configure(config: pytest.Config) -> None:
    """What processes of the session share: what was traced before, and a process that commands are forked off."""
    keep_traces(config)
    if hasattr(config, "workerinput"):
        use_one_core(config.workerinput["workerid"])
        config.stash[STAND_IN] = config.workerinput["stand_in"]
    elif sys.platform == "linux" and not is_benchmark(config):
        folder = tempfile.TemporaryDirectory(prefix="qconvert-")
        config.add_cleanup(folder.cleanup)
        config.stash[STAND_IN] = str(forked.stand_in(Path(folder.name)))
    else:
        config.stash[STAND_IN] = PYTHON


def use_one_core(worker: str) -> None:
    """Each process that runs tests has a core of its own, with all that it starts.

    Threads that wait for others of their process do so in a loop, and take the core from the other one's. worker: "gw0".
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def is_benchmark(config: pytest.Config) -> bool:
    """Whether times are measured: then nothing is spared that users wait for."""
    return config.getoption("--bench-models") is not None


def pytest_collection(session: pytest.Session) -> None:
    hands_out_tests = session.config.pluginmanager.hasplugin("dsession")
    if not hands_out_tests and not is_benchmark(session.config):
        forked.keep_translations()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What xdist tells the processes that it starts."""
    node.workerinput["stand_in"] = node.config.stash[STAND_IN]


def keep_traces(config: pytest.Config) -> None:
    """What tests trace is kept for later tests, in all processes, and not among what the user's own runs keep.

    Where pytest has a cache, it is kept for later runs too."""
    if "QCONVERT_CACHE" in os.environ:  # the processes that xdist starts inherit it
        return
    cache: pytest.Cache | None = getattr(config, "cache", None)
    folder = None if cache else tempfile.TemporaryDirectory(prefix="qconvert-")
    os.environ["QCONVERT_CACHE"] = str(cache.mkdir("qconvert")) if cache else folder.name if folder else ""
    if folder:
        config.add_cleanup(folder.cleanup)


@pytest.fixture(autouse=True)
def python(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts as Python is forked where that comes to the same, in less time."""
    monkeypatch.setattr(sys, "executable", pytestconfig.stash[STAND_IN])


@pytest.fixture
def python_itself(python: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of how processes start, end and watch each other."""
    monkeypatch.setattr(sys, "executable", PYTHON)


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change how models are traced: they find nothing that was traced before, and leave nothing behind."""
    monkeypatch.setenv("QCONVERT_CACHE", "")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification in this process on one thread and a machine that does nothing else, each model traced once.

    The last test of test_pipeline runs everything as it is."""
    from traced import trace_once

    from qconvert.pipeline import conversion, preparation, verification

    monkeypatch.setattr(preparation, "trace", trace_once)
    monkeypatch.setattr(
        conversion,
        "verify_in_fresh_process",
        lambda recipe, folder, _, progress: verification.measure(folder, recipe, progress),
    )
    monkeypatch.setattr("qconvert.verify.repeats.MOST", 2)
    monkeypatch.setattr("qconvert.verify.latency.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("qconvert.verify.latency.others_share", lambda before: 0.0)


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers without bars and warnings."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
