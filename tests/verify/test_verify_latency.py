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
from qconvert.ir.timing import Timing
from qconvert.ort.session import SessionSettings
from qconvert.report import wording
from qconvert.verify import cores, latency, repeats
from qconvert.verify.cores import CoreTimes
from qconvert.verify.latency import measure_latency
from qconvert.verify.repeats import FEWEST, is_steady

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

    def run(self, passed: float, worked: float) -> None:
        self.passed += passed
        self.worked += worked


class Slowing(Clocks):
    """From the second second on, runs take four times as long."""

    def run(self, passed: float, worked: float) -> None:
        super().run(passed * (4 if self.passed > 2 else 1), worked)


class Session:
    """Each run takes its milliseconds on the clock, one after the other, and `worked` of the processor."""

    def __init__(self, clocks: Clocks, passed: list[float], worked: float, settings: SessionSettings) -> None:
        self.clocks, self.passed, self.worked, self.settings = clocks, passed, worked, settings
        self.runs = 0

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, *_: object) -> list[Any]:
        spun = 2 if self.settings.spinning else 1  # a thread that spins works, too
        self.clocks.run(self.passed[self.runs % len(self.passed)] / 1e3, spun * self.worked / 1e3)
        self.runs += 1
        return []


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    found = Clocks()
    monkeypatch.setattr(latency, "time", found)
    monkeypatch.setattr(repeats, "time", found)
    candidates = [SessionSettings(2, spinning=True), SessionSettings(1, spinning=True)]
    monkeypatch.setattr(latency, "_candidates", lambda target: candidates)
    return found


def measured(
    clocks: Clocks,
    monkeypatch: pytest.MonkeyPatch,
    share: float | None,
    own: list[float],
    floats: list[float] | None,
    seconds: float = 5.0,
) -> Latency:
    """Of an artifact that takes a third of float's processor time. own, floats: milliseconds that runs take on the clock."""
    monkeypatch.setattr(latency, "others_share", lambda before: share)

    def artifact(settings: SessionSettings) -> Session:
        return Session(clocks, own, 2.0, settings)

    def baseline(settings: SessionSettings) -> Session:
        return Session(clocks, floats or [], 6.0, settings)

    return measure_latency(
        model=MODEL,
        artifact=artifact,
        baseline=baseline if floats else None,
        batches=[dict(MODEL.example_inputs)],
        target="cpu",
        seconds=seconds,
    )


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


# --- how often, and for how long ---


def test_repeats_end_as_soon_as_they_are_steady(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(clocks, monkeypatch, 0.0, [2.0], [5.0], seconds=1000.0)
    assert found.steady
    assert found.repeats == found.float_repeats == 7  # one, and then threes until there are five
    assert (found.p25_ms, found.p75_ms, found.float_p25_ms, found.float_p75_ms) == pytest.approx((2.0, 2.0, 5.0, 5.0))
    assert found.timing_seconds is not None
    assert found.timing_seconds < 2


def test_repeats_that_never_are_steady_end_with_their_budget(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(clocks, monkeypatch, 0.0, [100.0, 700.0, 1100.0], [400.0, 900.0, 300.0], seconds=20.0)
    assert found.steady is False
    assert found.repeats == found.float_repeats
    assert found.timing_seconds is not None
    assert 15 < found.timing_seconds <= 20


def test_each_is_measured_once_whatever_the_budget(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(clocks, monkeypatch, 0.0, [2000.0], [5000.0], seconds=0.001)
    assert (found.repeats, found.float_repeats) == (1, 1)
    assert (found.p50_ms, found.float_p50_ms) == pytest.approx((2000.0, 5000.0))
    assert found.trials is None  # the default settings alone were tried
    assert not found.is_clear
    assert "neither was shown to be faster" in wording.speed(found)


def test_what_a_machine_that_gets_busier_halfway_does_to_one_it_does_to_the_other(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some moment on everything takes four times as long."""

    slowed = Slowing()
    monkeypatch.setattr(latency, "time", slowed)
    monkeypatch.setattr(repeats, "time", slowed)
    found = measured(slowed, monkeypatch, 0.0, [50.0], [100.0], seconds=20.0)
    assert found.speedup == pytest.approx(2.0, rel=0.01)


OVERLAPPING = [([2.0, 3.0, 4.0], [3.0, 4.0, 5.0], False), ([2.0, 2.1, 2.2], [3.0, 3.1, 3.2], True)]


@pytest.mark.parametrize(("own", "floats", "clear"), OVERLAPPING)
def test_what_is_faster_is_only_said_where_spreads_do_not_overlap(
    own: list[float], floats: list[float], clear: bool, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(clocks, monkeypatch, 0.0, own, floats)
    assert found.is_clear is clear
    assert ("overlap" in wording.speed(found)) is not clear
    assert f"half of {found.repeats} runs within" in wording.latency(found)


def timing(*milliseconds: float) -> Timing:
    return Timing.of(milliseconds, milliseconds)


def test_steady_is_what_tells_its_median_well_enough() -> None:
    assert not is_steady(timing(*[10.0] * (FEWEST - 1)))
    assert is_steady(timing(*[10.0] * FEWEST))
    wide = [9.0, 9.5, 10.0, 10.5, 11.0]  # the middle half is 1 wide
    assert not is_steady(timing(*wide))  # 1.57 * 1 / sqrt(5) is 7 % of 10
    assert is_steady(timing(*wide * 13))  # of 65 it is 1.9 %


def test_pieces_add_up() -> None:
    both = timing(1.0, 2.0, 3.0) + timing(10.0, 20.0)
    assert (both.repeats, both.p25, both.p50, both.p75, both.worked) == (2, 14.0, 17.0, 20.0, 17.0)


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
