"""A block can be quantized in another process, and its samples observed in several: no byte of what comes out changes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from calibrate_models import bert, calibrated, gpt2, job_of, llama, plan_of, source_batch, t5, token_batch
from test_calibrate_observe import llama_groups
from torch import Tensor, nn

from qconvert.calibrate import Participant, calibrate
from qconvert.calibrate.importance import padding_mask
from qconvert.calibrate.input_recorder import InputRecorder
from qconvert.execution.block_runner import BlockRunner
from qconvert.execution.unit import relative_change
from qconvert.ir.model import Model
from qconvert.ir.quantized import QuantizedBlock
from qconvert.job import Job
from qconvert.plugin.observer import AbsMax, Gram, Observer, SampledRows
from qconvert.quantize import quantize
from qconvert.quantizers.awq import AWQQuantizer

BATCHES = tuple(token_batch((9, 9 - seed % 3), seed=seed) for seed in range(4))


def job(**settings: Any) -> Job:
    torch.manual_seed(0)
    _, model = llama(tied=False)
    return job_of(model, plan_of(model), llama_groups(), AWQQuantizer(), BATCHES, **settings)


@dataclass(frozen=True)
class Seeing(AWQQuantizer):
    observers = (AbsMax, Gram, SampledRows)  # type: ignore[assignment]


def written(block: QuantizedBlock) -> dict[str, bytes]:
    """All tensors of a quantized block, as bytes."""
    tensors: dict[str, Tensor] = dict(block.tensors)
    for layer in block.layers:
        fields = {"q": layer.tensor.q, "scale": layer.tensor.scale, "zero_point": layer.tensor.zero_point}
        tensors |= {f"{layer.name}.{name}": value for name, value in fields.items() if value is not None}
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("settings", [{}, {"tuning": {"steps": 5}}], ids=["observed", "tuned"])
def test_a_block_that_was_pickled_is_quantized_to_the_same_bytes(settings: dict[str, Any]) -> None:
    mine, theirs = job(**settings), job(**settings)  # of another process, which has read the model itself
    for block in calibrate([Participant(mine)]):
        here = quantize(block, mine)
        there = quantize(pickle.loads(pickle.dumps(block)), theirs)
        assert here.tensors or not block.name  # smoothing scales were folded
        assert (block.samples is not None) == bool(settings and block.name)
        assert [layer.relative_error for layer in here.layers] == [layer.relative_error for layer in there.layers]
        assert written(here) == written(there)


@pytest.mark.parametrize("build", [bert, gpt2, t5], ids=["bert", "gpt2", "t5"])
def test_a_block_of_any_model_can_be_run_where_it_was_sent(build: Callable[[], tuple[nn.Module, Model]]) -> None:
    """What a model calls its blocks with, and what they hand on, travels with them."""
    _, model = build()
    batches = [source_batch((9, 6))] if model.task.reads_source else BATCHES[:1]
    for block in calibrated(model, plan_of(model), (), Seeing(), batches):
        sent = pickle.loads(pickle.dumps(block))
        assert sent.name == block.name
        assert relative_change(model, sent.name, sent.lane, {}) == 0
        doubled = {f"{layer.name}.weight": model.read(f"{layer.name}.weight") * 2 for layer in block.layers}
        assert block.lane is not None
        assert relative_change(model, sent.name, sent.lane, doubled) == relative_change(model, block.name, block.lane, doubled)


def seen_by_worker(mine: Job, unit: str, chunks: Sequence[int]) -> dict[int, list[Observer]]:
    """Number of a batch -> the observers of the first group of the first block, which have seen that batch alone."""
    model, groups = mine.model, Participant(mine).units[unit]
    runner = BlockRunner(model)
    runner.start([BATCHES[chunk] for chunk in chunks])
    found = {}
    for chunk, lane in zip(chunks, runner.lanes, strict=True):
        recorder = InputRecorder(model, mine.plan.layers, groups, mine.quantizer.observers)
        recorder.mask = padding_mask(lane.batch)
        with runner.weights_of(unit), recorder.hooked():
            recorder.observe(runner.call_block(0, lane))
        found[chunk] = recorder.observers[0]
    return found


@pytest.mark.parametrize("workers", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3], [1, 2], [0]]], ids=str)
def test_statistics_are_the_same_whoever_has_observed_which_samples(workers: list[list[int]]) -> None:
    """Bit for bit, where the observers of the chunks are merged in the order of the chunks."""
    mine = replace(job(tuning={}), quantizer=Seeing())  # tuned blocks run in full float32
    block = next(calibrate([Participant(mine)]))
    chunks: dict[int, list[Observer]] = {}
    for part in workers:
        chunks |= seen_by_worker(mine, block.name, part)
    merged = [observer() for observer in mine.quantizer.observers]
    for chunk in sorted(chunks):
        for one, other in zip(merged, chunks[chunk], strict=True):
            one.merge(other)
    stats = block.groups[0].stats
    assert stats is not None
    assert stats.rows == sum(int(batch["attention_mask"].sum()) for batch in BATCHES)
    for observer in merged:
        assert torch.equal(observer.finalize(), stats.values[observer.name])
