"""Every class that transformers has for the documented model types, converted by `qconvert run` and compared with itself.

python tests/support/sweep_classes.py [MODEL_TYPE ...] > TABLE.md

prints a table: the outputs of each class's graphs and how far they are from those of the float class, or the exit code and the
reason. A class that is neither converted with all its outputs nor refused with exit code 3 is marked FAULT, and the script
then ends with exit code 1. Verification runs in this process, so that a class takes seconds.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
import transformers
from architecture_models import DECODERS, ENCODER_DECODERS, ENCODERS
from click.testing import CliRunner
from tiny_models import VOCABULARY, save_tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from qconvert.cli import main
from qconvert.ir.progress import Progress
from qconvert.ir.report import Report
from qconvert.ir.task import ENCODER, SEQ2SEQ_LM
from qconvert.pipeline import conversion, verification
from qconvert.recipe import Recipe
from qconvert.targets import graph_files

ARCHITECTURES = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
# Heads that write text on top of families that read text: what their attention sees is for the config to say.
WRITING_ENCODERS = re.compile("(Bert|Roberta|Electra).*(ForCausalLM|LMHeadModel)$")
LENGTHS = (11, 7)
COSINE = 0.99  # the least that rounding to int8 leaves of any token; verification holds the graph to its own weights


@dataclass(frozen=True, slots=True)
class Result:
    """exit_code, message: of the command. outputs: name -> smallest cosine to what torch computes on the float weights, of any
    token or row. missing: outputs of the class that no graph has."""

    exit_code: int
    message: str
    outputs: Mapping[str, float]
    missing: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        if self.exit_code == 0:
            return bool(self.outputs) and not self.missing and min(self.outputs.values()) > COSINE
        return self.exit_code == 3


def classes(config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """All that transformers has for a kind of config."""
    modeling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    named = [getattr(modeling, name) for name in modeling.__all__ if not re.search("Pre[tT]rained", name)]
    return [each for each in named if issubclass(each, PreTrainedModel) and each.config_class is config_class]


def variants(model_type: str) -> Iterator[tuple[type[PreTrainedModel], dict[str, Any]]]:
    """Each class of a model type, with what is to be set in its config."""
    _, make, _ = ARCHITECTURES[model_type]
    for each in classes(type(make().config)):
        yield each, {}
        if WRITING_ENCODERS.match(each.__name__):
            yield each, {"is_decoder": True}
            yield each, {"is_decoder": True, "add_cross_attention": True}


def label(model_class: type[PreTrainedModel], settings: Mapping[str, Any]) -> str:
    """The name of a variant."""
    return model_class.__name__ + (f" ({', '.join(settings)})" if settings else "")


def save(model_class: type[PreTrainedModel], model_type: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """A tiny random model of that class in a folder, as save_pretrained writes it, with a tokenizer."""
    _, make, _ = ARCHITECTURES[model_type]
    config = make().config
    for name, value in {"vocab_size": VOCABULARY, "pad_token_id": 0, **settings}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    module = model_class(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.dim() == 1 else 0.15)
    module.save_pretrained(folder)
    save_tokenizer(folder)
    return model_class.from_pretrained(folder).eval()


def convert(source: Path, output: Path, *flags: str) -> tuple[int, str]:
    """`qconvert run`: its exit code, and what it says of an error."""
    recipe, data = source.parent / "recipe.yaml", {"samples": 2, "length": 24}
    recipe.write_text(json.dumps({"calibration": data, "evaluation": data}))
    with (
        mock.patch.object(conversion, "verify_in_fresh_process", _measured_here),
        mock.patch("qconvert.verify.repeats.MOST", 1),
        mock.patch("os.sched_getaffinity", return_value={0}),
    ):
        result = CliRunner().invoke(main, ["run", str(recipe), f"--model={source}", f"--output={output}", *flags])
    lines = result.stderr.partition("[QC-")
    return result.exit_code, " ".join((lines[1] + lines[2] if lines[1] else repr(result.exception)).split())


def _measured_here(recipe: Recipe, folder: Path, scratch: Path, progress: Progress) -> Report:
    return verification.measure(folder, recipe, progress)


def batch() -> dict[str, Tensor]:
    """Two rows of different length, padded on the right."""
    rows = [(torch.arange(length) * 7919 + 31 * length) % (VOCABULARY - 5) + 5 for length in LENGTHS]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def torch_outputs(module: PreTrainedModel) -> dict[str, Tensor]:
    """What the class itself gives for `batch`, and of one that writes no text the last hidden state. The decoder of an
    encoder-decoder reads what the encoder reads; what its encoder gives is no output of the whole."""
    inputs = batch()
    taken = inspect.signature(module.forward).parameters
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        output = module(**inputs, use_cache=False) if "use_cache" in taken else module(**inputs)
        found = {name: value for name, value in output.items() if isinstance(value, Tensor) and not name.startswith("encoder_")}
        return found if module.can_generate() else {"last_hidden_state": module.base_model(**batch())[0], **found}


def onnx_outputs(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What the graphs give for `batch`, but for caches."""
    given = {name: value.numpy() for name, value in batch().items()}
    given["encoder_attention_mask"] = given["attention_mask"]
    found: dict[str, np.ndarray[Any, Any]] = {}
    seq2seq = (folder / "decoder.onnx").exists()
    for file in graph_files(SEQ2SEQ_LM if seq2seq else ENCODER).values():
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                given[value.name] = np.zeros((len(LENGTHS), value.shape[1], 0, value.shape[3]), np.float32)
            given.setdefault(value.name, np.zeros_like(given["input_ids"]))  # token types
        found = dict(
            zip(
                (value.name for value in session.get_outputs()),
                session.run(None, {value.name: given[value.name] for value in session.get_inputs()}),
                strict=True,
            )
        )
        given |= found
    return {name: value for name, value in found.items() if not name.startswith("present.")}


def cosine(found: np.ndarray[Any, Any], expected: Tensor) -> float:
    """The smallest of any row, or of any token that is no padding."""
    if found.shape != expected.shape:
        return float("nan")
    each = torch.cosine_similarity(torch.from_numpy(found), expected, dim=-1)
    if each.ndim == 2:
        each = each[batch()["attention_mask"].bool()]
    return float(each.min())


def sweep(model_class: type[PreTrainedModel], model_type: str, root: Path, settings: Mapping[str, Any]) -> Result:
    name = label(model_class, settings)
    module = save(model_class, model_type, root / name, **settings)
    layout = ["--layout=onnx"] if model_type == "gpt2" else []  # its Conv1D is in no other
    exit_code, message = convert(root / name, root / f"{name}-out", "--quantizer=absmax", "--scheme=int8-channel", *layout)
    if exit_code:
        return Result(exit_code, message, {})
    found, expected = onnx_outputs(root / f"{name}-out"), torch_outputs(module)
    cosines = {name: cosine(value, expected[name]) for name, value in found.items()}
    return Result(0, "", cosines, tuple(expected.keys() - found.keys()))


def run(model_types: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    faults = 0
    print("| model type | class | result | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for model_type in model_types or ARCHITECTURES:
            for model_class, settings in variants(model_type):
                result = sweep(model_class, model_type, Path(folder), settings)
                faults += not result.right
                said = ", ".join(f"{name} {value:.5f}" for name, value in result.outputs.items()) or result.message
                if result.missing:
                    said += f"; missing: {', '.join(result.missing)}"
                verdict = ("" if result.right else "FAULT ") + (
                    "converted" if result.exit_code == 0 else f"exit {result.exit_code}"
                )
                print(f"| {model_type} | {label(model_class, settings)} | {verdict} | {said} |", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
