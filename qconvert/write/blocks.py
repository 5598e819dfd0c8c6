"""The write stage: takes quantized blocks as they come, puts each on disk and journals it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing

from torch import Tensor

from qconvert.errors import PluginError, QConvertError
from qconvert.ir.artifact import SIDECAR, WEIGHTS, StoredTensor
from qconvert.ir.finite import require_finite
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.quantized import QuantizedBlock, QuantizedTensor
from qconvert.ir.report import LayerReport
from qconvert.ir.write_result import WriteResult
from qconvert.job import Job
from qconvert.storage.compressed_tensors import SUFFIXES, encode
from qconvert.storage.reader import tensor_record
from qconvert.storage.safetensors import SafetensorsFile
from qconvert.storage.stage import Stage
from qconvert.targets import cpu_sidecar
from qconvert.write.carried import write_carried
from qconvert.write.config import write_config
from qconvert.write.contents import Unit, largest, units


def write(blocks: Iterable[QuantizedBlock], job: Job, stage: Stage) -> WriteResult:
    """Write model.safetensors, the sidecar, config.json and the carried files into `stage.folder`.

    blocks: in the order of the model's, then "" for what lies outside; those of `stage.done_blocks()` left out.

    Raises ResourceError (disk), PluginError QC-WRITE-001 and UsageError QC-WRITE-002 where the transformers layout can't
    hold what a quantizer returned. A resumed run gives the same bytes as one that was never interrupted.
    """
    with closing(Writer(job, stage)) as writer:
        for block in blocks:
            writer.append(block)
        return writer.finish()


class Writer:
    """`write` for who has no stream of blocks to pull from: `append` each, then `finish`; `close` in any case."""

    def __init__(self, job: Job, stage: Stage) -> None:
        self.model, self.plan, self.layout = job.model, job.plan, job.recipe.layout
        self.stage = stage
        every = units(self.model, self.plan)
        done = set(stage.done_blocks())
        self._waiting = [unit for unit in every if unit.name not in done]
        tensors = largest(self.model, every)
        stage.require_space(sum(info.nbytes for info in tensors.values()))
        self._weights = SafetensorsFile(stage.folder, tensors, stage.tensors_of(WEIGHTS))

    def append(self, block: QuantizedBlock) -> None:
        """Put a block on disk, with all that comes before it."""
        waiting = self._waiting
        # A unit without quantized layers may be skipped by the quantizing stage.
        while waiting and waiting[0].name != block.name and not waiting[0].layers:
            self._write(waiting.pop(0), QuantizedBlock("", ()))
        if not waiting or waiting[0].name != block.name:
            expected = f"block {waiting[0].name!r}" if waiting else "no more blocks"
            raise _internal(f"got block {block.name!r} where {expected} should come")
        if self.layout == "transformers" and self.model.config is not None:
            _check_input_scales(block)
        self._write(waiting.pop(0), block)

    def finish(self) -> WriteResult:
        """Once all blocks have been appended: what lies between them, and the other files."""
        for unit in self._waiting:
            if unit.layers:
                raise _internal(f"block {unit.name!r} never came")
            self._write(unit, QuantizedBlock(unit.name, ()))
        self._weights.finish(self.stage.tensors_of(WEIGHTS))
        self.close()
        write_config(self.model, self.plan, self.stage, self.layout)
        write_carried(self.model, self.stage)
        return WriteResult(self.stage.tensors(), _layer_reports(self.plan, self.stage), self.plan.assignment)

    def close(self) -> None:
        self._weights.close()

    def _write(self, unit: Unit, block: QuantizedBlock) -> None:
        _write_unit(unit, block, self.model, self.stage, self._weights)


def _write_unit(unit: Unit, block: QuantizedBlock, model: Model, stage: Stage, weights: SafetensorsFile) -> None:
    """Append one unit's tensors, make them durable, then journal them."""
    layers = {layer.name: layer for layer in block.layers}
    if layers.keys() != unit.layers.keys():
        odd = ", ".join(map(ascii, sorted(layers.keys() ^ unit.layers.keys())))
        raise _internal(f"block {unit.name!r}: planned and quantized layers differ in {odd}")
    stored = _append_layers(unit, block, weights)
    for output, source in unit.floats.items():
        stored[output] = weights.append(_float_tensor(model, block, output, source))
    extra = {
        name: [
            (f"{name}.{suffix}", stage.sidecar.append(f"{name}.{suffix}", tensor))
            for suffix, tensor in cpu_sidecar.sidecar_tensors(unit.layers[name], layer.tensor).items()
        ]
        for name, layer in layers.items()
    }
    reports = [
        LayerReport(
            name=name,
            scheme=str(layer.tensor.scheme),
            relative_error=layer.relative_error,
            bytes=sum(stored[f"{name}.{suffix}"].nbytes for suffix in unit.layers[name].disk_tensors)
            + sum(tensor.nbytes for _, tensor in extra[name]),
            outlier_share=_outlier_share(layer.tensor),
            reason=unit.layers[name].reason,
        )
        for name, layer in layers.items()
    ]
    weights.sync()
    stage.sidecar.sync()
    stage.journal.append(
        {
            "block": unit.name,
            "tensors": {
                WEIGHTS: {name: tensor_record(tensor) for name, tensor in stored.items()},
                SIDECAR: {name: tensor_record(tensor) for tensors in extra.values() for name, tensor in tensors},
            },
            "layers": [report.model_dump() for report in reports],
        }
    )


def _outlier_share(tensor: QuantizedTensor) -> float | None:
    return None if tensor.outliers is None else len(tensor.outliers.columns) / tensor.q.shape[1]


def _append_layers(unit: Unit, block: QuantizedBlock, weights: SafetensorsFile) -> dict[str, StoredTensor]:
    """Append the quantized layers, tensors of one suffix together in the order of the layers."""
    encoded = {layer.name: encode(unit.layers[layer.name], layer.tensor) for layer in block.layers}
    return {
        f"{name}.{suffix}": weights.append(tensors[suffix])
        for suffix in SUFFIXES
        for name, tensors in encoded.items()
        if suffix in tensors
    }


def _float_tensor(model: Model, block: QuantizedBlock, output: str, source: str) -> Tensor:
    """A tensor that stays float, in its stored dtype: as a fold has left it, else as the source holds it."""
    changed = block.tensors.get(output, block.tensors.get(source))
    if changed is None:
        tensor = model.source.read(source)
        if _is_parameter(model, output):
            require_finite(output, tensor)
        return tensor
    info = model.source.tensors[source]
    if tuple(changed.shape) != info.shape:
        raise _internal(f"tensor {output!a} was folded to {tuple(changed.shape)}, but the source has {info.shape}")
    return changed.to(info.dtype)


def _is_parameter(model: Model, name: str) -> bool:
    """Whether the module computes with it: checkpoints also hold masks and the like, which may well be infinite."""
    try:
        model.module.get_parameter(name)
    except AttributeError:
        return False
    return True


def _check_input_scales(block: QuantizedBlock) -> None:
    for layer in block.layers:
        if layer.tensor.input_scale is not None:
            raise PluginError(
                "QC-WRITE-001",
                f"{layer.name!a} came with an input scale that was not folded, which no loader of the transformers "
                "layout would undo",
                hint="use --layout onnx, or let the quantizer set input scales in `prepare` only",
            )


def _layer_reports(plan: Plan, stage: Stage) -> tuple[LayerReport, ...]:
    """The journalled reports in the plan's order."""
    reports = {entry["name"]: entry for record in stage.journal.records() for entry in record.get("layers", ())}
    return tuple(LayerReport(**reports[name]) for name in plan.layers)


def _internal(message: str) -> QConvertError:
    return QConvertError("QC-WRITE-004", message, hint="this is a bug of qconvert: please report it with the recipe")
