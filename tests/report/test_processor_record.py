"""What a report says of the processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.ir.report import Processor
from qconvert.ort import processor as module
from qconvert.report import wording

INTEL = (
    "processor\t: 0\nmodel name\t: Xeon of 2019\nflags\t\t: avx2 avx512f avx512_vnni\n\nprocessor\t: 1\nmodel name\t: another\n"
)
AMD = "model name\t: EPYC of 2021\nflags\t\t: fpu avx avx2 sha_ni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (INTEL, "Xeon of 2019 (x86_64, AVX-512, VNNI, no AMX)"),
        (AMD, "EPYC of 2021 (x86_64, no AVX-512, no VNNI, no AMX)"),
        (ARM, "neoverse (x86_64, dot product)"),
        ("", "neoverse (x86_64)"),
    ],
    ids=["intel", "amd", "arm", "unknown"],
)
def test_it_is_named_with_what_the_system_knows(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.processor", lambda: "neoverse")
    module.processor.cache_clear()
    try:
        assert wording.processor(module.processor()) == words
    finally:
        module.processor.cache_clear()


def test_signed_products_are_what_was_tried_here() -> None:
    found = module.processor()
    assert isinstance(found, Processor)
    if found.vnni or found.architecture == "aarch64":
        assert found.signed_products == "exact"
    elif found.vnni is False and "avx2" in module.CPUINFO.read_text(encoding="utf-8"):
        assert found.signed_products == "saturate"
