"""QuantScheme: how numbers are stored, and its text form ("int4-g32-asym"); Cast: that they stay floats."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qconvert.errors import UsageError
from qconvert.ir.number_format import FORMATS, GROUP_SIZES, INT8, NumberFormat
from qconvert.vocabulary import HalfType

if TYPE_CHECKING:
    import torch

    from qconvert.ir.codebook import Codebook


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for a whole weight. weight [out, in] -> scale [1, 1]."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output channel. weight [out, in] -> scale [out, 1]."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per `group_size` consecutive inputs. weight [out, in] -> scale [out, in / group_size]."""

    group_size: int


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True, slots=True)
class Activations:
    """The way in which the input of a layer is quantized.

    dynamic: whether its scales are computed at run time; else they come from calibration.
    granularity: "token" for one scale per row, "tensor" for one for all.
    symmetric: whether the code of 0 is the middle one.
    """

    bits: int = 8
    dynamic: bool = True
    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = True

    def __str__(self) -> str:
        static = "" if self.dynamic else "-static-sym" if self.symmetric else "-static"
        return f"a{self.bits}{static}"

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return int(2**self.bits)


# The field's word for it: dynamic per-token int8.
DYNAMIC_INT8 = Activations()

# What compressed-tensors and vLLM call some schemes.
ALIASES = {
    "W4A16": "int4-g128",
    "W4A16_ASYM": "int4-g128-asym",
    "W8A16": "int8-channel",
    "W8A8": "int8-channel-a8",
}

INTEGERS = tuple(each for each in FORMATS.values() if each.codebook is None)
CODEBOOKS = tuple(each for each in FORMATS.values() if each.codebook is not None)

_INTEGERS = re.compile(
    rf"(?P<format>{'|'.join(each.name for each in INTEGERS)})"
    r"(?:-(?P<granularity>tensor|channel|g(?P<group>[0-9]+)))?(?P<asym>-asym)?"
    r"(?:-a(?P<static>4|8|16)-static(?P<sym>-sym)?|(?P<a8>-a8))?"
)
_CODEBOOKS = re.compile(rf"(?P<format>{'|'.join(each.name for each in CODEBOOKS)})(?:-g(?P<group>[0-9]+))?(?P<double>-dq)?")


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """The number format of one quantized weight.

    bits: of the weight; with `family` they name its number format (ir/number_format.py).
    symmetric: no zero point.
    activations: how a layer's input is quantized, None for float activations.
    scale_bits: significant bits of a scale at most: loaders hold scales in the dtype of the model (Model.scale_bits). No
        part of the text, because the plan sets it, and not compared.
    family: what its codes are: "int" for integers, "nf" and "fp" for places in the codebooks of bitsandbytes.
    double_quant: whether the scales of a codebook are quantized in their turn (ir/double_quant.py).
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    activations: Activations | None = None
    scale_bits: int = field(default=24, compare=False)
    family: str = "int"
    double_quant: bool = False

    @staticmethod
    def parse(text: str) -> QuantScheme:
        """Parse what `str` gives; without a granularity, per channel is meant, and of codebooks groups of their default size.

        Raises UsageError QC-SCHEME-001 for a text that is no scheme.
        """
        plain = ALIASES.get(text.upper(), text)
        match = _INTEGERS.fullmatch(plain) or _CODEBOOKS.fullmatch(plain)
        if match is None or (match["group"] and int(match["group"]) not in FORMATS[match["format"]].group_sizes):
            raise _no_scheme(text)
        if match.re is _CODEBOOKS:
            return _with_codebook(FORMATS[match["format"]], match["group"], double_quant=bool(match["double"]))
        granularity: Granularity = PerChannel()
        if match["granularity"] == "tensor":
            granularity = PerTensor()
        elif match["group"]:
            granularity = PerGroup(int(match["group"]))
        activations = DYNAMIC_INT8 if match["a8"] else None
        if match["static"]:
            activations = Activations(int(match["static"]), dynamic=False, granularity="tensor", symmetric=bool(match["sym"]))
        return QuantScheme(FORMATS[match["format"]].bits, not match["asym"], granularity, activations)

    def __str__(self) -> str:
        match self.granularity:
            case PerTensor():
                granularity = "tensor"
            case PerChannel():
                granularity = "channel"
            case PerGroup(group_size):
                granularity = f"g{group_size}"
        asym = "" if self.symmetric else "-asym"
        double = "-dq" if self.double_quant else ""
        return f"{self.family}{self.bits}-{granularity}{asym}{f'-{self.activations}' if self.activations else ''}{double}"

    @property
    def format(self) -> NumberFormat:
        """The number format, which says how codes are made and packed."""
        return FORMATS[f"{self.family}{self.bits}"]

    @property
    def codebook(self) -> Codebook | None:
        """The numbers that its codes stand for; None where a code is itself the number."""
        return self.format.codebook

    @property
    def joins_rows(self) -> bool:
        """Whether what is made of a row depends on the other rows: by one scale for all, or one offset of all scales."""
        return isinstance(self.granularity, PerTensor) or self.double_quant

    @property
    def has_kernel(self) -> bool:
        """Whether there is a graph for the scheme: int8 weights with quantized activations need a scale per tensor or channel,
        and with static ones no zero points; int4 weights go with static ones alone, and are multiplied in float then.
        """
        if self.activations is None:
            return True
        if self.format is INT8:
            return not isinstance(self.granularity, PerGroup) and (self.symmetric or not self.is_static)
        return self.is_static

    @property
    def is_static(self) -> bool:
        """Whether the ranges of activations come from calibration."""
        return self.activations is not None and not self.activations.dynamic

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code.

        Symmetric int8 leaves out -128 so that the range is balanced; symmetric int4 uses all 16 codes, because its scale
        follows the signed maximum (ir/affine.py).
        """
        return self.format.code_range(symmetric=self.symmetric)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in: float16, where that serves every reader, else float32.

        transformers multiplies (q - zero_point) * scale in the scale's own dtype where it has to dequantize (asymmetric
        schemes, outliers). int4 scales are rounded so that the product is exact in float16 (affine.round_scale); 8-bit
        codes leave no room for that. One scale per channel is so few that float32 costs nothing. bitsandbytes holds float32.
        """
        import torch  # here: recipes and --help need no torch

        if self.codebook is not None:
            return torch.float32
        grouped = isinstance(self.granularity, PerGroup)
        return torch.float16 if self.format.exact_in_float16 or (grouped and self.symmetric) else torch.float32

    def group_size(self, in_features: int) -> int:
        """Return how many consecutive inputs of one output channel share a scale."""
        return self.granularity.group_size if isinstance(self.granularity, PerGroup) else in_features

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape of scale and zero_point: [out, groups], per tensor [1, 1]."""
        if isinstance(self.granularity, PerTensor):
            return 1, 1
        return out_features, in_features // self.group_size(in_features)


def _with_codebook(number_format: NumberFormat, group: str | None, *, double_quant: bool) -> QuantScheme:
    codebook = number_format.codebook
    assert codebook is not None
    granularity = PerGroup(int(group) if group else codebook.default_group)
    return QuantScheme(number_format.bits, True, granularity, family=number_format.family, double_quant=double_quant)


def _no_scheme(text: str) -> UsageError:
    sizes = ", ".join(map(str, CODEBOOKS[0].group_sizes))
    return UsageError(
        "QC-SCHEME-001",
        f"'{text}' is not a scheme",
        hint=f"write {' or '.join(each.name for each in INTEGERS)}, then -tensor, -channel or -gN "
        f"(N one of {', '.join(map(str, GROUP_SIZES))}), then -asym, then -a8, -a4-static, -a8-static or -a16-static, the "
        "static ones also with -sym: for example int4-g32-asym, int8-channel-a8; W4A16 and W8A8 are understood, too; "
        f"{' and '.join(each.name for each in CODEBOOKS)} are for the quantizer nf4, then -gN (N one of {sizes}), then -dq; "
        "float16 and bfloat16 are for the quantizer cast",
    )


@dataclass(frozen=True, slots=True)
class Cast:
    """Floats of half the width: nothing is coded, and every float of a model is rounded to the nearest that there is.

    name: "float16" has 10 bits of fraction and ends at 65504; "bfloat16" has 7, and nearly the range of float32.
    """

    name: HalfType

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stored tensors."""
        import torch

        return torch.float16 if self.name == "float16" else torch.bfloat16


def parse_scheme(text: str) -> QuantScheme | Cast:
    """Parse the scheme of a whole model. Raises UsageError QC-SCHEME-001 for a text that is none."""
    casts = {str(each): each for each in (Cast("float16"), Cast("bfloat16"))}
    return casts[text] if text in casts else QuantScheme.parse(text)


def no_kernel(scheme: QuantScheme) -> UsageError:
    """Return the error QC-PLAN-001, for a scheme whose `has_kernel` is false."""
    return UsageError(
        "QC-PLAN-001",
        f"{scheme}: quantized activations have kernels only with int8 weights per tensor or channel"
        + (", static ones only with int4 weights or with int8 weights without zero points" if scheme.is_static else ""),
        hint=f"take int8-channel-{scheme.activations}, or leave out -{scheme.activations}",
    )


def no_codebooks(scheme: QuantScheme, where: str, target: str) -> UsageError:
    """Return the error QC-PLAN-015, for a scheme with a codebook on a target that has no graph for it."""
    return UsageError(
        "QC-PLAN-015",
        f"{where} ({scheme}): there is no graph with codebooks for {target}",
        hint=f"leave out --target {target}, or take a scheme of integers, such as int4-g32",
    )


def no_zero_points(scheme: QuantScheme, where: str) -> UsageError:
    """Return the error QC-PLAN-007, for a scheme with zero points on CUDA. where: the layer that has it."""
    symmetric = str(scheme).replace("-asym", "")
    return UsageError(
        "QC-PLAN-007",
        f"{where}: the CUDA provider's kernels take no zero points ({scheme})",
        hint=f"take {symmetric}, or leave out --target cuda",
    )
