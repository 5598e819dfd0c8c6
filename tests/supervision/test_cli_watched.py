"""What becomes of a command whose process ends in one way or another; scripts stand in for that process."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qconvert.errors import PluginError, QConvertError, ResourceError
from qconvert.supervision import memory, parent

ROOT = Path(parent.__file__).parents[2]
BEGIN = f"""#!{sys.executable} -S
import json, os, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from qconvert.supervision import child
child.EXIT_SECONDS = 0.3
child.become_watched()
def call(verb, seconds=100):
    child.tell_call({{"plugin": "qconvert-rude", "version": "0.3", "call": verb, "seconds": seconds}}, seconds)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a script in the place of the command's process, and runs the command."""

    def run(script: str) -> int:
        path = tmp_path / "process"
        path.write_text(BEGIN + script)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return parent.run([])

    return run


@pytest.mark.parametrize(
    "end",
    ["", "os._exit(0)", "os._exit(9)", "os.abort()", "os.closerange(3, 256); os.write(3, b'{')"],
    ids=["ends", "exits", "exits with another code", "crashes", "writes to closed files"],
)
def test_the_exit_code_is_what_the_command_gave(command: Any, end: str) -> None:
    assert command(f"child.tell_done(3)\ntry:\n    {end or 'pass'}\nexcept OSError: pass") == 3


def test_a_thread_that_is_left_is_named_and_not_waited_for(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    thread = "threading.Thread(target=time.sleep, args=(1000,), name='poll')"
    begin = f"thread = {thread}\nthread.start()\nchild.left_running[thread] = 'plugin qconvert-rude 0.3'\n"
    assert command(f"{begin}child.tell_done(0)") == 0
    said = "thread 'poll' of plugin qconvert-rude 0.3 ran on for 10 seconds after the command was done, and was ended"
    assert capsys.readouterr().err == f"warning: {said}\n"


def test_neither_is_an_exit_handler(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("import atexit; atexit.register(time.sleep, 1000); child.tell_done(1)") == 1
    assert capsys.readouterr().err.startswith("warning: an exit handler of a plugin or a library ran on for ")


def test_a_process_that_is_left_ends_with_the_command(command: Any, tmp_path: Path) -> None:
    start = "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])"
    assert command(f"{start}\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(left.pid))\nchild.tell_done(0)") == 0
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 10
    while (runs := state.exists() and ") Z " not in state.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs


def test_a_process_that_ends_before_the_command_is_done_is_no_success(command: Any) -> None:
    with pytest.raises(QConvertError, match="the command's process exited with code 0\n") as caught:
        command("os._exit(0)")
    assert caught.value.code == "QC-INTERNAL-002"


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("call('quantize x'); os._exit(0)", "QC-PLUGIN-010", "exited with code 0: quantize x"),
        ("call('quantize x'); os.kill(os.getpid(), 11)", "QC-PLUGIN-010", "crashed with SIGSEGV: quantize x"),
        ("call('quantize x', 0.3); time.sleep(1000)", "QC-PLUGIN-011", "was ended after 0.3 seconds: quantize x"),
        ("call('quantize x'); child.tell_done(6)", "QC-PLUGIN-010", "exited with code 0: quantize x"),  # in the verification
        (
            "call('set up x'); child.tell_call(None); call('x' * 4000); os._exit(3)",
            "QC-PLUGIN-010",
            "exited with code 3: xxx",
        ),
    ],
)
def test_a_plugin_that_a_process_ends_in_is_named(command: Any, script: str, code: str, said: str) -> None:
    with pytest.raises(PluginError) as caught:
        command(script)
    assert caught.value.code == code
    assert caught.value.message.startswith(f"plugin qconvert-rude 0.3 {said}")


@pytest.mark.parametrize("call", ["", "call('quantize x'); "], ids=["no call", "a plugin's call"])
def test_what_the_kernel_kills_for_lack_of_memory_lacked_memory(
    call: str, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "oom_kills", iter((3, 4)).__next__)
    with pytest.raises(ResourceError, match="for lack of memory") as caught:
        command(f"{call}os.kill(os.getpid(), signal.SIGKILL)")
    assert caught.value.code == "QC-MEMORY-002"
    assert ("quantize x of plugin qconvert-rude" in caught.value.message) == bool(call)


def test_a_process_that_may_not_map_the_libraries_is_not_even_started(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "mapping_limit", lambda: 1000)
    with pytest.raises(ResourceError, match="may map 1000 bytes") as caught:
        command("sys.exit(3)")
    assert caught.value.code == "QC-MEMORY-003"


def test_a_crash_where_little_may_be_mapped_is_most_often_a_lack_of_memory(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "mapping_limit", lambda: 2_000_000_000)
    with pytest.raises(ResourceError, match="crashed with SIGABRT, most often for lack of memory: ulimit") as caught:
        command("os.abort()")
    assert caught.value.code == "QC-MEMORY-002"


def test_a_plugin_that_dies_when_it_is_imported_is_set_aside_once(command: Any, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'starts')!r}, 'a').write(os.environ['QCONVERT_SET_ASIDE'] + '\\n')\n"
    with pytest.raises(PluginError, match="exited with code 0: import rude"):
        command(f"{count}call('import rude'); os._exit(0)")  # it is imported again, though it was set aside
    starts = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert starts == [[], [["qconvert-rude", "0.3", "rude", "its import exited with code 0"]]]


def test_what_a_watched_process_starts_is_not_watched_with_it(command: Any) -> None:
    assert command("child.tell_done(7 if 'QCONVERT_WATCH' in os.environ else 0)") == 0
    assert "QCONVERT_WATCH" not in os.environ


def test_a_process_that_finds_no_channel_is_believed(command: Any) -> None:
    assert command("child._channel.tell({})\nchild._channel = None\nchild.tell_done(0)\nsys.exit(4)") == 4
