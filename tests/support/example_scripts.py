"""The scripts in examples/, imported and run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_alone(script: str, *arguments: str) -> list[str]:
    """The lines that an example prints, in an interpreter where torch, transformers and qconvert can't be imported."""
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'transformers', 'qconvert'): sys.modules[name] = None\n"
        f"sys.argv = {[script, *arguments]!r}\n"
        f"runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
