"""Tuners of blocks, as plugins bring them: found and built by name, used by conversions, held to their contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_plugins import PRINTING
from click.testing import CliRunner
from safetensors import safe_open
from tiny_models import tiny_llama

import qconvert
from qconvert.cli import main
from qconvert.errors import PluginError, UsageError
from qconvert.plugin.host.manager import BUILTINS, PluginManager
from qconvert.recipe import Recipe
from qconvert.recipe.fields import Tuning
from qconvert.tuners.signround import SignRound

TEXT = "".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60))
DATA = {"samples": 4, "length": 32}
BLOCK = "model.layers.0"
# Its `tune` returns what the lines in BODY make of `tensors`.
PLUGIN = """
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qconvert.plugin import BlockTuner, hookimpl


@hookimpl
def register_tuners():
    return [Trial]


@dataclass(frozen=True)
class Trial(BlockTuner):
    '''A trial.

    shift: of every code.
    table: a file.
    '''

    shift: int = 0
    table: Path | None = None

    name = "trial"

    def tune(self, layers, tensors, samples, fixed):
        tensors = dict(tensors)
        name = next(iter(tensors))
        tensor = tensors[name]
        BODY
        return tensors
"""
MOVED = "tensors = {name: replace(tensor, q=(tensor.q + self.shift).clamp(-8, 7)) for name, tensor in tensors.items()}"
BREACHES = {
    "raises": ("raise ValueError('no idea')", "tune 'model.layers.0': ValueError: no idea"),
    "no-mapping": ("return [*tensors.values()]", "tune returned list, not a mapping"),
    "a-name-less": ("del tensors[name]", "tune returned tensors for"),
    "no-tensor": ("tensors[name] = tensor.q", "it returned Tensor, not a QuantizedTensor"),
    "another-scheme": (
        "from qconvert.plugin import QuantScheme; tensors[name] = replace(tensor, scheme=QuantScheme.parse('int4-g32'))",
        "asked for int4-g16, it quantized to int4-g32",
    ),
    "another-shape": ("tensors[name] = replace(tensor, q=tensor.q[:-1])", "q is torch.int8"),
    "codes-outside": ("tensors[name] = replace(tensor, q=tensor.q + 100)", "outside -8..7"),
    "scale-not-rounded": ("tensors[name] = replace(tensor, scale=tensor.scale * 1.0001)", "scale is not rounded"),
    "another-input-scale": (
        "tensors[name] = replace(tensor, smoothing_scale=torch.ones(tensor.q.shape[1]))",
        "its smoothing_scale is another one",
    ),
    "in-place": ("tensor.q.zero_()", "tune changed its input in place"),
    "weights-in-place": ("layers[name].weight.zero_()", "tune changed its input in place"),
    "targets-in-place": ("samples.targets[0].zero_()", "tune changed its input in place"),
}


def plugin(folder: Path, body: str = MOVED, name: str = "trial") -> Path:
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.replace("BODY", body).replace('"trial"', f'"{name}"'))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "text.txt").write_text(TEXT)
    return tiny_llama(folder / "llama")


def recipe(llama: Path, output: Path, **settings: Any) -> Recipe:
    data = {"source": str(llama.parent / "text.txt"), **DATA}
    plain = {"model": str(llama), "output": output, "quantizer": "absmax", "scheme": "int4-g16", "verify": False}
    return Recipe.from_settings({**plain, "calibration": data, "evaluation": data, **settings})


def manifest(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "qconvert.json").read_text())
    return found


def test_a_conversion_uses_the_tuner_of_a_file(llama: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    table.write_text("1")
    tuning = {"tuner": "trial", "options": {"shift": 1, "table": str(table)}}
    qconvert.convert(recipe(llama, tmp_path / "plain"))
    qconvert.convert(recipe(llama, tmp_path / "tuned", plugins=[plugin(tmp_path)], tuning=tuning))
    with (
        safe_open(tmp_path / "plain" / "model.safetensors", "pt") as plain,
        safe_open(tmp_path / "tuned" / "model.safetensors", "pt") as tuned,
    ):
        changed = [name for name in plain.keys() if not (plain.get_tensor(name) == tuned.get_tensor(name)).all()]  # noqa: SIM118
    assert changed
    assert all(name.endswith("weight_packed") for name in changed)
    made = manifest(tmp_path / "tuned")
    assert made["recipe"]["tuning"] == {"tuner": "trial", "options": {"shift": 1, "table": "../table.txt"}}
    assert {"code:trial.py", "code:qconvert", "tuner:table"} <= made["inputs"].keys()
    assert made["versions"]["trial.py"].startswith("sha256:")


def test_the_built_in_tuner_needs_no_name(llama: Path, tmp_path: Path) -> None:
    qconvert.convert(recipe(llama, tmp_path / "short", tuning={"steps": 5}))
    qconvert.convert(recipe(llama, tmp_path / "named", tuning={"steps": 5, "tuner": "signround"}))
    assert manifest(tmp_path / "short")["recipe"]["tuning"] == {"steps": 5, "seconds": None}
    assert manifest(tmp_path / "short") == manifest(tmp_path / "named")


@pytest.mark.parametrize(("body", "problem"), BREACHES.values(), ids=BREACHES)
def test_a_tuner_that_breaks_its_contract_is_refused(llama: Path, tmp_path: Path, body: str, problem: str) -> None:
    wanted = recipe(llama, tmp_path / "out", plugins=[plugin(tmp_path, body)], tuning={"tuner": "trial"})
    with pytest.raises(PluginError) as raised:
        qconvert.convert(wanted)
    assert raised.value.code == ("QC-PLUGIN-007" if "ValueError" in problem else "QC-PLUGIN-008")
    assert "tuner 'trial' of trial.py sha256:" in raised.value.message
    assert BLOCK in raised.value.message
    assert problem in raised.value.message
    assert "leave out tuning" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_outliers_stay_what_they_are(llama: Path, tmp_path: Path) -> None:
    body = "tensors[name] = replace(tensor, outliers=None)"
    settings = {"quantizer": "llm-int8", "options": {"threshold": 1e-6, "max_outliers": 4}, "scheme": "int8-channel-a8"}
    wanted = recipe(llama, tmp_path / "out", plugins=[plugin(tmp_path, body)], tuning={"tuner": "trial"}, **settings)
    with pytest.raises(PluginError, match="its outliers are not those that it was given"):
        qconvert.convert(wanted)


# --- by name ---


def test_a_name_that_nobody_brings_is_refused_before_anything_is_loaded(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tuner 'signroud'") as raised:
        qconvert.convert(recipe(llama, tmp_path / "out", tuning={"tuner": "signroud"}))
    assert raised.value.code == "QC-PLUGIN-002"
    assert "did you mean 'signround'?" in raised.value.hint


def test_options_are_those_of_its_fields(tmp_path: Path) -> None:
    manager = PluginManager(BUILTINS, [plugin(tmp_path)])
    with pytest.raises(UsageError, match="tuner 'trial' has no option 'shft'"):
        manager.tuner(Tuning(tuner="trial", options={"shft": 1}))
    with pytest.raises(UsageError, match="options of tuner 'trial': shift"):
        manager.tuner(Tuning(tuner="trial", options={"shift": "far"}))
    assert manager.tuner(Tuning(steps=3)) == SignRound(steps=3)
    assert manager.tuner(None) is None


def test_two_that_bring_one_name_are_an_error_for_who_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    manager = PluginManager(BUILTINS, [plugin(tmp_path), plugin(tmp_path / "other")])
    assert manager.tuner(Tuning()) == SignRound()
    with pytest.raises(PluginError, match="two plugins bring a tuner 'trial'"):
        manager.tuner(Tuning(tuner="trial"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (PLUGIN.replace('"trial"', '"signround"'), "its tuner 'signround' has a name of qconvert's own"),
        (
            PLUGIN.replace("return [Trial]", "return Trial"),
            "register_tuners returned ABCMeta, not a list of BlockTuner classes",
        ),
        (PLUGIN.replace("return [Trial]", "return [int]"), "which is no BlockTuner class"),
        (PLUGIN.replace("@dataclass(frozen=True)", ""), "Trial is no frozen dataclass"),
        (PLUGIN.replace('    name = "trial"\n', ""), "Trial lacks a name"),
        ("QCONVERT_API = 2\n" + PLUGIN, "it is written for version 2 of the plugin API"),
    ],
    ids=["taken", "no-list", "no-tuner", "not-frozen", "no-name", "other-api"],
)
def test_what_is_no_tuner_is_set_aside(tmp_path: Path, source: str, problem: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(source.replace("BODY", "pass"))
    manager = PluginManager(BUILTINS, [path])
    assert manager.tuner(Tuning()) == SignRound()
    (broken,) = manager.broken
    assert problem in broken.reason
    with pytest.raises(PluginError, match="a plugin that may bring it is broken"):
        manager.tuner(Tuning(tuner="trial"))


# --- as users see them ---


def test_the_options_of_the_built_in_stand_beside_its_name() -> None:
    base = {"model": "m", "output": "o"}
    with pytest.raises(UsageError, match="the tuner signround takes steps and seconds, not options"):
        Recipe.from_settings(base | {"tuning": {"options": {"steps": 3}}})
    with pytest.raises(UsageError, match="the tuner trial takes options, not seconds, steps"):
        Recipe.from_settings(base | {"tuning": {"tuner": "trial", "steps": 3, "seconds": 1}})
    for tuning in ({"steps": 3}, {"tuner": "trial", "options": {"shift": 1}}, {"tuner": "trial"}):
        made = Recipe.from_settings(base | {"tuning": tuning})
        assert Recipe.from_settings(made.model_dump(mode="json")) == made


def test_tuners_are_listed_and_shown(tmp_path: Path) -> None:
    def printed(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["plugins", *arguments, "--plugin", str(plugin(tmp_path))])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    listed = [line.split()[:3] for line in printed("list").splitlines()]
    assert ["signround", "tuner", "qconvert"] in listed
    assert ["trial", "tuner", "trial.py"] in listed
    (entry,) = json.loads(printed("show", "signround", "--json"))
    assert [option["name"] for option in entry["options"]] == ["steps", "seconds"]
    assert all(option["doc"] for option in entry["options"])
    assert "of every code." in printed("show", "trial")
    rules = json.loads(printed("schema"))["$defs"]["Tuning"]["allOf"]
    (rule,) = rules
    assert rule["if"]["properties"]["tuner"] == {"const": "trial"}
    assert rule["then"]["properties"]["options"]["properties"].keys() == {"shift", "table"}


def test_a_plugin_may_bring_both(tmp_path: Path) -> None:
    path = tmp_path / "both.py"
    path.write_text(PRINTING + PLUGIN.replace("BODY", "pass").replace("Trial", "Other"))
    manager = PluginManager(BUILTINS, [path])
    assert {"prints", "absmax"} <= manager.quantizers.keys()
    assert manager.tuners.keys() == {"signround", "trial"}
