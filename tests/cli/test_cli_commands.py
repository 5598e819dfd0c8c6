"""What the commands hand to the pipeline, what they print where, and which exit code they end with."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qconvert import errors
from qconvert.cli import COMMANDS, main
from qconvert.ir.report import GateResult, Report, SampleCounts, Size
from qconvert.pipeline import preflight
from qconvert.recipe import Recipe
from qconvert.recipe.fields import Ranges

REPORT = Report(
    passed=True,
    task="module",
    quantizer="absmax",
    scheme="int8-tensor-a8",
    samples=SampleCounts(calibration=0, evaluation=4),
    size=Size(source_bytes=4000, weights_bytes=1000, graph_bytes=500, ratio=0.25, average_bits=8.0),
)
MISSED = REPORT.model_copy(
    update={"passed": False, "gates": (GateResult(metric="kl", comparison="<=", limit=0.2, value=0.5, passed=False),)}
)


class FakePipeline(ModuleType):
    """Returns `result` or raises it, and remembers what it was given."""

    result: object = REPORT
    given: Any = None

    def answer(self) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def convert(self, recipe: Recipe, progress: object, plugins: object) -> Any:
        self.given = recipe
        return self.answer()

    def plan(self, recipe: Recipe, plugins: object) -> Any:
        self.given = recipe
        return self.answer()

    def verify(self, folder: Path, targets: object, evaluation: object, gates: object, *_: object) -> Any:
        self.given = (folder, targets, evaluation, gates)
        return self.answer()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    fake = FakePipeline("qconvert.pipeline")
    for name in ("conversion", "preparation", "verification"):
        monkeypatch.setitem(sys.modules, f"qconvert.pipeline.{name}", fake)
    for name in ("check", "check_published"):  # nothing that the flags name is there
        monkeypatch.setattr(preflight, name, lambda *_, **__: None)
    monkeypatch.delenv("QCONVERT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def qconvert_cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def run(*arguments: str) -> Result:
    return qconvert_cli("run", "--model", "M", "--output", "OUT", *arguments)


def test_every_command_exists_and_says_what_it_does() -> None:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(60).endswith(".")  # a whole sentence, not cut off


# --- flags and recipe ---


def test_flags_alone_make_a_recipe(pipeline: FakePipeline) -> None:
    flags = "--quantizer awq --scheme int4-g32 --option grid=20 --option fast=true --option name=x "
    flags += "--rule lm_head=float --rule *.0.*=int8 "
    flags += "--calibration c.txt --evaluation builtin --target cpu --target cuda --layout onnx --ranges kl --device cuda "
    flags += "--gate ratio<=0.3 --no-verify --timing-seconds 2.5 --allow-unverified --force"
    assert run(*flags.split()).exit_code == 0
    assert pipeline.given == Recipe.model_validate(
        {
            "model": "M",
            "output": "OUT",
            "quantizer": "awq",
            "scheme": "int4-g32",
            "options": {"grid": 20, "fast": True, "name": "x"},
            "rules": [{"pattern": "lm_head", "scheme": "float"}, {"pattern": "*.0.*", "scheme": "int8-channel"}],
            "calibration": {"source": "c.txt"},
            "evaluation": {"source": "builtin"},
            "targets": ["cpu", "cuda"],
            "layout": "onnx",
            "ranges": {"estimator": "kl"},
            "device": "cuda",
            "gates": [{"metric": "ratio", "comparison": "<=", "limit": 0.3}],
            "verify": False,
            "timing_seconds": 2.5,
            "allow_unverified": True,
            "force": True,
        }
    )


def test_a_budget_goes_with_auto(pipeline: FakePipeline) -> None:
    assert run("--quantizer", "auto", "--budget", "90MB").exit_code == 0
    assert pipeline.given == Recipe(model="M", output=Path("OUT"), quantizer="auto", budget="90MB")
    assert run("--quantizer", "awq", "--budget", "90MB").exit_code == 2


def test_without_flags_the_recipe_keeps_its_defaults(pipeline: FakePipeline) -> None:
    run()
    assert pipeline.given == Recipe(model="M", output=Path("OUT"))


FILE = """
model: from-file
output: from-file-out
quantizer: awq
options: {grid: 20, clip: true}
rules: [{pattern: lm_head, scheme: float}]
calibration: {source: file.txt, samples: 7, length: 64}
gates: [{metric: kl, comparison: "<=", limit: 0.2}, {metric: ratio, comparison: "<=", limit: 0.3}]
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE)
    return str(path)


def test_a_recipe_file_is_enough(pipeline: FakePipeline, recipe_file: str) -> None:
    assert qconvert_cli("run", recipe_file).exit_code == 0
    assert (pipeline.given.model, pipeline.given.quantizer, pipeline.given.calibration.samples) == ("from-file", "awq", 7)


def test_flags_override_the_file_and_leave_the_rest(pipeline: FakePipeline, recipe_file: str) -> None:
    flags = "--model other --option grid=5 --rule *=int8 --calibration mine.txt --gate kl<=0.1"
    qconvert_cli("run", recipe_file, *flags.split())
    recipe = pipeline.given
    assert (recipe.model, recipe.output, recipe.quantizer) == ("other", Path("from-file-out"), "awq")
    assert recipe.options == {"grid": 5, "clip": True}
    assert [rule.pattern for rule in recipe.rules] == ["*", "lm_head"]  # the first match wins
    assert (recipe.calibration.source, recipe.calibration.samples, recipe.calibration.length) == ("mine.txt", 7, 64)
    assert {gate.metric: gate.limit for gate in recipe.gates} == {"kl": 0.1, "ratio": 0.3}


@pytest.mark.parametrize(
    ("written", "flag", "expected"),
    [
        ("{options: {percentile: 99}, estimator: percentile}", "percentile", {"percentile": 99}),
        ("{options: {percentile: 99}, estimator: percentile}", "kl", {}),
        ("null", "mse", {}),
    ],
    ids=["the-same", "another", "none"],
)
def test_ranges_keep_the_options_of_the_file_for_the_same_estimator(
    pipeline: FakePipeline, tmp_path: Path, written: str, flag: str, expected: dict[str, object]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{FILE}ranges: {written}\n")
    qconvert_cli("run", str(path), "--ranges", flag)
    assert pipeline.given.ranges == Ranges(estimator=flag, options=expected)


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (["--option", "grid"], "QC-USAGE-002", "'grid'"),
        (["--option", "grid=[1"], "QC-USAGE-002", "'grid=[1'"),
        (["--rule", "lm_head"], "QC-RECIPE-002", "'lm_head'"),
        (["--rule", "lm_head=int5"], "QC-SCHEME-001", "'int5'"),
        (["--scheme", "int5"], "QC-SCHEME-001", "'int5'"),
        (["--gate", "kl=0.2"], "QC-RECIPE-003", "'kl=0.2'"),
        (["--option", "grid=" + "[" * 1000], "QC-USAGE-002", "'grid=[[["),
        (["no.yaml"], "QC-RECIPE-004", "no.yaml"),
    ],
)
def test_a_wrong_flag_is_a_usage_error_that_quotes_it(
    pipeline: FakePipeline, arguments: list[str], code: str, names: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert code in result.stderr
    assert names in result.stderr
    assert "  next: " in result.stderr
    assert pipeline.given is None


def test_missing_model_and_output_name_the_flags(pipeline: FakePipeline) -> None:
    result = qconvert_cli("run")
    assert result.exit_code == 2
    assert "[QC-USAGE-003] no model and no output given" in result.stderr
    assert "--model SOURCE --output DIR" in result.stderr


def test_a_flag_that_adds_to_a_malformed_part_of_the_file_says_so(pipeline: FakePipeline, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("rules: all")
    result = run("r.yaml", "--rule", "*=int8")
    assert result.exit_code == 2
    assert "[QC-USAGE-004] the recipe's 'rules' is 'all'" in result.stderr


# --- stdout, stderr ---


def test_run_prints_the_folder_on_stdout_and_the_table_on_stderr(pipeline: FakePipeline) -> None:
    result = run()
    assert result.stdout == "OUT\n"
    assert result.stderr.startswith("computes what its weights say; no limits set - absmax, int8-tensor-a8, module")


def test_run_with_json_prints_exactly_the_report(pipeline: FakePipeline) -> None:
    assert json.loads(run("--json").stdout) == REPORT.document()


def test_verify_hands_over_its_flags(pipeline: FakePipeline) -> None:
    result = qconvert_cli("verify", "OUT", "--target", "cpu", "--evaluation", "e.txt", "--gate", "kl<=0.2", "--json")
    folder, targets, evaluation, (gate,) = pipeline.given
    assert (folder, targets, evaluation) == (Path("OUT"), ("cpu",), "e.txt")
    assert (gate.metric, gate.comparison, gate.limit) == ("kl", "<=", 0.2)
    assert json.loads(result.stdout) == REPORT.document()


def test_plan_prints_the_plan(pipeline: FakePipeline) -> None:
    from qconvert.ir.plan import LayerPlan, Plan
    from qconvert.ir.scheme import QuantScheme

    name, scheme = "a_long_name." * 8 + "fc", QuantScheme.parse("int8-channel")
    pipeline.result = Plan(scheme, {name: LayerPlan(name, "linear", 4, 8, scheme)}, (), False, 100, {"trace": 200})
    arguments = ("plan", "--model", "M", "--output", "OUT")
    assert name in qconvert_cli(*arguments).stdout  # in a pipe, not folded
    document = json.loads(qconvert_cli(*arguments, "--json").stdout)
    assert document["layers"] == [
        {"name": name, "kind": "linear", "shape": [4, 8], "scheme": "int8-channel", "bytes": 4 * 8 + 4 * 4 + 16}
    ]


def test_what_a_plugin_or_library_prints_does_not_reach_stdout(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "answer", lambda: print("chatter") or REPORT)
    result = run("--json")
    assert json.loads(result.stdout) == REPORT.document()
    assert "chatter" in result.stderr


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 8 bytes")])
def test_a_lack_of_memory_is_no_internal_error(pipeline: FakePipeline, error: Exception) -> None:
    pipeline.result = error
    result = run("--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["error"]["code"] == "QC-MEMORY-001"


def test_qconverts_warnings_are_shown_and_those_of_libraries_are_not(
    pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy() -> Report:
        warnings.warn("library warning", UserWarning, stacklevel=1)
        logging.getLogger("transformers").warning("library log")
        logging.getLogger("qconvert.plugin.host.manager").warning("plugin x is left out")
        return REPORT

    monkeypatch.setattr(pipeline, "answer", noisy)
    stderr = run().stderr
    assert "warning: plugin x is left out" in stderr
    assert "library" not in stderr


def test_control_characters_in_names_reach_no_terminal(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a\x1b]0;owned\x07\x9b2J"

    def warned() -> Report:
        logging.getLogger("qconvert").warning("tensor %s is left out", name)
        raise errors.InputError("QC-TEST-001", f"tensor {name} is NaN", hint=f"--rule '{name}=float'")

    monkeypatch.setattr(pipeline, "answer", warned)
    result = run("--json")
    assert result.exit_code == 3
    assert not {"\x1b", "\x07", "\x9b"} & {*result.stderr, *result.stdout, *json.loads(result.stdout)["error"]["message"]}
    assert result.stderr.count(r"a\x1b]0;owned\x07\x9b2J") == 3


# --- exit codes ---


def test_not_verified_is_no_failure(pipeline: FakePipeline) -> None:
    pipeline.result = REPORT.model_copy(update={"passed": None})
    result = run("--no-verify")
    assert result.exit_code == 0
    assert result.stderr.startswith("not verified")


def test_gates_that_need_a_run_are_refused_without_one(pipeline: FakePipeline) -> None:
    result = run("--no-verify", "--gate", "kl<=0.2", "--gate", "ratio<=0.3", "--gate", "speedup>=2", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "QC-GATE-001"
    assert error["message"].endswith("limit: kl<=0.2, speedup>=2")
    assert pipeline.given is None


@pytest.mark.parametrize("arguments", [("run", "--model", "M", "--output", "OUT"), ("verify", "OUT")])
def test_a_missed_gate_is_exit_code_1_and_still_a_report(pipeline: FakePipeline, arguments: tuple[str, ...]) -> None:
    pipeline.result = MISSED
    result = qconvert_cli(*arguments, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert "kl <= 0.2: 0.5, MISSED" in result.stderr


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.UsageError, 2),
        (errors.InputError, 3),
        (errors.PluginError, 4),
        (errors.ParityError, 5),
        (errors.ResourceError, 6),
        (errors.TargetError, 7),
    ],
)
def test_every_error_has_its_exit_code_and_its_document(
    pipeline: FakePipeline, kind: type[errors.QConvertError], exit_code: int
) -> None:
    pipeline.result = kind("QC-TEST-001", "shard 'a' has 3 of 4 bytes", hint="download it again")
    result = run("--json")
    assert result.exit_code == exit_code
    assert json.loads(result.stdout) == {
        "error": {"code": "QC-TEST-001", "message": "shard 'a' has 3 of 4 bytes", "hint": "download it again"}
    }
    assert result.stderr == "error [QC-TEST-001] shard 'a' has 3 of 4 bytes\n  next: download it again\n"
    assert run().stdout == ""


def test_any_other_exception_is_an_internal_error_without_traceback(pipeline: FakePipeline) -> None:
    pipeline.result = RuntimeError("boom")
    result = run("--json")
    assert result.exit_code == 70
    assert json.loads(result.stdout)["error"]["code"] == "QC-INTERNAL-001"
    assert "internal error: RuntimeError: boom" in result.stderr
    assert "QCONVERT_DEBUG=1" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCONVERT_DEBUG", "1")
    pipeline.result = RuntimeError("boom")
    assert "Traceback (most recent call last)" in run().stderr


def test_interrupted_is_130(pipeline: FakePipeline) -> None:
    pipeline.result = KeyboardInterrupt()
    result = run("--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["message"] == "interrupted"


@pytest.mark.parametrize(
    "arguments", [["run", "--oops", "--json"], ["run", "--target", "tpu", "--json"], ["verify", "--json"]], ids=" ".join
)
def test_click_usage_errors_are_2_and_a_document_too(arguments: list[str]) -> None:
    result = qconvert_cli(*arguments)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == "QC-USAGE-001"
    assert "Usage: " in result.stderr


def test_unknown_commands_are_usage_errors() -> None:
    result = qconvert_cli("runn")
    assert result.exit_code == 2
    assert "No such command 'runn'" in result.stderr


def test_a_reader_of_stdout_that_has_gone_does_not_change_the_verdict() -> None:
    script = (
        "import sys, types, qconvert\n"
        "from qconvert.ir.report import Report, SampleCounts, Size\n"
        f"report = Report.model_validate_json({REPORT.model_dump_json()!r})\n"
        "fake = types.ModuleType('qconvert.pipeline.conversion'); fake.convert = lambda *_: report\n"
        "sys.modules['qconvert.pipeline.conversion'] = fake\n"
        "import qconvert.pipeline.preflight; qconvert.pipeline.preflight.check = lambda recipe: None\n"
        "from qconvert.cli import main; main(['run', '--model', 'M', '--output', 'O', '--json'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Broken" not in process.stderr.read()
    assert process.wait() == 0
