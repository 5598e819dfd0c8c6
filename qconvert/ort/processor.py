"""The processor at hand, as far as it decides what 8-bit products compute and how fast they are."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import onnx_ir
from onnx_ir import DataType

from qconvert.graph.integer_products import PROBE, PROBE_SUM
from qconvert.ir.report import Processor
from qconvert.ort.session import node_session

CPUINFO = Path("/proc/cpuinfo")
# Field of the report -> what Linux calls it: on x86-64, and on ARM64.
FLAGS = {"avx512": {"avx512f"}, "vnni": {"avx512_vnni", "avx_vnni"}, "amx": {"amx_int8"}}
FEATURES = {"dot_product": {"asimddp"}}


@cache
def processor() -> Processor:
    """Return the processor's name and features as the system tells them, and whether signed products saturate.

    ONNX Runtime is tried for that.
    """
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    known = {"flags": FLAGS, "Features": FEATURES}
    found = {
        field: not names.isdisjoint(_entry(text, key).split())
        for key, fields in known.items()
        for field, names in fields.items()
        if _entry(text, key)
    }
    return Processor(
        name=_entry(text, "model name") or _name(),
        architecture=platform.machine(),
        signed_products="exact" if _signed_products_are_exact() else "saturate",
        **found,
    )


def _entry(cpuinfo: str, key: str) -> str:
    found = re.search(rf"^{key}\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""


def _name() -> str:
    """Return what macOS or Python call the processor, where Linux's file does not say it."""
    if platform.system() == "Darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _signed_products_are_exact() -> bool:
    """Return whether the kernel for unsigned by signed bytes adds up what no 16 bits hold (see graph/integer_products.py)."""
    x, weight = PROBE
    node = onnx_ir.node(
        "MatMulInteger", [onnx_ir.val("x", DataType.UINT8, x.shape), onnx_ir.val("w", DataType.INT8, weight.shape)]
    )
    (product,) = node_session(node).run(None, {"x": x, "w": weight})
    return bool((product == PROBE_SUM).all())
