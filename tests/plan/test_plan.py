"""The plan: what a run will do, what it will cost and why not, known from the headers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from calibrate_models import job_of, model_of
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qconvert.calibrate import Participant, calibrate
from qconvert.errors import UsageError
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import InputGroup, Template
from qconvert.load import load
from qconvert.plan import plan as make_plan
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantize import quantize
from qconvert.quantizers.absmax import AbsMaxQuantizer
from qconvert.quantizers.awq import AWQQuantizer
from qconvert.quantizers.llm_int8 import LLMInt8Quantizer
from qconvert.quantizers.per_channel import PerChannelQuantizer
from qconvert.quantizers.smoothquant import SmoothQuantQuantizer
from qconvert.quantizers.zero_point import ZeroPointQuantizer
from qconvert.recipe import Recipe
from qconvert.storage.stage import open_stage
from qconvert.trace import trace
from qconvert.write import write

Build = Callable[[Path], Path]


def load_folder(build: Build, folder: Path, **options: Any) -> Model:
    return load(str(build(folder / "model", **options)), lambda source: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tied; 14 linears in 2 blocks, of width 64, but for down_proj, of width 128."""
    return load_folder(tiny_llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_folder(tiny_llama, tmp_path_factory.mktemp("untied"), tie=False)


def planned(model: Model, quantizer: Quantizer | None = None, unused: tuple[str, ...] = (), **settings: Any) -> Plan:
    """The plan for a model whose graph uses every linear but `unused`."""
    names = [
        name
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | Conv1D) and name not in unused
    ]
    template = Template(
        {"model": onnx_ir.Model(onnx_ir.Graph([], [], nodes=[]), ir_version=10)},
        {},
        tuple(InputGroup((name,), None) for name in names),
        embeddings=tuple(name for name, module in model.module.named_modules() if isinstance(module, nn.Embedding)),
    )
    rules = [{"pattern": pattern, "scheme": scheme} for pattern, scheme in settings.pop("rules", {}).items()]
    recipe = Recipe.from_settings({"model": "m", "output": "out", "rules": rules, **settings})
    return make_plan(model, template, recipe, quantizer or PerChannelQuantizer())


def refusal(model: Model, quantizer: Quantizer | None = None, **settings: Any) -> UsageError:
    with pytest.raises(UsageError) as raised:
        planned(model, quantizer, **settings)
    assert raised.value.exit_code == 2
    return raised.value


def schemes(plan: Plan) -> dict[str, str]:
    return {name: str(layer.scheme) for name, layer in plan.layers.items()}


def reasons(plan: Plan) -> dict[str, str]:
    return {entry.name: entry.reason for entry in plan.kept_float}


# Which layers, in which scheme


def test_every_linear_of_the_blocks_is_quantized_in_order(llama: Model) -> None:
    names = [name for name, module in llama.module.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    plan = planned(llama)
    assert list(plan.layers) == names
    assert len(names) == 14
    down = plan.layers["model.layers.1.mlp.down_proj"]
    assert (down.kind, down.out_features, down.in_features) == ("linear", 64, 128)


def test_the_quantizers_default_holds_unless_the_recipe_or_a_rule_says_otherwise(llama: Model) -> None:
    assert set(schemes(planned(llama)).values()) == {"int8-channel-a8"}
    assert set(schemes(planned(llama, AWQQuantizer())).values()) == {"int4-g32-asym"}
    assert set(schemes(planned(llama, AWQQuantizer(), scheme="int4-g16")).values()) == {"int4-g16"}
    mixed = schemes(planned(llama, rules={"*.down_proj": "int4-g32", "*.layers.1.*": "int8"}))
    assert mixed["model.layers.1.mlp.down_proj"] == "int4-g32"  # the first rule that matches
    assert mixed["model.layers.1.mlp.up_proj"] == "int8-channel"
    assert mixed["model.layers.0.mlp.up_proj"] == "int8-channel-a8"


def test_gpt2s_conv1d_is_planned_as_out_by_in(tmp_path: Path) -> None:
    plan = planned(load_folder(tiny_gpt2, tmp_path), layout="onnx")
    layer = plan.layers["transformer.h.0.attn.c_attn"]
    assert (layer.kind, layer.out_features, layer.in_features) == ("conv1d", 192, 64)
    assert layer.disk_tensors["weight_scale"].shape == (192, 1)
    assert len(plan.layers) == 8


class Net(nn.Module):
    """One of each kind of module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2, bias=False)
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.scaled = Scaled(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 5)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_convolutions_are_flattened_and_what_is_no_plain_layer_stays_float() -> None:
    plan = planned(model_of(Net()), unused=("attention.out_proj",))
    assert {name: (layer.kind, layer.out_features, layer.in_features) for name, layer in plan.layers.items()} == {
        "conv": ("conv2d", 8, 2 * 3 * 3),
        "linear": ("linear", 5, 8),
    }
    assert reasons(plan) == {
        "reflecting": "Conv2d is not quantized",
        "same": "Conv2d is not quantized",
        "norm": "BatchNorm2d is not quantized",
        "scaled": "Scaled is not quantized",
        "attention": "MultiheadAttention is not quantized",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not quantized",
    }


# What stays float


def test_a_convolution_computes_on_float_activations() -> None:
    plan = planned(model_of(nn.Sequential(nn.Conv2d(16, 8, 3), nn.Linear(4, 4))), scheme="int8-channel-a8")
    assert schemes(plan) == {"0": "int8-channel", "1": "int8-channel-a8"}


def test_everything_that_stays_float_is_listed_with_its_reason(llama: Model) -> None:
    found = reasons(planned(llama, rules={"*.layers.0.mlp.*": "float"}))
    rule = dict.fromkeys((f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")), "a rule keeps it in float")
    norms = [f"model.layers.{index}.{name}_layernorm" for index in (0, 1) for name in ("input", "post_attention")]
    assert found == {
        "model.embed_tokens": "an embedding stays in float unless a rule names it",
        **dict.fromkeys([*norms, "model.norm"], "LlamaRMSNorm is not quantized"),
        **rule,
        "lm_head": "shares its weight with model.embed_tokens, which stays in float",
    }


def test_every_module_with_weights_is_either_planned_or_listed(llama: Model) -> None:
    plan = planned(llama)
    weighted = [name for name, module in llama.module.named_modules() if list(module.parameters(recurse=False))]
    assert sorted([*plan.layers, *reasons(plan)]) == sorted(weighted)


def test_an_output_head_is_quantized_only_if_a_rule_names_it(untied: Model) -> None:
    assert "--rule 'lm_head=int8-channel-a8'" in reasons(planned(untied))["lm_head"]
    assert schemes(planned(untied, rules={"lm_head": "int8-channel"}))["lm_head"] == "int8-channel"


@pytest.mark.parametrize("named", ["lm_head", "model.embed_tokens"])
def test_a_rule_for_one_of_a_tied_pair_quantizes_both_as_one_embedding(llama: Model, named: str) -> None:
    plan = planned(llama, scheme="int4-g32", rules={named: "int4-g32"})
    assert plan.shared == {"lm_head": "model.embed_tokens"}
    layer = plan.layers["model.embed_tokens"]
    assert (layer.kind, str(layer.scheme)) == ("embedding", "int4-g32")
    assert plan.layer_of("lm_head") is layer
    assert "lm_head" not in plan.layers
    assert not {"lm_head", "model.embed_tokens"} & set(reasons(plan))


def test_a_tied_pair_is_left_in_float_by_a_rule_for_one_of_them(llama: Model) -> None:
    assert not planned(llama, rules={"lm_head": "float"}).shared


def test_an_embedding_may_have_the_scheme_of_layers_with_int8_activations(llama: Model) -> None:
    plan = planned(llama, rules={"lm_head": "int8-channel-a8"})
    assert set(schemes(plan).values()) == {"int8-channel-a8"}


def test_a_quantizer_that_observes_inputs_has_no_say_in_embeddings(untied: Model) -> None:
    assert LLMInt8Quantizer().refuses(QuantScheme.parse("int4-g32"))
    plan = planned(untied, LLMInt8Quantizer(), rules={"model.embed_tokens": "int4-g32"}, layout="onnx")
    assert str(plan.layers["model.embed_tokens"].scheme) == "int4-g32"
    assert refusal(untied, LLMInt8Quantizer(), rules={"*.q_proj": "int4-g32"}).code == "QC-PLAN-002"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.b.weight = self.a.weight


def test_linears_that_share_a_weight_both_stay_float() -> None:
    """Codes for one and floats for the other would take more bytes than the source."""
    plan = planned(model_of(Tied()))
    assert list(plan.layers) == ["c"]
    assert reasons(plan) == {
        "a": "shares its weight with b, which stays in float",
        "b": "shares its weight with a, which stays in float",
    }


# What a width does not allow


def others(plan: Plan) -> dict[str, str]:
    return {name: layer.reason for name, layer in plan.layers.items() if layer.reason is not None}


def test_a_group_that_does_not_divide_a_width_gives_way_to_the_next_smaller_one(llama: Model) -> None:
    plan = planned(llama, scheme="int4-g128")
    odd = [name for name in plan.layers if not name.endswith("down_proj")]
    assert {name: str(plan.layers[name].scheme) for name in odd} == dict.fromkeys(odd, "int4-g64")
    assert others(plan) == dict.fromkeys(odd, "its width of 64 is no multiple of 128, the group of int4-g128")
    assert str(plan.scheme) == "int4-g128"
    assert schemes(plan)["model.layers.0.mlp.down_proj"] == "int4-g128"


def test_a_width_that_no_group_divides_gets_one_scale_per_channel() -> None:
    """The columns of a flattened kernel count; a pattern is met as far as it can be."""
    net = model_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 3), nn.Linear(100, 4), nn.Linear(48, 4)))
    plan = planned(net, scheme="int4-g64-asym", rules={"[3]": "int8-g32"})
    assert schemes(plan) == {"0": "int4-channel-asym", "1": "int4-g16-asym", "2": "int4-channel-asym", "3": "int8-g16"}
    assert "its width of 27 is" in others(plan)["0"]


def test_a_layer_stays_float_where_the_quantizer_takes_no_scheme_that_fits() -> None:
    class Grouped(PerChannelQuantizer):
        def refuses(self, scheme: QuantScheme) -> str | None:
            return None if str(scheme) == "int4-g32" else "groups of 32 only"

    plan = planned(model_of(nn.Sequential(nn.Linear(40, 8), nn.Linear(64, 8))), Grouped(), scheme="int4-g32")
    assert list(plan.layers) == ["1"]
    assert reasons(plan) == {"0": "its width of 40 is no multiple of 32, the group of int4-g32"}


def test_where_transformers_bears_one_scheme_alone_all_layers_take_the_smaller_group(llama: Model) -> None:
    plan = planned(llama, AWQQuantizer(), scheme="int4-g128-asym")
    assert set(schemes(plan).values()) == {"int4-g64-asym"}
    assert "int4-g128-asym does not fit every layer" in others(plan)["model.layers.0.mlp.down_proj"]
    onnx = planned(llama, AWQQuantizer(), scheme="int4-g128-asym", layout="onnx")
    assert schemes(onnx)["model.layers.0.mlp.down_proj"] == "int4-g128-asym"


def test_where_transformers_bears_one_scheme_alone_what_does_not_fit_stays_float_if_that_is_smaller() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.odd = nn.Linear(1024, 1024), nn.Linear(16, 4), nn.Linear(20, 4)

    plan = planned(model_of(Wide(), config={}), AWQQuantizer(), scheme="int4-g128-asym")
    assert schemes(plan) == {"wide": "int4-g128-asym"}
    assert reasons(plan) == {
        "narrow": "its width of 16 is no multiple of 128, the group of int4-g128-asym; beside other schemes only --layout "
        "onnx allows int4-g16-asym",
        "odd": "its width of 20 is no multiple of 128, the group of int4-g128-asym; beside other schemes only --layout onnx "
        "allows int4-channel-asym",
    }


def test_a_shared_tensor_whose_width_fits_no_kernel_stays_float() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.linear, self.head = nn.Embedding(10, 24), nn.Linear(24, 24), nn.Linear(24, 10, bias=False)
            self.head.weight = self.words.weight

    plan = planned(model_of(Tied()), rules={"*": "int8-channel"})
    assert list(plan.layers) == ["linear"]
    assert plan.shared == {}
    assert reasons(plan)["head"] == "shares its weight with words, which stays in float"


# What is refused


@pytest.mark.parametrize("scheme", ["int4-channel-a8", "int8-g32-a8", "int4-g32-asym-a8"])
@pytest.mark.parametrize("where", ["scheme", "rule"])
def test_001_int8_activations_need_int8_weights_per_tensor_or_channel(llama: Model, scheme: str, where: str) -> None:
    error = refusal(llama, **({"scheme": scheme} if where == "scheme" else {"rules": {"*.q_proj": scheme}}))
    assert error.code == "QC-PLAN-001"
    assert scheme in error.message


@pytest.mark.parametrize(
    ("quantizer", "scheme", "words"),
    [
        (AbsMaxQuantizer(), "int8-asym", "absmax has no zero point"),
        (ZeroPointQuantizer(), "int8", "add -asym"),
        (PerChannelQuantizer(), "int8-tensor", "take -channel or -gN"),
        (AWQQuantizer(), "int8-channel-a8", "leave out -a8"),
        (LLMInt8Quantizer(), "int4", "take int8-channel-a8"),
    ],
)
@pytest.mark.parametrize("where", ["scheme", "rule"])
def test_002_a_quantizer_refuses_a_scheme(llama: Model, quantizer: Quantizer, scheme: str, words: str, where: str) -> None:
    error = refusal(llama, quantizer, **({"scheme": scheme} if where == "scheme" else {"rules": {"*": scheme}}))
    assert error.code == "QC-PLAN-002"
    assert words in error.message
    assert f"quantizer {quantizer.name} can't produce" in error.message
    assert str(quantizer.default_scheme) in error.hint


def test_003_a_rule_that_matches_nothing(llama: Model) -> None:
    error = refusal(llama, rules={"*.down_proj": "int8", "*.w2": "float"})
    assert error.code == "QC-PLAN-003"
    assert "'*.w2'" in error.message
    assert "model.layers.0.self_attn.q_proj" in error.hint
    planned(llama, rules={"model.norm": "float"})  # what stays float anyway may be named


def test_004_a_group_that_does_not_divide_the_width_of_a_layer_that_a_rule_names(llama: Model) -> None:
    """Fault 14."""
    odd = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    error = refusal(llama, scheme="int4-g32", rules=dict.fromkeys([*odd, "model.layers.1.mlp.down_proj"], "int4-g128"))
    assert error.code == "QC-PLAN-004"
    assert "2 layers" in error.message
    assert all(f"{name}: its width of 64 is no multiple of 128, the group of int4-g128" in error.message for name in odd)
    assert "down_proj" not in error.message
    assert f"--rule '{odd[0]}=float'" in error.hint


def test_004_a_rule_may_name_the_head_of_a_shared_tensor(llama: Model) -> None:
    assert refusal(llama, scheme="int4-g32", rules={"lm_head": "int4-g128"}).code == "QC-PLAN-004"


@pytest.mark.parametrize(
    ("default", "other"), [("int4-g32-asym", "int4-g32"), ("int4-g32", "int8-asym"), ("int4-g32-asym", "int4-g16-asym")]
)
def test_005_zero_points_beside_a_second_scheme_which_transformers_would_load_wrongly(
    llama: Model, default: str, other: str
) -> None:
    error = refusal(llama, scheme=default, rules={"*.down_proj": other})
    assert error.code == "QC-PLAN-005"
    assert "has zero points" in error.message
    assert "--layout onnx" in error.hint
    planned(llama, scheme=default, rules={"*.down_proj": other}, layout="onnx")
    planned(llama, scheme="int4-g32", rules={"*.down_proj": "int8"})  # symmetric schemes mix freely


def test_005_outlier_columns_beside_a_second_scheme_where_the_options_allow_outliers(llama: Model) -> None:
    rules = {"*.down_proj": "int8-channel"}
    error = refusal(llama, SmoothQuantQuantizer(max_outliers=4), rules=rules)
    assert error.code == "QC-PLAN-005"
    assert "has outlier columns" in error.message
    planned(llama, SmoothQuantQuantizer(), rules=rules)


def test_005_a_conv1d_has_no_place_in_the_transformers_layout(tmp_path: Path) -> None:
    error = refusal(load_folder(tiny_gpt2, tmp_path))
    assert error.code == "QC-PLAN-005"
    assert "'transformer.h.0.attn.c_attn' is a conv1d" in error.message


def test_005_does_not_concern_models_that_transformers_never_loads() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    assert len(planned(model_of(net), scheme="int4-g32", rules={"1": "int8-asym"}).layers) == 2


def test_006_nothing_to_quantize(llama: Model) -> None:
    error = refusal(llama, rules={"*": "float"})
    assert error.code == "QC-PLAN-006"
    assert "a rule keeps it in float; shares its weight" in error.message
    assert refusal(model_of(nn.Sequential(nn.BatchNorm1d(3)))).code == "QC-PLAN-006"


def test_007_zero_points_on_cuda(llama: Model) -> None:
    error = refusal(llama, AWQQuantizer(), targets=["cpu", "cuda"])
    assert error.code == "QC-PLAN-007"
    assert "take int4-g32, or leave out --target cuda" in error.hint
    planned(llama, AWQQuantizer(), targets=["cuda"], scheme="int4-g32")


@pytest.mark.parametrize(("scheme", "fits"), [("int8-channel", False), ("int4-g16", True), ("int8-channel-a8", True)])
def test_010_quantized_embeddings_have_no_padded_copy_on_cuda(scheme: str, fits: bool) -> None:
    """A table of signed bytes is gathered row by row, whatever its width."""
    net = nn.Sequential(nn.Embedding(20, 48), nn.Linear(48, 32))
    settings: dict[str, Any] = {"scheme": scheme, "rules": {"0": scheme}, "targets": ["cuda"]}
    if fits:
        assert "0" in planned(model_of(net), **settings).layers
        return
    error = refusal(model_of(net), **settings)
    assert error.code == "QC-PLAN-010"
    assert "0: its width of 48 is no multiple of 32, the block of the CUDA provider's kernel" in error.message
    kept = reasons(planned(model_of(net), **settings | {"rules": {"*": scheme}}))
    assert list(kept) == ["0"]


@pytest.mark.parametrize("activation", [nn.CELU, nn.ELU], ids=["no-kernel", "kernel-of-an-older-opset"])
def test_an_op_without_a_cuda_kernel_is_found_before_anything_is_quantized(activation: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(32, 32), activation())
    model = model_of(net, example_inputs={"input": torch.zeros(2, 32)}, input_names=("input",))
    settings = {"model": "m", "output": "out", "scheme": "int8-channel"}
    make_plan(model, trace(model), Recipe.from_settings(settings), PerChannelQuantizer())
    with pytest.raises(UsageError, match=r"has no CUDA kernel for .*lu of float16\)") as caught:
        make_plan(model, trace(model), Recipe.from_settings({**settings, "targets": ["cuda"]}), PerChannelQuantizer())
    assert caught.value.code == "QC-CUDA-001"


# What it will cost


def test_calibration_is_needed_by_quantizers_with_observers(llama: Model) -> None:
    assert [planned(llama, quantizer).calibrated for quantizer in (AbsMaxQuantizer(), AWQQuantizer(), LLMInt8Quantizer())] == [
        False,
        True,
        True,
    ]


def written_bytes(model: Model, plan: Plan, folder: Path) -> int:
    """The tensors that the stages put into model.safetensors, in bytes."""
    with open_stage(folder / "out", "0123456789abcdef") as stage:
        job = job_of(model, plan, (), Nearest(), layout="onnx")
        write((quantize(block, job) for block in calibrate([Participant(job)])), job, stage)
        stage.publish()
    return sum(tensor.nbytes for tensor in load_file(folder / "out" / "model.safetensors").values())


class Nearest(PerChannelQuantizer):
    """Takes every scheme."""

    def refuses(self, scheme: object) -> None:
        return None


@pytest.mark.parametrize(
    ("build", "options", "settings"),
    [
        (tiny_llama, {}, {}),
        (tiny_llama, {}, {"scheme": "int4-g32-asym"}),
        (tiny_llama, {}, {"scheme": "int8-tensor-asym"}),
        (tiny_llama, {"dtype": torch.bfloat16, "shards": 3}, {"scheme": "int4-g16"}),
        (tiny_llama, {"tie": False}, {"scheme": "int8-g64-asym", "rules": {"lm_head": "int4", "*.k_proj": "float"}}),
        (tiny_llama, {}, {"rules": {"lm_head": "int8"}}),
        (tiny_gpt2, {"dtype": torch.float16}, {"scheme": "int4-channel-asym"}),
        (tiny_bert, {}, {"scheme": "int8-tensor-asym-a8"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_weights_bytes_are_exactly_what_is_written(
    tmp_path: Path, build: Build, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    model = load_folder(build, tmp_path, **options)
    plan = planned(model, Nearest(), layout="onnx", **settings)
    assert plan.weights_bytes == written_bytes(model, plan, tmp_path)
    assert plan.weights_bytes < model.source_bytes


@pytest.mark.parametrize("scheme", ["int8-channel-a8", "int4-channel-asym", "int8-g16"])
def test_weights_bytes_of_a_module_with_convolutions_and_tied_weights(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8, affine=False), Tied()))
    plan = planned(model, Nearest(), scheme=scheme)
    assert plan.weights_bytes == written_bytes(model, plan, tmp_path)


def test_the_peak_grows_with_the_block_and_not_with_their_number(llama: Model) -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))

    def peak(depth: int) -> int:
        return planned(model_of(Deep(depth), blocks=tuple(f"blocks.{index}" for index in range(depth)))).peaks["quantize"]

    assert peak(2) == peak(20) > 64 * 64 * 4
    assert peak(2) < planned(llama).peaks["quantize"]


def test_a_plan_reads_no_weight(llama: Model) -> None:
    net = model_of(Net())
    planned(net, unused=("attention.out_proj",))
    assert net.source.reads == []  # type: ignore[attr-defined]


def test_008_rules_that_want_two_things_of_one_tensor(llama: Model) -> None:
    error = refusal(llama, scheme="int4-g32", rules={"lm_head": "int8-channel", "model.embed_tokens": "int4-g32"})
    assert error.code == "QC-PLAN-008"
    assert all(word in error.message for word in ("lm_head", "model.embed_tokens", "int8-channel", "int4-g32"))
    assert refusal(llama, rules={"lm_head": "int8-channel", "model.embed_tokens": "float"}).code == "QC-PLAN-008"


def test_009_an_embedding_that_the_kernels_blocks_do_not_divide() -> None:
    model = model_of(nn.Sequential(nn.Embedding(10, 24), nn.Linear(24, 8)))
    error = refusal(model, rules={"0": "int8-channel"})
    assert error.code == "QC-PLAN-009"
    assert "24" in error.message
    assert reasons(planned(model, rules={"*": "int8-channel"})) == {
        "0": "its width of 24 is no multiple of 16, the block of the kernel for quantized embeddings"
    }


@pytest.mark.parametrize(
    ("scheme", "embedding", "words"),
    [
        ("int4-g32", "int8-channel", "int4-g32"),  # two schemes: transformers would read one of them wrongly
        ("int8-channel-a8", "int8-channel", "int8-channel-a8"),
        ("int8-g32", "int8-g32", "float16"),  # 8-bit codes times float16 scales, in float16
    ],
)
def test_005_what_transformers_can_not_load_beside_a_quantized_embedding(
    llama: Model, scheme: str, embedding: str, words: str
) -> None:
    settings: dict[str, Any] = {"scheme": scheme, "rules": {"lm_head": embedding}}
    error = refusal(llama, **settings)
    assert error.code == "QC-PLAN-005"
    assert "model.embed_tokens" in error.message
    assert words in error.message
    assert "--layout onnx" in str(error.hint)
    assert planned(llama, layout="onnx", **settings).shared
