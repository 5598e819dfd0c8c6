"""Settings that belong to the whole process: foreign code leaves them as it found them, or they are put back."""

from __future__ import annotations

import builtins
import gc
import locale
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECURSION = 1000  # Python's own limit, with which qconvert is tested; a higher one may be what a deep model needs
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGTSTP", "SIGTTOU", "SIGUSR1", "SIGUSR2")
OURS = "qconvert"  # the logger whose warnings a user sees


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the process that foreign code may change. name: for the warning. put_back: takes what `read` gave."""

    name: str
    read: Callable[[], Any]
    put_back: Callable[[Any], object]


@contextmanager
def settings_kept() -> Iterator[list[str]]:
    """Put back what foreign code changes within the context; the names of what was changed are in the list afterwards."""
    before = [(setting, setting.read()) for setting in settings()]
    had_torch = "torch" in sys.modules
    changed: list[str] = []
    try:
        yield changed
    finally:
        if not had_torch and "torch" in sys.modules:
            before += _torch_as_imported()
        changed += [setting.name for setting, value in before if _has_put_back(setting, value)]


def _has_put_back(setting: Setting, before: Any) -> bool:
    now = setting.read()
    if isinstance(before, dict):  # what has been added is not the process's
        now = {key: now.get(key) for key in before}
    if now == before:
        return False
    setting.put_back(before)
    return True


def settings() -> tuple[Setting, ...]:
    """Return the settings of Python, and of torch and numpy once torch is imported."""
    return (*_PYTHON, *_torch()) if "torch" in sys.modules else _PYTHON


def _torch() -> Iterator[Setting]:
    import numpy as np
    import torch

    yield Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield Setting("torch's default device", _default_device, torch.set_default_device)
    yield Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads)
    yield Setting("torch's recording of gradients", torch.is_grad_enabled, torch.set_grad_enabled)
    yield Setting("torch's determinism", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
    yield Setting("torch's precision of products", _precision, _set_precision)
    yield Setting("numpy's handling of errors", np.geterr, lambda before: np.seterr(**before))


def _torch_as_imported() -> list[tuple[Setting, Any]]:
    """Return the settings of torch and numpy that every import sets alike, for code that imports torch itself."""
    import torch

    values = {
        "torch's default dtype": torch.float32,
        "torch's default device": None,
        "torch's recording of gradients": True,
        "torch's determinism": 0,
        "torch's precision of products": ("highest", "none", "none"),
    }
    return [(setting, values[setting.name]) for setting in _torch() if setting.name in values]


def _default_device() -> object:
    """None for the CPU: set explicitly, it would be a mode that every function of torch goes through."""
    import torch

    device = torch.get_default_device()
    return None if device == torch.device("cpu") else device


def _precision() -> tuple[str | None, str, str]:
    """Return the precision of all products, of those on the CPU, and on CUDA.

    The first is None where one of the others was set by itself: torch does not tell it then.
    """
    import torch

    every = None
    with suppress(RuntimeError):
        every = torch.get_float32_matmul_precision()
    return every, torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]


def _set_precision(before: tuple[str | None, str, str]) -> None:
    import torch

    every, cpu, cuda = before
    if every is not None:
        torch.set_float32_matmul_precision(every)
    torch.backends.mkldnn.matmul.fp32_precision = cpu  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = cuda


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _folder() -> str | None:
    with suppress(OSError):  # it was removed
        return str(Path.cwd())
    return None


def _affinity() -> set[int] | None:
    return os.sched_getaffinity(0) if sys.platform == "linux" else None


def _set_affinity(before: set[int]) -> None:
    if sys.platform == "linux":
        os.sched_setaffinity(0, before)


def _signals() -> dict[str, Any]:
    """Return what happens at each signal by name, and whether SIGALRM is under way."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)}
    return {**handlers, "": hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0}


def _set_signals(before: dict[str, Any]) -> None:
    if not before[""] and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    for name, handler in before.items():
        if name and handler is not None:  # None: not set by Python
            signal.signal(getattr(signal, name), handler)


def _streams() -> dict[str, tuple[Any, int | None]]:
    """sys.stdin and so on, each with the file that it is open on."""
    found = {}
    for name in ("stdin", "stdout", "stderr"):
        number, stream = None, getattr(sys, name)
        with suppress(AttributeError, ValueError, OSError):  # None, closed, or on no file
            number = stream.fileno()
        found[name] = stream, number
    return found


def _set_streams(before: dict[str, tuple[Any, int | None]]) -> None:
    for name, (stream, number) in before.items():
        if number is not None and stream.closed:
            mode = "r" if name == "stdin" else "w"
            stream = open(number, mode, buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _errors() -> list[Any]:
    """The filters that make errors of warnings; others, which libraries bring, do no harm."""
    return [each for each in warnings.filters if each[0] == "error"]


def _set_errors(before: list[Any]) -> None:
    warnings.filters[:] = [each for each in warnings.filters if each[0] != "error" or each in before]  # type: ignore[index]


def _logging() -> dict[str, Any]:
    """Return what decides whether a warning of qconvert's is shown: of the root, and of its own loggers by name."""
    ours = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == OURS]
    loggers = (logging.root, *map(logging.getLogger, ours))
    found = {each.name: (each.level, each.disabled, each.propagate, list(each.handlers)) for each in loggers}
    return {**found, "": logging.root.manager.disable}


def _set_logging(before: dict[str, Any]) -> None:
    logging.disable(before[""])
    for name in filter(None, before):
        each = logging.getLogger(name)
        level, each.disabled, each.propagate, each.handlers[:] = before[name]
        each.setLevel(level)


_PYTHON = (  # the recursion limit first: what puts back the others calls functions
    Setting("the recursion limit", lambda: min(sys.getrecursionlimit(), RECURSION), sys.setrecursionlimit),
    Setting("the umask", _umask, os.umask),
    Setting("the current folder", _folder, os.chdir),
    Setting("signal handlers", _signals, _set_signals),
    Setting("sys.stdin, stdout or stderr", _streams, _set_streams),
    Setting("builtins", builtins.__dict__.copy, builtins.__dict__.update),
    Setting("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda before: locale.setlocale(locale.LC_ALL, before)),
    Setting("garbage collection", gc.isenabled, lambda before: gc.enable() if before else gc.disable()),
    Setting("warnings that are errors", _errors, _set_errors),
    Setting("logging", _logging, _set_logging),
    Setting("the processors it runs on", _affinity, _set_affinity),
)
