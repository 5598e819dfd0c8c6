"""execution/block_runner.py: a model run block by block computes exactly what it computes whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrate_models import bert, gpt2, llama, model_of, source_batch, t5, text_model, tiny_bert, token_batch
from torch import Tensor, nn

from qconvert.errors import InputError, UsageError
from qconvert.execution.block_runner import BlockRunner
from qconvert.execution.materialize import materialize
from qconvert.ir.model import Model

BATCHES = [token_batch((7, 7)), token_batch((9, 4, 6), seed=1)]


def outputs(model: Model, batches: list[dict[str, Tensor]], **options: object) -> list[Tensor]:
    runner = BlockRunner(model, **options)  # type: ignore[arg-type]
    runner.start(batches)
    for index in range(len(model.blocks)):
        runner.run_block(index)
    return [first for first, *_ in runner.outputs()]


@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_block_by_block_gives_bit_for_bit_what_the_plain_model_gives(build: Callable[[], tuple[nn.Module, Model]]) -> None:
    plain, model = build()
    found = outputs(model, BATCHES)
    with torch.no_grad():
        expected = [plain(**batch)[0] for batch in BATCHES]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({output.std().item() for output in found}) == len(BATCHES)


def test_an_encoder_is_compared_by_its_hidden_state_even_under_a_head() -> None:
    plain: Any = tiny_bert(head=True)
    model = text_model(plain, "encoder", "bert.encoder.layer")
    with torch.no_grad():
        expected = plain.bert(**BATCHES[1]).last_hidden_state
    assert torch.equal(outputs(model, BATCHES[1:])[0], expected)


def test_a_model_without_blocks_runs_whole() -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    assert torch.equal(outputs(model_of(plain, input_names=("input",)), [{"input": x}])[0], plain(x))


def test_weights_can_come_from_elsewhere() -> None:
    plain, model = llama()
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight.mul_(2)
        expected = plain(**BATCHES[0])[0]

    def read(name: str) -> Tensor:
        return model.read(name) * 2 if name == "model.layers.1.mlp.up_proj.weight" else model.read(name)

    assert torch.equal(outputs(model, BATCHES[:1], read=read)[0], expected)


def test_only_one_unit_is_materialized_and_everything_is_meta_afterwards() -> None:
    _, model = llama()
    with materialize(model, "model.layers.1"):
        real = {name for name, parameter in model.module.named_parameters() if not parameter.is_meta}
    assert real
    assert all(name.startswith("model.layers.1.") for name in real)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    with materialize(model, ""):
        real = {name for name, parameter in model.module.named_parameters() if not parameter.is_meta}
    assert real == {"model.embed_tokens.weight", "model.norm.weight"}


def test_the_skeleton_is_restored_when_reading_fails() -> None:
    _, model = llama()

    def read(name: str) -> Tensor:
        if "mlp" in name:
            raise InputError("QC-TEST", "damaged", hint="")
        return model.read(name)

    with pytest.raises(InputError), materialize(model, "model.layers.0", read):
        pass
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_float32_sources_are_not_copied_and_a_tied_tensor_is_read_once() -> None:
    _, model = llama()
    with materialize(model, ""):
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight  # type: ignore[union-attr]
        assert model.module.lm_head.weight.data_ptr() == model.source.held["model.embed_tokens.weight"].data_ptr()  # type: ignore[attr-defined, operator, union-attr]
    assert model.source.reads.count("model.embed_tokens.weight") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("build", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
def test_the_layers_of_a_large_block_are_read_one_by_one_and_compute_the_same(
    build: Callable[[], tuple[nn.Module, Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = build()
    batches = SOURCES if model.task.reads_source else BATCHES
    expected = outputs(model, batches)
    read = Reading(model)
    monkeypatch.setattr("qconvert.execution.materialize.LARGE_BLOCK", 0)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batches, read=read), expected, strict=True))
    assert read.most == 1
    assert all(parameter.is_meta for parameter in model.module.parameters())


class Reading:
    """Reads the parameters of a model. most: how many matrices of blocks that it has given were ever held at once."""

    def __init__(self, model: Model) -> None:
        self.model, self.most = model, 0
        self._given: list[weakref.ref[Any]] = []

    def __call__(self, name: str) -> Tensor:
        values = self.model.read(name).numpy().copy()  # a tensor's memory lives as long as it does
        if self.model.block_of(name) and values.ndim == 2 and "relative_attention" not in name:
            self._given = [*(given for given in self._given if given() is not None), weakref.ref(values)]
            self.most = max(self.most, len(self._given))
        return torch.from_numpy(values)


def test_half_precision_sources_run_in_float32() -> None:
    plain, model = llama()
    model.source.held = {name: value.bfloat16() for name, value in model.source.held.items()}  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = plain(**BATCHES[0])[0]
    assert torch.equal(outputs(model, BATCHES[:1])[0], expected)


# --- encoder-decoders: two stacks, whose first blocks hand on position biases ---

SOURCES = [source_batch((7, 7)), source_batch((9, 4, 6), seed=1)]


def test_both_halves_run_block_by_block_bit_for_bit() -> None:
    plain, model = t5()
    found = outputs(model, SOURCES)
    with torch.no_grad():
        expected = [plain(**batch).logits for batch in SOURCES]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_decoder_begins_where_the_encoder_has_ended() -> None:
    """`hidden` is the input of the next block: embedded source, encoded source, embedded target."""
    plain, model = t5()
    runner = BlockRunner(model)
    runner.start(SOURCES[:1])
    assert torch.equal(runner.lanes[0].state, plain.shared(SOURCES[0]["input_ids"]))
    for index in range(3):
        runner.run_block(index)
    with torch.no_grad():
        encoded = plain.encoder(input_ids=SOURCES[0]["input_ids"]).last_hidden_state
    assert torch.equal(plain.encoder.final_layer_norm(runner.lanes[0].state), encoded)
    runner.enter(3)
    assert torch.equal(runner.lanes[0].state, plain.shared(SOURCES[0]["decoder_input_ids"]))


def test_one_block_is_in_memory_at_a_time_in_both_halves() -> None:
    _, model = t5()
    runner = BlockRunner(model)
    runner.start(SOURCES)
    for index, block in enumerate(model.blocks):
        runner.enter(index)
        with runner.weights_of(block):
            real = {model.block_of(name) for name, parameter in model.module.named_parameters() if not parameter.is_meta}
        assert real == {block}


def test_position_biases_that_a_later_block_changes_are_refused_rather_than_lost() -> None:
    _, model = t5()
    block = model.module.decoder.block[1]  # type: ignore[union-attr, index]
    plain = block.forward  # type: ignore[union-attr]

    def changed(*args: Any, **kwargs: Any) -> Any:
        hidden, bias, cross = plain(*args, **kwargs)
        return hidden, bias + 1, cross

    block.forward = changed  # type: ignore[union-attr]
    with pytest.raises(InputError, match="block 4 hands on other tensors, beside the hidden state, than the first one"):
        outputs(model, SOURCES)


# --- models that are no chain of blocks ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, offset: Tensor) -> tuple[Tensor, None]:
        return hidden_states + torch.tanh(self.linear(hidden_states)) * offset, None


class Chain(nn.Module):
    """Blocks that are called by keyword, get an argument of their own and return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = x * 2
        for index, block in enumerate(self.blocks):
            hidden = self.between(block(hidden_states=hidden, offset=x[0] + index)[0])
        return {"scores": hidden.sum(-1)}

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


class Scaled(Chain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * 0.5


class Skipping(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.order = (0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for index in self.order:
            x = self.blocks[index](x, x[0])[0]
        return x


class Early(Skipping):
    def __init__(self) -> None:
        super().__init__()
        self.order = (0, 1)  # type: ignore[assignment]


class Talkative(Chain):
    """Blocks that hand on a second tensor, another one each."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.forward = lambda hidden_states, offset: (hidden_states, offset)


def chain_model(plain: nn.Module) -> Model:
    return model_of(plain, blocks=("blocks.0", "blocks.1", "blocks.2"), input_names=("x",))


def test_blocks_may_be_called_by_keyword_and_return_tuples() -> None:
    plain, x = Chain(), torch.randn(2, 3, 4)
    assert torch.equal(outputs(chain_model(plain), [{"x": x}])[0], plain(x)["scores"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "changes the hidden state between blocks 0 and 1"),
        (Skipping, "block 2 is called where block 1 should be"),
        (Early, "only 2 of 3 blocks are called"),
        (Talkative, "block 1 hands on other tensors, beside the hidden state, than the first one"),
    ],
    ids=["changed between", "out of order", "left out", "second tensor"],
)
def test_models_whose_blocks_are_no_chain_are_refused_rather_than_run_wrongly(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        outputs(chain_model(kind()), [{"x": torch.randn(2, 3, 4)}])
    assert caught.value.code == "QC-BLOCK-001"
    assert "'blocks.0'" in caught.value.message


def test_a_device_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'abacus'") as caught:
        BlockRunner(llama()[1], device="abacus")
    assert caught.value.code == "QC-DEVICE-001"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_blocks_run_on_cuda(build: Callable[[], tuple[nn.Module, Model]]) -> None:
    plain, model = build()
    with torch.no_grad():
        expected = plain(**BATCHES[1])[0]
    found = outputs(model, BATCHES[1:], device="cuda")[0]
    assert found.is_cuda
    assert torch.allclose(found.cpu(), expected, atol=1e-4)
    assert all(not buffer.is_cuda for buffer in model.module.buffers())
