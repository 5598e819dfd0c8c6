"""`qconvert plugins`: what is listed, shown and described, of built-ins, of third parties and of what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_plugins import PRINTING, UNUSABLE
from click.testing import CliRunner, Result

from qconvert.cli import main
from qconvert.plugin.host.manager import BUILTINS, PluginManager


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plugins", *arguments])


@pytest.fixture
def trial(tmp_path: Path) -> str:
    path = tmp_path / "trial.py"
    path.write_text(
        PRINTING.replace(
            "class Trial(Quantizer):",
            'class Trial(Quantizer):\n    """A trial.\n\n    limit: the end.\n    """\n\n    limit: float | None = 0.5\n',
        )
    )
    return str(path)


def test_every_built_in_is_listed_with_what_it_takes() -> None:
    document = json.loads(run("list", "--json").stdout)
    assert (document["schema"], document["api"]) == (1, 1)
    ours = {entry["name"]: entry for entry in document["plugins"] if entry["distribution"] == "qconvert"}
    assert ours.pop("signround")["kind"] == "tuner"
    for name in ("min-max", "moving-average", "percentile", "mse", "kl"):
        entry = ours.pop(name)
        assert entry["kind"] == "range estimator"
        assert entry["doc"]
        assert "Source:" in entry["source"]
    assert len(ours) == len(BUILTINS)
    assert ours["llm-int8"]["schemes"] == ["int8-tensor-a8", "int8-channel-a8"]
    assert ours["hqq"]["schemes"] == [
        "int4-channel",
        "int4-channel-asym",
        "int4-gN",
        "int4-gN-asym",
        "int8-channel",
        "int8-channel-asym",
        "int8-gN",
        "int8-gN-asym",
    ]
    assert {name for name, entry in ours.items() if entry["calibrated"]} == {"awq", "gptq", "llm-int8", "smoothquant"}
    assert all(entry["doc"] and "Source:" in entry["source"] for entry in ours.values())


def test_the_table_has_a_line_for_each_and_one_for_what_is_broken(tmp_path: Path, trial: str) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(UNUSABLE["syntax"][0])
    done = run("list", "--plugin", trial, "--plugin", str(broken))
    assert done.exit_code == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("prints")]
    assert line.split()[:3] == ["prints", "quantizer", "trial.py"]
    assert "broken: broken.py sha256:" in done.stdout
    assert f"{broken}:2" in done.stdout
    assert "warning" not in done.stderr


def test_show_tells_options_with_type_default_and_words(trial: str) -> None:
    document: list[dict[str, Any]] = json.loads(run("show", "prints", "--plugin", trial, "--json").stdout)
    assert document[0]["doc"] == "A trial."
    assert document[0]["options"] == [
        {"name": "limit", "kind": "number or null", "default": 0.5, "required": False, "doc": "the end."}
    ]
    page = run("show", "gptq").stdout
    assert "needs calibration data: yes" in page
    assert "act_order" in page
    assert "E. Frantar" in page


def test_every_option_of_a_built_in_has_words() -> None:
    document = json.loads(run("list", "--json").stdout)
    assert [
        (entry["name"], option["name"]) for entry in document["plugins"] for option in entry["options"] if not option["doc"]
    ] == []


def test_a_name_that_is_not_there_gets_the_closest() -> None:
    done = run("show", "smothquant")
    assert done.exit_code == 2
    assert "did you mean 'smoothquant'?" in done.stderr


def test_the_schema_of_a_recipe_holds_the_options_of_each_quantizer(trial: str) -> None:
    schema = json.loads(run("schema", "--plugin", trial).stdout)
    options = {
        rule["if"]["properties"]["quantizer"]["const"]: rule["then"]["properties"]["options"] for rule in schema["allOf"]
    }
    assert options.keys() == PluginManager(BUILTINS).quantizers.keys() | {"prints"}
    assert options["prints"]["properties"]["limit"]["description"] == "the end."
    assert options["prints"]["additionalProperties"] is False
