"""Layers that run more than once: called twice, known by two names, or in calls that share their inputs with other layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrate_models import model_of
from tiny_models import VOCABULARY, save_checkpoint
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from qconvert.ir.layer import Producer
from qconvert.ir.model import Model
from qconvert.load import load
from qconvert.ort.session import file_session
from qconvert.pipeline.conversion import convert
from qconvert.recipe import Recipe
from qconvert.trace import trace

ROWS = 40
DATA = {"samples": 16, "length": 16}


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.linear(x))
        return x


def names() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A linear that runs three times, and a linear and a whole block that have two names each."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    return nn.Sequential(Loop(), linear, nn.ReLU(), linear, block, block, nn.Linear(64, 8)), (torch.randn(ROWS, 64),)


class Towers(nn.Module):
    """One encoder for questions and answers, which are of different length, and one convolution for both sides of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encode = nn.Embedding(40, 64), nn.Linear(64, 32)
        self.conv, self.out = nn.Conv2d(8, 32, 3, padding=1), nn.Linear(32, 2)

    def forward(self, question: Tensor, answer: Tensor, image: Tensor) -> Tensor:
        left, right = (self.encode(self.words(tokens).mean(1)) for tokens in (question, answer))
        seen = [self.conv(part).mean((2, 3)) for part in (image, image.flip(3) * 2)]
        return self.out(torch.relu(left - right) + seen[0] * seen[1])  # type: ignore[no-any-return]


def towers() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Towers(), (torch.randint(40, (ROWS, 6)), torch.randint(40, (ROWS, 9)), torch.randn(ROWS, 8, 6, 4))


class Crossing(nn.Module):
    """`both` reads what `first` reads, and later what `second` reads; `early` and `late` read the two outputs of `shared`.

    Channels differ in size, so that a quantizer wants to scale them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.both, self.first, self.second, self.shared, self.early, self.late = (nn.Linear(64, 64) for _ in range(6))
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(0.1, 3, 64))
            self.shared.weight.mul_(torch.linspace(0.1, 3, 64)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.norm(torch.tanh(self.both(x) + self.first(x)))
        x = torch.tanh(self.both(x) - self.second(x))
        x = torch.tanh(self.early(torch.relu(self.shared(x))))
        return self.late(torch.relu(self.shared(x)))  # type: ignore[no-any-return]


def crossing() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Crossing(), (torch.randn(ROWS, 64),)


def settings(source: str, output: Path, **more: Any) -> Recipe:
    return Recipe.from_settings({"model": source, "output": str(output), "calibration": DATA, "evaluation": DATA, **more})


def cosine(found: Any, expected: Tensor) -> float:
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    return float(torch.cosine_similarity(found.double().flatten(), expected.double().flatten(), 0))


@pytest.mark.parametrize("quantizer", ["absmax", "smoothquant"])
@pytest.mark.parametrize(
    ("factory", "layers"),
    [
        (names, ["0.linear", "1", "4.1", "4.3", "6"]),
        (towers, ["encode", "conv", "out"]),
        (crossing, ["both", "first", "second", "shared", "early", "late"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_module_with_layers_that_run_more_than_once(
    factory: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], layers: list[str], quantizer: str, tmp_path: Path, quick: None
) -> None:
    source = f"module:{__file__}:{factory.__name__}"
    scheme = "int8-channel" if quantizer == "absmax" else None
    report = convert(settings(source, tmp_path / "out", quantizer=quantizer, scheme=scheme, layout="onnx"))
    assert report.passed
    assert [layer.name for layer in report.layers] == layers
    module, inputs = factory()
    session = file_session(tmp_path / "out" / "model.onnx")
    feeds = {value.name: tensor[:5].numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = module.eval()(*(tensor[:5] for tensor in inputs))
    assert cosine(session.run(None, feeds)[0], expected) > 0.999


def albert(folder: Path) -> AlbertModel:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = AlbertModel(config).eval()
    save_checkpoint(model, folder, sentence_tokens=True)
    return model


def test_albert_which_runs_one_layer_many_times(tmp_path: Path, quick: None) -> None:
    plain = albert(tmp_path / "albert")
    report = convert(settings(str(tmp_path / "albert"), tmp_path / "out", quantizer="per-channel", scheme="int8-channel"))
    assert {part.target: part.status for part in report.parity} == dict.fromkeys(("cpu", "transformers", "float"), "passed")
    shared = [layer.name for layer in report.layers if layer.name.startswith("encoder.albert_layer_groups.")]
    assert len(shared) == 6
    session = file_session(tmp_path / "out" / "model.onnx")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    inputs["token_type_ids"] = torch.zeros(1, 4, dtype=torch.int64)
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    with torch.no_grad():
        assert cosine(found, plain(**inputs).last_hidden_state) > 0.999


def groups_of(model: Model) -> dict[tuple[str, ...], Producer | None]:
    return {group.layers: group.producer for group in trace(model).groups}


def test_linears_are_together_that_share_every_input(tmp_path: Path) -> None:
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    albert(tmp_path)
    found = groups_of(load(str(tmp_path), lambda source: None))
    together = tuple(f"{layer}.attention.{name}" for name in ("query", "key", "value"))
    assert found[together] is None  # of the embeddings first, then of the layer's own norm
    assert found[(f"{layer}.attention.dense",)] == Producer("linear", f"{layer}.attention.value")
    assert found[(f"{layer}.ffn",)] is None  # the residual reads the norm, too


def test_a_scale_moves_only_into_what_nobody_else_reads() -> None:
    module, (x,) = crossing()
    found = groups_of(model_of(module, example_inputs={"x": x}, input_names=("x",)))
    assert list(found) == [(name,) for name in ("both", "first", "second", "shared", "early", "late")]
    assert set(found.values()) == {None}
    module, (x,) = names()
    found = groups_of(model_of(module, example_inputs={"input": x}, input_names=("input",)))
    assert found[("4.1",)] == Producer("norm", "4.0")
    assert found[("4.3",)] == Producer("linear", "4.1")
