"""nf4 and fp4 from a folder to a verified one: loaded by transformers with bitsandbytes, and run by MatMulBnb4."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from qconvert import verify
from qconvert.errors import TargetError, UsageError
from qconvert.graph import pieces
from qconvert.ir.artifact import CARD, GRAPH, SIDECAR, WEIGHTS
from qconvert.ir.report import Report
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe

STATE = "weight.quant_state.bitsandbytes__nf4"
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="transformers loads these with bitsandbytes")


def converted(source: Path | str, output: Path, scheme: str = "nf4-g32", **settings: Any) -> Report:
    named = {"model": str(source), "output": str(output), "quantizer": "nf4", "scheme": scheme}
    return convert(Recipe.from_settings({**named, "evaluation": {"samples": 4, "length": 32}, **settings}))


def operators(folder: Path) -> dict[str, int]:
    types = [node.op_type for node in onnx.load(folder / GRAPH, load_external_data=False).graph.node]
    return {name: types.count(name) for name in ("MatMulBnb4", "MatMulNBits") if name in types}


def parity(report: Report) -> dict[str, str]:
    return {part.target: part.status for part in report.parity}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.usefixtures("quick")
@needs_bitsandbytes
@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        (tiny_llama, "nf4-g32"),
        (partial(tiny_llama, dtype=torch.bfloat16, tie=False), "nf4-g64-dq"),
        (tiny_bert, "fp4-g64"),
        (partial(tiny_gpt2, dtype=torch.float16), "fp4-g32-dq"),  # whose linears are Conv1D
    ],
    ids=["llama", "llama-bfloat16-dq", "bert-fp4", "gpt2-float16-fp4-dq"],
)
def test_a_checkpoint_becomes_a_folder_that_transformers_and_onnx_runtime_agree_on(
    make: Callable[[Path], Path], scheme: str, tmp_path: Path
) -> None:
    """The parity of transformers is with the weights that bitsandbytes itself dequantizes."""
    report = converted(make(tmp_path / "model"), tmp_path / "out", scheme)
    assert report.passed
    assert parity(report) == {"cpu": "passed", "transformers": "passed", "float": "passed"}
    assert operators(tmp_path / "out").keys() == {"MatMulBnb4"}
    assert {layer.scheme for layer in report.layers} == {scheme}
    config = config_of(tmp_path / "out")
    assert (config["quant_method"], config["load_in_4bit"]) == ("bitsandbytes", True)
    assert config["bnb_4bit_use_double_quant"] == scheme.endswith("-dq")
    card = (tmp_path / "out" / CARD).read_text()
    assert "`pip install 'transformers>=5.23' accelerate bitsandbytes`" in card
    assert "MatMulBnb4, which dequantizes the whole weight" in card
    assert "MatMulNBits" not in card


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in nf4-g64, but for one layer."""
    root = tmp_path_factory.mktemp("loaded")
    rules = [{"pattern": "*.0.mlp.up_proj", "scheme": "float"}]
    converted(tiny_llama(root / "model"), root / "out", "nf4-g64", rules=rules)
    return root / "out"


@needs_bitsandbytes
class TestLoaded:
    """What users of the folder do with it."""

    def test_its_layers_are_linear4bit_but_those_that_stayed_float(self, folder: Path) -> None:
        for model in (AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)):
            kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
            floats = {name.removeprefix("model.") for name, kind in kinds.items() if kind == "Linear"}
            assert floats - {"lm_head"} == {"layers.0.mlp.up_proj"}
            assert set(kinds.values()) == {"Linear", "Linear4bit"}

    def test_dequantized_it_gives_the_logits_of_the_weights_that_the_source_was_rounded_to(self, folder: Path) -> None:
        from bitsandbytes import functional

        source = AutoModelForCausalLM.from_pretrained(folder.parent / "model")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for name, module in loaded.named_modules():
                if type(module).__name__ == "Linear4bit":
                    weight = source.get_submodule(name).weight
                    codes, state = functional.quantize_4bit(weight.data, quant_type="nf4")
                    assert torch.equal(module.weight.data, codes)
                    weight.copy_(functional.dequantize_4bit(codes, state))
            ids = torch.arange(40).reshape(2, 20)
            assert torch.equal(loaded.dequantize()(ids).logits, source(ids).logits)

    def test_packed_it_generates(self, folder: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.arange(10).reshape(1, 10)
        found = loaded.generate(ids, max_new_tokens=4, do_sample=False)
        assert found.shape == (1, 14)
        near = AutoModelForCausalLM.from_pretrained(folder).dequantize()(ids).logits
        # bitsandbytes' kernel for processors with AVX512-BF16 computes in bfloat16.
        assert (loaded(ids).logits - near).abs().max() < 0.05 * near.abs().max()

    def test_the_file_holds_what_bitsandbytes_wrote_where_it_quantized(self, folder: Path, tmp_path: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(folder.parent / "model", quantization_config=_bitsandbytes("nf4"))
        loaded.save_pretrained(tmp_path)
        ours, theirs = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
        same = [name for name in theirs if "layers.0.mlp.up_proj" not in name]
        assert len(same) == 13 * 4 + 6
        for name in same:
            assert torch.equal(_text(ours, name), _text(theirs, name)), name


def _bitsandbytes(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)


def _text(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A tensor, or of a quant state the JSON without the spaces behind it."""
    found = tensors[name]
    return torch.tensor(list(bytes(found.tolist()).rstrip())) if name.endswith(STATE) else found


@pytest.mark.usefixtures("quick")
class TestForOnnxRuntime:
    def test_it_mixes_with_integers_and_shares_products(self, tmp_path: Path) -> None:
        rules = [{"pattern": "*.mlp.*", "scheme": "int4-g32"}, {"pattern": "lm_head", "scheme": "int8-channel"}]
        source = tiny_llama(tmp_path / "model", tie=False)
        report = converted(source, tmp_path / "out", "nf4-g64-dq", rules=rules, layout="onnx")
        assert report.passed
        assert parity(report) == {"cpu": "passed", "float": "passed"}
        # Of two layers each: query, key and value are one product, and so are gate and up.
        assert operators(tmp_path / "out") == {"MatMulBnb4": 4, "MatMulNBits": 5}
        assert config_of(tmp_path / "out")["quant_method"] == "compressed-tensors"  # which then refuses, with a reason

    def test_one_set_of_bytes_serves_the_graph(self, tmp_path: Path) -> None:
        converted(tiny_llama(tmp_path / "model"), tmp_path / "out", "nf4-g64", layout="onnx")
        graph = onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph
        files = {each.name: {entry.key: entry.value for entry in each.external_data} for each in graph.initializer}
        inputs = {name for node in graph.node if node.op_type == "MatMulBnb4" for name in node.input[1:3]}
        assert {files[name]["location"] for name in inputs} == {WEIGHTS}

    def test_double_quantization_gives_the_kernel_plain_scales_beside_them(self, tmp_path: Path) -> None:
        converted(tiny_llama(tmp_path / "model"), tmp_path / "out", "nf4-g64-dq", layout="onnx")
        names = json.loads((tmp_path / "out" / "qconvert.json").read_text())["sidecar"]
        assert sum(name.endswith(".kernel_scale") for name in names) == 14
        assert (tmp_path / "out" / SIDECAR).exists()

    def test_a_model_from_code_keeps_convolutions_in_float(self, tmp_path: Path) -> None:
        (tmp_path / "net.py").write_text(NET)
        report = converted(f"module:{tmp_path / 'net.py'}:make", tmp_path / "out", "nf4-g32", evaluation={"samples": 4})
        assert report.passed
        assert {entry.name: entry.reason for entry in report.kept_float}["0"] == (
            "there is no kernel for a layer of kind conv2d in nf4"
        )
        assert [layer.name for layer in report.layers] == ["3"]


NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10))
    return net.eval(), torch.randn(32, 1, 8, 8)
"""


@pytest.mark.usefixtures("quick")
class TestLargeModels:
    @needs_bitsandbytes
    def test_where_outputs_are_not_compared_the_weights_are_that_bitsandbytes_dequantizes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pieces, "WHOLE_BYTES", 1)
        report = converted(tiny_gpt2(tmp_path / "model"), tmp_path / "out", "nf4-g32-dq")
        errors = {part.target: part.max_relative_error for part in report.parity}
        assert errors["transformers"] == 0
        assert report.passed


@pytest.mark.usefixtures("quick")
class TestWidths:
    def test_a_width_that_the_group_does_not_divide_gets_a_smaller_one_or_stays_float(self, tmp_path: Path) -> None:
        """Group sizes may differ within a folder for bitsandbytes: each weight has a state of its own."""
        report = converted(tiny_llama(tmp_path / "model"), tmp_path / "out", "nf4-g128", allow_unverified=True)
        assert {layer.name.rpartition(".")[2]: layer.scheme for layer in report.layers} == {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "nf4-g64"),
            "down_proj": "nf4-g128",
        }


def refusal(source: Path | str, output: Path, scheme: str, **settings: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        converted(source, output, scheme, **settings)
    assert not output.exists()
    return caught.value


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("refusals") / "model")


@pytest.mark.usefixtures("quick")
class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "code", "words"),
        [
            ({"rules": [{"pattern": "*.mlp.*", "scheme": "int4-g32"}]}, "QC-PLAN-005", "to be one of nf4-gN, but"),
            ({"rules": [{"pattern": "*.mlp.*", "scheme": "fp4-g64"}]}, "QC-PLAN-005", "is fp4-g64"),
            ({"rules": [{"pattern": "lm_head", "scheme": "nf4-g64"}]}, "QC-PLAN-014", "kind embedding in nf4"),
            ({"rules": [{"pattern": "model.embed_tokens", "scheme": "nf4-g64"}]}, "QC-PLAN-014", "embedding in nf4"),
            ({"targets": ["cpu", "cuda"]}, "QC-PLAN-015", "no graph with codebooks for cuda"),
            ({"targets": ["cuda"], "rules": [{"pattern": "lm_head", "scheme": "float"}]}, "QC-PLAN-015", "q_proj (nf4-g64)"),
            ({"tuning": {"steps": 2}}, "QC-PLAN-016", "q_proj (nf4-g64) can't be tuned"),
            ({"quantizer": "gptq"}, "QC-PLAN-002", "quantizer gptq can't produce nf4-g64: its codes are integers"),
        ],
    )
    def test_what_can_not_be_is_refused_before_anything_is_written(
        self, llama: Path, tmp_path: Path, settings: dict[str, Any], code: str, words: str
    ) -> None:
        error = refusal(llama, tmp_path / "out", "nf4-g64", **settings)
        assert error.code == code
        assert words in error.message

    def test_a_weight_that_the_model_looks_at_can_not_be_packed_for_transformers(self, tmp_path: Path) -> None:
        source = tiny_t5(tmp_path / "model")
        assert "looks at" in refusal(source, tmp_path / "out", "nf4-g64").message
        report = converted(source, tmp_path / "apart", "nf4-g64", layout="onnx")
        assert report.passed

    @pytest.mark.parametrize("text", ["nf4-channel", "nf4-g16", "nf4-g64-asym", "nf4-g64-a8", "int4-g32-dq", "nf8"])
    def test_what_is_no_scheme_is_told_what_is_one(self, llama: Path, tmp_path: Path, text: str) -> None:
        error = refusal(llama, tmp_path / "out", text)
        assert "nf4 and fp4 are for the quantizer nf4, then -gN (N one of 32, 64, 128, 256), then -dq" in str(error)


class TestWithoutBitsandbytes:
    @pytest.mark.usefixtures("quick")
    def test_the_folder_is_published_and_the_check_named_that_could_not_be_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verify, "find_spec", lambda name: None)
        source = tiny_llama(tmp_path / "model")
        with pytest.raises(TargetError) as caught:
            converted(source, tmp_path / "out", "nf4-g64")
        assert caught.value.code == "QC-TARGET-001"
        assert "pip install bitsandbytes" in caught.value.message
        assert (tmp_path / "out" / WEIGHTS).exists()
        report = converted(source, tmp_path / "out", "nf4-g64", allow_unverified=True, force=True)
        assert parity(report) == {"cpu": "passed", "transformers": "not-run", "float": "passed"}
