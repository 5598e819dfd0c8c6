"""Every stored tensor is used, known to be expendable, or named in an error; adapters are named as what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, save_checkpoint, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor

from qconvert.cli import main
from qconvert.load.hugging_face import load_folder
from qconvert.ort.session import file_session
from qconvert.pipeline import conversion
from qconvert.recipe import Recipe

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewrite(folder: Path, change: Change) -> Path:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def add(extra: dict[str, Tensor]) -> Change:
    return lambda tensors: tensors | extra


def rename(new: Callable[[str], str]) -> Change:
    return lambda tensors: {new(name): value for name, value in tensors.items()}


def configure(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def refused(folder: Path, code: str) -> str:
    """What `run` and `plan` say of a folder that is not converted: the message and the hint."""
    answers = []
    for verb in ("run", "plan"):
        result = CliRunner().invoke(main, [verb, "--model", str(folder), "--output", f"{folder}-out", "--json"])
        assert result.exit_code == 3
        answers.append(json.loads(result.stdout)["error"])
    assert answers[0] == answers[1]
    assert answers[0]["code"] == code
    assert not (folder / "out").exists()
    return f"{answers[0]['message']}\n{answers[0]['hint']}"


def qwen2(folder: Path, layers: int = 2) -> Path:
    """A Qwen2 whose biases are not zero."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return save_checkpoint(transformers.Qwen2ForCausalLM(config), folder)


# Tensors that the model would need


def test_biases_that_the_named_architecture_lacks_are_named(tmp_path: Path) -> None:
    folder = configure(qwen2(tmp_path), model_type="llama", architectures=["LlamaForCausalLM"])
    said = refused(folder, "QC-INPUT-024")
    assert "LlamaForCausalLM has no place for 6 of the 27 stored tensors" in said
    assert "'model.layers.0.self_attn.k_proj.bias'" in said
    assert "model_type" in said


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
def test_layers_that_the_config_does_not_count_are_named(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    folder = build(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    count = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config)
    last = config[count] - 1
    assert f".{last}." in refused(configure(folder, **{count: last}, layer_types=None), "QC-INPUT-024")


def test_heads_and_biases_beside_the_model_are_named(tmp_path: Path) -> None:
    extra = {"lm_head.bias": torch.ones(VOCABULARY), "v_head.summary.weight": torch.ones(1, 64), "../odd\0": torch.ones(1)}
    said = refused(rewrite(tiny_llama(tmp_path), add(extra)), "QC-INPUT-024")
    assert "'lm_head.bias'" in said
    assert "'v_head.summary.weight'" in said
    assert r"'../odd\x00'" in said


def test_a_head_that_the_named_base_class_lacks_is_named(tmp_path: Path) -> None:
    folder = rewrite(tiny_bert(tmp_path), add({"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)}))
    assert "BertModel has no place for 2" in refused(folder, "QC-INPUT-024")


def test_what_is_stored_under_another_name_is_named_with_what_is_missing(tmp_path: Path) -> None:
    said = refused(rewrite(tiny_llama(tmp_path), rename(lambda name: name.replace("q_proj", "query"))), "QC-INPUT-024")
    assert "no place for 2 of the 20 stored tensors: 'model.layers.0.self_attn.query.weight'" in said
    assert "lacks 2 of its own: 'model.layers.0.self_attn.q_proj.weight'" in said


# Tensors of a quantizer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_scale", torch.tensor(0.02)),
        ("weight_scale", torch.ones(64, 1)),
        ("weight_scale_inv", torch.ones(1, 1)),
        ("weight_packed", torch.zeros(64, 16, dtype=torch.int32)),
        ("input_scale", torch.tensor(0.02)),
        ("g_idx", torch.zeros(64, dtype=torch.int32)),
        ("SCB", torch.ones(64)),
        ("weight.absmax", torch.ones(64)),
    ],
)
def test_what_a_quantizer_left_beside_float_weights_is_named(tmp_path: Path, name: str, value: Tensor) -> None:
    """Their names may be those of the tensors in which the output keeps its own scales."""
    said = refused(rewrite(tiny_llama(tmp_path), add({f"model.layers.0.self_attn.q_proj.{name}": value})), "QC-INPUT-013")
    assert f"'model.layers.0.self_attn.q_proj.{name}'" in said


# State dicts of wrapped modules


@pytest.mark.parametrize(
    ("new", "wrapper"),
    [
        (lambda name: f"module.{name}", "'module' (DataParallel, DistributedDataParallel or DeepSpeed)"),
        (lambda name: f"_orig_mod.{name}", "'_orig_mod' (torch.compile)"),
        (lambda name: f"module._orig_mod.{name}", "'_orig_mod' (torch.compile)"),
        (lambda name: name.replace(".mlp.", "._orig_mod.mlp."), "'_orig_mod' (torch.compile)"),
        (lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), "'_checkpoint_wrapped_module'"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "FullyShardedDataParallel"),
        (lambda name: f"policy.{name}", "'policy' (a module that holds the model)"),
    ],
    ids=["data parallel", "compiled", "both", "one compiled part", "checkpointing", "fsdp", "any other"],
)
def test_a_wrapped_state_dict_is_named_as_what_it_is(tmp_path: Path, new: Callable[[str], str], wrapper: str) -> None:
    said = refused(rewrite(tiny_llama(tmp_path), rename(new)), "QC-INPUT-024")
    assert wrapper in said
    assert "rename the tensors" in said


# Adapters

ADAPTER_CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "me/base", "r": 4, "target_modules": ["q_proj"]}
LORA = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.ones(*shape)
    for layer in range(2)
    for side, shape in (("A", (4, 64)), ("B", (64, 4)))
}


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    save_file(LORA, folder / "adapter_model.safetensors")
    said = refused(folder, "QC-INPUT-023")
    assert "an adapter (peft_type 'LORA') of 'me/base' beside a model" in said
    assert "merge_and_unload" in said
    assert "remove adapter_config.json" in said


def test_an_adapter_alone_is_refused_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    assert "an adapter (peft_type 'LORA') of 'me/base', and not the model itself" in refused(tmp_path, "QC-INPUT-023")


def test_an_adapter_config_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "adapter_config.json").write_text("[]")
    assert "adapter_config.json" in refused(folder, "QC-INPUT-023")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_weights_of_an_adapter_without_its_config_are_refused(tmp_path: Path, name: str) -> None:
    folder = tiny_llama(tmp_path)
    save_file(LORA, folder / name)
    said = refused(folder, "QC-INPUT-023")
    assert f"the weights of an adapter, {name}, without the adapter_config.json" in said
    assert f"remove {name}" in said


def wrapped_by_peft(name: str) -> str:
    return f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: rename(wrapped_by_peft)(tensors) | LORA,
        rename(wrapped_by_peft),
        rename(lambda name: f"base_model.model.{name}"),
        add({name.removeprefix("base_model.model."): value for name, value in LORA.items()}),
    ],
    ids=["saved whole", "base layers alone", "prefix alone", "factors beside plain weights"],
)
def test_a_state_dict_with_an_adapter_is_refused_as_what_it_is(tmp_path: Path, change: Change) -> None:
    said = refused(rewrite(tiny_llama(tmp_path), change), "QC-INPUT-023")
    assert "adapter of peft" in said
    assert "merge_and_unload" in said


# Tensors that are known to be expendable


def expendable_of(folder: Path, extra: dict[str, Tensor]) -> dict[str, str]:
    return dict(load_folder(rewrite(folder, add(extra))).unplaced)


BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_the_expendable_are_known_by_name_and_reason(tmp_path: Path) -> None:
    rotary = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    reason = "rotary frequencies, which config.json determines"
    assert expendable_of(tiny_llama(tmp_path / "llama"), rotary) == dict.fromkeys(rotary, reason)
    positions = {"embeddings.position_ids": torch.arange(256)[None]}
    assert expendable_of(tiny_bert(tmp_path / "bert"), positions) == dict.fromkeys(
        positions, "position numbers, which are counted anyway"
    )
    masks = {"h.0.attn.bias": torch.ones(1, 1, 256, 256), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert list(expendable_of(tiny_gpt2(tmp_path / "gpt2"), masks).values()) == [
        "a causal mask",
        "the score of masked tokens, a constant",
    ]
    head = save_checkpoint(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval(), tmp_path / "head")
    others = {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.bias": torch.ones(2)}
    assert expendable_of(head, others) == {
        "bert.pooler.dense.weight": "a pooler, which this class does not have",
        "cls.seq_relationship.bias": "BERT's next-sentence head, which this class does not have",
    }
    t5 = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)}
    assert list(expendable_of(tiny_t5(tmp_path / "t5"), t5).values()) == [
        "T5ForConditionalGeneration of transformers leaves it out"
    ]


def test_a_bias_of_the_shape_of_a_mask_alone_is_expendable(tmp_path: Path) -> None:
    folder = rewrite(tiny_llama(tmp_path), add({"model.layers.0.self_attn.bias": torch.ones(64)}))
    assert "'model.layers.0.self_attn.bias'" in refused(folder, "QC-INPUT-024")


@pytest.mark.usefixtures("quick")
def test_expendable_tensors_change_nothing_travel_along_and_are_listed(tmp_path: Path) -> None:
    ids = [[5, 6, 7, 8]]
    folder = tiny_llama(tmp_path / "model")
    with torch.no_grad():
        expected = transformers.LlamaForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits.flatten()
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for layer in range(2)}
    rewrite(folder, add(extra))
    recipe = Recipe(model=str(folder), output=tmp_path / "out", scheme="int8-channel", verify=False)
    conversion.convert(recipe)
    session = file_session(tmp_path / "out" / "model.onnx")
    past = {part.name: np.zeros((1, 2, 0, 16), np.float32) for part in session.get_inputs() if "past" in part.name}
    feeds = {"input_ids": np.array(ids), "attention_mask": np.ones((1, 4), np.int64)}
    found = torch.from_numpy(session.run(["logits"], feeds | past)[0]).flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    assert extra.keys() <= load_file(tmp_path / "out" / "model.safetensors").keys()
    shown = qconvert_plan(folder)
    assert "2 stored but not read, rotary frequencies, which config.json determines: model.layers.0" in shown


SCALED = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    module[0].register_buffer("weight_scale", torch.ones(1))
    return module, torch.randn(64, 32)
"""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("scheme", ["int8-channel", "int8-channel-a8"])
def test_a_layer_with_a_tensor_of_a_quantized_layers_name_stays_in_float(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "net.py").write_text(SCALED)
    settings = {"model": f"module:{tmp_path / 'net.py'}:net", "output": str(tmp_path / "out"), "scheme": scheme}
    data = {"samples": 8}
    report = conversion.convert(Recipe.from_settings({**settings, "calibration": data, "evaluation": data}))
    assert report.passed
    assert [layer.name for layer in report.layers] == ["1"]
    assert "0.weight_scale" in report.kept_float[0].reason
    assert load_file(tmp_path / "out" / "model.safetensors")["0.weight_scale"].tolist() == [1.0]


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.unused, self.scale = nn.Linear(32, 32), nn.Linear(32, 4), nn.Parameter(torch.ones(32))
        self.shared, self.norm = self.fc.weight, nn.BatchNorm1d(32)

    def forward(self, x):
        return self.norm(self.fc(x))

def net():
    torch.manual_seed(0)
    return Net(), torch.randn(8, 32)
"""


def test_parameters_that_a_module_does_not_compute_with_are_listed(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODULE)
    shown = qconvert_plan(f"module:{tmp_path / 'net.py'}:net")
    assert "3 stored but not read, the exported graph has no use for it: scale, unused.weight, unused.bias" in shown


def qconvert_plan(source: object) -> str:
    result = CliRunner().invoke(main, ["plan", "--model", str(source), "--output", "out"])
    assert result.exit_code == 0
    return result.stdout.replace("\n", " ")
