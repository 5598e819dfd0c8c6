"""Errors: one tree, stable codes, every code documented."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from qconvert import errors
from qconvert.errors import QConvertError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "errors.md"
CODE = re.compile(r"QC-[A-Z]+-\d{3}")


@cache
def codes_in_source() -> dict[str, set[str]]:
    """code -> the functions and classes that are called with it first. It need not be the first argument of anything."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "qconvert").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(code)) if CODE.fullmatch(code):
                    found.setdefault(code, set())
                case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(code)), *_]) if CODE.fullmatch(code):
                    found.setdefault(code, set()).add(name)
    return found


def documented() -> dict[str, str]:
    """code -> its row in docs/errors.md: | code | meaning | remedy |."""
    text = DOCS.read_text(encoding="utf-8") if DOCS.is_file() else ""
    rows = [line for line in text.splitlines() if line.startswith("| QC-")]
    return {row.split("|")[1].strip(): row for row in rows}


def test_str_gives_code_what_and_next_step() -> None:
    error = errors.InputError("QC-INPUT-001", "shard a.safetensors has 3 of 4 bytes", hint="download it again")
    assert str(error) == "[QC-INPUT-001] shard a.safetensors has 3 of 4 bytes\n  next: download it again"
    assert error.args == ("shard a.safetensors has 3 of 4 bytes",)


def test_what_is_not_printable_in_a_name_is_escaped() -> None:
    name = "wéight\x1b[2J\nnext: \u202e\udcff\x00\x9b"
    error = errors.InputError("QC-INPUT-001", f"tensor {name}", hint=f"--rule '{name}=float'")
    escaped = r"w\xe9ight\x1b[2J\nnext: \u202e\udcff\x00\x9b"
    assert str(error) == f"[QC-INPUT-001] tensor {escaped}\n  next: --rule '{escaped}=float'"
    assert errors.InputError("QC-INPUT-001", "wéight", hint="東京").message == "wéight"


NO_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 8"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    OSError(12, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_is_known_in_the_words_of_every_library_and_behind_another_error(error: Exception) -> None:
    assert errors.is_out_of_memory(error)
    wrapped = ValueError("the file can't be read")
    wrapped.__cause__ = error
    assert errors.is_out_of_memory(wrapped)
    found = errors.told(wrapped)
    assert (found.code, found.exit_code) == ("QC-MEMORY-001", 6)
    found = errors.told(errors.InputError("QC-INPUT-018", "the tokenizer can't be opened", hint="save it again"), "load")
    assert (found.code, found.exit_code) == ("QC-INPUT-018", 3)
    assert errors.told(IndexError("index 3 is out of range")).code == "QC-INTERNAL-001"


def test_an_exception_that_is_its_own_cause_or_has_no_message_is_told_all_the_same() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise LookupError("no message")

    error = Broken()
    error.__cause__ = error
    found = errors.told(error)
    assert (found.code, found.message) == (
        "QC-INTERNAL-001",
        "internal error: Broken: its message can't be had: LookupError",
    )


def test_the_tree_drawn_in_the_docstring_is_the_tree() -> None:
    drawn = {name: int(exit_code) for name, exit_code in re.findall(r"── (\w+) +(\d+)", errors.__doc__ or "")}
    assert drawn == {kind.__name__: kind.exit_code for kind in QConvertError.__subclasses__()}
    assert len(set(drawn.values())) == len(drawn)


def test_the_scan_finds_codes() -> None:
    assert codes_in_source()["QC-SCHEME-001"] == {"UsageError"}


@pytest.mark.parametrize("code", sorted(codes_in_source()))
def test_a_code_belongs_to_one_class(code: str) -> None:
    kinds = {name for name in codes_in_source()[code] if hasattr(errors, name)}
    assert len(kinds) <= 1, f"{code} is raised as {sorted(kinds)}: its exit code would depend on the place"


def test_the_docs_list_exactly_the_codes_of_the_source() -> None:
    missing = sorted(codes_in_source().keys() - documented().keys())
    skeleton = "\n".join(f"| {code} | meaning | remedy |" for code in missing)
    assert not missing, f"add to docs/errors.md:\n{skeleton}"
    assert sorted(documented().keys() - codes_in_source().keys()) == [], "documented, but raised nowhere"


def test_a_code_is_documented_under_its_exit_code() -> None:
    _, *parts = re.split(r"^## Exit code (\d+).*$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wrong = [
        f"{code} under {exit_code}"
        for exit_code, section in zip(parts[::2], parts[1::2], strict=True)
        for code in CODE.findall(section)
        for name in codes_in_source().get(code, ())
        if hasattr(errors, name) and getattr(errors, name).exit_code != int(exit_code)
    ]
    assert wrong == []


def test_every_documented_code_has_a_meaning_and_a_remedy() -> None:
    for row in documented().values():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert all(cells), row
