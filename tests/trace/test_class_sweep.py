"""Every class that transformers has for the documented model types gives all its outputs, or is refused with the reason.

The whole conversions of all of them are run by hand: tests/support/sweep_classes.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner
from sweep_classes import ARCHITECTURES, COSINE, label, save, sweep, torch_outputs, variants
from torch import Tensor
from transformers import CONFIG_MAPPING

from qconvert.cli import main
from qconvert.errors import InputError
from qconvert.load.hugging_face import load_folder
from qconvert.trace.check import reference
from qconvert.trace.opaque import representatives

pytestmark = pytest.mark.usefixtures("quiet")

# Pattern of a class and of what its config sets -> the outputs of its graph, or why there is none; the first that matches.
EXPECTED: dict[str, tuple[str, ...] | str] = {
    r"^(Bart|Marian|Pegasus)ForCausalLM$": "is the decoder of an encoder-decoder alone,",
    r" \(is_decoder, add_cross_attention\)$": "is the decoder of an encoder-decoder alone,",
    r"^(Bert|Roberta|Electra)(ForCausalLM|LMHeadModel)$": "but its attention sees later tokens",
    r"(ForCausalLM|LMHeadModel)( \(is_decoder\))?$|(ForConditionalGeneration|MTModel)$": ("logits",),
    r"^(Llama|Mistral|Qwen\d|Gemma\d|Phi|SmolLM3|Granite|Olmo2|GPTNeoX)": "rotates queries and keys",
    r"^(U?M?T5|Bart|Marian|Pegasus)(Model|ForQuestionAnswering|ForSequenceClassification)$": "is an encoder-decoder",
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


def outputs(folder: Path) -> Mapping[str, Tensor]:
    """What the graphs of a checkpoint would give, with one block of each kind."""
    model = load_folder(folder)
    return reference(model, list(dict.fromkeys(representatives(model).values())))[0]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_class_has_all_its_outputs_or_is_refused(model_type: str, tmp_path: Path) -> None:
    _, make, _ = ARCHITECTURES[model_type]
    assert type(make().config) is CONFIG_MAPPING[model_type]
    found = list(variants(model_type))
    assert any(each.__name__.endswith("Model") for each, _ in found)
    for each, settings in found:
        name = label(each, settings)
        expected = next(value for pattern, value in EXPECTED.items() if re.search(pattern, name))
        module = save(each, model_type, tmp_path / name, **settings)
        if isinstance(expected, tuple):
            given = outputs(tmp_path / name)
            assert tuple(given) == expected, name
            assert torch_outputs(module).keys() <= given.keys(), name
        else:
            with pytest.raises(InputError) as caught:
                outputs(tmp_path / name)
            assert caught.value.code == "QC-INPUT-014"
            assert each.__name__ in caught.value.message
            assert expected in caught.value.message, name


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "model_type", "settings"),
    [
        ("RobertaForCausalLM", "roberta", {"is_decoder": True}),  # its first position is not 0
        ("GPT2ForSequenceClassification", "gpt2", {}),
        ("T5ForTokenClassification", "t5", {}),
    ],
)
def test_a_converted_class_gives_what_it_gives_in_torch(
    name: str, model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    result = sweep(getattr(transformers, name), model_type, tmp_path, settings)
    assert (result.exit_code, result.message, result.missing) == (0, "", ())
    assert min(result.outputs.values()) > COSINE


@pytest.mark.parametrize(
    ("name", "model_type", "next_step"),
    [
        ("RobertaForCausalLM", "roberta", "set is_decoder to true if the model was trained to write text"),
        ("BartForCausalLM", "bart", "language models (decoders, encoder-decoders)"),
    ],
)
def test_the_command_says_what_to_do_with_a_class_that_it_refuses(
    name: str, model_type: str, next_step: str, tmp_path: Path
) -> None:
    save(getattr(transformers, name), model_type, tmp_path / "source")
    result = CliRunner().invoke(main, ["run", "--model", str(tmp_path / "source"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert f"next: {next_step}" in result.stderr
    assert not (tmp_path / "out").exists()
