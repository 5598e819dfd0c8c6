"""The contract of a quantizer (fault 20): what it raises, changes or returns wrongly is named before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from qconvert.errors import PluginError, QConvertError, UsageError
from qconvert.ir.layer import CalibrationStats, Layer, LinearGroup
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import Quantizer, round_to_nearest


@dataclass(frozen=True)
class Nearest(Quantizer):
    name: ClassVar[str] = "nearest"
    default_scheme: ClassVar[QuantScheme] = QuantScheme.parse("int8")
    has_outliers: ClassVar[bool] = True

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        return round_to_nearest(layer.weight, scheme)


def layer() -> Layer:
    weight = torch.linspace(1, -1, 4 * 32).reshape(4, 32)
    stats = CalibrationStats(8, {"absmax": torch.ones(32)})
    return Layer("blocks.0.fc", "linear", weight, torch.zeros(4), stats)


class NeverOutliers(Nearest):
    has_outliers = False


def test_outliers_must_be_declared() -> None:
    tensor = round_to_nearest(layer().weight, QuantScheme.parse("int8"))
    outlying = replace(tensor, outliers=Outliers(torch.tensor([3]), torch.zeros(4, 1)))
    with pytest.raises(PluginError, match="does not declare has_outliers"):
        contract.checked(outlying, layer(), QuantScheme.parse("int8"), NeverOutliers())


@pytest.mark.parametrize("scheme", ["int8-tensor", "int8-channel-asym", "int4-g16", "int4-g32-asym", "int8-channel-a8"])
def test_an_honest_quantizer_passes_unchanged(scheme: str) -> None:
    tensor = round_to_nearest(layer().weight, QuantScheme.parse(scheme))
    outliers = Outliers(torch.tensor([3, 7]), torch.zeros(4, 2))
    for honest in (tensor, replace(tensor, outliers=outliers, smoothing_scale=torch.ones(32))):
        assert contract.checked(honest, layer(), QuantScheme.parse(scheme), Nearest()) is honest


def test_scales_keep_to_the_bits_that_the_model_has_room_for() -> None:
    """A quantizer that has a scheme of its own makes scales as for any model: too fine, or right by chance."""

    class Own(Nearest):
        def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
            return round_to_nearest(layer.weight, QuantScheme.parse(str(scheme)))

    asked = replace(QuantScheme.parse("int8-channel"), scale_bits=8)
    with pytest.raises(PluginError, match=r"scale is not rounded .* apply qconvert\.plugin\.affine\.round_scale"):
        contract.quantize(Own(), replace(layer(), weight=layer().weight / 3), asked)
    coarse = replace(layer(), weight=torch.ones(4, 32) * 127 / 128)
    assert contract.quantize(Own(), coarse, asked).scheme.scale_bits == 8


def outliers(columns: list[int], weight: torch.Tensor) -> dict[str, object]:
    return {"outliers": Outliers(torch.tensor(columns), weight)}


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("int8", lambda t: {"q": t.q.int()}, "q is torch.int32 [4, 32], expected torch.int8 [4, 32]"),
        ("int8", lambda t: {"q": t.q.T.contiguous()}, "q is torch.int8 [32, 4], expected torch.int8 [4, 32]"),
        ("int4", lambda t: {"q": t.q - 1}, "q holds -9..-1, outside -8..7"),
        ("int8", lambda t: {"scale": t.scale.half()}, "scale is torch.float16 [4, 1], expected torch.float32 [4, 1]"),
        ("int4-g16", lambda t: {"scale": t.scale[:, :1]}, "scale is torch.float32 [4, 1], expected torch.float32 [4, 2]"),
        (
            "int8",
            lambda t: {"scale": torch.tensor([[1], [0], [1], [torch.nan]])},
            "2 scales are zero or not finite, the first in row 1",
        ),
        ("int4-g32", lambda t: {"scale": t.scale * 1.0001}, "scale is not rounded to what is stored"),
        ("int8", lambda t: {"zero_point": torch.zeros(4, 1, dtype=torch.int8)}, "int8-channel is symmetric"),
        ("int8-asym", lambda t: {"zero_point": None}, "int8-channel-asym is asymmetric, but it returned no zero_point"),
        (
            "int8-asym",
            lambda t: {"zero_point": t.zero_point.float()},
            "zero_point is torch.float32 [4, 1], expected torch.int8",
        ),
        ("int4-asym", lambda t: {"zero_point": t.zero_point * 0 + 8}, "zero_point holds 8..8, outside -8..7"),
        ("int8", lambda t: {"scheme": QuantScheme.parse("int4")}, "asked for int8-channel, it quantized to int4-channel"),
        (
            "int8",
            lambda t: {"smoothing_scale": torch.ones(4)},
            "smoothing_scale is torch.float32 [4], expected torch.float32 [32]",
        ),
        ("int8", lambda t: {"smoothing_scale": torch.zeros(32)}, "smoothing_scale is not finite and positive"),
        ("int8", lambda t: outliers([7, 3], torch.zeros(4, 2)), "outliers.columns are not sorted and unique: [7, 3]"),
        ("int8", lambda t: outliers([3, 3], torch.zeros(4, 2)), "outliers.columns are not sorted and unique: [3, 3]"),
        ("int8", lambda t: outliers([3, 32], torch.zeros(4, 2)), "outliers.columns holds 3..32, outside 0..31"),
        (
            "int8",
            lambda t: outliers([3], torch.zeros(1, 4)),
            "outliers.weight is torch.float32 [1, 4], expected torch.float32 [4",
        ),
        ("int8", lambda t: outliers([3], torch.full((4, 1), torch.inf)), "outliers.weight is not finite"),
    ],
)
def test_a_wrong_tensor_is_refused_before_anything_is_written(
    scheme: str, change: Callable[[QuantizedTensor], dict[str, Any]], words: str
) -> None:
    asked = QuantScheme.parse(scheme)
    tensor = round_to_nearest(layer().weight, asked)
    with pytest.raises(PluginError) as raised:
        contract.checked(replace(tensor, **change(tensor)), layer(), asked, Nearest())
    assert raised.value.code == "QC-PLUGIN-008"
    assert (
        "quantizer 'nearest' of test_plugin_contract (no version) broke its contract at 'blocks.0.fc'" in raised.value.message
    )
    assert words in raised.value.message


SCHEMES = (QuantScheme.parse("int8"),)


def returning(result: Callable[[Layer], Any]) -> Quantizer:
    @dataclass(frozen=True)
    class Returning(Nearest):
        def quantize(self, layer: Layer, scheme: QuantScheme) -> Any:
            return result(layer)

        def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> Any:
            return result(group.layers[0])

    return Returning()


def both(quantizer: Quantizer) -> Iterator[QConvertError]:
    """The errors of `prepare` and of `quantize`."""
    with pytest.raises(QConvertError) as prepared:
        contract.prepare(quantizer, LinearGroup((layer(),), stats=layer().stats), SCHEMES)
    with pytest.raises(QConvertError) as quantized:
        contract.quantize(quantizer, layer(), QuantScheme.parse("int8"))
    yield from (prepared.value, quantized.value)


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(1)], ids=repr)
def test_what_a_quantizer_raises_names_plugin_and_layer(error: BaseException) -> None:
    """Fault 18."""

    def raises(layer: Layer) -> None:
        raise error

    for raised, method in zip(both(returning(raises)), ("prepare", "quantize"), strict=True):
        assert isinstance(raised, PluginError)
        assert raised.code == "QC-PLUGIN-007"
        expected = (
            f"quantizer 'nearest' of test_plugin_contract (no version) failed to {method} 'blocks.0.fc': {type(error).__name__}"
        )
        assert raised.message.startswith(expected)


def test_an_error_of_ours_passes_through_a_quantizer() -> None:
    def raises(layer: Layer) -> None:
        raise UsageError("QC-KMEANS-001", "too few rows", hint="more data")

    assert [raised.code for raised in both(returning(raises))] == ["QC-KMEANS-001"] * 2


def test_what_is_no_record_at_all_is_refused() -> None:
    assert ["returned NoneType" in raised.message for raised in both(returning(lambda layer: None))] == [True, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.numpy().sort(),
        lambda layer: layer.bias.add_(1),
        lambda layer: layer.stats.values["absmax"].fill_(3),
    ],
    ids=["weight", "weight-through-numpy", "bias", "statistics"],
)
def test_a_quantizer_that_changes_its_input_is_refused(change: Callable[[Layer], Any]) -> None:
    for raised in both(returning(lambda layer: change(replace(layer)))):
        assert raised.code == "QC-PLUGIN-008"
        assert "changed its input in place" in raised.message


def test_prepare_may_set_an_smoothing_scale_and_nothing_else() -> None:
    class Scaling(Nearest):
        change: ClassVar[dict[str, Any]]

        def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
            return replace(group, **self.change)

    group = LinearGroup((layer(),))
    Scaling.change = {"smoothing_scale": torch.full((32,), 2.0)}
    assert contract.prepare(Scaling(), group, SCHEMES).smoothing_scale is Scaling.change["smoothing_scale"]
    for change, words in (
        ({"smoothing_scale": -torch.ones(32)}, "smoothing_scale is not finite and positive"),
        ({"layers": (layer(),)}, "returned other layers or weights"),
        ({"layers": ()}, "returned other layers or weights"),
    ):
        Scaling.change = change
        with pytest.raises(PluginError, match=words):
            contract.prepare(Scaling(), group, SCHEMES)
