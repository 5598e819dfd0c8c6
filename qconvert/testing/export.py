"""Checks of what becomes of a quantizer's results on disk and in ONNX Runtime: the stages of a real conversion."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from qconvert.calibrate import Participant, calibrate
from qconvert.errors import QConvertError
from qconvert.export import export
from qconvert.ir.model import Model
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.samples import Samples
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.job import Job
from qconvert.load import load
from qconvert.plan import plan as make_plan
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantize import quantize
from qconvert.recipe import Recipe
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.stage import open_stage
from qconvert.testing.failure import CheckFailure
from qconvert.testing.samples import difference, schemes_of
from qconvert.trace import trace
from qconvert.verify.parity import TOLERANCE, cluster_parity, graph_parity, torch_outputs
from qconvert.write import write

SOURCE = "module:qconvert.testing.network:network"


def check_written_tensors_read_back(quantizer: Quantizer) -> None:
    """What is read back from the written folder is what the quantizer returned, bit for bit."""

    def compare(artifact: ArtifactReader, tensors: dict[str, QuantizedTensor], scheme: QuantScheme) -> None:
        for name, tensor in tensors.items():
            if tensor.smoothing_scale is not None:  # its reciprocal is stored, for the graph to multiply by
                tensor = replace(tensor, smoothing_scale=1 / (1 / tensor.smoothing_scale))
            if found := difference(artifact.layer(name), tensor):
                raise CheckFailure(f"layer {name!r} {list(tensor.q.shape)}, scheme {scheme}: read back, {found}")

    _convert(quantizer, compare)


def check_exported_graph_equals_dequantization(quantizer: Quantizer) -> None:
    """The exported graph computes in ONNX Runtime what torch computes with the dequantized weights, within 1e-4."""

    def compare(artifact: ArtifactReader, tensors: dict[str, QuantizedTensor], scheme: QuantScheme) -> None:
        error = max(graph_parity(artifact, torch_outputs(artifact.model, artifact.read)), cluster_parity(artifact))
        if not error <= TOLERANCE:
            names = ", ".join(map(repr, tensors))
            raise CheckFailure(f"layers {names}, scheme {scheme}: outputs differ by {error:.1e} of the largest")

    _convert(quantizer, compare)


def _convert(quantizer: Quantizer, compare: Callable[[ArtifactReader, dict[str, QuantizedTensor], QuantScheme], None]) -> None:
    """Calls `compare` with the artifact of every scheme and with what the quantizer returned, by layer."""
    model, template = _traced()
    for scheme in schemes_of(quantizer):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            settings = {"model": SOURCE, "output": str(output), "scheme": str(scheme), "layout": "onnx"}
            try:
                recipe = Recipe.from_settings(settings)
                plan = make_plan(model, template, recipe, quantizer)
                samples = Samples((dict(model.example_inputs),), ())
                job = Job(recipe, recipe, quantizer, model, template, plan, samples)
                done = [quantize(block, job) for block in calibrate([Participant(job)])]
                with open_stage(output, "0" * 12) as stage:
                    export(job, write(done, job, stage), stage)
                    tensors = {layer.name: layer.tensor for block in done for layer in block.layers}
                    compare(ArtifactReader(stage.folder, model, plan, stage.tensors()), tensors, scheme)
            except QConvertError as error:
                raise CheckFailure(f"scheme {scheme}: {error.message}") from error


@cache
def _traced() -> tuple[Model, Template]:
    model = load(SOURCE, lambda _: None)
    return model, trace(model)
