"""Walking through a model block by block, with observers on the inputs of its layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qconvert.calibrate.bfloat16_matmul import coarse_products
from qconvert.calibrate.importance import importance_of, padding_mask
from qconvert.calibrate.tuning_samples import FloatOutputs, TuningSamples
from qconvert.errors import UsageError
from qconvert.execution import probes
from qconvert.execution.block_runner import BlockRunner, StopForward, checked_device
from qconvert.execution.materialize import ReadParameter
from qconvert.ir.finite import not_finite
from qconvert.ir.layer import Batch, Block, CalibrationStats, Layer, LinearGroup
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.template import InputGroup
from qconvert.plugin.host import contract
from qconvert.plugin.observer import Observer
from qconvert.plugin.quantizer import Quantizer


def calibrate(
    model: Model,
    plan: Plan,
    groups: Sequence[InputGroup],
    quantizer: Quantizer,
    batches: Sequence[Batch],
    device: str = "cpu",
    done: frozenset[str] = frozenset(),
    written: Callable[[], ReadParameter] | None = None,
    tuned: bool = False,
) -> Iterator[Block]:
    """The model's units in forward order, the repeated blocks and then "" for what lies outside them; lazily, one at a time.

    Units without a planned layer are left out. With a quantizer that has no observers and chooses no input scales, and nothing
    to tune, nothing is run, and the blocks carry neither statistics nor tensors. Otherwise each block is run on the outputs of
    the block before: of the float one, or with `written` of the quantized one. Where only the folding of scales is to be
    proved, on a few random tokens.

    groups: which layers share an input; a planned layer that is in none is a group of its own.
    batches: calibration samples, see `qconvert.ir.samples.Samples`.
    device: where blocks run; what is yielded is on the CPU.
    done: units that are not needed (a resumed run has them); samples still pass through them.
    written: for sequential quantization, gives what reads the parameters of the units that are written, dequantized. A unit
        must have been written when the next one is asked for.
    tuned: whether blocks carry the samples that they are tuned on.

    Raises UsageError QC-CALIB-001 for a planned layer whose input was never seen, InputError QC-FLOAT-001 for one whose input
    is not finite, and what BlockRunner raises.
    """
    scaled = chooses_scales(quantizer)
    for block in observe(model, plan, groups, quantizer.observers, batches, device, done, written, tuned=tuned, scaled=scaled):
        require_seen(block)
        yield block


def chooses_scales(quantizer: Quantizer) -> bool:
    """Whether it may ask for input scales, whose folding is proved on blocks that run."""
    return type(quantizer).prepare is not Quantizer.prepare


def observe(
    model: Model,
    plan: Plan,
    groups: Sequence[InputGroup],
    observers: Sequence[type[Observer]],
    batches: Sequence[Batch],
    device: str,
    done: frozenset[str],
    written: Callable[[], ReadParameter] | None = None,
    *,
    tuned: bool = False,
    scaled: bool,
) -> Iterator[Block]:
    """`calibrate` for these observers. Layers that no sample has reached have statistics of 0 rows, without values.

    scaled: whether input scales may be chosen.
    """
    checked_device(device)  # also where nothing will run there: a misspelt one is never ignored
    members = groups_by_unit(model, plan, groups)
    units = (*model.blocks, "")
    pending = [unit for unit in units if unit in members and unit not in done]
    if not pending:
        return
    counted = bool(observers or tuned)
    folds = scaled and any(group.producer for unit in pending for group in members[unit])
    if not (counted or folds):
        for unit in pending:
            yield Block(unit, tuple(_linear_group(model, plan, replace(group, producer=None), None) for group in members[unit]))
        return
    runner = BlockRunner(model, device=device)
    runner.start(batches if counted else probes.probes(model))
    floats = FloatOutputs(runner) if tuned and written else None
    products = nullcontext if tuned else coarse_products  # what tuning approaches is the float block's output itself
    for index, unit in enumerate(units[: units.index(pending[-1]) + 1]):
        runner.enter(index)
        inputs = list(runner.hidden)
        if floats and unit:
            floats.advance(index)
        if unit in pending:
            block = _observed_block(runner, index, plan, members[unit], observers, counted=counted, products=products)
            targets = floats.hidden if floats else list(runner.hidden)
            yield replace(block, samples=TuningSamples(runner, index, inputs, targets)) if tuned and unit else block
        elif written is None or unit not in members:
            with products():
                runner.run_block(index)
        if written and unit and unit in members:
            runner.hidden = inputs
            with products():
                runner.run_block(index, written())


def require_seen(block: Block) -> None:
    """Raises UsageError QC-CALIB-001 for layers that have statistics, but of no row."""
    names = [layer.name for layer in block.layers if layer.stats is not None and not layer.stats.rows]
    if names:
        raise UsageError(
            "QC-CALIB-001",
            f"no calibration sample reached {', '.join(map(repr, names[:5]))} ({len(names)} layers in all saw 0 rows)",
            hint=f"keep it in float with --rule '{names[0]}=float', or calibrate on more varied data",
        )


def _observed_block(
    runner: BlockRunner,
    index: int,
    plan: Plan,
    groups: Sequence[InputGroup],
    observers: Sequence[type[Observer]],
    *,
    counted: bool,
    products: Callable[[], AbstractContextManager[None]],
) -> Block:
    """counted: whether layers get statistics, of no observer as well. products: what the block runs in."""
    model = runner.model
    unit = (*model.blocks, "")[index]
    watch = _Watch(model, plan, groups, observers)
    inputs = list(runner.hidden[:1])
    with runner.weights_of(unit), watch.hooked(), products():
        for batch, sample in enumerate(runner.batches):
            watch.mask = padding_mask(sample) if model.task != "module" else None
            if unit:
                runner.hidden[batch] = runner.call_block(index, batch, runner.hidden[batch])
                watch.observe(runner.hidden[batch])
            else:
                runner.run_outside(batch)
                watch.observe(None)
    stats = watch.finalize() if counted else [None] * len(groups)
    tensors = {
        name: model.read(name).float() for group in groups if group.producer for name in _parameters(model, group.producer.name)
    }
    members = tuple(_linear_group(model, plan, group, found) for group, found in zip(groups, stats, strict=True))
    run = partial(_run_block, runner, index, inputs[0]) if unit else partial(runner.run_outside, 0)
    return Block(unit, members, tensors, partial(_relative_change, runner, unit, run))


def _run_block(runner: BlockRunner, index: int, hidden: Tensor) -> list[Tensor]:
    return [runner.call_block(index, 0, hidden)]


def _relative_change(runner: BlockRunner, unit: str, run: Callable[[], list[Tensor]], replaced: Mapping[str, Tensor]) -> float:
    """max |out' - out| / max |out| over the first calibration batch, in full float32; inf if anything is not finite.

    run: the unit, its weights being in place, on that batch.
    replaced: full parameter name -> tensor as in the module (Conv1D [in, out]), but kernels may be flattened.
    """
    model = runner.model
    unknown = [
        name for name in replaced if name not in _parameters(model, name.rpartition(".")[0]) or model.block_of(name) != unit
    ]
    if unknown:
        raise ValueError(f"{unknown} are no parameters of {unit!r}")

    def read(name: str) -> Tensor:
        return replaced[name].reshape(model.module.get_parameter(name).shape) if name in replaced else model.read(name)

    with runner.weights_of(unit):
        expected = run()
    with runner.weights_of(unit, read):
        changed = run()
    worst = 0.0
    for before, after in zip(expected, changed, strict=True):
        largest = max(before.abs().max().item(), torch.finfo(torch.float32).tiny)
        difference = (after - before).abs().max().item()
        worst = max(worst, difference / largest if math.isfinite(difference) else math.inf)
    return worst


class _Watch:
    """Observers on the first layer of every group of a unit; what one batch shows them is kept until its output is known.

    mask: [rows, tokens] bool, False at padding; None where nothing is padded. Of the batch that runs; a decoder's tokens
        are padded as its source is.
    """

    def __init__(self, model: Model, plan: Plan, groups: Sequence[InputGroup], observers: Sequence[type[Observer]]) -> None:
        self.mask: Tensor | None = None
        self.model = model
        self.plan = plan
        self.groups = groups
        self.observers: list[list[Observer]] = [[observer() for observer in observers] for _ in groups]
        self.rows = [0] * len(groups)
        self._seen: list[tuple[int, Tensor]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        hooks = [
            self.model.module.get_submodule(group.layers[0]).register_forward_pre_hook(partial(self._see, index))
            for index, group in enumerate(self.groups)
            if not self._is_embedding(group)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.groups[index].layers[0]
        self._seen.append((index, _patches(module, args[0]) if self.plan.layers[name].kind == "conv2d" else args[0]))
        if name == self.model.output_head:  # nothing comes after the head, and its logits are expensive
            raise StopForward

    def observe(self, output: Tensor | None) -> None:
        """Show the observers what the batch that has run brought to them.

        output: hidden state [rows, tokens, hidden] that the block made of it; None outside the blocks.
        """
        importance = torch.empty(0) if output is None else importance_of(output)
        for index, value in self._seen:
            rows = self._token_rows(value).float()
            if not len(rows):
                continue
            if not torch.isfinite(torch.stack(rows.aminmax())).all():
                raise not_finite(f"goes into {self.groups[index].layers[0]!r} during calibration")
            self.rows[index] += len(rows)
            fits = value.shape[:-1] == importance.shape
            counts = self._token_rows(importance[..., None])[:, 0] if fits else rows.new_ones(len(rows))
            for observer in self.observers[index]:
                contract.update(observer, rows, counts, self.groups[index].layers[0])
        self._seen.clear()

    def _token_rows(self, value: Tensor) -> Tensor:
        """[..., in] -> [n, in], padding left out where the leading axes are those of the mask."""
        if self.mask is not None and value.dim() == 3 and value.shape[:2] == self.mask.shape:
            return value[self.mask]
        return value.reshape(-1, value.shape[-1])

    def _is_embedding(self, group: InputGroup) -> bool:
        """An embedding reads indices, of which there is nothing to observe."""
        return self.plan.layers[group.layers[0]].kind == "embedding"

    def finalize(self) -> list[CalibrationStats | None]:
        """Per group; None for embeddings, no values where no row was seen."""
        return [
            None
            if self._is_embedding(group)
            else CalibrationStats(
                rows, {each.name: contract.finalize(each, group.layers[0]) for each in observers} if rows else {}, group.made_by
            )
            for group, rows, observers in zip(self.groups, self.rows, self.observers, strict=True)
        ]


def _patches(module: nn.Module, images: Tensor) -> Tensor:
    """What a Conv2d multiplies its flattened kernels with: [n, in/groups * kh * kw]."""
    assert isinstance(module, nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(images, module._reversed_padding_repeated_twice, mode=mode)  # "same" worked out by torch
    columns = nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    per_group = columns.reshape(len(images), module.groups, -1, columns.shape[-1])
    return per_group.transpose(2, 3).flatten(0, 2)


def groups_by_unit(model: Model, plan: Plan, groups: Sequence[InputGroup]) -> dict[str, list[InputGroup]]:
    """The planned layers of every unit, those with a common input together, with producers that can be folded into."""
    units: dict[str, list[InputGroup]] = defaultdict(list)
    grouped: set[str] = set()
    for group in groups:
        layers = tuple(name for name in group.layers if name in plan.layers)
        if layers:
            unit = model.block_of(layers[0])
            foldable = len(layers) == len(group.layers) and _may_fold(model, plan, unit, group)
            units[unit].append(replace(group, layers=layers, producer=group.producer if foldable else None))
            grouped.update(layers)
    for name in plan.layers:
        if name not in grouped:
            units[model.block_of(name)].append(InputGroup((name,), None))
    return dict(units)


def _may_fold(model: Model, plan: Plan, unit: str, group: InputGroup) -> bool:
    """A scale can move into the producer only where the unit holds all that changes, and nothing else uses it.

    (A layer of the group that stays in float would have to be scaled too; so would the other user of a tied weight.)
    A Conv1D that stays in float does not serve: its outputs are the columns of the tensor that it leaves in the block.
    """
    producer = group.producer
    if producer and producer.name not in plan.layers and isinstance(model.module.get_submodule(producer.name), Conv1D):
        return False
    names = [*group.layers, *([group.producer.name] if group.producer else [])]
    tied = {*model.tied, *model.tied.values()}
    return all(model.block_of(name) == unit and not tied.intersection(_parameters(model, name)) for name in names)


def _linear_group(model: Model, plan: Plan, group: InputGroup, stats: CalibrationStats | None) -> LinearGroup:
    return LinearGroup(tuple(_layer(model, plan, name, stats) for name in group.layers), group.producer, stats)


def _layer(model: Model, plan: Plan, name: str, stats: CalibrationStats | None) -> Layer:
    kind, bias = plan.layers[name].kind, f"{name}.bias"
    weight = model.read(f"{name}.weight").float()
    if kind == "conv1d":
        weight = weight.T.contiguous()
    return Layer(name, kind, weight.flatten(1), model.read(bias).float() if bias in _parameters(model, name) else None, stats)


def _parameters(model: Model, name: str) -> list[str]:
    """Full names of the parameters that a module itself has, [] where there is no such module."""
    try:
        module = model.module.get_submodule(name)
    except AttributeError:
        return []
    return [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
