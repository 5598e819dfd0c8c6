"""The passes over traced graphs, each on a graph of a few nodes, and the rules of who produces a group's input."""

from __future__ import annotations

import onnx_ir
import pytest

from qconvert.errors import InputError
from qconvert.graph.float_graph import replace
from qconvert.ir.layer import Producer
from qconvert.trace.cleanup import (
    drop_markers,
    drop_reshape_pairs,
    fuse_sums_into_rms_norms,
    keep_sums_before_norms,
    pad_in_convolutions,
    remove_unused,
)
from qconvert.trace.groups import input_groups
from qconvert.trace.stamp import stamp

HEADER = '<ir_version: 10, opset_import: ["" : 23, "qconvert" : 1, "com.microsoft" : 1]> agraph '


def parse(text: str) -> onnx_ir.Model:
    """A graph in ONNX's text form: (inputs) => (outputs) <inner values> { nodes }; "__" stands for the dot in a name."""
    model = onnx_ir.from_onnx_text(HEADER + text)
    for value in [*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs]:
        value.name = str(value.name).replace("__", ".")
    return model


def nodes(model: onnx_ir.Model) -> list[str]:
    """op(inputs) of every node."""
    return [f"{node.op_type}({', '.join(value.name or '' for value in node.inputs if value)})" for node in model.graph]


# --- reshape pairs ---

PAIR = "{ h = Reshape(x, to_heads) j = Reshape(h, to_rows) y = Relu(j) }"


def reshapes(inner: str, there_and_back: tuple[str, str]) -> onnx_ir.Model:
    first, last = there_and_back
    return parse(
        f"(float[{first}] x, int64[4] to_heads, int64[3] to_rows) => (float[{last}] y)"
        f"<float[B,S,2,3] h, float[{last}] j> {inner}"
    )


def test_a_reshape_there_and_back_is_dropped() -> None:
    model = reshapes(PAIR, ("B,S,6", "B,S,6"))
    drop_reshape_pairs(model.graph)
    remove_unused(model)
    assert nodes(model) == ["Relu(x)"]


def test_a_reshape_to_another_shape_stays() -> None:
    model = reshapes(PAIR, ("B,S,6", "B,T,6"))
    drop_reshape_pairs(model.graph)
    assert nodes(model)[-1] == "Relu(j)"


def test_what_else_reads_the_middle_still_can() -> None:
    model = reshapes("{ h = Reshape(x, to_heads) j = Reshape(h, to_rows) k = Neg(h) y = Relu(j, k) }", ("B,S,6", "B,S,6"))
    drop_reshape_pairs(model.graph)
    remove_unused(model)
    assert nodes(model) == ["Reshape(x, to_heads)", "Neg(h)", "Relu(x, k)"]


def test_unknown_sizes_are_not_taken_for_equal() -> None:
    model = reshapes(PAIR, ("B,?,6", "B,?,6"))
    drop_reshape_pairs(model.graph)
    assert nodes(model)[-1] == "Relu(j)"


# --- sums before norms ---


def test_a_sum_that_is_normalised_stays_out_of_the_slow_fusion() -> None:
    model = parse(
        "(float[B,6] x, float[B,6] z, float[6] w) => (float[B,6] y, float[B,6] other)"
        "{ s = Add(x, z) y = LayerNormalization(s, w) other = Add(y, z) }"
    )
    keep_sums_before_norms(model.graph)
    assert nodes(model) == ["Sum(x, z)", "LayerNormalization(s, w)", "Add(y, z)"]


def normalised_sum(attributes: str = "", shape: str = "B,S,6") -> onnx_ir.Model:
    return parse(
        f"(float[B,S,6] x, float[{shape}] z, float[6] w) => (float[B,S,6] y, float[B,S,6] other) <float[B,S,6] s>"
        f"{{ s = Add(x, z) other = Neg(s) y = RMSNormalization{attributes}(s, w) }}"
    )


def test_a_sum_and_its_rms_norm_become_one_op_that_gives_both() -> None:
    model = normalised_sum("<epsilon = 0.25>")
    fuse_sums_into_rms_norms(model.graph)
    assert nodes(model) == ["SkipSimplifiedLayerNormalization(x, z, w)", "Neg(s)"]
    fused = next(iter(model.graph))
    assert [output.name for output in fused.outputs] == ["y", "", "", "s"]
    assert fused.attributes["epsilon"].as_float() == 0.25
    assert [output.name for output in model.graph.outputs] == ["y", "other"]


@pytest.mark.parametrize("model", [normalised_sum(shape="1,S,6"), normalised_sum("<axis = 1>")], ids=["broadcast", "two axes"])
def test_what_that_op_does_not_compute_stays(model: onnx_ir.Model) -> None:
    before = nodes(model)
    fuse_sums_into_rms_norms(model.graph)
    assert nodes(model) == before


# --- markers, names, leftovers ---


def test_markers_are_dropped_wherever_they_are() -> None:
    model = parse(
        """(float[2] x) => (float[2] y) {
            a = qconvert.BlockInput <block="b"> (x)
            c = Relu(a)
            y = qconvert.BlockOutput <block="b"> (c)
        }"""
    )
    drop_markers(model.graph)
    assert nodes(model) == ["Relu(x)"]
    assert [value.name for value in model.graph.outputs] == ["y"]  # the public name stays


def test_a_replaced_output_keeps_its_name_and_type() -> None:
    model = parse("(float[2] x) => (float[2] y) { a = Relu(x) y = Identity(a) }")
    relu, identity = model.graph
    replace(identity.outputs[0], relu.outputs[0])
    assert model.graph.outputs[0] is relu.outputs[0]
    assert (relu.outputs[0].name, relu.outputs[0].dtype) == ("y", onnx_ir.DataType.FLOAT)


def test_what_nothing_needs_is_removed() -> None:
    model = parse(
        "(float[2] x) => (float[2] y) <float[2] used = {1, 2}, float[2] unused = {3, 4}>{ a = Add(x, unused) y = Add(x, used) }"
    )
    remove_unused(model)
    assert nodes(model) == ["Add(x, used)"]
    assert list(model.graph.initializers) == ["used"]


# --- stamping ---


def test_a_block_whose_hidden_state_is_lost_is_an_error_that_names_it() -> None:
    model = parse('(float[2] x) => (float[2] y) { a = qconvert.BlockInput <block="h.0"> (x) y = Relu(a) }')
    with pytest.raises(InputError, match=r"block h\.0 takes or returns its hidden state") as caught:
        stamp(model.graph, {"h.0": "h.0", "h.1": "h.0"})
    assert caught.value.code == "QC-EXPORT-002"
    assert "module:FACTORY" in caught.value.hint


def test_stamped_blocks_have_their_own_parameters_and_caches_and_share_the_rest() -> None:
    model = parse(
        """(float[2] x, float[2] past_key_values__0__key) => (float[2] y, float[2] present__0__key)
        <float[2] h__0__norm__weight = {1, 2}> {
            mask = Neg(x)
            a = qconvert.BlockInput <block="h.0"> (x)
            present__0__key = Add(a, past_key_values__0__key)
            c = qconvert.Linear <module="h.0.fc"> (present__0__key)
            d = Mul(c, h__0__norm__weight)
            e = Mul(d, mask)
            f = qconvert.BlockOutput <block="h.0"> (e)
            y = Relu(f)
        }"""
    )
    weight = model.graph.initializers["h.0.norm.weight"]
    weight.const_value = onnx_ir.LazyTensor(lambda: onnx_ir.tensor([1.0, 2.0]), onnx_ir.DataType.FLOAT, onnx_ir.Shape([2]))
    stamp(model.graph, {"h.0": "h.0", "h.1": "h.0"})
    assert nodes(model) == [
        "Neg(x)",
        "Add(x, past_key_values.0.key)",
        "Linear(present.0.key)",
        "Mul(h.0/c, h.0.norm.weight)",
        "Mul(h.0/d, mask)",
        "Add(h.0/e, past_key_values.1.key)",
        "Linear(present.1.key)",
        "Mul(h.1/c, h.1.norm.weight)",
        "Mul(h.1/d, mask)",
        "Relu(h.1/e)",
    ]
    assert [node.attributes["module"].as_string() for node in model.graph if node.op_type == "Linear"] == ["h.0.fc", "h.1.fc"]
    assert [value.name for value in model.graph.inputs] == ["x", "past_key_values.0.key", "past_key_values.1.key"]
    assert [value.name for value in model.graph.outputs] == ["y", "present.0.key", "present.1.key"]
    assert sorted(model.graph.initializers) == ["h.0.norm.weight", "h.1.norm.weight"]


# --- producers ---


def linear(name: str, x: str) -> str:
    return f'{name} = qconvert.Linear <module="{name}"> ({x})'


def producer_of(text: str, layer: str = "fc", outputs: str = "float[B,S,4] fc") -> Producer | None:
    weights = "float[4] n__weight = {1, 1, 1, 1}, float[4] one = {1, 1, 1, 1}"
    model = parse(f"(float[B,S,4] x) => ({outputs}) <{weights}> {{ {text} }}")
    return next(group.producer for group in input_groups([model.graph], lambda name: "") if layer in group.layers)


NORM = "a = LayerNormalization(x, n__weight)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{NORM} {linear('fc', 'a')}", Producer("norm", "n")),
        (f"a = RMSNormalization(x, n__weight) {linear('fc', 'a')}", Producer("norm", "n")),
        (
            f"a, m, d, s = com.microsoft.SkipSimplifiedLayerNormalization(x, x, n__weight) {linear('fc', 'a')}",
            Producer("norm", "n"),
        ),
        (f"a, m, d, s = com.microsoft.SkipSimplifiedLayerNormalization(x, x, n__weight) {linear('fc', 's')}", None),  # the sum
        (f"a = LayerNormalization(x, one) {linear('fc', 'a')}", None),  # a norm without a weight of its own
        (f"{linear('up', 'x')} {linear('fc', 'up')}", Producer("linear", "up")),
        (f"{linear('up', 'x')} a = Relu(up) {linear('fc', 'a')}", Producer("linear", "up")),
        (f"{linear('up', 'x')} a = Gelu(up) {linear('fc', 'a')}", None),  # gelu(s x) is not s gelu(x)
        (f"{linear('up', 'x')} a = Mul(x, up) {linear('fc', 'a')}", Producer("linear", "up")),
        (f"{linear('up', 'x')} a = Mul(up, x) {linear('fc', 'a')}", Producer("linear", "up")),
        (f"{linear('up', 'x')} a = Add(x, up) {linear('fc', 'a')}", None),
        (linear("fc", "x"), None),  # the graph's input
    ],
    ids=[
        "layer norm",
        "rms norm",
        "norm of a sum",
        "the sum",
        "plain norm",
        "linear",
        "relu",
        "gelu",
        "mul right",
        "mul left",
        "add",
        "input",
    ],
)
def test_a_scale_folds_into(text: str, expected: Producer | None) -> None:
    assert producer_of(text) == expected


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        (f"{NORM} {linear('fc', 'a')} b = Neg(a)", "float[B,S,4] fc, float[B,S,4] b"),
        (f"{NORM} {linear('fc', 'a')}", "float[B,S,4] fc, float[B,S,4] a"),
        (f"{linear('up', 'x')} a = Relu(up) {linear('fc', 'a')} b = Neg(up)", "float[B,S,4] fc, float[B,S,4] b"),
    ],
    ids=["read by another op", "an output of the graph", "the linear before has another reader"],
)
def test_nothing_folds_into_what_others_see_too(text: str, outputs: str) -> None:
    assert producer_of(text, outputs=outputs) is None


def test_linears_of_one_input_are_one_group_and_a_convolution_is_alone() -> None:
    model = parse(
        f"""(float[B,4] x) => (float[B,4] a, float[B,4] b, float[B,4] c) {{
            {linear("a", "x")}
            c = qconvert.Conv <module="c"> (x)
            {linear("b", "x")}
        }}"""
    )
    assert [group.layers for group in input_groups([model.graph], lambda name: "")] == [("a", "b"), ("c",)]


def attention(op: str, attributes: str) -> str:
    projections = " ".join(linear(name, "x") for name in ("q", "k", "v"))
    return f"{projections} a = com.microsoft.{op} <{attributes}> (q, k, v) {linear('fc', 'a')}"


def test_attention_passes_the_channels_of_v_on() -> None:
    assert producer_of(attention("MultiHeadAttention", "num_heads = 2")) == Producer("linear", "v")


def test_grouped_attention_repeats_the_heads_of_v() -> None:
    model = parse(
        f"(float[B,S,4] x) => (float[B,S,4] fc) <float[B,S,8] a>"
        f"{{ {attention('GroupQueryAttention', 'num_heads = 4, kv_num_heads = 2')} }}"
    )
    producer = next(group.producer for group in input_groups([model.graph], lambda name: "") if "fc" in group.layers)
    assert producer == Producer("linear", "v", (0, 1, 0, 1, 2, 3, 2, 3))


def padded(pads: str, inputs: str = "x, pads", mode: str = "constant") -> onnx_ir.Model:
    """A Pad before a convolution that pads one pixel on all sides by itself."""
    return parse(f"""(float[n,3,8,8] x) => (float[n,4,a,b] y)
        <int64[8] pads = {{{pads}}}, float zero = {{0}}, float one = {{1}}, int64[4] axes = {{0, 1, 2, 3}}> {{
        p = Pad<mode = "{mode}">({inputs})
        y = qconvert.Conv<module = "conv", pads = [1, 1, 1, 1], strides = [1, 1]>(p)
    }}""")


@pytest.mark.parametrize("inputs", ["x, pads", "x, pads, zero"])
def test_zeros_around_images_become_the_convolution_s(inputs: str) -> None:
    model = padded("0, 0, 2, 3, 0, 0, 4, 5", inputs)
    pad_in_convolutions(model.graph)
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert list(conv.attributes["pads"].as_ints()) == [3, 4, 5, 6]
    assert conv.inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize(
    ("pads", "inputs", "mode"),
    [
        ("0, 0, 2, 3, 0, 0, 4, 5", "x, pads, one", "constant"),
        ("0, 0, 2, 3, 0, 0, 4, 5", "x, pads", "reflect"),
        ("0, 0, -2, 3, 0, 0, 4, 5", "x, pads", "constant"),
        ("0, 1, 2, 3, 0, 0, 4, 5", "x, pads", "constant"),
        ("0, 0, 2, 3, 0, 0, 4, 5", "x, pads, zero, axes", "constant"),
    ],
)
def test_any_other_padding_is_left_alone(pads: str, inputs: str, mode: str) -> None:
    model = padded(pads, inputs, mode)
    pad_in_convolutions(model.graph)
    assert [node.op_type for node in model.graph] == ["Pad", "Conv"]
