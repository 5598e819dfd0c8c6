"""Every output of a model is in its graph, or the model is refused: for all classes of the documented architectures."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from architecture_models import DECODERS, ENCODER_DECODERS, ENCODERS
from click.testing import CliRunner
from tiny_models import save_checkpoint
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from qconvert import convert
from qconvert.cli import main
from qconvert.errors import InputError
from qconvert.ir.artifact import GRAPH
from qconvert.ir.outputs import named_outputs
from qconvert.load.skeleton import build_skeleton
from qconvert.recipe import Recipe

ARCHITECTURES = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}

# Pattern of a class -> the outputs of its graph, or why there is none. The first that matches counts.
EXPECTED: dict[str, tuple[str, ...] | str] = {
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|MTModel)$": ("logits",),
    r"^(Llama|Mistral|Qwen\d|Gemma\d|Phi|SmolLM3|Granite|Olmo2|GPTNeoX)": "rotates queries and keys",
    r"^(U?M?T5|Bart|Marian|Pegasus)(Model|ForQuestionAnswering|ForSequenceClassification)$": "an encoder-decoder",
    r"ForMultipleChoice$": "a row is several texts",
    r"ForQuestionAnswering$": "gives start_logits, end_logits,",
    r"^BertForPreTraining$": "gives prediction_logits, seq_relationship_logits,",
    r"^AlbertForPreTraining$": "gives prediction_logits, sop_logits,",
    r"^GPT2DoubleHeadsModel$": "gives mc_logits,",
    r"^(Albert|Bert|Roberta|MPNet)Model$": ("last_hidden_state", "pooler_output"),
    r"Model$": ("last_hidden_state",),
    r"For(MaskedLM|PreTraining|SequenceClassification|TokenClassification|NextSentencePrediction)$": (
        "last_hidden_state",
        "logits",
    ),
}


def classes(config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """All that transformers has for a kind of config."""
    modeling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    named = [getattr(modeling, name) for name in modeling.__all__ if not re.search("Pre[tT]rained", name)]
    return [each for each in named if issubclass(each, PreTrainedModel) and each.config_class is config_class]


def outputs(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[str, ...] | str:
    """The names of what the graph of a model gives, or the code and the reason of its refusal."""
    try:
        _, task = build_skeleton({**config.to_dict(), "architectures": [model_class.__name__]})
        ids = torch.arange(3, 12)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        others = {"decoder_input_ids": ids} if task == "seq2seq-lm" else {}
        return tuple(named_outputs(task, model_class(config).eval(), batch | others))
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_class_has_all_its_outputs_or_is_refused(model_type: str) -> None:
    _, make, _ = ARCHITECTURES[model_type]
    config = make().config
    assert type(config) is CONFIG_MAPPING[model_type]
    found = classes(type(config))
    assert any(each.__name__.endswith("Model") for each in found)
    for each in found:
        expected = next(value for pattern, value in EXPECTED.items() if re.search(pattern, each.__name__))
        given = outputs(each, config)
        if isinstance(expected, tuple):
            assert given == expected, each
        else:
            assert f"[QC-INPUT-014] {each.__name__} " in given
            assert expected in given, each


ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(model: str, folder: Path) -> PreTrainedModel:
    """A tiny model of that class, written to a folder with a tokenizer."""
    model_class = getattr(transformers, model)
    torch.manual_seed(0)
    module = model_class(model_class.config_class(vocab_size=384, pad_token_id=0, **ENCODER)).eval()
    save_checkpoint(module, folder, sentence_tokens=True)
    return module


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("BertModel", ["last_hidden_state", "pooler_output"]),
        ("DPRQuestionEncoder", ["last_hidden_state", "pooler_output"]),
        ("ElectraForPreTraining", ["last_hidden_state", "logits"]),  # one per token
        ("BertForNextSentencePrediction", ["last_hidden_state", "logits"]),  # one per row
    ],
)
def test_a_converted_encoder_gives_what_transformers_gives(tmp_path: Path, model: str, names: list[str]) -> None:
    module = saved(model, tmp_path / "source")
    data = {"source": "builtin", "samples": 2, "length": 24}
    settings = {"model": str(tmp_path / "source"), "output": str(tmp_path / "out"), "scheme": "int8-channel"}
    convert(Recipe.from_settings({**settings, "evaluation": data}))
    session = onnxruntime.InferenceSession(tmp_path / "out" / GRAPH)
    assert [value.name for value in session.get_outputs()] == names
    ids = torch.tensor([[1, 40, 50, 60, 70, 2], [1, 80, 90, 2, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    feeds = {value.name: inputs.get(value.name, torch.zeros_like(ids)).numpy() for value in session.get_inputs()}
    found = dict(zip(names, session.run(None, feeds), strict=True))
    with torch.no_grad():
        expected = {name: value for name, value in module(**inputs).items() if isinstance(value, torch.Tensor)}
    assert expected.keys() <= found.keys()
    for name, reference in expected.items():
        for row, length in enumerate((6, 4)):
            tokens = slice(length if reference.shape[1] == ids.shape[1] else None)
            cosine = torch.cosine_similarity(torch.from_numpy(found[name][row, tokens]), reference[row, tokens], dim=-1)
            assert cosine.min() > 0.999, name


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        ("RobertaForQuestionAnswering", "start_logits, end_logits"),
        ("BertForPreTraining", "prediction_logits, seq_relationship_logits"),
    ],
)
def test_the_command_refuses_outputs_that_would_be_lost(tmp_path: Path, model: str, lost: str) -> None:
    saved(model, tmp_path / "source")
    result = CliRunner().invoke(main, ["run", "--model", str(tmp_path / "source"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert f"{model} gives {lost}, which qconvert does not export" in result.stderr
    assert not (tmp_path / "out").exists()
