"""Comparisons with made-up numbers."""

from __future__ import annotations

from typing import Any

from qconvert import errors
from qconvert.errors import QConvertError
from qconvert.ir.comparison import Comparison, Entry
from qconvert.ir.report import Fidelity, Latency, Report, SampleCounts, Size
from qconvert.ir.task import TASKS


def entry(name: str, **numbers: Any) -> Entry:
    """Of a decoder; numbers: passed, weights_bytes, kl, cosine, decode, others_share, gates, task. decode=None: no speed."""
    size, decode = numbers.get("weights_bytes", 1000), numbers.get("decode", 50.0)
    share = numbers.get("others_share")
    measured = numbers.keys() & {"kl", "cosine"}
    report = Report(
        passed=numbers.get("passed", True),
        task=numbers.get("task", "causal-lm"),
        quantizer="absmax",
        scheme="int8-tensor",
        samples=SampleCounts(calibration=0, evaluation=4),
        size=Size(source_bytes=4000, weights_bytes=size, graph_bytes=500, ratio=size / 4000, average_bits=8.0),
        fidelity=(Fidelity(target="cpu", status="passed", **{key: numbers[key] for key in measured}),) if measured else (),
        gates=numbers.get("gates", ()),
        latency=(Latency(target="cpu", status="passed", decode_tokens_per_s=decode, p50_ms=20.0, others_share=share),)
        if decode
        else (),
    )
    return Entry(name, "absmax", "int8-tensor", report, None, 1.5)


def failed(name: str, exit_code: int) -> Entry:
    kind = next((kind for kind in QConvertError.__subclasses__() if kind.exit_code == exit_code), errors.QConvertError)
    return Entry(name, "absmax", "int8-tensor", None, kind("QC-TEST-001", "[it] broke", hint="mend it"))


def comparison(*entries: Entry, model: str = "tiny", task: str = "causal-lm") -> Comparison:
    return Comparison(model, TASKS[task], entries)
