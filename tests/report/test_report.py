"""How a Report and a Plan look: on the terminal, as JSON, as a model card."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto
from rich.console import Console, RenderableType

from qconvert.graph import cuda_kernels
from qconvert.ir.decision import Assignment, KeptFloat
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.report import Fidelity, GateResult, Latency, LayerReport, Parity, Report, SampleCounts, Size
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.task import TASKS, TaskName
from qconvert.recipe import Recipe
from qconvert.report import plan as plan_view
from qconvert.report import wording
from qconvert.report.card import card
from qconvert.report.files import complete_report, write_report
from qconvert.report.table import table
from qconvert.targets import graph_files

REPORT = Report(
    passed=False,
    task="causal-lm",
    transformers_class="AutoModelForCausalLM",
    quantizer="awq",
    scheme="int4-g32",
    samples=SampleCounts(calibration=32, evaluation=24),
    size=Size(source_bytes=538_000_000, weights_bytes=98_300_000, graph_bytes=1_234_000, ratio=0.1827, average_bits=4.5),
    parity=(
        Parity(target="cpu", status="passed", max_relative_error=3.1e-6),
        Parity(target="cuda", status="not-run", reason="no CUDA provider in this ONNX Runtime; the graph was checked instead"),
    ),
    fidelity=(Fidelity(target="cpu", status="passed", kl=0.0123456, top1=0.941, perplexity=18.234, perplexity_float=17.92),),
    latency=(Latency(target="cpu", status="passed", threads=2, p50_ms=12.34, float_p50_ms=10.5, speedup=0.8509),),
    gates=(
        GateResult(metric="kl", comparison="<=", limit=0.2, value=0.0123, passed=True),
        GateResult(metric="speedup", comparison=">=", limit=2, value=0.8509, passed=False),
    ),
    layers=tuple(
        LayerReport(name=f"layers.{i}.fc", scheme="int4-g32", relative_error=0.05 + i / 1000, bytes=1) for i in range(30)
    ),
    kept_float=(
        KeptFloat(name="embed", reason="embeddings stay in float"),
        KeptFloat(name="lm_head", reason="a rule says so"),
        KeptFloat(name="pooler", reason="a rule says so"),
    ),
)
RECIPE = Recipe.model_validate(
    {
        "model": "/home/somebody/models/smollm2",
        "output": "/home/somebody/out",
        "quantizer": "awq",
        "scheme": "int4-g32",
        "options": {"grid": 5, "mode": "it's"},
        "rules": [{"pattern": "lm_*", "scheme": "float"}],
        "evaluation": {"source": "/home/somebody/eval.txt"},
        "gates": [{"metric": "kl", "comparison": "<=", "limit": 0.2}],
    }
)


KEPT = tuple(gate.model_copy(update={"passed": True}) for gate in REPORT.gates)
ON_CPU = REPORT.parity[:1]
UNRUN: dict[str, object] = {"parity": (), "fidelity": (), "latency": ()}


def but(**changes: object) -> Report:
    return REPORT.model_copy(update=changes)


def on_terminal(view: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# --- the table ---


@pytest.mark.parametrize("width", [80, 120])
def test_every_part_of_the_evidence_is_in_the_table(width: int) -> None:
    text = re.sub(r"\s+", " ", on_terminal(table(REPORT), width))
    for words in (
        "failed: 1 of 2 gates missed; not run on cuda - awq, int4-g32, causal-lm",
        "98.3 MB of weights, 0.183 x the source's 538.0 MB; 4.5 bits per quantized weight; graphs 1.2 MB",
        "cpu passed max relative error 3.1e-06",
        "cuda not-run no CUDA provider",
        "cpu measured KL 0.0123 nats, top-1 94.1%, perplexity 18.23 (float 17.92)",
        "slower than float: 0.85 x its speed, p50 12.3 ms (float 10.5 ms), 2 threads",
        "kl <= 0.2: 0.0123, kept",
        "speedup >= 2: 0.8509, MISSED",
        "32 for calibration, 24 for evaluation",
        "30 quantized: 30 int4-g32",
        "1 kept, embeddings stay in float: embed",
        "2 kept, a rule says so: lm_head, pooler",
    ):
        assert words in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut_off(width: int) -> None:
    long = but(
        kept_float=(KeptFloat(name="x" * 200, reason="r"),), layers=(REPORT.layers[0].model_copy(update={"name": "y" * 200}),)
    )
    text = on_terminal(table(long), width)
    assert max(map(len, text.splitlines())) <= width
    assert (text.count("x"), text.count("y")) >= (200, 200)
    assert "…" not in text


def test_layers_with_another_scheme_than_was_asked_for_are_listed_with_the_reason() -> None:
    narrow = LayerReport(name="fc", scheme="int4-g16", relative_error=0.05, bytes=1, reason="its width is odd")
    mixed = but(layers=(*REPORT.layers, narrow))
    assert "1 in int4-g16: its width is odd: fc" in on_terminal(table(mixed))
    assert "| another scheme than asked for | | 1 | int4-g16: its width is odd: fc |" in card(mixed, RECIPE, "m").replace(
        "  ", " "
    )
    assert mixed.document()["layers"][-1]["reason"] == "its width is odd"
    assert "reason" not in mixed.document()["layers"][0]


def test_the_five_worst_layers_are_listed_worst_first() -> None:
    names = re.findall(r"layers\.\d+\.fc", on_terminal(table(REPORT)))
    assert names == [f"layers.{i}.fc" for i in (29, 28, 27, 26, 25)]


@pytest.mark.parametrize(
    ("report", "headline"),
    [
        (but(passed=True, gates=KEPT, parity=ON_CPU), "passed: 2 of 2 gates kept"),
        (but(passed=True, gates=KEPT), "passed: 2 of 2 gates kept; not run on cuda"),
        (but(passed=True, gates=KEPT[1:], parity=ON_CPU), "passed: 1 of 1 gates kept; none limits what is lost"),
        (but(passed=True, gates=(), parity=ON_CPU), "computes what its weights say; no limits set"),
        (but(parity=ON_CPU), "failed: 1 of 2 gates missed"),
        (but(gates=(), parity=ON_CPU), "failed"),
        (but(passed=None, gates=(), **UNRUN), "not verified"),
        (but(passed=None, gates=KEPT[1:], **UNRUN), "not verified; 1 of 1 gates kept"),
        (but(passed=False, **UNRUN), "failed: 1 of 2 gates missed; not verified"),
    ],
)
def test_the_verdict_comes_first_and_claims_no_more_than_was_shown(report: Report, headline: str) -> None:
    assert on_terminal(table(report)).startswith(f"{headline} - awq")
    assert (headline[0].upper() + headline[1:] in card(report, RECIPE, "m")) is not (headline.startswith("passed: 2"))


@pytest.mark.parametrize(("gates", "green"), [((), False), (KEPT[1:], False), (KEPT, True)], ids=["none", "speed", "loss"])
def test_only_what_keeps_a_limit_on_its_loss_is_green(gates: tuple[GateResult, ...], green: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(table(but(passed=True, gates=gates, parity=ON_CPU)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert ("\x1b[32m" in lines[0]) is green
    assert [line for line in lines[1:] if "\x1b[32m" in line] == [line for line in lines if "max relative error" in line]


ASSIGNMENT = Assignment(budget="4.5", average_bits=4.4987, predicted_kl=0.0105, schemes={"int4-g64": 20, "int8-g32": 10})


def test_what_a_budget_decided_is_shown_with_predicted_and_measured_kl() -> None:
    decided = but(assignment=ASSIGNMENT)
    text = re.sub(r"\s+", " ", on_terminal(table(decided)))
    words = "4.499 bits per quantized weight for the budget 4.5, predicted KL 0.0105 nats, measured 0.0123 nats on cpu"
    assert " - awq, 4.5 bits, causal-lm" in text
    assert f"budget {words}" in text
    asked = RECIPE.model_copy(update={"quantizer": "auto", "budget": "4.5", "scheme": None})
    page = card(decided, asked, "smollm2")
    assert page.startswith("# smollm2, 4.5 bits\n")
    assert f"| budget |  | 4.5 | {words} |" in page
    assert "--quantizer auto --budget 4.5 " in page


def test_the_document_holds_an_assignment_only_where_there_is_one() -> None:
    assert "assignment" not in REPORT.document()
    assert but(assignment=ASSIGNMENT).document()["assignment"] == {
        "budget": "4.5",
        "average_bits": 4.4987,
        "predicted_kl": 0.0105,
        "schemes": {"int4-g64": 20, "int8-g32": 10},
    }


def test_a_report_of_nothing_but_its_size_is_short() -> None:
    parts = ("parity", "fidelity", "latency", "gates", "layers", "kept_float")
    lines = on_terminal(table(but(**dict.fromkeys(parts, ())))).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["size", "samples", "layers"]


WITH_OUTLIERS = but(
    layers=(
        LayerReport(name="a", scheme="int8-channel-a8", relative_error=0.01, bytes=1, outlier_share=0.03),
        LayerReport(name="b", scheme="int8-channel-a8", relative_error=0.01, bytes=1),
    )
)


def test_the_share_of_outlier_columns_is_shown_where_there_are_some() -> None:
    words = "1.50% of a layer's input columns kept in float beside the codes, on average; 1 of 2 layers have some"
    for text in (on_terminal(table(WITH_OUTLIERS)), card(WITH_OUTLIERS, RECIPE, "m")):
        assert words in re.sub(r"\s+", " ", text)
    for text in (on_terminal(table(REPORT)), card(REPORT, RECIPE, "m")):
        assert "outlier" not in text


def test_names_from_a_checkpoint_are_escaped() -> None:
    """Fault 6: names are opaque; a terminal must not obey them, nor rich read them as markup."""
    text = on_terminal(table(but(kept_float=(KeptFloat(name="a\x1b[31m\0[red]é", reason="r"),))))
    assert r"a\x1b[31m\x00[red]\xe9" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (5 * 10**15, "5000.0 TB")],
)
def test_byte_sizes(count: int, text: str) -> None:
    assert wording.byte_size(count) == text


# --- the document ---


def test_the_document_leaves_out_metrics_that_the_task_has_no_use_for() -> None:
    document = REPORT.document()
    assert document["schema"] == 1
    assert document["fidelity"] == [
        {"target": "cpu", "status": "passed", "kl": 0.0123456, "top1": 0.941, "perplexity": 18.234, "perplexity_float": 17.92}
    ]
    assert Report.model_validate({key: value for key, value in document.items() if key != "schema"}) == REPORT


def test_only_layers_with_outlier_columns_have_a_share_of_them() -> None:
    first, second = WITH_OUTLIERS.document()["layers"]
    assert first["outlier_share"] == 0.03
    assert second == {"name": "b", "scheme": "int8-channel-a8", "relative_error": 0.01, "bytes": 1}


def test_an_output_folder_gets_the_document_and_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("the source's own")
    write_report(REPORT, RECIPE, "smollm2", tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == REPORT.document()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card(REPORT, RECIPE, "smollm2")


UNVERIFIED = but(passed=None, gates=(), parity=(), fidelity=(), latency=())


@pytest.mark.parametrize("before", [None, "torn {", "[]", json.dumps(UNVERIFIED.document())])
def test_what_is_found_later_takes_the_place_of_a_report_that_tells_less(before: str | None, tmp_path: Path) -> None:
    if before is not None:
        (tmp_path / "report.json").write_text(before)
    complete_report(REPORT, RECIPE, "smollm2", tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT.document()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card(REPORT, RECIPE, "smollm2")


@pytest.mark.parametrize("target", ["cpu", "transformers"])  # as much, and something else
def test_a_report_that_tells_as_much_is_kept(target: str, tmp_path: Path) -> None:
    write_report(REPORT, RECIPE, "smollm2", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    complete_report(but(parity=(Parity(target=target, status="failed"),)), RECIPE, "smollm2", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_can_not_be_written_keeps_its_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_report(UNVERIFIED, RECIPE, "smollm2", tmp_path)
    (tmp_path / ".report.json.qconvert-new").mkdir()  # in the way of the new file
    complete_report(REPORT, RECIPE, "smollm2", tmp_path)
    assert "report.json and README.md do not say what was found now: can't write" in caplog.text
    assert json.loads((tmp_path / "report.json").read_text()) == UNVERIFIED.document()


# --- the card ---


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "encoder", "module"])
def test_the_card_shows_code_that_python_accepts(task: TaskName) -> None:
    blocks = code_blocks(card(but(task=task), RECIPE, "m"), "python")
    assert len(blocks) == (1 if task == "module" else 2)
    for block in blocks:
        compile(block, "card", "exec")
    opened = re.findall(r'InferenceSession\("(.*?)"', blocks[0])
    assert opened == list(graph_files(TASKS[task]).values())


def test_the_card_gives_the_command_that_makes_it_again_and_no_absolute_path() -> None:
    text = card(REPORT, RECIPE, "smollm2")
    assert code_blocks(text, "sh") == [
        "qconvert run --model smollm2 --output OUT --quantizer awq --scheme int4-g32 --option grid=5 "
        "--option 'mode=\"it'\"'\"'s\"' --rule 'lm_*=float' --evaluation eval.txt --target cpu --gate 'kl<=0.2'"
    ]
    assert "/home" not in text


def test_a_packaged_source_is_given_as_it_was() -> None:
    recipe = RECIPE.model_copy(update={"model": "pkg:some_package/minilm"})
    assert "--model pkg:some_package/minilm " in card(REPORT, recipe, "minilm")


def test_the_card_has_all_the_evidence() -> None:
    text = card(REPORT, RECIPE, "m")
    for words in (
        "| latency | cpu | measured | slower than float: 0.85 x its speed",
        "| gate |  | failed | speedup",
        "| fidelity to the float model | cpu | measured | KL 0.0123 nats",
    ):
        assert words in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


@pytest.mark.parametrize(
    ("report", "warning"),
    [
        (but(passed=None, gates=(), **UNRUN), "> **Not verified.** Nobody has run this artifact."),
        (but(passed=True, gates=(), parity=ON_CPU), "> **Computes what its weights say; no limits set.** See the evidence"),
        (REPORT, "> **Failed: 1 of 2 gates missed; not run on cuda.** See the evidence"),
        (REPORT, "> On cpu it is slower than float: 0.85 x its speed."),
    ],
)
def test_the_card_warns_before_anything_else(report: Report, warning: str) -> None:
    assert warning in card(report, RECIPE, "m").partition("## ")[0]


def test_a_card_of_a_good_run_warns_of_nothing() -> None:
    assert ">" not in card(but(passed=True, gates=KEPT, latency=()), RECIPE, "m").partition("## ")[0]


def test_the_card_says_what_the_kernels_do_with_activations() -> None:
    weight_only = "accuracy_level 4: the weights are those stored, but the kernel itself quantizes activations to int8"
    dynamic = "Layers whose scheme ends in -a8 quantize their activations to int8"
    a8 = but(layers=(REPORT.layers[0].model_copy(update={"scheme": "int8-channel-a8"}),))
    assert weight_only in card(REPORT, RECIPE, "m")
    assert dynamic not in card(REPORT, RECIPE, "m")
    assert weight_only not in card(a8, RECIPE, "m")
    assert dynamic in card(a8, RECIPE, "m")


ON_CUDA = RECIPE.model_copy(update={"targets": ("cuda",)})


@pytest.mark.parametrize(("dtype", "number"), [("float16", TensorProto.FLOAT16), ("bfloat16", TensorProto.BFLOAT16)])
def test_the_card_of_a_folder_for_cuda_runs_its_graph_with_its_caches(dtype: str, number: int) -> None:
    text = card(REPORT, ON_CUDA.model_copy(update={"cuda_dtype": dtype}), "m")
    program = text.partition("```python\n")[2].partition("```")[0]
    compile(program, "README.md", "exec")
    assert 'ort.InferenceSession("model.cuda.onnx", providers=["CUDAExecutionProvider"])' in program
    assert f"ort.OrtValue.ortvalue_from_shape_and_type(shape, {number})  # {dtype}" in program
    assert "`pip install 'onnxruntime-gpu>=1.31' transformers`" in text
    assert f"On CUDA, activations and caches are {dtype}, and no kernel quantizes activations." in text
    assert "accuracy_level" not in text


def test_the_card_of_both_targets_runs_on_the_cpu_and_names_the_other_graph() -> None:
    text = card(REPORT, RECIPE.model_copy(update={"targets": ("cpu", "cuda")}), "m")
    assert 'ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])' in text
    assert "For the CUDAExecutionProvider (`pip install 'onnxruntime-gpu>=1.31'`) take `model.cuda.onnx`" in text
    assert "caches are float16 there" in text


def test_what_ran_where_and_how_near_it_came_is_shown() -> None:
    parity = Parity(target="cuda", status="passed", max_relative_error=1.2e-3, cosine=0.9999991, kl=2.3e-6)
    latency = Latency(target="cuda", status="passed", p50_ms=1.5, device_nodes=600, cpu_nodes=("Shape a", "Cast b"), copies=0)
    text = re.sub(r"\s+", " ", on_terminal(table(but(parity=(parity,), latency=(latency,)))))
    assert "max relative error 0.0012, cosine 0.999999, KL 2.3e-06 nats" in text
    assert "p50 1.5 ms, 600 nodes on cuda, 2 on the CPU, 0 copies between them" in text


def test_the_card_says_what_transformers_makes_of_the_weights() -> None:
    assert "There its weights are dequantized: it has float's size and speed." in card(REPORT, RECIPE, "m")
    assert "There its weights are dequantized, without the outlier columns: " in card(WITH_OUTLIERS, RECIPE, "m")


def test_what_a_busy_machine_made_slow_is_not_called_slow() -> None:
    part = REPORT.latency[0].model_copy(update={"others_share": 0.62, "processor_ms": 12.1, "trials": None})
    report = but(passed=True, gates=KEPT, parity=ON_CPU, latency=(part,))
    words = (
        "0.85 x the speed of float, by processor time, measured while the machine was busy: other programs took 62% of its "
        "cores' time, p50 12.3 ms (float 10.5 ms)"
    )
    for text in (on_terminal(table(report)), card(report, RECIPE, "m")):
        text = re.sub(r"\s+", " ", text)
        assert words in text
        assert "slower" not in text
    assert ">" not in card(report, RECIPE, "m").partition("## ")[0]
    unknown = part.model_copy(update={"others_share": None, "spread": 0.5})
    assert "measured while the machine was busy, p50" in wording.latency(unknown)


def test_what_repeats_do_not_tell_apart_is_not_called_slower() -> None:
    """Quartiles of float lie among those of the artifact; in the other report they don't."""
    spread = {"repeats": 12, "p25_ms": 10.4, "p75_ms": 13.1, "float_repeats": 10, "float_p25_ms": 10.2, "float_p75_ms": 10.9}
    part = REPORT.latency[0].model_copy(update=spread)
    near = but(passed=True, gates=KEPT, parity=ON_CPU, latency=(part,))
    words = "half of 12 runs within 10.4 to 13.1 ms, of 10 of float within 10.2 to 10.9 ms"
    for text in (on_terminal(table(near)), card(near, RECIPE, "m")):
        text = re.sub(r"\s+", " ", text)
        assert words in text
        assert "0.85 x the speed of float, but their spreads overlap: neither was shown to be faster" in text
        assert "slower" not in text
    assert ">" not in card(near, RECIPE, "m").partition("## ")[0]
    far = but(latency=(part.model_copy(update={"p25_ms": 12.0}),))
    assert "slower than float: 0.85 x its speed" in re.sub(r"\s+", " ", on_terminal(table(far)))
    few = part.model_copy(update={"p25_ms": 12.0, "repeats": 2})
    assert "neither was shown" in wording.latency(few)


def test_the_onnx_layout_is_not_offered_to_transformers() -> None:
    text = card(but(transformers_class=None), RECIPE.model_copy(update={"layout": "onnx"}), "m")
    assert "from_pretrained" not in text.partition("## Load it with transformers")[2].partition("## Evidence")[0]
    assert "`--layout onnx`" in text


def test_names_cannot_break_the_card() -> None:
    """Fault 6."""
    text = card(but(kept_float=(KeptFloat(name="<script>|`\n# x", reason="r"),)), RECIPE, "<b>`x`\n```")
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", text.replace(r"\`", ""), flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|b)", outside_code)
    assert "\n# x" not in text
    assert r"\<script\>\|\`\\n\# x" in text


# --- the plan ---


def plan() -> Plan:
    schemes = {"a": "int4-g32", "b": "int8-channel"}
    layers = {}
    for block in range(3):
        for name, scheme in schemes.items():
            full = f"model.layers.{block}.{name}"
            layers[full] = LayerPlan(full, "linear", 64, 128, QuantScheme.parse(scheme))
    layers["model.layers.2.b"] = LayerPlan("model.layers.2.b", "linear", 64, 128, QuantScheme.parse("int4-g64"))
    kept = (KeptFloat(name="model.embed", reason="embeddings stay in float"),)
    return Plan(QuantScheme.parse("int4-g32"), layers, kept, True, 26_688, {"trace": 1_000_000, "quantize": 1_500_000})


def test_a_plan_for_cuda_says_what_the_table_of_kernels_says() -> None:
    for_cuda = dataclasses.replace(plan(), targets=("cuda",), cuda_bytes=3_000)
    text = on_terminal(plan_view.table(for_cuda), 160)
    assert (
        f"on CUDA, by the kernels of ONNX Runtime {cuda_kernels.version()}: 4 x MatMulNBits of 4 bits in blocks of 32" in text
    )
    assert "2 x MatMulNBits of 8 bits in blocks of 32" in text
    assert "for CUDA in qconvert.bin: about 3.0 kB" in text
    document = plan_view.document(for_cuda)
    assert document["layers"][0]["cuda"] == "MatMulNBits of 4 bits in blocks of 32"
    assert document["cuda_bytes"] == 3_000
    assert "CUDA" not in on_terminal(plan_view.table(plan()))


def test_layers_that_differ_only_in_their_block_share_a_row() -> None:
    rows = [line.split() for line in on_terminal(plan_view.table(plan())).splitlines()[:4]]
    assert rows == [
        ["layer", "count", "[out,", "in]", "scheme", "bytes"],
        ["model.layers.*.a", "3", "64,", "128", "int4-g32", "13.9", "kB"],
        ["model.layers.*.b", "2", "64,", "128", "int8-channel", "16.9", "kB"],
        ["model.layers.2.b", "1", "64,", "128", "int4-g64", "4.4", "kB"],
    ]


def test_the_plan_says_what_it_costs_and_what_stays() -> None:
    text = on_terminal(plan_view.table(plan()), 80)
    assert "6 layers to quantize, int4-g32 unless a rule says otherwise" in text
    assert "model.safetensors: 26.7 kB of tensors (26688 bytes)" in text
    assert "memory: about 1.0 MB to trace, about 1.5 MB to quantize" in text
    assert "calibration data: needed" in text
    assert "1 kept in float, embeddings stay in float: model.embed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_plan_lists_tensors_that_no_graph_reads() -> None:
    some = dataclasses.replace(plan(), unread={"a\0": "position numbers", "b": "position numbers"})
    assert r"2 stored but not read, position numbers: a\x00, b" in on_terminal(plan_view.table(some))
    assert plan_view.document(some)["unread"][1] == {"name": "b", "reason": "position numbers"}
    assert plan_view.document(plan())["unread"] == []


def test_a_plan_under_a_budget_says_what_is_expected() -> None:
    decided = dataclasses.replace(plan(), assignment=ASSIGNMENT)
    assert "budget: 4.499 bits per quantized weight for the budget 4.5, predicted KL 0.0105 nats" in on_terminal(
        plan_view.table(decided)
    )
    assert plan_view.document(decided)["assignment"]["schemes"] == {"int4-g64": 20, "int8-g32": 10}
    assert "assignment" not in plan_view.document(plan())


def test_the_plans_document_lists_every_layer() -> None:
    document: dict[str, Any] = plan_view.document(plan())
    assert {key: document[key] for key in ("schema", "scheme", "calibrated", "weights_bytes", "peak_bytes")} == {
        "schema": 1,
        "scheme": "int4-g32",
        "calibrated": True,
        "weights_bytes": 26_688,
        "peak_bytes": 1_500_000,
    }
    assert [layer["name"] for layer in document["layers"]] == list(plan().layers)
    packed, scales, shape = 64 * 128 // 2, 64 * 4 * 2, 2 * 8
    assert document["layers"][0] == {
        "name": "model.layers.0.a",
        "kind": "linear",
        "shape": [64, 128],
        "scheme": "int4-g32",
        "bytes": packed + scales + shape,
    }
    assert document["kept_float"] == [{"name": "model.embed", "reason": "embeddings stay in float"}]
