"""What belongs to the whole process is after a plugin's call what it was before."""

from __future__ import annotations

import builtins
import gc
import io
import locale
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from qconvert.calibrate.bfloat16_matmul import coarse_products
from qconvert.plugin.host import calls, process_settings
from qconvert.plugin.host.calls import calling
from qconvert.plugin.host.distribution import Distribution, builtin

RUDE = Distribution("qconvert-rude", "0.3")
OTHER_LOCALE = "C.UTF-8" if locale.setlocale(locale.LC_CTYPE) == "C" else "C"
# Setting -> what a plugin does to it.
FAULTS: dict[str, list[Callable[[], object]]] = {
    "the recursion limit": [lambda: sys.setrecursionlimit(400)],
    "the umask": [lambda: os.umask(0o777)],
    "the current folder": [lambda: os.chdir("/")],
    "signal handlers": [
        lambda: signal.signal(signal.SIGINT, print),  # what runs in the background ignores it already
        lambda: (signal.signal(signal.SIGALRM, signal.default_int_handler), signal.alarm(1000)),
    ],
    "sys.stdin, stdout or stderr": [lambda: setattr(sys, "stdout", io.StringIO()), lambda: setattr(sys, "stderr", None)],
    "builtins": [lambda: setattr(builtins, "sorted", list), lambda: delattr(builtins, "license")],
    "the locale": [lambda: locale.setlocale(locale.LC_CTYPE, OTHER_LOCALE)],
    "garbage collection": [gc.disable],
    "warnings that are errors": [lambda: warnings.simplefilter("error")],
    "logging": [
        logging.disable,
        lambda: logging.root.handlers.clear(),
        lambda: setattr(logging.getLogger("qconvert"), "propagate", False),
        lambda: setattr(logging.getLogger("qconvert.plugin.host.calls"), "disabled", True),  # logging.config does so
    ],
    "the processors it runs on": [lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})],
    "torch's default dtype": [lambda: torch.set_default_dtype(torch.float64)],
    "torch's default device": [lambda: torch.set_default_device("meta")],
    "torch's number of threads": [lambda: torch.set_num_threads(torch.get_num_threads() + 1)],
    "torch's recording of gradients": [lambda: torch.set_grad_enabled(not torch.is_grad_enabled())],
    "torch's determinism": [lambda: torch.use_deterministic_algorithms(True)],
    "torch's precision of products": [
        lambda: torch.set_float32_matmul_precision("medium"),
        # by which the one above can't be read
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    ],
    "numpy's handling of errors": [lambda: np.seterr(all="raise")],
}


@pytest.fixture
def kept() -> Iterator[dict[str, object]]:
    """The settings; also where a test fails, the next ones find them."""
    before = [(each, each.read()) for each in process_settings.settings()]
    yield {each.name: value for each, value in before}
    for each, value in before:
        if each.read() != value:
            each.put_back(value)
    calls._said.clear()


def read() -> dict[str, object]:
    return {each.name: each.read() for each in process_settings.settings()}


def test_every_setting_has_a_fault() -> None:
    assert list(read()) == list(FAULTS)


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_a_setting_is_put_back_and_the_plugin_named(
    kept: dict[str, object], caplog: pytest.LogCaptureFixture, name: str, fault: Callable[[], object]
) -> None:
    if name == "the processors it runs on" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is one processor")
    for _ in range(2):
        with calling(RUDE, "quantize"):
            fault()
            assert read()[name] != kept[name]
        assert read() == kept
    (warning,) = caplog.messages  # once
    assert warning == f"plugin qconvert-rude 0.3 changed what belongs to the whole process, and is put back: {name}"


def test_they_are_put_back_where_a_call_raises(kept: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), calling(RUDE, "quantize"):
        1 / (os.umask(0o777) * 0)
    assert read() == kept
    assert caplog.messages == ["plugin qconvert-rude 0.3 changed what belongs to the whole process, and is put back: the umask"]


def test_calls_within_products_of_another_precision(kept: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    with coarse_products(), calling(RUDE, "observe"):
        pass
    assert not caplog.messages


def test_what_does_no_harm_is_left_alone(kept: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    limit = sys.getrecursionlimit()
    try:
        with calling(RUDE, "import"):
            sys.setrecursionlimit(limit + 1)
            vars(builtins)["_"] = str  # as gettext does
            warnings.filterwarnings("ignore", module="theirs")
            logging.getLogger("qconvert.rude")
        assert sys.getrecursionlimit() == limit + 1
        assert not caplog.messages
    finally:
        sys.setrecursionlimit(limit)
        del vars(builtins)["_"]


def test_a_closed_stream_is_open_again(
    kept: dict[str, object], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))  # noqa: SIM115 - as Python opens it
    with calling(RUDE, "quantize"):
        sys.stderr.close()
    print("still there", file=sys.stderr)
    assert "still there" in capfd.readouterr().err


def test_qconverts_own_calls_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "settings_kept", pytest.fail)
    with calling(builtin(), "quantize"):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_what_a_call_raises_comes_as_it_was(error: type[BaseException]) -> None:
    with pytest.raises(error), calling(RUDE, "quantize"):
        raise error


def test_a_panic_is_an_exception() -> None:
    class PanicException(BaseException):
        """As PyO3 has it."""

    with pytest.raises(RuntimeError, match=r"^PanicException: index out of bounds$"), calling(RUDE, "quantize"):
        raise PanicException("index out of bounds")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # this process has threads
def test_a_fork_does_not_come_back_from_a_call() -> None:
    with calling(RUDE, "quantize"):
        child = os.fork()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
