"""The write stage: takes quantized blocks as they come, puts each on disk and journals it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Any

from torch import Tensor

from qconvert.errors import PluginError, QConvertError
from qconvert.ir.artifact import StoredTensor
from qconvert.ir.contents import Unit, shards, units
from qconvert.ir.finite import require_finite
from qconvert.ir.histogram import with_histogram
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.quantized import QuantizedBlock, QuantizedTensor
from qconvert.ir.report import LayerReport
from qconvert.ir.write_result import WriteResult
from qconvert.job import Job
from qconvert.storage.layout import SUFFIXES, encode
from qconvert.storage.reader import tensor_record
from qconvert.storage.stage import Stage
from qconvert.storage.weights import WeightFiles
from qconvert.targets.cpu_sidecar import sidecar_tensors
from qconvert.write.carried import write_carried
from qconvert.write.cast import cast_tensor
from qconvert.write.config import write_config


def write(blocks: Iterable[QuantizedBlock], job: Job, stage: Stage) -> WriteResult:
    """Write the files of weights, the sidecar, config.json and the carried files into `stage.folder`.

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
        done = set(stage.done_blocks())
        self._waiting = [unit for unit in units(self.model, self.plan) if unit.name not in done]
        files = shards(self.model, self.plan)
        stage.require_space(sum(info.nbytes for file in files for info in file.values()))
        self._weights = WeightFiles(stage.folder, files, stage.tensors())

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
            _check_smoothing_scales(block)
        self._write(waiting.pop(0), block)

    def finish(self) -> WriteResult:
        """Write what lies between the blocks, and the other files, once all blocks have been appended."""
        for unit in self._waiting:
            if unit.layers:
                raise _internal(f"block {unit.name!r} never came")
            self._write(unit, QuantizedBlock(unit.name, ()))
        self._weights.finish(self.stage.tensors())
        self.close()
        write_config(self.model, self.plan, self.stage, self.layout)
        write_carried(self.model, self.stage)
        return WriteResult(self.stage.tensors(), _layer_reports(self.plan, self.stage), self.plan.assignment)

    def close(self) -> None:
        """Close the files of weights, complete or not."""
        self._weights.close()

    def _write(self, unit: Unit, block: QuantizedBlock) -> None:
        _write_unit(unit, block, self.model, self.plan, self.stage, self._weights)


def _write_unit(unit: Unit, block: QuantizedBlock, model: Model, plan: Plan, stage: Stage, weights: WeightFiles) -> None:
    """Append one unit's tensors, make them durable, then journal them."""
    layers = {layer.name: layer for layer in block.layers}
    if layers.keys() != unit.layers.keys():
        odd = ", ".join(map(ascii, sorted(layers.keys() ^ unit.layers.keys())))
        raise _internal(f"block {unit.name!r}: planned and quantized layers differ in {odd}")
    stored = _append_layers(unit, block, weights)
    reports: list[LayerReport] = []
    for output, source in unit.floats.items():
        tensor = _float_tensor(model, block, output, source)
        if source in plan.cast:
            tensor, report = cast_tensor(model, plan, source, tensor)
            reports.append(report)
        stored[output] = weights.append(output, tensor)
    extra = {
        name: [
            (f"{name}.{suffix}", stage.sidecar.append(f"{name}.{suffix}", tensor))
            for suffix, tensor in sidecar_tensors(unit.layers[name], layer.tensor).items()
        ]
        for name, layer in layers.items()
    }
    reports += [
        LayerReport(
            name=name,
            scheme=str(layer.tensor.scheme),
            relative_error=layer.relative_error,
            bytes=sum(stored[f"{name}.{suffix}"].nbytes for suffix in unit.layers[name].disk_tensors)
            + sum(tensor.nbytes for _, tensor in extra[name]),
            outlier_share=_outlier_share(layer.tensor),
            reason=unit.layers[name].reason,
            histogram=layer.histogram,
        )
        for name, layer in layers.items()
    ]
    weights.sync()
    stage.sidecar.sync()
    stage.journal.append(
        {
            "block": unit.name,
            "tensors": _records([*stored.items(), *(each for tensors in extra.values() for each in tensors)]),
            "layers": [report.model_dump() for report in reports],
        }
    )


def _records(tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, dict[str, Any]]:
    """The journal's form of tensors: file -> name -> record."""
    records: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors:
        records.setdefault(tensor.file, {})[name] = tensor_record(tensor)
    return records


def _outlier_share(tensor: QuantizedTensor) -> float | None:
    return None if tensor.outliers is None else len(tensor.outliers.columns) / tensor.q.shape[1]


def _append_layers(unit: Unit, block: QuantizedBlock, weights: WeightFiles) -> dict[str, StoredTensor]:
    """Append the quantized layers, tensors of one suffix together in the order of the layers."""
    encoded = {layer.name: encode(unit.layers[layer.name], layer.tensor) for layer in block.layers}
    return {
        f"{name}.{suffix}": weights.append(f"{name}.{suffix}", tensors[suffix])
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
    """Return whether the module computes with it: checkpoints also hold masks and the like, which may well be infinite."""
    try:
        model.module.get_parameter(name)
    except AttributeError:
        return False
    return True


def _check_smoothing_scales(block: QuantizedBlock) -> None:
    for layer in block.layers:
        if layer.tensor.smoothing_scale is not None:
            raise PluginError(
                "QC-WRITE-001",
                f"{layer.name!a} came with a smoothing scale that was not folded, which no loader of the transformers "
                "layout would undo",
                hint="use --layout onnx, or let the quantizer set smoothing scales in `prepare` only",
            )


def _layer_reports(plan: Plan, stage: Stage) -> tuple[LayerReport, ...]:
    """The journalled reports in the plan's order."""
    entries = {entry["name"]: entry for record in stage.journal.records() for entry in record.get("layers", ())}
    reports = [LayerReport.model_validate(entries[name]) for name in (*plan.layers, *plan.cast)]
    kept = with_histogram([report.relative_error for report in reports])
    return tuple(
        report if keeps else report.model_copy(update={"histogram": None}) for report, keeps in zip(reports, kept, strict=True)
    )


def _internal(message: str) -> QConvertError:
    return QConvertError("QC-WRITE-004", message, hint="this is a bug of qconvert: please report it with the recipe")
