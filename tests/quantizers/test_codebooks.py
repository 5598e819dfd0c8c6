"""nf4: codes, scales and dequantized weights are those of bitsandbytes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qconvert.ir.double_quant import dynamic_map
from qconvert.ir.layer import Layer
from qconvert.ir.number_format import FP4, NF4
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import CODEBOOKS, QuantScheme
from qconvert.plugin.host import contract
from qconvert.quantizers.absmax import AbsMaxQuantizer
from qconvert.quantizers.nf4 import NF4Quantizer
from qconvert.storage import layout

SCHEMES = [f"{name}-g{size}{double}" for name in ("nf4", "fp4") for size in (32, 64, 128, 256) for double in ("", "-dq")]


def quantized(weight: Tensor, text: str = "nf4-g64") -> QuantizedTensor:
    return contract.quantize(NF4Quantizer(), Layer("layer", "linear", weight), QuantScheme.parse(text))


def packed(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What a file holds of it, by suffix."""
    out, width = tensor.q.shape
    return layout.encode(LayerPlan("layer", "linear", out, width, tensor.scheme), tensor)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
    some = normal(rows, columns, seed=rows)
    spread = some * 10 ** normal(rows, 1, seed=columns)
    yield from {
        "normal": some,
        "of many sizes": spread,
        "zeros": torch.zeros(rows, columns),
        "blocks of zeros": torch.cat((torch.zeros(rows, columns // 2), some[:, columns // 2 :]), 1),
        "one number": torch.full((rows, columns), -0.7),
        "on a grid, with middles of two numbers": (some * 8).round() / 8,
        "of a bfloat16 checkpoint": some.bfloat16().float(),
        "tiny": some * 1e-36,
        "subnormal": some * 1e-39,
        "hardly any": some * 1e-43,
        "large": some * 1e30,
    }.items()


class TestBitsandbytes:
    """The library itself, where it is installed."""

    @pytest.mark.parametrize("text", SCHEMES)
    @pytest.mark.parametrize("shape", [(1, 256), (7, 512), (96, 1024)])
    def test_codes_scales_and_weights_are_its_own(self, text: str, shape: tuple[int, int]) -> None:
        functional = pytest.importorskip("bitsandbytes").functional
        scheme = QuantScheme.parse(text)
        for kind, weight in weights(*shape):
            codes, state = functional.quantize_4bit(
                weight,
                blocksize=scheme.group_size(shape[1]),
                quant_type=scheme.format.name,
                compress_statistics=scheme.double_quant,
            )
            tensor = quantized(weight, text)
            found = packed(tensor)
            assert torch.equal(found["weight"], codes), kind
            for suffix, expected in state.as_dict(packed=True).items():
                if suffix.startswith("quant_state"):
                    assert bytes(found[f"weight.{suffix}"].tolist()).strip() == bytes(expected.tolist()), kind
                else:
                    assert torch.equal(found[f"weight.{suffix}"], expected), kind
            # As bits, for which a sum with 0 makes one of the two zeros.
            given = functional.dequantize_4bit(codes, state)
            assert torch.equal((tensor.dequantize() + 0.0).view(torch.int32), (given + 0.0).view(torch.int32)), kind

    def test_its_tables_are_ours(self) -> None:
        functional = pytest.importorskip("bitsandbytes").functional
        for each in CODEBOOKS:
            assert each.codebook is not None
            assert torch.equal(torch.tensor(each.codebook.values), functional.get_4bit_type(each.name, device="cpu"))
        assert torch.equal(dynamic_map(), functional.create_dynamic_map())

    def test_every_byte_stands_for_the_same_two_numbers(self) -> None:
        functional = pytest.importorskip("bitsandbytes").functional
        for each in CODEBOOKS:
            tensor = quantized(normal(4, 128), f"{each.name}-g64")
            plan, tensors = LayerPlan("layer", "linear", 4, 128, tensor.scheme), packed(tensor)
            tensors["weight"] = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
            _, state = functional.quantize_4bit(normal(4, 128), quant_type=each.name)
            assert torch.equal(layout.decode(plan, tensors).dequantize(), functional.dequantize_4bit(tensors["weight"], state))


# What bitsandbytes 0.50.2 gave on the CPU, so that it is tested where that is not installed.
ROW = torch.tensor(
    [
        [0.5, -0.25, 0.1, 0.0, -1.0, 0.75, 0.02, -0.03, 0.3, -0.6, 0.9, -0.9, 0.45, 0.15, -0.45, -0.15, *[0.0] * 16],
    ]
)  # fmt: skip
NUMBERS = {
    "nf4-g32": [196, 135, 14, 119, 178, 240, 201, 53] + [119] * 8,
    "fp4-g32": [95, 96, 178, 25, 74, 59, 86, 222] + [0] * 8,
}
RAMPS = torch.linspace(-1, 1, 64) * torch.tensor([[1.0], [0.5], [2.0], [0.1]])
RAMP_CODES = {
    "nf4": "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff",
    "fp4": "bbbbbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333",
}


class TestGolden:
    @pytest.mark.parametrize(("text", "expected"), NUMBERS.items())
    def test_bytes_of_a_row(self, text: str, expected: list[int]) -> None:
        found = packed(quantized(ROW, text))
        assert found["weight"].flatten().tolist() == expected
        assert found["weight.absmax"].tolist() == [1.0]

    @pytest.mark.parametrize(("name", "codes"), RAMP_CODES.items())
    def test_a_ramp_with_double_quantization(self, name: str, codes: str) -> None:
        tensor = quantized(RAMPS, f"{name}-g64-dq")
        found = packed(tensor)
        assert bytes(found["weight"].flatten().tolist()).hex() == codes * 4
        assert found["weight.absmax"].tolist() == [187, 45, 255, 19]
        assert found["weight.nested_absmax"].tolist() == [1.100000023841858]
        state = bytes(found[f"weight.quant_state.bitsandbytes__{name}"].tolist())
        assert state.strip().decode() == (
            f'{{"quant_type": "{name}", "blocksize": 64, "dtype": "float32", "shape": [4, 64], "nested_blocksize": 256, '
            '"nested_dtype": "float32", "nested_offset": 0.8999999761581421}'
        )
        first = [-0.9991718530654907, -0.5038281083106995, -2.0, -0.10164058208465576]
        assert tensor.dequantize()[:, 0].tolist() == first

    def test_the_middle_of_two_numbers_is_the_lower_one(self) -> None:
        numbers = torch.tensor(NF4.codebook.values if NF4.codebook else ())
        middles = (numbers[:-1] + numbers[1:]) / 2
        weight = torch.cat((middles, torch.ones(17))).unsqueeze(0)
        assert quantized(weight, "nf4-g32").q[0, :15].tolist() == list(range(15))

    def test_just_above_and_below_zero_fp4_has_two_codes_for_it(self) -> None:
        weight = torch.tensor([[1.0, 1e-6, -1e-6, 0.0, *[0.5] * 28]])
        assert quantized(weight, "fp4-g32").q[0, :4].tolist() == [3, 8, 0, 0]
        assert FP4.codebook is not None
        assert FP4.codebook.values[8] == FP4.codebook.values[0] == 0


class TestScales:
    def test_a_block_of_zeros_keeps_a_scale_of_zero(self) -> None:
        tensor = quantized(torch.cat((torch.zeros(2, 64), torch.ones(2, 64)), 1))
        assert tensor.scale.tolist() == [[0, 1], [0, 1]]
        assert tensor.dequantize()[:, :64].abs().max() == 0

    def test_double_quantization_survives_scales_whose_sum_overflows(self) -> None:
        weight = normal(8, 256).clamp(-3, 3) * 1e38
        error = (quantized(weight, "nf4-g64-dq").dequantize() - weight).abs().max()
        assert error < 0.2 * weight.abs().max()

    @pytest.mark.parametrize("text", ["nf4-g64", "nf4-g64-dq"])
    def test_what_is_stored_reads_back_bit_for_bit(self, text: str) -> None:
        tensor = quantized(normal(6, 192), text)
        plan, tensors = LayerPlan("layer", "linear", 6, 192, tensor.scheme), packed(tensor)
        assert {suffix: (each.dtype, tuple(each.shape)) for suffix, each in tensors.items()} == {
            suffix: (info.dtype, info.shape) for suffix, info in plan.disk_tensors.items()
        }
        whole, some = layout.decode(plan, tensors), layout.decode(plan, tensors, slice(2, 4))
        assert torch.equal(whole.q, tensor.q)
        assert torch.equal(whole.scale, tensor.scale)
        assert torch.equal(some.dequantize(), tensor.dequantize()[2:4])

    @pytest.mark.parametrize("offset", [0.0, 1e-38, 0.8999999761581421, 3.4028234663852886e38])
    def test_the_state_is_as_long_as_the_plan_says_whatever_the_offset(self, offset: float) -> None:
        tensor = quantized(torch.full((1, 64), offset), "nf4-g64-dq")
        plan, name = LayerPlan("layer", "linear", 1, 64, tensor.scheme), "weight.quant_state.bitsandbytes__nf4"
        state = packed(tensor)[name]
        assert tuple(state.shape) == plan.disk_tensors[name].shape
        assert len(state) % 8 == 0
        assert torch.equal(layout.decode(plan, packed(tensor)).scale, tensor.scale)


class TestWhoMakesThem:
    def test_quantizers_of_integers_are_never_asked(self) -> None:
        reason = contract.refuses(AbsMaxQuantizer(), QuantScheme.parse("nf4-g64"))
        assert reason == "its codes are integers; the quantizer nf4 makes nf4"

    def test_it_rounds_to_integers_where_a_rule_says_so_but_quantizes_no_activations(self) -> None:
        assert NF4Quantizer().refuses(QuantScheme.parse("int4-g32")) is None
        assert "leave out -a8" in str(NF4Quantizer().refuses(QuantScheme.parse("int8-channel-a8")))
