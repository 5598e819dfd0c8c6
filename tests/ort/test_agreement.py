"""What counts when a graph is compared with torch: every output, every row, padded on either side, no padding itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calibrate_models import bert, llama, t5
from tiny_models import tiny_bert
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from qconvert.execution import probes
from qconvert.execution.outputs import graph_outputs
from qconvert.ir.model import Model
from qconvert.ir.task import ENCODER, MODULE
from qconvert.load import load
from qconvert.ort import compare


@dataclass
class Session:
    """Stands for an ONNX Runtime session: computes its outputs with `forward`."""

    forward: Callable[[dict[str, np.ndarray[Any, Any]]], list[Tensor]]

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, names: None, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [output.numpy() for output in self.forward(inputs)]


class TwoHeads(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": x.sum(-1), "double": 2 * x}


def test_every_output_of_a_module_counts() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    model = Model("two", "module", TwoHeads(), source=None, example_inputs={"x": rows})  # type: ignore[arg-type]
    expected = [graph_outputs(MODULE, model.module, batch) for batch in probes.probes(model)]
    sound = Session(lambda inputs: [rows.sum(-1), 2 * rows])
    assert compare.relative_error(model, sound, expected) == 0
    wrong = Session(lambda inputs: [rows.sum(-1), 2 * rows + torch.tensor([0.0, 0.0, 1.0])])
    assert compare.relative_error(model, wrong, expected) == pytest.approx(0.1)


def test_the_logits_of_a_classifier_count(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    classifier = BertForSequenceClassification(config).eval()
    model = replace(load(str(tiny_bert(tmp_path / "bert")), lambda source: None), module=classifier)
    expected = [graph_outputs(ENCODER, classifier, batch) for batch in probes.probes(model)]
    assert [len(outputs) for outputs in expected] == [2, 2, 2]

    def forward(inputs: dict[str, np.ndarray[Any, Any]], off: float) -> list[Tensor]:
        hidden, logits = graph_outputs(ENCODER, classifier, {key: torch.from_numpy(x) for key, x in inputs.items()})
        return [hidden, logits + off]

    assert compare.relative_error(model, Session(lambda inputs: forward(inputs, 0)), expected) < 1e-5
    assert compare.relative_error(model, Session(lambda inputs: forward(inputs, 1.0)), expected) > 0.1


class Remembering:
    """Stands for the sessions of an encoder-decoder: its caches are the tokens that were read, its logits count them."""

    def __init__(self, off: Callable[[int], float]) -> None:
        self.off = off
        self.seen: list[tuple[int, int]] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="past_key_values.0.key", shape=("batch", 1, "past", 1), type="tensor(float)")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in ("logits", "present.0.key", "cross_key_values.0.key")]

    def run(self, names: None, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        source = inputs["cross_key_values.0.key"] if "input_ids" not in inputs else inputs["input_ids"].astype(np.float32)
        past, new = inputs["past_key_values.0.key"], inputs["decoder_input_ids"].astype(np.float32)
        past = past if isinstance(past, np.ndarray) else past.numpy()  # the empty cache is an OrtValue
        self.seen.append((past.shape[2], new.shape[1]))
        read = np.concatenate((past, new[:, None, :, None]), 2)
        whole = totals(
            torch.from_numpy(source) * torch.from_numpy(inputs["attention_mask"]), torch.from_numpy(read[:, 0, :, 0])
        )
        return [whole[:, past.shape[2] :].numpy() + self.off(past.shape[2]), read, source]


def totals(source: Tensor, tokens: Tensor) -> Tensor:
    """Logits [rows, tokens, 1]: the sum of the source and of all tokens up to this one."""
    return (source.sum(1, keepdim=True) + tokens.cumsum(1))[..., None].float()


def test_every_step_of_an_encoder_decoder_counts() -> None:
    model = t5()[1]
    expected = [(totals(batch["input_ids"], batch["decoder_input_ids"]),) for batch in probes.probes(model)]
    sound = Remembering(lambda past: 0)
    assert compare.relative_error(model, sound, expected) == 0
    # Each step with the source padded on the right, and on the left.
    assert sound.seen == [step for step in [(0, 25), (25, 1), (26, 4)] for _ in ("right", "left")]
    largest = max(float(logits.max()) for (logits,) in expected)
    for step in (0, 25, 26):
        wrong = Remembering(lambda past, step=step: 0.1 * largest if past == step else 0)  # type: ignore[misc]
        assert compare.relative_error(model, wrong, expected) > 0.05


# --- padding ---

FIRST, LAST = 0, -1  # the column of a batch where padding on the left, or on the right, is seen


@pytest.mark.parametrize("column", [FIRST, LAST])
def test_an_encoder_that_is_wrong_about_padding_on_one_side_is_found(column: int) -> None:
    plain, model = bert()
    expected = [graph_outputs(ENCODER, plain, batch) for batch in probes.probes(model)]

    def forward(inputs: dict[str, np.ndarray[Any, Any]], off: float) -> list[Tensor]:
        hidden, *others = graph_outputs(ENCODER, plain, {key: torch.from_numpy(x) for key, x in inputs.items()})
        return [hidden + off * torch.from_numpy(inputs["attention_mask"][:, column] == 0)[:, None, None], *others]

    assert compare.relative_error(model, Session(lambda inputs: forward(inputs, 0)), expected) < 1e-5
    assert compare.relative_error(model, Session(lambda inputs: forward(inputs, 1.0)), expected) > 0.1


class Adding:
    """Stands for the session of a decoder: its cache is what was read, its logits add it up, padding left out.

    off: what is added to the logits where the attention mask is 0 in `column`.
    """

    def __init__(self, column: int, off: float) -> None:
        self.column, self.off = column, off

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="past_key_values.0.key", shape=("batch", 1, "past", 1), type="tensor(float)")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in ("logits", "present.0.key")]

    def run(self, names: None, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        past, new, mask = inputs["past_key_values.0.key"], inputs["input_ids"], inputs["attention_mask"]
        past = past if isinstance(past, np.ndarray) else past.numpy()
        read = np.concatenate((past, new[:, None, :, None].astype(np.float32)), 2)
        logits = (read[:, 0, :, 0] * mask).cumsum(1)[:, past.shape[2] :, None]
        return [logits + self.off * (mask[:, self.column] == 0)[:, None, None], read]


@pytest.mark.parametrize("column", [FIRST, LAST])
def test_a_decoder_that_is_wrong_about_padding_on_one_side_is_found(column: int) -> None:
    model = llama()[1]
    expected = [(batch["input_ids"].cumsum(1)[..., None].float(),) for batch in probes.probes(model)]
    assert compare.relative_error(model, Adding(column, off=0), expected) == 0
    largest = max(float(logits.max()) for (logits,) in expected)
    assert compare.relative_error(model, Adding(column, off=0.1 * largest), expected) > 0.05


def test_what_is_not_finite_or_of_another_shape_is_infinitely_wrong() -> None:
    one = np.ones((2, 3), np.float32)
    assert compare.largest_difference(one, one) == 0
    for other in (np.full_like(one, np.nan), np.full_like(one, np.inf), np.ones((3, 2), np.float32)):
        assert compare.largest_difference(other, one) == np.inf
        assert compare.largest_difference(one, other) == np.inf
