"""The memory that there is, read off files as Linux has them on a machine and in containers of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.supervision.memory import Limit, memory_left, oom_kills

MACHINE = "MemTotal: 24000 kB\nMemAvailable:    8000 kB\nSwapFree: 1000 kB\nHugePages_Total:       0\n"
GROUPS = "12:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/user.slice/run.scope\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", MACHINE)
    write(tmp_path, "proc/self/cgroup", GROUPS)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def second(root: Path, folder: str, limit: str, used: int, cached: int = 0) -> None:
    """A control group of version 2."""
    write(root, f"{folder}/memory.max", f"{limit}\n")
    write(root, f"{folder}/memory.current", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"anon {used - cached}\nactive_file 0\ninactive_file {cached}\n")


def first(root: Path, folder: str, limit: int, used: int) -> None:
    """A control group of version 1."""
    write(root, f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    write(root, f"{folder}/memory.usage_in_bytes", f"{used}\n")
    write(root, f"{folder}/memory.stat", "total_active_file 5\ntotal_inactive_file 10\n")


def test_without_control_groups_it_is_the_machines(root: Path) -> None:
    assert memory_left(root) == Limit(9000 * 1024, "this machine")
    (root / "proc/self/cgroup").unlink()
    assert memory_left(root) == Limit(9000 * 1024, "this machine")


def test_a_group_that_has_less_than_the_machine_counts_whichever_of_those_around_the_process_it_is(root: Path) -> None:
    second(root, "sys/fs/cgroup/user.slice/run.scope", "max", 100)
    second(root, "sys/fs/cgroup/user.slice", "5000", 4000, cached=1500)
    second(root, "sys/fs/cgroup", "6000", 1000)
    owner = f"the control group of {root}/sys/fs/cgroup/user.slice/memory.max"
    assert memory_left(root) == Limit(2500, owner)


def test_a_group_that_has_taken_more_than_it_may_has_nothing_left(root: Path) -> None:
    second(root, "sys/fs/cgroup/user.slice", "5000", 7000)
    left = memory_left(root)
    assert left is not None
    assert left.free == 0


def test_groups_of_the_first_version_count_and_its_number_for_no_limit_is_none(root: Path) -> None:
    first(root, "sys/fs/cgroup/memory/docker/abc", 9223372036854771712, 100)
    assert memory_left(root) == Limit(9000 * 1024, "this machine")
    first(root, "sys/fs/cgroup/memory", 4000, 1000)  # the container's own, as it sees it
    assert memory_left(root) == Limit(3015, f"the control group of {root}/sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_a_system_that_tells_nothing_has_no_limit_that_is_known(tmp_path: Path) -> None:
    assert memory_left(tmp_path) is None
    assert oom_kills(tmp_path) == 0


def test_processes_that_were_killed_are_counted(root: Path) -> None:
    write(root, "proc/vmstat", "nr_free_pages 17\noom_kill 3\n")
    assert oom_kills(root) == 3
