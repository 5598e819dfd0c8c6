"""ir/scheme.py: schemes as text, and what each means in shapes, codes and dtypes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from qconvert.errors import UsageError
from qconvert.ir.number_format import GROUP_SIZES
from qconvert.ir.scheme import DYNAMIC_INT8, PerChannel, PerGroup, PerTensor, QuantScheme
from qconvert.recipe import Recipe

EVERY = [
    f"int{bits}-{granularity}{asym}{a8}"
    for bits, granularity, asym, a8 in product(
        (4, 8), ("tensor", "channel", *(f"g{size}" for size in GROUP_SIZES)), ("", "-asym"), ("", "-a8")
    )
]


@pytest.mark.parametrize("text", EVERY)
def test_parse_and_str_are_inverses(text: str) -> None:
    assert str(QuantScheme.parse(text)) == text


def test_each_part_of_the_text_sets_one_field() -> None:
    assert QuantScheme.parse("int4-g32-asym") == QuantScheme(4, False, PerGroup(32))
    assert QuantScheme.parse("int8-tensor") == QuantScheme(8, True, PerTensor())
    assert QuantScheme.parse("int8-channel-asym-a8") == QuantScheme(8, False, PerChannel(), DYNAMIC_INT8)


@pytest.mark.parametrize("text", ["int4", "int8-asym", "int8-a8", "int4-asym-a8"])
def test_without_a_granularity_per_channel_is_meant(text: str) -> None:
    bits, *flags = text.split("-")
    assert str(QuantScheme.parse(text)) == "-".join((bits, "channel", *flags))


@pytest.mark.parametrize(
    "text",
    [
        *("", "int", "int3", "int16", "INT4", "fp8", "float", "int4 ", "int4\n", "int8-a16", "int4-sym", "int4-a8-asym"),
        *("int4-g", "int4-g0", "int4-g8", "int4-g33", "int4-g512", "int4-channel-channel", "int4-g32-g32"),
    ],
    ids=repr,
)
def test_what_is_no_scheme_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        QuantScheme.parse(text)
    assert raised.value.code == "QC-SCHEME-001"
    assert f"{text!a} is not a scheme" in raised.value.message
    assert "16, 32, 64, 128, 256" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "shape"),
    [("int8-tensor", (1, 1)), ("int8-channel", (6, 1)), ("int8-g16", (6, 8)), ("int4-g128-asym", (6, 1))],
)
def test_scales_are_out_by_groups(text: str, shape: tuple[int, int]) -> None:
    assert QuantScheme.parse(text).scale_shape(6, 128) == shape


@pytest.mark.parametrize(
    ("text", "codes"), [("int8", (-127, 127)), ("int8-asym", (-128, 127)), ("int4", (-8, 7)), ("int4-asym", (-8, 7))]
)
def test_only_symmetric_int8_leaves_a_code_out(text: str, codes: tuple[int, int]) -> None:
    assert QuantScheme.parse(text).code_range == codes


@pytest.mark.parametrize("text", EVERY)
def test_scales_are_float16_where_they_are_many_or_round_to_what_float16_multiplies_exactly(text: str) -> None:
    small = text.startswith("int4") or ("-g" in text and "asym" not in text)
    assert QuantScheme.parse(text).scale_dtype == (torch.float16 if small else torch.float32)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("W4A16", "int4-g128"),
        ("W4A16_ASYM", "int4-g128-asym"),
        ("W8A16", "int8-channel"),
        ("W8A8", "int8-channel-a8"),
        ("w4a16", "int4-g128"),
    ],
)
def test_what_compressed_tensors_calls_a_scheme_is_understood(name: str, text: str) -> None:
    assert str(QuantScheme.parse(name)) == text
    recipe = Recipe.from_settings({"model": "m", "output": "o", "scheme": name, "rules": [{"pattern": "*", "scheme": name}]})
    assert recipe.model_dump(mode="json")["scheme"] == text
    assert recipe.rules[0].scheme == recipe.scheme


@pytest.mark.parametrize("name", ["W4A8", "W3A16", "W8A8_ASYM", "W4A16-asym"])
def test_other_names_of_that_kind_are_no_schemes(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        QuantScheme.parse(name)
    assert "W4A16 and W8A8 are understood" in raised.value.hint
