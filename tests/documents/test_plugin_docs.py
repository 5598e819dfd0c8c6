"""docs/plugins.md and docs/hooks.md: the code in them runs, and every hook has a document, a test and a plugin that uses it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

from qconvert.ir.distribution import Distribution
from qconvert.plugin import hookspecs
from qconvert.plugin.host.contract import choose_range
from qconvert.plugin.host.manager import plugin_manager
from qconvert.recipe import Recipe
from qconvert.recipe.fields import Ranges

ROOT = Path(__file__).parents[2]
GUIDE, REFERENCE = ROOT / "docs" / "plugins.md", ROOT / "docs" / "hooks.md"
BUILTIN_USERS = {
    "register_quantizers": ["the built-in quantizers"],
    "register_tuners": ["the built-in tuner"],
    "register_range_estimators": ["the built-in range estimators"],
}
HOOKS = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "qconvert_spec")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def reference() -> str:
    """docs/hooks.md, from hookspecs.py."""
    parts = ["# Hooks", "Generated from [hookspecs.py](../qconvert/plugin/hookspecs.py); a test keeps it true."]
    for name in HOOKS:
        hook = getattr(hookspecs, name)
        modules = sorted(ROOT.glob("plugins/*/qconvert_*.py"))
        users = [module.parent.name for module in modules if f"def {name}(" in module.read_text(encoding="utf-8")]
        users += BUILTIN_USERS.get(name, [])
        signature = f"def {name}{inspect.signature(hook)}".replace("'", "")
        parts += [f"## {name}", f"```python\n@hookimpl\n{signature}: ...\n```", inspect.getdoc(hook) or ""]
        parts += [f"Used by: {', '.join(users)}."]
    return "\n\n".join(parts) + "\n"


def test_the_reference_is_what_hookspecs_says() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_document_a_test_and_a_user(hook: str) -> None:
    assert inspect.getdoc(getattr(hookspecs, hook))
    assert f"## {hook}" in REFERENCE.read_text(encoding="utf-8")
    assert any(
        f"def {hook}" in path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py") if path != Path(__file__)
    )
    users = [
        *ROOT.glob("plugins/*/qconvert_*.py"),
        *(path for room in ("quantizers", "tuners", "range_estimators") for path in ROOT.glob(f"qconvert/{room}/*.py")),
    ]
    assert any(f"def {hook}(" in path.read_text(encoding="utf-8") for path in users)


def test_the_first_quantizer_of_the_guide_is_short_and_works(tmp_path: Path) -> None:
    code, suite, *_ = blocks("python")
    body = code.partition("@dataclass")[2].splitlines()
    assert len(body) <= 30
    (tmp_path / "power_of_two.py").write_text(code)
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def factory():\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)\n"
        "    return torch.nn.Sequential(*layers), (torch.randn(64, 64),)\n"
    )
    shown, run = blocks("sh")[0].splitlines()
    model = f"module:{tmp_path / 'net.py'}:factory --layout onnx --target cpu --target cuda --allow-unverified --json"
    page = qconvert(shown, tmp_path)
    assert "whether scales are rounded down" in page.stdout
    report = json.loads(qconvert(run.replace("DIR", model).replace("OUT", "out"), tmp_path).stdout)
    assert report["quantizer"] == "power-of-two"
    assert {each["target"]: each["status"] for each in report["parity"]}["cpu"] == "passed"
    (tmp_path / "test_power_of_two.py").write_text(suite)
    checked = subprocess.run([sys.executable, "-m", "pytest", "-q", tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    manifest = json.loads((tmp_path / "out" / "qconvert.json").read_text())
    assert manifest["recipe"]["options"] == {"down": True}
    assert {"model.safetensors", "model.onnx", "model.cuda.onnx"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_tuner_of_the_guide_works(tmp_path: Path) -> None:
    *_, code, _ = blocks("python")
    (tmp_path / "best_clip.py").write_text(code)
    tiny_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words.\n" for n in range(60)))
    page = qconvert("qconvert plugins show best-clip --plugin best_clip.py", tmp_path)
    assert "of the smaller range to the whole one." in page.stdout
    data = {"source": "text.txt", "samples": 4, "length": 32}
    recipe = {
        **{"model": "llama", "output": "out", "quantizer": "absmax", "scheme": "int4-g16", "plugins": ["best_clip.py"]},
        **{"calibration": data, "evaluation": data, "verify": False},
        "tuning": {"tuner": "best-clip", "options": {"ratio": 0.9}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    qconvert("qconvert run recipe.yaml", tmp_path)
    manifest = json.loads((tmp_path / "out" / "qconvert.json").read_text())
    assert manifest["recipe"]["tuning"] == recipe["tuning"]
    assert {"code:best_clip.py", "code:qconvert"} <= manifest["inputs"].keys()


def test_the_range_estimator_of_the_guide_works(tmp_path: Path) -> None:
    *_, code = blocks("python")
    (tmp_path / "deviations.py").write_text(code)
    page = qconvert("qconvert plugins show deviations --plugin deviations.py", tmp_path)
    assert "range estimator of deviations.py" in page.stdout
    assert "how many." in page.stdout
    ranges = Ranges(estimator="deviations", options={"deviations": 3})
    estimator = plugin_manager([tmp_path / "deviations.py"]).range_estimator(ranges)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    seen = Distribution.of(torch.cat([values, torch.tensor([30.0])]))
    for symmetric in (True, False):
        chosen = choose_range(estimator, seen, 256, symmetric, "input")
        assert chosen.low == pytest.approx(-3.1, abs=0.2)
        assert chosen.high == pytest.approx(3.1, abs=0.2)


def test_the_project_file_of_the_guide_names_what_the_guide_made() -> None:
    project = tomllib.loads(blocks("toml")[0])
    assert project["project"]["entry-points"]["qconvert"] == {"power-of-two": "power_of_two"}


def test_the_guide_names_every_field_that_it_promises() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert f"This is version {hookspecs.API_VERSION} of the plugin API" in text
    assert {"plugins", "plugin_timeout"} <= Recipe.model_fields.keys()


def qconvert(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.split()
    assert program == "qconvert"
    done = subprocess.run([sys.executable, "-m", "qconvert", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done
