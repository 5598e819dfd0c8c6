"""The model card: README.md of an output folder. No absolute path gets into it, because it is published."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from qconvert.errors import printable
from qconvert.graph import cuda_kernels
from qconvert.ir.report import Report
from qconvert.ir.task import TASKS, TaskName
from qconvert.recipe import Recipe
from qconvert.recipe.fields import DataSpec
from qconvert.report import wording
from qconvert.targets import graph_files, targets_of
from qconvert.targets.cpu import CPU
from qconvert.targets.cuda import CUDA
from qconvert.targets.target import Target
from qconvert.vocabulary import CAST

RUN: dict[TaskName, str] = {
    "causal-lm": """\
import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
ids = np.array([tokenizer.encode("The capital of France is")], dtype=np.int64)
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
for each in session.get_inputs():  # the cache, empty before the first token
    if each.name.startswith("past_key_values."):
        shape = [1, each.shape[1], 0, each.shape[3]]
        feeds[each.name] = np.zeros(shape, dtype=np.float32)
logits = session.run(["logits"], feeds)[0]
print(tokenizer.decode([int(logits[0, -1].argmax())]))""",
    "seq2seq-lm": """\
import numpy as np
import onnxruntime as ort
from transformers import AutoConfig, AutoTokenizer

tokenizer, config = AutoTokenizer.from_pretrained("."), AutoConfig.from_pretrained(".")
encoder = ort.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])
decoder = ort.InferenceSession("decoder.onnx", providers=["CPUExecutionProvider"])
ids = np.array([tokenizer.encode("translate English to German: The house is small.")], dtype=np.int64)
source = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
states, *cross = encoder.run(None, source)
feeds = dict(zip([each.name for each in encoder.get_outputs()][1:], cross))
feeds |= {"encoder_attention_mask": np.ones_like(ids), "input_ids": np.array([[config.decoder_start_token_id]])}
for each in decoder.get_inputs():  # the cache, empty before the first token
    if each.name.startswith("past_key_values."):
        shape = [1, each.shape[1], 0, each.shape[3]]
        feeds[each.name] = np.zeros(shape, dtype=np.float32)
logits = decoder.run(["logits"], feeds)[0]
print(tokenizer.decode([int(logits[0, -1].argmax())]))""",
    "encoder": """\
import onnxruntime as ort
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
tokens = tokenizer(["A sentence.", "Another one."], padding=True, return_tensors="np")
zeros = tokens["input_ids"] * 0  # for token_type_ids, where the tokenizer gives none
states = session.run(None, {each.name: tokens.get(each.name, zeros) for each in session.get_inputs()})[0]
print(states.shape)  # [sentences, tokens, features]""",
    "module": """\
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
feeds = {}
for each in session.get_inputs():  # put your rows in place of these zeros
    shape = [size if isinstance(size, int) else 1 for size in each.shape]
    feeds[each.name] = np.zeros(shape, dtype=np.int64 if "int64" in each.type else np.float32)
print([output.shape for output in session.run(None, feeds)])""",
}

NOT_RUN = "Nobody has run this artifact. Run `qconvert verify .` in this folder before you rely on it."
EMPTY_CACHE, EMPTY_CODES = (f"np.zeros(shape, dtype=np.{dtype})\nlogits" for dtype in ("float32", "int8"))
ENCODER_RUN = "encoder.run(None, source)"
ENCODER_RUN_ON_CUDA = (
    "encoder.run_with_ort_values(\n"
    "    None, {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in source.items()}\n)"
)
# onnx.TensorProto's numbers of the types
ONNX_NUMBERS = {"float16": 10, "bfloat16": 16}


def card(report: Report, recipe: Recipe, model_name: str) -> str:
    """Return the card in Markdown: what the artifact is, how to run and load it, the evidence, and how to make it again."""
    sections = (
        f"# {_plain(model_name)}, {wording.title(report)}",
        f"Made by qconvert from `{_code(model_name)}` with the quantizer `{_code(report.quantizer)}`: "
        f"{wording.schemes(report.layers) or 'no'} {wording.piece(report)}s, {wording.size(report)}.",
        *_verdict(report),
        *_usage(report, recipe),
        "## Evidence",
        _evidence(report),
        *_notes(report, recipe),
        "## Make it again",
        f"```sh\n{_command(recipe, model_name)}\n```",
        "`qconvert.json` holds the whole recipe, with seed and sample counts, and the digest of every file."
        + _without_flags(recipe),
    )
    return "\n\n".join(sections) + "\n"


def _verdict(report: Report) -> Iterator[str]:
    if not (report.passed and report.loss_is_limited):
        words = wording.verdict(report)
        advice = "See the evidence below." if report.was_run else NOT_RUN
        yield f"> **{words[0].upper()}{words[1:]}.** {advice}"
    for part in report.latency:
        if part.speedup is not None and part.speedup < 1 and not part.busy and part.is_clear:
            yield f"> On {part.target} it is {wording.speed(part)}."


def _usage(report: Report, recipe: Recipe) -> Iterator[str]:
    yield "## Run it with ONNX Runtime"
    task = TASKS[report.task]
    targets = targets_of(recipe.targets)
    first, *others = targets
    yield f"In this folder, with `pip install '{first.package}'{' transformers' if task.takes_text else ''}`:"
    code = RUN[report.task] if recipe.kv_cache == "float" else RUN[report.task].replace(EMPTY_CACHE, EMPTY_CODES)
    yield f"```python\n{code if first is CPU else _on(first, code, recipe)}\n```"
    if report.context_length is not None:
        limit = f"at most {report.context_length} tokens, as many as the model has positions"
        yield f"A prompt and its answer together are {limit}. ONNX Runtime may refuse more."
    for target in others:
        caches = f"; caches are {recipe.cuda_dtype} there" if task.generates else ""
        files = " and ".join(f"`{file}`" for file in graph_files(task, target).values())
        yield f"For the {target.provider} (`pip install '{target.package}'`) take {files}{caches}."
    yield from _recommended(report)
    if not task.takes_text:
        return
    yield "## Load it with transformers"
    if (name := report.transformers_class) is None:
        yield "Not possible: it was made with `--layout onnx`, whose weights only the ONNX graphs can read."
        return
    install = "`pip install 'transformers>=5.23' compressed-tensors`"
    if report.quantizer == CAST:
        install = "`pip install 'transformers>=5.23'`"
    elif wording.has_codebook(report.layers):
        install = "`pip install 'transformers>=5.23' accelerate bitsandbytes`"
    yield f"In this folder, with {install}:"
    yield f'```python\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained(".")\n```'
    yield _dequantized(report)


def _dequantized(report: Report) -> str:
    """Say what transformers makes of the weights."""
    if report.quantizer == CAST:
        return f"There its weights are {report.scheme}, as they are stored."
    if wording.has_codebook(report.layers):
        return "There its quantized layers are Linear4bit of bitsandbytes, which keeps them packed."
    without = ", without the outlier columns" if any(layer.outlier_share is not None for layer in report.layers) else ""
    schemes = {layer.scheme.replace("-tensor", "-channel") for layer in report.layers}  # the layout has one form for both
    late = len(schemes) > 1 or any(scheme.startswith("int8-g") for scheme in schemes)
    when = ", when the model is first called" if late else ""
    rounded = len(schemes) > 1 and any(scheme.endswith("-a8") for scheme in schemes)
    activations = " Layers whose scheme ends in -a8 round their activations there, too." if rounded else ""
    return f"There its weights are dequantized{when}{without}: it has float's size and speed.{activations}"


def _recommended(report: Report) -> Iterator[str]:
    """The session settings that were measured best, where several were tried."""
    for part in report.latency:
        if part.trials and part.threads is not None:
            tried = ", ".join(f"{trial.ms:.3g} ms with {wording.settings(trial)}" for trial in part.trials)
            lines = ["options = ort.SessionOptions()", f"options.intra_op_num_threads = {part.threads}"]
            if part.spinning is False:
                lines.append('options.add_session_config_entry("session.intra_op.allow_spinning", "0")')
            work = "a prompt and the tokens after it" if part.decode_tokens_per_s else "one run"
            yield f"Measured best: {wording.settings(part)} ({work}: {tried}). Cores differ, so measure on yours, too:"
            yield "```python\n" + "\n".join([*lines, "# ort.InferenceSession(FILE, options, providers=...)"]) + "\n```"


def _on(target: Target, code: str, recipe: Recipe) -> str:
    """The same program for another target's graph. Narrow caches are made by ONNX Runtime, because numpy has no bfloat16."""
    code = re.sub(r"(model|encoder|decoder)\.onnx", lambda file: target.graph_file(file[1]), code)
    code = code.replace(CPU.provider, target.provider)
    if not target.half_precision:
        return code
    number = ONNX_NUMBERS[recipe.cuda_dtype]
    return code.replace(
        EMPTY_CACHE, f"ort.OrtValue.ortvalue_from_shape_and_type(shape, {number})  # {recipe.cuda_dtype}\nlogits"
    ).replace(ENCODER_RUN, ENCODER_RUN_ON_CUDA)


def _evidence(report: Report) -> str:
    rows: list[tuple[str, str, str, str]] = []
    rows += [("parity with its own weights", part.target, part.status, wording.parity(part)) for part in report.parity]
    rows += [
        ("fidelity to the float model", part.target, wording.status(part), wording.fidelity(part)) for part in report.fidelity
    ]
    rows += [("latency", part.target, wording.status(part), wording.latency(part)) for part in report.latency]
    if report.processor is not None:
        rows.append(("measured on", "", "", wording.processor(report.processor)))
    rows += [("gate", "", "passed" if part.passed else "failed", wording.gate(part)) for part in report.gates]
    if report.assignment is not None:
        rows.append(("budget", "", report.assignment.budget, wording.assignment(report.assignment, report.fidelity)))
    rows += [
        (f"{wording.piece(report)} that lost most", "", layer.scheme, _lost(layer.name, layer.relative_error))
        for layer in wording.worst(report.layers)[:1]
    ]
    if outliers := wording.outliers(report.layers):
        rows.append(("outlier columns", "", "", outliers))
    if report.activations is not None:
        rows.append(("static activations", "", report.activations.estimator, wording.activations(report.activations)))
    if report.kv_cache is not None:
        rows.append(("KV cache", "", report.kv_cache.kind, wording.kv_cache(report.kv_cache)))
    rows += [("too small, and now 0", "", "", line) for line in wording.zeroed(report.layers)]
    rows += [
        ("another scheme than asked for", "", str(len(names)), f"{scheme}: {wording.some(names)}")
        for scheme, names in wording.other_schemes(report.layers)
    ]
    rows += [
        ("kept in float", "", str(len(names)), f"{reason}: {wording.some(names)}")
        for reason, names in wording.reasons(report.kept_float)
    ]
    rows.append(
        ("samples", "", "", f"{report.samples.calibration} for calibration, {report.samples.evaluation} for evaluation")
    )
    lines = ["| what | where | result | measured |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(map(_plain, row))} |" for row in rows])


def _notes(report: Report, recipe: Recipe) -> Iterator[str]:
    notes = []
    schemes = {layer.scheme for layer in report.layers}
    targets = targets_of(recipe.targets)
    on_cpu = CPU in targets
    if on_cpu and report.quantizer == CAST:
        notes.append(
            f"On the CPU, {report.scheme} is how weights are stored: a session widens them to float32 when it is created, and "
            "has float's size and speed."
        )
    elif on_cpu and any(wording.is_weights_only(scheme) for scheme in schemes):
        notes.append(
            "Linear layers with float activations run on the CPU in MatMulNBits at accuracy_level 4: the weights are those "
            "stored, but the kernel itself quantizes activations to int8."
        )
    if on_cpu and wording.has_codebook(report.layers):
        notes.append(
            "Layers in nf4 or fp4 run on the CPU in MatMulBnb4, which dequantizes the whole weight whenever it runs, and "
            "computes in float32: small on disk and in memory, but slower than int4."
        )
    if on_cpu and any(scheme.endswith("-a8") for scheme in schemes):
        notes.append(
            "Layers whose scheme ends in -a8 quantize their activations to int8 at run time on the CPU, with one scale per row."
        )
    if recipe.kv_cache != "float":
        notes.append(
            f"The KV cache is {recipe.kv_cache}: past_key_values and present are codes, whose scales are in the graph. A "
            "prompt that meets an empty cache is attended to in float; what reads the cache later reads codes."
        )
    if CUDA in targets:
        notes.append(
            f"On CUDA, activations and caches are {recipe.cuda_dtype}, and no kernel quantizes activations. Every node was "
            f"checked against the kernels of ONNX Runtime {cuda_kernels.version()}."
        )
    if notes:
        yield "## Notes"
        yield "\n".join(f"- {note}" for note in notes)


def _command(recipe: Recipe, model_name: str) -> str:
    """The flags that differ from the defaults. Paths lose their folders."""
    source = recipe.model if re.match(r"[\w.]+:[\w.]", recipe.model) else model_name
    words = ["qconvert", "run", "--model", source, "--output", "OUT"]
    if recipe.preset is not None:
        words += ["--preset", recipe.preset]
    words += _weights(recipe)
    if recipe.budget is not None:
        words += ["--budget", recipe.budget]
    if recipe.scheme is not None:
        words += ["--scheme", str(recipe.scheme)]
    for name, value in recipe.options.items():
        words += ["--option", f"{name}={json.dumps(value)}"]  # JSON is YAML
    for rule in recipe.rules:
        words += ["--rule", f"{rule.pattern}={rule.scheme or 'float'}"]
    words += _data("--calibration", recipe.calibration) + _data("--evaluation", recipe.evaluation)
    words += [word for target in recipe.targets for word in ("--target", target)]
    words += _graphs(recipe)
    if recipe.ranges is not None:
        words += ["--ranges", recipe.ranges.estimator]
    for gate in recipe.gates:
        words += ["--gate", str(gate)]
    return printable(shlex.join(words))  # one line, so that nothing in it can end the code block


def _weights(recipe: Recipe) -> list[str]:
    """The flags that say which weights are quantized, and by what."""
    words = ["--quantizer", recipe.quantizer] if recipe.trained is None else ["--trained", recipe.trained.name]
    if recipe.adapter is not None:
        words += ["--adapter", recipe.adapter.name]
    return [*words, "--merge-adapter"] if recipe.merge_adapter else words


def _graphs(recipe: Recipe) -> list[str]:
    """The flags that say what the graphs do with the weights, and where these lie."""
    chosen = [
        ("--prefill", recipe.prefill, "same"),
        ("--kv-cache", recipe.kv_cache, "float"),
        ("--layout", recipe.layout, "transformers"),
    ]
    return [word for flag, value, default in chosen if value != default for word in (flag, value)]


def _without_flags(recipe: Recipe) -> str:
    """The settings that change the graphs, and that only a recipe file can give."""
    # A recipe of the same preset that sets nothing itself.
    plain = Recipe.from_settings({"model": recipe.model, "output": recipe.output, "preset": recipe.preset})
    settings = recipe.model_dump(mode="json")
    found = [
        f"`{name}: {settings[name]}`"
        for name in ("seed", "cuda_dtype", "logits", "sequential", "tuning")
        if getattr(recipe, name) != getattr(plain, name)
    ]
    if recipe.ranges is not None and recipe.ranges.options:
        found.append(f"`ranges: {settings['ranges']}`")
    return f" A recipe file also gave {', '.join(found)}." if found else ""


def _data(flag: str, spec: DataSpec) -> list[str]:
    return [flag, Path(spec.source).name] if spec.source else []


def _lost(name: str, relative_error: float) -> str:
    return f"{printable(name)}: relative error {relative_error:.3g}"


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", printable(text))


def _code(text: str) -> str:
    """Text between backticks."""
    return printable(text).replace("`", "'")
