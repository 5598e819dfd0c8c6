"""SINQ balances rows and columns, and pays where columns have outliers."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import pytest
import qconvert_sinq
import torch
import transformers
from qconvert_sinq import SINQQuantizer, balancing_columns, imbalance, normalized_rows
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers

import qconvert
from qconvert.plugin import Layer, LinearGroup, Producer, QuantScheme, round_to_nearest

SCHEME = QuantScheme.parse("int4-g32-asym")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(seed: int = 0) -> torch.Tensor:
    """[64, 128] with four columns that are 20 times as large as the others."""
    weight = random(64, 128, seed=seed)
    weight[:, [3, 40, 77, 101]] *= 20
    return weight


def prepared(*weights: torch.Tensor, producer: Producer | None = None) -> torch.Tensor | None:
    layers = tuple(Layer(f"layer{index}", "linear", weight) for index, weight in enumerate(weights))
    return SINQQuantizer().prepare(LinearGroup(layers, producer), (SCHEME,) * len(layers)).smoothing_scale


def relative_error(weight: torch.Tensor, scale: torch.Tensor | float) -> float:
    """Mean squared error over the mean square. Outlier columns hold most of both, and gain least."""
    restored = round_to_nearest(weight * scale, SCHEME).dequantize() / scale
    return float((restored - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize("seed", range(5))
def test_imbalance_goes_down_and_more_iterations_never_raise_it(seed: int) -> None:
    weight = with_outliers(seed) * random(64, 1, seed=seed + 100).exp()
    reached = [imbalance(normalized_rows(weight))]
    for iterations in range(1, 17):
        columns = balancing_columns(weight, torch.arange(128), iterations, 1e3)
        assert columns is not None
        reached.append(imbalance(normalized_rows(weight / columns)))
    assert reached[0] > 10
    assert reached[-1] < 1.01
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(reached))


def test_error_with_outlier_columns_is_a_third_less_than_of_rounding_to_nearest() -> None:
    weight = with_outliers()
    scale = prepared(weight)
    assert scale is not None
    assert relative_error(weight, scale) < 0.67 * relative_error(weight, 1.0)


def test_columns_beside_outliers_lose_a_tenth_of_what_rounding_to_nearest_loses_at_most() -> None:
    weight = with_outliers()
    scale = prepared(weight)
    assert scale is not None
    beside = weight.abs().amax(0) < 10

    def error(scale: torch.Tensor | float) -> float:
        return float((round_to_nearest(weight * scale, SCHEME).dequantize() / scale - weight)[:, beside].square().mean())

    assert int(beside.sum()) == 124
    assert error(scale) < 0.1 * error(1.0)


def test_scales_are_around_one_and_undo_the_outliers() -> None:
    scale = prepared(with_outliers())
    assert scale is not None
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-5)
    assert float(scale[3] / scale[4]) == pytest.approx(1 / 20, rel=0.5)


def test_the_size_of_rows_and_of_the_matrix_changes_no_scale() -> None:
    weight, rows = with_outliers(), torch.tensor([0.25, 4.0]).repeat(32)[:, None]
    scale, other = prepared(weight), prepared(weight * rows * 2.0**60)
    assert scale is not None
    assert other is not None
    torch.testing.assert_close(other, scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 32),
        torch.ones(4, 32),
        random(1, 32),
        random(32, 1),
        torch.cat([random(8, 31), torch.zeros(8, 1)], 1),
        torch.cat([random(7, 32), torch.zeros(1, 32)]),
        random(8, 32) * 1e38,
        random(8, 32) * 1e-38,
        random(8, 32) * torch.logspace(-30, 30, 32),
    ],
    ids=["zeros", "ones", "row", "column", "zero column", "zero row", "huge", "tiny", "all magnitudes"],
)
def test_scales_of_degenerate_weights_are_finite_and_positive(weight: torch.Tensor) -> None:
    scale = prepared(weight)
    assert scale is None or (float(scale.min()) * 1.001 >= 1e-3 and float(scale.max()) <= 1e3 * 1.001)  # false for NaN


def test_linears_with_a_common_input_get_one_scale_of_all_their_rows() -> None:
    first, second = with_outliers(1), random(32, 128, seed=2)
    scale, together = prepared(first, second), prepared(torch.cat([first, second]))
    assert scale is not None
    assert together is not None
    assert torch.equal(scale, together)


def test_copies_of_a_channel_get_one_scale() -> None:
    channels = tuple(index % 64 for index in range(128))
    scale = prepared(with_outliers(), producer=Producer("linear", "v", channels))
    assert scale is not None
    assert torch.equal(scale[:64], scale[64:])


@pytest.mark.parametrize("scheme", ["int8-channel-a8", "int8-tensor"])
def test_schemes_that_it_refuses(scheme: str) -> None:
    assert SINQQuantizer().refuses(QuantScheme.parse(scheme))
    assert SINQQuantizer().refuses(SCHEME) is None


@pytest.mark.parametrize("options", [{"iterations": -1}, {"bound": 0.5}, {"bound": float("nan")}])
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        SINQQuantizer(**options)  # type: ignore[arg-type]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qconvert finds the quantizer, whether or not the distribution is installed."""
    if any(entry_point.name == "sinq" for entry_point in entry_points(group="qconvert")):
        return
    info = tmp_path / "qconvert_sinq-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qconvert-sinq\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[qconvert]\nsinq = qconvert_sinq\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = [str(tmp_path), str(Path(qconvert_sinq.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))  # artifacts are verified in another process


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a Llama of one layer, random weights and a tokenizer of single bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("layout", ["transformers", "onnx"])
@pytest.mark.usefixtures("found")
def test_a_conversion_is_verified(tmp_path: Path, llama: Path, layout: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    settings = {"model": str(llama), "output": tmp_path / "out", "quantizer": "sinq", "layout": layout}
    data = {"source": str(text), "samples": 2, "length": 32}
    report = qconvert.convert(qconvert.Recipe.from_settings({**settings, "calibration": data, "evaluation": data}))
    assert report.passed
    assert report.quantizer == "sinq"
    assert report.scheme == "int4-g32-asym"
    assert all(parity.status == "passed" for parity in report.parity)
    # Scales that nothing proves to fold would be dropped, and rounding to nearest be left.
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        norm = file.get_tensor("model.layers.0.input_layernorm.weight")
    assert not torch.equal(norm, torch.ones_like(norm))
