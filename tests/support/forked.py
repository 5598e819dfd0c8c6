"""Commands that tests start, forked off a process that has imported the libraries: each time, these would take seconds.

`stand_in` makes a program that tests use as `sys.executable`. It runs what Python runs, and `-m qconvert` as well as the
processes that qconvert starts for itself in a fork of the server below, wherever that comes to the same
(forked_client.is_served). What is new in such a process is all but the imports: arguments, environment, files, folder, threads.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What commands import, but for onnxruntime: it starts a thread, which a fork lacks, and waits for it at the end.
ABSENT = "onnxruntime"
LIBRARIES = (
    *("compressed_tensors", "matplotlib.pyplot", "networkx", "rich.progress", "tokenizers", "torch._inductor.decomposition"),
    *("onnxscript.function_libs.torch_lib.ops", "torch._functorch.aot_autograd", "torch.export._trace", "torch.export._unlift"),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
)
OPSET = 23  # that of qconvert.trace.capture, which can't be asked without onnxruntime
PARTS = (
    "calibrate",
    "cli.run",
    "export",
    "load.hugging_face",
    "plan",
    "plugin.host.manager",
    "quantize",
    "quantizers.awq",
    "write",
)


def stand_in(folder: Path) -> Path:
    """The program, in a folder that nothing else uses; its server ends with this process."""
    import forked_client  # which the server does not find, as it looks for modules where commands do

    settings = {
        "python": sys.executable,
        "server": __file__,
        "session": forked_client.circumstances(),
        "process": os.getpid(),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    program = folder / "python"
    program.write_text(f"#!{sys.executable} -IS\n{Path(forked_client.__file__).read_text('utf-8')}", "utf-8")
    program.chmod(0o700)
    return program


@dataclass(frozen=True, eq=False)
class Command:
    """A command that runs: its process, a descriptor that can be read when it has ended, and the client that waits for it."""

    process: int
    ended: int
    client: socket.socket

    def close(self) -> None:
        os.close(self.ended)
        self.client.close()


class Server:
    """The process that has imported everything, runs nothing, and has one thread."""

    def __init__(self, listener: socket.socket, session: int) -> None:
        self.listener = listener
        self.session = os.pidfd_open(session)
        self.selector = selectors.DefaultSelector()
        self.commands: dict[int, Command] = {}
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(self.session, selectors.EVENT_READ)

    def serve(self) -> list[str]:
        """The arguments of a command: what comes back from here is a process that was forked for it, each time."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if (arguments := self.accept()) is not None:
                        return arguments
                elif key.fd == self.session:
                    self.end()
                elif key.fd in self.commands:
                    self.answer(self.commands.pop(key.fd))
                elif key.data in self.commands.values():  # and its client has gone
                    self.selector.unregister(key.fileobj)
                    os.kill(key.data.process, signal.SIGKILL)

    def accept(self) -> list[str] | None:
        client, _ = self.listener.accept()
        head, descriptors, *_ = socket.recv_fds(client, 4, 3)
        with client.makefile("rb") as file:
            data = file.read(int.from_bytes(head, "big"))
        process = os.fork()
        if process == 0:
            client.close()
            self.close()
            request = json.loads(data)
            become(request, descriptors)
            return list(request["arguments"])
        for descriptor in descriptors:
            os.close(descriptor)
        command = Command(process, os.pidfd_open(process), client)
        self.commands[command.ended] = command
        self.selector.register(command.ended, selectors.EVENT_READ)
        self.selector.register(client, selectors.EVENT_READ, command)
        return None

    def answer(self, command: Command) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(command.process, 0)[1])
        self.selector.unregister(command.ended)
        if command.client in self.selector.get_map():
            self.selector.unregister(command.client)
            with contextlib.suppress(BrokenPipeError):  # the client has gone just now
                command.client.send(code.to_bytes(4, "big", signed=True))
        command.close()

    def end(self) -> None:
        for command in self.commands.values():
            os.kill(command.process, signal.SIGKILL)
        os._exit(0)

    def close(self) -> None:
        self.selector.close()
        self.listener.close()
        os.close(self.session)
        for command in self.commands.values():
            command.close()


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Make of this process the one that the client was asked for."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.setpgid(0, request["group"])
    if request["cores"] != sorted(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, request["cores"])
        importlib.import_module("torch").set_num_threads(len(request["cores"]))  # as it does itself when it is imported
    os.umask(request["umask"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, (name, mode, buffering) in enumerate((("stdin", "r", -1), ("stdout", "w", -1), ("stderr", "w", 1))):
        before = getattr(sys, name)
        stream = open(number, mode, buffering, encoding=before.encoding, errors=before.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.executable = request["executable"]
    if path := os.environ.get("PYTHONPATH"):
        sys.path[:0] = [str(Path(entry).absolute()) for entry in path.split(os.pathsep)]
    importlib.invalidate_caches()
    gc.enable()


def keep_translations() -> None:
    """Make torch's exporter keep its table of how operators become nodes: it makes it anew for each trace, and takes longer for
    that than for all else in a small model's."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    kept = functools.cache(ONNXRegistry.from_torchlib)
    ONNXRegistry.from_torchlib = staticmethod(kept)  # type: ignore[method-assign]


def import_parts() -> None:
    """Import those parts of qconvert that do without onnxruntime."""
    sys.modules[ABSENT] = None  # type: ignore[assignment]
    for part in PARTS:
        before = set(sys.modules)
        try:
            importlib.import_module(f"qconvert.{part}")
        except ImportError:
            for name in set(sys.modules) - before:
                if name.startswith("qconvert."):
                    del sys.modules[name]
    del sys.modules[ABSENT]


def main() -> None:
    """Import everything, and become each of the commands that clients ask for."""
    settings = json.loads((Path(sys.argv[2]) / "settings.json").read_text())
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of its own accord it starts a thread per core at import, which forks would lack
    from qconvert.cli.terminal import StderrConsole, working

    with working(StderrConsole()):
        pass  # it has set the variables that keep libraries quiet which are imported from now on
    for name in LIBRARIES:
        importlib.import_module(name)
    import_parts()
    keep_translations()
    importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry.from_torchlib(opset_version=OPSET)
    assert len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208
    gc.disable()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        _, module, *arguments = Server(listener, settings["process"]).serve()
    sys.argv = ["-m", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
