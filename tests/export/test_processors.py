"""What integer products compute on other processors: the table of exact pairs, and whole artifacts, emulated.

The emulator comes from examples/as_processor.sh, which needs Debian's packages; without them its tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import image_module
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from exporting import integer_products
from forced_processor import forced
from generation import keep_activations_of_graph_float
from onnx import TensorProto, helper, numpy_helper
from tiny_models import tiny_bert, tiny_llama, tiny_t5

from qconvert.export import processors
from qconvert.export.graph import GraphBuilder
from qconvert.graph.integer_products import PRODUCTS, S8, U8, Pair
from qconvert.ir.artifact import GRAPH, SIDECAR, WEIGHTS
from qconvert.ort.compare import feed, largest_difference
from qconvert.ort.processor import processor
from qconvert.ort.session import file_session, session_options
from qconvert.pipeline import conversion
from qconvert.recipe import Recipe
from qconvert.targets.cpu import CPU

PYTHON = sys.executable  # itself: within a test it is a stand-in, which no emulator can run
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
# AVX2 without VNNI, no AVX, ARM64 without and with dot product.
SATURATES = "EPYC-Milan"
PROCESSORS = (SATURATES, "Nehalem", "cortex-a72", "neoverse-n1")
EXACT = 1e-6
# Another order of float sums turns the rounding of a few activations around; in kernels for other vectors, of some more.
ROUNDING, OTHER_VECTORS = 2e-3, 1e-2
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")

# Name of a case -> (path of its graph, inputs).
Cases = dict[str, tuple[Path, Mapping[str, np.ndarray[Any, Any]]]]


# --- operators ---

ROWS, WIDTH, COLUMNS = 16, 512, 64
NUMPY = {U8: np.uint8, S8: np.int8}
# DynamicQuantizeMatMul makes its activations unsigned itself.
PAIRS = [(name, (a, w)) for name in PRODUCTS for a in (U8, S8) for w in (U8, S8) if (name, a) != ("DynamicQuantizeMatMul", S8)]


def case_id(name: str, pair: Pair) -> str:
    return f"{name}-{pair[0].name}-{pair[1].name}"


def codes(kind: Any, *shape: int, seed: int) -> np.ndarray[Any, Any]:
    """Random codes over the whole range, both ends among them."""
    limits = np.iinfo(NUMPY[kind])
    found = np.random.default_rng(seed).integers(limits.min, limits.max + 1, shape).astype(NUMPY[kind])
    found.flat[:2] = limits.min, limits.max
    return found


def operator_graph(name: str, pair: Pair) -> tuple[onnx.ModelProto, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(a graph of one operator with constant weights, its input, what it gives where it is exact)."""
    convolution = name in ("QLinearConv", "ConvInteger")
    shape = (1, WIDTH, ROWS, 1) if convolution else (ROWS, WIDTH)
    x = codes(pair[0], *shape, seed=0)
    w = codes(pair[1], *((COLUMNS, WIDTH, 1, 1) if convolution else (WIDTH, COLUMNS)), seed=1)
    wide_x, wide_w = x.astype(np.int64), w.astype(np.int64)
    product = np.einsum("nchw,oc->nohw", wide_x, wide_w[..., 0, 0]) if convolution else wide_x @ wide_w
    constants = {"w": w, "one": np.array(1, np.float32), "x0": np.array(0, NUMPY[pair[0]]), "w0": np.array(0, NUMPY[pair[1]])}
    inputs, output = {
        "MatMulInteger": (["x", "w", "x0", "w0"], np.int32),
        "ConvInteger": (["x", "w", "x0", "w0"], np.int32),
        "MatMulIntegerToFloat": (["x", "w", "one", "one", "x0", "w0"], np.float32),
        "DynamicQuantizeMatMul": (["x", "w", "one", "w0"], np.float32),
        "QLinearMatMul": (["x", "one", "x0", "w", "one", "w0", "step", "middle"], NUMPY[pair[0]]),
        "QLinearConv": (["x", "one", "x0", "w", "one", "w0", "step", "middle"], NUMPY[pair[0]]),
        "QGemm": (["x", "one", "x0", "w", "one", "w0", "", "step", "middle"], NUMPY[pair[0]]),
    }[name]
    expected = product.astype(np.float64)
    if "step" in inputs:  # results over the range of their codes
        middle = 128 if pair[0] == U8 else 0
        constants |= {"step": np.array(np.abs(product).max() / 127, np.float32), "middle": np.array(middle, NUMPY[pair[0]])}
        expected = np.rint(product / constants["step"]).clip(-128, 127) + middle
    if name == "DynamicQuantizeMatMul":  # rows from 0 to 255 in steps of 1, which it finds again
        x = x.astype(np.float32)
    domain = "com.microsoft" if name in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm") else ""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(output))
    graph = helper.make_graph(
        [helper.make_node(name, inputs, ["y"], domain=domain)],
        name,
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, key) for key, value in constants.items() if key in inputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), x, expected


def operator_error(name: str, found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest difference by the largest value; a result that is rounded to codes may be off by one code."""
    off = np.abs(found.astype(np.float64) - expected)
    if name.startswith(("QLinear", "QGemm")):
        off = np.maximum(off - 1, 0)
    return float(off.max() / np.abs(expected).max())


KERNELS = [(name, pair) for name, pair in PAIRS if pair in PRODUCTS[name].exact | PRODUCTS[name].saturates]


# --- artifacts ---

RECIPES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "rows": (tiny_llama, {"scheme": "int8-channel-a8"}),
    "shared-head": (tiny_llama, {"scheme": "int8-channel-a8", "rules": [{"pattern": "lm_head", "scheme": "int8-channel-a8"}]}),
    "asymmetric": (tiny_llama, {"quantizer": "zero-point", "scheme": "int8-tensor-asym-a8"}),
    "outliers-embedding": (
        tiny_bert,
        {
            "quantizer": "llm-int8",
            "options": {"threshold": 2.0},
            "rules": [{"pattern": "*.word_embeddings", "scheme": "int8-channel-a8"}],
        },
    ),
    "smoothquant": (tiny_bert, {"quantizer": "smoothquant", "layout": "onnx"}),
    "source-to-target": (tiny_t5, {"scheme": "int8-channel-a8"}),
    "convolutions": (lambda folder: folder, {"scheme": "int8-channel-a8", "layout": "onnx"}),
    "static-convolutions": (
        lambda folder: folder,
        {"scheme": "int8-channel-a8-static", "calibration": {"samples": 2}, "evaluation": {"samples": 2}},
    ),
    "static-encoder": (tiny_bert, {"scheme": "int8-channel-a8-static", "layout": "onnx"}),
}

# Packed weights whose int8 copies for prompts are derived where they are loaded, beside layers with int8 activations.
PROMPTS = "prompts"
ANSWERS = ("signed", "unsigned")
OF_PROMPTS = {
    "scheme": "int4-g16-asym",
    "prefill": "int8",
    "layout": "onnx",
    "rules": [{"pattern": "*.down_proj", "scheme": "int8-channel-a8"}],
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a recipe by its name, converted and verified once."""
    base = tmp_path_factory.mktemp("processors")

    @cache
    def convert(name: str) -> Path:
        make, settings = (tiny_llama, OF_PROMPTS) if name == PROMPTS else RECIPES[name]
        of_images = name.endswith("convolutions")
        source = f"module:{image_module.__file__}:images" if of_images else str(make(base / f"{name}-source"))
        data = {} if of_images else {"calibration": {"source": "builtin", "samples": 4, "length": 32}}
        recipe = {"model": source, "output": str(base / name), "evaluation": {"samples": 4, "length": 32}} | data | settings
        report = conversion.convert(Recipe.from_settings(recipe))
        assert (report.passed, report.processor) == (True, processor())
        return base / name

    return convert


def graph_file(folder: Path) -> Path:
    return folder / (GRAPH if (folder / GRAPH).exists() else "encoder.onnx")


def sample(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of a graph: two rows, the second padded."""
    names = [value.name for value in file_session(path).get_inputs()]
    if "image" in names:
        return {"image": image_module.images()[1]["image"].numpy()}
    ids = torch.arange(48).reshape(2, 24) * 7 % 300 + 5
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return feed(file_session(path), {name: value for name, value in batch.items() if name in names})


def kept_weights(path: Path, level: str = "ORT_ENABLE_ALL") -> list[int]:
    """ONNX types of the weights of all integer products in the graph as a session runs it."""
    options, optimized = session_options(), path.with_suffix(".optimized")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(optimized, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    left = {node.op_type for node in graph.node if node.op_type != "Transpose" or node.input[0] in kinds}
    assert not left & {"If", "MatMulInteger", "BitwiseXor", "Transpose"}
    return [kinds[product.input[PRODUCTS[product.op_type].weights]] for product in integer_products(graph, PRODUCTS)]


# --- the emulator ---


@pytest.fixture(scope="module")
def cases(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Everything that the emulated processors run: each kernel, and each artifact with the question open and answered."""
    folder = tmp_path_factory.mktemp("kernels")
    found: Cases = {}
    for name, pair in KERNELS:
        model, x, _ = operator_graph(name, pair)
        onnx.save(model, path := folder / f"{case_id(name, pair)}.onnx")
        found[path.stem] = path, {"x": x}
    for name in (*RECIPES, PROMPTS):
        path = graph_file(folder_of(name))
        found[name] = path, (inputs := sample(path))
        found[f"{name}-signed"] = forced(path, exact=True), inputs
        found[f"{name}-unsigned"] = forced(path, exact=False), inputs
    return found


@pytest.fixture(scope="module")
def emulated(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, np.ndarray[Any, Any]]]:
    """What all cases give on a processor, run once."""
    base = tmp_path_factory.mktemp("emulated")
    script = ROOT / "examples" / "as_processor.sh"

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": PYTHON}
        return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)

    @cache
    def run(processor: str) -> dict[str, np.ndarray[Any, Any]] | str:
        folder = base / processor
        folder.mkdir()
        (folder / "nothing.py").write_text("import onnxruntime\n")
        if (trial := call(processor, folder / "nothing.py")).returncode:
            return f"no emulator of {processor}: {trial.stderr.strip()[-200:]}"
        for name, (path, inputs) in cases.items():
            np.savez(folder / f"{name}.npz", **inputs)  # type: ignore[arg-type]
            (folder / f"{name}.path").write_text(str(path))
        ran = call(processor, SUPPORT / "run_graphs.py", folder, base / f"{processor}.npz")
        assert ran.returncode == 0, ran.stderr
        with np.load(base / f"{processor}.npz") as results:
            return dict(results)

    def results(processor: str) -> dict[str, np.ndarray[Any, Any]]:
        if isinstance(found := run(processor), str):
            pytest.skip(found)
        return found

    return results


# --- tests ---


def test_the_documents_table_is_the_code_s() -> None:
    text = (ROOT / "docs" / "processors.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "uint8 x" in line]

    def pairs(found: frozenset[Pair]) -> set[str]:
        return {" x ".join(kind.name.lower() for kind in pair) for pair in found}

    documented = {cells[0].strip(): tuple(set(map(str.strip, cell.split(","))) for cell in cells[1:]) for cells in rows}
    assert documented == {name: (pairs(product.exact), pairs(product.saturates)) for name, product in PRODUCTS.items()}


@pytest.mark.parametrize(("name", "pair"), PAIRS, ids=[case_id(*each) for each in PAIRS])
def test_the_table_knows_every_kernel(name: str, pair: Pair) -> None:
    """A pair that the table does not list has no kernel, and one that it lists as exact is exact here."""
    model, x, expected = operator_graph(name, pair)
    if pair not in PRODUCTS[name].exact | PRODUCTS[name].saturates:
        with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|INVALID_GRAPH|Type Error"):
            onnxruntime.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
        return
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    if pair in PRODUCTS[name].exact:
        assert operator_error(name, session.run(None, {"x": x})[0], expected) < EXACT


@pytest.mark.parametrize("processor", PROCESSORS)
def test_pairs_that_are_called_exact_are_exact(processor: str, emulated: Callable[[str], Any]) -> None:
    found = emulated(processor)
    errors = {case_id(*each): operator_error(each[0], found[case_id(*each)], operator_graph(*each)[2]) for each in KERNELS}
    exact = {case_id(name, pair) for name, pair in KERNELS if pair in PRODUCTS[name].exact}
    assert {name: error for name, error in errors.items() if name in exact and error > EXACT} == {}
    wrong = {name for name, error in errors.items() if error > 0.01}
    assert wrong == ({case_id(*each) for each in KERNELS} - exact if processor == SATURATES else set())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_artifacts_compute_the_same_there(processor: str, name: str, cases: Cases, emulated: Callable[[str], Any]) -> None:
    path, inputs = cases[name]
    here = file_session(path).run(None, inputs)[0]
    found, limit = emulated(processor), ROUNDING if processor == SATURATES else OTHER_VECTORS
    assert largest_difference(found[name], here) < limit
    assert largest_difference(found[f"{name}-unsigned"], here) < limit
    if name == "static-encoder" or "MatMulIntegerToFloat" in str(onnx.load(path, load_external_data=False)):
        signed = largest_difference(found[f"{name}-signed"], here)
        assert signed > limit if processor == SATURATES else signed < limit  # what the question is for


@pytest.mark.parametrize("processor", PROCESSORS)
def test_prompts_get_the_range_that_is_exact_there(processor: str, cases: Cases, emulated: Callable[[str], Any]) -> None:
    """Half of a signed byte where sums are kept in 16 bits, all of it elsewhere: what a graph computes that is told so here."""
    whole, half = (file_session(cases[f"{PROMPTS}-{answer}"][0]).run(None, cases[PROMPTS][1])[0] for answer in ANSWERS)
    limit = ROUNDING if processor == SATURATES else OTHER_VECTORS
    assert largest_difference(half, whole) > limit
    assert largest_difference(emulated(processor)[PROMPTS], half if processor == SATURATES else whole) < limit


@pytest.mark.parametrize("name", RECIPES)
def test_both_answers_give_the_same_at_every_level(name: str, cases: Cases) -> None:
    """Whatever this processor is: unsigned weights are exact on it, and so is what the graph chooses."""
    path, inputs = cases[name]
    expected = file_session(path).run(None, inputs)[0]
    for level in LEVELS:
        for case in (name, f"{name}-unsigned"):
            options = session_options()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            session = onnxruntime.InferenceSession(cases[case][0], options, providers=["CPUExecutionProvider"])
            assert largest_difference(session.run(None, inputs)[0], expected) < ROUNDING, (level, case)


def test_the_oldest_onnx_runtime_that_the_card_asks_for_runs_every_artifact(cases: Cases, tmp_path: Path) -> None:
    """Whichever weights the graph takes; with float activations and a quantized embedding, too."""
    python = os.environ.get("QCONVERT_OLDEST_ONNXRUNTIME")
    if python is None:
        pytest.skip("needs QCONVERT_OLDEST_ONNXRUNTIME=PYTHON, the interpreter of an environment with it")
    show = "import onnxruntime; print(onnxruntime.__version__)"
    version = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout
    assert version.startswith(f"{CPU.package.partition('>=')[2]}.")
    data = {"samples": 4, "length": 32}
    for scheme in ("int4-g32-asym", "int8-g32"):
        settings = {"scheme": scheme, "layout": "onnx", "rules": [{"pattern": "lm_head", "scheme": scheme}], "evaluation": data}
        source, output = str(tiny_llama(tmp_path / "llama")), tmp_path / scheme
        conversion.convert(Recipe.from_settings({"model": source, "output": str(output), "verify": False, **settings}))
        keep_activations_of_graph_float(output / GRAPH)  # versions round them differently
        cases = {**cases, scheme: (output / GRAPH, sample(output / GRAPH))}
    names = [name for name in cases if (cases[name][0].parent / WEIGHTS).exists() and not name.endswith("-signed")]
    assert len(names) == 2 * len((*RECIPES, PROMPTS)) + 2
    (folder := tmp_path / "cases").mkdir()
    for name in names:
        np.savez(folder / f"{name}.npz", **cases[name][1])  # type: ignore[arg-type]
        (folder / f"{name}.path").write_text(str(cases[name][0]))
    subprocess.run([python, SUPPORT / "run_graphs.py", folder, tmp_path / "found.npz"], check=True)
    with np.load(tmp_path / "found.npz") as found:
        for name in names:
            here = file_session(cases[name][0]).run(None, cases[name][1])[0]
            assert largest_difference(found[name], here) < OTHER_VECTORS, name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("exact", [True, False], ids=["signed", "unsigned"])
def test_nothing_of_the_question_is_left_to_run(exact: bool, name: str, cases: Cases) -> None:
    kinds = kept_weights(cases[f"{name}-{'signed' if exact else 'unsigned'}"][0])
    assert set(kinds) <= {TensorProto.INT8 if exact else TensorProto.UINT8}
    assert kinds or name == "convolutions"


@pytest.mark.parametrize("pair", [("DynamicQuantizeMatMul", (U8, S8)), ("QLinearMatMul", (U8, S8))], ids=lambda pair: pair[0])
def test_no_graph_is_written_with_a_product_that_saturates(pair: tuple[str, Pair]) -> None:
    graph = onnx_ir.from_proto(operator_graph(*pair)[0]).graph
    with pytest.raises(TypeError, match="is not exact on every processor"):
        processors.choose_by_processor(graph, GraphBuilder(graph, {}))


def test_onnxruntime_genai_takes_either_answer(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    logits = []
    for exact in (None, True, False):
        folder = shutil.copytree(folder_of("shared-head"), tmp_path / str(exact))
        if exact is not None:
            shutil.move(forced(folder / GRAPH, exact=exact), folder / GRAPH)
        generator = genai.Generator(model := genai.Model(str(folder)), genai.GeneratorParams(model))
        generator.append_tokens(np.arange(5, 29, dtype=np.int32))
        logits.append(generator.get_logits())
    chosen, signed, unsigned = logits
    assert largest_difference(unsigned, chosen) < ROUNDING
    if processor().signed_products == "exact":
        assert largest_difference(signed, chosen) < ROUNDING


def test_onnxruntime_web_takes_either_answer(cases: Cases, tmp_path: Path) -> None:
    """In WebAssembly, whose kernels are exact; its rounding of activations is another one."""
    modules = os.environ.get("QCONVERT_NODE_MODULES")
    if modules is None or shutil.which("node") is None:
        pytest.skip("needs node, and QCONVERT_NODE_MODULES=DIR with onnxruntime-web")
    names = [f"{name}{answer}" for name in ("outliers-embedding", "smoothquant") for answer in ("", "-signed", "-unsigned")]
    listed = {}
    for name in names:
        path, inputs = cases[name]
        feeds = {key: [value.dtype.name, list(value.shape), value.ravel().tolist()] for key, value in inputs.items()}
        files = [each for each in (WEIGHTS, SIDECAR) if (path.parent / each).exists()]
        listed[name] = {"graph": str(path), "files": files, "inputs": feeds}
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    command = ["node", *map(str, (SUPPORT / "run_web.mjs", modules, tmp_path / "cases.json"))]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name, values in found.items():
        first = np.array(found[name.removesuffix("-signed").removesuffix("-unsigned")])
        assert largest_difference(np.array(values), first) < EXACT, name
