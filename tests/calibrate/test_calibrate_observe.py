"""The walk of calibrate: what observers see, and what blocks carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from calibrate_models import bert, calibrated, gpt2, job_of, llama, model_of, plan_of, token_batch
from torch import Tensor, nn

from qconvert.calibrate import Participant, calibrate
from qconvert.errors import PluginError, UsageError
from qconvert.execution.unit import relative_change
from qconvert.ir.batch import Batch
from qconvert.ir.layer import Block, LinearGroup, Producer
from qconvert.ir.model import Model
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup
from qconvert.plugin.observer import AbsMax, Gram
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantize import quantize
from qconvert.quantize.fold import fold

BATCHES = (token_batch((7, 7)), token_batch((9, 4, 6), seed=1))


@dataclass(frozen=True)
class Observing(Quantizer):
    name = "observing"
    default_scheme = QuantScheme.parse("int8")
    observers = (AbsMax, Gram)

    def quantize(self, layer: Any, scheme: QuantScheme) -> QuantizedTensor:
        return round_to_nearest(layer.weight, scheme)


@dataclass(frozen=True)
class Blind(Observing):
    observers = ()  # type: ignore[assignment]


@dataclass(frozen=True)
class BlindScaling(Blind):
    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        return replace(group, smoothing_scale=torch.full((group.layers[0].weight.shape[1],), 2.0))


class Failing(AbsMax):
    """What goes wrong in an observer, by its name."""

    def update(self, rows: Tensor, importance: Tensor) -> None:
        if self.name == "raises":
            raise ZeroDivisionError("no such row")
        super().update(rows, importance)

    def finalize(self) -> Tensor:
        return super().finalize() if self.name != "lists" else [1.0]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("raises", "QC-PLUGIN-007", "failed to observe '{}': ZeroDivisionError: no such row"),
        ("lists", "QC-PLUGIN-008", "broke its contract at '{}': finalize returned list, not a tensor"),
    ],
)
def test_an_observer_that_fails_is_named_with_the_layer(name: str, code: str, said: str) -> None:
    observer = type("Named", (Failing,), {"name": name, "__module__": __name__})
    quantizer = type("Watching", (Observing,), {"observers": (observer,)})()
    _, model = llama()
    with pytest.raises(PluginError) as raised:
        next(calibrated(model, plan_of(model), llama_groups(), quantizer, BATCHES))
    assert raised.value.code == code
    layer = "model.layers.0.self_attn.q_proj"
    assert raised.value.message == f"observer '{name}' of {__name__} (no version) {said.format(layer)}"


def exactly(model: Model, batches: Sequence[Batch] = BATCHES) -> Iterator[Block]:
    """The blocks as they are calibrated where they are to be tuned: in full float32."""
    return calibrated(model, plan_of(model), (), Observing(), batches, tuning={})


def llama_groups(layers: int = 3) -> tuple[InputGroup, ...]:
    groups = []
    for index in range(layers):
        block = f"model.layers.{index}"
        projections = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
        channels = tuple(head // 2 * 8 + channel for head in range(4) for channel in range(8))  # each value head serves two
        groups += [
            InputGroup(projections, Producer("norm", f"{block}.input_layernorm")),
            InputGroup((f"{block}.self_attn.o_proj",), Producer("linear", f"{block}.self_attn.v_proj", channels)),
            InputGroup(
                (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"), Producer("norm", f"{block}.post_attention_layernorm")
            ),
            InputGroup((f"{block}.mlp.down_proj",), Producer("linear", f"{block}.mlp.up_proj")),
        ]
    return (*groups, InputGroup(("lm_head",), Producer("norm", "model.norm")))


def seen_rows(plain: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The unpadded input rows of layers in the plain model, as torch itself has them."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in BATCHES:
        kept = batch["attention_mask"].bool()

        def look(name: str, value: Tensor, kept: Tensor = kept) -> None:
            rows[name].append(value[kept] if value.dim() == 3 else value)

        hooks = [
            plain.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: look(name, args[0]))
            for name in names
        ]
        with torch.no_grad():
            plain(**batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def energies(plain: nn.Module, blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean square of what each block puts out, per unpadded token."""
    found: dict[str, list[Tensor]] = {name: [] for name in blocks}
    for batch in BATCHES:
        kept = batch["attention_mask"].bool()

        def look(name: str, output: Any, kept: Tensor = kept) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[name].append(hidden[kept].square().mean(-1))

        hooks = [
            plain.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: look(name, output))
            for name in blocks
        ]
        with torch.no_grad():
            plain(**batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_every_layer_sees_the_rows_of_the_plain_model_without_padding(build: Callable[[], tuple[nn.Module, Model]]) -> None:
    plain, model = build()
    plan = plan_of(model)
    expected = seen_rows(plain, list(plan.layers))
    energy = energies(plain, model.blocks)
    layers = {layer.name: layer for block in exactly(model) for layer in block.layers}
    assert layers.keys() == plan.layers.keys()
    for name, rows in expected.items():
        stats = layers[name].stats
        assert stats is not None
        assert stats.rows == len(rows)
        assert torch.equal(stats.values["absmax"], rows.abs().amax(0))
        # Squared errors count relative to the output of the block that they are added to.
        output = energy.get(model.block_of(name))
        counted = rows if output is None or len(output) != len(rows) else rows / output.sqrt()[:, None]
        assert torch.allclose(stats.values["gram"], counted.T @ counted / len(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_coarse_products_move_statistics_by_little(build: Callable[[], tuple[nn.Module, Model]]) -> None:
    _, model = build()
    for exact, coarse in zip(exactly(model), calibrated(model, plan_of(model), (), Observing(), BATCHES), strict=True):
        for one, other in zip(exact.layers, coarse.layers, strict=True):
            assert one.stats is not None
            assert other.stats is not None
            assert one.stats.rows == other.stats.rows
            for name, value in one.stats.values.items():  # bfloat16 moves a Gram matrix of few rows by up to 0.02
                assert (other.stats.values[name] - value).norm() <= 0.03 * value.norm()


def test_a_run_of_blocks_leaves_the_precision_of_products_as_it_was() -> None:
    _, model = llama()
    rows, columns = torch.randn(64, 64), torch.randn(64, 64)
    expected = rows @ columns
    for _ in calibrated(model, plan_of(model), (), Observing(), BATCHES):
        assert torch.equal(rows @ columns, expected)  # a quantizer computes in float32
    assert torch.equal(rows @ columns, expected)


@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
@pytest.mark.parametrize("quantizer", [Observing(), Blind()], ids=["observing", "blind"])
def test_weights_are_out_by_in_whatever_the_kind(build: Callable[[], tuple[nn.Module, Model]], quantizer: Quantizer) -> None:
    plain, model = build()
    plan = plan_of(model)
    for block in calibrated(model, plan, (), quantizer, BATCHES):
        for layer in block.layers:
            module = plain.get_submodule(layer.name)
            width = plan.layers[layer.name].in_features
            bias = layer.bias if layer.bias is not None else 0
            x = torch.randn(3, width)
            assert layer.weight.shape == (plan.layers[layer.name].out_features, width)
            assert torch.allclose(x @ layer.weight.T + bias, module(x), atol=1e-4)


def test_blocks_come_in_forward_order_with_their_groups() -> None:
    _, model = llama()
    blocks = list(calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES))
    assert [block.name for block in blocks] == [*model.blocks, ""]
    assert [len(group.layers) for group in blocks[1].groups] == [3, 1, 2, 1]
    for group in blocks[1].groups:
        assert group.stats is not None
        assert all(layer.stats is group.stats for layer in group.layers)


def test_a_quantizer_without_observers_costs_no_forward_and_no_samples() -> None:
    _, model = llama()
    plan = plan_of(model)
    blocks = list(calibrated(model, plan, llama_groups(), Blind(), ()))
    assert {layer.name for block in blocks for layer in block.layers} == set(plan.layers)
    for block in blocks:
        assert (block.tensors, block.lane, block.samples) == ({}, None, None)
        assert all(group.stats is None and group.producer is None for group in block.groups)
    assert sorted(model.source.reads) == sorted(model.stored_name(f"{name}.weight") for name in plan.layers)  # type: ignore[attr-defined]


def test_scales_that_need_no_data_are_proved_to_fold_on_random_tokens() -> None:
    """Blocks carry no statistics then, but all that folding takes."""
    _, model = llama()
    job = job_of(model, plan_of(model), llama_groups(), BlindScaling())
    block = next(calibrate([Participant(job)]))
    assert all(group.stats is None and layer.stats is None for group in block.groups for layer in group.layers)
    assert [group.producer is not None for group in block.groups] == [True] * 4
    norm = f"{model.blocks[0]}.input_layernorm.weight"
    assert change(model, block, {norm: block.tensors[norm] * 2}) > 1e-3
    folded = fold(block, job)
    assert torch.equal(folded.tensors[norm], block.tensors[norm] / 2)


def test_a_device_that_is_not_there_is_refused_even_where_nothing_runs() -> None:
    _, model = llama()
    with pytest.raises(UsageError) as caught:
        list(calibrated(model, plan_of(model), llama_groups(), Blind(), (), device="quantum"))
    assert caught.value.code == "QC-DEVICE-001"


def test_blocks_are_made_one_at_a_time_when_asked_for() -> None:
    _, model = llama()
    stream: Iterator[Block] = calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES)
    assert model.source.reads == []  # type: ignore[attr-defined]
    next(stream)
    assert not any(name.startswith(("model.layers.1.", "model.layers.2.")) for name in model.source.reads)  # type: ignore[attr-defined]
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_what_an_earlier_run_has_done_is_passed_through_but_not_yielded() -> None:
    _, model = llama()
    whole = {block.name: block for block in calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES)}
    done = frozenset({"model.layers.0", "model.layers.2"})
    rest = list(calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES, done=done))
    assert [block.name for block in rest] == ["model.layers.1", ""]
    for block in rest:
        for group, expected in zip(block.groups, whole[block.name].groups, strict=True):
            assert torch.equal(group.stats.values["gram"], expected.stats.values["gram"])  # type: ignore[union-attr]
    everything = frozenset({*model.blocks, ""})
    model.source.reads.clear()  # type: ignore[attr-defined]
    assert list(calibrated(model, plan_of(model), (), Observing(), BATCHES, done=everything)) == []
    assert model.source.reads == []  # type: ignore[attr-defined]


def test_blocks_after_the_last_planned_layer_are_not_run() -> None:
    _, model = llama()
    kept = tuple(name for name in plan_of(model).layers if "layers.0." not in name)
    assert [block.name for block in calibrated(model, plan_of(model, kept), (), Observing(), BATCHES)] == ["model.layers.0"]
    assert not any("layers.1." in name for name in model.source.reads)  # type: ignore[attr-defined]


def test_the_head_is_observed_without_computing_logits() -> None:
    _, model = llama()
    computed: list[str] = []
    model.module.lm_head.register_forward_hook(lambda *_: computed.append("logits"))  # type: ignore[union-attr]
    *_, last = calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES)
    assert [layer.name for layer in last.layers] == ["lm_head"]
    assert last.groups[0].stats is not None
    assert computed == []


class Gated(nn.Module):
    """An expert that no sample ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.unused(x) if x.shape[0] == 0 else self.used(x)  # type: ignore[no-any-return]


def test_a_layer_that_no_sample_reaches_is_named_with_the_remedy() -> None:
    model = model_of(Gated(), input_names=("x",))
    job = job_of(model, plan_of(model), (), Observing(), [{"x": torch.randn(3, 4)}])
    (block,) = calibrate([Participant(job)])
    with pytest.raises(UsageError, match=r"no calibration sample reached 'unused' \(1 layers in all saw 0 rows\)") as caught:
        quantize(block, job)
    assert caught.value.code == "QC-CALIB-001"
    assert "--rule 'unused=float'" in caught.value.hint


# Convolutions


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=["plain", "strided", "same", "reflected"],
)
def test_rows_of_a_convolution_are_what_its_flattened_kernels_are_multiplied_with(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, bias=False, **options))
    images = torch.randn(2, 4, 7, 8)
    model = model_of(plain, input_names=("input",))
    (block,) = exactly(model, [{"input": images[:1]}, {"input": images[1:]}])
    (layer,) = block.layers
    assert layer.stats is not None
    output = plain(images)
    assert layer.stats.rows == output[:, 0].numel()
    # The energy of an output channel is w Gram w^T, which holds only if the rows are the right patches.
    energy = torch.einsum("oi,ij,oj->o", layer.weight, layer.stats.values["gram"], layer.weight)
    assert torch.allclose(energy, output.square().mean((0, 2, 3)), rtol=1e-4)


def test_the_groups_of_a_convolution_share_their_columns() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1))
    images = torch.randn(2, 4, 7, 8)
    model = model_of(plain, input_names=("input",))
    (block,) = calibrated(model, plan_of(model), (), Observing(), [{"input": images}])
    (layer,) = block.layers
    patches = [nn.functional.unfold(half, 3, padding=1).transpose(1, 2).flatten(0, 1) for half in images.split(2, dim=1)]
    assert layer.stats is not None
    assert layer.stats.rows == 2 * 2 * 7 * 8
    assert torch.equal(layer.stats.values["absmax"], torch.cat(patches).abs().amax(0))


# Folding


def first_block() -> tuple[Model, Block]:
    _, model = llama()
    return model, next(calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES))


def change(model: Model, block: Block, replaced: Mapping[str, Tensor]) -> float:
    assert block.lane is not None
    return relative_change(model, block.name, block.lane, replaced)


def test_a_block_carries_the_tensors_of_its_producers() -> None:
    _, block = first_block()
    prefix = "model.layers.0"
    assert set(block.tensors) == {
        f"{prefix}.input_layernorm.weight",
        f"{prefix}.self_attn.v_proj.weight",
        f"{prefix}.post_attention_layernorm.weight",
        f"{prefix}.mlp.up_proj.weight",
    }


def test_an_exact_fold_changes_nothing_and_a_wrong_one_is_seen() -> None:
    model, block = first_block()
    group = block.groups[0]
    scale = torch.linspace(0.5, 2, group.layers[0].weight.shape[1])
    norm = "model.layers.0.input_layernorm.weight"
    folded = {norm: block.tensors[norm] / scale, **{f"{layer.name}.weight": layer.weight * scale for layer in group.layers}}
    assert change(model, block, {}) == 0
    assert 0 <= change(model, block, folded) < 1e-5
    assert change(model, block, {norm: folded[norm]}) > 1e-2
    assert change(model, block, {norm: torch.full_like(scale, torch.nan)}) == float("inf")
    assert change(model, block, {}) == 0


def test_a_fold_can_still_be_checked_when_later_blocks_were_asked_for() -> None:
    _, model = llama()
    blocks = list(calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES))
    assert [change(model, block, {}) for block in blocks] == [0, 0, 0, 0]


def test_replaced_weights_are_in_the_modules_own_form() -> None:
    _, model = gpt2()
    norm, layer = "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn"
    group = InputGroup((layer,), Producer("norm", norm))
    block = next(calibrated(model, plan_of(model), (group,), Observing(), BATCHES))
    scale = torch.linspace(0.5, 2, 32)
    folded = {name: value / scale for name, value in block.tensors.items()}
    assert set(folded) == {f"{norm}.weight", f"{norm}.bias"}
    assert change(model, block, folded | {f"{layer}.weight": (block.groups[0].layers[0].weight * scale).T}) < 1e-5


def test_a_fold_into_the_final_norm_is_checked_on_the_logits() -> None:
    _, model = llama(tied=False)
    *_, last = calibrated(model, plan_of(model), llama_groups(), Observing(), BATCHES)
    assert set(last.tensors) == {"model.norm.weight"}
    doubled = {"model.norm.weight": last.tensors["model.norm.weight"] * 2}
    assert change(model, last, doubled) == pytest.approx(1, rel=1e-4)
    assert change(model, last, doubled | {"lm_head.weight": last.layers[0].weight / 2}) < 1e-5


def test_flattened_kernels_can_be_replaced() -> None:
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2)), input_names=("input",))
    group = InputGroup(("1",), Producer("norm", "0"))
    (block,) = calibrated(model, plan_of(model), (group,), Observing(), [{"input": torch.randn(2, 2, 5, 5)}])
    halved = {name: value / 2 for name, value in block.tensors.items()}
    assert change(model, block, halved | {"1.weight": block.layers[0].weight * 2}) < 1e-5
    assert change(model, block, halved) > 1e-2


def test_names_that_a_block_does_not_have_are_a_mistake_of_the_caller() -> None:
    model, block = first_block()
    for name in ("model.layers.0.input_layernorm.bias", "model.layers.1.input_layernorm.weight", "nowhere.weight"):
        with pytest.raises(ValueError, match=name):
            change(model, block, {name: torch.ones(32)})


def test_nothing_folds_into_a_producer_that_a_float_layer_or_a_tied_weight_uses_too() -> None:
    _, model = llama(tied=True)
    plan = plan_of(model, kept_float=("model.layers.0.self_attn.v_proj",))
    blocks = list(calibrated(model, plan, llama_groups(), Observing(), BATCHES))
    q_and_k, *others = blocks[0].groups
    assert [layer.name[-6:] for layer in q_and_k.layers] == ["q_proj", "k_proj"]
    assert q_and_k.producer is None
    assert all(group.producer is not None for group in others)
    assert blocks[-1].groups[0].producer is None  # lm_head shares the embedding
    assert blocks[-1].tensors == {}
