"""The quantize stage: smoothing scales go into the weights around them where that changes nothing, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from calibrate_models import gpt2, job_of, llama, model_of, plan_of, text_model, tiny_llama, token_batch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from qconvert.calibrate import Participant, calibrate
from qconvert.errors import InputError
from qconvert.execution.unit import relative_change
from qconvert.ir.lane import Lane
from qconvert.ir.layer import Block, CalibrationStats, Layer, LinearGroup, Producer
from qconvert.ir.model import Model
from qconvert.ir.quantized import QuantizedBlock, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup
from qconvert.job import Job
from qconvert.plugin.observer import GRAM_BLOCK, SAMPLED_ROWS, AbsMax, Gram, Observer, SampledRows
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantize import quantize
from qconvert.quantize.fold import fold
from qconvert.quantize.folded import Folded
from qconvert.quantizers.awq import AWQQuantizer
from qconvert.trace import trace

BATCHES = (token_batch((7, 7)), token_batch((9, 4), seed=1))
INT8 = QuantScheme.parse("int8-channel")
LAYER = "model.layers.0"
NORM, UP, DOWN = f"{LAYER}.input_layernorm", f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
QKV = tuple(f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
V, OUT = f"{LAYER}.self_attn.v_proj", f"{LAYER}.self_attn.o_proj"
# 4 heads of 8 channels read 2 value heads.
COPIES = tuple(head // 2 * 8 + channel for head in range(4) for channel in range(8))

ScaleOf = Callable[[LinearGroup], Tensor | None]


@dataclass(frozen=True)
class Scaling(Quantizer):
    """Asks for the smoothing scale that `scale_of` gives."""

    scale_of: ScaleOf = field(default=lambda group: None)
    asked: list[str] = field(default_factory=list)

    name = "scaling"
    default_scheme = INT8
    observers = (AbsMax, Gram)

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        self.asked.append(group.layers[0].name)
        return LinearGroup(group.layers, group.producer, group.stats, self.scale_of(group))

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        return round_to_nearest(layer.weight, scheme)


def ramp(group: LinearGroup) -> Tensor:
    """A scale that differs from channel to channel, but not between copies of one."""
    width = group.layers[0].weight.shape[1]
    scale = torch.linspace(0.5, 2, width)
    channels = group.producer.channels if group.producer else None
    return scale if channels is None else scale[torch.tensor(channels)]


def only(*names: str) -> ScaleOf:
    """`ramp` for the groups of these layers."""
    return lambda group: ramp(group) if group.layers[0].name in names else None


def block_of(model: Model, *groups: InputGroup, kept_float: tuple[str, ...] = ()) -> tuple[Job, Block]:
    """The first block, calibrated, and the job."""
    batches = (
        [{"input": torch.randn(5, 8, generator=torch.Generator().manual_seed(0))}] if not model.task.takes_text else BATCHES
    )
    job = job_of(model, plan_of(model, kept_float), groups, Scaling(), batches)
    return job, next(calibrate([Participant(job)]))


def llama_block(**options: Any) -> tuple[Job, Block]:
    return block_of(
        llama()[1],
        InputGroup(QKV, Producer("norm", NORM)),
        InputGroup((OUT,), Producer("linear", V, COPIES)),
        InputGroup((f"{LAYER}.mlp.gate_proj", UP), Producer("norm", f"{LAYER}.post_attention_layernorm")),
        InputGroup((DOWN,), Producer("linear", UP)),
        **options,
    )


def folded(job: Job, block: Block, scale_of: ScaleOf, layout: str = "transformers") -> Folded:
    return fold(block, replace(job, quantizer=Scaling(scale_of), recipe=job.recipe.model_copy(update={"layout": layout})))


def weights(block: Block | Folded) -> dict[str, Tensor]:
    layers = block.layers() if isinstance(block, Folded) else block.layers
    return {layer.name: layer.weight for layer in layers}


def parameters(result: Folded) -> dict[str, Tensor]:
    """Every parameter of the folded block, in the module's own shape."""
    layers = {f"{layer.name}.weight": layer.weight.T if layer.kind == "conv1d" else layer.weight for layer in result.layers()}
    return {**result.tensors, **layers}


def change(job: Job, block: Block, replaced: Mapping[str, Tensor]) -> float:
    assert block.lane is not None
    return relative_change(job.model, block.name, block.lane, replaced)


# Where a scale goes


def test_into_a_norm() -> None:
    job, block = llama_block()
    result = folded(job, block, only(QKV[0]))
    scale = torch.linspace(0.5, 2, 32)
    for name in QKV:
        assert torch.equal(weights(result)[name], weights(block)[name] * scale)
    assert result.tensors.keys() == {f"{NORM}.weight"}
    assert torch.equal(result.tensors[f"{NORM}.weight"], block.tensors[f"{NORM}.weight"] / scale)
    assert result.smoothing_scales == {}


def test_into_the_rows_of_a_linear_that_is_quantized_too() -> None:
    job, block = llama_block()
    result = folded(job, block, only(DOWN))
    scale = torch.linspace(0.5, 2, 48)
    assert torch.equal(weights(result)[DOWN], weights(block)[DOWN] * scale)
    assert torch.equal(weights(result)[UP], weights(block)[UP] / scale.unsqueeze(1))
    assert result.tensors == {}  # `up` is quantized from its folded weight


def test_into_the_rows_of_a_linear_that_stays_float() -> None:
    job, block = llama_block(kept_float=(V,))
    result = folded(job, block, only(OUT))
    scale = torch.linspace(0.5, 2, 32)[:16]  # the 16 channels of v, as the copies have them
    assert torch.equal(result.tensors[f"{V}.weight"], block.tensors[f"{V}.weight"] / scale.unsqueeze(1))
    assert change(job, block, parameters(result)) < 1e-5


def test_through_grouped_query_attention_into_v() -> None:
    job, block = llama_block()
    result = folded(job, block, only(OUT))
    scale = torch.linspace(0.5, 2, 32)[:16]
    assert torch.equal(weights(result)[V], weights(block)[V] / scale.unsqueeze(1))
    assert torch.equal(weights(result)[OUT], weights(block)[OUT] * scale[torch.tensor(COPIES)])


def test_everything_at_once_leaves_the_block_as_it_computes() -> None:
    job, block = llama_block()
    result = folded(job, block, ramp)
    changed = parameters(result)
    assert all(not torch.equal(weights(result)[name], weight) for name, weight in weights(block).items())
    assert len(result.tensors) == 2
    assert change(job, block, changed) < 1e-5
    for name in changed:  # each of them is needed
        assert change(job, block, {key: value for key, value in changed.items() if key != name}) > 1e-3


def biased_net(activation: nn.Module) -> Model:
    """LayerNorm, a linear, an activation, a linear: weights and biases far from 1 and 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), activation, nn.Linear(12, 4))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return model_of(net, input_names=("input",))


def biased_block(activation: nn.Module, **options: Any) -> tuple[Job, Block]:
    groups = (InputGroup(("1",), Producer("norm", "0")), InputGroup(("3",), Producer("linear", "1")))
    return block_of(biased_net(activation), *groups, **options)


@pytest.mark.parametrize("kept_float", [(), ("1",)], ids=["quantized producer", "float producer"])
def test_biases_of_producers_are_divided_too(kept_float: tuple[str, ...]) -> None:
    job, block = biased_block(nn.ReLU(), kept_float=kept_float)
    result = folded(job, block, ramp)
    assert {name for name in result.tensors if name.endswith("bias")} == {"1.bias"} | ({"0.bias"} if not kept_float else set())
    assert change(job, block, parameters(result)) < 1e-5
    layers = {layer.name: layer for layer in result.layers()}
    if not kept_float:
        assert layers["1"].bias is result.tensors["1.bias"]


def test_into_a_norm_before_a_conv1d() -> None:
    norm, layer = "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn"
    job, block = block_of(gpt2()[1], InputGroup((layer,), Producer("norm", norm)))
    result = folded(job, block, only(layer))
    assert result.tensors.keys() == {f"{norm}.weight", f"{norm}.bias"}
    assert change(job, block, parameters(result)) < 1e-5


def relu_gpt2() -> Model:
    config = GPT2Config(
        vocab_size=100, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        activation_function="relu",
    )  # fmt: skip
    torch.manual_seed(0)
    return text_model(GPT2LMHeadModel(config).eval(), "causal-lm", "transformer.h")


FC, PROJ = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"


def test_into_the_rows_of_a_conv1d() -> None:
    job, block = block_of(relu_gpt2(), InputGroup((PROJ,), Producer("linear", FC)))
    result = folded(job, block, only(PROJ))
    assert torch.equal(weights(result)[FC], weights(block)[FC] / torch.linspace(0.5, 2, 128).unsqueeze(1))
    assert change(job, block, parameters(result)) < 1e-5


def test_not_into_a_conv1d_that_stays_float() -> None:
    job, block = block_of(relu_gpt2(), InputGroup((PROJ,), Producer("linear", FC)), kept_float=(FC,))
    result = folded(job, block, only(PROJ))
    assert torch.equal(weights(result)[PROJ], weights(block)[PROJ])
    assert result.tensors == {}


# What does not fold


def test_an_unsound_fold_is_seen_and_left_out_while_the_sound_one_is_made() -> None:
    job, block = biased_block(nn.GELU())  # gelu(x / s) is not gelu(x) / s
    result = folded(job, block, ramp)
    assert torch.equal(weights(result)["3"], weights(block)["3"])
    assert torch.equal(weights(result)["1"], weights(block)["1"] * torch.linspace(0.5, 2, 8))
    assert result.tensors.keys() == {"0.weight", "0.bias"}
    assert result.smoothing_scales == {}


def test_folds_of_which_each_rounds_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, Tensor]] = []

    def change(model: Model, unit: str, lane: Lane, replaced: Mapping[str, Tensor], device: str) -> float:
        asked.append(replaced)
        return 3e-4  # more than one fold explains, less than four do

    monkeypatch.setattr(import_module("qconvert.quantize.fold"), "relative_change", change)
    job, block = llama_block()
    result = folded(job, block, ramp)
    assert len(asked) == 1
    assert all(not torch.equal(weights(result)[name], weight) for name, weight in weights(block).items())
    alone = folded(job, block, only(DOWN))
    assert all(torch.equal(weights(alone)[name], weight) for name, weight in weights(block).items())


def test_copies_of_one_channel_with_different_scales_do_not_fold() -> None:
    job, block = llama_block()
    result = folded(job, block, lambda group: torch.linspace(0.5, 2, 32) if group.layers[0].name == OUT else None)
    assert all(torch.equal(weights(result)[name], weight) for name, weight in weights(block).items())
    assert result.smoothing_scales == {}


def test_without_a_producer_the_quantizer_is_not_even_asked() -> None:
    job, block = block_of(llama()[1], InputGroup(QKV, Producer("norm", NORM)))
    quantizer = Scaling(ramp)
    fold(block, replace(job, quantizer=quantizer))
    assert quantizer.asked == [QKV[0]]


def test_a_layout_that_has_a_place_for_it_keeps_what_does_not_fold() -> None:
    job, block = biased_block(nn.GELU())
    result = folded(job, block, ramp, layout="onnx")
    assert result.smoothing_scales.keys() == {"3"}
    assert torch.equal(result.smoothing_scales["3"], torch.linspace(0.5, 2, 12))
    assert torch.equal(weights(result)["3"], weights(block)["3"] * torch.linspace(0.5, 2, 12))
    assert result.tensors.keys() == {"0.weight", "0.bias"}


def test_layers_that_share_an_input_keep_one_scale() -> None:
    job, block = block_of(llama()[1], InputGroup(QKV, None))
    result = folded(job, block, only(QKV[0]), layout="onnx")
    assert result.smoothing_scales.keys() == set(QKV)
    assert len({id(scale) for scale in result.smoothing_scales.values()}) == 1


def test_the_input_of_a_convolution_is_never_scaled() -> None:
    """Its columns are patches: one input channel is in many of them."""
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Conv2d(2, 3, 3)), input_names=("input",))
    quantizer = Scaling(ramp)
    job = job_of(model, plan_of(model), (), quantizer, [{"input": torch.randn(2, 2, 5, 5)}], layout="onnx")
    result = fold(next(calibrate([Participant(job)])), job)
    assert (quantizer.asked, result.smoothing_scales) == ([], {})


def test_a_quantizer_that_asks_for_nothing_gets_the_block_as_it_is() -> None:
    job, block = llama_block()
    result = folded(job, block, lambda group: None, layout="onnx")
    assert (result.tensors, result.smoothing_scales) == ({}, {})
    assert all(torch.equal(weights(result)[name], weight) for name, weight in weights(block).items())


# Statistics follow


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=["folded", "kept"])
def test_statistics_are_those_of_the_divided_input(activation: nn.Module) -> None:
    job, block = biased_block(activation)
    result = folded(job, block, ramp, layout="onnx")
    for before, after in zip(block.layers, result.layers(), strict=True):
        scale = torch.linspace(0.5, 2, before.weight.shape[1])
        assert isinstance(before.stats, CalibrationStats)
        assert isinstance(after.stats, CalibrationStats)
        assert after.stats.rows == before.stats.rows
        assert torch.allclose(after.stats.values["absmax"], before.stats.values["absmax"] / scale)
        assert torch.allclose(after.stats.values["gram"], before.stats.values["gram"] / torch.outer(scale, scale))


def rows_of(seed: int, count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, 6)


def seen(kind: type[Observer], *parts: Tensor) -> Observer:
    observer = kind()
    for rows in parts:
        observer.update(rows, rows.square().sum(1))
    return observer


def statistic(kind: type[Observer], *parts: Tensor) -> Tensor:
    return comparable(kind, seen(kind, *parts).finalize())


def comparable(kind: type[Observer], value: Tensor) -> Tensor:
    """Sampled rows are a set: their products say which ones they are."""
    return value.T @ value if kind is SampledRows else value


OBSERVERS = pytest.mark.parametrize("kind", [AbsMax, Gram, SampledRows], ids=lambda kind: kind.name)


@OBSERVERS
def test_divided_is_what_would_have_been_observed(kind: type[Observer]) -> None:
    rows, scale = rows_of(0, 20), torch.linspace(0.1, 3, 6)
    importance = rows.square().sum(1)
    first, second = kind(), kind()
    first.update(rows, importance)
    second.update(rows / scale, importance)
    divided = kind.divided(first.finalize(), scale)
    assert torch.allclose(comparable(kind, divided), comparable(kind, second.finalize()), rtol=1e-5)


def test_the_rows_of_a_gram_matrix_count_by_their_importance() -> None:
    rows, importance = rows_of(0, 20), torch.linspace(0, 2, 20)
    observer = Gram()
    observer.update(rows, importance)
    assert torch.allclose(observer.finalize(), (rows * importance[:, None]).T @ rows / 20, rtol=1e-5, atol=1e-6)


def test_a_wide_gram_matrix_is_symmetric_and_whole() -> None:
    rows = torch.randn(40, 2 * GRAM_BLOCK + 7, generator=torch.Generator().manual_seed(0))
    observer = Gram()
    observer.update(rows, torch.ones(40))
    found = observer.finalize()
    assert torch.equal(found, found.T)
    assert torch.allclose(found, rows.T @ rows / 40, rtol=1e-4, atol=1e-5)


def test_which_rows_are_sampled_depends_on_the_rows_alone() -> None:
    rows = rows_of(0, 4 * SAMPLED_ROWS)
    whole, pieces = SampledRows(), SampledRows()
    whole.update(rows, torch.ones(len(rows)))
    for piece in rows.flip(0).split(100):
        other = SampledRows()
        other.update(piece, torch.ones(len(piece)))
        pieces.merge(other)
    kept = whole.finalize()
    assert torch.equal(kept, pieces.finalize())
    assert len({tuple(row) for row in kept.tolist()}) == SAMPLED_ROWS
    assert abs(kept.mean() - rows.mean()) < 0.1 * rows.std()


@OBSERVERS
def test_however_rows_are_split_and_merged_the_statistic_is_the_same(kind: type[Observer]) -> None:
    parts = rows_of(0, 5), rows_of(1, 8), rows_of(2, 1)
    whole = statistic(kind, torch.cat(parts))
    assert torch.allclose(statistic(kind, *parts), whole, rtol=1e-5)

    left, right, first = seen(kind, parts[0]), seen(kind, parts[1]), seen(kind, parts[0])
    left.merge(seen(kind, parts[1]))  # (a + b) + c
    left.merge(seen(kind, parts[2]))
    right.merge(seen(kind, parts[2]))  # a + (b + c)
    first.merge(right)
    empty = kind()  # nothing + a + b + c + nothing
    empty.merge(left)
    empty.merge(kind())
    for merged in (left, first, empty):
        assert torch.allclose(comparable(kind, merged.finalize()), whole, rtol=1e-5)


@OBSERVERS
def test_merging_leaves_the_other_observer_as_it_was(kind: type[Observer]) -> None:
    first, second = kind(), seen(kind, rows_of(1, 8))
    first.merge(second)
    first.update(rows_of(2, 4), torch.ones(4))
    assert torch.equal(second.finalize(), seen(kind, rows_of(1, 8)).finalize())


# From the graph


class Residual(nn.Module):
    """Two convolutions and two linears that share an input each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv(x) + self.shortcut(x)).mean((2, 3))
        return self.a(x) * self.b(x)  # type: ignore[no-any-return]


def residual() -> Model:
    torch.manual_seed(0)
    return model_of(Residual(), input_names=("x",), example_inputs={"x": torch.randn(4, 4, 6, 6)})


def test_linears_share_statistics_and_convolutions_do_not() -> None:
    """Convolutions of one input cut it into patches of their own."""
    model = residual()
    plan, groups = plan_of(model), trace(model).groups
    assert [group.layers for group in groups] == [("conv",), ("shortcut",), ("a", "b")]
    (quantized,) = stream(job_of(model, plan, groups, AWQQuantizer(), [dict(model.example_inputs)], layout="onnx"))
    for layer in quantized.layers:
        weight = model.read(f"{layer.name}.weight").flatten(1)
        assert (layer.tensor.dequantize() - weight).norm() < 0.02 * weight.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_even_where_the_graph_is_checked_on_it(value: float) -> None:
    """Faults 11 and 12: the trace runs a block on its weights before anything is quantized."""
    model = residual()
    model.source.held["b.weight"][3, 2] = value  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"tensor b\.weight holds [01] NaN and [01] infinite values among 128") as raised:
        trace(model)
    assert raised.value.code == "QC-WEIGHT-001"


# The whole stage


def stream(job: Job) -> Iterator[QuantizedBlock]:
    return (quantize(block, job) for block in calibrate([Participant(job)]))


def job_on(model: Model, quantizer: Quantizer, **settings: Any) -> Job:
    return job_of(model, plan_of(model), (), quantizer, BATCHES, **settings)


def test_blocks_are_quantized_one_at_a_time() -> None:
    model = llama()[1]
    blocks = stream(job_on(model, Scaling()))
    assert next(blocks).name == LAYER
    assert not any("layers.1." in name for name in model.source.reads)  # type: ignore[attr-defined]
    assert [block.name for block in blocks] == ["model.layers.1", "model.layers.2", ""]


def test_what_was_kept_is_on_the_tensor_and_dequantizes_to_the_weight() -> None:
    model = llama()[1]
    for block in stream(job_on(model, Scaling(ramp), layout="onnx")):
        for layer in block.layers:
            weight = model.read(f"{layer.name}.weight")
            assert torch.equal(layer.tensor.smoothing_scale, torch.linspace(0.5, 2, weight.shape[1]))  # type: ignore[arg-type]
            assert (layer.tensor.dequantize() - weight).norm() < 0.02 * weight.norm()


def test_the_relative_error_is_that_of_the_codes() -> None:
    model = llama()[1]
    for block in stream(job_on(model, Scaling())):
        for layer in block.layers:
            weight = model.read(f"{layer.name}.weight")
            expected = (layer.tensor.dequantize() - weight).norm() / weight.norm()
            assert layer.relative_error == pytest.approx(expected.item(), rel=1e-4)
            assert 0 < layer.relative_error < 0.02


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_relative_error_does_not_depend_on_the_size_of_the_weights(size: float) -> None:
    def error(factor: float) -> float:
        plain = nn.Sequential(nn.Linear(16, 8))
        nn.init.uniform_(plain[0].weight, -factor, factor, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        model = model_of(plain, input_names=("input",))
        (block,) = stream(job_of(model, plan_of(model), (), Blind()))
        return block.layers[0].relative_error

    assert error(size) == pytest.approx(error(1.0), rel=1e-3)


@dataclass(frozen=True)
class Blind(Scaling):
    observers = ()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "counts"), [(torch.nan, "3 NaN and 0 infinite"), (torch.inf, "0 NaN and 3 inf"), (-torch.inf, "0 NaN and 3 inf")]
)
def test_weights_that_are_not_finite_are_refused_before_a_quantizer_sees_them(value: float, counts: str) -> None:
    """Faults 11 and 12."""
    plain = tiny_llama()
    with torch.no_grad():
        plain.get_submodule("model.layers.1.mlp.up_proj").weight[5, 7:10] = value  # type: ignore[operator]
    model = text_model(plain, "causal-lm", "model.layers")
    blocks = stream(job_on(model, Blind()))
    next(blocks)
    with pytest.raises(InputError) as raised:
        next(blocks)
    assert raised.value.code == "QC-WEIGHT-001"
    assert f"tensor model.layers.1.mlp.up_proj.weight holds {counts}" in raised.value.message
    assert "among 1536, first in channel 5 (1 channels in all)" in raised.value.message
