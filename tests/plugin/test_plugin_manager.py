"""Plugins: how they are found, asked, and isolated from each other."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import broken_plugins
import pytest

from qconvert import quantizers
from qconvert.errors import InputError, PluginError, UsageError
from qconvert.ir.report import Report, SampleCounts, Size
from qconvert.plugin.host import calls
from qconvert.plugin.host.manager import BUILTINS, PluginManager, plugin_manager
from qconvert.recipe import Recipe

QUANTIZER = """
from dataclasses import dataclass
from typing import ClassVar, Literal
from qconvert import hookimpl
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import Quantizer, round_to_nearest

@hookimpl
def register_quantizers():
    return [Nearest]

@dataclass(frozen=True)
class Nearest(Quantizer):
    name: ClassVar[str] = "nearest"
    default_scheme: ClassVar[QuantScheme] = QuantScheme.parse("int8")
    clip: float = 1.0
    grid: int = 20
    mode: Literal["fast", "exact"] = "fast"

    def __post_init__(self):
        if not 0 < self.clip <= 1:
            raise ValueError("clip must be in (0, 1]")

    def quantize(self, layer, scheme):
        return round_to_nearest(layer.weight, scheme, self.clip)
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution `qconvert-NAME` with one module `qconvert_NAME` and one entry point on sys.path."""
    modules = []

    def install(name: str, source: str, *, version: str = "1.2", value: str = "") -> str:
        module = f"qconvert_{name}"
        modules.append(module)
        broken_plugins.install(tmp_path, name, source, version=version, value=value)
        monkeypatch.syspath_prepend(str(tmp_path))
        ours = ",".join(installed.replace("_", "-") for installed in modules)
        monkeypatch.setenv("QCONVERT_PLUGINS", ours)  # whatever else is installed here
        return module

    yield install
    for module in modules:
        sys.modules.pop(module, None)


# --- finding plugins ---


def test_a_plugin_is_found_by_its_entry_point_and_named_by_its_distribution(install: Install) -> None:
    install("nearest", QUANTIZER)
    manager = PluginManager(())
    quantizer = manager.quantizer("nearest", {})
    assert manager.broken == []
    assert quantizer.name == "nearest"
    assert str(manager.distribution_of(quantizer)) == "qconvert-nearest 1.2"


def test_built_ins_register_through_the_same_hook(install: Install) -> None:
    module = install("builtin", QUANTIZER, value="nowhere")  # its entry point is broken, its module is named directly
    assert PluginManager((module,)).quantizer("nearest", {}).name == "nearest"


def test_the_built_ins_are_named_in_one_tuple() -> None:
    folder = Path(quantizers.__file__).parent
    registering = {path.stem for path in folder.glob("*.py") if "def register_quantizers" in path.read_text(encoding="utf-8")}
    assert {name.rpartition(".")[2] for name in BUILTINS} == registering


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def broken(:", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("from qconvert import hookimpl\n@hookimpl\ndef load_model(sauce): ...", "sauce"),
        ("from qconvert import hookimpl\n@hookimpl\ndef register_quantizer(): ...", "unknown hook 'register_quantizer'"),
        ("def register_quantizers(): return []", "implements no hook: decorate its functions with @qconvert.plugin.hookimpl"),
    ],
    ids=["import-error", "syntax-error", "exits", "wrong-argument", "misspelt-hook", "no-hookimpl"],
)
def test_a_broken_plugin_is_reported_once_and_the_rest_works(
    install: Install, caplog: pytest.LogCaptureFixture, source: str, reason: str
) -> None:
    """Fault 18."""
    install("aaa_broken", source, version="0.3")
    install("nearest", QUANTIZER)
    manager = PluginManager(())
    (broken,) = manager.broken
    assert (str(broken.distribution), broken.value) == ("qconvert-aaa_broken 0.3", "qconvert_aaa_broken")
    assert reason in broken.reason
    assert broken.reason.split(":")[0] in broken.traceback
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"plugin qconvert-aaa_broken 0.3 (qconvert_aaa_broken): {broken.reason}" in record.getMessage()
    assert manager.quantizer("nearest", {}).name == "nearest"


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("Nearest", "returned ABCMeta, not a list of Quantizer classes"),
        ("[dict]", "which is no Quantizer class"),
        ("[Thawed]", "Thawed is no frozen dataclass"),
        ("[Unnamed]", "Unnamed lacks a name"),
    ],
    ids=["raises", "no-list", "no-quantizer", "not-frozen", "no-name"],
)
def test_what_register_quantizers_returns_is_checked(install: Install, returned: str, reason: str) -> None:
    others = "@dataclass(frozen=True)\nclass Unnamed(Quantizer): ...\n@dataclass\nclass Thawed(Quantizer): ...\n"
    install("odd", QUANTIZER.replace("return [Nearest]", f"return {returned}") + others)
    manager = PluginManager(())
    with pytest.raises(PluginError):
        manager.quantizer("nearest", {})
    assert reason in manager.broken[0].reason


# --- asking for a quantizer ---


def test_an_unknown_quantizer_is_a_usage_error_with_the_closest_name(install: Install) -> None:
    install("nearest", QUANTIZER)
    with pytest.raises(UsageError) as raised:
        PluginManager(()).quantizer("nearst", {})
    assert raised.value.code == "QC-PLUGIN-002"
    assert "'nearst'" in raised.value.message
    assert raised.value.hint == "did you mean 'nearest'? known are nearest"


def test_an_unknown_quantizer_is_the_broken_plugins_fault_if_there_is_one(install: Install) -> None:
    """Fault 18."""
    install("kmeans", "import no_such_module_at_all", version="0.3")
    with pytest.raises(PluginError) as raised:
        PluginManager(()).quantizer("kmeans", {})
    assert raised.value.code == "QC-PLUGIN-001"
    assert "qconvert-kmeans 0.3 (qconvert_kmeans): ModuleNotFoundError" in raised.value.message


def test_two_plugins_with_one_quantizer_name_are_both_named(install: Install) -> None:
    install("one", QUANTIZER)
    install("two", QUANTIZER.replace('"nearest"', '"other"').replace("[Nearest]", "[Nearest, Clash]") + CLASH, version="2.0")
    manager = PluginManager(())
    with pytest.raises(PluginError) as raised:
        manager.quantizer("nearest", {})
    assert raised.value.code == "QC-PLUGIN-003"
    assert "qconvert-one 1.2 (qconvert_one) and qconvert-two 2.0 (qconvert_two)" in raised.value.message
    assert manager.quantizer("other", {}).name == "other"  # only the name in doubt is refused


CLASH = '\n@dataclass(frozen=True)\nclass Clash(Nearest):\n    name: ClassVar[str] = "nearest"\n'


def test_options_become_the_quantizers_fields(install: Install) -> None:
    install("nearest", QUANTIZER)
    quantizer: Any = PluginManager(()).quantizer("nearest", {"clip": "1e-1", "grid": 5, "mode": "exact"})
    assert (quantizer.clip, quantizer.grid, quantizer.mode) == (0.1, 5, "exact")  # YAML reads 1e-1 as text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clp": 1}, "has no option 'clp'"),
        ({"grid": 2.5}, "grid: Input should be a valid integer"),
        ({"mode": "slow"}, "mode: Input should be 'fast' or 'exact', got 'slow'"),
        ({"clip": 2.0}, "clip must be in (0, 1]"),
    ],
    ids=["name", "type", "choice", "range"],
)
def test_wrong_options_are_usage_errors_that_list_the_right_ones(
    install: Install, options: dict[str, object], words: str
) -> None:
    install("nearest", QUANTIZER)
    with pytest.raises(UsageError) as raised:
        PluginManager(()).quantizer("nearest", options)
    assert raised.value.code == "QC-PLUGIN-004"
    assert words in raised.value.message
    assert "clip (float), grid (int), mode (" in raised.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": "max"}, "clip: Input should be 'none', 'mse' or 'percentile', got 'max'"),
        ({"clip": None}, "clip: Input should be 'none', 'mse' or 'percentile', got None"),
        ({"clip": "percentile", "percentile": 0.999}, "percentile must be above 50 and at most 100"),
        ({"percentile": "high"}, "percentile: Input should be a valid number"),
    ],
    ids=["unknown", "null", "range", "type"],
)
@pytest.mark.parametrize("name", ["absmax", "zero-point", "per-channel"])
def test_wrong_options_of_clipping_are_usage_errors_that_list_the_right_ones(
    name: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError) as raised:
        plugin_manager().quantizer(name, options)
    assert raised.value.code == "QC-PLUGIN-004"
    assert words in raised.value.message
    assert raised.value.hint == (f"options of {name} are: clip (Literal['none', 'mse', 'percentile']), percentile (float)")


def test_a_quantizer_that_fails_to_start_is_a_plugin_error(install: Install) -> None:
    install(
        "nearest", QUANTIZER.replace('raise ValueError("clip must be in (0, 1]")', "{}['x']").replace("if not 0 <", "if 0 <")
    )
    with pytest.raises(PluginError, match=r"'nearest' of qconvert-nearest 1\.2 could not be set up: KeyError: 'x'") as raised:
        PluginManager(()).quantizer("nearest", {})
    assert raised.value.code == "QC-PLUGIN-005"


# --- loading models ---

LOADER = "from qconvert import hookimpl\n@hookimpl\ndef load_model(source):\n    {}\n"
MODEL = (
    "import torch; from torch import nn; from types import SimpleNamespace; from qconvert.ir.model import Model, TensorInfo; "
    "Source = lambda tensors: SimpleNamespace(tensors=tensors); "
    "return Model(**dict(dict(name=source, task='module', module=nn.Identity().eval(), source=Source({{}})), **dict({})))"
)


def test_a_source_that_no_plugin_knows_is_none(install: Install) -> None:
    install("loader", LOADER.format("return None"))
    assert PluginManager(()).load_model("x") is None


def test_a_model_from_a_plugin_is_returned(install: Install) -> None:
    from qconvert.ir.model import Model

    install("loader", LOADER.format(MODEL.format("")))
    model = PluginManager(()).load_model("x.gguf")
    assert isinstance(model, Model)
    assert model.name == "x.gguf"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "failed to load 'x.gguf': ZeroDivisionError"),
        ("return 3", "broke its contract at 'x.gguf': it returned int, not a Model"),
        (MODEL.format("task='chat'"), "its task 'chat' is none of causal-lm"),
        (MODEL.format("module=nn.Identity()"), "its module is in training mode"),
        (MODEL.format("blocks=('layers.0',)"), "its block 'layers.0' is no module of it"),
        (MODEL.format("source=None"), "its source is NoneType, which has no tensors"),
        (MODEL.format("module=nn.Linear(2, 3).eval()"), "no tensor 'weight', which the parameter 'weight' is read from"),
        (
            MODEL.format("module=nn.Linear(2, 3).eval(), source=Source({'weight': TensorInfo(torch.float32, (2, 3))})"),
            "tensor 'weight' is [2, 3], but the parameter 'weight' is [3, 2]",
        ),
    ],
    ids=["raises", "no-model", "task", "training", "block", "no-source", "no-tensor", "shape"],
)
def test_a_failing_loader_is_a_plugin_error(install: Install, body: str, words: str) -> None:
    """Fault 18."""
    install("loader", LOADER.format(body))
    with pytest.raises(PluginError) as raised:
        PluginManager(()).load_model("x.gguf")
    assert raised.value.code == "QC-PLUGIN-006"
    assert raised.value.message.startswith("plugin qconvert-loader 1.2 ")
    assert words in raised.value.message


READER = """
class Reader:
    def __init__(self):
        self.tensors = {'weight': TensorInfo(torch.float32, (3, 2))}

    def read(self, name):
        os.umask(0o777)
        return READ
"""


def reading(read: str) -> str:
    """A loader whose model has one tensor, which it reads as the expression `read`."""
    loader = LOADER.format(MODEL.format("module=nn.Linear(2, 3, bias=False).eval(), source=Reader()"))
    return f"import os, torch\nfrom qconvert.ir.model import TensorInfo\n{loader}{READER.replace('READ', read)}"


@pytest.mark.parametrize(
    ("read", "words"),
    [
        ("torch.ones(3, 2) / name", "failed to read 'weight': TypeError"),
        ("[1.0, 2.0]", "read list for the tensor 'weight'"),
        ("torch.ones(2, 3)", "read torch.float32 [2, 3] for the tensor 'weight', which is torch.float32 [3, 2]"),
        ("torch.ones(3, 2).half()", "read torch.float16 [3, 2] for the tensor 'weight', which is torch.float32 [3, 2]"),
    ],
)
def test_what_a_loader_reads_is_checked_and_blamed_on_it(install: Install, read: str, words: str) -> None:
    install("loader", reading(read))
    model = PluginManager(()).load_model("x.gguf")
    assert model is not None
    with pytest.raises(PluginError) as raised:
        model.read("weight")
    assert raised.value.code == "QC-PLUGIN-006"
    assert raised.value.message.startswith(f"plugin qconvert-loader 1.2 {words}")


def test_reading_leaves_the_process_as_it_was(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calls, "_said", set())
    install("loader", reading("torch.ones(3, 2)"))
    model = PluginManager(()).load_model("x.gguf")
    assert model is not None
    assert model.read("weight").tolist() == [[1, 1]] * 3
    assert "qconvert-loader 1.2 changed what belongs to the whole process, and is put back: the umask" in caplog.text


def test_a_loader_may_reject_its_source(install: Install) -> None:
    body = "from qconvert.errors import InputError; raise InputError('QC-GGUF-001', 'truncated', hint='again')"
    install("loader", LOADER.format(body))
    with pytest.raises(InputError, match="QC-GGUF-001"):
        PluginManager(()).load_model("x.gguf")


# --- finding data ---

FINDER = "from pathlib import Path\nfrom qconvert import hookimpl\n@hookimpl\ndef find_data(source):\n    {}\n"


def test_data_is_found_by_the_plugin_that_knows_it(install: Install, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("text")
    install("finder", FINDER.format(f"return Path({str(tmp_path)!r}, 'prose.txt') if source == 'acme/prose' else None"))
    assert PluginManager(()).find_data("acme/prose") == tmp_path / "prose.txt"
    assert PluginManager(()).find_data("builtin") is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "failed to load 'acme/prose': ZeroDivisionError"),
        ("return 'prose.txt'", "broke its contract at 'acme/prose': it returned str, not a Path"),
        ("return Path('nonesuch.txt')", "it returned 'nonesuch.txt', which is no file"),
    ],
    ids=["raises", "no-path", "no-file"],
)
def test_a_failing_finder_is_a_plugin_error(install: Install, body: str, words: str) -> None:
    install("finder", FINDER.format(body))
    with pytest.raises(PluginError) as raised:
        PluginManager(()).find_data("acme/prose")
    assert raised.value.code == "QC-PLUGIN-006"
    assert words in raised.value.message


# --- after the conversion ---


def test_a_plugin_that_changes_the_published_output_is_a_warning(
    install: Install, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    body = "(recipe.output / 'report.json').write_text('better'); (recipe.output / 'new').touch()"
    install("one", f"from qconvert import hookimpl\n@hookimpl\ndef conversion_finished(recipe, report):\n    {body}\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    (out / "model.onnx").write_text("graph")
    PluginManager(()).conversion_finished(Recipe(model="M", output=out), finished_report())
    assert [record.getMessage() for record in caplog.records] == [
        "plugin qconvert-one 1.2 changed the published output, which it must not: new, report.json"
    ]


def finished_report() -> Report:
    size = Size(source_bytes=1, weights_bytes=1, graph_bytes=1, ratio=1, average_bits=8)
    samples = SampleCounts(calibration=0, evaluation=0)
    return Report(passed=True, task="module", quantizer="q", scheme="int8-channel", samples=samples, size=size)


def test_a_plugin_that_fails_after_the_conversion_is_a_warning_and_the_others_are_told(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    finished = "from qconvert import hookimpl\nseen = []\n@hookimpl\ndef conversion_finished(recipe, report):\n    {}\n"
    install("one", finished.format("raise SystemExit(1)"))
    told = install("two", finished.format("seen.append((recipe.model, report.passed))"))
    PluginManager(()).conversion_finished(Recipe(model="M", output=Path("O")), finished_report())
    assert sys.modules[told].seen == [("M", True)]
    assert [record.getMessage() for record in caplog.records] == [
        "plugin qconvert-one 1.2 failed after the conversion: SystemExit: 1"
    ]
