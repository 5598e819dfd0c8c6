"""Plugins, each with one fault, as distributions that a process finds on its path."""

from __future__ import annotations

from pathlib import Path

GOOD = """
from dataclasses import dataclass
from qconvert import hookimpl
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import Quantizer, round_to_nearest

@hookimpl
def register_quantizers():
    return [Trial]

@dataclass(frozen=True)
class Trial(Quantizer):
    name = "NAME"
    default_scheme = QuantScheme.parse("int8-channel")

    def quantize(self, layer, scheme):
        tensor = round_to_nearest(layer.weight, scheme)
        FAULT
        return tensor
"""


def quantizing(name: str, fault: str) -> str:
    return GOOD.replace("NAME", name).replace("FAULT", fault)


HOOK = "from qconvert import hookimpl\n@hookimpl\n"
# Plugins that can't be used: name -> (source, what is said of it, the line that is named or 0).
UNUSABLE = {
    "absent": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'", 1),
    "syntax": ("x = 1\ndef broken(:", "SyntaxError: ", 2),
    "misspelt": (
        f"{HOOK}def register_quantizer(): ...",
        "unknown hook 'register_quantizer'; did you mean 'register_quantizers'?",
        2,
    ),
    "argument": (f"{HOOK}def load_model(sauce): ...", "sauce", 2),
    "future": (f"QCONVERT_API = 2\n{HOOK}def load_model(source): ...", "version 2 of the plugin API, and this is version 1", 0),
    "taken": (quantizing("absmax", "pass"), "its quantizer 'absmax' has a name of qconvert's own", 0),
    "vanishes": (
        f"{HOOK}def register_quantizers():\n    import os; os._exit(0)",
        "its register_quantizers exited with code 0",
        0,
    ),
    "detaches": ("import os; os.closerange(3, 4096)", "its import closed files that it did not open", 0),
    "dies": ("import os\nos.abort()", "its import crashed with SIGABRT", 0),
}
# Plugins that fail when they are used: name -> (source, error code, what is said of it).
FAILING = {
    "hangs": (quantizing("hangs", "import time; time.sleep(1000)"), "QC-PLUGIN-011", "was ended after 10 seconds: quantize '"),
    "segfaults": (
        quantizing("segfaults", "import ctypes; ctypes.string_at(0)"),
        "QC-PLUGIN-010",
        "crashed with SIGSEGV: quantize '",
    ),
    "exits": (quantizing("exits", "import os; os._exit(0)"), "QC-PLUGIN-010", "exited with code 0: quantize '"),
    "closes": (
        quantizing("closes", "import os; os.closerange(0, 4096)"),
        "QC-PLUGIN-010",
        "closed files that it did not open: ",
    ),
    "shapes": (
        quantizing("shapes", "import dataclasses; tensor = dataclasses.replace(tensor, q=tensor.q.T)"),
        "QC-PLUGIN-008",
        "q is torch.int8 [",
    ),
    "mutates": (quantizing("mutates", "layer.weight.mul_(2)"), "QC-PLUGIN-008", "quantize changed its input in place"),
    "eats": (
        quantizing("eats", "import torch; self.__dict__['kept'] = torch.empty(1 << 50, dtype=torch.uint8)"),
        "QC-MEMORY-001",
        "can't allocate memory",
    ),
}
# One that prints, which is no fault that stops it, but must not reach stdout.
PRINTING = quantizing("prints", "print('hello'); import os; os.write(2, b'')")
# One that changes what belongs to the whole process, and leaves threads, processes and exit handlers behind.
RUDE = """
import atexit, builtins, os, signal, subprocess, sys, threading, time, torch

os.umask(0)
sys.setrecursionlimit(150)
torch.set_default_dtype(torch.float64)
threading.Thread(target=time.sleep, args=(1000,), name="poll").start()
atexit.register(time.sleep, 1000)
subprocess.Popen([sys.executable, "-c", "import time; print('from a process', flush=True); time.sleep(1000)"])
""" + quantizing("rude", "os.close(1); sys.stdout.close(); sys.setrecursionlimit(150); signal.alarm(2)")


def install(folder: Path, name: str, source: str, *, version: str = "0.3", value: str = "") -> None:
    """A distribution qconvert-NAME with the module qconvert_NAME, which its entry point names unless `value` does another."""
    (folder / f"qconvert_{name}.py").write_text(source)
    info = folder / f"qconvert_{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qconvert-{name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[qconvert]\n{name} = {value or f'qconvert_{name}'}\n")
