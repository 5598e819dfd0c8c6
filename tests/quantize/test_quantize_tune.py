"""Block tuning: less error on calibration samples, never more on those held out, and only in what it may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from calibrate_models import gpt2, job_of, llama, plan_of, token_batch
from test_quantize_fold import Scaling, ramp
from torch import Tensor

from qconvert.calibrate import Participant, calibrate
from qconvert.execution.materialize import ReadParameter
from qconvert.execution.unit import DifferentiableBlock
from qconvert.ir.layer import Block
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.quantized import QuantizedBlock
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup
from qconvert.job import Job
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantize import quantize
from qconvert.quantizers.llm_int8 import LLMInt8Quantizer
from qconvert.recipe.fields import Tuning
from qconvert.trace import trace
from qconvert.tuners.signround import HELD_OUT, SignRound

BATCHES = tuple(token_batch((12, 12 - seed % 3) * 12, seed=seed) for seed in range(16))
STEPS = Tuning(steps=30)


def planned(model: Model, scheme: str) -> Plan:
    plan = plan_of(model)
    layers = {name: dataclasses.replace(layer, scheme=QuantScheme.parse(scheme)) for name, layer in plan.layers.items()}
    return dataclasses.replace(plan, layers=layers)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """The tiny models have random ones: how much tuning helps depends on them."""
    torch.manual_seed(0)


@cache
def groups_of(kind: Any) -> tuple[InputGroup, ...]:
    """Of the tiny model of this class; what a trace finds depends on nothing else."""
    _, model = llama() if kind.__name__.startswith("Llama") else gpt2()
    return trace(model).groups


def job_on(model: Model, plan: Plan, quantizer: Quantizer | None = None, **settings: Any) -> Job:
    return job_of(model, plan, groups_of(type(model.module)), quantizer or Scaling(), BATCHES, **settings)  # type: ignore[arg-type]


def blocks_of(
    model: Model, plan: Plan, quantizer: Quantizer | None = None, written: Callable[[], ReadParameter] | None = None
) -> Iterator[Block]:
    return calibrate([Participant(job_on(model, plan, quantizer, tuning=STEPS))], written)


def error(model: Model, block: Block, quantized: QuantizedBlock, batch: int) -> float:
    """Mean squared error of the block's output on unpadded tokens, relative to the float output there."""
    assert block.samples is not None
    samples = DifferentiableBlock(model, block.name, block.samples)
    with samples.running(quantized.tensors) as forward, torch.no_grad():
        output = forward(batch, {layer.name: layer.tensor.dequantize() for layer in quantized.layers})
    square = (output - samples.targets[batch]).square().mean(-1) * samples.importance[batch]
    return float(square.mean())


@pytest.mark.parametrize(
    ("build", "scheme"),
    [(llama, "int4-g16"), (llama, "int4-g16-asym"), (gpt2, "int4-g16")],
    ids=["llama int4-g16", "llama int4-g16-asym", "gpt2 int4-g16"],
)
def test_tuned_blocks_are_nearer_to_the_float_block_on_samples_that_were_held_out(build: Any, scheme: str) -> None:
    _, model = build()
    plan = planned(model, scheme)
    (block, *_) = blocks_of(model, plan)
    plain, tuned = (quantize(block, job_on(model, plan, tuning=tuning)) for tuning in (None, STEPS))
    judges = len(BATCHES) // HELD_OUT
    for batches in (range(len(BATCHES) - judges, len(BATCHES)), range(len(BATCHES) - judges)):
        gained, before = (sum(error(model, block, each, batch) for batch in batches) for each in (tuned, plain))
        assert gained < before


def test_tuned_tensors_keep_the_contract_and_the_errors_are_those_of_what_is_written() -> None:
    _, model = llama()
    plan = planned(model, "int4-g16-asym")
    (block, *_) = blocks_of(model, plan)
    tuned = quantize(block, job_on(model, plan, tuning=STEPS))
    for layer, quantized in zip(block.layers, tuned.layers, strict=True):
        tensor = quantized.tensor
        assert (tensor.q.dtype, tensor.scale.dtype) == (torch.int8, torch.float32)
        assert tensor.q.min() >= -8
        assert tensor.q.max() <= 7
        difference = (tensor.dequantize() - layer.weight).norm() / layer.weight.norm()
        assert quantized.relative_error == pytest.approx(float(difference), rel=1e-5)


def test_what_was_folded_stays_folded() -> None:
    _, model = llama()
    plan = planned(model, "int4-g16")
    quantizer = Scaling(ramp)
    block = next(blocks_of(model, plan, quantizer))
    plain, tuned = (quantize(block, job_on(model, plan, quantizer, tuning=tuning)) for tuning in (None, STEPS))
    assert plain.tensors
    assert plain.tensors.keys() == tuned.tensors.keys()
    assert error(model, block, tuned, 0) < error(model, block, plain, 0)


def test_outlier_columns_stay_and_count() -> None:
    _, model = llama()
    plan = planned(model, "int8-channel-a8")
    quantizer = LLMInt8Quantizer(threshold=1e-6, max_outliers=4)
    block = next(blocks_of(model, plan, quantizer))
    plain, tuned = (quantize(block, job_on(model, plan, quantizer, tuning=tuning)) for tuning in (None, STEPS))
    for before, after in zip(plain.layers, tuned.layers, strict=True):
        assert before.tensor.outliers is not None
        assert after.tensor.outliers is not None
        assert torch.equal(after.tensor.outliers.columns, before.tensor.outliers.columns)
        assert torch.equal(after.tensor.outliers.weight, before.tensor.outliers.weight)
        assert len(after.tensor.outliers.columns) == 4
    assert error(model, block, tuned, 0) <= error(model, block, plain, 0)


def test_a_block_with_nothing_to_tune_is_left_alone() -> None:
    _, model = llama()
    plan = planned(model, "int8-channel")
    (block, *_) = blocks_of(model, plan)
    bare = dataclasses.replace(block, groups=())
    found = quantize(bare, job_on(model, plan, tuning=STEPS))
    assert found.layers == ()


def test_the_same_steps_give_the_same_codes() -> None:
    _, model = llama()
    plan = planned(model, "int4-g16")

    def codes() -> list[Tensor]:
        (block, *_) = blocks_of(model, plan)
        return [layer.tensor.q for layer in quantize(block, job_on(model, plan, tuning=STEPS)).layers]

    assert all(map(torch.equal, codes(), codes()))


def test_what_does_not_help_on_samples_that_were_held_out_is_not_kept() -> None:
    """Targets of the last batch that the start already reaches: any change is a loss there."""
    _, model = llama()
    plan = planned(model, "int4-channel")
    (block, *_) = blocks_of(model, plan)
    plain = quantize(block, job_on(model, plan))
    tensors = {layer.name: layer.tensor for layer in plain.layers}
    assert block.samples is not None
    with DifferentiableBlock(model, block.name, block.samples).running({}) as forward, torch.no_grad():
        reached = forward(len(BATCHES) - 1, {name: tensor.dequantize() for name, tensor in tensors.items()})
    samples = dataclasses.replace(block.samples, targets=(*block.samples.targets[:-1], reached))
    layers = {layer.name: layer for layer in block.layers}
    tuned = SignRound(steps=30).tune(layers, tensors, DifferentiableBlock(model, block.name, samples), {})
    assert all(tuned[name] is tensor for name, tensor in tensors.items())


def test_a_limit_in_seconds_ends_it_early(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = llama()
    plan = planned(model, "int4-g16")
    (block, *_) = blocks_of(model, plan)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    quantize(block, job_on(model, plan, tuning=Tuning(steps=50, seconds=25)))
    assert next(clock) == 40  # begun at 0; looked at after steps 1, 2 and 3


# --- sequential ---


def test_a_block_sees_what_the_quantized_blocks_before_it_put_out() -> None:
    plain, model = llama()
    plan = planned(model, "int4-g16")
    weights = {f"{name}.weight": torch.full_like(plain.get_submodule(name).weight, 0.01) for name in plan.layers}

    def written() -> Any:
        return lambda name: weights.get(name, model.read(name))

    asked = blocks_of(model, plan, written=written)
    float_blocks = list(blocks_of(model, plan))
    sequential = list(asked)
    statistics = [
        [group.stats.values["gram"] for group in block.groups if group.stats] for block in (*float_blocks, *sequential)
    ]
    first, second, first_sequential, second_sequential = statistics[0], statistics[1], statistics[4], statistics[5]
    assert all(map(torch.equal, first, first_sequential))
    assert not any(map(torch.allclose, second, second_sequential))

    for name, weight in weights.items():
        if name.startswith("model.layers.0."):
            plain.get_parameter(name).data = weight
    with torch.no_grad():
        seen = plain.model(**BATCHES[0], output_hidden_states=True).hidden_states[1]
    norm = plain.model.layers[1].input_layernorm
    rows = torch.cat([norm(seen)[BATCHES[0]["attention_mask"].bool()]])
    observed = sequential[1].groups[0].stats
    assert observed is not None
    assert torch.all(observed.values["absmax"] >= rows.abs().amax(0) - 1e-5)


def test_targets_of_sequential_tuning_are_the_float_models() -> None:
    _, model = llama()
    plan = planned(model, "int4-g16")

    def written() -> Any:
        return lambda name: model.read(name) * (0.5 if "proj" in name else 1)

    expected = [block.samples.targets for block in blocks_of(model, plan) if block.samples]
    found = [block.samples.targets for block in blocks_of(model, plan, written=written) if block.samples]
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.allclose, one, other))
