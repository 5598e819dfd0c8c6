"""Latency on a machine that other programs use as well: what is said, and that nothing is called slow for it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from calibrate_models import model_of
from torch import nn

from qconvert.ir.report import Latency
from qconvert.ort.session import SessionSettings
from qconvert.verify import cores, latency
from qconvert.verify.cores import CoreTimes
from qconvert.verify.latency import measure_latency

MODEL = model_of(nn.Linear(4, 4), example_inputs={"x": torch.ones(2, 4)}, input_names=("x",))


class Clocks:
    """In place of the module `time`: what passes is what sessions take."""

    def __init__(self) -> None:
        self.passed = self.worked = 0.0

    def perf_counter(self) -> float:
        return self.passed

    def process_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.passed += seconds


class Session:
    """Each run takes its milliseconds on the clock, one after the other, and `worked` of the processor."""

    def __init__(self, clocks: Clocks, passed: list[float], worked: float, settings: SessionSettings) -> None:
        self.clocks, self.passed, self.worked, self.settings = clocks, passed, worked, settings
        self.runs = 0

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, *_: object) -> list[Any]:
        self.clocks.passed += self.passed[self.runs % len(self.passed)] / 1e3
        self.clocks.worked += self.worked * (2 if self.settings.spinning else 1) / 1e3  # a thread that spins works, too
        self.runs += 1
        return []


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    found = Clocks()
    monkeypatch.setattr(latency, "time", found)
    monkeypatch.setattr(latency, "_candidates", lambda target: [SessionSettings(2), SessionSettings(1)])
    return found


def measured(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch, share: float | None, own: list[float], floats: list[float] | None
) -> Latency:
    """Of an artifact that takes a third of float's processor time. own, floats: what runs take on the clock."""
    monkeypatch.setattr(latency, "others_share", lambda before: share)

    def artifact(settings: SessionSettings) -> Session:
        return Session(clocks, own, 2.0, settings)

    def baseline(settings: SessionSettings) -> Session:
        return Session(clocks, floats or [], 6.0, settings)

    return measure_latency(MODEL, artifact, baseline if floats else None, [dict(MODEL.example_inputs)], "cpu")


def test_on_a_machine_that_does_nothing_else_the_clock_decides(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(clocks, monkeypatch, 0.02, [2.0], [5.0])
    assert not found.busy
    assert (found.p50_ms, found.float_p50_ms, found.speedup) == pytest.approx((2.0, 5.0, 2.5))
    assert (found.processor_ms, found.others_share, found.spread) == (None, 0.02, 0.0)
    assert found.trials is not None


def test_on_a_busy_machine_the_processor_time_decides(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact had bad luck: on the clock it took twice as long as float."""
    found = measured(clocks, monkeypatch, 0.6, [30.0], [15.0])
    assert found.busy
    assert (found.p50_ms, found.float_p50_ms) == pytest.approx((30.0, 15.0))
    assert (found.processor_ms, found.float_processor_ms, found.speedup) == pytest.approx((2.0, 6.0, 3.0))
    assert found.trials is None


@pytest.mark.parametrize(("own", "busy"), [([2.0], False), ([2.0, 2.0, 3.0, 9.0], True)])
def test_where_the_system_does_not_tell_repeats_that_differ_do(
    own: list[float], busy: bool, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(clocks, monkeypatch, None, own, [5.0])
    assert found.busy is busy
    assert found.speedup == pytest.approx(3.0 if busy else 2.5)


def test_without_a_float_graph_a_busy_machine_is_still_told(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(clocks, monkeypatch, 0.6, [30.0], None)
    assert found.busy
    assert (found.speedup, found.processor_ms) == (None, None)


# --- whose time it is ---


def test_what_the_cores_did_for_others_is_all_but_the_own_time() -> None:
    before = CoreTimes(passed=100.0, own=10.0, busy=50.0, counted=500.0, cores=2)
    after = CoreTimes(passed=110.0, own=14.0, busy=60.0, counted=520.0, cores=2)
    assert after.others_share_since(before) == pytest.approx((10 - 4) / 20)
    assert CoreTimes(110.0, 20.5, 60.0, 520.0, 2).others_share_since(before) == 0  # ticks are coarse
    assert CoreTimes(110.0, 14.0, 50.0, 501.0, 2).others_share_since(before) is None  # a sandbox that counts nothing


def test_only_the_cores_that_the_process_may_run_on_count(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = {"user": 3.0, "nice": 1.0, "system": 1.0, "idle": 4.0, "iowait": 1.0, "steal": 2.0, "guest": 3.0}
    every = [SimpleNamespace(**linux), SimpleNamespace(user=100.0, system=0.0, idle=0.0)]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: every)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    now = CoreTimes.now()
    assert now is not None
    assert (now.busy, now.counted, now.cores) == (7.0, 12.0, 1)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    now = CoreTimes.now()
    assert now is not None
    assert (now.busy, now.cores) == (107.0, 2)


def test_a_system_that_does_not_tell_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(percpu: bool) -> Any:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", refused)
    assert CoreTimes.now() is None
    assert cores.others_share(None) is None
