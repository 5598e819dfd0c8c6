"""Range estimators, as plugins bring them: found and built by name, asked for by recipes, held to their contract."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_plugins import PRINTING
from click.testing import CliRunner, Result

import qconvert
from qconvert.cli import main
from qconvert.errors import PluginError, UsageError
from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.scheme import Activations, QuantScheme
from qconvert.plugin.host.contract import choose_range
from qconvert.plugin.host.families import RANGE_ESTIMATORS
from qconvert.plugin.host.manager import BUILTINS, PluginManager
from qconvert.quantizers.per_channel import PerChannelQuantizer
from qconvert.range_estimators.mse import MSE
from qconvert.range_estimators.percentile import Percentile
from qconvert.recipe import Recipe
from qconvert.recipe.fields import Ranges

SEEN = Distribution.of(torch.tensor([-1.0, 0.5, 3.0]))
# Its `choose` gives what the line in BODY does.
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path

import torch

from qconvert.plugin import RangeEstimator, ValueRange, hookimpl


@hookimpl
def register_range_estimators():
    return [Trial]


@dataclass(frozen=True)
class Trial(RangeEstimator):
    '''A trial.

    share: of the range.
    table: a file.
    '''

    share: float = 0.5
    table: Path | None = None

    name = "trial"

    def choose(self, seen, codes, *, symmetric):
        nan = float("nan")
        BODY
"""
HALF = "return seen.clipped(seen.minimum * self.share, seen.maximum * self.share, symmetric=symmetric)"
BREACHES = {
    "raises": ("raise ValueError('no idea')", "failed to choose the range of 'conv1': ValueError: no idea"),
    "no-range": ("return -1.0, 3.0", "choose returned tuple, not a ValueRange"),
    "a-tensor": ("return ValueRange(torch.tensor(-1.0), 3.0)", "low is Tensor, not a number"),
    "nan": ("return ValueRange(-1.0, nan)", "high is nan"),
    "infinite": ("return ValueRange(-float('inf'), 1.0)", "low is -inf"),
    "reversed": ("return ValueRange(3.0, -1.0)", "the range from 3 to -1 is reversed"),
    "too-high": ("return ValueRange(-1.0, 3.1)", "the range from -1 to 3.1 reaches beyond what was seen, -1 to 3"),
    "too-low": ("return ValueRange(-3.0, 3.0)", "the range from -3 to 3 reaches beyond what was seen, -1 to 3"),
    "in-place": ("seen.counts.zero_(); return ValueRange(-1.0, 3.0)", "choose the range of changed its input in place"),
}
NETWORK = """
import torch

def factory():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    return torch.nn.Sequential(*layers), (torch.randn(64, 64),)
"""


def plugin(folder: Path, body: str = HALF, name: str = "trial") -> Path:
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.replace("BODY", body).replace('"trial"', f'"{name}"'))
    return path


def manager(*files: Path) -> PluginManager:
    return PluginManager(BUILTINS, files)


# --- the contract ---


@pytest.mark.parametrize(("body", "problem"), BREACHES.values(), ids=BREACHES)
def test_an_estimator_that_breaks_its_contract_is_named(tmp_path: Path, body: str, problem: str) -> None:
    estimator = manager(plugin(tmp_path, body)).range_estimator(Ranges(estimator="trial"))
    with pytest.raises(PluginError) as raised:
        choose_range(estimator, Distribution.of(torch.tensor([-1.0, 0.5, 3.0])), 256, False, "conv1")
    assert raised.value.code == ("QC-PLUGIN-007" if "ValueError" in problem else "QC-PLUGIN-008")
    assert "range estimator 'trial' of trial.py sha256:" in raised.value.message
    assert "'conv1'" in raised.value.message
    assert problem in raised.value.message
    assert "take another one: --ranges min-max" in raised.value.hint


def test_a_range_is_symmetric_where_that_is_asked_for(tmp_path: Path) -> None:
    estimator = manager(plugin(tmp_path, "return ValueRange(-1.0, 3.0)")).range_estimator(Ranges(estimator="trial"))
    assert choose_range(estimator, SEEN, 256, False, "conv1") == ValueRange(-1, 3)
    with pytest.raises(PluginError, match="the range from -1 to 3 is not symmetric, as was asked for"):
        choose_range(estimator, SEEN, 256, True, "conv1")


def test_a_symmetric_range_may_reach_as_far_as_the_largest_magnitude(tmp_path: Path) -> None:
    body = "return ValueRange(-2.5, 2.5) if seen.maximum == 3 else ValueRange(-3.0, 3.0)"
    estimator = manager(plugin(tmp_path, body)).range_estimator(Ranges(estimator="trial"))
    assert choose_range(estimator, SEEN, 256, True, "conv1") == ValueRange(-2.5, 2.5)
    assert choose_range(estimator, Distribution.of(torch.tensor([-3.0, 1.0])), 256, True, "conv1") == ValueRange(-3, 3)
    with pytest.raises(PluginError, match="reaches beyond what was seen, -1 to 1"):
        choose_range(estimator, Distribution.of(torch.tensor([-1.0, 1.0])), 256, True, "conv1")


@pytest.mark.parametrize(
    ("body", "values", "expected"),
    [
        ("return ValueRange(1.0, 3.0)", [1.0, 3.0], (0, 3)),
        ("return ValueRange(-3.0, -1.0)", [-1.0, -3.0], (-3, 0)),
        ("return ValueRange(-0.0, 0.0)", [0.0, 0.0], (0, 0)),
        ("return ValueRange(0, 3.0 * (1 + 1e-7))", [1.0, 3.0], (0, pytest.approx(3))),
    ],
    ids=["positive", "negative", "zeros", "rounded"],
)
def test_a_range_is_widened_to_hold_zero(tmp_path: Path, body: str, values: list[float], expected: tuple[float, float]) -> None:
    estimator = manager(plugin(tmp_path, body)).range_estimator(Ranges(estimator="trial"))
    found = choose_range(estimator, Distribution.of(torch.tensor(values)), 256, False, "conv1")
    assert (found.low, found.high) == expected
    assert "-0.0" not in repr(found)


# --- by name ---


def test_the_built_ins_are_named_in_one_tuple() -> None:
    folder = Path(str(qconvert.__file__)).parent / "range_estimators"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {name.rpartition(".")[2] for name in RANGE_ESTIMATORS.builtins} == files
    assert manager().range_estimators.keys() == {name.replace("_", "-") for name in files}


def test_options_are_those_of_its_fields(tmp_path: Path) -> None:
    found = manager(plugin(tmp_path))
    with pytest.raises(UsageError, match="range estimator 'trial' has no option 'shre'"):
        found.range_estimator(Ranges(estimator="trial", options={"shre": 1}))
    with pytest.raises(UsageError, match="options of range estimator 'trial': share"):
        found.range_estimator(Ranges(estimator="trial", options={"share": "large"}))
    assert found.range_estimator(None) == MSE()
    assert found.range_estimator(Ranges(estimator="percentile", options={"percentile": 99})) == Percentile(99.0)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [("percentile", {"percentile": 0}), ("percentile", {"percentile": 101}), ("moving-average", {"averaging_constant": 0})],
    ids=["no-percent", "beyond-100", "no-step"],
)
def test_options_out_of_range_are_refused(estimator: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"options of range estimator '{estimator}'.* must be above 0 and at most") as raised:
        manager().range_estimator(Ranges(estimator=estimator, options=options))
    assert raised.value.code == "QC-PLUGIN-004"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (PLUGIN.replace('"trial"', '"mse"'), "its range estimator 'mse' has a name of qconvert's own"),
        (PLUGIN.replace("return [Trial]", "return [int]"), "which is no RangeEstimator class"),
        (PLUGIN.replace("@dataclass(frozen=True)", ""), "Trial is no frozen dataclass"),
        (PLUGIN.replace('    name = "trial"\n', ""), "Trial lacks a name"),
    ],
    ids=["taken", "no-estimator", "not-frozen", "no-name"],
)
def test_what_is_no_range_estimator_is_set_aside(tmp_path: Path, source: str, problem: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(source.replace("BODY", HALF))
    found = manager(path)
    assert found.range_estimator(None) == MSE()
    (broken,) = found.broken
    assert problem in broken.reason
    with pytest.raises(PluginError, match="no range estimator 'trial'; a plugin that may bring it is broken"):
        found.range_estimator(Ranges(estimator="trial"))


def test_a_plugin_may_bring_a_quantizer_too(tmp_path: Path) -> None:
    path = tmp_path / "both.py"
    path.write_text(PRINTING + PLUGIN.replace("BODY", HALF).replace("Trial", "Other"))
    found = manager(path)
    assert "prints" in found.quantizers
    assert "trial" in found.range_estimators


# --- what it is part of ---


def test_an_estimator_is_code_only_where_it_is_used(tmp_path: Path) -> None:
    found = manager(plugin(tmp_path))
    estimator = found.range_estimator(Ranges(estimator="trial"))
    quantizer = PerChannelQuantizer()
    assert [code.distribution.name for code in found.code_of(quantizer, None, None)] == ["qconvert"]
    assert [code.distribution.name for code in found.code_of(quantizer, None, estimator)] == ["qconvert", "trial.py"]


def test_a_plan_is_static_where_a_layer_has_scales_from_calibration() -> None:
    dynamic = QuantScheme.parse("int8-channel-a8")
    static = replace(dynamic, activations=Activations(dynamic=False, granularity="tensor"))

    def plan(*schemes: QuantScheme) -> Plan:
        layers = {str(n): LayerPlan(str(n), "linear", 8, 8, scheme) for n, scheme in enumerate(schemes)}
        return Plan(dynamic, layers, (), False, 0, {})

    assert not plan().is_static
    assert not plan(dynamic, QuantScheme.parse("int4-g32")).is_static
    assert plan(dynamic, static).is_static


# --- as users see it ---


def run(folder: Path, *arguments: str) -> Result:
    (folder / "net.py").write_text(NETWORK)
    place = ["--model", f"module:{folder / 'net.py'}:factory", "--output", str(folder / "out")]
    return CliRunner().invoke(main, ["run", *place, "--layout", "onnx", "--no-verify", *arguments])


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "qconvert.json").read_text())
    return found


def test_a_flag_asks_for_the_estimator_of_a_file(tmp_path: Path) -> None:
    done = run(tmp_path, "--plugin", str(plugin(tmp_path)), "--ranges", "trial")
    assert done.exit_code == 0, done.stderr
    made = manifest(tmp_path)
    assert made["recipe"]["ranges"] == {"estimator": "trial", "options": {}}
    assert "code:trial.py" not in made["inputs"]  # no layer has scales from calibration
    assert "--ranges trial" in (tmp_path / "out" / "README.md").read_text()


def test_the_manifest_of_a_static_plan_holds_its_code_and_the_files_of_its_options(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("1")
    (tmp_path / "net.py").write_text(NETWORK)
    settings = {"model": f"module:{tmp_path / 'net.py'}:factory", "output": tmp_path / "out", "layout": "onnx", "verify": False}
    settings["scheme"] = "int8-channel-a8-static"
    ranges = {"estimator": "trial", "options": {"table": str(tmp_path / "table.txt")}}
    qconvert.convert(Recipe.from_settings({**settings, "plugins": [plugin(tmp_path)], "ranges": ranges}))
    made = manifest(tmp_path)
    assert {"code:trial.py", "code:qconvert", "ranges:table"} <= made["inputs"].keys()
    assert made["recipe"]["ranges"]["options"] == {"table": "../table.txt"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A recipe file also gave" in card
    assert "'estimator': 'trial'" in card


def test_a_name_that_nobody_brings_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    done = run(tmp_path, "--ranges", "percentil")
    assert done.exit_code == 2
    assert "[QC-PLUGIN-002] no range estimator 'percentil'" in done.stderr
    assert "did you mean 'percentile'?" in done.stderr
    done = run(tmp_path, "--plugin", str(plugin(tmp_path)), "--ranges", "tril")
    assert "did you mean 'trial'?" in done.stderr


def test_range_estimators_are_listed_and_shown(tmp_path: Path) -> None:
    def printed(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["plugins", *arguments, "--plugin", str(plugin(tmp_path))])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    listed = [line.split()[:4] for line in printed("list").splitlines()]
    assert ["moving-average", "range", "estimator", "qconvert"] in listed
    assert ["trial", "range", "estimator", "trial.py"] in listed
    (entry,) = json.loads(printed("show", "percentile", "--json"))
    assert [(option["name"], bool(option["doc"])) for option in entry["options"]] == [("percentile", True)]
    assert "It has no options." in printed("show", "kl")
    assert "of the range." in printed("show", "trial")
    rules = json.loads(printed("schema"))["$defs"]["Ranges"]["allOf"]
    options = {rule["if"]["properties"]["estimator"]["const"]: rule["then"]["properties"]["options"] for rule in rules}
    assert options["trial"]["properties"].keys() == {"share", "table"}
    assert options["mse"]["properties"] == {}
