"""The card of a folder: the programs that it shows are run as they stand, and what it says of other tools is what they do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, save_checkpoint, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn

from qconvert.ir.artifact import CARD
from qconvert.ir.report import Latency, Report, Trial
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe
from qconvert.report.card import card

pytestmark = pytest.mark.usefixtures("quick", "quiet")

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def encoder(name: str) -> Callable[[Path], Path]:
    """What saves an encoder of that class of transformers to a folder."""

    def save(folder: Path) -> Path:
        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        config = model_class.config_class(vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=256, **SMALL)
        return save_checkpoint(model_class(config).eval(), folder, sentence_tokens=True)

    return save


# Kind of model -> (what saves one, the name that the card imports from transformers).
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "encoder": (tiny_bert, "AutoModel"),
    "masked language model": (encoder("BertForMaskedLM"), "AutoModelForMaskedLM"),
    "sequence classifier": (encoder("RobertaForSequenceClassification"), "AutoModelForSequenceClassification"),
    "token classifier": (encoder("ElectraForTokenClassification"), "AutoModelForTokenClassification"),
    "encoder without an auto class": (encoder("ElectraForPreTraining"), "ElectraForPreTraining"),
    "decoder": (tiny_llama, "AutoModelForCausalLM"),
    "encoder-decoder": (tiny_t5, "AutoModelForSeq2SeqLM"),
}


def converted(source: Path | str, output: Path, **settings: Any) -> Report:
    data = {"samples": 2, "length": 16}
    given = {"model": str(source), "output": str(output), "calibration": data, "evaluation": data}
    return convert(Recipe.from_settings({**given, "scheme": "int8-channel-a8", "verify": False, **settings}))


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def ran(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a program has defined in the end, started in `folder`."""
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(program, names)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_both_programs_give_what_the_whole_model_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, name = KINDS[kind]
    converted(save(tmp_path / "source"), tmp_path / "out")
    in_onnx_runtime, in_transformers = programs((tmp_path / "out" / CARD).read_text(encoding="utf-8"))
    capsys.readouterr()
    found = ran(in_onnx_runtime, tmp_path / "out", monkeypatch)
    printed = capsys.readouterr().out.strip("\n")
    model = ran(in_transformers, tmp_path / "out", monkeypatch)["model"].eval()
    assert f"import {name}\n" in in_transformers
    (own,) = json.loads((tmp_path / "source" / "config.json").read_text())["architectures"]
    assert type(model).__name__ == own  # with its head
    assert sum(parameter.nbytes for parameter in model.parameters()) == source_bytes(own, tmp_path / "source")
    with torch.no_grad():
        if "tokens" in found:
            tokens = {each: torch.as_tensor(value) for each, value in found["tokens"].items()}
            expected = model(**tokens, output_hidden_states=True).hidden_states[-1]
            found_states = torch.from_numpy(found["states"])
            kept = tokens["attention_mask"].bool()
            assert printed == str(tuple(expected.shape))
            assert torch.cosine_similarity(found_states[kept].flatten(), expected[kept].flatten(), 0) > 0.99
        else:
            ids = {"input_ids": torch.from_numpy(found["ids"])}
            if "encoder" in found:
                ids["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
            expected = model(**ids).logits
            assert printed == found["tokenizer"].decode([int(expected[0, -1].argmax())])
            assert torch.cosine_similarity(torch.from_numpy(found["logits"]).flatten(), expected.flatten(), 0) > 0.99


def source_bytes(model_class: str, folder: Path) -> int:
    source = getattr(transformers, model_class).from_pretrained(folder)
    return sum(parameter.nbytes for parameter in source.parameters())


FACTORY = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)), torch.randn(8, 64)
"""


def test_a_module_is_run_and_transformers_is_not_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    converted(f"module:{tmp_path / 'net.py'}:make", tmp_path / "out")
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    (program,) = programs(text)
    capsys.readouterr()
    ran(program, tmp_path / "out", monkeypatch)
    assert capsys.readouterr().out == "[(1, 8)]\n"
    assert "transformers" not in text


def test_the_settings_that_were_measured_best_are_those_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = converted(tiny_bert(tmp_path / "source"), tmp_path / "out")
    trials = (Trial(threads=1, spinning=True, ms=2.0), Trial(threads=2, spinning=False, ms=1.0))
    best = Latency(target="cpu", status="passed", threads=2, spinning=False, trials=trials)
    text = card(report.model_copy(update={"latency": (best,)}), Recipe(model="m", output=tmp_path / "out"), "m")
    run, settings, _ = programs(text)
    options = ran(f"import onnxruntime as ort\n{settings}", tmp_path / "out", monkeypatch)["options"]
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    with_options = run.replace('"model.onnx", ', '"model.onnx", options, ')
    assert with_options != run
    ran(f"import onnxruntime as ort\n{settings}\n{with_options}", tmp_path / "out", monkeypatch)


# --- what transformers does ---

AT_ONCE = "There its weights are dequantized: it has float's size and speed."
LATE = "There its weights are dequantized, when the model is first called: it has float's size and speed."
ROUNDED = f"{LATE} Layers whose scheme ends in -a8 round their activations there, too."


@pytest.mark.parametrize(
    ("quantizer", "scheme", "rules", "words"),
    [
        ("per-channel", "int8-channel-a8", {}, AT_ONCE),
        ("absmax", "int8-tensor-a8", {"*.query": "int8-channel-a8"}, AT_ONCE),
        ("per-channel", "int4-g32-asym", {}, AT_ONCE),
        ("per-channel", "int8-g32", {}, LATE),
        ("per-channel", "int4-g32", {"*.query": "int8-channel"}, LATE),
        ("per-channel", "int4-g32", {"*.query": "int8-channel-a8"}, ROUNDED),
    ],
    ids=["one scheme", "one in the layout", "zero points", "int8-g32", "mixed", "mixed with activations"],
)
def test_it_says_when_weights_are_dequantized_and_what_else_is_rounded(
    quantizer: str, scheme: str, rules: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [{"pattern": pattern, "scheme": other} for pattern, other in rules.items()]
    converted(tiny_bert(tmp_path / "source"), tmp_path / "out", quantizer=quantizer, scheme=scheme, rules=listed)
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert f"\n\n{words}\n\n" in text
    model = ran(programs(text)[-1], tmp_path / "out", monkeypatch)["model"]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(is_float(layer) for layer in layers) is (words == AT_ONCE)
    model(torch.tensor([[5, 6, 7]]))
    assert all(is_float(layer) for layer in layers)
    schemes = [getattr(layer, "quantization_scheme", None) for layer in layers]
    assert any(each is not None and each.input_activations is not None for each in schemes) is (words == ROUNDED)


def is_float(layer: nn.Linear) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert], ids=["GPT-2", "BERT"])
def test_a_folder_of_the_onnx_layout_is_refused_by_transformers_as_the_card_says(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    converted(make(tmp_path / "source"), tmp_path / "out", scheme="int8-channel", layout="onnx")
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert "Not possible: it was made with `--layout onnx`" in text
    assert len(programs(text)) == 1
    with pytest.raises(ValueError, match="load the onnx files instead"):
        transformers.AutoModel.from_pretrained(tmp_path / "out")
