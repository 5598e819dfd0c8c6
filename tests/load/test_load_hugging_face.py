"""A Hugging Face folder becomes a Model: no code runs, and every parameter has its stored tensor (faults 10, 26, 27)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint, save_tensors, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.model import Model
from qconvert.load.hugging_face import load_folder

TOKENS = torch.arange(12).reshape(2, 6) * 7 % 384


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")  # type: ignore[no-any-return]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file({name: value.clone() for name, value in change(tensors_of(folder)).items()}, folder / "model.safetensors")
    return folder


def configure(folder: Path, *remove: str, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))
    return folder


def outputs(model: Model) -> Tensor:
    """What the skeleton computes with what the source holds."""
    places = model.module.state_dict()
    state = {name: model.source.read(name).float() for name in model.source.tensors if name in places}
    with torch.no_grad():
        return torch.func.functional_call(model.module, state, (TOKENS,))[0]  # type: ignore[no-any-return]


def expected(folder: Path) -> Tensor:
    """What transformers computes."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with torch.no_grad():
        return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)(TOKENS)[0]  # type: ignore[no-any-return]


def rejected(folder: Path, code: str) -> str:
    with pytest.raises(InputError) as caught:
        load_folder(folder)
    assert caught.value.code == code
    return caught.value.message


BUILDERS = pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])


# The whole


@BUILDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_computes_what_transformers_computes(tmp_path: Path, build: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = build(tmp_path, dtype=dtype)
    model = load_folder(folder)
    assert {info.dtype for info in model.source.tensors.values()} == {dtype}
    torch.testing.assert_close(outputs(model), expected(folder), rtol=0, atol=0)


def test_a_sharded_model_is_the_same_model(tmp_path: Path) -> None:
    one, three = load_folder(tiny_llama(tmp_path / "one")), load_folder(tiny_llama(tmp_path / "three", shards=3))
    assert one.source.tensors == three.source.tensors
    assert torch.equal(outputs(one), outputs(three))
    assert sum(name.endswith(".safetensors") for name in three.input_files) == 3


@BUILDERS
def test_parameters_take_no_memory_and_buffers_are_real(tmp_path: Path, build: Callable[..., Path]) -> None:
    module = load_folder(build(tmp_path, dtype=torch.bfloat16)).module
    assert not module.training
    assert all(parameter.is_meta and parameter.dtype is torch.float32 for parameter in module.parameters())
    assert not any(buffer.is_meta or buffer.dtype is torch.bfloat16 for buffer in module.buffers())


def test_a_decoder_in_words(tmp_path: Path) -> None:
    model = load_folder(tiny_llama(tmp_path / "tiny"))
    assert model.name == "tiny"
    assert model.task.name == "causal-lm"
    assert model.blocks == ("model.layers.0", "model.layers.1")
    assert model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.output_head == "lm_head"
    assert model.input_names == ("input_ids", "attention_mask")
    assert model.config is not None
    assert model.config["hidden_size"] == 64


def test_a_decoder_of_a_family_that_sees_is_a_decoder(tmp_path: Path) -> None:
    """transformers declares images as an input of Gemma 3's language model as well."""
    config = transformers.Gemma3TextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    folder = save_checkpoint(transformers.Gemma3ForCausalLM(config).eval(), tmp_path)
    loaded = load_folder(folder)
    assert loaded.task.name == "causal-lm"
    assert loaded.input_names == ("input_ids", "attention_mask")
    torch.testing.assert_close(outputs(loaded), expected(folder), rtol=0, atol=0)


def test_an_encoder_in_words(tmp_path: Path) -> None:
    model = load_folder(tiny_bert(tmp_path))
    assert model.task.name == "encoder"
    assert model.blocks == ("encoder.layer.0", "encoder.layer.1")
    assert model.output_head == "pooler.dense"
    assert model.input_names == ("input_ids", "attention_mask", "token_type_ids")


def test_an_encoder_decoder_in_words(tmp_path: Path) -> None:
    model = load_folder(tiny_t5(tmp_path))
    assert model.task.name == "seq2seq-lm"
    assert model.blocks == ("encoder.block.0", "encoder.block.1", "encoder.block.2", "decoder.block.0", "decoder.block.1")
    assert model.stacks == (model.blocks[:3], model.blocks[3:])
    assert set(model.tied) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert model.output_head == "lm_head"
    assert model.input_names == ("input_ids", "attention_mask", "decoder_input_ids")
    assert model.decoder_start == 0


def test_the_head_of_a_model_that_can_not_untie_it_is_kept_apart_all_the_same(tmp_path: Path) -> None:
    """T5 1.1: its class ties the head whatever the config says, and `tie_word_embeddings` means something else there."""
    model = load_folder(tiny_t5(tmp_path, tie=False))
    assert set(model.tied) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert not torch.equal(model.read("lm_head.weight"), model.read("shared.weight"))
    assert model.config is not None
    assert model.config["scale_decoder_outputs"] is False


@pytest.mark.parametrize(
    ("generation", "config", "start"),
    [
        ({"decoder_start_token_id": 3, "bos_token_id": 4}, {"decoder_start_token_id": 5}, 3),
        ({"bos_token_id": 4}, {"decoder_start_token_id": 5}, 5),
        ({}, {"bos_token_id": 4, "pad_token_id": 6}, 4),
        ({}, {"bos_token_id": None, "pad_token_id": 6}, 6),
    ],
    ids=["generation config", "config", "begin of text", "padding"],
)
def test_where_a_decoder_starts(generation: dict[str, int], config: dict[str, int | None], start: int) -> None:
    settings = {"decoder_start_token_id": None, **config}
    module = SimpleNamespace(config=SimpleNamespace(**settings))
    files = {"generation_config.json": json.dumps(generation).encode()}
    model = Model("m", "seq2seq-lm", module, source=None, files=files)  # type: ignore[arg-type]
    assert model.decoder_start == start


def test_files_and_the_tokenizer_come_along(tmp_path: Path) -> None:
    model = load_folder(tiny_bert(tmp_path))
    assert list(model.files) == ["tokenizer.json", "tokenizer_config.json"]
    assert list(model.input_files) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert model.input_paths[0] == model.folder  # no output may lie in it: the next run would carry that along
    assert model.encode_text is not None
    tokens = model.encode_text("class A: pass " * 1000)
    assert (tokens[0], tokens[-1]) == (1, 2)  # [CLS] and [SEP]
    assert len(tokens) > 1000  # not cut
    assert max(tokens) < 384


def test_without_a_tokenizer_there_is_no_encode_text(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert load_folder(folder).encode_text is None


def test_a_damaged_tokenizer_fails_when_it_is_used(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    encode = load_folder(folder).encode_text
    assert encode is not None
    with pytest.raises(InputError, match=r"tokenizer\.json") as caught:
        encode("x")
    assert caught.value.code == "QC-INPUT-018"


# Blocks and inputs of other families


@pytest.mark.parametrize(
    ("model", "blocks", "inputs"),
    [
        ("Roberta", ("encoder.layer.0", "encoder.layer.1"), ("input_ids", "attention_mask")),
        ("DistilBert", ("transformer.layer.0", "transformer.layer.1"), ("input_ids", "attention_mask")),
        ("Electra", ("encoder.layer.0", "encoder.layer.1"), ("input_ids", "attention_mask", "token_type_ids")),
        ("MPNet", ("encoder.layer.0", "encoder.layer.1"), ("input_ids", "attention_mask")),
        ("Albert", (), ("input_ids", "attention_mask", "token_type_ids")),
    ],
)
def test_other_encoders(tmp_path: Path, model: str, blocks: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    types = {"type_vocab_size": 1} if model == "Roberta" else {}
    config = getattr(transformers, f"{model}Config")(
        vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_dim=32, **types
    )
    folder = save_checkpoint(getattr(transformers, f"{model}Model")(config).eval(), tmp_path)
    loaded = load_folder(folder)
    assert loaded.blocks == blocks
    assert loaded.input_names == inputs
    torch.testing.assert_close(outputs(loaded), expected(folder), rtol=0, atol=0)


# Names


def test_the_base_models_prefix_may_be_missing(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    before = outputs(load_folder(folder))
    rewrite(folder, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    assert torch.equal(outputs(load_folder(folder)), before)


def test_the_base_models_prefix_may_be_superfluous(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    before = outputs(load_folder(folder))
    rewrite(folder, lambda tensors: {f"bert.{name}": value for name, value in tensors.items()})
    assert torch.equal(outputs(load_folder(folder)), before)


def test_gamma_and_beta_are_weight_and_bias(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    before = outputs(load_folder(folder))

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder, lambda tensors: {old(name): value for name, value in tensors.items()})
    model = load_folder(folder)
    assert "embeddings.LayerNorm.weight" in model.source.tensors
    assert torch.equal(outputs(model), before)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    folder = rewrite(tiny_bert(tmp_path), lambda tensors: tensors | {"bert.pooler.dense.bias": torch.zeros(64)})
    assert "pooler.dense.bias" in rejected(folder, "QC-INPUT-017")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_parameters_are_named(tmp_path: Path, lost: str) -> None:
    folder = rewrite(tiny_llama(tmp_path), lambda tensors: {name: value for name, value in tensors.items() if name != lost})
    message = rejected(folder, "QC-INPUT-015")
    assert f"lacks 1 parameters of LlamaForCausalLM: '{lost}'" in message


POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        pytest.param("MarianMTModel", POSITIONS, id="marian, as transformers saves it"),
        pytest.param("PegasusForConditionalGeneration", POSITIONS, id="pegasus, as older versions saved it"),
        pytest.param("BartForConditionalGeneration", ("final_logits_bias",), id="bart, as older versions saved it"),
    ],
)
def test_what_is_computed_need_not_be_stored(tmp_path: Path, model: str, absent: tuple[str, ...]) -> None:
    layers = {f"{half}_{what}": size for half in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 32))}
    model_class = getattr(transformers, model)
    config = model_class.config_class(vocab_size=384, d_model=32, pad_token_id=0, decoder_start_token_id=1, **layers)
    folder = save_checkpoint(model_class(config).eval(), tmp_path)
    rewrite(folder, lambda tensors: {name: value for name, value in tensors.items() if name not in absent})
    loaded, reference = load_folder(folder), model_class.from_pretrained(folder).state_dict()
    for name in absent:
        torch.testing.assert_close(loaded.source.read(name), reference[name], rtol=0, atol=0)


@pytest.mark.parametrize(("make", "key"), [(tiny_llama, "num_hidden_layers"), (tiny_gpt2, "n_layer"), (tiny_t5, "num_layers")])
@pytest.mark.parametrize("readable", [True, False])
def test_layers_that_no_tensors_can_fill_are_refused_before_they_are_built(
    make: Callable[[Path], Path], key: str, readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.load.skeleton.build_skeleton", None)
    folder = configure(make(tmp_path), **{key: 10**9})
    if not readable:
        (folder / "model.safetensors").write_bytes(b"")
    assert f"{key} is 1000000000, far more layers than the checkpoint has tensors for" in rejected(folder, "QC-INPUT-015")


def test_a_shape_that_the_config_contradicts_is_named(tmp_path: Path) -> None:
    message = rejected(configure(tiny_llama(tmp_path), intermediate_size=96), "QC-INPUT-016")
    assert "'model.layers.0.mlp.down_proj.weight' is [64, 128], config.json says [64, 96]" in message


def test_integers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    name = "model.norm.weight"
    folder = rewrite(tiny_llama(tmp_path), lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    assert f"'{name}' is torch.int8" in rejected(folder, "QC-INPUT-016")


def test_a_sentence_encoder_saved_without_the_head_of_its_architecture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_bert(tmp_path)
    before = outputs(load_folder(folder))
    with caplog.at_level(logging.WARNING, "qconvert"):
        model = load_folder(configure(folder, architectures=["BertForMaskedLM"]))
    assert torch.equal(outputs(model), before)
    assert model.config is not None
    assert model.config["architectures"] == ["BertModel"]
    assert "BertForMaskedLM" in caplog.text


def test_an_encoder_with_its_head_keeps_it(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    folder = save_checkpoint(transformers.BertForMaskedLM(config).eval(), tmp_path)
    model = load_folder(folder)
    assert model.config is not None
    assert model.config["architectures"] == ["BertForMaskedLM"]
    assert model.blocks[0] == "bert.encoder.layer.0"
    torch.testing.assert_close(outputs(model), expected(folder), rtol=0, atol=0)


SMALL = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("model", "settings", "loaded_as"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, "LlamaForCausalLM"),
        ("LlamaForCausalLM", {"tie_word_embeddings": False}, "LlamaForCausalLM"),
        ("GPT2LMHeadModel", {"bos_token_id": 1, "eos_token_id": 2}, "GPT2LMHeadModel"),
        ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2}, "T5ForConditionalGeneration"),
        ("BartForConditionalGeneration", {"d_model": 32}, "BartForConditionalGeneration"),
        ("BertModel", {}, "BertModel"),
        ("BertForMaskedLM", {}, "BertForMaskedLM"),
        ("BertForPreTraining", {}, "BertForMaskedLM"),  # as is said of BERT's own checkpoints, which hold both heads
        ("BertLMHeadModel", {"is_decoder": True}, "BertLMHeadModel"),
    ],
)
def test_without_architectures_the_weights_say_which_class_they_are_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, settings: dict[str, Any], loaded_as: str
) -> None:
    model_class = getattr(transformers, model)
    folder = save_checkpoint(model_class(model_class.config_class(**SMALL, **settings)).eval(), tmp_path)
    with caplog.at_level(logging.WARNING, "qconvert"):
        loaded = load_folder(configure(folder, "architectures"))
    assert type(loaded.module).__name__ == loaded_as
    assert loaded.config is not None
    assert loaded.config["architectures"] == [loaded_as]
    assert caplog.messages == [f"config.json names no architectures: the weights are those of {loaded_as}"]


def test_without_architectures_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL)
    folder = save_checkpoint(transformers.BertForTokenClassification(config).eval(), tmp_path)
    message = rejected(configure(folder, "architectures"), "QC-INPUT-011")
    assert message == "config.json names no architectures, and the weights are not those of BertModel or BertForMaskedLM"


def test_the_message_for_a_class_that_is_unknown_names_the_probable_one(tmp_path: Path) -> None:
    folder = configure(tiny_llama(tmp_path), architectures=["LLaMAForCausalLM"])
    with pytest.raises(InputError) as caught:
        load_folder(folder)
    assert "['LlamaForCausalLM']" in str(caught.value.hint)


# Tied weights


def with_head(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {"lm_head.weight": change(tensors["model.embed_tokens.weight"])}


def test_a_stored_copy_of_a_tied_weight_is_not_repeated(tmp_path: Path) -> None:
    model = load_folder(rewrite(tiny_llama(tmp_path), with_head(torch.clone)))
    assert model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in model.source.tensors


def test_a_copy_with_nan_is_still_a_copy(tmp_path: Path) -> None:
    nan = rewrite(
        tiny_llama(tmp_path), lambda tensors: tensors | {"model.embed_tokens.weight": torch.full((384, 64), torch.nan)}
    )
    assert load_folder(rewrite(nan, with_head(torch.clone))).tied != {}


def test_only_the_heads_copy_may_be_stored(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    before = outputs(load_folder(folder))
    rename = {"model.embed_tokens.weight": "lm_head.weight"}
    rewrite(folder, lambda tensors: {rename.get(name, name): value for name, value in tensors.items()})
    model = load_folder(folder)
    assert model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert torch.equal(outputs(model), before)


def test_weights_that_are_tied_by_name_only_are_kept_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = rewrite(tiny_llama(tmp_path), with_head(torch.neg))
    with caplog.at_level(logging.WARNING, "qconvert"):
        model = load_folder(folder)
    assert model.tied == {}
    assert model.config is not None
    assert model.config["tie_word_embeddings"] is False
    assert "kept apart" in caplog.text
    torch.testing.assert_close(outputs(model), expected(folder), rtol=0, atol=0)


def test_untied_weights_are_two_tensors(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tie=False)
    model = load_folder(folder)
    assert model.tied == {}
    assert "lm_head.weight" in model.source.tensors
    torch.testing.assert_close(outputs(model), expected(folder), rtol=0, atol=0)


# Fault 10: no code of the checkpoint


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Code that fails the test by leaving a file behind when it is imported."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    return tmp_path


AUTO_MAP = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}


def test_a_model_that_needs_code_of_the_checkpoint_is_refused(trap: Path) -> None:
    folder = configure(tiny_llama(trap), model_type="trap", auto_map=AUTO_MAP)
    message = rejected(folder, "QC-INPUT-012")
    assert "auto_map" in message
    assert "'trap'" in message
    assert not (trap / "sprung").exists()


def test_code_for_a_known_model_is_ignored_with_a_warning(trap: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = configure(
        tiny_llama(trap), auto_map=AUTO_MAP, _attn_implementation="someone/kernel", use_kernels=True, conv_kernel=3
    )
    with caplog.at_level(logging.WARNING, "qconvert"):
        model = load_folder(folder)
    assert type(model.module).__module__ == "transformers.models.llama.modeling_llama"
    assert model.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert "_attn_implementation, auto_map, use_kernels" in caplog.text
    assert model.config is not None
    assert not {"auto_map", "_attn_implementation", "use_kernels"} & model.config.keys()
    assert model.config["conv_kernel"] == 3  # a size, not code
    assert "trap.py" not in model.files
    assert not (trap / "sprung").exists()


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    folder = configure(tiny_llama(tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    message = rejected(folder, "QC-INPUT-013")
    assert "quantization_config" in message
    assert "'gptq'" in message


# Configurations that can't be used


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"model_type": "nonesuch"}, "'nonesuch' is unknown", id="unknown-type"),
        pytest.param({"model_type": None}, "None is unknown", id="no-type"),
        pytest.param({"architectures": ["os"]}, "['os']", id="not-a-class"),
        pytest.param({"architectures": ["BertModel"]}, "['BertModel']", id="class-of-another-type"),
        pytest.param({"architectures": "LlamaForCausalLM"}, "'LlamaForCausalLM'", id="text"),
        pytest.param({"hidden_size": "many"}, "hidden_size", id="text-for-a-number"),
        pytest.param({"hidden_size": -64}, "config.json can't be used", id="negative-size"),
        pytest.param({"vocab_size": 2**60}, "config.json can't be used", id="more-than-any-memory"),
    ],
)
def test_a_config_that_can_not_be_used_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    assert said in rejected(configure(tiny_llama(tmp_path), **settings), "QC-INPUT-011")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model_type": "bert", "model_type": "llama"}'], ids=["empty", "list", "key-twice"]
)
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "config.json").write_text(text)
    assert "config.json" in rejected(folder, "QC-INPUT-011")


@pytest.mark.parametrize(
    ("model", "settings", "found"),
    [
        ("T5Model", {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}, "encoder-decoder (sequence to sequence)"),
        ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 32, "num_layers": 0, "num_heads": 2}, "repeated blocks on both"),
        ("WhisperForConditionalGeneration", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "encoder-decoder"),
        (
            "Gemma3ForConditionalGeneration",
            {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}},
            "a model of image, text",
        ),
        ("ViTModel", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "pixel_values"),
        ("Wav2Vec2Model", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "input_values"),
        ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}, "recurrent"),
        (
            "MixtralForCausalLM",
            {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "mixture of experts (model.layers.0.mlp",
        ),
        (
            "Qwen2MoeForCausalLM",
            {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_experts": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
            "mixture of experts (model.layers.0.mlp",
        ),
    ],
)
def test_kinds_of_models_that_are_not_converted(tmp_path: Path, model: str, settings: dict[str, Any], found: str) -> None:
    config = getattr(transformers, model).config_class(vocab_size=64, architectures=[model], **settings)
    config.save_pretrained(tmp_path)
    from_config_alone = rejected(tmp_path, "QC-INPUT-014")
    save_tensors({"x": torch.ones(1)}, tmp_path)
    message = rejected(tmp_path, "QC-INPUT-014")
    assert message == from_config_alone
    assert model in message
    assert found in message
