"""The door for plugins: `qconvert.plugin` has all that they may use, and they use nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from qconvert import plugin

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
TEMPLATE = ROOT / "qconvert" / "plugin" / "host" / "template" / "files"
# Where version 1 had its names, before all of them could be had from one place.
FORMER = {
    "qconvert": ("hookimpl", "Recipe", "Report"),
    "qconvert.errors": ("InputError", "PluginError", "QConvertError", "ResourceError", "UsageError", "in_one_line"),
    "qconvert.ir": ("affine",),
    "qconvert.ir.layer": ("CalibrationStats", "Layer", "LinearGroup", "Producer"),
    "qconvert.ir.model": ("Model", "TensorInfo", "TensorSource"),
    "qconvert.ir.quantized": ("Outliers", "QuantizedTensor"),
    "qconvert.ir.report": ("Fidelity", "GateResult", "Latency", "LayerReport", "Parity", "Report", "SampleCounts", "Size"),
    "qconvert.ir.scheme": ("PerChannel", "PerGroup", "PerTensor", "QuantScheme"),
    "qconvert.plugin.observer": ("AbsMax", "Gram", "Observer", "SampledRows"),
    "qconvert.plugin.quantizer": ("Quantizer", "round_to_nearest"),
    "qconvert.recipe": ("Recipe",),
}


def sources() -> dict[str, tuple[str, set[str]]]:
    """Name -> the code that an author writes or copies, and the modules of qconvert that it may import."""
    door = {"qconvert.plugin"}
    tools = door | {"qconvert", "qconvert.testing"}
    found = {}
    files = [*ROOT.glob("plugins/*/*.py"), *ROOT.glob("plugins/*/tests/*.py"), *TEMPLATE.rglob("*.py.jinja")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jinja":
            text = re.sub(r"\{\{ (\w+) \}\}", r"\1", text)
        found[str(path.relative_to(ROOT))] = text, tools if path.parent.name == "tests" else door
    for document in ("plugins.md", "hooks.md"):
        text = (ROOT / "docs" / document).read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            found[f"docs/{document} {number}"] = block, tools if "qconvert.testing" in block else door
    return found


def imports(code: str) -> set[str]:
    """The modules of qconvert that code imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module)):
                found.add(module)
    return {name for name in found if name.partition(".")[0] == "qconvert"}


@pytest.mark.parametrize("name", sources())
def test_authors_import_the_door_alone(name: str) -> None:
    code, allowed = sources()[name]
    assert imports(code) <= allowed


def test_the_check_above_sees_plugins_template_and_guide() -> None:
    using = {name.partition("/")[0] for name, (code, _) in sources().items() if "qconvert.plugin" in imports(code)}
    assert using == {"plugins", "qconvert", "docs"}
    assert imports("def f():\n    from qconvert.load.skeleton import build_skeleton\n") == {"qconvert.load.skeleton"}


@pytest.mark.parametrize("name", plugin.__all__)
def test_every_name_can_be_had(name: str) -> None:
    assert getattr(plugin, name) is not None
    assert name in dir(plugin)


def test_the_type_checker_sees_what_is_handed_out() -> None:
    """So does import-linter: no name comes from a place that only a string tells of."""
    tree = ast.parse(Path(str(plugin.__file__)).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {str(node.module): {alias.name for alias in node.names} for node in checked.body if isinstance(node, ast.ImportFrom)}
    assert {home: set(names) for home, names in plugin._HOMES.items()} == seen
    assert {"hookimpl"}.union(*seen.values()) == set(plugin.__all__)


def test_a_name_that_is_not_there_is_no_import() -> None:
    with pytest.raises(ImportError, match="no_such_name"):
        from qconvert.plugin import no_such_name  # noqa: F401


def test_the_door_imports_nothing_heavy() -> None:
    code = "import sys; from qconvert.plugin import InputError, hookimpl; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "pydantic", "transformers", "qconvert.load"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in FORMER.items() for name in names])
def test_former_places_keep_their_names(module: str, name: str) -> None:
    assert getattr(import_module(module), name) is getattr(plugin, name)


def test_the_guide_lists_what_there_is() -> None:
    table = GUIDE.partition("| for | from `qconvert.plugin` |")[2].partition("\n\n")[0]
    listed = re.findall(r"`(\w+)`", table)
    assert sorted(listed) == sorted(plugin.__all__)
