"""config.json: what transformers makes of a written folder. Loaded outputs are compared with the dequantized model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization.lifecycle import forward
from torch import Tensor, nn
from writing import DIGEST, MemorySource, SchemeOf, all_linears, net, plan_of, quantize_layer, quantized_blocks, write_blocks

from qconvert.errors import UsageError
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.quantized import Outliers
from qconvert.ir.scheme import QuantScheme
from qconvert.storage.compressed_tensors import dequantizes_exactly, must_dequantize, transformers_refuses
from qconvert.storage.stage import open_stage

# Relative to the largest |output|. Also where transformers dequantizes in the scale's dtype (QuantScheme.scale_dtype).
EXACT = 1e-6
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


pytestmark = pytest.mark.usefixtures("quiet")


def hugging_face(kind: str, *, tied: bool = False) -> Model:
    """A random tiny Llama or BERT."""
    torch.manual_seed(0)
    module: Any
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
        module = transformers.LlamaForCausalLM(config).eval()
        blocks = ("model.layers.0", "model.layers.1")
    else:
        module = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
        blocks = ("encoder.layer.0", "encoder.layer.1")
    content = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    aliases = {}
    if tied:
        del content["lm_head.weight"]
        aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    return Model(
        kind,
        "causal-lm" if kind == "llama" else "encoder",  # type: ignore[arg-type]
        module,
        MemorySource(content),
        blocks,
        aliases,
        config={**module.config.to_dict(), "architectures": [type(module).__name__]},
    )


def write_folder(model: Model, plan: Plan, output: Path, *, outliers: bool = False, layout: Any = "transformers") -> Path:
    blocks = quantized_blocks(model, plan)
    if outliers:
        blocks = (replace(block, layers=tuple(with_outlier(model, layer) for layer in block.layers)) for block in blocks)
    with open_stage(output, DIGEST) as stage:
        write_blocks(blocks, model, plan, stage, layout=layout)
        stage.publish()
    return output


def with_outlier(model: Model, layer: Any) -> Any:
    weight = model.read(f"{layer.name}.weight")
    return replace(layer, tensor=replace(layer.tensor, outliers=Outliers(torch.tensor([5]), weight[:, [5]])))


def relative_error(model: Model, plan: Plan, loaded: nn.Module, bare: bool = False) -> float:
    reference: Any = copy.deepcopy(model.module)
    for name, layer in plan.layers.items():
        reference.get_submodule(name).weight = nn.Parameter(quantize_layer(model, layer).dequantize())
    tokens = torch.arange(18).reshape(2, 9) * 5 % 96
    with torch.no_grad():
        expected: Tensor = (reference.model if bare else reference)(tokens)[0]
        return float((loaded(tokens)[0] - expected).abs().max() / expected.abs().max())


def loaded(model: Model, folder: Path, bare: bool = False) -> nn.Module:
    loader = transformers.AutoModelForCausalLM if model.task.name == "causal-lm" and not bare else transformers.AutoModel
    module: nn.Module = loader.from_pretrained(folder, dtype=torch.float32)
    return module.eval()


@pytest.fixture
def float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors fake-quantizes the inputs of a8 layers: leave them alone, to see the weights alone."""
    real = forward.forward_quantize
    monkeypatch.setattr(
        forward,
        "forward_quantize",
        lambda module, value, name, args: value if name == "input" else real(module, value, name, args),
    )


def layer_of(plan: Plan) -> LayerPlan:
    return next(iter(plan.layers.values()))


def mixed(body: str, down: str) -> SchemeOf:
    return lambda name: None if name == "lm_head" else down if name.endswith(("down_proj", "output.dense")) else body


WEIGHT_ONLY = [f"int{bits}-{granularity}" for bits in (4, 8) for granularity in ("g32", "channel", "tensor")]
MIXES = [
    ("int4-g32", "int8-channel"),
    ("int4-g32", "int4-g16"),
    ("int8-channel-a8", "int4-g32"),
    ("int8-channel-a8", "int8-tensor-asym-a8"),
    ("int4-g32", "int8-channel-asym-a8"),
]
# Two config groups with "dequantize": true fail to load, or load wrongly.
REFUSED = [
    ("int4-g32-asym", "int8-channel"),
    ("int4-g32-asym", "int4-g32"),
    ("int4-g32", "int8-g32-asym"),
    ("int4-g32-asym", "int4-g16-asym"),
]


@pytest.mark.parametrize("kind", ["llama", "bert"])
class TestTransformersLoads:
    @pytest.mark.parametrize("scheme", WEIGHT_ONLY)
    def test_symmetric_weights_exactly(self, tmp_path: Path, kind: str, scheme: str) -> None:
        model = hugging_face(kind)
        plan = plan_of(model, all_linears(scheme))
        folder = write_folder(model, plan, tmp_path / "out")
        assert quantization(folder).get("dequantize", False) is dequantizes_exactly(layer_of(plan))
        assert relative_error(model, plan, loaded(model, folder)) < EXACT

    @pytest.mark.parametrize("scheme", [f"{scheme}-asym" for scheme in WEIGHT_ONLY])
    def test_asymmetric_weights_exactly_by_dequantizing(self, tmp_path: Path, kind: str, scheme: str) -> None:
        model = hugging_face(kind)
        plan = plan_of(model, all_linears(scheme))
        folder = write_folder(model, plan, tmp_path / "out")
        assert quantization(folder)["dequantize"] is True
        assert relative_error(model, plan, loaded(model, folder)) < EXACT

    @pytest.mark.parametrize("scheme", ["int8-channel-a8", "int8-tensor-a8", "int8-tensor-asym-a8", "int8-channel-asym-a8"])
    def test_int8_activations_as_float_layers_with_exact_weights(self, tmp_path: Path, kind: str, scheme: str) -> None:
        model = hugging_face(kind)
        plan = plan_of(model, all_linears(scheme))
        folder = write_folder(model, plan, tmp_path / "out")
        assert quantization(folder)["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8
        assert quantization(folder)["dequantize"] is True
        assert relative_error(model, plan, loaded(model, folder)) < EXACT

    def test_int8_with_outlier_columns_as_weights_only(self, tmp_path: Path, kind: str) -> None:
        model = hugging_face(kind)
        plan = plan_of(model, all_linears("int8-channel-a8"))
        folder = write_folder(model, plan, tmp_path / "out", outliers=True)
        assert quantization(folder)["config_groups"]["group_0"]["input_activations"] is None
        assert relative_error(model, plan, loaded(model, folder)) < EXACT

    @pytest.mark.usefixtures("float_activations")
    @pytest.mark.parametrize(("body", "down"), MIXES, ids=["+".join(mix) for mix in MIXES])
    def test_two_schemes(self, tmp_path: Path, kind: str, body: str, down: str) -> None:
        model = hugging_face(kind)
        plan = plan_of(model, mixed(body, down))
        assert transformers_refuses(plan.layers.values()) is None
        folder = write_folder(model, plan, tmp_path / "out")
        assert "dequantize" not in quantization(folder)  # transformers would take the first group's scheme for all
        assert relative_error(model, plan, loaded(model, folder)) < EXACT

    def test_layers_that_are_kept_float(self, tmp_path: Path, kind: str) -> None:
        model = hugging_face(kind)
        plan = plan_of(model, lambda name: "int4-g32" if name.endswith(("k_proj", "key")) else None)
        folder = write_folder(model, plan, tmp_path / "out")
        assert relative_error(model, plan, loaded(model, folder)) < EXACT


class TestBareModel:
    """A folder of a causal LM may be loaded without its head; module names are shorter there."""

    def test_several_schemes_and_float_layers(self, tmp_path: Path) -> None:
        model = hugging_face("llama")
        plan = plan_of(model, lambda name: None if name.endswith(("o_proj", "lm_head")) else mixed("int4-g32", "int8")(name))
        folder = write_folder(model, plan, tmp_path / "out")
        assert relative_error(model, plan, loaded(model, folder, bare=True), bare=True) < EXACT

    def test_a_name_without_prefix_stays_exact(self, tmp_path: Path) -> None:
        model = hugging_face("llama")
        folder = write_folder(model, plan_of(model, all_linears("int4-g32")), tmp_path / "out")
        assert quantization(folder)["ignore"] == ["lm_head"]

    def test_a_pattern_that_would_match_two_layers_is_not_used(self, tmp_path: Path) -> None:
        model = replace(net(), config={})
        model.module.base_model_prefix = "blocks"  # type: ignore[assignment]
        model.module.other = nn.ModuleDict({"0": nn.ModuleDict({"a": nn.Linear(2, 2)})})
        plan = plan_of(model, lambda name: {"blocks.0.a": "int4", "blocks.1.a": "int8"}.get(name))
        source = {**model.source.content, "other.0.a.weight": torch.ones(2, 2)}  # type: ignore[attr-defined]
        folder = write_folder(replace(model, source=MemorySource(source)), plan, tmp_path / "out")
        groups = quantization(folder)["config_groups"]
        assert groups["group_0"]["targets"] == ["blocks.0.a"]
        assert groups["group_1"]["targets"] == [r"re:(.*\.)?1\.a$"]


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int8-channel-a8"])
def test_a_quantized_head_is_no_longer_tied(tmp_path: Path, scheme: str) -> None:
    model = hugging_face("llama", tied=True)
    plan = plan_of(model, lambda name: scheme)
    folder = write_folder(model, plan, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert relative_error(model, plan, loaded(model, folder)) < EXACT


def test_a_float_head_stays_tied(tmp_path: Path) -> None:
    model = hugging_face("llama", tied=True)
    plan = plan_of(model, all_linears("int4-g32"))
    folder = write_folder(model, plan, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert relative_error(model, plan, loaded(model, folder)) < EXACT


class TestRefusals:
    """Mixes that transformers loads wrongly, or not at all."""

    def layers(self, *schemes: str, kind: Any = "linear") -> list[LayerPlan]:
        return [LayerPlan(f"layer{i}", kind, 64, 64, QuantScheme.parse(scheme)) for i, scheme in enumerate(schemes)]

    @pytest.mark.parametrize("schemes", REFUSED, ids="+".join)
    def test_packed_zero_points_allow_no_second_scheme(self, schemes: tuple[str, str]) -> None:
        reason = transformers_refuses(self.layers(*schemes))
        assert reason is not None
        assert "'layer0'" in reason
        assert "'layer1'" in reason
        assert all(scheme in reason for scheme in schemes)

    def test_outlier_columns_allow_no_second_scheme(self) -> None:
        assert transformers_refuses(self.layers("int8-channel-a8", "int4-g32")) is None
        assert "outlier" in str(transformers_refuses(self.layers("int8-channel-a8", "int4-g32"), outliers=True))

    def test_a_weight_that_the_models_code_looks_at_allows_no_second_scheme(self) -> None:
        """T5 asks for the dtype of a weight, and a packed layer has none: it is dequantized when it is loaded."""
        first, second = self.layers("int4-g32", "int4-g64")
        looked_at = replace(first, weight_read=True)
        assert transformers_refuses([first, second]) is None
        assert transformers_refuses([looked_at, first]) is None
        assert "'layer0' (int4-g32) has a weight that the model's own code looks at" in str(
            transformers_refuses([looked_at, second])
        )
        assert must_dequantize(looked_at, outliers=False)
        assert not must_dequantize(replace(looked_at, scheme=QuantScheme.parse("int8-channel-a8")), outliers=False)

    def test_schemes_that_are_one_to_transformers(self) -> None:
        assert transformers_refuses(self.layers("int4-channel-asym", "int4-tensor-asym")) is None

    @pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
    def test_layers_that_are_no_linear(self, kind: str) -> None:
        assert f"'layer0' is a {kind}" in str(transformers_refuses(self.layers("int8", kind=kind)))

    def test_a_mix_that_only_writing_shows_is_refused_then(self, tmp_path: Path) -> None:
        model = hugging_face("llama")
        plan = plan_of(model, mixed("int8-channel-a8", "int8-channel"))
        with pytest.raises(UsageError, match="QC-WRITE-002") as caught:
            write_folder(model, plan, tmp_path / "out", outliers=True)
        assert "--layout onnx" in caught.value.hint
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_a_folder_for_onnx_is_refused_with_the_reason(self, tmp_path: Path, kind: str) -> None:
        model = hugging_face(kind)
        folder = write_folder(model, plan_of(model, mixed("int4-g32-asym", "int8")), tmp_path / "out", layout="onnx")
        with pytest.raises(ValueError, match="load the onnx files instead"):
            loaded(model, folder)


class TestSourceConfig:
    def test_everything_else_stays_as_it_was(self, tmp_path: Path) -> None:
        model = hugging_face("bert")
        folder = write_folder(model, plan_of(model, all_linears("int8")), tmp_path / "out")
        written = json.loads((folder / "config.json").read_text())
        assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
        assert written == json.loads(json.dumps(model.config))

    def test_a_stale_quantization_config_goes(self, tmp_path: Path) -> None:
        """Fault 26."""
        model = replace(net(), config={"model_type": "net", "quantization_config": {"quant_method": "gptq"}})
        folder = write_folder(model, plan_of(model, lambda name: None), tmp_path / "out")
        assert json.loads((folder / "config.json").read_text()) == {"model_type": "net"}

    def test_a_plain_module_gets_none(self, tmp_path: Path) -> None:
        model = net()
        folder = write_folder(model, plan_of(model, all_linears("int8")), tmp_path / "out")
        assert not (folder / "config.json").exists()


def quantization(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return document
