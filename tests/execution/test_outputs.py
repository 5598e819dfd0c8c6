"""What a converted encoder gives is all that its class gives; outputs that would be lost are refused."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny_models import save_checkpoint
from transformers import PreTrainedModel

from qconvert import convert
from qconvert.cli import main
from qconvert.ir.artifact import GRAPH
from qconvert.recipe import Recipe

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
