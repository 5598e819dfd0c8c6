"""Tiny models with their sources in memory, and a quantizing generator: what the tests of the write stage share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibrate_models import job_of
from torch import Tensor, nn

from qconvert.ir import affine
from qconvert.ir.histogram import WeightHistogram
from qconvert.ir.model import Model, TensorInfo
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.quantized import QuantizedBlock, QuantizedLayer, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.write_result import WriteResult
from qconvert.storage.stage import Stage, open_stage
from qconvert.write import write

DIGEST = "0123456789abcdef"
HISTOGRAM = WeightHistogram(-0.5, 0.5, (1, 2), (2, 1), 1, -0.3, 0.4)
SchemeOf = Callable[[str], str | None]


@dataclass(frozen=True)
class MemorySource:
    content: Mapping[str, Tensor]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.content.items()}

    def read(self, name: str) -> Tensor:
        return self.content[name].contiguous()


class Block(nn.Module):
    """`a` and `b` share an input; `norm` is kept float."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a = nn.Linear(width, 48, bias=False)
        self.b = nn.Linear(width, 24, bias=True)


class Net(nn.Module):
    """Two blocks, a float embedding and a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 7, bias=False)  # as many rows as the embedding: may be tied to it


def net(width: int = 64, extra: Mapping[str, Tensor] | None = None, **fields: Any) -> Model:
    """A Model of `Net`; `extra` tensors are stored too, though the module doesn't know them."""
    torch.manual_seed(0)
    module = Net(width)
    content = {**module.state_dict(), **(extra or {})}
    return Model("net", "module", module, MemorySource(content), ("blocks.0", "blocks.1"), **fields)  # type: ignore[arg-type]


def all_linears(scheme: str | None) -> SchemeOf:
    return lambda name: None if name in ("head", "lm_head") else scheme


def plan_of(model: Model, scheme_of: SchemeOf) -> Plan:
    layers = {}
    for name, module in model.module.named_modules():
        scheme = scheme_of(name) if isinstance(module, nn.Linear) else None
        if isinstance(module, nn.Linear) and scheme is not None:
            out, width = module.weight.shape
            layers[name] = LayerPlan(name, "linear", out, width, QuantScheme.parse(scheme))
    return Plan(QuantScheme.parse("int8"), layers, (), False, 0, {})


def quantize_layer(model: Model, layer: LayerPlan) -> QuantizedTensor:
    weight = model.read(f"{layer.name}.weight").float()
    scale, zero_point = affine.choose_qparams(weight, layer.scheme)
    return QuantizedTensor(affine.quantize(weight, scale, zero_point, layer.scheme), scale, zero_point, layer.scheme)


def quantized_blocks(model: Model, plan: Plan, skip: tuple[str, ...] = ()) -> Iterator[QuantizedBlock]:
    for name in (*model.blocks, ""):
        if name not in skip:
            planned = [layer for layer in plan.layers.values() if model.block_of(layer.name) == name]
            yield QuantizedBlock(
                name, tuple(QuantizedLayer(layer.name, quantize_layer(model, layer), 0.25, HISTOGRAM) for layer in planned)
            )


def write_blocks(blocks: Iterable[QuantizedBlock], model: Model, plan: Plan, stage: Stage, **settings: Any) -> WriteResult:
    """The blocks in the stage. settings: of the recipe."""
    return write(blocks, job_of(model, plan, **settings), stage)


def convert(model: Model, scheme_of: SchemeOf, output: Path) -> Plan:
    """Quantize to nearest, write and publish."""
    plan = plan_of(model, scheme_of)
    with open_stage(output, DIGEST) as stage:
        write_blocks(quantized_blocks(model, plan, stage.done_blocks()), model, plan, stage)
        stage.publish()
    return plan
