"""Traced graphs: right for every architecture, batch and decode step, and the same as a trace of all blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import onnx_ir
import pytest
import torch
from calibrate_models import model_of, t5, token_batch
from torch import Tensor, nn
from trace_models import DECODERS, ENCODERS, build, float_session, structure, traced
from transformers.pytorch_utils import Conv1D

from qconvert.errors import InputError
from qconvert.ir.layer import Producer
from qconvert.ir.model import Model
from qconvert.ir.template import DOMAIN, Template
from qconvert.load.factory import load_factory
from qconvert.ort.compare import largest_difference
from qconvert.trace import trace
from qconvert.trace.attention import rotary_caches
from qconvert.trace.capture import capture
from qconvert.trace.cleanup import CLEAN_UPS, cleaned_up
from qconvert.trace.opaque import representatives
from qconvert.trace.signature import FORMS
from qconvert.trace.stamp import stamp

CLOSE = 1e-5


def difference(found: Tensor, expected: Tensor) -> float:
    return largest_difference(found.detach().numpy(), expected.detach().numpy())


# --- the same numbers as torch ---


def on_the_left(batch: dict[str, Tensor], lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The rows of a batch that is padded on the right, padded on the left."""
    shifts = [max(lengths) - length for length in lengths]
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)]) for name, rows in batch.items()
    }


def caches_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_continue_rows_of_different_length(name: str, side: str) -> None:
    """A prefill of three padded rows, then three tokens one by one, against whole rows in torch."""
    model = traced(name)
    lengths, steps = (7, 5, 2), 3
    batch = token_batch(lengths)
    more = torch.randint(1, 100, (3, steps), generator=torch.Generator().manual_seed(9))
    padded = batch if side == "right" else on_the_left(batch, lengths)
    outputs = model.run(padded)
    mask = padded["attention_mask"]
    logits = [[rows[own]] for rows, own in zip(outputs["logits"], mask.bool(), strict=True)]
    for step in range(steps):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
        outputs = model.run({"input_ids": more[:, step : step + 1], "attention_mask": mask, **caches_of(outputs)})
        for row in range(3):
            logits[row].append(outputs["logits"][row])
    for row, length in enumerate(lengths):
        ids = torch.cat((batch["input_ids"][row, :length], more[row]))[None]
        with torch.no_grad():
            expected = model.plain(input_ids=ids).logits[0]
        assert difference(torch.cat(logits[row]), expected) < CLOSE, f"row of {length} tokens"


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param("0001 111 1", id="in-the-first-run"),
        pytest.param("000 0111 1", id="beyond-the-first-run"),
        pytest.param("00 00 11 1", id="whole-runs"),
        pytest.param("1110 011 1", id="between"),
        pytest.param("0 0 1 1 1 1", id="column-by-column"),
    ],
)
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_may_come_in_runs_with_padding_anywhere(name: str, mask: str) -> None:
    model = traced(name)
    bits = torch.tensor([[int(bit) for bit in mask.replace(" ", "")]])
    ids = torch.randint(1, 100, bits.shape, generator=torch.Generator().manual_seed(3))
    outputs: dict[str, Tensor] = {}
    logits = []
    end = 0
    for length in map(len, mask.split()):
        start, end = end, end + length
        outputs = model.run({"input_ids": ids[:, start:end], "attention_mask": bits[:, :end], **caches_of(outputs)})
        logits.append(outputs["logits"][0])
    own = bits[0].bool()
    with torch.no_grad():
        expected = model.plain(input_ids=ids[:, own]).logits[0]
    assert difference(torch.cat(logits)[own], expected) < CLOSE


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_needs_no_positions(side: str) -> None:
    """GPT-2 has 64; the row has 60 tokens in 70 columns."""
    model = traced("gpt2")
    batch = token_batch((60, 70))
    padded = {name: value[:1] for name, value in batch.items()}
    if side == "left":
        padded = {name: value.roll(10, 1) for name, value in padded.items()}
    with torch.no_grad():
        expected = model.plain(input_ids=batch["input_ids"][:1, :60]).logits[0]
    assert difference(model.run(padded)["logits"][0, padded["attention_mask"][0].bool()], expected) < CLOSE


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_ignore_padding(name: str, side: str) -> None:
    """On the right it changes nothing; on the left it moves positions, in torch too."""
    model = traced(name)
    lengths = (8, 5, 3)
    batch = token_batch(lengths)
    if "token_type_ids" in model.model.input_names:
        batch["token_type_ids"] = (torch.arange(8) % 2).expand(3, 8).contiguous() * batch["attention_mask"]
    if side == "left":
        batch = on_the_left(batch, lengths)
    output = model.run(batch)["last_hidden_state"]
    for row, own in enumerate(batch["attention_mask"].bool()):
        alone = {key: value[row : row + 1, own] for key, value in batch.items()}
        with torch.no_grad():
            states = model.plain(**alone if side == "right" else batch).last_hidden_state
        expected = states[0] if side == "right" else states[row, own]
        assert difference(output[row, own], expected) < CLOSE, f"row of {own.sum()} tokens"


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_the_inputs_are_those_that_the_model_takes(name: str) -> None:
    expected = ["input_ids", "attention_mask", *(["token_type_ids"] if name == "bert" else [])]
    assert [value.name for value in traced(name).template.graphs["model"].graph.inputs] == expected


def test_decoders_have_the_inputs_and_outputs_that_onnxruntime_genai_expects() -> None:
    graph = traced("llama").template.graphs["model"].graph
    caches = [f"{layer}.{part}" for layer in range(4) for part in ("key", "value")]
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", *(f"past_key_values.{c}" for c in caches)]
    assert [value.name for value in graph.outputs] == ["logits", *(f"present.{cache}" for cache in caches)]


# --- the fast form where it is right, and only there ---


def attention_of(template: Template) -> list[tuple[str, bool, int]]:
    """Per attention op in forward order: op, whether it rotates, its window (0: none)."""
    found = []
    for node in template.graphs["model"].graph:
        if node.op_type in (GQA, MHA):
            rotates = "do_rotary" in node.attributes
            window = node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else 0
            found.append((node.op_type, rotates, window))
    return found


GQA, MHA = "GroupQueryAttention", "MultiHeadAttention"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [(GQA, True, 0)] * 4),
        ("gpt2", [(GQA, False, 0)] * 3),  # learned positions: nothing to rotate
        ("smollm3", [(GQA, True, 0), (GQA, False, 0)] * 2),  # every second layer has no positions at all
        ("gemma2", [(GQA, True, 4), (GQA, True, 0)] * 2),
        ("gemma3", [(GQA, False, 4), (GQA, False, 0)] * 2),  # two rotary embeddings: the op has room for one
        ("bert", [(MHA, False, 0)] * 3),
        ("mpnet", []),  # relative positions, which the op does not know
    ],
)
def test_which_attention_is_used(name: str, expected: list[tuple[str, bool, int]]) -> None:
    assert attention_of(traced(name).template) == expected


def test_the_norms_of_a_decoder_add_and_its_float_graph_too() -> None:
    """Each of the four blocks has two; the first of all has nothing to add, that of the head adds the last block."""
    nodes = traced("llama").template.graphs["model"].graph
    ops = [node.op_type for node in nodes if node.outputs[0].dtype == onnx_ir.DataType.FLOAT]
    assert (ops.count("SkipSimplifiedLayerNormalization"), ops.count("RMSNormalization"), ops.count("Add")) == (8, 1, 0)


@pytest.mark.usefixtures("traced_anew")
def test_a_clean_up_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def bend_gates(graph: onnx_ir.Graph) -> None:
        for node in [node for node in graph if node.op_type == "Sigmoid"]:
            node.op_type = "Tanh"

    monkeypatch.setattr("qconvert.trace.CLEAN_UPS", (bend_gates,))
    _, model = build("llama")
    ops = {node.op_type for node in trace(model).graphs["model"].graph}
    assert "Sigmoid" in ops
    assert "Tanh" not in ops


@pytest.mark.usefixtures("traced_anew")
def test_a_rotation_that_is_silently_wrong_is_found_and_the_model_rotates_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_caches(module: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_caches(module, positions)
        return cos, -sin

    # Its name in the package is that of the function.
    monkeypatch.setattr(sys.modules["qconvert.trace.signature"], "rotary_caches", reversed_caches)
    _, model = build("llama")
    assert attention_of(trace(model)) == [(GQA, False, 0)] * 4


@pytest.mark.usefixtures("traced_anew")
def test_a_model_that_no_form_gets_right_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconvert.trace.relative_error", lambda *_: 0.25)
    _, model = build("bert")
    with pytest.raises(InputError) as caught:
        trace(model)
    assert caught.value.code == "QC-EXPORT-001"
    assert "tiny (BertModel) can't be exported" in caught.value.message
    reason = "differs from the model by 2.5e-01 of its largest output"
    forms = ("with attention as one operator", "with attention in plain operators")
    assert caught.value.message.endswith("; ".join(f"{form}: {reason}" for form in forms))


def test_a_model_that_does_not_run_in_torch_is_told_from_one_that_can_not_be_traced() -> None:
    model = model_of(nn.Linear(3, 2), example_inputs={"input": torch.ones(2, 4)}, input_names=("input",))
    with pytest.raises(InputError, match="does not run in torch on input: RuntimeError") as caught:
        trace(model)
    assert caught.value.code == "QC-EXPORT-001"


@pytest.mark.usefixtures("traced_anew")
def test_a_lack_of_memory_is_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qconvert.trace.cache.capture", no_memory)
    _, model = build("bert")
    with pytest.raises(MemoryError):
        trace(model)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if bool((y.sum() > 0).item()) else -y


def test_a_model_that_can_not_be_traced_is_an_error_with_the_cause() -> None:
    model = model_of(DataDependent(), example_inputs={"x": torch.ones(2, 4)}, input_names=("x",))
    with pytest.raises(InputError, match="data-dependent") as caught:
        trace(model)
    assert caught.value.code == "QC-EXPORT-001"
    assert "\n" not in caught.value.message
    assert "[" not in caught.value.message


# --- stamping ---


@pytest.mark.parametrize("name", ["smollm3", "bert"])
def test_a_stamped_graph_is_the_graph_of_all_blocks(name: str) -> None:
    stamped = traced(name)
    outputs = [str(value.name) for value in stamped.template.graphs["model"].graph.outputs if "present" not in str(value.name)]
    every = capture(stamped.model, list(stamped.model.blocks), FORMS[stamped.model.task][0], outputs)["model"]
    stamp(every.graph.graph, {block: block for block in stamped.model.blocks})
    cleaned_up(every.graph, CLEAN_UPS)
    assert structure(stamped.template.graphs["model"].graph) == structure(every.graph.graph)


def test_one_block_of_each_kind_is_traced() -> None:
    layers = [f"model.layers.{index}" for index in range(4)]
    assert dict(traced("llama").template.representatives) == dict.fromkeys(layers, layers[0])
    assert list(traced("smollm3").template.representatives.values()) == [layers[0], layers[1]] * 2


def test_blocks_of_other_widths_are_other_kinds() -> None:
    plain, model = build("llama")
    plain.model.layers[2].mlp.up_proj = nn.Linear(64, 96, bias=False)  # type: ignore[index, union-attr]
    assert len(set(representatives(model_of(plain, "causal-lm", blocks=model.blocks)).values())) == 2


# --- encoder-decoders ---


@cache
def traced_t5() -> tuple[Model, Template]:
    model = t5()[1]
    return model, trace(model)


def test_the_graphs_of_an_encoder_decoder_fit_together() -> None:
    """The decoder takes from the encoder what it attends to, under the same names, once per source."""
    graphs = {part: graph.graph for part, graph in traced_t5()[1].graphs.items()}
    cross, past, present = (
        [f"{name}.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
        for name in ("cross_key_values", "past_key_values", "present")
    )
    assert list(graphs) == ["encoder", "decoder"]
    assert [value.name for value in graphs["encoder"].inputs] == ["input_ids", "attention_mask"]
    assert [value.name for value in graphs["encoder"].outputs] == ["last_hidden_state", *cross]
    assert {value.name for value in graphs["decoder"].inputs} == {"input_ids", "encoder_attention_mask", *cross, *past}
    assert [value.name for value in graphs["decoder"].outputs] == ["logits", *present]
    linears = {
        part: {node.attributes["module"].as_string() for node in graph if node.domain == DOMAIN and node.op_type == "Linear"}
        for part, graph in graphs.items()
    }
    makers = {f"decoder.block.{layer}.layer.1.EncDecAttention.{part}" for layer in range(2) for part in ("k", "v")}
    assert {name for name in linears["encoder"] if name.startswith("decoder")} == makers
    assert not linears["decoder"] & linears["encoder"]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_position_biases_of_a_stack_are_computed_once_and_read_by_every_block(part: str) -> None:
    graph = traced_t5()[1].graphs[part].graph
    tables = [node for node in graph if node.op_type == "Embedding" and "relative" in node.attributes["module"].as_string()]
    assert len(tables) == 1
    biases = [node.inputs[5] for node in graph if node.op_type == "MultiHeadAttention" and len(node.inputs) > 5]
    own = [bias for bias in biases if bias is not None]
    assert len(own) == {"encoder": 3, "decoder": 2}[part]
    assert len(set(own)) == 1
    assert len(biases) == len(own)  # the biases of the attention to the source, all zero, are left out


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_stack_that_hands_on_biases_is_stamped_as_if_all_its_blocks_were_traced(part: str) -> None:
    model, template = traced_t5()
    every = capture(model, list(model.blocks), FORMS[model.task][0], ["logits"])[part]
    stamp(every.graph.graph, {block: block for block in model.blocks})
    cleaned_up(every.graph, CLEAN_UPS)
    assert structure(template.graphs[part].graph) == structure(every.graph.graph)


def test_blocks_of_two_stacks_are_never_of_one_kind() -> None:
    assert list(traced_t5()[1].representatives.values()) == [
        "encoder.block.0", "encoder.block.1", "encoder.block.1", "decoder.block.0", "decoder.block.1"
    ]  # fmt: skip


def test_nothing_is_folded_into_what_all_blocks_of_a_decoder_read() -> None:
    """The final norm of the encoder produces the input of every k and v of the decoder's attention to the source."""
    model, template = traced_t5()
    found = {group.layers: group.producer for group in template.groups}
    for layer in range(2):
        attention = f"decoder.block.{layer}.layer.1.EncDecAttention"
        assert found[f"{attention}.k", f"{attention}.v"] is None
        assert found[(f"{attention}.q",)] == Producer("norm", f"decoder.block.{layer}.layer.1.layer_norm")
        assert found[(f"{attention}.o",)] is None  # its v is in the other graph
    assert all(len({model.block_of(name) for name in group}) == 1 for group in found)


def test_layers_whose_weight_the_model_looks_at_are_known_in_every_block() -> None:
    model, template = traced_t5()
    last = {block: 1 if block.startswith("encoder") else 2 for block in model.blocks}
    assert template.weights_read == {f"{block}.layer.{index}.DenseReluDense.wo" for block, index in last.items()}


def test_a_block_that_hands_on_what_comes_of_its_hidden_state_can_not_be_stamped() -> None:
    kinds = {"blocks.0": "blocks.0", "blocks.1": "blocks.1", "blocks.2": "blocks.1"}
    with pytest.raises(InputError, match=r"block blocks\.0 hands on more than its hidden state") as caught:
        stamp(handing_on(depends=True), kinds)
    assert caught.value.code == "QC-EXPORT-002"
    graph = handing_on(depends=False)
    stamp(graph, kinds)
    assert [node.op_type for node in graph] == ["Linear", "Add", "Add", "Add"]
    assert len(list(graph[0].outputs[0].uses())) == 3


def handing_on(depends: bool) -> onnx_ir.Graph:
    """Two blocks, y = x + b, where the first makes b: of its hidden state, or of a layer that reads something else."""
    x, other = (onnx_ir.Value(name=name) for name in ("x", "other"))

    def marker(kind: str, block: str, value: onnx_ir.Value) -> onnx_ir.Node:
        return onnx_ir.node(kind, [value], {"block": block}, domain=DOMAIN)

    enter = marker("BlockInput", "blocks.0", x)
    made = onnx_ir.node("Linear", [enter.outputs[0] if depends else other], {"module": "blocks.0.make"}, domain=DOMAIN)
    first = onnx_ir.node("Add", [enter.outputs[0], made.outputs[0]])
    leave = marker("BlockOutput", "blocks.0", first.outputs[0])
    enter_next = marker("BlockInput", "blocks.1", leave.outputs[0])
    second = onnx_ir.node("Add", [enter_next.outputs[0], made.outputs[0]])
    leave_next = marker("BlockOutput", "blocks.1", second.outputs[0])
    nodes = [enter, made, first, leave, enter_next, second, leave_next]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"value_{number}"
    return onnx_ir.Graph([x, other], [leave_next.outputs[0]], nodes=nodes, opset_imports={"": 23, DOMAIN: 1})


# --- plain modules ---


class Zoo(nn.Module):
    """Kinds of layers that are traced as such, in one module, with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(8 * 4 * 4)
        self.fc = nn.Linear(8 * 4 * 4, 16)
        self.conv1d = Conv1D(6, 16)
        self.table = nn.Embedding(5, 16)
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, image: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.fc(self.norm(torch.relu(self.conv(image)).flatten(1))) * self.scale + self.table(index)
        return self.conv1d(hidden), hidden


def zoo_inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"image": torch.randn(rows, 3, 8, 8, generator=generator), "index": torch.arange(rows) % 5}


@pytest.fixture(scope="module")
def zoo() -> tuple[Zoo, Template, Any]:
    torch.manual_seed(0)
    plain = Zoo().eval()
    model = model_of(plain, example_inputs=zoo_inputs(1), input_names=("image", "index"))
    template = trace(model)
    return plain, template, float_session(model, template)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_module_with_two_outputs_runs_with_any_number_of_rows(zoo: tuple[Zoo, Template, Any], rows: int) -> None:
    plain, template, session = zoo
    assert [value.name for value in template.graphs["model"].graph.outputs] == ["output_0", "output_1"]
    found = session.run(None, {name: value.numpy() for name, value in zoo_inputs(rows).items()})
    with torch.no_grad():
        expected = plain(**zoo_inputs(rows))
    for one, other in zip(found, expected, strict=True):
        assert largest_difference(one, other.numpy()) < CLOSE


def test_layers_are_opaque_nodes_that_name_their_module(zoo: tuple[Zoo, Template, Any]) -> None:
    _, template, _ = zoo
    opaque = {node.attributes["module"].as_string(): node for node in template.graphs["model"].graph if node.domain == DOMAIN}
    assert {name: node.op_type for name, node in opaque.items()} == {
        "conv": "Conv", "fc": "Linear", "conv1d": "Linear", "table": "Embedding"
    }  # fmt: skip
    assert opaque["conv1d"].attributes["kind"].as_string() == "conv1d"
    assert list(opaque["conv"].attributes["strides"].as_ints()) == [2, 2]
    assert "scale" in template.graphs["model"].graph.initializers


def test_tracing_leaves_the_skeleton_as_it_was() -> None:
    model = traced("llama").model
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert len(model.module.model.layers) == model.module.config.num_hidden_layers == 4  # type: ignore[arg-type, union-attr]
    assert not model.module.model.layers[0]._forward_hooks  # type: ignore[index, union-attr]


# --- groups ---


def groups_of(name: str) -> list[tuple[list[str], object]]:
    """Short layer names and (kind, name, channels) of the producer, of the first block."""
    model = traced(name)
    prefix = model.model.blocks[0] + "."
    found: list[tuple[list[str], object]] = []
    for group in model.template.groups:
        if group.layers[0].startswith(prefix):
            producer = group.producer
            short = None if producer is None else (producer.kind, producer.name.removeprefix(prefix), producer.channels)
            found.append(([layer.removeprefix(prefix) for layer in group.layers], short))
    return found


def test_groups_of_llama() -> None:
    # Two key and value heads for four query heads: the output's channels are copies of v's, each head's twice.
    channels = (*range(16), *range(16), *range(16, 32), *range(16, 32))
    assert groups_of("llama") == [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ("norm", "input_layernorm", None)),
        (["self_attn.o_proj"], ("linear", "self_attn.v_proj", channels)),
        (["mlp.gate_proj", "mlp.up_proj"], ("norm", "post_attention_layernorm", None)),
        (["mlp.down_proj"], ("linear", "mlp.up_proj", None)),
    ]


def test_groups_of_gpt2() -> None:
    assert groups_of("gpt2") == [
        (["attn.c_attn"], ("norm", "ln_1", None)),
        (["attn.c_proj"], None),  # q, k and v are one linear: its rows are no channels of the output
        (["mlp.c_fc"], ("norm", "ln_2", None)),
        (["mlp.c_proj"], None),  # the activation between does not commute with a scale
    ]


def test_groups_of_bert() -> None:
    attention = "attention.self"
    assert groups_of("bert") == [
        ([f"{attention}.query", f"{attention}.key", f"{attention}.value"], None),  # the residual reads their input too
        (["attention.output.dense"], ("linear", f"{attention}.value", None)),
        (["intermediate.dense"], None),
        (["output.dense"], None),
    ]


def test_groups_name_the_layers_of_every_block_and_the_head() -> None:
    model = traced("llama")
    names = [name for name, module in model.plain.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(name for group in model.template.groups for name in group.layers) == sorted(names)


# Layers whose forward or weight is not the one that we know


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(lambda: Standardized(3, 4, 3), (3, 6, 6), id="conv-subclass"),
        pytest.param(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), (8,), id="weight-norm"),
        pytest.param(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8), id="transformer-layer"),
    ],
)
def test_what_is_no_plain_layer_is_traced_as_it_is(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(layer()), torch.randn(3, *shape)
    code = ModuleType("odd_layers")
    code.make = lambda: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_layers", code)
    template = trace(load_factory("module:odd_layers:make"))
    opaque = {node.attributes["module"].as_string() for node in template.graphs["model"].graph if node.domain == DOMAIN}
    assert opaque <= {"0.linear1", "0.linear2"}
