"""Several recipes on one model: each artifact is what its recipe alone gives, calibrated once, and none stops another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from comparisons import comparison, entry, failed
from tiny_models import tiny_bert, tiny_llama
from torch import Tensor

from qconvert.calibrate import Participant, calibrate, read_samples
from qconvert.calibrate.input_recorder import InputRecorder
from qconvert.cli.exits import worst
from qconvert.errors import PluginError, ResourceError, UsageError
from qconvert.execution.block_runner import BlockRunner
from qconvert.ir.artifact import CARD, GRAPH, MANIFEST, REPORT, WEIGHTS
from qconvert.ir.comparison import FILE, PLOT
from qconvert.ir.layer import Block, Layer
from qconvert.ir.progress import silent
from qconvert.ir.quantized import QuantizedBlock, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.job import Job
from qconvert.pipeline import comparison as comparing
from qconvert.pipeline import conversion, preparation
from qconvert.pipeline.comparison import Attempt, compare
from qconvert.plugin.host.manager import plugin_manager
from qconvert.plugin.observer import AbsMax
from qconvert.quantizers.absmax import AbsMaxQuantizer
from qconvert.recipe import Recipe
from qconvert.recipe.comparison import named_recipes

TRIES: dict[str, dict[str, Any]] = {
    "awq": {"quantizer": "awq", "scheme": "int4-g32"},
    "rounded": {"quantizer": "per-channel"},
    "outliers": {"quantizer": "llm-int8"},
    "mixed": {"quantizer": "awq", "scheme": "int8-channel", "rules": [{"pattern": "*.0.mlp.*", "scheme": "float"}]},
    "unfolded": {"quantizer": "awq", "layout": "onnx", "rules": [{"pattern": "lm_head", "scheme": "int4-g32-asym"}]},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    (root / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    tiny_llama(root / "llama")
    tiny_bert(root / "bert")
    return root


@pytest.fixture
def recipes(sources: Path, tmp_path: Path) -> Callable[..., dict[str, Recipe]]:
    """Of a tiny model, to be compared in tmp_path/out."""

    def make(tries: Mapping[str, dict[str, Any]], model: str = "llama", **common: Any) -> dict[str, Recipe]:
        data = {"source": str(sources / "text.txt"), "samples": 4, "length": 32}
        settings = {"model": str(sources / model), "output": str(tmp_path / "out"), "calibration": data, "evaluation": data}
        return named_recipes({**settings, "recipes": [{"name": name, **own} for name, own in tries.items()], **common})

    return make


Recipes = Callable[..., dict[str, Recipe]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an artifact but those that hold timings."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if name not in (REPORT, CARD)}


def alone(recipe: Recipe, folder: Path) -> dict[str, bytes]:
    """What `convert` makes of a recipe, in a folder as deep as the comparison's: manifests hold relative paths."""
    output = folder / "alone" / recipe.output.name
    conversion.convert(recipe.model_copy(update={"output": output}))
    return contents(output)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- each artifact is its recipe's ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("large", [False, True], ids=["statistics in memory", "statistics in files"])
def test_every_artifact_has_the_bytes_that_its_recipe_alone_gives(
    recipes: Recipes, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = recipes(TRIES, verify=False)
    with monkeypatch.context() as patched:
        if large:
            patched.setattr("qconvert.ir.large_tensors.LARGE", 0)
        compare(mine)
    for name, recipe in mine.items():
        expected, found = alone(recipe, tmp_path), contents(tmp_path / "out" / name)
        assert list(found) == list(expected)
        assert [file for file in found if found[file] != expected[file]] == [], name
    assert left(tmp_path / "out") == sorted([*TRIES, FILE])  # unverified: nothing to draw


@pytest.mark.usefixtures("quick")
def test_the_model_is_opened_calibrated_and_traced_once(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(preparation, "load")
    counted(preparation, "trace")
    counted(preparation, "file_digests")
    counted(comparing, "read_samples")
    counted(BlockRunner, "start")
    counted(conversion, "quantize")
    compare(recipes(TRIES, verify=False))
    assert {name: calls.count(name) for name in calls} == {
        "load": 1, "trace": 1, "file_digests": 1, "read_samples": 1, "start": 1,
        "quantize": 2 * len(TRIES) + 1,  # two blocks each, and the head that one of them quantizes
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_recipes_without_observers_run_no_block(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockRunner, "start", None)
    found = compare(recipes({"a": {"quantizer": "absmax"}, "b": {"quantizer": "per-channel"}}, verify=False))
    assert [entry.error for entry in found.entries] == [None, None]


def test_what_a_participant_gets_is_what_it_would_get_alone(recipes: Recipes) -> None:
    plugins = plugin_manager()
    mine = recipes(TRIES)
    model = preparation.load_model(mine["awq"], plugins, silent)
    samples = read_samples(model, mine["awq"], True)
    template, _ = preparation.open_model(model, samples, silent)
    participants = {}
    for name, recipe in mine.items():
        quantizer = plugins.quantizer(recipe.quantizer, {})
        plan = preparation.outline(recipe, quantizer, model, template)
        participants[name] = Participant(Job(recipe, recipe, quantizer, model, template, plan, samples))
    together: dict[str, list[Block]] = {name: [] for name in mine}
    for block in calibrate(list(participants.values())):
        for name, participant in participants.items():
            if block.name in participant.units:
                together[name].append(participant.part_of(block))
    for name, participant in participants.items():
        expected = calibrate([participant])
        assert list(map(described, together[name])) == list(map(described, expected)), name


def described(block: Block) -> Any:
    """All that a block holds, tensors as numbers."""

    def tensors(values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: value.tolist() for name, value in values.items()}

    def layer(part: Layer) -> Any:
        stats = part.stats and (part.stats.rows, tensors(part.stats.values))
        return part.name, part.kind, part.weight.tolist(), part.bias is None, stats

    groups = [(group.producer, group.stats is None, list(map(layer, group.layers))) for group in block.groups]
    return block.name, groups, tensors(block.tensors), block.lane is None, block.samples


class OtherAbsMax(AbsMax):
    """Another statistic under a name that is taken."""


def test_two_observers_with_one_name_are_refused(recipes: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(AbsMaxQuantizer, "observers", (OtherAbsMax,))
    with pytest.raises(PluginError, match="llm-int8 and absmax both observe something under the name 'absmax'") as caught:
        compare(recipes({"a": {"quantizer": "llm-int8"}, "b": {"quantizer": "absmax"}}, verify=False))
    assert caught.value.code == "QC-COMPARE-005"
    assert left(tmp_path / "out") == []


@pytest.mark.usefixtures("quick")
def test_a_recipe_that_can_not_share_calibrates_on_its_own(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attempt, "calibrates_alone", property(lambda attempt: attempt.name == "mixed"))
    mine = recipes({name: TRIES[name] for name in ("awq", "mixed")}, verify=False)
    first, second = compare(mine).entries
    assert contents(tmp_path / "out" / "mixed") == alone(mine["mixed"], tmp_path)
    assert first.quantize_seconds is not None
    assert second.report is not None
    assert second.quantize_seconds is not None


# --- one that fails stops no other ---


def damaged_graph(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.5
    (folder / GRAPH).write_bytes(model.SerializeToString())


@pytest.mark.usefixtures("quick")
def test_each_failure_is_in_the_result_and_the_others_are_published(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conversion.export  # type: ignore[attr-defined]

    def export(*args: Any, **settings: Any) -> None:
        real(*args, **settings)
        if args[-1].output.name == "damaged":
            damaged_graph(args[-1].folder)
        if args[-1].output.name == "bug":
            raise RuntimeError("boom")

    monkeypatch.setattr(conversion, "export", export)
    gates = [{"metric": "kl", "comparison": "<=", "limit": 1e-9}]
    tries = {
        "odd": {"quantizer": "awq", "scheme": "int8-channel-a8"},
        "damaged": {"quantizer": "absmax"},
        "strict": {"quantizer": "per-channel", "gates": gates},
        "bug": {"quantizer": "per-channel"},
        "good": {"quantizer": "llm-int8"},
    }
    found = compare(recipes(tries))
    codes = {entry.name: entry.error.code if entry.error else None for entry in found.entries}
    assert codes == {
        "odd": "QC-PLAN-002", "damaged": "QC-PARITY-001", "strict": None, "bug": "QC-INTERNAL-001", "good": None
    }  # fmt: skip
    assert [entry.passed for entry in found.entries] == [False, False, False, False, True]
    assert [name for name in left(tmp_path / "out") if not name.startswith(".")] == [FILE, PLOT, "good", "strict"]
    assert worst(found) == 70


def test_the_exit_code_is_the_highest_of_all() -> None:
    good, missed = entry("good"), entry("missed", passed=False)
    assert worst(comparison(good, entry("unverified", passed=None))) == 0
    assert worst(comparison(good, missed)) == 1
    assert worst(comparison(failed("b", 2), good, missed)) == 2
    assert worst(comparison(failed("a", 5), failed("b", 2))) == 5
    assert worst(comparison(failed("a", 5), failed("b", 70), good)) == 70


@pytest.mark.usefixtures("quick")
def test_when_all_fail_there_is_still_a_document(recipes: Recipes, tmp_path: Path) -> None:
    found = compare(
        recipes({"a": {"quantizer": "llm-int8", "scheme": "int4-g32"}, "b": {"quantizer": "awq", "scheme": "int8-channel-a8"}})
    )
    assert worst(found) == 2
    assert left(tmp_path / "out") == [FILE]


@pytest.mark.usefixtures("quick")
def test_a_quantizer_that_writes_to_its_input_harms_no_other(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 weights are views of the mapped file, which a second reader would get as the first has left them."""
    mine = recipes({"bad": {"quantizer": "absmax"}, "good": {"quantizer": "awq"}}, verify=False)
    expected = alone(mine["good"], tmp_path)

    def quantize(self: AbsMaxQuantizer, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        layer.weight.zero_()
        raise ValueError("and it raises")

    monkeypatch.setattr(AbsMaxQuantizer, "quantize", quantize)
    bad, _ = compare(mine).entries
    assert bad.error is not None
    assert bad.error.code == "QC-PLUGIN-007"
    assert contents(tmp_path / "out" / "good") == expected


@pytest.mark.usefixtures("quick")
def test_a_layer_that_no_sample_reaches_fails_only_the_recipes_that_observe_it(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = InputRecorder._see

    def blind(self: InputRecorder, index: int, *args: Any) -> None:
        if not self.groups[index].layers[0].endswith("0.mlp.gate_proj"):
            real(self, index, *args)

    monkeypatch.setattr(InputRecorder, "_see", blind)
    tries = {name: TRIES[name] for name in ("awq", "rounded", "mixed")}  # "mixed" leaves that layer in float
    codes = [entry.error and entry.error.code for entry in compare(recipes(tries, verify=False)).entries]
    assert codes == ["QC-CALIB-001", None, None]


@pytest.mark.usefixtures("quick")
def test_an_error_of_the_calibration_reaches_the_user_and_leaves_nothing(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ResourceError("QC-TEST-001", "no memory", hint="buy some")

    monkeypatch.setattr(BlockRunner, "start", fail)
    with pytest.raises(ResourceError, match="no memory"):
        compare(recipes(TRIES, verify=False))
    assert left(tmp_path / "out") == []


@pytest.mark.usefixtures("quick")
def test_an_interrupted_comparison_publishes_nothing_and_is_resumed_by_the_same_command(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = recipes({name: TRIES[name] for name in ("awq", "rounded")}, verify=False)
    real, quantized = conversion.quantize, []  # type: ignore[attr-defined, var-annotated]

    def interrupted(block: Block, job: Job) -> QuantizedBlock:
        if len(quantized) == 3:  # awq has both blocks, the other one
            raise KeyboardInterrupt
        quantized.append(block.name)
        return real(block, job)

    monkeypatch.setattr(conversion, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(mine)
    assert [name for name in left(tmp_path / "out") if not name.startswith(".")] == []
    quantized.clear()
    found = compare(mine)
    assert quantized == ["model.layers.1"]
    assert [entry.quantize_seconds for entry in found.entries] == [None, None]  # of this run alone, they would mislead
    monkeypatch.setattr(conversion, "quantize", real)  # for `alone`
    for name, recipe in mine.items():
        assert contents(tmp_path / "out" / name) == alone(recipe, tmp_path)
    assert left(tmp_path / "out") == sorted([*mine, FILE])


# --- what is in the way ---


@pytest.mark.parametrize(
    ("there", "code"),
    [("out", "QC-OUTPUT-003"), ("out/awq/x", "QC-OUTPUT-004"), (f"out/{FILE}", "QC-OUTPUT-004")],
)
def test_what_is_in_the_way_is_refused_before_the_model_is_loaded(
    there: str, code: str, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "load", None)
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("")
    with pytest.raises(UsageError) as caught:
        compare(recipes(TRIES))
    assert caught.value.code == code


def test_an_unknown_quantizer_is_refused_before_the_model_is_loaded(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "load", None)
    with pytest.raises(UsageError, match="no quantizer 'aqw'"):
        compare(recipes({"a": {"quantizer": "per-channel"}, "b": {"quantizer": "aqw"}}))


# --- what it leaves ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_the_document_has_an_entry_per_recipe_and_says_what_was_measured(model: str, recipes: Recipes, tmp_path: Path) -> None:
    tries = {"awq": TRIES["awq"], "rounded": TRIES["rounded"], "odd": {"quantizer": "awq", "scheme": "int8-channel-a8"}}
    compare(recipes(tries, model, force=True))
    document = json.loads((tmp_path / "out" / FILE).read_text())
    assert {key: document[key] for key in ("schema", "model", "task")} == {
        "schema": 1, "model": model, "task": "causal-lm" if model == "llama" else "encoder"
    }  # fmt: skip
    always = {"name", "quantizer", "scheme", "passed", "pareto", "error"}
    sized = {"weights_bytes", "ratio", "average_bits", "target", "p50_ms", "float_p50_ms", "speedup", "quantize_seconds"}
    own = {"kl", "top1", "perplexity", "prefill_tokens_per_s", "decode_tokens_per_s"} if model == "llama" else {"cosine"}
    *good, odd = document["recipes"]
    assert [set(entry) - {"others_share"} for entry in good] == [always | sized | own] * 2  # which not every system tells
    assert set(odd) == always
    assert {key: odd[key] for key in always - {"error"}} == {
        "name": "odd", "quantizer": "awq", "scheme": "int8-channel-a8", "passed": False, "pareto": False
    }  # fmt: skip
    assert (odd["error"]["code"], set(odd["error"])) == ("QC-PLAN-002", {"code", "message", "hint"})
    for each in good:
        report = json.loads((tmp_path / "out" / each["name"] / REPORT).read_text())
        assert each["weights_bytes"] == report["size"]["weights_bytes"]
        assert {key: each[key] for key in own & report["fidelity"][0].keys()} == {
            key: report["fidelity"][0][key] for key in own & report["fidelity"][0].keys()
        }
        assert (tmp_path / "out" / each["name"] / MANIFEST).exists()
        assert (tmp_path / "out" / each["name"] / WEIGHTS).exists()
    assert (tmp_path / "out" / PLOT).read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "out" / "awq")  # --force also where some of it is gone
    compare(recipes({"awq": TRIES["awq"]}, model, force=True, verify=False))
    assert left(tmp_path / "out") == ["awq", FILE, "rounded"]  # no plot of what is not measured
