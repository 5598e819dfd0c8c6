"""The walk through a model, block by block, with observers on the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from qconvert.calibrate.bfloat16_matmul import coarse_products
from qconvert.calibrate.importance import importance_of, padding_mask
from qconvert.calibrate.input_recorder import InputRecorder
from qconvert.calibrate.layers import groups_by_unit, linear_group, own_parameters
from qconvert.calibrate.participant import Participant, observers_of
from qconvert.execution.block_runner import BlockRunner, checked_device
from qconvert.execution.materialize import ReadParameter
from qconvert.execution.probes import probes
from qconvert.ir.batch import Batch
from qconvert.ir.lane import Lane
from qconvert.ir.layer import Block, BlockSamples
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.template import InputGroup
from qconvert.plugin.observer import Observer

# Gives what reads the parameters of the units that are written, dequantized.
Written = Callable[[], ReadParameter]


def calibrate(participants: Sequence[Participant], written: Written | None = None) -> Iterator[Block]:
    """Yield the units of a model, each as every participant needs it: the repeated blocks in forward order, then "" for what
    lies outside them. Each is made when it is asked for.

    Units without a planned layer are left out. With quantizers that have no observers and choose no smoothing scales, and
    nothing to tune, nothing is run, and the blocks carry neither statistics nor tensors. Otherwise each block is run on the
    outputs of the block before: of the float one, or with `written` of the quantized one. Where only the folding of scales is
    to be proved, on a few random tokens.

    participants: of one model, with the same calibration samples. A layer that is in no input group is a group of its own.
    written: for sequential quantization. A unit must have been written when the next one is asked for.

    What is yielded is on the CPU; layers that no sample has reached have statistics of 0 rows, without values.

    Raises InputError QC-FLOAT-001 for a planned layer whose input is not finite, PluginError QC-COMPARE-005, and what
    BlockRunner raises.
    """
    checked_device(participants[0].job.recipe.device)  # also where nothing will run: a misspelt one is never ignored
    walk = _walk_of(participants)
    if not walk.pending:
        return
    if not (walk.counted or walk.folds):
        yield from walk.unobserved()
    else:
        yield from walk.observed() if written is None else walk.sequential(written)


def _walk_of(participants: Sequence[Participant]) -> _Walk:
    job = participants[0].job
    layers: dict[str, LayerPlan] = {}  # only their names and kinds count here; schemes differ between participants
    for participant in participants:
        layers |= participant.job.plan.layers
    samples = next((each.job.samples.calibration for each in participants if each.job.samples.calibration), ())
    done = frozenset.intersection(*(participant.done for participant in participants))
    return _Walk(
        job.model,
        layers,
        {unit: found for unit, found in groups_by_unit(job.model, layers, job.template.groups).items() if unit not in done},
        observers_of(participants),
        samples,
        job.recipe.device,
        tuned=any(participant.job.tuner is not None for participant in participants),
        scaled=any(participant.chooses_scales for participant in participants),
        planned=frozenset(model_units(job.model, layers)),
    )


def model_units(model: Model, layers: Mapping[str, LayerPlan]) -> list[str]:
    """Return the units that hold planned layers, in forward order."""
    holding = {model.block_of(name) for name in layers}
    return [unit for unit in (*model.blocks, "") if unit in holding]


@dataclass(frozen=True, eq=False)
class _Walk:
    """One pass over a model.

    members: unit -> the groups that are observed there, of the units that are not done.
    planned: all units that hold planned layers, done or not.
    tuned: whether blocks carry the samples that they are tuned on. scaled: whether smoothing scales may be chosen.
    """

    model: Model
    layers: Mapping[str, LayerPlan]
    members: Mapping[str, Sequence[InputGroup]]
    observers: Sequence[type[Observer]]
    batches: Sequence[Batch]
    device: str
    tuned: bool
    scaled: bool
    planned: frozenset[str]

    @cached_property
    def pending(self) -> list[str]:
        return [unit for unit in (*self.model.blocks, "") if unit in self.members]

    @property
    def counted(self) -> bool:
        """Whether layers get statistics, of no observer as well."""
        return bool(self.observers or self.tuned)

    @property
    def folds(self) -> bool:
        """Whether scales may be folded, which is proved on blocks that run."""
        return self.scaled and any(group.producer for unit in self.pending for group in self.members[unit])

    def unobserved(self) -> Iterator[Block]:
        """Yield the units without running any."""
        for unit in self.pending:
            groups = (replace(group, producer=None) for group in self.members[unit])
            yield Block(unit, tuple(linear_group(self.model, self.layers, group, None) for group in groups))

    def observed(self) -> Iterator[Block]:
        """Yield the units, each block run on what the float blocks before it put out."""
        runner = self._started()
        for index, unit in self._path():
            runner.enter(index)
            lanes = [lane.at(index) for lane in runner.lanes]
            if unit in self.members:
                block = self._block(runner, index)
                yield self._with_samples(block, lanes, [lane.state for lane in runner.lanes]) if self.tuned and unit else block
            else:
                with self._products():
                    runner.run_block(index)

    def sequential(self, written: Written) -> Iterator[Block]:
        """Yield the units, each block run on what the quantized blocks before it put out, and tuned towards the float ones."""
        runner = self._started()
        floats = _FloatOutputs(runner) if self.tuned else None
        for index, unit in self._path():
            runner.enter(index)
            lanes = [lane.at(index) for lane in runner.lanes]
            if floats and unit:
                floats.advance(index)
            if unit in self.members:
                block = self._block(runner, index)
                targets = floats.hidden if floats else ()
                yield self._with_samples(block, lanes, targets) if floats and unit else block
            elif unit not in self.planned:
                with self._products():
                    runner.run_block(index)
            if unit and unit in self.planned:
                for lane, before in zip(runner.lanes, lanes, strict=True):
                    lane.hidden = before.hidden
                with self._products():
                    runner.run_block(index, written())

    def _started(self) -> BlockRunner:
        runner = BlockRunner(self.model, device=self.device)
        runner.start(self.batches if self.counted else probes(self.model))
        return runner

    def _path(self) -> Iterator[tuple[int, str]]:
        """(index, unit) up to the last one that is pending."""
        units = (*self.model.blocks, "")
        return iter(list(enumerate(units))[: units.index(self.pending[-1]) + 1])

    def _products(self) -> AbstractContextManager[None]:
        """Let blocks compute coarse products, unless they are tuned: tuning approaches the float block's output itself."""
        return nullcontext() if self.tuned else coarse_products()

    def _block(self, runner: BlockRunner, index: int) -> Block:
        """Run a unit under the observers: the block, with its statistics and what folding is proved on."""
        model, unit = self.model, (*self.model.blocks, "")[index]
        groups = self.members[unit]
        recorder = InputRecorder(model, self.layers, groups, self.observers)
        first = runner.lanes[0].at(index)
        with runner.weights_of(unit), recorder.hooked(), self._products():
            for lane in runner.lanes:
                recorder.mask = padding_mask(lane.batch) if model.task.takes_text else None
                if unit:
                    lane.hidden = runner.call_block(index, lane)
                    recorder.observe(lane.hidden)
                else:
                    runner.run_outside(lane)
                    recorder.observe(None)
        stats = recorder.finalize() if self.counted else [None] * len(groups)
        producers = [group.producer.name for group in groups if group.producer]
        tensors = {name: model.read(name) for producer in producers for name in own_parameters(model, producer)}
        members = (linear_group(model, self.layers, group, found) for group, found in zip(groups, stats, strict=True))
        return Block(unit, tuple(members), tensors, first)

    def _with_samples(self, block: Block, lanes: Sequence[Lane], targets: Sequence[Tensor]) -> Block:
        masks = (padding_mask(lane.batch) for lane in lanes)
        importance = [_importance(target, mask) for target, mask in zip(targets, masks, strict=True)]
        return replace(block, samples=BlockSamples(tuple(lanes), tuple(targets), tuple(importance)))


class _FloatOutputs:
    """The outputs of the float blocks, beside a runner whose samples pass through the quantized ones.

    hidden: per batch the output of the block that was advanced last.
    """

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self.hidden: Sequence[Tensor] = ()

    def advance(self, index: int) -> None:
        """Run the float block `index`; where it begins a stack, on what the runner has before it."""
        stack_begins = index in accumulate((len(stack) for stack in self.runner.model.stacks), initial=0)
        lanes = self.runner.lanes
        inputs = [lane.state for lane in lanes] if stack_begins else self.hidden
        with self.runner.weights_of(self.runner.model.blocks[index]):
            self.hidden = [self.runner.call_block(index, lane.fork(hidden)) for lane, hidden in zip(lanes, inputs, strict=True)]


def _importance(target: Tensor, mask: Tensor | None) -> Tensor:
    counts = importance_of(target)
    return counts * mask if mask is not None and mask.shape == counts.shape else counts
